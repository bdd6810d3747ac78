"""Limits from a pipeline's history: silent, slow, too fast, missing; and when there are none."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.config import Expect
from tailspan.logs.page import Line, LogPage
from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.assessment import (
    Assessment,
    JobSnapshot,
    Progress,
    assess,
    is_unassessable,
    last_starts,
    missing_pipelines,
)
from tailspan_agent.analysis.baseline import ENOUGH_RUNS, KEPT_RUNS, Histories, PastRun, PipelineHistory
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.history import KEPT_FAILURES
from tailspan_agent.checkpoint.store import Ack, SqliteStore
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.times import past_run

S = 1_000_000_000
NOW = 1_715_515_200 * S
T0 = datetime.fromtimestamp(NOW / S, UTC)


def run(duration_s: float = 100.0, *, ended_s: float = 0.0, **fields: Any) -> PastRun:
    known: dict[str, Any] = {"pipeline": "etl", "job_id": "j", "identity": "id", "trace_id": "ab" * 16}
    ended_ns = NOW + int(ended_s * S)
    times = {"started_unix_nano": ended_ns - int(duration_s * S), "ended_unix_nano": ended_ns}
    return PastRun(**{**known, **times, "result": "success", "duration_s": duration_s, **fields})


def past(durations_s: Sequence[float], **fields: Any) -> PipelineHistory:
    runs = [run(duration_s, ended_s=index, **fields) for index, duration_s in enumerate(durations_s)]
    return PipelineHistory(tuple(runs))


def followed(state: JobState = JobState.RUNNING, *, running_s: float = 10.0, **fields: Any) -> JobSnapshot:
    own = {name: fields.pop(name) for name in list(fields) if name in ("progress", "last_line_unix_nano")}
    started = None if state is JobState.PENDING else T0 - timedelta(seconds=running_s)
    status = JobStatus.from_state(
        state, job_id="j", job_name="etl", identity="id", trace_id="ab" * 16, started_at=started, **fields
    )
    return JobSnapshot(service="s", status=status, **own)


def test_nine_runs_are_not_enough_history() -> None:
    """Before ten succeeded runs there is no anomaly, but there is a usual duration."""
    odd = followed(running_s=1e6)
    few, enough = past([100.0] * (ENOUGH_RUNS - 1)), past([100.0] * ENOUGH_RUNS)
    seen = assess(odd, few, NOW)
    assert (seen.slow, seen.silent, seen.usual_s, seen.past_runs, seen.enough_history) == (
        False,
        False,
        100.0,
        9,
        False,
    )
    assert not few.is_too_fast("success", 0.1)
    seen = assess(odd, enough, NOW)
    assert (seen.slow, seen.silent, seen.enough_history) == (True, True, True)
    assert enough.is_too_fast("success", 0.1)


def test_runs_that_did_not_succeed_set_no_limits() -> None:
    """Ten runs that failed at once do not make a working run slow; the success rate counts them, not the canceled."""
    results = {"failure": 10, "cancellation": 3, "skip": 2}
    others = [run for result, number in results.items() for run in past([0.1] * number, result=result).runs]
    history = PipelineHistory((*past([100.0] * 10).runs, *others))
    assert (history.p50_s, history.success_rate) == (100.0, 0.5)
    assert not assess(followed(running_s=101), history, NOW).slow


@pytest.mark.parametrize(("running_s", "slow"), [(100.0, False), (109.0, False), (111.5, True)])
def test_slow_is_past_its_own_p95(running_s: float, slow: bool) -> None:
    """A run is slow above the 95th percentile plus a tenth and a second."""
    assert assess(followed(running_s=running_s), past([*[90.0] * 15, 100.0]), NOW).slow is slow


@pytest.mark.parametrize(
    ("result", "duration_s", "too_fast"),
    [("success", 49.0, True), ("success", 51.0, False), ("failure", 1.0, False), ("cancellation", 1.0, False)],
)
def test_too_fast_is_half_of_the_fastest(result: str, duration_s: float, too_fast: bool) -> None:
    """healthchecks#236: a backup that takes a second has saved nothing; a failed one is reported already."""
    assert past([100.0, *[200.0] * 15]).is_too_fast(result, duration_s) is too_fast


def test_short_pipelines_are_never_too_fast() -> None:
    """For a job of half a second, a tenth is no anomaly."""
    assert not past([0.5] * 20).is_too_fast("success", 0.0)


@pytest.mark.parametrize(
    ("quiet_s", "usual_s", "silent"), [(59, 0.1, False), (61, 0.1, True), (599, 300, False), (601, 300, True)]
)
def test_silent_is_twice_the_usual_pause(quiet_s: float, usual_s: float, silent: bool) -> None:
    """A job is silent after twice the usual pause, at least a minute; without a line, time counts from its start."""
    history = past([1000.0] * 20, quiet_s=usual_s)
    spoke = followed(running_s=900, last_line_unix_nano=NOW - int(quiet_s * S))
    assert assess(spoke, history, NOW).silent is silent
    assert assess(followed(running_s=quiet_s), history, NOW).silent is silent


def test_a_missing_heartbeat_is_silence() -> None:
    """Heartbeats have a history of their own; while a service is unavailable, a job is not silent."""
    history = past([1000.0] * 20, quiet_s=5000.0, heartbeat_gap_s=40.0)
    for age_s, silent in ((79, False), (81, True)):
        job = followed(running_s=900, last_heartbeat=T0 - timedelta(seconds=age_s))
        assert assess(job, history, NOW).silent is silent
    assert not assess(followed(running_s=9000, stale=True), past([1.0] * 20), NOW).silent


@pytest.mark.parametrize("state", [JobState.PENDING, JobState.SUCCEEDED, JobState.FAILED])
def test_only_running_jobs_are_assessed(state: JobState) -> None:
    """Queued and ended jobs are neither silent nor slow."""
    assert assess(followed(state, running_s=1e6), past([1.0] * 20), NOW) == Assessment(
        usual_s=1.0, past_runs=20, enough_history=True
    )


@given(
    st.integers(0, 2 * ENOUGH_RUNS),
    st.sampled_from(list(JobState)),
    st.floats(0, 1e6),
    st.integers(-1, 3),
    st.none() | st.just(Progress(fraction=0.5, eta_s=1.0, seen_unix_nano=NOW, source="log")),
)
def test_unassessable_jobs_have_empty_assessments(
    runs: int, state: JobState, running_s: float, total_tasks: int, progress: Progress | None
) -> None:
    """A job is skipped only if its assessment is empty."""
    beat = T0 - timedelta(seconds=running_s / 2)
    job = followed(state, running_s=running_s, total_tasks=total_tasks, progress=progress, last_heartbeat=beat)
    history = past([1.0] * runs)
    if is_unassessable(job, history):
        seen = assess(job, history, NOW)
        assert (seen.progress, seen.eta_s, seen.silent, seen.slow) == (None, None, False, False)
    else:
        assert progress or total_tasks > 0 or runs >= ENOUGH_RUNS


def test_tasks_are_progress() -> None:
    """Task counts of the service take precedence over the log; the time left is estimated from them."""
    said = Progress(fraction=0.9, eta_s=1.0, seen_unix_nano=NOW, source="log")
    seen = assess(followed(running_s=30, total_tasks=4, finished_tasks=1, progress=said), PipelineHistory(), NOW)
    assert (seen.progress, seen.eta_s, seen.progress_text) == (0.25, pytest.approx(90.0), "1 of 4 tasks")
    seen = assess(followed(total_tasks=4, finished_tasks=0), PipelineHistory(), NOW)
    assert (seen.progress, seen.eta_s) == (0.0, None)
    assert assess(followed(total_tasks=4, finished_tasks=9), PipelineHistory(), NOW).progress == 1.0


@pytest.mark.parametrize(
    ("total", "finished", "progress"),
    [(10**400, 1, None), (1, 10**400, 1.0), (5, -1, None), (-5, 1, None), (1 << 53, 1, 2.0**-53), (0, 0, None)],
)
def test_any_number_of_tasks(total: int, finished: int, progress: float | None) -> None:
    """Invalid task counts of one service must not break the metrics."""
    job = followed(total_tasks=total, finished_tasks=finished)
    assert assess(job, PipelineHistory(), NOW).progress == progress


def test_an_estimate_runs_down_and_ends() -> None:
    """The time left decreases while the log is quiet; an overdue estimate is dropped."""
    said = Progress(fraction=0.5, eta_s=20.0, seen_unix_nano=NOW - 5 * S, source="log", text="50%")
    seen = assess(followed(progress=said), PipelineHistory(), NOW)
    assert (seen.progress, seen.eta_s, seen.progress_text) == (0.5, 15.0, "50%")
    assert assess(followed(progress=said), PipelineHistory(), NOW + 16 * S).eta_s is None


def test_missing_is_every_and_grace_after_the_last_start() -> None:
    """A pipeline that never started is late from the start of counting; a running one is not late."""
    expects = [Expect(name=name, every=100, grace=10) for name in ("etl", "never")]
    histories = Histories([run(50, ended_s=-100)])
    starts = last_starts(histories, [])
    assert starts == {"etl": NOW - 150 * S}
    assert missing_pipelines(expects, starts, NOW - 109 * S, NOW) == {"etl": True, "never": False}
    starts = last_starts(histories, [("etl", followed(running_s=5))])
    assert missing_pipelines(expects, starts, NOW - 111 * S, NOW) == {"etl": False, "never": True}


def test_the_longest_pause_of_a_job_is_kept() -> None:
    """Pauses within and between pages count, also at the start and the end; late lines cause none."""

    def page(*seconds: float) -> LogPage:
        lines = [Line(NOW + int(second * S), "x") for second in seconds]
        return LogPage.from_lines(lines, cursor=b"", identity="id", job_id="j")

    ledger = JobLedger(first_seen_ns=NOW).with_page(page(1, 2, 9)).with_page(page(12)).with_page(page(2, 11))
    assert ledger.quiet_ns == 7 * S
    ended = {"started_at": T0 - timedelta(seconds=8), "finished_at": T0 + timedelta(seconds=14)}
    job = JobStatus.from_state(
        JobState.SUCCEEDED, job_id="j", job_name="etl", identity="id", trace_id="ab" * 16, **ended
    )
    kept = past_run(job, ledger, "etl", PipelineHistory(), now_unix_nano=1 << 62)
    assert (kept.quiet_s, kept.duration_s, kept.lines, kept.result) == (9.0, 22.0, 6, "success")


@given(st.lists(st.floats(0, 1e6), min_size=ENOUGH_RUNS, max_size=KEPT_RUNS))
def test_a_run_like_those_before_is_never_slow(durations_s: list[float]) -> None:
    """For any history: a run within p95 is not slow, limits are ordered, and quantiles are values of the history."""
    history = past(durations_s)
    assert history.p50_s in durations_s
    assert history.p95_s in durations_s
    assert history.p95_s is not None
    assert history.slow_after_s is not None
    assert history.fast_below_s is not None
    assert history.fast_below_s < history.p95_s < history.slow_after_s


SHORT_S = st.sampled_from([0.0, 0.05, 0.1, 1.0, 1.05, 2.0]) | st.floats(0, 10)


@given(st.lists(st.tuples(SHORT_S, st.sampled_from(["success", "failure"]), st.booleans()), max_size=30), SHORT_S)
def test_a_run_is_too_fast_by_its_limit(runs: list[tuple[float, str, bool]], duration_s: float) -> None:
    """For any history: whether a few runs show it or the limit has to be computed."""
    kept = [run(one, result=result, too_fast=too_fast) for one, result, too_fast in runs]
    history = PipelineHistory(tuple(kept))
    limit_s = PipelineHistory(tuple(kept)).fast_below_s
    assert history.is_too_fast("success", duration_s) == (limit_s is not None and duration_s < limit_s)


def end(store: SqliteStore, kept: PastRun, fingerprint: str | None = None) -> None:
    key = store.add_job("id", kept.job_id, "etl", stream=0, ledger="{}").key
    assert store.end_job(key, [], RunTotals("etl", "success").add(1.0), run=kept, fingerprint=fingerprint)


def test_history_survives_and_stays_bounded(tmp_path: Path) -> None:
    """The newest runs of each pipeline are there after a restart; names that share a label have none."""
    with closing(SqliteStore(tmp_path)) as store:
        for number in range(KEPT_RUNS + 5):
            end(store, run(number, ended_s=number, job_id=f"j{number}"))
        end(store, run(7, pipeline="other", job_id="x", too_fast=True))
        end(store, run(7, pipeline=OTHER_PIPELINES, job_id="y", too_fast=True))
    with closing(SqliteStore(tmp_path)) as store:
        histories = Histories(store.history.past_runs())
        assert [kept.duration_s for kept in histories.of("etl").runs] == list(range(5, KEPT_RUNS + 5))
        assert [kept.job_id for kept in histories.of("other").runs] == ["x"]
        assert sorted(histories) == ["etl", "other"]
        assert store.history.too_fast() == {"other": 1, OTHER_PIPELINES: 1}
    histories.add(run(1, ended_s=1e6))
    histories.add(run(1, pipeline=OTHER_PIPELINES))
    assert (len(histories.of("etl").runs), sorted(histories)) == (KEPT_RUNS, ["etl", "other"])


def test_failures_are_counted_by_fingerprint(tmp_path: Path) -> None:
    """A repeated failure of a pipeline is recognized; beyond the limit, the oldest failures are deleted."""
    with closing(SqliteStore(tmp_path)) as store:
        assert store.history.earlier_failures("etl", "f") == (0, None)
        end(store, run(job_id="a", result="failure", ended_s=5), "f")
        end(store, run(job_id="b", result="failure", ended_s=2), "f")
        assert store.history.earlier_failures("etl", "f") == (2, NOW + 2 * S)
        assert store.history.earlier_failures("other", "f") == (0, None)
        for number in range(KEPT_FAILURES):
            end(store, run(job_id=f"c{number}", result="failure", ended_s=10 + number), f"g{number}")
        assert store.history.earlier_failures("etl", "f") == (0, None)
        assert store.history.earlier_failures("etl", "g0")[0] == 1


def test_a_damaged_run_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One damaged row of the history costs that run, with a warning."""
    with closing(SqliteStore(tmp_path)) as store:
        end(store, run(job_id="a"))
        end(store, run(job_id="b"))
    with closing(sqlite3.connect(tmp_path / "checkpoints.db")) as db, db:
        db.execute("UPDATE history SET facts = '{\"a' WHERE run = 1")
    with closing(SqliteStore(tmp_path)) as store:
        assert [kept.job_id for kept in store.history.past_runs()] == ["b"]
    assert "damaged" in caplog.text


def test_a_store_of_version_1_is_migrated(tmp_path: Path) -> None:
    """A store of an earlier agent keeps its cursors and totals, and starts a history."""
    recorded = Path(__file__).parents[3] / "data" / "checkpoints-v1.sql"
    with closing(sqlite3.connect(tmp_path / "checkpoints.db")) as db, db:
        db.executescript(recorded.read_text())
        db.execute("INSERT INTO meta VALUES ('instance_id', 'the-same'), ('start_unix_nano', '7')")
        db.execute("INSERT INTO jobs VALUES (1, 'id', 'old', 'etl', 0, x'2a', '{\"first_seen_ns\":1}', 0, 0, 1.5)")
        db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", RunTotals("etl", "success").add(3.0).to_row())
    with closing(SqliteStore(tmp_path)) as store:
        assert (store.instance_id, store.start_unix_nano, store.recovered) == ("the-same", 7, None)
        job = store.job("id", "old")
        assert job is not None
        assert (job.cursor, JobLedger.from_json(job.ledger)) == (b"*", JobLedger(first_seen_ns=1))
        assert [totals.count for totals in store.totals.values()] == [1]
        store.ack([Ack(job.key, b"on", job.ledger)])
        end(store, run(job_id="new"))
    with closing(SqliteStore(tmp_path)) as store:
        assert (store.recovered, [kept.job_id for kept in store.history.past_runs()]) == (None, ["new"])
