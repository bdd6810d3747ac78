"""The follower: when it polls, and when a log counts as complete."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.follow import SETTLE_S, Follower
from tailspan.models import JobState, JobStatus

WALL_S = 1_700_000_000.0
TERMINAL = [state for state in JobState if state.is_terminal]


def job(state: JobState, *, ended_ago_s: float | None = None, logs_complete: bool | None = None, at_s: float = 0.0):
    """Return a status as it stands at that time of the follower's clock."""
    ended = None if ended_ago_s is None else datetime.fromtimestamp(WALL_S + at_s - ended_ago_s, UTC)
    return JobStatus.from_state(
        state,
        job_id="j",
        job_name="j",
        identity="i",
        trace_id="0" * 32,
        finished_at=ended,
        logs_complete=logs_complete,
    )


def see(follower: Follower, status: JobStatus, at_s: float) -> None:
    """Give the follower a status at that time."""
    follower.on_status(status, at_s, WALL_S + at_s)


def test_an_end_counts_only_after_two_equal_answers():
    """One terminal answer, or two different ones, do not end a job."""
    follower = Follower()
    see(follower, job(JobState.FAILED), 0)
    assert not follower.ended
    see(follower, job(JobState.CANCELED), 1)
    assert not follower.ended
    see(follower, job(JobState.CANCELED), 2)
    assert follower.ended


def test_a_job_that_runs_again_is_not_ended():
    """A terminal answer that is taken back counts for nothing."""
    follower = Follower()
    see(follower, job(JobState.SUCCEEDED), 0)
    see(follower, job(JobState.RUNNING), 1)
    see(follower, job(JobState.SUCCEEDED), 2)
    assert not follower.ended


def test_a_marked_end_needs_one_answer_and_one_read():
    """A service that marks the end of the log is believed at once, but the log must have been read after that."""
    follower = Follower()
    follower.on_read(3, 0)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=True), 1)
    assert follower.ended
    assert not follower.complete
    follower.on_read(2, 1.1)
    assert follower.complete


def test_settling_waits_for_lines_that_become_visible_late():
    """After an end just now, quiet reads count only once the settle time is over, and two are needed."""
    follower = Follower(poll_min_s=1, poll_max_s=1)
    see(follower, job(JobState.RUNNING), 0)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, at_s=1), 1)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=1, at_s=2), 2)
    for second in range(2, 11):
        follower.on_read(0, second)
        assert not follower.complete
    follower.on_read(5, 11)
    follower.on_read(0, 12)
    assert not follower.complete
    follower.on_read(0, 13)
    assert follower.complete


def test_an_end_long_ago_needs_one_read():
    """A job that ended before the first poll is read once, even if that finds lines."""
    follower = Follower()
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=3600), 0)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=3600), 0.2)
    follower.on_read(100, 0.2)
    assert follower.complete


def test_only_a_read_from_the_start_that_began_after_the_end_settled_has_read_all():
    """A read that began too early, or from a cursor, may have missed lines that became visible late."""
    follower = Follower(settle_s=10)
    see(follower, job(JobState.RUNNING), 0)
    follower.on_read(5, 0, from_start=True)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, at_s=1), 1)
    follower.on_read(5, 1, from_start=True)
    assert not follower.read_whole
    follower.on_read(5, 12)
    assert not follower.read_whole
    follower.on_read(5, 12, from_start=True)
    assert follower.read_whole
    see(follower, job(JobState.RUNNING), 13)
    assert not follower.read_whole


def test_a_marked_end_needs_no_settling_before_a_read_from_the_start_has_read_all():
    """A log that the service marks as complete is read once, however recently the job ended; an open log is not."""
    for marked in (True, False, None):
        follower = Follower(settle_s=10)
        see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=marked), 0)
        follower.on_read(5, 0)
        assert not follower.read_whole
        follower.on_read(5, 0, from_start=True)
        assert follower.read_whole is (marked is True)


def test_a_service_clock_that_is_behind_does_not_skip_settling():
    """An end that the service dates before the last running status is dated to that status."""
    follower = Follower()
    see(follower, job(JobState.RUNNING), 0)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=3600, at_s=1), 1)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=3600, at_s=1), 1.2)
    follower.on_read(0, 1.2)
    follower.on_read(0, 2.2)
    assert not follower.complete
    follower.on_read(0, 10.5)
    follower.on_read(0, 11.5)
    assert follower.complete


def test_what_outlives_a_job_does_not_keep_its_reader():
    """A log that the service marks as open is complete 2 s after the end, however many lines come; a filter may end."""
    follower = Follower()
    for second in (0.0, 0.2):
        see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=False, at_s=0), second)
    follower.on_read(5, 1.9)
    assert follower.needs_status
    assert not follower.complete
    follower.on_read(5, 2.1)
    assert follower.complete


def test_an_open_log_settles_no_longer_than_others():
    """A shorter `settle_s` counts for it, too."""
    follower = Follower(settle_s=0.5)
    for second in (0.0, 0.2):
        see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=False, at_s=0), second)
    follower.on_read(5, 0.4)
    assert not follower.complete
    follower.on_read(5, 0.6)
    assert follower.complete


def test_an_open_log_that_ends_is_complete_at_once():
    """The mark at its end needs one more read and no settling."""
    follower = Follower()
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=False, at_s=0), 0)
    follower.on_read(0, 0.1)
    see(follower, job(JobState.SUCCEEDED, ended_ago_s=0, logs_complete=True, at_s=0), 0.2)
    assert not follower.complete
    follower.on_read(1, 0.2)
    assert follower.complete


def test_silence_makes_it_ask_less_and_a_line_makes_it_ask_again():
    """The delay grows to poll_max_s while nothing comes, and is poll_min_s after a line or a wake."""
    follower = Follower(poll_min_s=1, poll_max_s=5)
    see(follower, job(JobState.RUNNING), 0)
    delays = []
    for second in range(6):
        follower.on_read(0, second)
        delays.append(follower.delay_s(second))
    assert delays == sorted(delays)
    assert delays[0] == pytest.approx(1)
    assert delays[-1] == pytest.approx(5)
    follower.on_read(1, 7)
    assert follower.delay_s(7) == pytest.approx(1)
    follower.on_read(0, 8)
    follower.on_read(0, 9)
    follower.wake()
    assert follower.delay_s(9) == pytest.approx(1)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(JobState), st.none() | st.floats(0, 100), st.sampled_from([None, True, False])),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(EVENTS)
def test_a_log_is_never_complete_too_early(events):
    """Whatever comes: complete means two equal terminal answers (or a marked end), and a read that began after."""
    follower = Follower()
    now_s = 0.0
    answers: list[tuple[JobState, bool | None]] = []
    read_after_end = False
    for event in events:
        now_s += 0.7
        if isinstance(event, int):
            follower.on_read(event, now_s)
            read_after_end = bool(answers) and answers[-1][0].is_terminal
        else:
            state, ago_s, marked = event
            if answers and state is not answers[-1][0]:
                read_after_end = False
            see(follower, job(state, ended_ago_s=ago_s, logs_complete=marked, at_s=now_s), now_s)
            answers.append((state, marked))
        if follower.complete:
            state, marked = answers[-1]
            assert state.is_terminal
            assert read_after_end
            assert marked or [one for one, _ in answers[-2:]] == [state, state]
        assert 0 <= follower.delay_s(now_s) <= follower.poll_max_s * 1.1


@given(st.sampled_from(TERMINAL), st.sampled_from([None, True, False]), st.floats(0, 2 * SETTLE_S), st.booleans())
def test_an_ended_job_that_falls_silent_is_complete_soon(state, marked, ago_s, seen_alive):
    """No job keeps its reader for ever: quiet reads complete it at most a few delays after settling."""
    follower = Follower(poll_min_s=1, poll_max_s=1)
    now_s = 0.0
    if seen_alive:
        see(follower, job(JobState.RUNNING), now_s)
    while not follower.complete:
        see(follower, job(state, ended_ago_s=ago_s + now_s, logs_complete=marked, at_s=now_s), now_s)
        follower.on_read(0, now_s)
        now_s += follower.delay_s(now_s)
        assert now_s < SETTLE_S + 5
