"""The agent's own health: counters and gauges, read on demand (`AgentMetrics.collect`)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeAlias

from tailspan import __version__
from tailspan_agent.exporter.retry import Outage
from tailspan_agent.otlp.metric import Gauge, Metric, NumberDataPoint, ScopeMetrics, Sum

__all__ = ["AgentMetrics", "agent_resource"]

_Series: TypeAlias = tuple[tuple[str, str], ...]
"""The attributes of a series, hashable."""


def agent_resource(service_name: str, instance_id: str, otlp_resource: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes of the resource of the agent's own records and of all metrics.

    Args:
        service_name: ``agent.service_name`` (``OTEL_SERVICE_NAME``); it names only the agent.
        instance_id: The UUID of the agent's state directory.
        otlp_resource: ``[otlp.resource]`` of the configuration; the agent's own keys take precedence.
    """
    return {
        **{key: value for key, value in otlp_resource.items() if key},
        "service.name": service_name,
        "service.version": __version__,
        "service.instance.id": instance_id,
    }


class _Counter:
    """A counter by attributes: one dictionary update a call.

    Args:
        name: The name of the instrument.
        unit: Its unit.
        description: What it counts.
        is_monotonic: Whether it never falls.
    """

    def __init__(self, name: str, unit: str, description: str, *, is_monotonic: bool = True) -> None:
        self._texts = name, description, unit
        self._is_monotonic = is_monotonic
        self._counts: dict[_Series, int] = {}
        self._first_read_ns: dict[_Series, int] = {}

    def add(self, n: int, attributes: Mapping[str, str]) -> None:
        self.add_to(tuple(attributes.items()), n)

    def add_to(self, series: _Series, n: int) -> None:
        self._counts[series] = self._counts.get(series, 0) + n

    def read(self, now_ns: int) -> Metric:
        # A copy: a scrape may read from another thread.
        points = [
            NumberDataPoint(dict(series), self._first_read_ns.setdefault(series, now_ns), now_ns, count)
            for series, count in list(self._counts.items())
        ]
        return Metric(*self._texts, Sum(points, self._is_monotonic))


class _SeriesOfServices(dict[str, _Series]):
    """The series of each service, by its configured name."""

    def __missing__(self, service: str) -> _Series:
        series = self[service] = (("service", service),)
        return series


class _Observed:
    """A gauge, or a counter kept elsewhere, whose values are read when they are exported.

    Args:
        name: The name of the instrument.
        unit: Its unit.
        description: What it shows.
        observe: Returns the values by attributes.
        is_counter: Whether it counts, and never falls.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        description: str,
        observe: Callable[[], Mapping[_Series, float]],
        *,
        is_counter: bool = False,
    ) -> None:
        self._texts = name, description, unit
        self._observe = observe
        self._is_counter = is_counter
        self._first_read_ns = 0

    def read(self, now_ns: int) -> Metric:
        self._first_read_ns = self._first_read_ns or now_ns
        start_ns = self._first_read_ns if self._is_counter else 0
        points = [
            NumberDataPoint(dict(series), start_ns, now_ns, value) for series, value in list(self._observe().items())
        ]
        return Metric(*self._texts, Sum(points, is_monotonic=True) if self._is_counter else Gauge(points))


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

    def __init__(self, resource: Mapping[str, str], *, clock_s: Callable[[], float] = time.time) -> None:
        self.resource = resource
        self.metrics_fault = False
        self.metrics_outage: Outage | None = None
        self.logs_outage: Outage | None = None
        self.run_changes = asyncio.Event()
        self._clock_s = clock_s
        self._followed: dict[str, int] = {}
        self._series = _SeriesOfServices()
        self._newest_acked_s: dict[str, float] = {}
        self._started_s = self._checkpoint_s = clock_s()
        self._endpoints: dict[str, bool] = {}
        self._instruments: list[_Counter | _Observed] = []
        counter, gauge = self._counter, self._gauge
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
        self._in_flight = counter(
            "tailspan.agent.records.in_flight",
            "{record}",
            "Log records that were read and are not acknowledged yet.",
            is_monotonic=False,
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
        gauge("tailspan.agent.uptime", "s", "Time since the agent started.", self._observe_uptime)
        gauge("tailspan.agent.jobs.followed", "{job}", "Followed jobs.", self._observe_followed)
        gauge(
            "tailspan.agent.lag",
            "s",
            "Age of the newest acknowledged record of followed jobs; in an outage, at most its age.",
            lambda: _by_service(self.lags_s()),
        )
        gauge("tailspan.agent.checkpoint.age", "s", "Time since the last checkpoint.", self._observe_checkpoint)
        # no unit: with unit 1 Prometheus would call it a ratio
        gauge("tailspan.agent.endpoint.up", "", "Whether the endpoint accepts this signal.", self._observe_endpoints)

    def _counter(self, name: str, unit: str, description: str, *, is_monotonic: bool = True) -> _Counter:
        counter = _Counter(name, unit, description, is_monotonic=is_monotonic)
        self._instruments.append(counter)
        return counter

    def _gauge(self, name: str, unit: str, description: str, observe: Callable[[], Mapping[_Series, float]]) -> None:
        self._instruments.append(_Observed(name, unit, description, observe))

    def add_fleet(self, fleet: FleetState) -> None:
        """Add the metrics of an agent's part in a fleet."""
        gauge = self._gauge
        gauge("tailspan.fleet.agents", "{agent}", "Agents of the fleet.", lambda: {(): fleet.agents})
        gauge("tailspan.fleet.shards", "{shard}", "Shards that this agent reads.", lambda: {(): fleet.shards})
        gauge("tailspan.fleet.lease.age", "s", "Time since the last renewal.", lambda: {(): fleet.lease_age_s})
        gauge(
            "tailspan.fleet.handover.duration",
            "s",
            "Duration of the last hand-over of shards by this agent.",
            lambda: {} if fleet.hand_over_s is None else {(): fleet.hand_over_s},
        )
        self._instruments.append(
            _Observed(
                "tailspan.fleet.takeovers",
                "{shard}",
                "Shards taken over from agents that did not renew their leases.",
                lambda: {(): fleet.taken_over},
                is_counter=True,
            )
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
        self._polls.add_to(self._series[service], n)

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
        series = self._series[service]
        if n:
            self._read.add_to(series, n)
            self._in_flight.add_to(series, n)
        if dropped:
            self._dropped.add(dropped, {"service": service, "reason": "min_severity"})
        if redactions:
            self._redactions.add_to(series, redactions)
        if late:
            self._late.add_to(series, late)

    def records_acked(self, service: str, n: int, newest_unix_nano: int = 0) -> None:
        """Count records that the endpoint accepted.

        Args:
            service: The configured name of the job service.
            n: Number of records.
            newest_unix_nano: The time of the newest record, in ns since the epoch; lag is measured from it.
        """
        self._acked.add_to(self._series[service], n)
        self._in_flight.add_to(self._series[service], -n)
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

    def collect(self) -> ScopeMetrics:
        """Return all metrics that have values, cumulative since the agent started."""
        now_ns = time.time_ns()
        metrics = [instrument.read(now_ns) for instrument in self._instruments]
        return ScopeMetrics("tailspan.agent", __version__, [metric for metric in metrics if metric.data.data_points])

    def _observe_uptime(self) -> Mapping[_Series, float]:
        # The identity is on the series itself: `instance` is an address in a scrape, and target_info is hard to join.
        identity = (
            ("tailspan.agent.id", self.resource["service.instance.id"]),
            ("tailspan.agent.version", __version__),
            ("host.name", socket.gethostname()),
        )
        return {identity: max(0.0, self._clock_s() - self._started_s)}

    def _observe_followed(self) -> Mapping[_Series, float]:
        return _by_service(self._followed)

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

    def _observe_checkpoint(self) -> Mapping[_Series, float]:
        return {(): max(0.0, self._clock_s() - self._checkpoint_s)}

    def _observe_endpoints(self) -> Mapping[_Series, float]:
        return {(("signal", signal),): int(up) for signal, up in self._endpoints.items()}


def _by_service(values: Mapping[str, float]) -> Mapping[_Series, float]:
    return {(("service", service),): value for service, value in values.items()}
