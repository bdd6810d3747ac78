"""`PollSchedule`: when a tailer looks at its job, and whether it asks for the status then.

Ten thousand silent jobs shall cost nothing. What is told of a job need not be asked for: by the rows of its service's
list, where these count lines, and by the service's news. A job that both say is silent is *parked* once its
lines are acked: its tailer waits, without a timer, until one of them says otherwise.

                     status asked                              next turn
    nothing told     each turn                                 after the follower's delay, up to `poll_max_s`
    listed           each 30 s, or when its row has changed    the same
                     (2 min without tasks and heartbeat)
    lines counted    the same, and when it has gone silent     the same up to a minute, then parked
    news             each second, and when it has gone silent  at its news; else parked at once
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

from tailspan._identity import trace_id
from tailspan.logs.follow import Follower
from tailspan.models import JobState, ListedJob, RunResponse
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.tasks import Flag

__all__ = ["PollSchedule", "status_known_of"]

_LISTED_STATUS_S = 30.0
_PLAIN_STATUS_S = 120.0
_TOLD_STATUS_S = 1.0
_SILENT_READS = 2
_SILENCE_S = 60.0


class PollSchedule:
    """What is told of one job, and what follows from it.

    Args:
        follower: Says when to look at a job of which nothing is told.

    Attributes:
        told: Whether the service's news will tell of the job.
        row: The job's row in the list; None when the list does not have it.
        parked: Whether the tailer waits for somebody to say that there is something new.
    """

    def __init__(self, follower: Follower) -> None:
        self.told = False
        self.row: ListedJob | None = None
        self.parked = False
        self._follower = follower
        self._poll_max_s = follower.poll_max_s
        self._row_at_s = float("-inf")
        self._listed: tuple[ListedJob, JobSnapshot] | None = None
        self._status_at_s = float("-inf")
        self._is_plain = False
        self._state_news = False
        self._spoke = True
        self._silent_reads = 0
        self._woken = Flag()

    @property
    def is_counted(self) -> bool:
        """Whether the list tells how many lines the job has."""
        return self.row is not None and self.row.lines is not None

    def listed(self, service: JobService, name: str) -> JobSnapshot | None:
        """Return the job with as much of a status as its row has; None without a row.

        Args:
            service: The service that lists the job.
            name: The job's name, where the row does not have it.
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

    @property
    def is_long_parked(self) -> bool:
        """Whether the job has been parked for so long that its last status says nothing of it now."""
        return self.parked and time.monotonic() - self._status_at_s > _SILENCE_S

    @property
    def row_age_s(self) -> float:
        """How long ago the list was last read, in seconds."""
        return time.monotonic() - self._row_at_s

    def on_row(self, row: ListedJob) -> None:
        """Take in the job's row of a listing: the bulk status that saves a request per silent job."""
        known = self.row
        # An equal row stays the one that it is: what was made of it holds.
        self.row = known if known == row else row
        self._row_at_s = time.monotonic()
        self._follower.poll_max_s = max(self._poll_max_s, _SILENCE_S if row.lines is not None else 0.0)
        if known is None:
            if self._status_at_s < 0:
                return
            self._state_news = row.state is not self._follower.state
        elif row.state is not known.state:
            self._state_news = True
        elif row.lines == known.lines:
            return
        self.wake()

    def on_unlisted(self) -> None:
        """Take in that the list does not have the job any more, or cannot be read: it has to be asked for."""
        self.row = None
        self._row_at_s = float("-inf")
        self._follower.poll_max_s = self._poll_max_s
        self.wake()

    def wake(self) -> None:
        """Look at the job now: something says that there is news."""
        self._follower.wake()
        self._woken.set()

    def on_status(self, job: RunResponse) -> float:
        """Take in a status that was asked for; return when that was, on the monotonic clock."""
        self._status_at_s = time.monotonic()
        # Then there is hardly anything in it that the job's row does not tell.
        self._is_plain = not job.total_tasks and job.last_heartbeat is None
        self._state_news = self._spoke = False
        return self._status_at_s

    def on_read(self, lines: int) -> bool:
        """Take in how many new lines a read found; return whether to ask for the status: perhaps the job has ended."""
        if lines:
            self._spoke, self._silent_reads = True, 0
            return False
        self._silent_reads += 1
        # News that are not of a line are of the state.
        return self.told or (self._spoke and self._silent_reads >= _SILENT_READS)

    def status_is_due(self, *, late: bool = False) -> bool:
        """Return whether to ask for the status before the next read.

        Args:
            late: Whether all of the job was relayed, and it is looked at for late lines only.
        """
        if self._state_news or self._follower.needs_status:
            return True
        if late:
            return False
        age_s = time.monotonic() - self._status_at_s
        if self.told:
            return age_s >= _TOLD_STATUS_S
        if self.row is None or self.row_age_s >= _LISTED_STATUS_S:
            return True
        row_will_do = self._is_plain and self.row.state is not JobState.UNKNOWN
        return age_s >= (_PLAIN_STATUS_S if row_will_do else _LISTED_STATUS_S)

    def delay_s(self, *, behind: bool = False, gather_s: float = 0.0) -> float | None:
        """Return how long to wait for the next look, in seconds; None: until somebody wakes the tailer.

        Args:
            behind: Whether others of its stream may wait for it, which its next look can end.
            gather_s: For how long the service lets a look wait for those of others.
        """
        now_s = time.monotonic()
        delay_s = self._follower.delay_s(now_s)
        if 0 < gather_s < delay_s:
            # Not spread: who comes half of that before all go together will not miss it.
            delay_s -= gather_s / 2
        else:
            delay_s = self._follower.delay_s(now_s, random.random())
        if self._follower.state.is_terminal or self._spoke or behind:
            return delay_s
        if self.told:
            # The list stands in for news that were lost; where it does not have the job, we look ourselves.
            return None if self.is_counted else _SILENCE_S * random.uniform(0.8, 1.0)
        return None if self.is_counted and delay_s >= 0.9 * _SILENCE_S else delay_s

    async def wait(self, delay_s: float | None) -> None:
        """Wait until it is time, or until somebody says that there is news."""
        self.parked = delay_s is None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._woken.wait()
        self._woken.clear()
        self.parked = False


def status_known_of(
    service: JobService, job_id: str, name: str, state: JobState = JobState.UNKNOWN, **fields: Any
) -> RunResponse:
    """Return what is known of a job whose status was not asked for.

    Args:
        service: The service that has the job.
        job_id: The job.
        name: Its name.
        state: Its state as far as anybody knows.
        **fields: Further fields of the status.
    """
    return RunResponse.from_state(
        state,
        job_id=job_id,
        job_name=name,
        identity=service.identity,
        trace_id=trace_id(service.identity, job_id),
        service=service.name,
        **fields,
    )
