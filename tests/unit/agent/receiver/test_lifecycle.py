"""`tailspan_agent.receiver.lifecycle`: properties of the state machine, and each of its transitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailspan.logs.follow import Follower
from tailspan.models import JobState, JobStatus
from tailspan_agent.receiver.lifecycle import (
    LATE_LINES_S,
    Action,
    AllAcked,
    AwaitAcks,
    CloseLog,
    CompleteLog,
    EndReported,
    JobDeleted,
    JobLifecycle,
    LateLinesRead,
    LogCompleted,
    LogRead,
    Observation,
    ReadLateLines,
    ReadLog,
    Reconcile,
    Reconciled,
    ReportEnd,
    ReportLost,
    StatusSeen,
    Stop,
    TailState,
    WaitForChange,
    WaitForPoll,
    advance,
)

# An example takes less than a millisecond.
THOROUGH = settings(max_examples=2 * settings().max_examples)
OVER = (TailState.DONE, TailState.STOPPED)
END_MARKS = st.sampled_from([None, False, True])
AGES_S = st.sampled_from([0.0, LATE_LINES_S - 1, LATE_LINES_S, 1e6])
LINES = st.integers(0, 2)

OBSERVATIONS: st.SearchStrategy[Observation] = st.one_of(
    st.builds(
        StatusSeen,
        terminal=st.booleans(),
        end_mark=END_MARKS,
        completed_before=st.booleans(),
        late_lines=st.booleans(),
        nothing_new=st.booleans(),
    ),
    st.builds(LogRead, complete=st.booleans()),
    st.builds(EndReported, log_complete=st.booleans(), ended_ago_s=AGES_S),
    st.builds(LateLinesRead, lines=LINES, ended_ago_s=AGES_S, may_lack_lines=st.booleans()),
    st.builds(Reconciled, lines=LINES),
    st.builds(LogCompleted, late_lines=st.booleans()),
    st.just(AllAcked()),
    st.builds(JobDeleted, late_lines=st.booleans()),
)
LIVES = st.builds(JobLifecycle, once=st.booleans(), relays_logs=st.booleans())


def walk(life: JobLifecycle, seen: Sequence[Observation]) -> list[tuple[JobLifecycle, Observation, Action]]:
    """Return each observation with the lifecycle after it and the action."""
    steps = []
    for one in seen:
        life, action = advance(life, one)
        steps.append((life, one, action))
    return steps


@THOROUGH
@given(LIVES, st.lists(OBSERVATIONS, max_size=30))
def test_a_lifecycle_that_is_over_stays_as_it_is(life: JobLifecycle, seen: list[Observation]) -> None:
    """No observation leaves DONE or STOPPED, and the only action there is to stop."""
    over = None
    for after, _, action in walk(life, seen):
        assert over is None or after == over
        over = after if after.is_over else None
        assert (after.state in OVER) == after.is_over == (action == Stop())


@THOROUGH
@given(LIVES, st.lists(OBSERVATIONS, max_size=30))
def test_the_end_is_reported_only_after_a_terminal_status(life: JobLifecycle, seen: list[Observation]) -> None:
    """Also if observations come in an order that no tailer makes."""
    terminal = None
    for after, one, action in walk(life, seen):
        if isinstance(one, StatusSeen) and not after.is_over:
            terminal = one.terminal
        if isinstance(action, ReportEnd) and isinstance(one, LogRead) and terminal is not None:
            assert terminal
            assert one.complete


@THOROUGH
@given(LIVES, st.lists(OBSERVATIONS, max_size=30))
def test_late_lines_never_reopen_a_job(life: JobLifecycle, seen: list[Observation]) -> None:
    """Only a status that is not terminal does; lines and time lead to DONE."""
    before = life
    for after, one, _ in walk(life, seen):
        if before.state is TailState.LATE_LINES and after.state not in (TailState.LATE_LINES, *OVER):
            assert one == msgspec.structs.replace(one, terminal=False) if isinstance(one, StatusSeen) else False
        before = after


@THOROUGH
@given(LIVES, st.lists(OBSERVATIONS, max_size=30))
def test_only_an_idle_job_waits_without_a_timer(life: JobLifecycle, seen: list[Observation]) -> None:
    """It is running, its first status shows nothing new, and this is no single pass."""
    before = life
    for after, one, action in walk(life, seen):
        if action == WaitForChange():
            assert (before.state, after.state, after.once) == (TailState.NEW, TailState.FOLLOWING, False)
            assert isinstance(one, StatusSeen)
            assert one.nothing_new
        before = after


@dataclass
class Moment:
    """The job as its service has it during one poll.

    Attributes:
        state: The state.
        end_mark: The service's end mark in the status.
        lines: New readable lines.
        after_s: How long after the poll before, in seconds.
        failed: Whether this poll fails after the read, so that nothing is observed.
    """

    state: JobState
    end_mark: bool | None = None
    lines: int = 0
    after_s: float = 1.0
    failed: bool = False


STATES = st.sampled_from([JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.UNKNOWN])
MOMENTS = st.builds(
    Moment,
    state=STATES,
    end_mark=END_MARKS,
    lines=LINES,
    after_s=st.sampled_from([0.1, 5.0, 30.0, LATE_LINES_S / 2]),
    failed=st.booleans(),
)


@dataclass
class Driver:
    """A tailer without clock, service and store: it carries out each action in no time and counts it.

    Attributes:
        life: The lifecycle.
        unreported: Lines since the last receipt.
        done: The actions so far.
    """

    life: JobLifecycle
    may_lack_lines: bool = True
    unreported: int = 0
    done: Counter[Action] = field(default_factory=Counter)
    now_s: float = 1e6
    ended_at_s: float | None = None

    def __post_init__(self) -> None:
        self.follower = Follower(settle_s=10.0)

    def poll(self, moment: Moment) -> None:
        """Poll the job once."""
        self.now_s += moment.after_s
        status = JobStatus.from_state(
            moment.state, job_id="j", job_name="", identity="i", trace_id="t", logs_complete=moment.end_mark
        )
        terminal = moment.state.is_terminal
        if not terminal:
            self.ended_at_s = None
        elif self.ended_at_s is None:
            self.ended_at_s = self.now_s
        self.follower.on_status(status, self.now_s, self.now_s)
        self.life, action = advance(self.life, StatusSeen(terminal=terminal, end_mark=moment.end_mark))
        if action == ReadLateLines():
            self.unreported += moment.lines
            seen: Observation = LateLinesRead(
                lines=moment.lines, ended_ago_s=self.ended_ago_s, may_lack_lines=self.may_lack_lines
            )
        elif action == ReadLog():
            self.unreported += moment.lines
            self.follower.on_read(moment.lines, self.now_s)
            if moment.failed:
                return
            seen = LogRead(complete=self.follower.complete)
        else:
            assert action == Stop()
            return
        self.life, action = advance(self.life, seen)
        self.carry_out(action)

    @property
    def ended_ago_s(self) -> float:
        """How long ago the job ended, in seconds."""
        return 0.0 if self.ended_at_s is None else self.now_s - self.ended_at_s

    def carry_out(self, action: Action) -> None:
        """Carry out an action and those that follow from it."""
        for _ in range(5):
            self.done[action] += 1
            match action:
                case ReportEnd(log_complete=log_complete):
                    seen: Observation = EndReported(log_complete=log_complete, ended_ago_s=self.ended_ago_s)
                case CompleteLog(late_lines=late_lines):
                    self.unreported = 0
                    seen = LogCompleted(late_lines=late_lines)
                case CloseLog():
                    seen = LogCompleted()
                case ReportLost():
                    self.unreported = 0
                    seen = LogCompleted()
                case Reconcile(lines=lines):
                    seen = Reconciled(lines=lines)
                case AwaitAcks():
                    seen = AllAcked()
                case _:
                    return
            self.life, action = advance(self.life, seen)
        raise AssertionError("the actions have no end")

    def reports(self) -> int:
        """Return how often the end was reported."""
        return sum(self.done[ReportEnd(log_complete=complete)] for complete in (False, True))

    def receipts(self) -> int:
        """Return how often a receipt was written or amended."""
        return sum(count for one, count in self.done.items() if isinstance(one, CompleteLog))


@THOROUGH
@given(
    st.sampled_from([(True, None), (True, True), (False, None), (False, True), (False, False)]),
    st.lists(MOMENTS, max_size=12),
    st.booleans(),
)
def test_a_job_that_ends_is_done_exactly_once(
    log: tuple[bool, bool | None], before: list[Moment], may_lack_lines: bool
) -> None:
    """Whatever came before: a steady end leads to DONE, with one report since the job last ran, and no line left out.

    A job may run again: then its end is reported again, and the store counts the first report only.
    """
    relays_logs, end_mark = log
    driver = Driver(JobLifecycle(relays_logs=relays_logs), may_lack_lines=may_lack_lines)
    for moment in before:
        reports = driver.reports()
        driver.poll(moment)
        assert driver.reports() <= reports + 1
    reports, was_over = driver.reports(), driver.life.is_over
    relayed = was_over or driver.life.state is TailState.LATE_LINES
    for _ in range(20):
        driver.poll(Moment(JobState.SUCCEEDED, end_mark, after_s=LATE_LINES_S / 4))
    assert driver.life.state is TailState.DONE
    assert driver.reports() == reports + (0 if relayed else 1)
    assert driver.unreported == 0 or was_over
    assert driver.done[Stop()] == 1


@THOROUGH
@given(st.lists(MOMENTS, max_size=12))
def test_a_log_that_stays_open_does_not_keep_its_job(before: list[Moment]) -> None:
    """The run is reported once, its receipt comes within seconds, and the log is followed for as long as it is open."""
    driver = Driver(JobLifecycle())
    for moment in before:
        driver.poll(replace(moment, end_mark=False))
    reports, relayed = driver.reports(), driver.life.state is TailState.LATE_LINES
    for _ in range(4):
        driver.poll(Moment(JobState.FAILED, end_mark=False, lines=1))
    assert driver.life.state is TailState.LATE_LINES
    assert driver.reports() == reports + (not relayed)
    assert driver.done[CompleteLog(late_lines=True, still_open=True)] >= 1
    for _ in range(9):
        driver.poll(Moment(JobState.FAILED, end_mark=False, lines=1, after_s=LATE_LINES_S))
        assert driver.life.state is TailState.LATE_LINES
        assert driver.unreported == 0
    driver.poll(Moment(JobState.FAILED, end_mark=True, lines=1))
    driver.poll(Moment(JobState.FAILED, end_mark=True))
    assert driver.life.state is TailState.DONE
    assert driver.reports() == reports + (not relayed)
    assert driver.unreported == 0


def test_a_busy_background_process_does_not_cause_a_receipt_for_each_line() -> None:
    """The receipt of an open log is amended in growing intervals, at least every ten minutes, and at the end."""
    driver = Driver(JobLifecycle(), may_lack_lines=False)
    driver.poll(Moment(JobState.RUNNING, end_mark=False))
    for _ in range(7200):
        driver.poll(Moment(JobState.SUCCEEDED, end_mark=False, lines=1, after_s=0.5))
        assert driver.unreported <= 2 * 600
    assert 8 <= driver.receipts() <= 20
    receipts = driver.receipts()
    driver.poll(Moment(JobState.SUCCEEDED, end_mark=True))
    assert driver.receipts() == receipts + 1
    assert driver.life.state is TailState.DONE
    assert driver.unreported == 0


@THOROUGH
@given(st.booleans(), st.lists(MOMENTS, min_size=1, max_size=12), END_MARKS)
def test_a_single_pass_has_an_end(relays_logs: bool, before: list[Moment], end_mark: bool | None) -> None:
    """It stops at the first poll of a running job, and a few polls after the end of one that has ended."""
    driver = Driver(JobLifecycle(once=True, relays_logs=relays_logs))
    for moment in before:
        driver.poll(moment)
        if not moment.state.is_terminal and not moment.failed:
            assert driver.life.is_over
    for _ in range(5):
        driver.poll(Moment(JobState.SUCCEEDED, end_mark, after_s=30.0))
    assert driver.life.is_over
    assert driver.done[Stop()] == 1
    assert sum(driver.done[ReportEnd(log_complete=complete)] for complete in (False, True)) <= 1


@THOROUGH
@given(st.lists(MOMENTS, max_size=12), st.booleans())
def test_a_deleted_job_is_done_at_once(before: list[Moment], late_lines: bool) -> None:
    """It is reported as lost, unless all of it was relayed before."""
    driver = Driver(JobLifecycle())
    for moment in before:
        driver.poll(moment)
    state = driver.life.state
    driver.life, action = advance(driver.life, JobDeleted(late_lines=late_lines))
    driver.carry_out(action)
    relayed = late_lines if state is TailState.NEW else state in (TailState.LATE_LINES, TailState.DONE)
    assert driver.life.state is TailState.DONE
    assert driver.done[ReportLost()] == (not relayed)


@THOROUGH
@given(st.lists(MOMENTS, max_size=12))
def test_late_lines_are_relayed_for_an_hour(later: list[Moment]) -> None:
    """A restarted agent continues with a complete job; late lines only amend its receipt."""
    driver = Driver(JobLifecycle())
    driver.ended_at_s = driver.now_s
    first = StatusSeen(terminal=True, completed_before=True, late_lines=True)
    driver.life, action = advance(driver.life, first)
    assert action == ReadLateLines()
    came_late = False
    for moment in later:
        driver.poll(replace(moment, state=JobState.SUCCEEDED, end_mark=None))
        assert driver.life.state is (TailState.DONE if driver.ended_ago_s >= LATE_LINES_S else TailState.LATE_LINES)
        assert driver.unreported == 0 or driver.life.is_over
        came_late = came_late or moment.lines > 0
        if driver.life.is_over:
            break
    reconciled = sum(count for one, count in driver.done.items() if isinstance(one, Reconcile))
    assert reconciled == (came_late and driver.life.is_over)
    assert driver.reports() == 0


NEW, FOLLOWING, SETTLING, LATE_LINES, DONE, STOPPED = TailState


def at(state: TailState, **fields: Any) -> JobLifecycle:
    """Return a lifecycle in a state."""
    return JobLifecycle(state=state, **fields)


def ended(ago_s: float = 0, *, complete: bool = True) -> EndReported:
    """Return that the end was reported."""
    return EndReported(log_complete=complete, ended_ago_s=ago_s)


def late(lines: int, ago_s: float, *, lacks: bool = False) -> LateLinesRead:
    """Return that a read for late lines found some."""
    return LateLinesRead(lines=lines, ended_ago_s=ago_s, may_lack_lines=lacks)


@pytest.mark.parametrize(
    ("life", "seen", "state", "action"),
    [
        (at(NEW), StatusSeen(terminal=False), FOLLOWING, ReadLog()),
        (at(NEW), StatusSeen(terminal=False, nothing_new=True), FOLLOWING, WaitForChange()),
        (at(NEW, once=True), StatusSeen(terminal=False, nothing_new=True), FOLLOWING, ReadLog()),
        (at(NEW), StatusSeen(terminal=True), SETTLING, ReadLog()),
        (at(NEW), StatusSeen(terminal=True, completed_before=True), DONE, Stop()),
        (at(NEW), StatusSeen(terminal=True, completed_before=True, late_lines=True), LATE_LINES, ReadLateLines()),
        (at(NEW), StatusSeen(terminal=False, completed_before=True, late_lines=True), DONE, Stop()),
        (at(LATE_LINES, completed_before=True), StatusSeen(terminal=False), DONE, Stop()),
        (at(LATE_LINES), StatusSeen(terminal=False), FOLLOWING, ReadLog()),
        (at(LATE_LINES), StatusSeen(terminal=True, end_mark=False), LATE_LINES, ReadLateLines()),
        (at(FOLLOWING), LogRead(complete=False), FOLLOWING, WaitForPoll()),
        (at(FOLLOWING, once=True), LogRead(complete=False), FOLLOWING, AwaitAcks()),
        (at(FOLLOWING, once=True), AllAcked(), STOPPED, Stop()),
        (at(SETTLING, once=True), LogRead(complete=False), SETTLING, WaitForPoll()),
        (at(SETTLING), LogRead(complete=True), SETTLING, ReportEnd(log_complete=True)),
        (at(SETTLING, end_mark=False), LogRead(complete=True), SETTLING, ReportEnd(log_complete=False)),
        (
            at(SETTLING, relays_logs=False, end_mark=False),
            LogRead(complete=True),
            SETTLING,
            ReportEnd(log_complete=True),
        ),
        (at(SETTLING, end_mark=False), ended(complete=False), SETTLING, CompleteLog(late_lines=True, still_open=True)),
        (
            at(SETTLING, end_mark=False),
            ended(9e9, complete=False),
            SETTLING,
            CompleteLog(late_lines=True, still_open=True),
        ),
        (at(SETTLING), ended(), SETTLING, CompleteLog(late_lines=True)),
        (at(SETTLING), ended(3600), SETTLING, CompleteLog(late_lines=False)),
        (at(SETTLING, end_mark=True), ended(), SETTLING, CompleteLog(late_lines=False)),
        (at(SETTLING, relays_logs=False), ended(), SETTLING, CompleteLog(late_lines=False)),
        (at(SETTLING), LogCompleted(late_lines=True), LATE_LINES, WaitForPoll()),
        (at(SETTLING, once=True), LogCompleted(late_lines=True), DONE, Stop()),
        (at(SETTLING), LogCompleted(), DONE, Stop()),
        (at(LATE_LINES), late(0, 9), LATE_LINES, WaitForPoll()),
        (at(LATE_LINES, once=True), late(0, 9), STOPPED, Stop()),
        (at(LATE_LINES), late(1, 9), LATE_LINES, CompleteLog(late_lines=True)),
        (at(LATE_LINES), late(1, 3600), LATE_LINES, CompleteLog(late_lines=False)),
        (at(LATE_LINES, end_mark=False), late(0, 3600), LATE_LINES, WaitForPoll()),
        (at(LATE_LINES, end_mark=False), late(1, 3600), LATE_LINES, CompleteLog(late_lines=True, still_open=True)),
        (at(LATE_LINES, end_mark=False, amend_after_s=9), late(1, 8), LATE_LINES, WaitForPoll()),
        (
            at(LATE_LINES, end_mark=False, amend_after_s=9, once=True),
            late(1, 8),
            LATE_LINES,
            CompleteLog(late_lines=True, still_open=True),
        ),
        (at(LATE_LINES, end_mark=False, once=True), late(0, 9), STOPPED, Stop()),
        (at(LATE_LINES, end_mark=True, amend_after_s=9), late(1, 8), LATE_LINES, CompleteLog(late_lines=False)),
        (at(LATE_LINES, end_mark=True), late(0, 8), LATE_LINES, CompleteLog(late_lines=False)),
        (at(LATE_LINES, end_mark=True), Reconciled(lines=0), LATE_LINES, CompleteLog(late_lines=False)),
        (
            at(LATE_LINES, end_mark=False, unreported=1),
            late(0, 8),
            LATE_LINES,
            CompleteLog(late_lines=True, still_open=True),
        ),
        (at(LATE_LINES), late(0, 3600, lacks=True), LATE_LINES, CloseLog()),
        (at(LATE_LINES, saw_late_lines=True), late(0, 3600, lacks=True), LATE_LINES, Reconcile(lines=0)),
        (at(LATE_LINES), Reconciled(lines=0), LATE_LINES, CloseLog()),
        (at(LATE_LINES), Reconciled(lines=2), LATE_LINES, CompleteLog(late_lines=False)),
        (at(LATE_LINES), LogRead(complete=True), LATE_LINES, WaitForPoll()),
        (at(FOLLOWING), ended(), FOLLOWING, WaitForPoll()),
        (at(NEW), JobDeleted(), NEW, ReportLost()),
        (at(NEW), JobDeleted(late_lines=True), NEW, CloseLog()),
        (at(FOLLOWING), JobDeleted(late_lines=True), FOLLOWING, ReportLost()),
        (at(LATE_LINES), JobDeleted(), LATE_LINES, CloseLog()),
    ],
)
def test_each_transition(life: JobLifecycle, seen: Observation, state: TailState, action: Action) -> None:
    """One observation, one new state, one action."""
    after, found = advance(life, seen)
    assert (after.state, found) == (state, action)
