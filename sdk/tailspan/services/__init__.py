"""Job services: where jobs run, behind one small base class.

`JobService` and what a service may add to it belong here; nothing here may depend on a particular service. To add one,
subclass `JobService` and announce the class in the entry point group ``tailspan.services``; the entry's name is the
``type`` in the configuration. `docs/services/writing-a-service.md` has an example, the contract and its test kit.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from tailspan._identity import trace_id
from tailspan.errors import ConfigError, RequestRejectedError, ServiceError
from tailspan.logs.page import NANOS_PER_MS, Line, LogPage, Message, OpenLine, numbered_pages
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun

if TYPE_CHECKING:
    from pydantic import BaseModel

    from tailspan.config import Settings

__all__ = [
    "LATE_WINDOW_S",
    "ChangeFeed",
    "ChangeFeedService",
    "JobService",
    "MergingService",
    "Problem",
    "SubmitService",
    "TaskService",
]

LATE_WINDOW_S = 10.0


class Problem(NamedTuple):
    """What a service lacks to do all that it can: a right, a version, a setting.

    Attributes:
        text: The problem and its cure, in one sentence.
        is_fatal: Whether jobs or lines are not relayed because of it.
    """

    text: str
    is_fatal: bool = True


class JobService(ABC):
    """Base class of all job services.

    A service needs a `name`, an `identity` and the three abstract methods. Every method translates foreign errors
    (of an HTTP client, of the operating system) into the tree of `tailspan.errors`. A constructor does no I/O.

    Attributes:
        name: The configured name (``services.NAME``).
        identity: What checkpoints, trace ids and uids are computed from: the same for every configuration of the same
            service. A property may read it at first use.
        Options: The pydantic model of the section's keys, best a subclass of `tailspan.config.Options`; None: they are
            arguments of the constructor.
        poll_min_s: Shortest delay between two polls of a busy job, in seconds.
        poll_max_s: Longest delay between two polls of a silent job, in seconds.
        polls_are_free: Whether a poll costs no request: the agent then polls and lists as often as it likes.
        has_offsets: Whether each line has the same time and uid for every reader, from whatever cursor. The job API
            then serves the log as pages, and calls `log_times_ms` with every status: override that one, too.
        final_read: Whether the agent must read the log of an ended job once more from its start, because lines may
            become visible behind a cursor.
        tries: How often the service sends a request that only reads before it raises the error. The agent sets 1,
            because it has a retry schedule of its own, except where it reads each job once only.
    """

    name: str
    identity: str
    Options: ClassVar[type[BaseModel] | None] = None
    poll_min_s: float = 1.0
    poll_max_s: float = 30.0
    polls_are_free: bool = False
    has_offsets: bool = False
    final_read: bool = False
    tries: int = 1

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: Settings) -> Self:
        """Make the service of a configured section.

        By default the constructor takes the section as an object of `Options`, or, without that, its keys as keyword
        arguments.

        Args:
            name: The part after ``services.`` in the configuration.
            options: The section, ``type`` included.
            settings: The whole configuration.

        Raises:
            ConfigError: A key is unknown, missing or wrong; names the key.
        """
        if cls.Options is not None:
            return cls._from_model(name, cls.Options, options)
        given = {key: value for key, value in options.items() if key != "type"}
        _, *parameters = inspect.signature(cls).parameters.values()
        known = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        needed = [one.name for one in parameters if one.name in known and one.default is one.empty]
        takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        for key in [] if takes_all else sorted(given.keys() - known):
            text = f"there is no such key; known here: {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(f"services.{name}.{key}: {text}", key=f"services.{name}.{key}", service=name)
        for key in needed:
            if key not in given:
                raise ConfigError(f"services.{name}.{key}: is missing", key=f"services.{name}.{key}", service=name)
        return cls(name, **given)  # type: ignore[call-arg]  # the subclass's constructor takes the name first

    @classmethod
    def _from_model(cls, name: str, model: type[BaseModel], options: Mapping[str, Any]) -> Self:
        from tailspan.config import validate_options

        found = validate_options(model, f"services.{name}", options)
        try:
            return cls(name, found)  # type: ignore[call-arg]  # the subclass's constructor takes both
        except ConfigError as error:
            key = f"services.{name}.{error.key}" if error.key else f"services.{name}"
            raise ConfigError(f"{key}: {error}", key=key, service=name) from None

    @abstractmethod
    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status.

        Raises:
            JobNotFoundError: The service has no such job.
        """

    @abstractmethod
    def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that are readable now, after the cursor, page by page, and then stop.

        The caller may close the generator at any page. It reads no faster than the caller takes pages.

        Args:
            job_id: The job.
            cursor: A page's cursor: continue after that page. None: from the start.
            since_ms: Only without cursor: lines whose time is at or after this, in ms since the epoch.
            late_window_s: How far before the cursor to search for lines that became visible late, in seconds;
                services with offsets ignore it.

        Yields:
            Pages with at least one line, in the order of the service.

        Raises:
            CursorExpiredError: Lines before the cursor are gone.
            JobNotFoundError: The service has no such job.
        """

    @abstractmethod
    def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the service's jobs, newest first, page by page, each once. The caller may close it at any page."""

    async def cancel(self, job_id: str) -> JobStatus:
        """Cancel the job and return its new status; an ended job stays as it is.

        By default a service cannot cancel.

        Raises:
            RequestRejectedError: The service cannot cancel jobs, or refuses to.
            JobNotFoundError: The service has no such job.
        """
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        raise RequestRejectedError(f"the service {self.name!r} cannot cancel jobs", service=self.name, job_id=job_id)

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the oldest and the newest line in ms since the epoch, or None without lines.

        By default reads the whole log, in bounded memory.
        """
        times: tuple[int, int] | None = None
        async with aclosing(self.read_logs(job_id)) as pages:
            async for page in pages:
                first = min(run.time_unix_nano for run in page.runs) // NANOS_PER_MS
                last = max(run.time_unix_nano + run.lines - 1 for run in page.runs) // NANOS_PER_MS
                times = (first, last) if times is None else (min(first, times[0]), max(last, times[1]))
        return times

    async def read_messages(self, job_id: str, since_ms: int | None = None) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the lines as messages with all the keys that the service has, oldest first.

        By default the messages of `read_logs`.

        Args:
            job_id: The job.
            since_ms: Only lines whose time is at or after this, in ms since the epoch.
        """
        async with aclosing(self.read_logs(job_id, since_ms=since_ms)) as pages:
            async for page in pages:
                yield list(page.messages())

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the last line of a log while its newline has not come; None without one. By default None.

        `read_logs` yields the line once it is complete, or once the job has ended.

        Args:
            job_id: The job.
        """
        return None

    async def find_problems(self) -> Sequence[Problem]:
        """Return what is missing at the service, for ``tailspan agent check``. By default nothing."""
        return ()

    async def aclose(self) -> None:
        """Release connections and files. The caller may close twice. By default there is nothing to release."""
        return

    def make_status(self, job_id: str, state: JobState | str, **fields: Any) -> JobStatus:
        """Return the status of a job of this service.

        Args:
            job_id: The job.
            state: Its state.
            **fields: Further fields of the status, for example ``job_name``; that one is the job's id by default.
        """
        own = {"service": self.name, "identity": self.identity, "trace_id": trace_id(self.identity, job_id)}
        return JobStatus.from_state(JobState(state), **{"job_id": job_id, "job_name": job_id, **own, **fields})

    def make_pages(
        self, job_id: str, lines: Iterable[Line], cursor: bytes | None = None, *, since_ms: int | None = None
    ) -> Iterator[LogPage]:
        """Yield lines as pages; the cursor of a page is the number of lines up to its end.

        For services that have a job's lines in an order that never changes; such a service ``has_offsets``.

        Args:
            job_id: The job.
            lines: All lines of the job from the first one on, whatever the cursor.
            cursor: As for `read_logs`.
            since_ms: As for `read_logs`.

        Raises:
            ConfigError: The cursor is not a number of lines.
        """
        return numbered_pages(lines, cursor, identity=self.identity, job_id=job_id, since_ms=since_ms)


class SubmitService(JobService):
    """A service that also runs commands as jobs."""

    @abstractmethod
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
        """Start a command as a job and return its first status; see `tailspan.job_submit`."""

    async def status_after_submit(self, job_id: str, **fields: Any) -> JobStatus:
        """Return the status of a job that was just submitted: pending if the service does not have it yet.

        An error here would make callers submit it a second time.

        Args:
            job_id: The job.
            **fields: Further fields of the pending status, for example ``job_name``.
        """
        try:
            return await self.get_job(job_id)
        except ServiceError:
            return self.make_status(job_id, JobState.PENDING, **fields)


class TaskService(JobService):
    """A service whose jobs have tasks: runs of a DAG, pods and containers, steps.

    The status counts them (``total_tasks``, ``finished_tasks``), and lines say the task and attempt that wrote them
    (`tailspan.logs.page.TaskRef`). The order of lines is promised within an attempt.
    """

    @abstractmethod
    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return every attempt of every task of the job, oldest first; also attempts that have not started.

        An attempt that has ended does not change any more.

        Raises:
            JobNotFoundError: The service has no such job.
        """


class MergingService(JobService):
    """A service that answers reads after a cursor, of many jobs, with one request: start them all at once.

    Attributes:
        merged_late: Whether lines may become visible late behind the cursor of a merged read, too.
    """

    merged_late: bool = False

    @property
    @abstractmethod
    def gather_s(self) -> float:
        """How long such a read waits for reads of other jobs at present, at most, in seconds; 0 if it does not wait."""

    @abstractmethod
    def merges(self, cursor: bytes | None) -> bool:
        """Return whether a read after this cursor is merged."""

    @abstractmethod
    def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
        long_reads: AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that are readable now; see `JobService.read_logs`.

        Args:
            job_id: See `JobService.read_logs`.
            cursor: See `JobService.read_logs`.
            since_ms: See `JobService.read_logs`.
            late_window_s: See `JobService.read_logs`.
            long_reads: Entered, once at most, while a job has a reply of its own, which can be long: limits how many
                there are at a time.
        """


class ChangeFeed(Protocol):
    """Change notifications of jobs. They make polling cheaper and are never relied on: some may be lost."""

    def follow(self, job_id: str) -> bool:
        """Begin to report changes of a job; False if that is not possible and the job must be polled."""
        ...

    def leave(self, job_id: str) -> None:
        """Stop reporting changes of a job, also of one that was not followed."""
        ...

    async def wait(self) -> Collection[str] | None:
        """Wait for changes and return the ids of the changed jobs: followed ones, and new ones.

        Returns:
            The ids; None when notifications were lost and every job may have changed.

        Raises:
            ServiceError: No further notification will come: close this feed and open another.
        """
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class ChangeFeedService(JobService):
    """A service that notifies of changes, so that silent jobs need not be polled."""

    @abstractmethod
    def open_changes(self) -> ChangeFeed | None:
        """Open a feed of changes; None if that is not possible now."""

    async def rows(self, job_ids: Collection[str]) -> Sequence[ListedJob] | None:
        """Return the rows that `list_jobs` has of some jobs, which the feed has reported.

        With it, a new job costs an agent the same however many jobs the service has.

        Args:
            job_ids: The jobs; those that do not exist are left out.

        Returns:
            The rows, newest first; None if the service can only list all jobs.
        """
        return None
