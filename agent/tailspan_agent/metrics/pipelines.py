"""The metrics of what is learned of jobs and pipelines: progress, time left, silent, slow, too fast, missing. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Metric, NumberDataPoint, Sum

from tailspan_agent.analysis.assessment import JobSnapshot, PipelineStats, assess, is_unassessable, last_starts
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, PipelineNames

__all__ = ["pipeline_metrics"]

_Attributes = tuple[tuple[str, str], ...]


def pipeline_metrics(
    *,
    jobs: Sequence[JobSnapshot],
    pipeline_stats: PipelineStats,
    names: PipelineNames,
    start_unix_nano: int,
    now_unix_nano: int,
    run_id_on_metrics: bool = False,
) -> list[Metric]:
    """Return the metrics of what is learned of jobs and pipelines.

    Without the run id, jobs of one pipeline share a series: of progress the least is said, of times the largest.

    Args:
        jobs: The jobs that are followed now.
        pipeline_stats: What is known of pipelines.
        names: Which pipelines have series of their own.
        start_unix_nano: When counting began, in the store.
        now_unix_nano: The time of the values.
        run_id_on_metrics: Put ``cicd.pipeline.run.id`` on progress and time left.

    Returns:
        Metrics that have at least one value. Counts of running jobs say 0 for every known pipeline, so that an alert
        on them ends; what a job says of itself goes with the job.
    """
    values: dict[str, dict[_Attributes, float]] = defaultdict(dict)

    def put(name: str, pipeline: str, value: float, join: Callable[[float, float], float], run_id: str = "") -> None:
        attributes: _Attributes = (("cicd.pipeline.name", pipeline),)
        if run_id and run_id_on_metrics:
            attributes += (("cicd.pipeline.run.id", run_id),)
        known = values[name]
        known[attributes] = join(known[attributes], value) if attributes in known else value

    labelled = [(names.label(job.status.job_name), job) for job in jobs]
    missing = {names.label(name): is_missing for name, is_missing in pipeline_stats.missing.items()}
    for name in names.used:
        for metric in ("tailspan.job.silent", "tailspan.job.slow", "tailspan.job.pending.age"):
            put(metric, name, 0, max)
        history = pipeline_stats.histories.of(name)
        if history.p50_s is not None and history.p95_s is not None:
            put("tailspan.pipeline.duration.p50", name, history.p50_s, max)
            put("tailspan.pipeline.duration.p95", name, history.p95_s, max)
    for name, job in labelled:
        if job.phase == "pending" and job.status.submitted_at is not None:
            put("tailspan.job.pending.age", name, _age_s(job.status.submitted_at.timestamp(), now_unix_nano), max)
        history = pipeline_stats.histories.of(name)
        if is_unassessable(job, history):
            continue
        assessment = assess(job, history, now_unix_nano)
        if assessment.silent:
            put("tailspan.job.silent", name, 1, _plus)
        if assessment.slow:
            put("tailspan.job.slow", name, 1, _plus)
        if assessment.progress is not None:
            put("tailspan.job.progress", name, assessment.progress, min, job.status.job_id)
        if assessment.eta_s is not None:
            put("tailspan.job.eta", name, assessment.eta_s, max, job.status.job_id)
    for name, is_missing in missing.items():
        put("tailspan.pipeline.missing", name, int(is_missing), max)
    for name, start_ns in last_starts(pipeline_stats.histories, labelled).items():
        if name != OTHER_PIPELINES:
            put("tailspan.pipeline.last_start.age", name, _age_s(start_ns / 1e9, now_unix_nano), max)
    gauges = [
        Metric(name, description, unit, Gauge(_points(values[name], 0, now_unix_nano)))
        for name, unit, description in _GAUGES
        if values[name]
    ]
    too_fast: dict[_Attributes, float] = {
        (("cicd.pipeline.name", name),): pipeline_stats.too_fast.get(name, 0) for name in names.used
    }
    if too_fast:
        points = _points(too_fast, start_unix_nano, now_unix_nano)
        total = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
        gauges.append(Metric("tailspan.job.too_fast", "Runs that succeeded suspiciously fast.", "{run}", total))
    return gauges


def _points(values: Mapping[_Attributes, float], start_unix_nano: int, now_unix_nano: int) -> list[NumberDataPoint]:
    return [
        NumberDataPoint(dict(attributes), start_unix_nano, now_unix_nano, value) for attributes, value in values.items()
    ]


def _age_s(then_s: float, now_unix_nano: int) -> float:
    return max(0.0, now_unix_nano / 1e9 - then_s)


def _plus(one: float, other: float) -> float:
    return one + other


_GAUGES = (
    ("tailspan.job.silent", "{run}", "Running jobs that are silent for longer than their pipeline's past says."),
    ("tailspan.job.slow", "{run}", "Running jobs that are past the 95th percentile of their pipeline."),
    ("tailspan.job.pending.age", "s", "Time since the oldest pending run was submitted; 0 without one."),
    ("tailspan.job.progress", "1", "How far running jobs are, 0 to 1, by their tasks or their log."),
    ("tailspan.job.eta", "s", "How long running jobs will still take, by their tasks or their log."),
    ("tailspan.pipeline.duration.p50", "s", "Usual duration: the median of the last succeeded runs."),
    ("tailspan.pipeline.duration.p95", "s", "The duration that 95 of 100 of the last succeeded runs did not exceed."),
    ("tailspan.pipeline.missing", "{run}", "1 for an expected pipeline that did not start in time, else 0."),
    ("tailspan.pipeline.last_start.age", "s", "Time since a run of the pipeline last started."),
)
