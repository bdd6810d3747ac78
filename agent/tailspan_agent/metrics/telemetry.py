"""All metrics of the agent as one snapshot, sent as OTLP or scraped as Prometheus text.

    AgentMetrics (this process) |
    runs of the store           +--> Telemetry --> metrics_request() --> MetricsPush
    followed jobs               |              --> prometheus_text() --> /metrics

Metrics are state, not records: what was not delivered is part of what is sent next, so nothing is acked or retried.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tailspan.errors import ConfigError
from tailspan_agent.analysis.assessment import JobSnapshot, PipelineStats
from tailspan_agent.analysis.run_totals import PipelineNames, RunTotals
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry
from tailspan_agent.metrics.agent import AgentMetrics, agent_resource
from tailspan_agent.metrics.jobs import job_metrics
from tailspan_agent.metrics.pipelines import insight_metrics
from tailspan_agent.metrics.prometheus import prometheus_text

__all__ = ["AgentMetrics", "JobSnapshot", "MetricsPush", "Telemetry", "agent_resource", "export_interval_s"]

_log = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 15.0


class Telemetry:
    """What the agent and its jobs say in metrics, as of now.

    Args:
        agent: The agent's own counters.
        runs: Returns the totals of all ended runs, from the store.
        jobs: Returns the jobs that are followed now.
        names: Which pipelines have series of their own; the same object that names the store's runs.
        start_unix_nano: When the store began to count runs.
        pipeline_stats: What is known of pipelines from their past.
        run_id_on_metrics: ``agent.run_id_on_metrics``.
        clock_ns: Nanoseconds since the epoch.
    """

    def __init__(
        self,
        agent: AgentMetrics,
        *,
        runs: Callable[[], Iterable[RunTotals]],
        jobs: Callable[[], Iterable[JobSnapshot]],
        names: PipelineNames,
        start_unix_nano: int,
        pipeline_stats: PipelineStats | None = None,
        run_id_on_metrics: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._agent = agent
        self._runs = runs
        self._jobs = jobs
        self._names = names
        self._start_unix_nano = start_unix_nano
        self._insights = pipeline_stats or PipelineStats()
        self._run_id_on_metrics = run_id_on_metrics
        self._clock_ns = clock_ns

    def snapshot(self) -> list[ScopeMetrics]:
        """Return all metrics with their present values: the agent's own, then the jobs'."""
        jobs, now_unix_nano = list(self._jobs()), self._clock_ns()
        self._agent.jobs_followed(job.service for job in jobs)
        of_jobs = job_metrics(
            runs=self._runs(),
            jobs=jobs,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
        )
        of_jobs += insight_metrics(
            jobs=jobs,
            pipeline_stats=self._insights,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
        )
        return [*self._agent.collect(), ScopeMetrics(InstrumentationScope("tailspan.jobs"), of_jobs, schema_url="")]

    def metrics_request(self) -> tuple[bytes, int]:
        """Return an ``ExportMetricsServiceRequest`` of all metrics, and how many data points it holds."""
        scopes = [scope for scope in self.snapshot() if scope.metrics]
        count = sum(len(metric.data.data_points) for scope in scopes for metric in scope.metrics)
        data = MetricsData([ResourceMetrics(self._agent.resource, scopes, schema_url="")])
        request: bytes = encode_metrics(data).SerializeToString()
        return request, count

    def prometheus_text(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text for Prometheus, and its content type.

        Args:
            accept: The Accept header of the request.
        """
        metrics = [metric for scope in self.snapshot() for metric in scope.metrics]
        return prometheus_text(metrics, self._agent.resource.attributes, accept)


class _Exporter(Protocol):
    async def export(self, payload: bytes, count: int) -> Outcome: ...


class MetricsPush:
    """Sends all metrics to the endpoint now and then, and once at the end.

    Args:
        telemetry: What to send.
        agent: Told how it went.
        exporter: The exporter of the signal ``metrics``; closed by its owner.
        interval_s: Seconds between two exports.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        agent: AgentMetrics,
        exporter: _Exporter,
        *,
        interval_s: float = EXPORT_INTERVAL_S,
    ) -> None:
        self._telemetry = telemetry
        self._agent = agent
        self._exporter = exporter
        self._interval_s = interval_s
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last export was not taken whole, for people; None when it was."""
        return self._problem

    def use(self, exporter: _Exporter) -> None:
        """Send to another endpoint from the next export on."""
        self._exporter = exporter

    async def export(self) -> bool:
        """Send all metrics once and return whether the endpoint took them all."""
        try:
            payload, count = self._telemetry.metrics_request()
        except Exception as error:  # whatever a job's values are, its lines must still be relayed
            outcome: Outcome = Rejected(None, f"cannot encode them: {error!r}", "unencodable")
        else:
            outcome = await self._exporter.export(payload, count)
        kind, reason = _kind(outcome), outcome.warning if isinstance(outcome, Delivered) else outcome.reason
        self._agent.endpoint("metrics", not isinstance(outcome, Retry | EndpointFault))
        fault = self._agent.metrics_fault = isinstance(outcome, EndpointFault)
        if kind:
            self._agent.export_failed("metrics", kind)
        problem = reason if kind else None
        if problem != self._problem:
            if problem:
                level = logging.ERROR if fault else logging.WARNING
                _log.log(level, "metrics were not taken; the next export carries them: %s", problem)
            else:
                _log.info("metrics are taken again")
        elif reason and not kind:
            _log.debug("the endpoint took the metrics and says: %s", reason)
        self._problem = problem
        return kind is None

    async def run(self, stop: asyncio.Event) -> None:
        """Export now and at each interval until ``stop`` is set, and then once more."""
        while not stop.is_set():
            await self.export()
            try:
                await asyncio.wait_for(stop.wait(), self._interval_s)
            except TimeoutError:
                pass
        await self.export()


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


def export_interval_s(environ: Mapping[str, str] = os.environ) -> float:
    """Return the seconds between two exports: ``OTEL_METRIC_EXPORT_INTERVAL`` (milliseconds), else 15 s.

    Raises:
        ConfigError: The variable is not a positive number.

    Source: OpenTelemetry specification, "Periodic exporting MetricReader".
    """
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    if not text:
        return EXPORT_INTERVAL_S
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            f"OTEL_METRIC_EXPORT_INTERVAL is {text!r}: expected milliseconds, such as 15000",
            key="OTEL_METRIC_EXPORT_INTERVAL",
        )
    return int(text) / 1000
