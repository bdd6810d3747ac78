"""The agent learns from ended runs, and reports silent, slow and too fast jobs, and missing pipelines, once."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tailspan_agent.pipeline.missing_runs import MissingRuns
from tests.fakes.agents import Bench, looped, until
from tests.fakes.otlp_rows import LogRow

HOUR = timedelta(hours=1)


def add_past(bench: Bench, count: int, *, took: timedelta = timedelta(minutes=10)) -> None:
    """Add jobs of the pipeline etl that succeeded."""
    for number in range(count):
        started = datetime.now(UTC) - HOUR + timedelta(seconds=number)
        bench.fake.add_job(f"past{number}", job_name="etl", submitted_at=started, started_at=started, state="SUCCEEDED")
        bench.fake.set_state(f"past{number}", "SUCCEEDED", finished_at=started + took)
        first_ms = int(started.timestamp() * 1000)
        step_ms = int(took.total_seconds() * 1000 / 9)
        bench.fake.add_lines(f"past{number}", *"0123456789", timestamp_ms=first_ms, step_ms=step_ms)


def alerts_of(bench: Bench, job_id: str) -> dict[str, LogRow]:
    """Return the alert records of a job, by name."""
    rows = bench.collector.log_records()
    alerts = [row for row in rows if "tailspan.alert" in row.attributes]
    return {row.event_name: row for row in alerts if row.resource.get("cicd.pipeline.run.id") == job_id}


def value_of(bench: Bench, agent: Any, name: str, pipeline: str = "etl") -> float | None:
    """Return a gauge's or counter's present value for a pipeline."""
    for scope in agent.metrics_reader.snapshot():
        for metric in scope.metrics:
            for point in metric.data.data_points if metric.name == name else ():
                if point.attributes["cicd.pipeline.name"] == pipeline:
                    return float(point.value)
    return None


@looped
async def test_a_job_that_is_silent_and_slow_is_reported_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Learned from ten earlier runs, over a restart; reported in the agent's log, the job's log, and metrics."""
    add_past(bench, 10)
    async with bench.running() as agent:
        await until(lambda: agent.pipeline_stats.histories.of("etl").is_enough)
    long_ago = datetime.now(UTC) - HOUR
    bench.fake.add_job("j1", job_name="etl", submitted_at=long_ago, started_at=long_ago)
    bench.fake.add_lines("j1", "begun", timestamp_ms=int(long_ago.timestamp() * 1000))
    with caplog.at_level(logging.WARNING):
        async with bench.running() as agent:
            await bench.received(lambda: len(alerts_of(bench, "j1")) == 2)
            assessment = {job.status.job_id: assessment for job, assessment in agent.followed_jobs()}["j1"]
            assert (assessment.silent, assessment.slow, assessment.usual_s) == (True, True, 600.0)
            assert value_of(bench, agent, "tailspan.job.silent") == 1
            assert value_of(bench, agent, "tailspan.job.slow") == 1
            assert value_of(bench, agent, "tailspan.pipeline.duration.p50") == 600
    async with bench.running() as agent:
        await until(lambda: agent.followed_jobs() != [])
        looks = bench.fake.calls.count(("list_jobs", ""))
        await until(lambda: bench.fake.calls.count(("list_jobs", "")) > looks + 1)
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans("j1"))
        assert value_of(bench, agent, "tailspan.job.silent") is None
    assert len([row for row in bench.collector.log_records() if "tailspan.alert" in row.attributes]) == 2
    silent, span = alerts_of(bench, "j1")["tailspan.job.silent"], bench.spans("j1")["run"]
    assert (silent.severity_text, silent.trace_id, silent.span_id) == ("WARN", span.trace_id, span.span_id)
    assert "no line for 1h 00m" in silent.body
    assert {"tailspan.job.silent", "tailspan.job.slow"} < {event.name for event in span.events}
    assert len([record for record in caplog.records if "job j1" in record.getMessage()]) == 2


@looped
async def test_a_job_that_succeeds_too_fast_is_reported(bench: Bench) -> None:
    """healthchecks#236: it is counted for good, and an event of its run span."""
    add_past(bench, 10)
    async with bench.running() as agent:
        await until(lambda: agent.pipeline_stats.histories.of("etl").is_enough)
        bench.fake.add_job("j1", job_name="etl")
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: bench.spans("j1").get("run") and alerts_of(bench, "j1"))
        assert value_of(bench, agent, "tailspan.job.too_fast") == 1
    assert "succeeded after only " in alerts_of(bench, "j1")["tailspan.job.too_fast"].body
    assert "tailspan.job.too_fast" in {event.name for event in bench.spans("j1")["run"].events}
    async with bench.running() as agent:
        assert value_of(bench, agent, "tailspan.job.too_fast") == 1


@looped
async def test_without_enough_history_nothing_is_reported(bench: Bench) -> None:
    """With nine past runs, a job that runs for an hour without a line is not reported, and its assessment says why."""
    add_past(bench, 9)
    long_ago = datetime.now(UTC) - HOUR
    bench.fake.add_job("j1", job_name="etl", submitted_at=long_ago, started_at=long_ago)
    async with bench.running() as agent:
        await until(lambda: len(agent.pipeline_stats.histories.of("etl").runs) == 9 and len(agent.followed_jobs()) == 1)
        (assessment,) = (assessment for _, assessment in agent.followed_jobs())
        assert (assessment.silent, assessment.slow, assessment.past_runs, assessment.enough_history) == (
            False,
            False,
            9,
            False,
        )
        await bench.received(lambda: "queued" in bench.spans("j1"))
    assert alerts_of(bench, "j1") == {}


@looped
async def test_an_expected_pipeline_that_did_not_start(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Reported once; ends when a run starts; nothing is reported while the service is unreachable."""
    expect = '[[agent.expect]]\nname = "nightly"\nevery = "1h"\ngrace = "10m"'
    async with bench.running(more=expect) as agent:
        await until(lambda: agent.discoveries[0].has_scanned)
        missing_runs = MissingRuns(
            agent._context,
            jobs=lambda: [job for job, _ in agent.followed_jobs()],
            settings=lambda: agent.settings,
            seen_all=lambda: all(discovery.failure is None for discovery in agent.discoveries),
        )
        counted_ns = agent.store.start_unix_nano
        late_ns = counted_ns + 71 * 60 * 10**9
        await missing_runs.check(counted_ns + 69 * 60 * 10**9)
        assert value_of(bench, agent, "tailspan.pipeline.missing", "nightly") == 0
        with caplog.at_level(logging.WARNING):
            await missing_runs.check(late_ns)
            await missing_runs.check(late_ns + 1)
        assert value_of(bench, agent, "tailspan.pipeline.missing", "nightly") == 1
        await bench.received(lambda: any("nightly" in str(row.body) for row in bench.collector.log_records()))
        bench.fake.add_job("n1", job_name="nightly", started_at=datetime.now(UTC) + HOUR)
        await until(lambda: agent.followed_jobs() != [])
        await missing_runs.check(late_ns)
        assert value_of(bench, agent, "tailspan.pipeline.missing", "nightly") == 0
        assert value_of(bench, agent, "tailspan.pipeline.last_start.age", "nightly") == 0
    (record,) = (row for row in bench.collector.log_records() if row.event_name == "tailspan.pipeline.missing")
    assert record.resource["service.name"] == "nightly"
    assert (record.severity_text, record.trace_id) == ("WARN", "")
    assert "last started never" in record.body
    assert len([record for record in caplog.records if "did not start in time" in record.getMessage()]) == 1
