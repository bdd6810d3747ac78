"""`tailspan_agent.receiver.poll_schedule`: how often a speaking job's status is asked for."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tailspan.logs.follow import Follower
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan_agent.receiver import poll_schedule as schedule
from tailspan_agent.receiver.poll_schedule import PollSchedule


def due_after_s(monkeypatch: pytest.MonkeyPatch, row: ListedJob | None, **status: Any) -> float:
    """Return how long after a status the next one is due, while the list is read every 10 s and lines come."""
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
    ids=["not listed", "listed", "tasks", "heartbeat", "a state that says nothing"],
)
def test_a_status_is_asked_for_as_often_as_it_says_more_than_the_list(
    monkeypatch: pytest.MonkeyPatch, row: JobState | None, status: dict[str, Any], expected_s: float
) -> None:
    """Each request for a status that says nothing new is one less for lines, where requests are few."""
    listed = None if row is None else ListedJob(job_id="j", state=row, lines=5)
    assert due_after_s(monkeypatch, listed, **status) == expected_s


def test_a_row_that_tells_of_another_state_has_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: an end must not wait for two minutes."""
    asked = PollSchedule(Follower(state=JobState.RUNNING))
    asked.on_row(ListedJob(job_id="j", state=JobState.RUNNING, lines=5))
    asked.on_status(JobStatus.from_state(JobState.RUNNING, job_id="j", job_name="", identity="i", trace_id="t"))
    assert not asked.status_is_due()
    asked.on_row(ListedJob(job_id="j", state=JobState.SUCCEEDED, lines=6))
    assert asked.status_is_due()


def test_looks_that_go_in_one_request_are_not_spread() -> None:
    """All are there before the moment at which they go together, and none so early that it is sent apart."""
    asked = PollSchedule(Follower(poll_min_s=1.0, state=JobState.RUNNING))
    asked.on_read(1)
    assert {asked.delay_s(gather_s=0.5) for _ in range(9)} == {0.75}
    assert len({asked.delay_s() for _ in range(9)}) > 1


def test_a_second_look_at_an_end_keeps_its_distance_where_looks_go_together() -> None:
    """Or a state that flickers would be taken for the end at once."""
    follower = Follower(poll_min_s=1.0, state=JobState.RUNNING)
    asked = PollSchedule(follower)
    ended = JobStatus.from_state(JobState.SUCCEEDED, job_id="j", job_name="", identity="i", trace_id="t")
    follower.on_status(ended, asked.on_status(ended), time.time())
    delay_s = asked.delay_s(gather_s=0.5)
    assert delay_s is not None
    assert delay_s > 0.1
