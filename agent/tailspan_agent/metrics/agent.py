"""The agent's own health, counted with the OpenTelemetry metrics SDK.

The instruments belong to a meter provider of this object alone: the global one is never set, nothing runs in the
background, and values are collected when somebody asks (`AgentMetrics.collect`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, ScopeMetrics
from opentelemetry.sdk.resources import Resource

from tailspan import __version__

__all__ = ["AgentMetrics", "agent_resource"]


def agent_resource(service_name: str, instance_id: str, otlp_resource: Mapping[str, str]) -> Resource:
    """Return the resource of what the agent says about itself, and of all metrics.

    Args:
        service_name: ``agent.service_name`` (``OTEL_SERVICE_NAME``), which names only the agent itself.
        instance_id: The UUID of the agent's state directory.
        otlp_resource: ``[otlp.resource]`` of the configuration; it yields to the agent's own keys.
    """
    return Resource(
        {
            **otlp_resource,
            "service.name": service_name,
            "service.version": __version__,
            "service.instance.id": instance_id,
        }
    )


class _Counter:
    """A count that costs a dictionary's update; the SDK's own counter costs 15 us, many times a page.

    Args:
        create: A meter's method for observable counters.
        name: The instrument's name.
        unit: Its unit.
        description: What it counts.
    """

    def __init__(self, create: Callable[..., object], name: str, unit: str, description: str) -> None:
        self._counts: dict[tuple[tuple[str, str], ...], int] = {}
        create(name, [self._observe], unit, description)

    def add(self, n: int, attributes: Mapping[str, str]) -> None:
        key = tuple(attributes.items())
        self._counts[key] = self._counts.get(key, 0) + n

    def _observe(self, _: CallbackOptions) -> Iterator[Observation]:
        # A copy: /metrics may be asked for from another thread.
        for attributes, count in list(self._counts.items()):
            yield Observation(count, dict(attributes))


class AgentMetrics:
    """What the agent does, as counters and gauges ``tailspan.agent.*``. Calls are meant once per page or batch.

    Args:
        resource: From `agent_resource`.
        clock_s: Seconds since the epoch.

    Attributes:
        metrics_fault: Whether the endpoint of metrics has to be mended, as of their last export.
    """

    def __init__(self, resource: Resource, *, clock_s: Callable[[], float] = time.time) -> None:
        self.resource = resource
        self.metrics_fault = False
        self._clock_s = clock_s
        self._followed: dict[str, int] = {}
        self._newest_acked_s: dict[str, float] = {}
        self._started_s = self._checkpoint_s = clock_s()
        self._endpoints: dict[str, bool] = {}
        self._reader = InMemoryMetricReader()
        # exemplars of the agent's own counters would need spans of the agent, and it makes none
        provider = MeterProvider(
            [self._reader], resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False
        )
        meter = provider.get_meter("tailspan.agent", __version__)
        counter = partial(_Counter, meter.create_observable_counter)
        self._polls = counter("tailspan.agent.polls", "{poll}", "Requests to job services.")
        self._poll_errors = counter("tailspan.agent.poll.errors", "{error}", "Requests to job services that failed.")
        self._read = counter("tailspan.agent.records.read", "{record}", "Log records made of lines that were read.")
        self._acked = counter("tailspan.agent.records.acked", "{record}", "Log records that the endpoint took.")
        self._rejected = counter(
            "tailspan.agent.records.rejected", "{record}", "Records that the endpoint refused; see the dead letter."
        )
        self._dropped = counter("tailspan.agent.records.dropped", "{record}", "Lines left out on purpose.")
        self._in_flight = _Counter(
            meter.create_observable_up_down_counter,
            "tailspan.agent.records.in_flight",
            "{record}",
            "Log records that were read and are not acked yet.",
        )
        self._redactions = counter("tailspan.agent.redactions", "{redaction}", "Secrets masked in lines.")
        self._late = counter("tailspan.agent.lines.late", "{line}", "Lines that became visible late.")
        self._gaps = counter("tailspan.agent.gaps", "{gap}", "Times that a service lost lines before they were read.")
        self._export_errors = counter("tailspan.agent.export.errors", "{error}", "Exports that failed.")
        gauge = meter.create_observable_gauge
        gauge("tailspan.agent.uptime", [self._observe_uptime], "s", "Time since the agent started.")
        gauge("tailspan.agent.jobs.followed", [self._observe_followed], "{job}", "Jobs that are followed now.")
        gauge("tailspan.agent.lag", [self._observe_lag], "s", "Age of the newest acked record of followed jobs.")
        gauge("tailspan.agent.checkpoint.age", [self._observe_checkpoint], "s", "Time since the last checkpoint.")
        # no unit: with unit 1 Prometheus would call it a ratio
        gauge("tailspan.agent.endpoint.up", [self._observe_endpoints], "", "Whether the endpoint takes this signal.")
        # keeps the provider, and with it the collection, alive
        self._provider = provider

    def add_service(self, service: str) -> None:
        """Say 0 for a service from now on, so that its first count is seen as a rise."""
        self._followed.setdefault(service, 0)
        for counter in (self._polls, self._read, self._acked, self._redactions, self._late, self._gaps):
            counter.add(0, {"service": service})
        self._in_flight.add(0, {"service": service})

    def polled(self, service: str, n: int = 1) -> None:
        """Count requests to a job service."""
        self._polls.add(n, {"service": service})

    def poll_failed(self, service: str, error: BaseException) -> None:
        """Count a request to a job service that failed; the error's class is its type."""
        self._poll_errors.add(1, {"service": service, "error.type": type(error).__qualname__})

    def records_read(self, service: str, n: int, *, dropped: int = 0, redactions: int = 0, late: int = 0) -> None:
        """Count what one page came to; its records are in flight until they are acked or rejected.

        Args:
            service: The job service's configured name.
            n: Records made of the page.
            dropped: Lines below the watch's ``min_severity``.
            redactions: Secrets masked.
            late: Lines among the ``n`` that became visible late.
        """
        attributes = {"service": service}
        if n:
            self._read.add(n, attributes)
            self._in_flight.add(n, attributes)
        if dropped:
            self._dropped.add(dropped, {**attributes, "reason": "min_severity"})
        if redactions:
            self._redactions.add(redactions, attributes)
        if late:
            self._late.add(late, attributes)

    def records_acked(self, service: str, n: int, newest_unix_nano: int = 0) -> None:
        """Count records that the endpoint took.

        Args:
            service: The job service's configured name.
            n: Records.
            newest_unix_nano: The time of the newest of them; lag is measured from it.
        """
        self._acked.add(n, {"service": service})
        self._in_flight.add(-n, {"service": service})
        newest_s = newest_unix_nano / 1e9
        if newest_s > self._newest_acked_s.get(service, 0.0):
            self._newest_acked_s[service] = newest_s

    def records_rejected(self, service: str, n: int, reason: str) -> None:
        """Count records that went to the dead letter; the reason is one of few."""
        self._rejected.add(n, {"service": service, "reason": reason})
        self._in_flight.add(-n, {"service": service})

    def records_abandoned(self, service: str, n: int) -> None:
        """Take records out of flight that will be read again: their tailer ended before they were acked."""
        self._in_flight.add(-n, {"service": service})

    def gap(self, service: str) -> None:
        """Count one stretch of lines that the service lost before they were read."""
        self._gaps.add(1, {"service": service})

    def checkpointed(self) -> None:
        """Note that the checkpoints on disk are up to date."""
        self._checkpoint_s = self._clock_s()

    def endpoint(self, signal: str, up: bool) -> None:
        """Note whether the endpoint takes a signal (``logs``, ``traces`` or ``metrics``)."""
        self._endpoints[signal] = up

    def export_failed(self, signal: str, reason: str) -> None:
        """Count an export that was not taken; the reason is one of few."""
        self._export_errors.add(1, {"signal": signal, "error.type": reason})

    def jobs_followed(self, services: Iterable[str]) -> None:
        """Note the services of the jobs that are followed now, one entry per job."""
        self._followed = dict.fromkeys(self._followed, 0)
        for service in services:
            self._followed[service] = self._followed.get(service, 0) + 1

    def collect(self) -> list[ScopeMetrics]:
        """Return all values as they are now, cumulative since the agent started."""
        data = self._reader.get_metrics_data()
        return [scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics]

    def _observe_uptime(self, _: CallbackOptions) -> Iterator[Observation]:
        # Who it is, on the series itself: `instance` is an address to a scrape, and target_info hard to join.
        who = {
            "tailspan.agent.id": str(self.resource.attributes["service.instance.id"]),
            "tailspan.agent.version": __version__,
            "host.name": socket.gethostname(),
        }
        yield Observation(max(0.0, self._clock_s() - self._started_s), who)

    def _observe_followed(self, _: CallbackOptions) -> Iterator[Observation]:
        for service, count in self._followed.items():
            yield Observation(count, {"service": service})

    def _observe_lag(self, _: CallbackOptions) -> Iterator[Observation]:
        now_s = self._clock_s()
        for service, newest_s in self._newest_acked_s.items():
            if self._followed.get(service):  # with no job to follow the age of the last record says nothing
                yield Observation(max(0.0, now_s - newest_s), {"service": service})

    def _observe_checkpoint(self, _: CallbackOptions) -> Iterator[Observation]:
        yield Observation(max(0.0, self._clock_s() - self._checkpoint_s))

    def _observe_endpoints(self, _: CallbackOptions) -> Iterator[Observation]:
        for signal, up in self._endpoints.items():
            yield Observation(int(up), {"signal": signal})
