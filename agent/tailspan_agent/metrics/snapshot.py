"""All metrics of the agent as one snapshot, pushed as OTLP or scraped as Prometheus text.

    AgentMetrics (this process) |
    runs of the store           +--> MetricsReader --> metrics_request() --> MetricsPush
    followed jobs               |                  --> prometheus_text() --> /metrics

Metrics are state, not records: a failed export is not retried, since the next one has the same values and later ones.
An ended series is state as well: its last point is exported until the endpoint accepts it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics.export import Metric, MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tailspan_agent.analysis.assessment import JobSnapshot, PipelineStats
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.metrics.jobs import job_metrics, task_metrics
from tailspan_agent.metrics.live_series import LiveSeries, flag_ends
from tailspan_agent.metrics.pipelines import pipeline_metrics
from tailspan_agent.metrics.prometheus import prometheus_text

__all__ = ["MetricsReader", "exports_exponential_histograms"]

_MOST_LOGGED = 100
_AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"

_log = logging.getLogger(__name__)


class MetricsReader:
    """Read the metrics of the agent, its jobs and their pipelines, with their current values.

    Args:
        agent: The agent's own metrics.
        runs: Returns the totals of all ended runs, from the store.
        tasks: Returns the totals of the attempts of tasks that ended since the agent started.
        jobs: Returns the followed jobs.
        names: The pipelines with series of their own; the same object that names the store's runs.
        start_unix_nano: When the store began to count runs, in ns since the epoch.
        pipeline_stats: The history of pipelines.
        run_id_on_metrics: ``agent.run_id_on_metrics``.
        exponential: Export durations over OTLP as exponential histograms.
        clock_ns: Returns the time in ns since the epoch.
    """

    def __init__(
        self,
        agent: AgentMetrics,
        *,
        runs: Callable[[], Iterable[RunTotals]],
        tasks: Callable[[], Sequence[RunTotals]] = tuple,
        jobs: Callable[[], Iterable[JobSnapshot]],
        names: PipelineNames,
        start_unix_nano: int,
        pipeline_stats: PipelineStats | None = None,
        run_id_on_metrics: bool = False,
        exponential: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._agent = agent
        self._runs = runs
        self._tasks = tasks
        self._jobs = jobs
        self._names = names
        self._start_unix_nano = start_unix_nano
        self._pipeline_stats = pipeline_stats or PipelineStats()
        self._run_id_on_metrics = run_id_on_metrics
        self._exponential = exponential
        self._clock_ns = clock_ns
        self._started_unix_nano = clock_ns()
        self._live = LiveSeries()
        self._unencodable: set[str] = set()

    def snapshot(self, *, exponential: bool = False) -> list[ScopeMetrics]:
        """Return all metrics with their current values: the agent's own, then those of jobs and pipelines.

        Args:
            exponential: Return durations as exponential histograms.
        """
        jobs, now_unix_nano = list(self._jobs()), self._clock_ns()
        self._agent.jobs_followed(job.service for job in jobs)
        of_jobs = job_metrics(
            runs=self._runs(),
            jobs=jobs,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
            exponential=exponential,
        )
        of_jobs += task_metrics(
            self._tasks(),
            start_unix_nano=self._started_unix_nano,
            now_unix_nano=now_unix_nano,
            exponential=exponential,
        )
        of_jobs += pipeline_metrics(
            jobs=jobs,
            pipeline_stats=self._pipeline_stats,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
        )
        return [*self._agent.collect(), ScopeMetrics(InstrumentationScope("tailspan.jobs"), of_jobs, schema_url="")]

    def metrics_request(self) -> tuple[bytes, int]:
        """Return an ``ExportMetricsServiceRequest`` of all metrics, and its number of data points.

        A series that ended since the last accepted export has one more point, without a value.
        """
        scopes = self._live.with_ends(self.snapshot(exponential=self._exponential), self._clock_ns())
        scopes = [scope for scope in scopes if scope.metrics]
        count = sum(len(metric.data.data_points) for scope in scopes for metric in scope.metrics)
        try:
            encoded = self._encode(scopes)
        except Exception:
            # One value that cannot be encoded must not stop the others.
            scopes = [self._encodable(scope) for scope in scopes]
            count = sum(len(metric.data.data_points) for scope in scopes for metric in scope.metrics)
            encoded = self._encode(scopes)
        flag_ends(encoded)
        request: bytes = encoded.SerializeToString()
        return request, count

    def _encode(self, scopes: Sequence[ScopeMetrics]) -> ExportMetricsServiceRequest:
        return encode_metrics(MetricsData([ResourceMetrics(self._agent.resource, scopes, schema_url="")]))

    def _encodable(self, scope: ScopeMetrics) -> ScopeMetrics:
        """Return a scope without the data points that cannot be encoded; log each series once."""
        metrics = []
        for metric in scope.metrics:
            kept = [point for point in metric.data.data_points if self._can_encode(scope, metric, point)]
            if kept:
                metrics.append(_with_points(metric, kept))
        return dataclasses.replace(scope, metrics=metrics)

    def _can_encode(self, scope: ScopeMetrics, metric: Metric, point: Any) -> bool:
        try:
            self._encode([dataclasses.replace(scope, metrics=[_with_points(metric, [point])])])
        except Exception as error:
            series = f"{metric.name}{dict(point.attributes or {})}"
            if series not in self._unencodable and len(self._unencodable) < _MOST_LOGGED:
                self._unencodable.add(series)
                _log.warning("metrics: left out %s, which cannot be encoded: %r", series, error)
            return False
        return True

    def accepted(self) -> None:
        """Note that the endpoint accepted the last request."""
        self._live.accepted(self._clock_ns())

    def prometheus_text(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text for Prometheus, and its content type.

        The text has no form for exponential histograms, so durations always have explicit buckets.

        Args:
            accept: The Accept header of the scrape.
        """
        metrics = [metric for scope in self.snapshot() for metric in scope.metrics]
        return prometheus_text(metrics, self._agent.resource.attributes, accept)


def _with_points(metric: Metric, points: Sequence[Any]) -> Metric:
    data: Any = metric.data  # each kind has points of its own type
    return dataclasses.replace(metric, data=dataclasses.replace(data, data_points=list(points)))


def exports_exponential_histograms(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the standard variable asks for exponential histograms; log a warning for an unknown value.

    Source: OpenTelemetry specification, "OTLP Metrics Exporter"; an unknown value must be ignored with a warning.
    """
    text = environ.get(_AGGREGATION, "").strip()
    if text.lower() not in {"", "explicit_bucket_histogram", "base2_exponential_bucket_histogram"}:
        _log.warning(
            "%s is %r: expected explicit_bucket_histogram or base2_exponential_bucket_histogram; using the first",
            _AGGREGATION,
            text,
        )
    return text.lower() == "base2_exponential_bucket_histogram"
