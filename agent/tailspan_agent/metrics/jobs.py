"""The metrics of jobs: ended runs from the store, running jobs from their current state. Pure.

They are values of the metrics SDK, but not its instruments: counts of runs are cumulative over the life of the
store, not of this process, and a job that has ended must leave no gauge behind.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import BOUNDS_S, RunTotals

__all__ = ["job_metrics"]

_PHASES = ("pending", "executing", "finalizing")
_MAX_TASKS = 1 << 53  # a service may say any number, OTLP cannot
_Attributes = tuple[tuple[str, str], ...]


def job_metrics(
    *,
    runs: Iterable[RunTotals],
    jobs: Sequence[JobSnapshot],
    names: PipelineNames,
    start_unix_nano: int,
    now_unix_nano: int,
    run_id_on_metrics: bool = False,
) -> list[Metric]:
    """Return the metrics of all jobs.

    Without the run id, jobs of one pipeline share a series: task counts are added up, of ages and times the largest
    is said.

    Args:
        runs: All ended runs, from the store.
        jobs: The jobs that are followed now.
        names: Which pipelines have series of their own.
        start_unix_nano: When counting of runs began, in the store; the same after each restart.
        now_unix_nano: The time of the values.
        run_id_on_metrics: Put ``cicd.pipeline.run.id`` on the gauges of running jobs.

    Returns:
        Metrics that have at least one value.
    """
    labels = [names.label(job.status.job_name) for job in jobs]
    totals: dict[tuple[str, str, str], RunTotals] = {}
    for total in runs:
        renamed = dataclasses.replace(total, pipeline=names.label(total.pipeline))
        found = totals.get(renamed.key)
        totals[renamed.key] = found.merge(renamed) if found else renamed
    active = dict.fromkeys(((name, phase) for name in names.used for phase in _PHASES), 0)
    for label, job in zip(labels, jobs, strict=True):
        active[label, job.phase] += 1
    gauges = _Gauges(now_unix_nano)
    for label, job in zip(labels, jobs, strict=True):
        if not job.status.state.is_terminal:
            run_id = (("cicd.pipeline.run.id", job.status.job_id),) if run_id_on_metrics else ()
            gauges.add(job, (("cicd.pipeline.name", label), *run_id))

    def point(attributes: Mapping[str, str], value: int) -> NumberDataPoint:
        return NumberDataPoint(attributes, start_unix_nano, now_unix_nano, value)

    errors: dict[_Attributes, int] = defaultdict(int)
    for total in totals.values():
        if total.error_type:
            errors[("cicd.pipeline.name", total.pipeline), ("error.type", total.error_type)] += total.count
    cumulative = AggregationTemporality.CUMULATIVE
    metrics = [
        Metric(
            "cicd.pipeline.run.duration",
            "Duration of a pipeline run grouped by pipeline, state and result.",
            "s",
            Histogram([_duration(total, start_unix_nano, now_unix_nano) for total in totals.values()], cumulative),
        ),
        Metric(
            "cicd.pipeline.run.errors",
            "The number of errors encountered in pipeline runs (eg. compile, test failures).",
            "{error}",
            Sum([point(dict(key), count) for key, count in errors.items()], cumulative, is_monotonic=True),
        ),
        Metric(
            "cicd.pipeline.run.active",
            "The number of pipeline runs currently active in the system by state.",
            "{run}",
            Sum(
                [
                    point({"cicd.pipeline.name": name, "cicd.pipeline.run.state": phase}, count)
                    for (name, phase), count in active.items()
                ],
                cumulative,
                is_monotonic=False,
            ),
        ),
        Metric(
            "tailspan.pipeline.last_end.age",
            "Time since a run of the pipeline last ended with this result.",
            "s",
            Gauge(_last_ends(totals.values(), now_unix_nano)),
        ),
        *gauges.metrics(),
    ]
    return [metric for metric in metrics if metric.data.data_points]


def _duration(total: RunTotals, start_unix_nano: int, now_unix_nano: int) -> HistogramDataPoint:
    attributes = {
        "cicd.pipeline.name": total.pipeline,
        "cicd.pipeline.run.state": "executing",
        "cicd.pipeline.result": total.result,
    }
    if total.error_type:
        attributes["error.type"] = total.error_type
    return HistogramDataPoint(
        attributes,
        start_unix_nano,
        now_unix_nano,
        total.count,
        total.sum_s,
        total.buckets,
        BOUNDS_S,
        min=None,  # type: ignore[arg-type] # optional in OTLP, and meaningless over the life of a store
        max=None,  # type: ignore[arg-type]
        exemplars=[
            Exemplar({}, run.duration_s, run.time_unix_nano, int(run.span_id, 16), int(run.trace_id, 16))
            for run in total.exemplars
            if run
        ],
    )


def _last_ends(totals: Iterable[RunTotals], now_unix_nano: int) -> list[NumberDataPoint]:
    newest: dict[_Attributes, int] = defaultdict(int)
    for total in totals:
        key = ("cicd.pipeline.name", total.pipeline), ("cicd.pipeline.result", total.result)
        newest[key] = max(newest[key], *(run.time_unix_nano for run in total.exemplars if run), 0)
    return [
        NumberDataPoint(dict(key), 0, now_unix_nano, max(0, now_unix_nano - ended_ns) / 1e9)
        for key, ended_ns in newest.items()
        if ended_ns
    ]


class _Gauges:
    """Current values of running jobs, one per metric and attributes."""

    def __init__(self, now_unix_nano: int) -> None:
        self._now_unix_nano = now_unix_nano
        self._values: dict[str, dict[_Attributes, float]] = {name: {} for name, _, _ in _GAUGES}

    def add(self, job: JobSnapshot, attributes: _Attributes) -> None:
        status = job.status
        if status.total_tasks or status.finished_tasks:
            self._put("tailspan.job.tasks.finished", attributes, min(status.finished_tasks, _MAX_TASKS), _plus)
            self._put("tailspan.job.tasks.total", attributes, min(status.total_tasks, _MAX_TASKS), _plus)
        if status.last_heartbeat:
            self._put("tailspan.job.heartbeat.age", attributes, self._age_s(status.last_heartbeat.timestamp()), max)
        if job.last_line_unix_nano is not None:
            self._put("tailspan.job.last_line.age", attributes, self._age_s(job.last_line_unix_nano / 1e9), max)
            first_unix_nano = job.first_line_unix_nano or job.last_line_unix_nano
            exec_time_s = max(0, job.last_line_unix_nano - first_unix_nano) / 1e9
            self._put("tailspan.job.exec_time", attributes, exec_time_s, max)

    def _age_s(self, then_s: float) -> float:
        return max(0.0, self._now_unix_nano / 1e9 - then_s)

    def _put(self, name: str, attributes: _Attributes, value: float, join: Callable[[float, float], float]) -> None:
        values = self._values[name]
        values[attributes] = join(values[attributes], value) if attributes in values else value

    def metrics(self) -> list[Metric]:
        return [
            Metric(
                name,
                description,
                unit,
                Gauge(
                    [
                        NumberDataPoint(dict(attributes), 0, self._now_unix_nano, value)
                        for attributes, value in self._values[name].items()
                    ]
                ),
            )
            for name, unit, description in _GAUGES
        ]


def _plus(one: float, other: float) -> float:
    return one + other


_GAUGES = (
    ("tailspan.job.tasks.finished", "{task}", "Tasks of running jobs that have ended."),
    ("tailspan.job.tasks.total", "{task}", "Tasks of running jobs."),
    ("tailspan.job.heartbeat.age", "s", "Time since a running job last said that it lives."),
    ("tailspan.job.last_line.age", "s", "Time since the newest line of a running job."),
    ("tailspan.job.exec_time", "s", "Time from the first to the newest line of a running job."),
)
