"""Tests of programs and plugins: a job service in memory, a clock that does not wait, a test kit for job services.

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
from tailspan._conformance import PROMISES, BrokenPromise, find_broken_promises
from tailspan.errors import ConfigError, CursorExpiredError, JobNotFoundError
from tailspan.logs.page import MAX_PAGE_LINES, NANOS_PER_MS, Line, LogPage, Message, TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, JobService, SubmitService, TaskService

__all__ = ["BrokenPromise", "FakeClock", "FakeService", "FakeTaskService", "ServiceConformance", "check_service"]


class FakeService(SubmitService):
    """A job service in memory, driven by the test. The test may change it from any thread while verbs read it.

    Attributes:
        calls: ``(method, job_id)`` of each request so far, oldest first; ``list_jobs`` has an empty job id.
        submitted: The arguments of each `submit`, oldest first.
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
            name: The configured name.
            identity: The text that trace ids are hashed from.
            poll_min_s: Shortest delay between two polls of a busy job, in seconds.
            poll_max_s: Longest delay between two polls of a silent job, in seconds.
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
        self,
        job_id: str,
        *messages: str,
        timestamp_ms: int | None = None,
        stream: str = "",
        step_ms: int = 0,
        task: TaskRef | None = None,
        severity: int = 0,
    ) -> None:
        """Add lines to a job's log.

        Args:
            job_id: The job.
            *messages: The lines, without line endings.
            timestamp_ms: The time of the first line, in ms since the epoch. None: now.
            stream: ``stdout``, ``stderr`` or empty.
            step_ms: The time from each line to the next, in ms.
            task: The task that wrote the lines.
            severity: Their OTLP severity number; 0: found in the text.
        """
        first = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        self._jobs[job_id].lines.extend(
            Line((first + index * step_ms) * NANOS_PER_MS, message, stream, task, severity)
            for index, message in enumerate(messages)
        )

    def set_state(self, job_id: str, state: JobState | str, **fields: Any) -> JobStatus:
        """Change a job's state.

        Args:
            job_id: The job.
            state: Its new state. A terminal one also sets ``finished_at`` to now and marks the log as complete.
            **fields: Fields of its `JobStatus` to set: ``logs_complete=None`` is a service that does not report
                whether lines may still come.

        Returns:
            Its new status.
        """
        job = self._jobs[job_id]
        job.state = JobState(state)
        ended = {"finished_at": datetime.now(UTC), "logs_complete": True} if job.state.is_terminal else {}
        job.fields = {**job.fields, **ended, **fields}
        return self._status(job_id)

    def fail_next(self, method: str, *errors: Exception) -> None:
        """Make the next calls of a method raise these errors, one each.

        Args:
            method: ``get_job``, ``read_logs``, ``read_messages``, ``log_times_ms``, ``cancel``, ``list_jobs``,
                ``list_tasks`` or ``submit``.
            *errors: What to raise.
        """
        self._faults.setdefault(method, []).extend(errors)

    def before_next(self, method: str, *actions: Callable[[], None]) -> None:
        """Run an action before each of the next calls of a method, for example a change of the job."""
        self._hooks.setdefault(method, []).extend(actions)

    def expire(self, job_id: str, lines: int) -> None:
        """Drop a job's first lines, as a service with short retention does: older cursors raise CursorExpiredError."""
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
        """Yield the lines after the cursor, which is the number of lines up to it."""
        await self._called("read_logs", job_id)
        job = self._job(job_id)
        if cursor is not None and not cursor.isdigit():
            raise ConfigError(f"{cursor!r} is not a cursor of this service", service=self.name, job_id=job_id)
        start = int(cursor or b"0")
        if start < job.expired:
            if cursor is not None:
                raise CursorExpiredError(
                    f"the lines 1 to {job.expired} of job {job_id} are gone",
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
        """Add a PENDING job and record the arguments; the test sets its further states."""
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
        """Record the call."""
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
                f"the service {self.name!r} has no job {job_id!r}", service=self.name, job_id=job_id
            ) from None

    def _status(self, job_id: str) -> JobStatus:
        job = self._job(job_id)
        return self.make_status(job_id, job.state, **job.fields)


class FakeTaskService(FakeService, TaskService):
    """A `FakeService` whose jobs have tasks."""

    def set_task(self, job_id: str, task: TaskRun) -> None:
        """Add an attempt of a task to a job, or change it; the job's status counts its tasks.

        Args:
            job_id: The job.
            task: The attempt as it is now.
        """
        job = self._jobs[job_id]
        job.tasks[task.key] = task
        newest = {one.task_id: one for one in job.tasks.values()}
        finished = sum(one.ended for one in newest.values())
        job.fields = {**job.fields, "total_tasks": len(newest), "finished_tasks": finished}

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return the job's tasks as `set_task` has set them."""
        await self._called("list_tasks", job_id)
        return list(self._job(job_id).tasks.values())


@dataclasses.dataclass(slots=True)
class _FakeJob:
    fields: dict[str, Any]
    state: JobState = JobState.UNKNOWN
    lines: list[Line] = dataclasses.field(default_factory=list)
    tasks: dict[tuple[str, int], TaskRun] = dataclasses.field(default_factory=dict)
    expired: int = 0


class FakeClock(Clock):
    """A clock that advances only by sleeps, which take no time.

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
        """Return the seconds slept so far."""
        return self._passed_s

    def wall_s(self) -> float:
        """Return seconds since the epoch."""
        return self._started_s + self._passed_s

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Run an action at a time, in seconds since the start, in the middle of a sleep."""
        self._actions.append((seconds, action))
        self._actions.sort(key=_when)

    async def sleep(self, seconds: float) -> None:
        """Advance the clock at once, and run the actions that are due."""
        await anyio.lowlevel.checkpoint()
        self.sleeps.append(seconds)
        until = self._passed_s + seconds
        while self._actions and self._actions[0][0] <= until:
            self._passed_s, action = self._actions.pop(0)
            action()
        self._passed_s = until


def _when(planned: tuple[float, Callable[[], None]]) -> float:
    return planned[0]


def check_service(
    service: JobService | Callable[[], JobService],
    *,
    job_id: str | None = None,
    promises: Sequence[str] | None = None,
) -> None:
    """Check that a job service keeps the promises of `tailspan.services.JobService`.

    Reads, lists and cancels an *ended* job; starts none and changes none.

    Args:
        service: A function that makes the service, best of all its class with arguments
            (``lambda: MyService("my", url)``); or a service, which is closed and whose constructor is not checked.
        job_id: An ended job with at least two lines, best with more than one page. None: the first one in the list.
        promises: Names of the promises to check, as the error shows them. None: all.

    Raises:
        AssertionError: A promise is broken; the message has the file and line of the method, and what it did.
        ConfigError: There is no promise of that name.

    Example:
        >>> service = FakeService()
        >>> _ = service.add_job("j")
        >>> service.add_lines("j", "one", "two", timestamp_ms=1_000)
        >>> _ = service.set_state("j", "SUCCEEDED")
        >>> check_service(service)
    """
    for name in promises or ():
        if name not in PROMISES:
            raise ConfigError(f"there is no promise {name!r}; there is: {', '.join(PROMISES)}", key="promises")
    broken = find_broken_promises(service, job_id=job_id, promises=list(PROMISES) if promises is None else promises)
    if broken:
        raise AssertionError("\n".join(map(str, broken)))


class ServiceConformance:
    """Tests of a job service for pytest, one per promise; see `check_service`.

    Subclass it with a name that begins with ``Test``, and implement `make_service`:

        class TestMyService(ServiceConformance):
            def make_service(self):
                return MyService("my", url)

    Attributes:
        job_id: An ended job with at least two lines; None: the first one in the list. A fixture may set it.
    """

    job_id: str | None = None

    def make_service(self) -> JobService:
        """Return a new service; called at least once per test."""
        raise NotImplementedError(f"{type(self).__name__} must implement make_service")

    def test_base_class(self) -> None:
        """The service is a subclass of `JobService`."""
        self._check("base_class")

    def test_constructor(self) -> None:
        """The constructor reads, writes and connects to nothing."""
        self._check("constructor")

    def test_identity(self) -> None:
        """Name and identity never change."""
        self._check("identity")

    def test_unknown_jobs(self) -> None:
        """An unknown job raises JobNotFoundError."""
        self._check("unknown_jobs")

    def test_errors(self) -> None:
        """All errors are of the tree in `tailspan.errors`."""
        self._check("errors")

    def test_get_job(self) -> None:
        """A status is whole, and stays the same for an ended job."""
        self._check("get_job")

    def test_pages(self) -> None:
        """Pages are within the limits and in order, with unique uids."""
        self._check("pages")

    def test_resume(self) -> None:
        """A read continues at every cursor, each line once."""
        self._check("resume")

    def test_early_close(self) -> None:
        """Reads and lists may be closed at any page."""
        self._check("early_close")

    def test_since_ms(self) -> None:
        """A read since a moment yields the lines at or after it."""
        self._check("since_ms")

    def test_messages(self) -> None:
        """Messages are the lines, oldest first."""
        self._check("messages")

    def test_log_times(self) -> None:
        """The times of the log are those of its first and last line."""
        self._check("log_times")

    def test_list_jobs(self) -> None:
        """The list has each job once, newest first."""
        self._check("list_jobs")

    def test_cancel(self) -> None:
        """Cancelling an ended job changes nothing."""
        self._check("cancel")

    def test_aclose(self) -> None:
        """The service may be closed twice."""
        self._check("aclose")

    def _check(self, promise: str) -> None:
        check_service(self.make_service, job_id=self.job_id, promises=[promise])
