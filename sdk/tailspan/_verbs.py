"""`AsyncVerbs`: the logic of every verb, once. The clients, `tailspan.jobs` and the command line only call it."""

from __future__ import annotations

import fnmatch
import math
import operator
import os
import sys
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import IO, TYPE_CHECKING, Generic, Self, TypeVar

from tailspan._clock import Clock
from tailspan._job_search import find_job, statuses_of, with_names
from tailspan._polling import LogPoll, PollPause, StatusPoll, newer, newest_of, stamped
from tailspan._rows import Rows
from tailspan.errors import ConfigError, InProgressWarning, RequestRejectedError, ServiceError
from tailspan.local.job_name import shell_name
from tailspan.logs.clean import printable
from tailspan.logs.follow import SETTLE_S, Follower, TailUpdate
from tailspan.logs.page import Message, OpenLine
from tailspan.models import CoerceableToJobId, JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import JobService, SubmitService, TaskService
from tailspan.services._pool import OpenedServices

if TYPE_CHECKING:
    from tailspan._notebook import LiveCard
    from tailspan.config import Settings

__all__ = ["AsyncVerbs", "card_in_notebook", "in_progress_text"]

StatusT = TypeVar("StatusT", bound=JobStatus)

_STATUS_ROWS = 50
_LAST_REQUEST_S = 0.5  # a request in flight at the deadline may still be answered for this long


class AsyncVerbs(Generic[StatusT]):
    """Every verb as an awaitable method, over any configured service; see `tailspan.AsyncJobClient`."""

    def __init__(
        self,
        settings: Settings | None,
        service: str | JobService | None,
        clock: Clock | None,
        answer: Callable[[JobStatus], StatusT],
    ) -> None:
        """Open nothing yet.

        Args:
            settings: The configuration; None loads it as the command line does.
            service: The service of calls that name none; None is ``default_service`` of the configuration.
            clock: The clock that deadlines and waits go by; None is real time.
            answer: Makes of a status what the verbs return.
        """
        self._opened = OpenedServices(settings, service)
        self._clock = clock or Clock()
        self._answer = answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the services that this client opened. Service objects given by the caller stay open."""
        await self._opened.aclose()

    @property
    def settings(self) -> Settings:
        """The configuration, loaded at first use.

        Raises:
            ConfigError: It cannot be read, or a key is wrong.
        """
        return self._opened.settings

    def service(self, which: str | JobService | None = None) -> JobService:
        """Return the service of that name, opened at first use; an object is returned as it is.

        Raises:
            ConfigError: No such service is configured, or its options are wrong.
        """
        return self._opened.service(which)

    def reads_directly(self, job: CoerceableToJobId | None = None, *, service: str | JobService | None = None) -> bool:
        """Return whether the verbs that read a job, or list all, can run by `tailspan._direct`.

        Raises:
            ConfigError: The argument names no job, or the configuration cannot be read.
        """
        return self._opened.reads_directly(job, service)

    async def get_logs(
        self,
        job: CoerceableToJobId,
        since_ms: int | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> Rows[Message]:
        """Return the job's lines; see `tailspan.job_get_logs`."""
        messages: Rows[Message] = Rows()
        async with aclosing(self.iter_logs(job, since_ms, task=task, service=service)) as pages:
            async for page in pages:
                messages += page
        # Stable: lines of one millisecond keep the service's order.
        messages.sort(key=operator.itemgetter("timestamp"))
        return messages

    async def print_logs(
        self,
        job: CoerceableToJobId,
        since_ms: int | None = None,
        file: IO[str] | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> None:
        """Print the job's lines; see `tailspan.job_print_logs`."""
        from tailspan.logs.printing import LinePrinter

        printer = LinePrinter(file or sys.stdout)
        printer.shows_tasks = task is None and await self.has_tasks(job, service=service)
        async with aclosing(self.iter_logs(job, since_ms, task=task, service=service)) as pages:
            async for page in pages:
                printer.messages(page)
        printer.open_line(await self.open_line(job, service=service))

    async def tail_logs(
        self,
        job: CoerceableToJobId,
        refresh_seconds: float = 1,
        sample_logs: bool = True,
        timeout: float | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        file: IO[str] | None = None,
        settle_seconds: float = SETTLE_S,
    ) -> None:
        """Print the job's lines as they come; see `tailspan.job_tail_logs`."""
        from tailspan.logs.printing import TailPrinter

        printer = TailPrinter(file or sys.stdout)
        updates = self.follow_logs(
            job,
            refresh_seconds,
            sample_logs,
            timeout,
            get_logs_retries,
            service=service,
            settle_seconds=settle_seconds,
        )
        card = card_in_notebook(self._clock) if file is None else None
        async with aclosing(updates) as following:
            async for update in following:
                if card is not None:
                    card.update(update.status)
                printer.update(update)

    async def get_status(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> StatusT:
        """Return the job's status; see `tailspan.job_get_status`."""
        chosen, job_id = self._opened.find(job, service)
        return self._answer(stamped(await chosen.get_job(job_id), chosen))

    async def find_job(self, text: str | None, *, service: str | JobService | None = None) -> StatusT:
        """Return the status of the job that a user names: by id, by name (the newest run), or by an id's beginning.

        Args:
            text: What names the job; None: the newest job.
            service: The service's name, or the service; None: the default one.

        Raises:
            ConfigError: The text is the beginning of several ids; names them.
            JobNotFoundError: No job matches.
            ServiceError: The service failed.
        """
        return self._answer(await find_job(self.service(service), text))

    async def cancel(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> StatusT:
        """Cancel the job; see `tailspan.job_cancel`."""
        chosen, job_id = self._opened.find(job, service)
        status = await chosen.get_job(job_id)
        if not status.state.is_terminal:
            try:
                status = await chosen.cancel(job_id)
            except RequestRejectedError:
                # The job may have ended between the two requests; some services reject that.
                status = await chosen.get_job(job_id)
                if not status.state.is_terminal:
                    raise
        return self._answer(stamped(status, chosen))

    async def get_exec_time(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> timedelta:
        """Return the time from first to last line; see `tailspan.job_get_exec_time`."""
        exec_time, status = await self.exec_time_and_status(job, service=service)
        if not status.state.is_terminal:
            warnings.warn(in_progress_text(status), InProgressWarning, stacklevel=3)
        return exec_time

    async def wait_for_job(
        self,
        job: CoerceableToJobId,
        poll_interval_seconds: float = 5,
        timeout: float | None = None,
        *,
        service: str | JobService | None = None,
        delivered: bool = False,
        on_status: Callable[[StatusT], None] | None = None,
    ) -> StatusT:
        """Wait until the job has ended; see `tailspan.job_wait_for_job`.

        Args:
            job: A job id, a status, or a row of a listing.
            poll_interval_seconds: Seconds between two status requests.
            timeout: Give up after this many seconds; None: never.
            service: The service's name, or the service; None: the job's own, or the default one.
            delivered: Wait also until the agent has acknowledged the job's last line.
            on_status: Called with each status before the last, to show progress.
        """
        card = card_in_notebook(self._clock) if on_status is None else None
        last: StatusT | None = None
        statuses = self.follow_status(job, poll_interval_seconds, timeout, service=service, delivered=delivered)
        async with aclosing(statuses) as following:
            async for status in following:
                last = status
                if on_status is not None and not status.state.is_terminal:
                    on_status(status)
                if card is not None:
                    card.update(status)
        assert last is not None
        if card is not None:
            card.close(last)
        return last

    async def follow_status(
        self,
        job: CoerceableToJobId,
        poll_interval_seconds: float = 5,
        timeout: float | None = None,
        *,
        service: str | JobService | None = None,
        delivered: bool = False,
    ) -> AsyncGenerator[StatusT, None]:
        """Yield each status of a job until it has ended.

        Takes the arguments of `wait_for_job` and raises its errors.
        """
        _check_seconds("poll_interval_seconds", poll_interval_seconds, minimum=0.001)
        chosen, job_id = self._opened.find(job, service)
        deadline = self._deadline(timeout)
        poll = StatusPoll(chosen, job_id, self._clock, deadline, grace_s=_LAST_REQUEST_S)
        pause = PollPause(chosen, job_id, self._clock)
        with closing(pause):
            while True:
                status = await poll.ask()
                if status is not None and status.state.is_terminal:
                    break
                now = self._clock.monotonic_s()
                if status is None or now >= deadline:
                    error = poll.timeout_error(timeout or 0.0)
                    error.last_status = error.last_status and self._answer(error.last_status)
                    raise error from poll.last_error
                yield self._answer(status)
                await pause.wait(min(poll_interval_seconds, deadline - now))
        if delivered:
            from tailspan._delivery import wait_until_delivered  # imports an HTTP client

            await wait_until_delivered(self.settings, chosen, status, self._clock, deadline)
        yield self._answer(status)

    async def iter_logs(
        self,
        job: CoerceableToJobId,
        since_ms: int | None = None,
        *,
        task: str | None = None,
        service: str | JobService | None = None,
    ) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the lines that are readable now, some thousands at a time, in the order of the service.

        Args:
            job: A job id, a status, or a row of a listing.
            since_ms: Only lines whose time is at or after this, in ms since the epoch.
            task: Only lines of the task with this name or id.
            service: The service's name, or the service; None: the job's own, or the default one.

        Raises:
            JobNotFoundError: The service has no such job.
            ServiceError: The service failed.
        """
        chosen, job_id = self._opened.find(job, service)
        async with aclosing(chosen.read_messages(job_id, since_ms)) as pages:
            async for page in pages:
                yield page if task is None else [one for one in page if task in (one.get("task"), one.get("task_id"))]

    async def get_tasks(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> Rows[TaskRun]:
        """Return the job's tasks; see `tailspan.job_get_tasks`."""
        chosen, job_id = self._opened.find(job, service)
        if isinstance(chosen, TaskService):
            return Rows(await chosen.list_tasks(job_id))
        await chosen.get_job(job_id)
        return Rows()

    async def has_tasks(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> bool:
        """Return whether the job has more than one task, so that its lines are printed with the task's name.

        Raises:
            JobNotFoundError: The service has no such job.
            ServiceError: The service failed.
        """
        chosen, job_id = self._opened.find(job, service)
        return isinstance(chosen, TaskService) and (await chosen.get_job(job_id)).total_tasks > 1

    async def open_line(self, job: CoerceableToJobId, *, service: str | JobService | None = None) -> OpenLine | None:
        """Return the last line of a running job while its newline has not come; None without one.

        Args:
            job: A job id, a status, or a row of a listing.
            service: The service's name, or the service; None: the job's own, or the default one.
        """
        chosen, job_id = self._opened.find(job, service)
        return await _open_line_of(chosen, job_id)

    async def follow_logs(
        self,
        job: CoerceableToJobId,
        refresh_seconds: float = 1,
        sample_logs: bool = False,
        timeout: float | None = None,
        get_logs_retries: int = 1,
        *,
        service: str | JobService | None = None,
        settle_seconds: float = SETTLE_S,
    ) -> AsyncGenerator[TailUpdate, None]:
        """Yield updates of a job until it has ended and its last line was read, or until the timeout.

        Takes the arguments of `tailspan.job_tail_logs` and raises its errors.

        Yields:
            At least one update per refresh, with or without lines; the last one is ``complete``, except after a
            timeout.
        """
        _check_seconds("refresh_seconds", refresh_seconds, minimum=0.001)
        chosen, job_id = self._opened.find(job, service)
        clock, deadline = self._clock, self._deadline(timeout)
        poll = StatusPoll(chosen, job_id, clock, deadline)
        follower = Follower(poll_min_s=refresh_seconds, poll_max_s=refresh_seconds, settle_s=settle_seconds)
        reader = LogPoll(chosen, job_id, clock, deadline, retries=get_logs_retries)
        while True:
            reported = await poll.ask()
            if reported is None:
                return
            status = self._answer(reported)
            if not status.stale:
                follower.on_status(status, clock.monotonic_s(), clock.wall_s())
            started = clock.monotonic_s()
            lines = 0
            newest: Message | None = None
            async with aclosing(reader.read()) as pages:
                async for page in pages:
                    lines += page.line_count
                    if sample_logs:
                        newest = newer(newest, newest_of(page))
                    else:
                        yield TailUpdate(status=status, messages=list(page.messages()), gap=reader.take_gap())
            if reader.time_is_up:
                return
            follower.on_read(lines, started)
            open_line = None if follower.complete else await _open_line_of(chosen, job_id)
            yield TailUpdate(
                status=status,
                messages=(newest,) if newest else (),
                left_out=lines - 1 if newest else 0,
                gap=reader.take_gap(),
                complete=follower.complete,
                open_line=open_line,
            )
            now = clock.monotonic_s()
            if follower.complete or now >= deadline:
                return
            await clock.sleep(min(follower.delay_s(now), deadline - now))

    async def exec_time_and_status(
        self, job: CoerceableToJobId, *, service: str | JobService | None = None
    ) -> tuple[timedelta, StatusT]:
        """Return the time from first to last line, and the status before that: final if the time is final.

        Raises:
            JobNotFoundError: The service has no such job.
            ServiceError: The service failed.
        """
        chosen, job_id = self._opened.find(job, service)
        status = self._answer(stamped(await chosen.get_job(job_id), chosen))
        times = await chosen.log_times_ms(job_id)
        first, last = times or (0, 0)
        return timedelta(milliseconds=max(0, last - first)), status

    async def list_jobs(
        self,
        limit: int | None = 50,
        *,
        name: str | None = None,
        state: JobState | str | None = None,
        service: str | JobService | None = None,
    ) -> Rows[ListedJob]:
        """Return the service's jobs, newest first; see `tailspan.job_list`."""
        rows: Rows[ListedJob] = Rows()
        async with aclosing(self._listed(name=name, state=state, service=service)) as pages:
            async for page in pages:
                rows.extend(page)
                if limit is not None and len(rows) >= limit:
                    break
        return rows if limit is None else Rows(rows[:limit])

    async def list_with_status(
        self,
        limit: int | None = 50,
        *,
        name: str | None = None,
        state: JobState | str | None = None,
        since: datetime | None = None,
        attributes: Mapping[str, str] | None = None,
        service: str | JobService | None = None,
    ) -> list[tuple[ListedJob, StatusT | None]]:
        """Return the service's jobs, newest first, each with its status: one request for each job.

        Args:
            limit: Maximum number of jobs; None: all.
            name: Only jobs whose name matches this pattern, such as ``etl-*``.
            state: Only jobs in this state.
            since: Only jobs that were submitted, or started, at or after this time (aware).
            attributes: Only jobs that have all of these attributes.
            service: The service's name, or the service; None: the default one.

        Returns:
            Rows and statuses; the status is None where this user may not read it.

        Raises:
            ConfigError: There is no such state or service.
            ServiceError: The service failed.
        """
        chosen = self.service(service)
        found: list[tuple[ListedJob, StatusT | None]] = []
        async with aclosing(self._listed(name=name, state=state, since=since, service=service)) as pages:
            async for page in pages:
                position = 0
                while position < len(page):
                    # With a filter, more rows than are missing are requested at once.
                    missing = _STATUS_ROWS if limit is None or attributes else limit - len(found)
                    rows = page[position : position + min(_STATUS_ROWS, missing)]
                    position += len(rows)
                    for row, status in await statuses_of(rows, chosen):
                        if _has(status, since, attributes or {}):
                            found.append((row, None if status is None else self._answer(status)))
                    if limit is not None and len(found) >= limit:
                        return found[:limit]
        return found

    async def _listed(
        self,
        *,
        name: str | None,
        state: JobState | str | None,
        since: datetime | None = None,
        service: str | JobService | None,
    ) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the rows of the service's jobs with this name, state and age, newest first, page by page."""
        chosen = self.service(service)
        wanted = None if state is None else _state(state)
        async with aclosing(chosen.list_jobs()) as pages:
            async for page in pages:
                found = [row for row in page if (wanted is None or row.state is wanted) and not _is_before(row, since)]
                if name is not None:
                    found = [
                        row for row in await with_names(found, chosen) if fnmatch.fnmatchcase(row.job_name or "", name)
                    ]
                yield [stamped(row, chosen) for row in found]
                if page and _is_before(page[-1], since):
                    return  # newest first: all others are older

    async def submit(
        self,
        command: str | Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        service: str | JobService | None = None,
    ) -> StatusT:
        """Start a command as a job; see `tailspan.job_submit`."""
        chosen = self.service(service)
        if name is None and isinstance(command, str):
            name = shell_name(command)
        if not isinstance(chosen, SubmitService):
            raise ConfigError(
                f"the service {chosen.name!r} cannot run jobs: submit to another service", service=chosen.name
            )
        arguments = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        if not command or not all(isinstance(one, str) for one in arguments):
            raise ConfigError(
                "there is no command to run: give a string, or a list of strings", key="command", service=chosen.name
            )
        if timeout is not None:
            _check_seconds("timeout", timeout, minimum=0.0)
        status = await chosen.submit(
            arguments,
            name=name,
            attributes=attributes,
            timeout_s=timeout,
            cwd=None if cwd is None else os.fspath(cwd),
            env=env,
        )
        return self._answer(stamped(status, chosen))

    # The names of the functions in `tailspan.jobs`.
    job_get_logs = get_logs
    job_get_tasks = get_tasks
    job_print_logs = print_logs
    job_tail_logs = tail_logs
    job_get_status = get_status
    job_cancel = cancel
    job_get_exec_time = get_exec_time
    job_wait_for_job = wait_for_job
    job_list = list_jobs
    job_submit = submit

    def _deadline(self, timeout: float | None) -> float:
        return math.inf if timeout is None else self._clock.monotonic_s() + timeout


def card_in_notebook(clock: Clock) -> LiveCard | None:
    """Return a card that shows a job in the running cell; None outside of a notebook.

    Args:
        clock: The clock of the verb.
    """
    if "IPython" not in sys.modules:
        return None
    from tailspan._notebook import live_card

    return live_card(clock)


async def _open_line_of(service: JobService, job_id: str) -> OpenLine | None:
    # It is an extra: without it, every line still comes.
    with suppress(ServiceError):
        return await service.open_line(job_id)
    return None


def in_progress_text(status: JobStatus) -> str:
    """Return the warning that an execution time is not final."""
    return f"job {printable(status.job_id, colours=False)} is {status.state}: this is its execution time so far"


def _is_before(row: ListedJob, since: datetime | None) -> bool:
    return since is not None and row.created_at is not None and row.created_at < since


def _has(status: JobStatus | None, since: datetime | None, attributes: Mapping[str, str]) -> bool:
    """Return whether a job has these attributes and is not older; what is not known does not exclude it by its age."""
    if status is None:
        return not attributes
    began = status.submitted_at or status.started_at
    if since is not None and began is not None and began < since:
        return False
    return all(status.attributes.get(key) == value for key, value in attributes.items())


def _state(state: JobState | str) -> JobState:
    try:
        return JobState(state.upper())
    except ValueError:
        known = ", ".join(JobState)
        raise ConfigError(f"{state!r} is not a job state; there is: {known}", key="state") from None


def _check_seconds(name: str, seconds: float, *, minimum: float) -> None:
    if not seconds >= minimum:
        raise ConfigError(f"{name} is {seconds!r}: expected seconds, {minimum:g} or more", key=name)
