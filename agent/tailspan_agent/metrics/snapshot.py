"""All metrics of the agent as one snapshot, pushed as OTLP or scraped as Prometheus text.

    AgentMetrics (this process) |
    runs of the store           +--> MetricsReader --> metrics_request() --> MetricsPush
    followed jobs               |                  --> prometheus_text() --> /metrics

Metrics are state, not records: a failed export is not retried, since the next one has the same values and later ones.
An ended series is state as well: its last point is exported until the endpoint accepts it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import msgspec

from tailspan_agent.analysis.assessment import JobSnapshot, PipelineStats
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.metrics.jobs import job_metrics, task_metrics
from tailspan_agent.metrics.live_series import LiveSeries
from tailspan_agent.metrics.pipelines import pipeline_metrics, too_fast_metric
from tailspan_agent.metrics.prometheus import prometheus_pieces
from tailspan_agent.otlp.metric import (
    DataPoint,
    Metric,
    ScopeMetrics,
    encode_metric,
    encode_resource_metrics,
    encode_scope_metrics,
    with_points,
)

__all__ = ["FleetTotals", "MetricsReader", "exports_exponential_histograms"]

_MOST_LOGGED = 100
_JOBS_SCOPE = ScopeMetrics("tailspan.jobs", "", ())
_OF_RUNNING_JOBS = frozenset({"cicd.pipeline.run.active"})
_AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Steps: TypeAlias = Generator[None, None, _T]
"""Work that pauses between its steps: the metrics of thousands of pipelines take half a second."""


class FleetTotals(msgspec.Struct, frozen=True):
    """What all agents of a fleet have counted together, exported by one of them at a time.

    Attributes:
        resource: The resource of the fleet: the same whichever agent exports.
        start_unix_nano: When the fleet began to count runs, in ns since the epoch.
        runs: Returns the totals of all ended runs; None while another agent exports them.
        too_fast: Returns the number of suspiciously fast runs by pipeline.
    """

    resource: Mapping[str, str]
    start_unix_nano: int
    runs: Callable[[], Iterable[RunTotals] | None]
    too_fast: Callable[[], Mapping[str, int]] = dict


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
        fleet: What the fleet has counted; None for an agent that is alone.
        clock_ns: Returns the time in ns since the epoch.

    Attributes:
        cost_s: The CPU time that it took to make the last request in steps, in seconds.
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
        fleet: FleetTotals | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.cost_s = 0.0
        self._fleet = fleet
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
        return _at_once(self._snapshot(exponential=exponential))

    def _snapshot(self, *, exponential: bool = False) -> _Steps[list[ScopeMetrics]]:
        counted = list(self._runs())
        jobs, now_unix_nano = list(self._jobs()), self._clock_ns()
        self._agent.jobs_followed(job.service for job in jobs)
        yield
        of_jobs = job_metrics(
            runs=counted,
            jobs=jobs,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
            exponential=exponential,
        )
        yield
        of_jobs += task_metrics(
            self._tasks(),
            start_unix_nano=self._started_unix_nano,
            now_unix_nano=now_unix_nano,
            exponential=exponential,
        )
        yield
        of_jobs += pipeline_metrics(
            jobs=jobs,
            pipeline_stats=self._pipeline_stats,
            names=self._names,
            start_unix_nano=self._start_unix_nano,
            now_unix_nano=now_unix_nano,
            run_id_on_metrics=self._run_id_on_metrics,
        )
        yield
        return [self._agent.collect(), msgspec.structs.replace(_JOBS_SCOPE, metrics=of_jobs)]

    def _fleet_metrics(self, *, exponential: bool = False) -> list[Metric]:
        """Return what the whole fleet has counted; nothing while another agent exports it."""
        runs = self._fleet.runs() if self._fleet is not None else None
        if self._fleet is None or runs is None:
            return []
        names, now_unix_nano = PipelineNames(self._names.limit), self._clock_ns()
        metrics = job_metrics(
            runs=runs,
            jobs=(),
            names=names,
            start_unix_nano=self._fleet.start_unix_nano,
            now_unix_nano=now_unix_nano,
            exponential=exponential,
        )
        # Running jobs are those of each agent: it exports their numbers itself.
        counted = [metric for metric in metrics if metric.name not in _OF_RUNNING_JOBS]
        too_fast = too_fast_metric(names.used, self._fleet.too_fast(), self._fleet.start_unix_nano, now_unix_nano)
        return [*counted, *too_fast]

    def _scrape(self) -> _Steps[list[Metric]]:
        """Return all metrics for one text; those of the fleet have its ``instance``, as if they were pushed.

        A scraper with ``honor_labels`` then stores the same series whichever agent exports them, so that their counts
        do not seem to grow at once when another agent goes on with them.
        """
        scopes = yield from self._snapshot()
        own = [metric for scope in scopes for metric in scope.metrics]
        if self._fleet is None:
            return own
        of_fleet = {metric.name: metric for metric in self._fleet_metrics()}
        instance = {"instance": self._fleet.resource["service.instance.id"]}
        merged = []
        for metric in own:
            shared = of_fleet.pop(metric.name, None)
            merged.append(metric if shared is None else _with_more_points(metric, shared, instance))
        return [*merged, *(_with_more_points(with_points(one, []), one, instance) for one in of_fleet.values())]

    def metrics_request(self) -> tuple[bytes, int]:
        """Return an ``ExportMetricsServiceRequest`` of all metrics, and its number of data points.

        A series that ended since the last accepted export has one more point, without a value.
        """
        return _at_once(self._metrics_request())

    async def metrics_request_in_steps(self) -> tuple[bytes, int]:
        """Return the same, and let other tasks run in between."""
        self.cost_s = 0.0
        return await _in_steps(self._timed(self._metrics_request()))

    def _timed(self, steps: _Steps[_T]) -> _Steps[_T]:
        """Add the CPU time of steps to `cost_s`, without that of other tasks in between."""
        while True:
            begun_s = time.thread_time()
            try:
                next(steps)
            except StopIteration as end:
                result: _T = end.value
                return result
            finally:
                self.cost_s += time.thread_time() - begun_s
            yield

    def _metrics_request(self) -> _Steps[tuple[bytes, int]]:
        snapshot = yield from self._snapshot(exponential=self._exponential)
        scopes = self._live.with_ends(snapshot, self._clock_ns())
        del snapshot
        own, count = yield from self._resource_metrics(self._agent.resource, scopes)
        shared = self._fleet_metrics(exponential=self._exponential)
        if self._fleet is None or not shared:
            return own, count
        shared_scope = msgspec.structs.replace(_JOBS_SCOPE, metrics=shared)
        of_fleet, more = yield from self._resource_metrics(self._fleet.resource, [shared_scope])
        return own + of_fleet, count + more

    def _resource_metrics(
        self, resource: Mapping[str, str], scopes: Iterable[ScopeMetrics]
    ) -> _Steps[tuple[bytes, int]]:
        """Return the field of a resource with its metrics, and their number of points."""
        count = 0
        parts: list[bytes] = []
        for scope in scopes:
            yield
            metrics: list[bytes] = []
            for metric in scope.metrics:
                points, encoded = self._encode_metric(metric)
                count += points
                metrics.append(encoded)
                yield
            if metrics:
                parts.append(encode_scope_metrics(scope, metrics))
        return encode_resource_metrics(resource, parts), count

    def _encode_metric(self, metric: Metric) -> tuple[int, bytes]:
        """Return the number of points of a metric, and its field of the scope."""
        try:
            encoded = encode_metric(metric)
        except Exception:
            # One value that cannot be encoded must not stop the others.
            metric = with_points(
                metric, [point for point in metric.data.data_points if self._can_encode(metric, point)]
            )
            encoded = encode_metric(metric) if metric.data.data_points else b""
        return len(metric.data.data_points), encoded

    def _can_encode(self, metric: Metric, point: DataPoint) -> bool:
        try:
            encode_metric(with_points(metric, [point]))
        except Exception as error:
            series = f"{metric.name}{dict(point.attributes)}"
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
        pieces, content_type = self._prometheus_pieces(_at_once(self._scrape()), accept)
        return b"".join(pieces), content_type

    async def prometheus_pieces(self, accept: str = "") -> tuple[Iterator[bytes], str]:
        """Return the same text in pieces, each made when it is taken; let other tasks run in between."""
        return self._prometheus_pieces(await _in_steps(self._scrape()), accept)

    def _prometheus_pieces(self, metrics: Sequence[Metric], accept: str) -> tuple[Iterator[bytes], str]:
        return prometheus_pieces(metrics, self._agent.resource, accept)


def _at_once(steps: _Steps[_T]) -> _T:
    """Run all steps and return their result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: _T = end.value
        return result


async def _in_steps(steps: _Steps[_T]) -> _T:
    """Run all steps, with a pause after each, and return their result."""
    try:
        while True:
            next(steps)
            await asyncio.sleep(0)
    except StopIteration as end:
        result: _T = end.value
        return result


def _with_more_points(metric: Metric, other: Metric, attributes: Mapping[str, str]) -> Metric:
    """Return a metric with the points of another one, to which attributes are added."""
    more = [
        msgspec.structs.replace(point, attributes={**point.attributes, **attributes})
        for point in other.data.data_points
    ]
    return with_points(metric, [*metric.data.data_points, *more])


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
