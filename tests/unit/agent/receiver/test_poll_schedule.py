"""`PollSchedule`: how often the status of a job with new lines is requested."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tailspan.logs.follow import Follower
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan_agent.receiver import poll_schedule as schedule
from tailspan_agent.receiver.poll_schedule import PollSchedule, due_s
from tests.fakes.agents import looped, until


def due_after_s(monkeypatch: pytest.MonkeyPatch, row: ListedJob | None, **status: Any) -> float:
    """Return after how many seconds the next status is due, with a list every 10 s and new lines."""
    now_s = 1000.0
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: now_s))
    asked = PollSchedule(Follower())
    job = JobStatus.from_state(JobState.RUNNING, job_id="j", job_name="etl", identity="i", trace_id="t", **status)
    if row is not None:
        asked.on_row(row)
    begun_s = asked.on_status(job)
    while not asked.status_is_due():
        now_s += 1
        asked.on_read(1)
        if row is not None and (now_s - begun_s) % 10 == 0:
            asked.on_row(row)
    return now_s - begun_s


@pytest.mark.parametrize(
    ("row", "status", "expected_s"),
    [
        (None, {}, 0),
        (JobState.RUNNING, {}, 120),
        (JobState.RUNNING, {"total_tasks": 3}, 30),
        (JobState.RUNNING, {"last_heartbeat": datetime.now(UTC)}, 30),
        (JobState.UNKNOWN, {}, 30),
    ],
    ids=["not listed", "listed", "tasks", "heartbeat", "unknown state"],
)
def test_a_status_is_requested_as_often_as_it_adds_to_the_list(
    monkeypatch: pytest.MonkeyPatch, row: JobState | None, status: dict[str, Any], expected_s: float
) -> None:
    """With a limited request rate, each useless status costs a read of lines."""
    listed = None if row is None else ListedJob(job_id="j", state=row, lines=5)
    assert due_after_s(monkeypatch, listed, **status) == expected_s


def test_a_changed_state_in_the_list_requests_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a job must not wait for two minutes."""
    asked = PollSchedule(Follower(state=JobState.RUNNING))
    asked.on_row(ListedJob(job_id="j", state=JobState.RUNNING, lines=5))
    asked.on_status(JobStatus.from_state(JobState.RUNNING, job_id="j", job_name="", identity="i", trace_id="t"))
    assert not asked.status_is_due()
    asked.on_row(ListedJob(job_id="j", state=JobState.SUCCEEDED, lines=6))
    assert asked.status_is_due()


def test_merged_reads_have_no_jitter() -> None:
    """All reads come before the merged request is sent, and none so early that it is sent alone."""
    asked = PollSchedule(Follower(poll_min_s=1.0, state=JobState.RUNNING))
    asked.on_read(1)
    assert {asked.delay_s(gather_s=0.5) for _ in range(9)} == {0.75}


@pytest.mark.parametrize(("poll_min_s", "is_spread"), [(1.0, False), (5.0, True)])
def test_only_long_delays_have_jitter(poll_min_s: float, is_spread: bool) -> None:
    """Short ones end at shared moments."""
    asked = PollSchedule(Follower(poll_min_s=poll_min_s, state=JobState.RUNNING))
    asked.on_read(1)
    assert (len({asked.delay_s() for _ in range(9)}) > 1) is is_spread


@pytest.mark.parametrize(
    ("delay_s", "shared_s", "most_early_s"), [(1.0, 0.5, 0.5), (60.0, 0.5, 0.5), (0.75, 0.25, 0.25), (0.2, None, 0.0)]
)
def test_polls_are_due_at_shared_moments(delay_s: float, shared_s: float | None, most_early_s: float) -> None:
    """However their polls began, jobs are polled together: the agent wakes twice a second, not a hundred times."""
    starts_s = [1000 + number / 7 for number in range(50)]
    dues_s = [due_s(start_s, delay_s) for start_s in starts_s]
    early_s = [start_s + delay_s - due for start_s, due in zip(starts_s, dues_s, strict=True)]
    assert 0 <= min(early_s) <= max(early_s) <= most_early_s
    if shared_s is not None:
        assert all(due % shared_s == 0 for due in dues_s)


def test_the_second_status_of_an_end_keeps_its_distance_with_merged_reads() -> None:
    """Otherwise a state that flaps would count as the end at once."""
    follower = Follower(poll_min_s=1.0, state=JobState.RUNNING)
    asked = PollSchedule(follower)
    ended = JobStatus.from_state(JobState.SUCCEEDED, job_id="j", job_name="", identity="i", trace_id="t")
    follower.on_status(ended, asked.on_status(ended), time.time())
    delay_s = asked.delay_s(gather_s=0.5)
    assert delay_s is not None
    assert delay_s > 0.1


@looped
async def test_a_rest_ends_once_with_its_delay_or_a_change() -> None:
    """Whichever is first; a change during a poll is not lost: the job is polled again at once."""
    due: list[str] = []
    resting = PollSchedule(Follower(state=JobState.RUNNING), lambda: due.append("due"))
    assert resting.rest(None)
    assert resting.parked
    resting.wake()
    resting.wake()
    assert due == ["due"]
    assert not resting.rest(None), "changed while it was polled"
    resting.on_poll()
    assert resting.rest(0.001)
    assert not resting.parked
    await until(lambda: len(due) == 2)
    assert resting.rest(60)
    timer = resting._timer
    resting.wake()
    assert len(due) == 3
    assert resting.rest(60)
    other = resting._timer
    resting.cancel()
    assert len(due) == 3
    assert timer is not None
    assert timer.cancelled()
    assert other is not None
    assert other.cancelled()
