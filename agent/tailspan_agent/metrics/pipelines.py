"""The metrics of assessments: progress, time left, silent, slow, too fast, missing, and the usual duration. Pure."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

from tailspan_agent.analysis.assessment import (
    Assessment,
    JobSnapshot,
    PipelineStats,
    assess,
    is_unassessable,
    last_starts,
)
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, PipelineNames
from tailspan_agent.metrics.gauges import Attributes, GaugeDefinition, GaugeValues, age_s
from tailspan_agent.otlp.metric import Metric, NumberDataPoint, Sum

__all__ = ["pipeline_metrics", "too_fast_metric"]


def pipeline_metrics(
    *,
    jobs: Sequence[JobSnapshot],
    pipeline_stats: PipelineStats,
    names: PipelineNames,
    start_unix_nano: int,
    now_unix_nano: int,
    run_id_on_metrics: bool = False,
) -> list[Metric]:
    """Return the metrics of assessments.

    Without the run id, jobs of one pipeline share a series: of their progress the smallest is exported, of their times
    the largest.

    Args:
        jobs: The followed jobs.
        pipeline_stats: The history of pipelines.
        names: The pipelines with series of their own.
        start_unix_nano: When the store began to count, in ns since the epoch.
        now_unix_nano: The time of the values, in ns since the epoch.
        run_id_on_metrics: Add ``cicd.pipeline.run.id`` to progress and time left.

    Returns:
        Metrics that have at least one value. What describes running jobs disappears with the last one of its pipeline.
    """
    labelled = [(names.label(job.status.job_name), job) for job in jobs]
    missing = {names.label(name): is_missing for name, is_missing in pipeline_stats.missing.items()}
    gauges = GaugeValues(_GAUGES, now_unix_nano)
    for name in names.used:
        _put_pipeline(gauges, name, pipeline_stats)
    unassessed: dict[str, None] = {}
    for name, job in labelled:
        if job.phase == "pending" and job.status.submitted_at is not None:
            submitted_ns = int(job.status.submitted_at.timestamp() * 1e9)
            gauges.put("tailspan.job.pending.age", _series(name), age_s(submitted_ns, now_unix_nano))
        history = pipeline_stats.histories.of(name)
        if not is_unassessable(job, history):
            run_id = job.status.job_id if run_id_on_metrics else ""
            _put_assessment(gauges, name, job, assess(job, history, now_unix_nano), run_id)
        elif job.phase != "finalizing":
            unassessed[name] = None
    for name in unassessed:
        # Not put for each job: a snapshot has thousands of them.
        gauges.put("tailspan.job.silent", _series(name), 0, operator.add)
        gauges.put("tailspan.job.slow", _series(name), 0, operator.add)
    for name, is_missing in missing.items():
        gauges.put("tailspan.pipeline.missing", _series(name), int(is_missing))
    for name, start_ns in last_starts(pipeline_stats.histories, labelled).items():
        if name != OTHER_PIPELINES:
            gauges.put("tailspan.pipeline.last_start.age", _series(name), age_s(start_ns, now_unix_nano))
    return [
        *gauges.metrics(),
        *too_fast_metric(names.used, pipeline_stats.too_fast, start_unix_nano, now_unix_nano),
    ]


def too_fast_metric(
    names: Collection[str], too_fast: Mapping[str, int], start_unix_nano: int, now_unix_nano: int
) -> list[Metric]:
    """Return the counter of suspiciously fast runs; nothing without pipelines.

    Args:
        names: The pipelines with series of their own.
        too_fast: The number of such runs by pipeline.
        start_unix_nano: When they began to be counted, in ns since the epoch.
        now_unix_nano: The time of the values, in ns since the epoch.
    """
    points = [
        NumberDataPoint(dict(_series(name)), start_unix_nano, now_unix_nano, too_fast.get(name, 0)) for name in names
    ]
    if not points:
        return []
    total = Sum(points, is_monotonic=True)
    return [Metric("tailspan.job.too_fast", "Runs that succeeded suspiciously fast.", "{run}", total)]


def _series(pipeline: str, run_id: str = "") -> Attributes:
    run = (("cicd.pipeline.run.id", run_id),) if run_id else ()
    return (("cicd.pipeline.name", pipeline), *run)


def _put_pipeline(gauges: GaugeValues, name: str, pipeline_stats: PipelineStats) -> None:
    gauges.put("tailspan.job.pending.age", _series(name), 0)
    history = pipeline_stats.histories.of(name)
    if history.p50_s is not None and history.p95_s is not None:
        gauges.put("tailspan.pipeline.duration.p50", _series(name), history.p50_s)
        gauges.put("tailspan.pipeline.duration.p95", _series(name), history.p95_s)


def _put_assessment(gauges: GaugeValues, name: str, job: JobSnapshot, assessment: Assessment, run_id: str) -> None:
    if job.phase != "finalizing":
        gauges.put("tailspan.job.silent", _series(name), int(assessment.silent), operator.add)
        gauges.put("tailspan.job.slow", _series(name), int(assessment.slow), operator.add)
    own_series = _series(name, run_id)
    if assessment.progress is not None:
        gauges.put("tailspan.job.progress", own_series, assessment.progress, min)
    if assessment.eta_s is not None:
        gauges.put("tailspan.job.eta", own_series, assessment.eta_s)


_GAUGES = (
    GaugeDefinition("tailspan.job.silent", "{run}", "Running jobs without a line for unusually long."),
    GaugeDefinition("tailspan.job.slow", "{run}", "Running jobs that have run for unusually long."),
    GaugeDefinition("tailspan.job.pending.age", "s", "Time since the oldest pending run was submitted; 0 without one."),
    GaugeDefinition("tailspan.job.progress", "1", "Progress of running jobs, 0 to 1, from their tasks or their log."),
    GaugeDefinition("tailspan.job.eta", "s", "Estimated time left of running jobs, from their tasks or their log."),
    GaugeDefinition("tailspan.pipeline.duration.p50", "s", "Usual duration: median of the last succeeded runs."),
    GaugeDefinition(
        "tailspan.pipeline.duration.p95", "s", "95th percentile of the duration of the last succeeded runs."
    ),
    GaugeDefinition(
        "tailspan.pipeline.missing", "{run}", "1 for an expected pipeline that did not start in time, else 0."
    ),
    GaugeDefinition("tailspan.pipeline.last_start.age", "s", "Time since a run of the pipeline last started."),
)
