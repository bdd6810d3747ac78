"""The clients: `Client` for ordinary code, `AsyncJobClient` to ``await``, and `RunResponse`, a status with the verbs.

A client holds its own settings and connections. The functions in `tailspan.jobs` use one client for the whole process.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from tailspan._caller import for_callers_of
from tailspan._clock import Clock
from tailspan._direct import iterate_directly, run_directly
from tailspan._rows import Rows
from tailspan._times import Seconds, Since, seconds_of, since_ms_of
from tailspan._verbs import AsyncVerbs, card_in_notebook, in_progress_text
from tailspan.errors import ConfigError, InProgressWarning
from tailspan.local.run_settings import is_plain
from tailspan.logs.follow import SETTLE_S, TailUpdate
from tailspan.logs.page import Message
from tailspan.models import CoerceableToJobId, JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import JobService

if TYPE_CHECKING:
    from tailspan._portal import Portal
    from tailspan.config import Settings

__all__ = ["AsyncJobClient", "Client", "Jobs", "RunResponse", "process_client"]

P = ParamSpec("P")
T = TypeVar("T")


@for_callers_of
class AsyncJobClient(AsyncVerbs["RunResponse"]):
    """Every verb as an awaitable method, over any configured service.

    Methods have the parameters and errors of the functions in `tailspan.jobs`, and two names each: ``get_logs`` and
    ``job_get_logs``. One client belongs to one event loop. Services are opened at first use, kept, and closed with
    the client.

    Example:
        >>> async with AsyncJobClient() as client:
        ...     status = await client.wait_for_job("nightly-42", timeout=3600)
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        service: str | JobService | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make a client. Nothing is read or opened before the first verb.

        Args:
            settings: The configuration; None loads it as the command line does (``TAILSPAN_CONFIG``, environment).
            service: The service of calls that name none; None is ``default_service`` of the configuration.
            clock: The clock that deadlines and waits go by; None is real time.
        """
        super().__init__(settings, service, clock, _response)


@for_callers_of
class Client:
    """Every verb as a method, over any configured service; works in scripts, notebooks and threads, and after a fork.

    Services are opened at first use, kept, and closed with the client. A closed client opens again at its next call.

    Attributes:
        jobs: The service's jobs as objects: get one, list them, submit one.

    Example:
        >>> with Client(settings, service="local") as client:
        ...     client.jobs.get("nightly-42").tail_logs()
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        service: str | JobService | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make a client. Nothing is read or opened, and no thread started, before the first verb.

        Args:
            settings: The configuration; None loads it as the command line does (``TAILSPAN_CONFIG``, environment).
            service: The service of calls that name none; None is ``default_service`` of the configuration.
            clock: The clock that deadlines and waits go by; None is real time.
        """
        self._clock = clock or Clock()
        self._settings = settings
        self._service = service
        self._direct = self._make_verbs()
        self._portals: list[Portal[AsyncVerbs[RunResponse]]] = []
        self.jobs = Jobs(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel running calls of other threads and close the services that this client opened.

        Service objects given by the caller stay open.
        """
        for portal in self._portals:
            portal.close()

    def get_logs(
        self,
        job: CoerceableToJobId,
        since_ms: Since | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> Rows[Message]:
        """Return the job's lines; see `tailspan.job_get_logs`."""
        return self._read(job, service, AsyncVerbs.get_logs, job, self._since_ms(since_ms), task=task, service=service)

    def get_tasks(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> Rows[TaskRun]:
        """Return the job's tasks; see `tailspan.job_get_tasks`."""
        return self._read(job, service, AsyncVerbs.get_tasks, job, service=service)

    def print_logs(
        self,
        job: CoerceableToJobId,
        since_ms: Since | None = None,
        file: IO[str] | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> None:
        """Print the job's lines; see `tailspan.job_print_logs`."""
        from tailspan.logs.printing import LinePrinter

        printer = LinePrinter(file or sys.stdout)
        printer.shows_tasks = task is None and self._read(job, service, AsyncVerbs.has_tasks, job, service=service)
        for messages in self._log_pages(job, since_ms, task, service):
            printer.messages(messages)

    def tail_logs(
        self,
        job: CoerceableToJobId,
        refresh_seconds: Seconds = 1,
        sample_logs: bool = True,
        timeout: Seconds | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        file: IO[str] | None = None,
        settle_seconds: Seconds = SETTLE_S,
    ) -> None:
        """Print the job's lines as they come; see `tailspan.job_tail_logs`."""
        from tailspan.logs.printing import TailPrinter

        printer = TailPrinter(file or sys.stdout)
        card = card_in_notebook(self._clock) if file is None else None
        for update in self.follow_logs(
            job,
            refresh_seconds,
            sample_logs,
            timeout,
            get_logs_retries,
            service=service,
            settle_seconds=settle_seconds,
        ):
            if card is not None:
                card.update(update.status)
            printer.update(update)

    def get_status(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
        """Return the job's status; see `tailspan.job_get_status`."""
        return self._read(job, service, AsyncVerbs.get_status, job, service=service)

    def cancel(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
        """Cancel the job; see `tailspan.job_cancel`."""
        return self._portal.call(AsyncVerbs.cancel, job, service=service)

    def get_exec_time(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> timedelta:
        """Return the time from first to last line; see `tailspan.job_get_exec_time`."""
        return self._exec_time(job, service)

    def wait_for_job(
        self,
        job: CoerceableToJobId,
        poll_interval_seconds: Seconds = 5,
        timeout: Seconds | None = None,
        *,
        service: str | JobService | None = None,
        delivered: bool = False,
    ) -> RunResponse:
        """Wait until the job has ended; see `tailspan.job_wait_for_job`."""
        poll_s, timeout_s = seconds_of(poll_interval_seconds), seconds_of(timeout)
        card = card_in_notebook(self._clock)
        if card is None:
            return self._portal.call(
                AsyncVerbs.wait_for_job, job, poll_s, timeout_s, service=service, delivered=delivered
            )
        # In this thread: what another one displays may go to another cell.
        for status in self._portal.iterate(
            AsyncVerbs.follow_status, job, poll_s, timeout_s, service=service, delivered=delivered
        ):
            card.update(status)
        card.close(status)
        return status

    def list_jobs(
        self,
        limit: int | None = 50,
        *,
        name: str | None = None,
        state: JobState | str | None = None,
        service: str | JobService | None = None,
    ) -> Rows[ListedJob]:
        """Return the service's jobs, newest first; see `tailspan.job_list`."""
        return self._read(None, service, AsyncVerbs.list_jobs, limit, name=name, state=state, service=service)

    def submit(
        self,
        command: str | Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout: Seconds | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        service: str | JobService | None = None,
    ) -> RunResponse:
        """Start a command as a job; see `tailspan.job_submit`."""
        return self._portal.call(
            AsyncVerbs.submit,
            command,
            name=name,
            attributes=attributes,
            timeout=seconds_of(timeout),
            cwd=cwd,
            env=env,
            service=service,
        )

    def iter_logs(
        self,
        job: CoerceableToJobId,
        since_ms: Since | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> Generator[Message, None, None]:
        """Yield the lines that are readable now, one by one, in the order of the service.

        Holds two pages of lines at most, and reads no further than the caller iterates. The caller may stop early.

        Args:
            job: A job id, a status, or a row of a listing.
            since_ms: Only lines at or after this: ms since the epoch, an aware datetime, or a timedelta ago.
            task: Only lines of the task with this name or id.
            service: The service's name, or the service; None: the job's own, or the default one.

        Raises:
            JobNotFoundError: The service has no such job.
            ServiceError: The service failed.
        """
        for messages in self._log_pages(job, since_ms, task, service):
            yield from messages

    def follow_logs(
        self,
        job: CoerceableToJobId,
        refresh_seconds: Seconds = 1,
        sample_logs: bool = False,
        timeout: Seconds | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        settle_seconds: Seconds = SETTLE_S,
    ) -> Generator[TailUpdate, None, None]:
        """Yield updates of a job until it has ended and its last line was read, or until the timeout.

        Takes the arguments of `tailspan.job_tail_logs` and raises its errors. Is one update ahead at most. The caller
        may stop early.

        Yields:
            At least one update per refresh, with or without lines; the last one is ``complete``, except after a
            timeout.
        """
        yield from self._portal.iterate(
            AsyncVerbs.follow_logs,
            job,
            seconds_of(refresh_seconds),
            sample_logs,
            seconds_of(timeout),
            get_logs_retries,
            service=service,
            settle_seconds=seconds_of(settle_seconds),
        )

    def _log_pages(
        self, job: CoerceableToJobId, since_ms: Since | None, task: str | None, service: str | JobService | None
    ) -> Generator[Sequence[Message], None, None]:
        since = self._since_ms(since_ms)
        if self._direct.reads_directly(job, service=service):
            return iterate_directly(self._direct.iter_logs(job, since, task=task, service=service))
        return self._portal.iterate(AsyncVerbs.iter_logs, job, since, task=task, service=service)

    def _exec_time(self, job: CoerceableToJobId, service: str | JobService | None) -> timedelta:
        """Return the execution time; a warning points at the caller of this method's caller."""
        exec_time, status = self._read(job, service, AsyncVerbs.exec_time_and_status, job, service=service)
        if not status.state.is_terminal:
            warnings.warn(in_progress_text(status), InProgressWarning, stacklevel=4)
        return exec_time

    def _read(
        self,
        job: CoerceableToJobId | None,
        service: str | JobService | None,
        function: Callable[Concatenate[AsyncVerbs[RunResponse], P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a verb that only reads: in this thread, where it waits for nothing, else in the background loop."""
        if self._direct.reads_directly(job, service=service):
            return run_directly(function(self._direct, *args, **kwargs))
        return self._portal.call(function, *args, **kwargs)

    @property
    def _portal(self) -> Portal[AsyncVerbs[RunResponse]]:
        """The background loop; made at first use, because asyncio and anyio are slow to import."""
        if not self._portals:
            from tailspan._portal import Portal

            # If two threads come here, both use the first; the other has started nothing.
            self._portals.append(Portal(self._make_verbs))
        return self._portals[0]

    def _make_verbs(self) -> AsyncVerbs[RunResponse]:
        return AsyncVerbs(self._settings, self._service, self._clock, self._response)

    def _links_of(self, status: JobStatus) -> Mapping[str, str]:
        """Return the configured links of a job; none where the configuration cannot be read."""
        if self._settings is None and is_plain(os.environ):
            return {}
        try:
            return self._direct.settings.links.of(status)
        except ConfigError:
            return {}

    def _response(self, status: JobStatus) -> RunResponse:
        return _response(status, self)

    def _since_ms(self, since: Since | None) -> int | None:
        return since_ms_of(since, self._clock.wall_s())


@for_callers_of
class Jobs:
    """The jobs of a client's service; see `Client`."""

    def __init__(self, client: Client) -> None:
        """Use the connections of a client."""
        self._client = client

    def get(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
        """Return a job's status, which has the verbs as methods; see `tailspan.job_get_status`."""
        return self._client.get_status(job, service=service)

    def submit(
        self,
        command: str | Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout: Seconds | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        service: str | JobService | None = None,
    ) -> RunResponse:
        """Start a command as a job; see `tailspan.job_submit`."""
        return self._client.submit(
            command,
            name=name,
            attributes=attributes,
            timeout=timeout,
            cwd=cwd,
            env=env,
            service=service,
        )

    def list(
        self,
        limit: int | None = 50,
        *,
        name: str | None = None,
        state: JobState | str | None = None,
        service: str | JobService | None = None,
    ) -> Rows[ListedJob]:
        """Return the jobs, newest first; see `tailspan.job_list`."""
        return self._client.list_jobs(limit, name=name, state=state, service=service)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
@for_callers_of
class RunResponse(JobStatus):
    """The status of one job, with the verbs as methods; see `JobStatus` for its fields.

    Methods use the client and the service that returned the status; a status from elsewhere (unpickled, or made by a
    service) uses those of the functions in `tailspan.jobs`. Each method takes the options of its function.
    """

    _client: Client | None = None

    def get_status(self, *, service: str | JobService | None = None) -> RunResponse:
        """Return this job's status as it is now; see `tailspan.job_get_status`."""
        return self._verbs.get_status(self, service=service)

    def get_logs(
        self, since_ms: Since | None = None, *, task: str | None = None, service: str | JobService | None = None
    ) -> Rows[Message]:
        """Return this job's lines; see `tailspan.job_get_logs`."""
        return self._verbs.get_logs(self, since_ms, task=task, service=service)

    def iter_logs(
        self, since_ms: Since | None = None, *, task: str | None = None, service: str | JobService | None = None
    ) -> Generator[Message, None, None]:
        """Yield this job's lines one by one; see `Client.iter_logs`."""
        yield from self._verbs.iter_logs(self, since_ms, task=task, service=service)

    def get_tasks(self, *, service: str | JobService | None = None) -> Rows[TaskRun]:
        """Return this job's tasks; see `tailspan.job_get_tasks`."""
        return self._verbs.get_tasks(self, service=service)

    def print_logs(
        self,
        since_ms: Since | None = None,
        file: IO[str] | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> None:
        """Print this job's lines; see `tailspan.job_print_logs`."""
        self._verbs.print_logs(self, since_ms, file, task=task, service=service)

    def tail_logs(
        self,
        refresh_seconds: Seconds = 1,
        sample_logs: bool = True,
        timeout: Seconds | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        file: IO[str] | None = None,
        settle_seconds: Seconds = SETTLE_S,
    ) -> None:
        """Print this job's lines as they come; see `tailspan.job_tail_logs`."""
        self._verbs.tail_logs(
            self,
            refresh_seconds,
            sample_logs,
            timeout,
            get_logs_retries,
            service=service,
            file=file,
            settle_seconds=settle_seconds,
        )

    def follow_logs(
        self,
        refresh_seconds: Seconds = 1,
        sample_logs: bool = False,
        timeout: Seconds | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        settle_seconds: Seconds = SETTLE_S,
    ) -> Generator[TailUpdate, None, None]:
        """Yield updates of this job; see `Client.follow_logs`."""
        yield from self._verbs.follow_logs(
            self,
            refresh_seconds,
            sample_logs,
            timeout,
            get_logs_retries,
            service=service,
            settle_seconds=settle_seconds,
        )

    def get_exec_time(self, *, service: str | JobService | None = None) -> timedelta:
        """Return the time from first to last line; see `tailspan.job_get_exec_time`."""
        return self._verbs._exec_time(self, service)

    def wait_for_job(
        self,
        poll_interval_seconds: Seconds = 5,
        timeout: Seconds | None = None,
        *,
        service: str | JobService | None = None,
        delivered: bool = False,
    ) -> RunResponse:
        """Wait until this job has ended; see `tailspan.job_wait_for_job`."""
        return self._verbs.wait_for_job(self, poll_interval_seconds, timeout, service=service, delivered=delivered)

    def cancel(self, *, service: str | JobService | None = None) -> RunResponse:
        """Cancel this job; see `tailspan.job_cancel`."""
        return self._verbs.cancel(self, service=service)

    def _repr_html_(self) -> str:
        from tailspan._notebook import job_card

        return job_card(self, self._verbs._links_of(self))

    @property
    def _verbs(self) -> Client:
        return self._client or process_client()


_process_client = Client()


def process_client() -> Client:
    """Return the client that the functions in `tailspan.jobs` share; it loads its settings at first use."""
    return _process_client


def _response(status: JobStatus, client: Client | None = None) -> RunResponse:
    """Return a status with the verbs of a client."""
    fields = {one.name: getattr(status, one.name) for one in dataclasses.fields(JobStatus)}
    return RunResponse(**fields, _client=client)
