"""The metrics of assessments: their names are a contract with dashboards, rules and the page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.assessment import JobSnapshot, PipelineStats
from tailspan_agent.analysis.baseline import Histories, PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, PipelineNames
from tailspan_agent.analysis.progress import Progress
from tailspan_agent.metrics.pipelines import pipeline_metrics
from tailspan_agent.metrics.prometheus import prometheus_text
from tailspan_agent.otlp.metric import Metric, NumberDataPoint, Sum

S = 1_000_000_000
NOW = 1_715_515_200 * S
T0 = datetime.fromtimestamp(NOW / S, UTC)


def job(name: str = "etl", state: JobState = JobState.RUNNING, job_id: str = "j", **fields: Any) -> JobSnapshot:
    known = {"submitted_at": T0 - timedelta(seconds=90), "started_at": T0 - timedelta(seconds=60)}
    if state is JobState.PENDING:
        del known["started_at"]
    status = JobStatus.from_state(
        state, job_id=job_id, job_name=name, identity="id", trace_id="ab" * 16, **{**known, **fields}
    )
    return JobSnapshot(service="s", status=status)


def past(name: str, count: int, duration_s: float = 10.0) -> list[PastRun]:
    fields: dict[str, Any] = {"pipeline": name, "job_id": "p", "identity": "id", "trace_id": "ab" * 16}
    times = {"started_unix_nano": NOW - 300 * S, "ended_unix_nano": NOW - 200 * S}
    return [PastRun(**fields, **times, result="success", duration_s=duration_s) for _ in range(count)]


def made(*jobs: JobSnapshot, limit: int = 10, run_id_on_metrics: bool = False, **known: Any) -> list[Metric]:
    pipeline_stats = PipelineStats(**known)
    names = PipelineNames(limit, pipeline_stats.histories)
    return pipeline_metrics(
        jobs=jobs,
        pipeline_stats=pipeline_stats,
        names=names,
        start_unix_nano=1,
        now_unix_nano=NOW,
        run_id_on_metrics=run_id_on_metrics,
    )


def values(metrics: list[Metric]) -> dict[str, dict[tuple[str, ...], float]]:
    return {
        metric.name: {
            tuple(map(str, (point.attributes or {}).values())): point.value
            for point in metric.data.data_points
            if isinstance(point, NumberDataPoint)
        }
        for metric in metrics
    }


def test_names_units_and_values() -> None:
    """Every metric of the contract, with its unit and its value for a known pipeline."""
    metrics = made(
        job(total_tasks=4, finished_tasks=3),
        job(job_id="k", total_tasks=2, finished_tasks=1),
        job(state=JobState.PENDING, job_id="p"),
        histories=Histories([*past("etl", 19), *past("etl", 1, 30.0)]),
        too_fast={"etl": 2},
        missing={"etl": True},
    )
    assert {metric.name: metric.unit for metric in metrics} == {
        "tailspan.job.silent": "{run}",
        "tailspan.job.slow": "{run}",
        "tailspan.job.too_fast": "{run}",
        "tailspan.job.pending.age": "s",
        "tailspan.job.progress": "1",
        "tailspan.job.eta": "s",
        "tailspan.pipeline.duration.p50": "s",
        "tailspan.pipeline.duration.p95": "s",
        "tailspan.pipeline.missing": "{run}",
        "tailspan.pipeline.last_start.age": "s",
    }
    assert {name: found["etl",] for name, found in values(metrics).items()} == {
        "tailspan.job.silent": 0,
        "tailspan.job.slow": 2,
        "tailspan.job.too_fast": 2,
        "tailspan.job.pending.age": 90,
        "tailspan.job.progress": 0.5,
        "tailspan.job.eta": 60,
        "tailspan.pipeline.duration.p50": 10,
        "tailspan.pipeline.duration.p95": 10,
        "tailspan.pipeline.missing": 1,
        "tailspan.pipeline.last_start.age": 60,
    }
    (too_fast,) = (metric.data for metric in metrics if metric.name == "tailspan.job.too_fast")
    assert isinstance(too_fast, Sum)
    assert too_fast.is_monotonic


def test_series_of_ended_jobs_disappear() -> None:
    """What describes running jobs is there while one runs: 0 for a job that is neither silent nor slow."""
    live = {"tailspan.job.progress", "tailspan.job.eta", "tailspan.job.silent", "tailspan.job.slow"}
    found = values(made(histories=Histories(past("etl", 3))))
    assert found["tailspan.job.pending.age"] == {("etl",): 0}
    assert not live & set(found)
    found = values(made(job(state=JobState.SUCCEEDED, total_tasks=2, finished_tasks=2)))
    assert not live & set(found)
    found = values(made(job()))
    assert found["tailspan.job.silent"] == found["tailspan.job.slow"] == {("etl",): 0}


def test_the_time_left_is_never_negative() -> None:
    """A full bar whose time has come has 0 s left, not less."""
    full = Progress(fraction=1.0, eta_s=0.0, seen_unix_nano=NOW - 8 * S, source="bar", text="100%")
    running = job()
    running.progress = full
    assert values(made(running))["tailspan.job.eta"] == {("etl",): 0}


def test_run_ids_only_with_the_option() -> None:
    """Without the option two runs share a series; with it, progress and time left have one each; counts never."""
    jobs = [job(job_id=name, total_tasks=2, finished_tasks=1) for name in "ab"]
    assert set(values(made(*jobs))["tailspan.job.progress"]) == {("etl",)}
    found = values(made(*jobs, run_id_on_metrics=True))
    assert set(found["tailspan.job.progress"]) == {("etl", "a"), ("etl", "b")}
    assert set(found["tailspan.job.silent"]) == {("etl",)}


def test_names_above_the_limit_share_one() -> None:
    """The number of series is limited for any number of pipelines; the shared name has no usual duration."""
    found = values(made(*(job(f"p{number}") for number in range(50)), limit=3, histories=Histories(past("p0", 9))))
    assert set(found["tailspan.job.slow"]) == {("p0",), ("p1",), ("p2",), (OTHER_PIPELINES,)}
    assert set(found["tailspan.pipeline.duration.p50"]) == {("p0",)}
    assert (OTHER_PIPELINES,) not in found["tailspan.pipeline.last_start.age"]


def test_the_names_in_prometheus() -> None:
    """The names that its OTLP receiver gives: a gauge with unit 1 is a ratio."""
    metrics = made(job(total_tasks=4, finished_tasks=3), histories=Histories(past("etl", 1)), missing={"etl": False})
    text = prometheus_text(metrics, {})[0].decode()
    names = {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert names == {
        "target_info 1.0",
        "tailspan_job_silent",
        "tailspan_job_slow",
        "tailspan_job_too_fast_total",
        "tailspan_job_pending_age_seconds",
        "tailspan_job_progress_ratio",
        "tailspan_job_eta_seconds",
        "tailspan_pipeline_duration_p50_seconds",
        "tailspan_pipeline_duration_p95_seconds",
        "tailspan_pipeline_missing",
        "tailspan_pipeline_last_start_age_seconds",
    }
