"""`Follower`: when to read a job's log and status next, and when its log is complete. Pure: no clock, no I/O.

The only follow logic there is: the verb ``job_tail_logs`` and the agent both drive it.

The commonest bug of log tailers is to stop when the status turns terminal: the last lines are then never read. So
an end counts only after two equal answers, and a log counts as complete only after it was read to its end *after*
the job's end had settled (or after the service itself reported that no line will come).

A service that marks the end of a log reports a job's end once the job's own lines are readable. What keeps the log
open then is a background process, which may print for hours. It gets a moment for its last lines, not the time to
settle: a filter of the job's output (``exec > >(tee file)``) ends just after the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailspan.logs.page import Message, OpenLine
from tailspan.models import JobState, JobStatus

__all__ = ["SETTLE_S", "Follower", "TailUpdate"]

SETTLE_S = 10.0
_OPEN_LOG_S = 2.0
_GROWTH = 1.6
_CONFIRM_S = 0.2
_QUIET_READS = 2


@dataclass(slots=True, kw_only=True)
class Follower:
    """The state of following one job, from statuses and reads. All times are in seconds of one clock.

    Attributes:
        poll_min_s: Delay after a read that found lines.
        poll_max_s: Longest delay while the job is silent.
        settle_s: How long after the end lines may still become visible.
        read_whole: Whether one read that began after the end had settled, or after the service had marked the end of
            the log, went from the start to the end of the log: then a second one has nothing more to find.
    """

    poll_min_s: float = 1.0
    poll_max_s: float = 30.0
    settle_s: float = SETTLE_S
    state: JobState = JobState.UNKNOWN
    read_whole: bool = field(default=False, init=False)
    _delay_s: float = field(default=0.0, init=False)
    _ended_at_s: float | None = field(default=None, init=False)
    _last_alive_s: float | None = field(default=None, init=False)
    _terminal_answers: int = field(default=0, init=False)
    _quiet_reads: int = field(default=0, init=False)
    _logs_complete: bool | None = field(default=None, init=False)
    _complete_read: bool = field(default=False, init=False)
    _settled_when_seen: bool = field(default=False, init=False)

    def on_status(self, job: JobStatus, now_s: float, wall_s: float) -> None:
        """Record a status.

        Args:
            job: The answer.
            now_s: When it was received, on the follower's (monotonic) clock.
            wall_s: The same moment in seconds since the epoch, to place the job's own ``finished_at``.
        """
        if job.state.is_terminal and job.state is self.state:
            self._terminal_answers += 1
        else:
            self._terminal_answers = 1 if job.state.is_terminal else 0
            self._quiet_reads = 0
            self._complete_read = self.read_whole = False
            self._ended_at_s = None
        if job.logs_complete and not self._logs_complete:
            # A log that was given up as open has ended after all, perhaps with lines after the last read.
            self._complete_read = False
        self.state = job.state
        self._logs_complete = job.logs_complete
        if not job.state.is_terminal:
            self._last_alive_s = now_s
        elif self._ended_at_s is None:
            ended = job.finished_at or job.job_status_date
            ago_s = max(0.0, wall_s - ended.timestamp()) if ended else 0.0
            if self._last_alive_s is not None:
                # The service's clock may be slow: the job cannot have ended before it was last reported as running.
                ago_s = min(ago_s, now_s - self._last_alive_s)
            self._ended_at_s = now_s - ago_s
            # Settling is for lines that become visible late: an end long ago needs no second read.
            self._settled_when_seen = ago_s >= self.settle_s

    def on_read(self, lines: int, started_s: float, *, from_start: bool = False) -> None:
        """Record a read that went to the present end of the log.

        Args:
            lines: How many new lines it found.
            started_s: When the read began; only a read that began after the end can be the last.
            from_start: Whether it began at the start of the log.
        """
        if from_start and self.state.is_terminal and (self._logs_complete or started_s >= self._settled_at_s):
            self.read_whole = True
        if lines:
            self._delay_s = self.poll_min_s
            self._quiet_reads = 0
        else:
            self._delay_s = min(self.poll_max_s, max(self.poll_min_s, self._delay_s * _GROWTH))
        if not self.ended:
            return
        if self._logs_complete:
            self._complete_read = True
        elif started_s >= self._settled_at_s:
            self._quiet_reads = self._quiet_reads + 1 if not lines else 0
            outlived = self._logs_complete is False
            if self._quiet_reads >= _QUIET_READS or self._settled_when_seen or outlived:
                self._complete_read = True

    @property
    def ended(self) -> bool:
        """Whether the job's end is certain: two equal answers, or one by a service that marks the end of the log."""
        return self._terminal_answers >= (1 if self._logs_complete else 2)

    @property
    def complete(self) -> bool:
        """Whether the job has ended and its log was read to its last line."""
        return self.ended and self._complete_read

    @property
    def needs_status(self) -> bool:
        """Whether the next read needs a status request before it, whatever the list reports."""
        return 0 < self._terminal_answers < 2 or (self.ended and self._logs_complete is False)

    def delay_s(self, now_s: float, jitter: float = 0.5) -> float:
        """Return how long to wait before the next read.

        Args:
            now_s: The present moment on the follower's clock.
            jitter: A random number in [0, 1): spreads the reads of many jobs by 10%.

        Returns:
            Seconds, 0 or more.
        """
        delay = max(self._delay_s, self.poll_min_s)
        if 0 < self._terminal_answers < 2:
            delay = min(delay, _CONFIRM_S)
        elif self.ended and not self._complete_read:
            delay = min(max(self.poll_min_s, self._settled_at_s - now_s), delay, 2.0)
        return delay * (0.9 + 0.2 * jitter)

    def wake(self) -> None:
        """Reset the delay: the job has changed."""
        self._delay_s = self.poll_min_s

    @property
    def _settled_at_s(self) -> float:
        settle_s = min(self.settle_s, _OPEN_LOG_S) if self._logs_complete is False else self.settle_s
        return (self._ended_at_s or 0.0) + settle_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TailUpdate:
    """The result of one poll of a followed job.

    Attributes:
        status: The newest status; ``stale`` when the request failed this time.
        messages: The new lines, in the order in which the service returns them.
        left_out: Number of new lines before those that were left out of the sample.
        gap: Whether lines before these are gone at the service.
        complete: Whether the job has ended and this is the last of its lines: nothing follows.
        open_line: The line whose newline has not come, if there is one. It comes as a message once it is complete.
    """

    status: JobStatus
    messages: Sequence[Message] = ()
    left_out: int = 0
    gap: bool = False
    complete: bool = False
    open_line: OpenLine | None = None
