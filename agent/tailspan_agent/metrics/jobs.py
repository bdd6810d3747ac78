"""The metrics of jobs: ended runs from the store, running jobs from their current state. Pure.

Counts of runs are cumulative since the store was
created, not since this process started, and the gauges of an ended job must disappear.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from tailspan_agent.analysis.assessment import MAX_TASKS, JobSnapshot
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import BOUNDS_S, LOWEST_INDEX, SCALE, RunTotals, with_bounded_error_types
from tailspan_agent.metrics.gauges import Attributes, GaugeDefinition, GaugeValues, age_s
from tailspan_agent.otlp.metric import (
    Buckets,
    Exemplar,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

__all__ = ["job_metrics", "task_metrics"]

_PHASES = ("pending", "executing", "finalizing")


def job_metrics(
    *,
    runs: Iterable[RunTotals],
    jobs: Sequence[JobSnapshot],
    names: PipelineNames,
    start_unix_nano: int,
    now_unix_nano: int,
    run_id_on_metrics: bool = False,
    exponential: bool = False,
) -> list[Metric]:
    """Return the metrics of all jobs.

    Without the run id, jobs of one pipeline share a series: task counts are added, of ages and times the largest is
    exported.

    Args:
        runs: All ended runs, from the store.
        jobs: The followed jobs.
        names: The pipelines with series of their own.
        start_unix_nano: When the store began to count runs, in ns since the epoch; the same after each restart.
        now_unix_nano: The time of the values, in ns since the epoch.
        run_id_on_metrics: Add ``cicd.pipeline.run.id`` to the gauges of running jobs.
        exponential: Return durations as exponential histograms, else with the buckets of `BOUNDS_S`.

    Returns:
        Metrics that have at least one value.
    """
    labels = [names.label(job.status.job_name) for job in jobs]
    totals = with_bounded_error_types(
        msgspec.structs.replace(total, pipeline=names.label(total.pipeline)) for total in runs
    )
    active = dict.fromkeys(((name, phase) for name in names.used for phase in _PHASES), 0)
    for label, job in zip(labels, jobs, strict=True):
        active[label, job.phase] += 1
    gauges = GaugeValues(_GAUGES, now_unix_nano)
    for label, job in zip(labels, jobs, strict=True):
        if not job.status.state.is_terminal:
            run_id = (("cicd.pipeline.run.id", job.status.job_id),) if run_id_on_metrics else ()
            _put_job(gauges, job, (("cicd.pipeline.name", label), *run_id), now_unix_nano)

    def point(attributes: Mapping[str, str], value: int) -> NumberDataPoint:
        return NumberDataPoint(attributes, start_unix_nano, now_unix_nano, value)

    errors: dict[Attributes, int] = defaultdict(int)
    for total in totals:
        if total.error_type:
            errors[("cicd.pipeline.name", total.pipeline), ("error.type", total.error_type)] += total.count
    metrics = [
        Metric(
            "cicd.pipeline.run.duration",
            "Duration of a pipeline run grouped by pipeline, state and result.",
            "s",
            _durations(totals, start_unix_nano, now_unix_nano, exponential=exponential),
        ),
        Metric(
            "cicd.pipeline.run.errors",
            "The number of errors encountered in pipeline runs (eg. compile, test failures).",
            "{error}",
            Sum([point(dict(key), count) for key, count in errors.items()], is_monotonic=True),
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
                is_monotonic=False,
            ),
        ),
        Metric(
            "tailspan.pipeline.last_end.age",
            "Time since a run of the pipeline last ended with this result.",
            "s",
            Gauge(_last_ends(totals, now_unix_nano)),
        ),
        *gauges.metrics(),
    ]
    return [metric for metric in metrics if metric.data.data_points]


def task_metrics(
    tasks: Sequence[RunTotals], *, start_unix_nano: int, now_unix_nano: int, exponential: bool = False
) -> list[Metric]:
    """Return the metrics of the attempts of tasks; none without attempts.

    Args:
        tasks: The totals of all ended attempts.
        start_unix_nano: When they began to be counted, in ns since the epoch.
        now_unix_nano: The time of the values, in ns since the epoch.
        exponential: Return durations as exponential histograms, else with the buckets of `BOUNDS_S`.
    """
    if not tasks:
        return []
    durations = _durations(tasks, start_unix_nano, now_unix_nano, exponential=exponential)
    description = "Duration of an attempt of a task grouped by pipeline, task and result."
    return [Metric("tailspan.task.duration", description, "s", durations)]


def _durations(
    totals: Sequence[RunTotals], start_unix_nano: int, now_unix_nano: int, *, exponential: bool
) -> Histogram | ExponentialHistogram:
    if exponential:
        return ExponentialHistogram([_exponential(total, start_unix_nano, now_unix_nano) for total in totals])
    return Histogram([_explicit(total, start_unix_nano, now_unix_nano) for total in totals])


def _explicit(total: RunTotals, start_unix_nano: int, now_unix_nano: int) -> HistogramDataPoint:
    return HistogramDataPoint(
        _attributes(total),
        start_unix_nano,
        now_unix_nano,
        total.count,
        total.sum_s,
        total.buckets,
        BOUNDS_S,
        exemplars=_exemplars(total),
    )


def _exponential(total: RunTotals, start_unix_nano: int, now_unix_nano: int) -> ExponentialHistogramDataPoint:
    indices = [index for index in total.counts if index > LOWEST_INDEX]
    first, last = min(indices, default=0), max(indices, default=-1)
    return ExponentialHistogramDataPoint(
        _attributes(total),
        start_unix_nano,
        now_unix_nano,
        total.count,
        total.sum_s,
        SCALE,
        zero_count=total.counts.get(LOWEST_INDEX, 0),
        positive=Buckets(first, [total.counts.get(index, 0) for index in range(first, last + 1)]),
        exemplars=_exemplars(total),
    )


def _attributes(total: RunTotals) -> dict[str, str]:
    if total.task:
        return {
            "cicd.pipeline.name": total.pipeline,
            "cicd.pipeline.task.name": total.task,
            "cicd.pipeline.task.run.result": total.result,
        }
    attributes = {
        "cicd.pipeline.name": total.pipeline,
        "cicd.pipeline.run.state": "executing",
        "cicd.pipeline.result": total.result,
    }
    return {**attributes, "error.type": total.error_type} if total.error_type else attributes


def _exemplars(total: RunTotals) -> list[Exemplar]:
    return [
        Exemplar(run.duration_s, run.time_unix_nano, int(run.span_id, 16), int(run.trace_id, 16))
        for run in total.exemplars
        if run
    ]


def _last_ends(totals: Iterable[RunTotals], now_unix_nano: int) -> list[NumberDataPoint]:
    newest: dict[Attributes, int] = defaultdict(int)
    for total in totals:
        key = ("cicd.pipeline.name", total.pipeline), ("cicd.pipeline.result", total.result)
        newest[key] = max(newest[key], *(run.time_unix_nano for run in total.exemplars if run), 0)
    return [
        NumberDataPoint(dict(key), 0, now_unix_nano, max(0, now_unix_nano - ended_ns) / 1e9)
        for key, ended_ns in newest.items()
        if ended_ns
    ]


def _put_job(gauges: GaugeValues, job: JobSnapshot, series: Attributes, now_unix_nano: int) -> None:
    status = job.status
    if status.total_tasks or status.finished_tasks:
        gauges.put("tailspan.job.tasks.finished", series, min(status.finished_tasks, MAX_TASKS), operator.add)
        gauges.put("tailspan.job.tasks.total", series, min(status.total_tasks, MAX_TASKS), operator.add)
    if status.last_heartbeat:
        heartbeat_ns = int(status.last_heartbeat.timestamp() * 1e9)
        gauges.put("tailspan.job.heartbeat.age", series, age_s(heartbeat_ns, now_unix_nano))
    if job.last_line_unix_nano is not None:
        gauges.put("tailspan.job.last_line.age", series, age_s(job.last_line_unix_nano, now_unix_nano))
        first_unix_nano = job.first_line_unix_nano or job.last_line_unix_nano
        gauges.put("tailspan.job.exec_time", series, age_s(first_unix_nano, job.last_line_unix_nano))


_GAUGES = (
    GaugeDefinition("tailspan.job.tasks.finished", "{task}", "Finished tasks of running jobs."),
    GaugeDefinition("tailspan.job.tasks.total", "{task}", "Tasks of running jobs."),
    GaugeDefinition("tailspan.job.heartbeat.age", "s", "Time since the last heartbeat of a running job."),
    GaugeDefinition("tailspan.job.last_line.age", "s", "Time since the newest line of a running job."),
    GaugeDefinition("tailspan.job.exec_time", "s", "Time from the first to the newest line of a running job."),
)
