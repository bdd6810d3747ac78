"""Jobs that wait for their first turn."""

from __future__ import annotations

from datetime import UTC, datetime

from tailspan.models import JobState, ListedJob
from tailspan_agent.receiver.backlog import Backlog, WaitingJob


def waiting(job_id: str, name: str = "etl", second: int | None = None) -> WaitingJob:
    when = None if second is None else datetime.fromtimestamp(second, UTC)
    return WaitingJob(job_id, name, ListedJob(job_id=job_id, state=JobState.SUCCEEDED, state_since=when))


def taken(backlog: Backlog) -> list[str]:
    """Take all jobs."""
    return [job.job_id for job in iter(backlog.take, None)]


def test_the_oldest_of_a_pipeline_is_first() -> None:
    """Whatever the order in which they are found; an unknown time may be any."""
    backlog = Backlog()
    for second in (30, 10, 20):
        backlog.put(waiting(f"at {second}", second=second))
    backlog.put(waiting("unknown"))
    assert taken(backlog) == ["unknown", "at 10", "at 20", "at 30"]


def test_pipelines_take_turns() -> None:
    """A pipeline with a thousand old jobs does not hold up the one job of another."""
    backlog = Backlog()
    for second in range(1000):
        backlog.put(waiting(f"many {second}", "many", second))
    backlog.put(waiting("single", "other", 5000))
    assert [backlog.take().job_id for _ in range(3)] == ["many 0", "single", "many 1"]  # type: ignore[union-attr]


def test_a_job_waits_once() -> None:
    """A later row replaces the one before; a removed job is not taken."""
    backlog = Backlog()
    backlog.put(WaitingJob("a", "", None))
    backlog.put(waiting("a", "etl", 10))
    backlog.put(waiting("a", "etl", 10))
    backlog.put(waiting("b", "etl", 20))
    assert ("a" in backlog, len(backlog)) == (True, 2)
    assert backlog.remove("b") is not None
    assert backlog.remove("b") is None
    assert taken(backlog) == ["a"]
    assert backlog.take() is None


def test_a_cleared_backlog_is_empty() -> None:
    """After a stop nothing is taken, and the backlog can be used again."""
    backlog = Backlog()
    backlog.put(waiting("a", second=1))
    backlog.clear()
    assert taken(backlog) == []
    backlog.put(waiting("b", second=1))
    assert taken(backlog) == ["b"]
