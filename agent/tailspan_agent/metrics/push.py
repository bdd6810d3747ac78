"""`MetricsPush`: export all metrics as OTLP, at an interval and when a run begins or ends."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping

from tailspan.errors import ConfigError
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry
from tailspan_agent.exporter.protocol import Exporter
from tailspan_agent.exporter.retry import Outage
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.metrics.snapshot import MetricsReader

__all__ = ["MetricsPush", "export_interval_s"]

_log = logging.getLogger(__name__)

_EXPORT_INTERVAL_S = 15.0
_LONGEST_INTERVAL_S = 60.0
# Exports may take this much of a core; with ten thousand jobs, each takes a twentieth of a second.
_SHARE_OF_A_CORE = 0.0015
_RUN_GAP_S = 5.0
_RUN_LINGER_S = 0.25


class MetricsPush:
    """Export all metrics at an interval, soon after a run begins or ends, and once at the end.

    Without the exports for runs, a run that is shorter than the interval would never be seen to be active. There is at
    most one export in 5 s, however many runs begin, and while exports fail only the interval counts. With thousands of
    jobs, exports are rarer, so that they cost little, but at least one in a minute.

    Args:
        reader: Reads the metrics.
        agent: Counts failed exports.
        exporter: The exporter of metrics; its owner closes it.
        interval_s: Seconds between two exports; None: 15, or more with thousands of jobs.
        on_unsupported: Called if the endpoint does not have metrics; returns None if that must be logged here.
    """

    def __init__(
        self,
        reader: MetricsReader,
        agent: AgentMetrics,
        exporter: Exporter,
        *,
        interval_s: float | None = None,
        on_unsupported: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._reader = reader
        self._agent = agent
        self._exporter = exporter
        self._given_interval_s = interval_s
        self._on_unsupported = on_unsupported
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last export failed, fully or in part, to be shown; None if it succeeded."""
        return self._problem

    @property
    def interval_s(self) -> float:
        """Seconds between two exports, after what the last one cost."""
        if self._given_interval_s is not None:
            return self._given_interval_s
        return min(self._at_least(_EXPORT_INTERVAL_S), _LONGEST_INTERVAL_S)

    def _at_least(self, interval_s: float) -> float:
        """Return an interval, or a longer one after which another export costs no more than it may."""
        return max(interval_s, self._reader.cost_s / _SHARE_OF_A_CORE)

    def replace_exporter(self, exporter: Exporter) -> None:
        """Use another exporter from the next export on."""
        self._exporter = exporter

    async def export(self) -> bool:
        """Export all metrics once and return whether the endpoint accepted all of them."""
        try:
            payload, count = await self._reader.metrics_request_in_steps()
        except Exception as error:  # a value that cannot be encoded must not stop the relay of log lines
            outcome: Outcome = Rejected(None, f"cannot encode metrics: {error!r}", "unencodable")
        else:
            outcome = await self._exporter.export(payload, count)
        kind, reason = _kind(outcome), outcome.warning if isinstance(outcome, Delivered) else outcome.reason
        down = isinstance(outcome, Retry | EndpointFault)
        self._agent.endpoint("metrics", not down)
        outage = self._agent.metrics_outage = (
            Outage.extend(self._agent.metrics_outage, reason or "", time.time()) if down else None
        )
        was_fault = self._agent.metrics_fault
        fault = self._agent.metrics_fault = isinstance(outcome, EndpointFault)
        if isinstance(outcome, Delivered):
            self._reader.accepted()
        if kind:
            self._agent.export_failed("metrics", kind)
        problem = reason if kind else None
        unsupported = isinstance(outcome, EndpointFault) and outcome.unsupported
        if unsupported and self._on_unsupported() is not None:
            pass  # one message for all signals
        elif self._is_news(problem, outage, is_same_kind=fault == was_fault):
            _log_change(problem, outage, fault=fault)
        elif reason and not kind:
            _log.debug("metrics: warning of the endpoint: %s", reason)
        self._problem = problem
        return kind is None

    def _is_news(self, problem: str | None, outage: Outage | None, *, is_same_kind: bool) -> bool:
        """Return whether a result is logged: each change, but of an outage only some tries."""
        if outage is None or self._problem is None or not is_same_kind:
            return problem != self._problem
        return outage.is_to_be_logged

    async def run(self, stop: asyncio.Event) -> None:
        """Export now, at each interval and when runs change until `stop` is set, then once more."""
        changes, clock_s = self._agent.run_changes, asyncio.get_running_loop().time
        while not stop.is_set():
            changes.clear()
            exported_s = clock_s()
            await self.export()
            await _any_set(stop, changes, timeout_s=exported_s + self.interval_s - clock_s())
            if changes.is_set() and self._problem is None:
                # The linger lets a burst of runs, and a run's first lines, go with one export.
                next_s = max(clock_s() + _RUN_LINGER_S, exported_s + min(self._at_least(_RUN_GAP_S), self.interval_s))
                await _any_set(stop, timeout_s=next_s - clock_s())
            else:
                await _any_set(stop, timeout_s=exported_s + self.interval_s - clock_s())
        await self.export()


def _log_change(problem: str | None, outage: Outage | None, *, fault: bool) -> None:
    if not problem:
        _log.info("export of metrics works again")
        return
    extent = f" {outage.extent}" if outage is not None else ""
    level = logging.ERROR if fault else logging.WARNING
    _log.log(level, "export of metrics fails%s; the next export has the current values: %s", extent, problem)


async def _any_set(*events: asyncio.Event, timeout_s: float) -> None:
    """Wait until one of the events is set, for a limited time."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _kind(outcome: Outcome) -> str | None:
    """Return the ``error.type`` of an outcome; None for success."""
    match outcome:
        case Delivered():
            return None
        case Rejected():
            return outcome.kind
        case Retry():
            return "unavailable"
        case EndpointFault():
            return "endpoint_fault"
        case _:
            return "too_large"


def export_interval_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds between two exports from ``OTEL_METRIC_EXPORT_INTERVAL`` (milliseconds); None without it.

    Raises:
        ConfigError: The variable is not a positive integer.

    Source: OpenTelemetry specification, "Periodic exporting MetricReader".
    """
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            f"OTEL_METRIC_EXPORT_INTERVAL is {text!r}: expected milliseconds, such as 15000",
            key="OTEL_METRIC_EXPORT_INTERVAL",
        )
    return int(text) / 1000
