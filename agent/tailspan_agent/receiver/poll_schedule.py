"""`PollSchedule`: the poll schedule of one job, and whether a poll requests the status.

Idle jobs cost no requests: a job covered by the list's line counts or by change notifications is not polled. Once its
lines are acknowledged, its tailer is *parked*: it rests without a timer until the list or a notification wakes it.

    covered by        status requested                           next poll
    nothing           at each poll                               after the follower's delay, up to `poll_max_s`
    the list          every 30 s, or if its row has changed      the same
                      (every 2 min without tasks and heartbeat)
    line counts       the same, and when it falls silent         the same up to a minute, then parked
    notifications     every 5 s at most, and when it falls       at a notification; parked at once
                      silent (every second with tasks)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from tailspan._identity import trace_id
from tailspan.logs.follow import Follower
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot

__all__ = ["PollSchedule", "due_s", "late_lines_delay_s", "status_known_of"]

_LISTED_STATUS_S = 30.0
_PLAIN_STATUS_S = 120.0
_NOTIFIED_STATUS_S, _NOTIFIED_TASKS_S = 5.0, 1.0
_SILENT_READS = 2
_SILENCE_S = 60.0
_SHORTEST_LATE_S, _LONGEST_LATE_S = 10.0, 600.0
# Polls are due at multiples of this: one poll that wakes the process and its server costs several further ones.
_SHARED_S, _MERGED_SHARED_S = 0.5, 0.25
_JITTERED_S = 2.5  # shorter delays end at the same moments anyway


def _nothing() -> None:
    pass


class PollSchedule:
    """Decides when a tailer polls its job.

    Args:
        follower: Poll delays for jobs without change notifications.
        on_due: Called when a poll is due while the tailer rests.
        has_tasks: Whether the job has tasks, which change without a sign of it in the list.

    Attributes:
        has_changes: Whether the service pushes changes of this job.
        row: The job's row of the list; None if the list does not have it.
        is_resting: Whether nothing is to be done for the job until its next poll is due.
    """

    __slots__ = (
        "_follower",
        "_had_lines",
        "_has_tasks",
        "_is_plain",
        "_is_woken",
        "_listed",
        "_on_due",
        "_poll_max_s",
        "_row_at_s",
        "_silent_reads",
        "_state_changed",
        "_status_at_s",
        "_timer",
        "has_changes",
        "is_resting",
        "row",
    )

    def __init__(self, follower: Follower, on_due: Callable[[], object] = _nothing, *, has_tasks: bool = False) -> None:
        self._on_due = on_due
        self.has_changes = False
        self.row: ListedJob | None = None
        self.is_resting = False
        self._follower = follower
        self._has_tasks = has_tasks
        self._poll_max_s = follower.poll_max_s
        self._row_at_s = float("-inf")
        self._listed: tuple[ListedJob, JobSnapshot] | None = None
        self._status_at_s = float("-inf")
        self._is_plain = False
        self._state_changed = False
        self._had_lines = True
        self._silent_reads = 0
        self._is_woken = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_counted(self) -> bool:
        """Whether the list shows that the job needs no poll, since it counts the job's lines."""
        return not self._has_tasks and self.row is not None and self.row.lines is not None

    def listed(self, service: JobService, name: str) -> JobSnapshot | None:
        """Return a snapshot of the job from its row; None without a row.

        Args:
            service: The service that lists the job.
            name: The job's name, used if the row has none.
        """
        row = self.row
        if row is None:
            return None
        if self._listed is None or self._listed[0] is not row:
            status = status_known_of(
                service,
                row.job_id,
                row.job_name or name,
                row.state,
                submitted_at=row.created_at,
                started_at=row.state_since if row.state is JobState.RUNNING else None,
            )
            self._listed = row, JobSnapshot(service=service.name, status=status)
        return self._listed[1]

    def forget_listed(self) -> None:
        """Drop the snapshot made from the row: what the job's pipeline knows is shown from now on."""
        self._listed = None

    @property
    def parked(self) -> bool:
        """Whether the tailer rests without a timer until a change."""
        return self.is_resting and self._timer is None

    @property
    def is_long_parked(self) -> bool:
        """Whether the job is parked and its last status is older than a minute."""
        return self.parked and time.monotonic() - self._status_at_s > _SILENCE_S

    @property
    def row_age_s(self) -> float:
        """The age of the row, in seconds."""
        return time.monotonic() - self._row_at_s

    def on_row(self, row: ListedJob) -> None:
        """Apply the job's row of the list: a bulk status that saves one request per silent job."""
        known = self.row
        self._row_at_s = time.monotonic()
        if known is row:
            return
        # Keep an equal row: the snapshot made from it stays valid.
        self.row = known if known == row else row
        self._follower.poll_max_s = max(self._poll_max_s, _SILENCE_S if self.is_counted else 0.0)
        if known is None:
            if self._status_at_s < 0:
                return
            self._state_changed = row.state is not self._follower.state
        elif row.state is not known.state:
            self._state_changed = True
        elif row.lines == known.lines:
            return
        self.wake()

    def on_unlisted(self) -> None:
        """Drop the row: the list lacks the job or cannot be read, so the job is polled."""
        self.row = None
        self._row_at_s = float("-inf")
        self._follower.poll_max_s = self._poll_max_s
        self.wake()

    def wake(self) -> None:
        """Poll the job now: a notification or the list reports a change."""
        self._follower.wake()
        self._is_woken = True
        if self.is_resting:
            self._end_rest()

    def on_poll(self) -> None:
        """Note that a poll begins, which finds all that has changed until now."""
        self._is_woken = False

    def on_status(self, job: JobStatus) -> float:
        """Note a requested status; return the time, in seconds of the monotonic clock."""
        self._status_at_s = time.monotonic()
        # Such a status has hardly anything that the job's row does not have.
        self._is_plain = not job.total_tasks and job.last_heartbeat is None
        self._state_changed = self._had_lines = False
        return self._status_at_s

    def on_read(self, lines: int) -> bool:
        """Note the new lines of a read; return whether to request the status, because the job may have ended."""
        if lines:
            self._had_lines, self._silent_reads = True, 0
            return False
        self._silent_reads += 1
        # A notification without a new line is one of the state.
        return self.has_changes or (self._had_lines and self._silent_reads >= _SILENT_READS)

    def status_is_due(self, *, late: bool = False) -> bool:
        """Return whether to request the status before the next read.

        Args:
            late: Whether the job is complete and polled only for late lines.
        """
        if self._state_changed or self._follower.needs_status:
            return True
        if late:
            return False
        age_s = time.monotonic() - self._status_at_s
        if self.has_changes:
            return age_s >= (_NOTIFIED_TASKS_S if self._has_tasks else _NOTIFIED_STATUS_S)
        if self._has_tasks or self.row is None or self.row_age_s >= _LISTED_STATUS_S:
            return True
        row_suffices = self._is_plain and self.row.state is not JobState.UNKNOWN
        return age_s >= (_PLAIN_STATUS_S if row_suffices else _LISTED_STATUS_S)

    def delay_s(self, *, catching_up: bool = False, gather_s: float = 0.0) -> float | None:
        """Return the delay before the next poll, in seconds; None parks the tailer until a change wakes it.

        Args:
            catching_up: Whether other jobs of the stream may wait for this one; the next poll can release them.
            gather_s: How long the service holds a read back to merge it with reads of other jobs, in seconds.
        """
        now_s = time.monotonic()
        delay_s = self._follower.delay_s(now_s)
        if 0 < gather_s < delay_s:
            # No jitter: a read that comes half of that time before the merged request is part of it.
            delay_s -= gather_s / 2
        elif delay_s >= _JITTERED_S:
            delay_s = self._follower.delay_s(now_s, random.random())
        if self._follower.state.is_terminal or self._had_lines or catching_up:
            return delay_s
        if self.has_changes:
            # The list makes up for lost notifications; a job without line counts is polled once a minute.
            return None if self.is_counted else _SILENCE_S * random.uniform(0.8, 1.0)
        return None if self.is_counted and delay_s >= 0.9 * _SILENCE_S else delay_s

    def rest(self, delay_s: float | None) -> bool:
        """Rest until a delay in seconds is over or the job has changed, whichever is first.

        A resting job has no task: ten thousand of them would take most of the agent's memory.

        Args:
            delay_s: The delay; None rests until a change only.

        Returns:
            False if the job has changed since its last poll began: then it does not rest.
        """
        if self._is_woken:
            return False
        self.is_resting = True
        if delay_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(due_s(loop.time(), delay_s), self._end_rest)
        return True

    def _end_rest(self) -> None:
        self.cancel()
        self._on_due()

    def close(self) -> None:
        """End the rest without a poll, for good."""
        self.cancel()
        self._on_due = _nothing  # or its tailer would stay in memory until garbage is collected

    def cancel(self) -> None:
        """End the rest without a poll."""
        self.is_resting = self._is_woken = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def due_s(now_s: float, delay_s: float) -> float:
    """Return when a poll is due, by the clock of its loop: together with others, and early by half its delay at most.

    Args:
        now_s: The present, in seconds.
        delay_s: The delay, in seconds.
    """
    at_s = now_s + delay_s
    shared_s = next((one for one in (_SHARED_S, _MERGED_SHARED_S) if delay_s >= 2 * one), None)
    return at_s if shared_s is None else at_s - at_s % shared_s


def late_lines_delay_s(ended_ago_s: float) -> float:
    """Return the delay before a complete job is polled for late lines again, in seconds.

    Args:
        ended_ago_s: How long ago the job ended, in seconds.
    """
    return min(max(_SHORTEST_LATE_S, ended_ago_s), _LONGEST_LATE_S) * random.uniform(0.9, 1.1)


def status_known_of(
    service: JobService, job_id: str, name: str, state: JobState = JobState.UNKNOWN, **fields: Any
) -> JobStatus:
    """Return a status of a job from what is known without a request.

    Args:
        service: The service that has the job.
        job_id: The job.
        name: The job's name.
        state: The job's state, if known.
        **fields: Further fields of the status.
    """
    return JobStatus.from_state(
        state,
        job_id=job_id,
        job_name=name,
        identity=service.identity,
        trace_id=trace_id(service.identity, job_id),
        service=service.name,
        **fields,
    )
