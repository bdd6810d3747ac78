"""The agent's own health, counted with the OpenTelemetry metrics SDK.

The instruments belong to a meter provider of their own: the global one is never set, nothing runs in the background,
and values are collected on demand (`AgentMetrics.collect`).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, ScopeMetrics
from opentelemetry.sdk.resources import Resource

from tailspan import __version__
from tailspan_agent.exporter.retry import Outage

__all__ = ["AgentMetrics", "agent_resource"]


def agent_resource(service_name: str, instance_id: str, otlp_resource: Mapping[str, str]) -> Resource:
    """Return the resource of the agent's own records and of all metrics.

    Args:
        service_name: ``agent.service_name`` (``OTEL_SERVICE_NAME``); it names only the agent.
        instance_id: The UUID of the agent's state directory.
        otlp_resource: ``[otlp.resource]`` of the configuration; the agent's own keys take precedence.
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
    """A counter that costs one dictionary update; the SDK's own costs 15 us, several times a page.

    Args:
        create: The meter's method that creates the observable counter.
        name: The name of the instrument.
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
        # A copy: a scrape may read from another thread.
        for attributes, count in list(self._counts.items()):
            yield Observation(count, dict(attributes))


class FleetState(Protocol):
    """An agent's part in a fleet, as its metrics show it."""

    agents: int
    taken_over: int
    hand_over_s: float | None

    @property
    def shards(self) -> int:
        """The number of shards that this agent reads."""

    @property
    def lease_age_s(self) -> float:
        """How long ago the leases were last renewed, in seconds."""


class AgentMetrics:
    """Counters and gauges ``tailspan.agent.*``. Call the methods once per page or batch, not per line.

    Args:
        resource: From `agent_resource`.
        clock_s: Returns the time in seconds since the epoch.

    Attributes:
        metrics_fault: Whether the last export of metrics ended with an endpoint fault.
        metrics_outage: The failed exports of metrics since the endpoint last answered; None if it answered.
        logs_outage: The same of log records.
        run_changes: Set when a run begins, changes its state or is counted; an export of metrics clears it.
    """

    def __init__(self, resource: Resource, *, clock_s: Callable[[], float] = time.time) -> None:
        self.resource = resource
        self.metrics_fault = False
        self.metrics_outage: Outage | None = None
        self.logs_outage: Outage | None = None
        self.run_changes = asyncio.Event()
        self._clock_s = clock_s
        self._followed: dict[str, int] = {}
        self._newest_acked_s: dict[str, float] = {}
        self._started_s = self._checkpoint_s = clock_s()
        self._endpoints: dict[str, bool] = {}
        self._reader = InMemoryMetricReader()
        # exemplars of these counters would need spans of the agent, and it has none
        provider = MeterProvider(
            [self._reader], resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False
        )
        meter = self._meter = provider.get_meter("tailspan.agent", __version__)
        counter = partial(_Counter, meter.create_observable_counter)
        self._polls = counter("tailspan.agent.polls", "{poll}", "Requests to job services.")
        self._poll_errors = counter("tailspan.agent.poll.errors", "{error}", "Requests to job services that failed.")
        self._read = counter(
            "tailspan.agent.records.read", "{record}", "Log records encoded from lines that were read."
        )
        self._acked = counter("tailspan.agent.records.acked", "{record}", "Log records that the endpoint accepted.")
        self._rejected = counter(
            "tailspan.agent.records.rejected", "{record}", "Records that the endpoint rejected; see the dead letter."
        )
        self._dropped = counter(
            "tailspan.agent.records.dropped", "{record}", "Lines dropped by configuration (min_severity)."
        )
        self._in_flight = _Counter(
            meter.create_observable_up_down_counter,
            "tailspan.agent.records.in_flight",
            "{record}",
            "Log records that were read and are not acknowledged yet.",
        )
        self._redactions = counter("tailspan.agent.redactions", "{redaction}", "Secrets redacted in lines.")
        self._late = counter("tailspan.agent.lines.late", "{line}", "Lines that became visible late.")
        self._gaps = counter("tailspan.agent.gaps", "{gap}", "Gaps: lines that a service lost before they were read.")
        self._shared_names = counter(
            "tailspan.agent.log_names.shared", "{job}", "Jobs whose logs share a name, above agent.max_log_names."
        )
        self._dropped_attributes = counter(
            "tailspan.agent.attributes.dropped",
            "{attribute}",
            "Attributes of jobs that were dropped or cut: reserved, empty, too many or too large.",
        )
        self._export_errors = counter("tailspan.agent.export.errors", "{error}", "Exports that failed.")
        gauge = meter.create_observable_gauge
        gauge("tailspan.agent.uptime", [self._observe_uptime], "s", "Time since the agent started.")
        gauge("tailspan.agent.jobs.followed", [self._observe_followed], "{job}", "Followed jobs.")
        gauge(
            "tailspan.agent.lag",
            [self._observe_lag],
            "s",
            "Age of the newest acknowledged record of followed jobs; in an outage, at most its age.",
        )
        gauge("tailspan.agent.checkpoint.age", [self._observe_checkpoint], "s", "Time since the last checkpoint.")
        # no unit: with unit 1 Prometheus would call it a ratio
        gauge("tailspan.agent.endpoint.up", [self._observe_endpoints], "", "Whether the endpoint accepts this signal.")
        # the reader works only as long as the provider exists
        self._provider = provider

    def add_fleet(self, fleet: FleetState) -> None:
        """Add the metrics of an agent's part in a fleet."""

        def observe(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterator[Observation]]:
            return lambda _: iter((Observation(read()),))

        gauge, meter = self._meter.create_observable_gauge, self._meter
        gauge("tailspan.fleet.agents", [observe(lambda: fleet.agents)], "{agent}", "Agents of the fleet.")
        gauge("tailspan.fleet.shards", [observe(lambda: fleet.shards)], "{shard}", "Shards that this agent reads.")
        gauge("tailspan.fleet.lease.age", [observe(lambda: fleet.lease_age_s)], "s", "Time since the last renewal.")
        gauge(
            "tailspan.fleet.handover.duration",
            [lambda _: iter(() if fleet.hand_over_s is None else (Observation(fleet.hand_over_s),))],
            "s",
            "Duration of the last hand-over of shards by this agent.",
        )
        meter.create_observable_counter(
            "tailspan.fleet.takeovers",
            [observe(lambda: fleet.taken_over)],
            "{shard}",
            "Shards taken over from agents that did not renew their leases.",
        )

    def add_service(self, service: str) -> None:
        """Start the counters of a service at 0, so that a rate shows its first count."""
        self._followed.setdefault(service, 0)
        for counter in (self._polls, self._read, self._acked, self._redactions, self._late, self._gaps):
            counter.add(0, {"service": service})
        self._in_flight.add(0, {"service": service})

    def attributes_dropped(self, service: str, n: int) -> None:
        """Count attributes of a job that were dropped or cut."""
        self._dropped_attributes.add(n, {"service": service})

    def log_name_shared(self) -> None:
        """Count a job whose logs share a name with those of other jobs."""
        self._shared_names.add(1, {})

    def polled(self, service: str, n: int = 1) -> None:
        """Count requests to a job service."""
        self._polls.add(n, {"service": service})

    def poll_failed(self, service: str, error: BaseException) -> None:
        """Count a failed request to a job service; the error's class is its ``error.type``."""
        self._poll_errors.add(1, {"service": service, "error.type": type(error).__qualname__})

    def records_read(self, service: str, n: int, *, dropped: int = 0, redactions: int = 0, late: int = 0) -> None:
        """Count the records of one page; they are in flight until they are acknowledged or rejected.

        Args:
            service: The configured name of the job service.
            n: Number of records.
            dropped: Number of lines below the watch's ``min_severity``.
            redactions: Number of redacted secrets.
            late: Number of records of lines that became visible late.
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
        """Count records that the endpoint accepted.

        Args:
            service: The configured name of the job service.
            n: Number of records.
            newest_unix_nano: The time of the newest record, in ns since the epoch; lag is measured from it.
        """
        self._acked.add(n, {"service": service})
        self._in_flight.add(-n, {"service": service})
        newest_s = newest_unix_nano / 1e9
        if newest_s > self._newest_acked_s.get(service, 0.0):
            self._newest_acked_s[service] = newest_s

    def records_rejected(self, service: str, n: int, reason: str) -> None:
        """Count records that went to the dead letter; the reason must be of low cardinality."""
        self._rejected.add(n, {"service": service, "reason": reason})
        self._in_flight.add(-n, {"service": service})

    def records_abandoned(self, service: str, n: int) -> None:
        """Remove records from those in flight: their tailer ended first, and they will be read again."""
        self._in_flight.add(-n, {"service": service})

    def gap(self, service: str) -> None:
        """Count a gap: lines that the service lost before they were read."""
        self._gaps.add(1, {"service": service})

    def checkpointed(self) -> None:
        """Report that the checkpoints on disk are up to date."""
        self._checkpoint_s = self._clock_s()

    def endpoint(self, signal: str, up: bool) -> None:
        """Report whether the endpoint accepts a signal."""
        self._endpoints[signal] = up

    def export_failed(self, signal: str, reason: str) -> None:
        """Count a failed export; the reason must be of low cardinality."""
        self._export_errors.add(1, {"signal": signal, "error.type": reason})

    def jobs_followed(self, services: Iterable[str]) -> None:
        """Report the followed jobs by their services, one entry for each job."""
        self._followed = dict.fromkeys(self._followed, 0)
        for service in services:
            self._followed[service] = self._followed.get(service, 0) + 1

    def collect(self) -> list[ScopeMetrics]:
        """Return all current values, cumulative since the agent started."""
        data = self._reader.get_metrics_data()
        return [scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics]

    def _observe_uptime(self, _: CallbackOptions) -> Iterator[Observation]:
        # The identity is on the series itself: `instance` is an address in a scrape, and target_info is hard to join.
        identity = {
            "tailspan.agent.id": str(self.resource.attributes["service.instance.id"]),
            "tailspan.agent.version": __version__,
            "host.name": socket.gethostname(),
        }
        yield Observation(max(0.0, self._clock_s() - self._started_s), identity)

    def _observe_followed(self, _: CallbackOptions) -> Iterator[Observation]:
        for service, count in self._followed.items():
            yield Observation(count, {"service": service})

    def lags_s(self) -> dict[str, float]:
        """Return the age of the newest acknowledged record of each service with a followed job, in seconds.

        While the endpoint is down, the lag counts from the outage: of a job that was silent before it, nothing waits
        from that time, and an agent that has delivered nothing yet has a lag, too.
        """
        now_s = self._clock_s()
        # Without a followed job, the age of the last record means nothing.
        followed = [service for service, jobs in self._followed.items() if jobs]
        outage_s = self.logs_outage.since_s if self.logs_outage is not None else 0.0
        newest_s = {service: max(self._newest_acked_s.get(service, 0.0), outage_s) for service in followed}
        return {service: max(0.0, now_s - second) for service, second in newest_s.items() if second}

    def _observe_lag(self, _: CallbackOptions) -> Iterator[Observation]:
        for service, lag_s in self.lags_s().items():
            yield Observation(lag_s, {"service": service})

    def _observe_checkpoint(self, _: CallbackOptions) -> Iterator[Observation]:
        yield Observation(max(0.0, self._clock_s() - self._checkpoint_s))

    def _observe_endpoints(self, _: CallbackOptions) -> Iterator[Observation]:
        for signal, up in self._endpoints.items():
            yield Observation(int(up), {"signal": signal})
