"""Fakes to test programs that use Tailspan: a job service in memory, and a clock that does not wait.

Example:
    >>> service = FakeService()
    >>> service.add_job("nightly-1", state="RUNNING")
    >>> service.add_lines("nightly-1", "started", "done", timestamp_ms=1_000)
    >>> service.set_state("nightly-1", "SUCCEEDED")
    >>> job_get_logs("nightly-1", service=service)
    [{'message': 'started', 'timestamp': 1000}, {'message': 'done', 'timestamp': 1000}]
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import anyio.lowlevel

from tailspan._clock import Clock
from tailspan._identity import trace_id
from tailspan.errors import CursorExpiredError, JobNotFoundError
from tailspan.logs.page import MAX_PAGE_LINES, NANOS_PER_MS, Line, LogPage, Message
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, SubmitService

__all__ = ["FakeClock", "FakeService"]


class FakeService(SubmitService):
    """A job service in memory, driven by the test. Safe to change from any thread while verbs read it.

    Attributes:
        name: As configured services have one.
        identity: What trace ids are hashed from.
        calls: ``(method, job_id)`` of each request so far, oldest first; ``list_jobs`` has an empty job id.
        submitted: The arguments of each ``submit``, oldest first.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        identity: str = "fake",
        poll_min_s: float = 0.01,
        poll_max_s: float = 0.05,
        page_lines: int = MAX_PAGE_LINES,
        polls_are_free: bool = True,
    ) -> None:
        """Make a service without jobs.

        Args:
            name: As configured services have one.
            identity: What trace ids are hashed from.
            poll_min_s: How soon a busy job may be asked again, in seconds.
            poll_max_s: How rarely a silent job is asked, in seconds.
            page_lines: Longest page of lines and of listed jobs.
            polls_are_free: As the attribute of `JobService`.
        """
        self.name = name
        self.identity = identity
        self.poll_min_s = poll_min_s
        self.poll_max_s = poll_max_s
        self.polls_are_free = polls_are_free
        self.has_offsets = True
        self.calls: list[tuple[str, str]] = []
        self.submitted: list[dict[str, Any]] = []
        self._page_lines = page_lines
        self._jobs: dict[str, _FakeJob] = {}
        self._faults: dict[str, list[Exception]] = {}
        self._hooks: dict[str, list[Callable[[], None]]] = {}

    def add_job(self, job_id: str = "job-1", *, state: JobState | str = JobState.RUNNING, **fields: Any) -> JobStatus:
        """Add a job.

        Args:
            job_id: Its id.
            state: Its first state.
            **fields: Further fields of its `JobStatus`, for example ``job_name`` or ``total_tasks``.

        Returns:
            Its status.
        """
        now = datetime.now(UTC)
        self._jobs[job_id] = _FakeJob({"job_name": job_id, "submitted_at": now, "started_at": now})
        return self.set_state(job_id, state, **fields)

    def add_lines(
        self, job_id: str, *messages: str, timestamp_ms: int | None = None, stream: str = "", step_ms: int = 0
    ) -> None:
        """Add lines to a job's log.

        Args:
            job_id: The job.
            *messages: The lines, without line endings.
            timestamp_ms: The time of the first, in ms since the epoch. None: now.
            stream: ``stdout``, ``stderr`` or empty.
            step_ms: How much later each further line is, in ms.
        """
        first = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        self._jobs[job_id].lines.extend(
            Line((first + index * step_ms) * NANOS_PER_MS, message, stream) for index, message in enumerate(messages)
        )

    def set_state(self, job_id: str, state: JobState | str, **fields: Any) -> JobStatus:
        """Change a job's state.

        Args:
            job_id: The job.
            state: Its new state. A terminal one also sets ``finished_at`` to now and marks the log as complete.
            **fields: Fields of its `JobStatus` to set besides, or instead: ``logs_complete=None`` is a service
                that does not say whether lines will come.

        Returns:
            Its new status.
        """
        job = self._jobs[job_id]
        job.state = JobState(state)
        ended = {"finished_at": datetime.now(UTC), "logs_complete": True} if job.state.is_terminal else {}
        job.fields = {**job.fields, **ended, **fields}
        return self._status(job_id)

    def fail_next(self, method: str, *errors: Exception) -> None:
        """Let the next calls of a method raise these errors, one each, before it works again.

        Args:
            method: ``get_job``, ``read_logs``, ``read_messages``, ``log_times_ms``, ``cancel``, ``list_jobs`` or
                ``submit``.
            *errors: What to raise.
        """
        self._faults.setdefault(method, []).extend(errors)

    def before_next(self, method: str, *actions: Callable[[], None]) -> None:
        """Do something right before the next calls of a method, one action each: a job that goes on meanwhile."""
        self._hooks.setdefault(method, []).extend(actions)

    def expire(self, job_id: str, lines: int) -> None:
        """Forget a job's first lines, as services with short retention do: older cursors raise CursorExpiredError."""
        self._jobs[job_id].expired = lines

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status."""
        await self._called("get_job", job_id)
        return self._status(job_id)

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines after the cursor; the cursor is the number of lines read."""
        await self._called("read_logs", job_id)
        job = self._job(job_id)
        start = int(cursor or b"0")
        if start < job.expired:
            if cursor is not None:
                raise CursorExpiredError(
                    f"the first {job.expired} lines of job {job_id} are gone",
                    resume_cursor=b"%d" % job.expired,
                    service=self.name,
                    job_id=job_id,
                )
            start = job.expired
        end = len(job.lines)
        while start < end:
            stop = min(end, start + self._page_lines)
            lines = [line for line in job.lines[start:stop] if line.time_unix_nano >= (since_ms or 0) * NANOS_PER_MS]
            start = stop
            if lines:
                yield LogPage.from_lines(lines, cursor=b"%d" % stop, identity=self.identity, job_id=job_id)

    async def read_messages(self, job_id: str, since_ms: int | None = None) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the lines as messages."""
        await self._called("read_messages", job_id)
        job = self._job(job_id)
        lines = [line for line in job.lines[job.expired :] if line.time_unix_nano >= (since_ms or 0) * NANOS_PER_MS]
        for start in range(0, len(lines), self._page_lines):
            part = lines[start : start + self._page_lines]
            yield list(LogPage.from_lines(part, cursor=b"", identity=self.identity, job_id=job_id).messages())

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the oldest and the newest line, in ms since the epoch."""
        await self._called("log_times_ms", job_id)
        times = [line.time_unix_nano // NANOS_PER_MS for line in self._job(job_id).lines]
        return (min(times), max(times)) if times else None

    async def cancel(self, job_id: str) -> JobStatus:
        """End the job as CANCELED, if it has not ended."""
        await self._called("cancel", job_id)
        if self._job(job_id).state.is_terminal:
            return self._status(job_id)
        return self.set_state(job_id, JobState.CANCELED)

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs, the one that was added last first."""
        await self._called("list_jobs", "")
        statuses = [self._status(job_id) for job_id in reversed(self._jobs)]
        rows = [
            ListedJob(
                job_id=one.job_id,
                job_name=one.job_name,
                state=one.state,
                created_at=one.submitted_at,
                state_since=one.job_status_date,
                service=self.name,
                lines=len(self._jobs[one.job_id].lines),
            )
            for one in statuses
        ]
        for start in range(0, len(rows), self._page_lines):
            yield rows[start : start + self._page_lines]

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Add a PENDING job and note what it was submitted with; the test makes it run."""
        job_id = f"job-{len(self._jobs) + 1}"
        await self._called("submit", job_id)
        self.submitted.append(
            {"command": list(command), "name": name, "timeout_s": timeout_s, "cwd": cwd, "env": dict(env or {})}
            | {"attributes": dict(attributes or {})}
        )
        return self.add_job(
            job_id,
            state=JobState.PENDING,
            job_name=name or command[0],
            attributes=dict(attributes or {}),
            started_at=None,
        )

    async def aclose(self) -> None:
        """Note that it was closed."""
        self.calls.append(("aclose", ""))

    async def _called(self, method: str, job_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.calls.append((method, job_id))
        if self._hooks.get(method):
            self._hooks[method].pop(0)()
        if self._faults.get(method):
            raise self._faults[method].pop(0)

    def _job(self, job_id: str) -> _FakeJob:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise JobNotFoundError(
                f"the service {self.name!r} knows no job {job_id!r}", service=self.name, job_id=job_id
            ) from None

    def _status(self, job_id: str) -> JobStatus:
        job = self._job(job_id)
        required = {"identity": self.identity, "trace_id": trace_id(self.identity, job_id), "service": self.name}
        return JobStatus.from_state(job.state, **{"job_id": job_id, **required, **job.fields})


@dataclasses.dataclass(slots=True)
class _FakeJob:
    fields: dict[str, Any]
    state: JobState = JobState.UNKNOWN
    lines: list[Line] = dataclasses.field(default_factory=list)
    expired: int = 0


class FakeClock(Clock):
    """A clock that moves only when something sleeps, and then at once.

    Attributes:
        sleeps: Each sleep so far in seconds, oldest first.
    """

    def __init__(self, wall_s: float | None = None) -> None:
        """Start at this time since the epoch in seconds; None: now, so that it agrees with a `FakeService`."""
        self.sleeps: list[float] = []
        self._started_s = time.time() if wall_s is None else wall_s
        self._passed_s = 0.0
        self._actions: list[tuple[float, Callable[[], None]]] = []

    def monotonic_s(self) -> float:
        """Return the seconds that were slept."""
        return self._passed_s

    def wall_s(self) -> float:
        """Return seconds since the epoch."""
        return self._started_s + self._passed_s

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something when so many seconds have passed since the start, in the middle of a sleep."""
        self._actions.append((seconds, action))
        self._actions.sort(key=_when)

    async def sleep(self, seconds: float) -> None:
        """Let that much time pass at once."""
        await anyio.lowlevel.checkpoint()
        self.sleeps.append(seconds)
        until = self._passed_s + seconds
        while self._actions and self._actions[0][0] <= until:
            self._passed_s, action = self._actions.pop(0)
            action()
        self._passed_s = until


def _when(planned: tuple[float, Callable[[], None]]) -> float:
    return planned[0]
