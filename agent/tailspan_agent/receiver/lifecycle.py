"""`JobLifecycle`: the state of a followed job, and what its tailer does next. Pure: no clock, no socket, no task.

    state        the job                                                    next states
    NEW          has no status yet                                          any
    FOLLOWING    has not ended                                              SETTLING; STOPPED
    SETTLING     has a terminal status; its last lines may still be unread  FOLLOWING, LATE_LINES, DONE
    LATE_LINES   is over and has a receipt; further lines amend that        FOLLOWING, DONE; STOPPED
    DONE         is relayed and acknowledged completely                     none
    STOPPED      is read to its present end by a single pass (`--once`)     none

`advance` takes one observation and returns the new lifecycle and one action. The tailer carries the action out and
reports its result as the next observation, until the action is to wait or to stop. A state therefore changes only
after the work that it stands for is finished, and a tailer that fails repeats that work.

A job is over when its main process is, even if a background process keeps its log open. A service that marks the end
of a log shows such a log as open; the lines that follow are late lines, for as long as it is open.
"""

from __future__ import annotations

import enum

import msgspec
from msgspec.structs import replace

__all__ = [
    "LATE_LINES_S",
    "Action",
    "AllAcked",
    "AwaitAcks",
    "CloseLog",
    "CompleteLog",
    "EndReported",
    "JobDeleted",
    "JobLifecycle",
    "LateLinesRead",
    "LogCompleted",
    "LogRead",
    "Observation",
    "ReadLateLines",
    "ReadLog",
    "Reconcile",
    "Reconciled",
    "ReportEnd",
    "ReportLost",
    "StatusSeen",
    "Stop",
    "TailState",
    "WaitForChange",
    "WaitForPoll",
    "advance",
]

LATE_LINES_S = 3600.0
"""How long after its end a job is polled for late lines, in seconds, if its service does not mark the end of a log."""
_LONGEST_AMEND_S = 600.0


class TailState(enum.Enum):
    """The states of a followed job; the table of this module says what each means."""

    NEW = "new"
    FOLLOWING = "following"
    SETTLING = "settling"
    LATE_LINES = "late lines"
    DONE = "done"
    STOPPED = "stopped"

    __hash__ = object.__hash__  # an enum's own is computed in Python, for each step of each job


class StatusSeen(msgspec.Struct, frozen=True, kw_only=True):
    """The service returned the status of the job.

    Attributes:
        terminal: Whether the status is terminal.
        end_mark: The service's mark at the end of a log: True if no line can follow, False if lines can follow, None
            from a service that does not mark the end.
        completed_before: Whether the store has the end of the run and the complete log. Of the first status only.
        late_lines: Whether the store expects late lines of the job. Of the first status only.
        nothing_new: Whether the job list shows no line but those that were relayed. Of the first status only.
    """

    terminal: bool
    end_mark: bool | None = None
    completed_before: bool = False
    late_lines: bool = False
    nothing_new: bool = False


class LogRead(msgspec.Struct, frozen=True, kw_only=True):
    """The log was read to its present end.

    Attributes:
        complete: Whether the end of the job is certain and the log was read to its last line; see `Follower.complete`.
    """

    complete: bool


class EndReported(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the run was written to the store.

    Attributes:
        log_complete: As in the `ReportEnd` that asked for it.
        ended_ago_s: How long ago the job ended, in seconds.
    """

    log_complete: bool
    ended_ago_s: float


class LateLinesRead(msgspec.Struct, frozen=True, kw_only=True):
    """The log of a relayed job was read again.

    Attributes:
        lines: The number of late lines found.
        ended_ago_s: How long ago the job had ended when the read began, in seconds.
        may_lack_lines: Whether lines may have become visible where no read looks for them.
    """

    lines: int
    ended_ago_s: float
    may_lack_lines: bool = False


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    """The whole log was compared with what was relayed.

    Attributes:
        lines: The number of late lines relayed since the last receipt.
    """

    lines: int


class LogCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """The store has the log as complete.

    Attributes:
        late_lines: Whether the store still expects late lines.
    """

    late_lines: bool = False


class AllAcked(msgspec.Struct, frozen=True):
    """All lines that were queued are acknowledged."""


class JobDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The service has deleted the job, which the store knows.

    Attributes:
        late_lines: Whether the store expects late lines of the job. Counts only before the first status.
    """

    late_lines: bool = False


Observation = (
    StatusSeen | LogRead | EndReported | LateLinesRead | Reconciled | LogCompleted | AllAcked | JobDeleted
)  # fmt: skip


class ReadLog(msgspec.Struct, frozen=True):
    """Read the log from the cursor to its present end, then observe `LogRead`."""


class ReadLateLines(msgspec.Struct, frozen=True):
    """Read the log from the cursor to its present end, then observe `LateLinesRead`."""


class WaitForChange(msgspec.Struct, frozen=True):
    """Wait without a timer until a notification or the job list reports a change, then poll."""


class WaitForPoll(msgspec.Struct, frozen=True):
    """Wait until the next poll is due."""


class ReportEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Write the run span and count the run, then observe `EndReported`. The store counts each run once.

    Attributes:
        log_complete: Whether no line can follow.
    """

    log_complete: bool


class ReportLost(msgspec.Struct, frozen=True):
    """Report a job that was deleted before its end was relayed, then observe `LogCompleted`."""


class CompleteLog(msgspec.Struct, frozen=True, kw_only=True):
    """Wait for the last acknowledgement, write the receipt, then observe `LogCompleted`.

    Attributes:
        late_lines: Whether lines may still become visible.
        still_open: Whether the service marks the log as open.
    """

    late_lines: bool
    still_open: bool = False


class CloseLog(msgspec.Struct, frozen=True):
    """Store that no late line is expected any more, then observe `LogCompleted`."""


class Reconcile(msgspec.Struct, frozen=True, kw_only=True):
    """Relay what the whole log has and was not relayed, then observe `Reconciled`.

    Attributes:
        lines: The number of late lines relayed since the last receipt; to be added to those found.
    """

    lines: int


class AwaitAcks(msgspec.Struct, frozen=True):
    """Wait until all queued lines are acknowledged, then observe `AllAcked`."""


class Stop(msgspec.Struct, frozen=True):
    """Nothing is left to do."""


Action = (
    ReadLog
    | ReadLateLines
    | WaitForChange
    | WaitForPoll
    | ReportEnd
    | ReportLost
    | CompleteLog
    | CloseLog
    | Reconcile
    | AwaitAcks
    | Stop
)


class JobLifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """Where a followed job is between its first status and its last acknowledgement.

    Attributes:
        once: Whether this is a single pass: a job that has not ended is read to its present end.
        relays_logs: Whether logs are among the signals.
        state: The present state.
        end_mark: The end mark of the last status; see `StatusSeen.end_mark`.
        completed_before: Whether an earlier process completed the job: one that runs again is not followed again.
        saw_late_lines: Whether a line became visible late.
        unreported: The number of late lines relayed since the last receipt.
        amend_after_s: How long after the end the receipt of an open log may be amended again, in seconds.
    """

    once: bool = False
    relays_logs: bool = True
    state: TailState = TailState.NEW
    end_mark: bool | None = None
    completed_before: bool = False
    saw_late_lines: bool = False
    unreported: int = 0
    amend_after_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the tailer of the job stops."""
        return self.state in (TailState.DONE, TailState.STOPPED)

    @property
    def next_read(self) -> Action:
        """The action of a poll that does not ask for the status."""
        if self.is_over:
            return Stop()
        return ReadLateLines() if self.state is TailState.LATE_LINES else ReadLog()

    def to(self, state: TailState) -> JobLifecycle:
        """Return the lifecycle in another state."""
        return replace(self, state=state)


_ALWAYS = (StatusSeen, JobDeleted, LogCompleted)
_EXPECTED: dict[TailState, tuple[type[Observation], ...]] = {
    TailState.NEW: _ALWAYS,
    TailState.FOLLOWING: (*_ALWAYS, LogRead, AllAcked),
    TailState.SETTLING: (*_ALWAYS, LogRead, EndReported),
    TailState.LATE_LINES: (*_ALWAYS, LateLinesRead, Reconciled),
}


def advance(life: JobLifecycle, seen: Observation) -> tuple[JobLifecycle, Action]:
    """Return the lifecycle after an observation, and what to do next.

    An observation that does not belong to the state changes nothing.

    Args:
        life: The lifecycle before it.
        seen: The observation.
    """
    if life.is_over:
        return life, Stop()
    if not isinstance(seen, _EXPECTED[life.state]):
        return life, WaitForPoll()
    match seen:
        case StatusSeen():
            return _after_status(life, seen)
        case LogRead():
            return _after_read(life, seen)
        case EndReported():
            return _after_end(life, seen)
        case LateLinesRead():
            return _after_late_read(life, seen)
        case Reconciled():
            amend = seen.lines or life.end_mark is True
            return life, CompleteLog(late_lines=False) if amend else CloseLog()
        case LogCompleted():
            life = replace(life, unreported=0)
            # The next pass reads the late lines of a single one.
            late = seen.late_lines and not life.once
            return (life.to(TailState.LATE_LINES), WaitForPoll()) if late else (life.to(TailState.DONE), Stop())
        case AllAcked():
            return (life.to(TailState.STOPPED), Stop()) if life.once else (life, WaitForPoll())
        case JobDeleted():
            relayed = seen.late_lines if life.state is TailState.NEW else life.state is TailState.LATE_LINES
            return life, CloseLog() if relayed else ReportLost()


def _after_status(life: JobLifecycle, seen: StatusSeen) -> tuple[JobLifecycle, Action]:
    first = life.state is TailState.NEW
    if first:
        life = replace(life, completed_before=seen.completed_before)
    life = replace(life, state=_state_after(life, seen), end_mark=seen.end_mark)
    if first and life.state is TailState.FOLLOWING and seen.nothing_new and not life.once:
        return life, WaitForChange()
    return life, life.next_read


def _state_after(life: JobLifecycle, seen: StatusSeen) -> TailState:
    late_lines = seen.late_lines if life.state is TailState.NEW else life.state is TailState.LATE_LINES
    if late_lines and seen.terminal:
        return TailState.LATE_LINES
    if life.completed_before:
        return TailState.DONE
    return TailState.SETTLING if seen.terminal else TailState.FOLLOWING


def _after_read(life: JobLifecycle, seen: LogRead) -> tuple[JobLifecycle, Action]:
    if life.state is TailState.FOLLOWING:
        return life, AwaitAcks() if life.once else WaitForPoll()
    if not seen.complete:
        return life, WaitForPoll()
    return life, ReportEnd(log_complete=not (life.relays_logs and life.end_mark is False))


def _after_end(life: JobLifecycle, seen: EndReported) -> tuple[JobLifecycle, Action]:
    still_open = not seen.log_complete
    # A service that does not mark the end of a log may show a line of it at any later time.
    late_lines = life.end_mark is None and life.relays_logs and seen.ended_ago_s < LATE_LINES_S
    return replace(life, amend_after_s=0.0), CompleteLog(late_lines=still_open or late_lines, still_open=still_open)


def _after_late_read(life: JobLifecycle, seen: LateLinesRead) -> tuple[JobLifecycle, Action]:
    unreported = life.unreported + seen.lines
    life = replace(life, unreported=unreported, saw_late_lines=life.saw_late_lines or seen.lines > 0)
    still_open, closed = life.end_mark is False, life.end_mark is True
    over = closed or (not still_open and seen.ended_ago_s >= LATE_LINES_S)
    if over and life.saw_late_lines and seen.may_lack_lines:
        # The service shows lines late, so lines before the window may be missing, too.
        return life, Reconcile(lines=unreported)
    # A background process may print for ever: the receipts of its job come in growing intervals.
    amend = unreported and (life.once or not still_open or seen.ended_ago_s >= life.amend_after_s)
    if amend or closed:
        # The receipts of an open log state that it is not complete, so that its end needs one even without a line.
        life = replace(life, amend_after_s=seen.ended_ago_s + min(seen.ended_ago_s, _LONGEST_AMEND_S))
        return life, CompleteLog(late_lines=not over, still_open=still_open)
    if over:
        return life, CloseLog()
    return (life.to(TailState.STOPPED), Stop()) if life.once else (life, WaitForPoll())
