"""Polls of one job until a deadline, with retries of transient failures."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from tailspan._backoff import backoff_s
from tailspan._clock import Clock
from tailspan._durations import duration_text
from tailspan.errors import (
    CursorExpiredError,
    ProtocolError,
    ServiceError,
    ServiceUnavailableError,
    WaitTimeoutError,
)
from tailspan.logs.page import LogPage, Message
from tailspan.models import JobStatus, ListedJob
from tailspan.services import ChangeFeed, ChangeFeedService, JobService

__all__ = ["UNANSWERED_S", "LogPoll", "PollPause", "StatusPoll", "newer", "newest_of", "stamped"]

Answer = TypeVar("Answer", JobStatus, ListedJob)

_LEAST_PAUSE_S = 0.05

UNANSWERED_S = 60.0
"""How long the requests of a job may fail after one that succeeded, in seconds."""


class StatusPoll:
    """Polls a job's status.

    Attributes:
        last: The newest answer, if there was any.
        last_error: The error of the newest request; None if it succeeded.
    """

    def __init__(
        self, service: JobService, job_id: str, clock: Clock, deadline_s: float, *, grace_s: float = 0.0
    ) -> None:
        """Poll nothing yet.

        Args:
            service: Where the job runs.
            job_id: Its id there.
            clock: The clock that deadlines and waits go by.
            deadline_s: When to stop, in monotonic seconds of the clock.
            grace_s: Seconds after the deadline in which a reply still counts.
        """
        self.last: JobStatus | None = None
        self.last_error: ServiceError | None = None
        self._service = service
        self._job_id = job_id
        self._clock = clock
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._answered_s = 0.0

    async def ask(self) -> JobStatus | None:
        """Return the present status; the last one, ``stale``, if the request failed; None if none came in time.

        Raises:
            JobNotFoundError: The service has no such job.
            ServiceError: The first request failed, requests failed for `UNANSWERED_S`, or the service rejects them.
        """
        import anyio  # reading local files needs no event loop

        left_s = max(0.0, self._deadline_s - self._clock.monotonic_s())
        with anyio.move_on_after(left_s + self._grace_s):
            try:
                self.last = stamped(await self._service.get_job(self._job_id), self._service)
            except (ServiceUnavailableError, ProtocolError) as error:
                self.last_error = error
                if self.last is None or self._clock.monotonic_s() - self._answered_s > UNANSWERED_S:
                    raise
            else:
                self.last_error = None
                self._answered_s = self._clock.monotonic_s()
                return self.last
        return None if self.last is None else dataclasses.replace(self.last, stale=True)

    def timeout_error(self, timeout_s: float) -> WaitTimeoutError:
        """Return the error for a job that did not end in time, with its last status."""
        seen = f"it is {self.last.state}" if self.last else "its status was not answered"
        fault = f"; the last request failed: {self.last_error}" if self.last_error else ""
        return WaitTimeoutError(
            f"job {self._job_id} had not ended after {duration_text(timeout_s)}: {seen}{fault}",
            last_status=self.last,
            service=self._service.name,
            job_id=self._job_id,
        )


class PollPause:
    """Waits between two polls of a job: until its service notifies of a change, at most for the poll interval."""

    def __init__(self, service: JobService, job_id: str, clock: Clock) -> None:
        """Open nothing yet.

        Args:
            service: Where the job runs. Where a poll costs a request, the poll interval stays as it is.
            job_id: Its id there.
            clock: The clock that waits go by.
        """
        self._service = service
        self._job_id = job_id
        self._clock = clock
        self._feed: ChangeFeed | None = None
        self._reports_changes = service.polls_are_free and isinstance(service, ChangeFeedService)
        self._may_open = self._reports_changes

    async def wait(self, seconds: float) -> None:
        """Return after this time, or shortly after the job has changed.

        Args:
            seconds: The time until the next poll.
        """
        if self._open():
            return  # the job may have changed since the last poll
        if self._feed is not None:
            await self._wait_for_change(self._feed, seconds)
        elif self._reports_changes:
            # Not here or not now: a network file system, a limit of the kernel, macOS.
            await self._clock.sleep(min(seconds, self._service.poll_min_s))
        else:
            await self._clock.sleep(seconds)

    def close(self) -> None:
        """Release the feed."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def _open(self) -> bool:
        """Open the feed at the first call; return whether that happened now."""
        if not self._may_open or not isinstance(self._service, ChangeFeedService):
            return False
        self._may_open = False
        self._feed = self._service.open_changes()
        if self._feed is not None and not self._feed.follow(self._job_id):
            self.close()
        return self._feed is not None

    async def _wait_for_change(self, feed: ChangeFeed, seconds: float) -> None:
        import anyio

        broken = False

        async def wait() -> None:
            nonlocal broken
            try:
                while (changed := await feed.wait()) is not None and self._job_id not in changed:
                    pass
            except ServiceError:
                broken = True
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await self._clock.sleep(seconds)
            group.cancel_scope.cancel()
        if broken:
            self.close()
        # A job that prints much changes all the time.
        await self._clock.sleep(min(seconds, _LEAST_PAUSE_S))


class LogPoll:
    """Reads a job's log from its last position to its present end.

    Attributes:
        time_is_up: Whether the deadline ended the last read.
    """

    def __init__(self, service: JobService, job_id: str, clock: Clock, deadline_s: float, *, retries: int) -> None:
        """Read nothing yet.

        Args:
            service: Where the job runs.
            job_id: Its id there.
            clock: The clock that deadlines and waits go by.
            deadline_s: When to stop, in monotonic seconds of the clock.
            retries: Number of retries of a request whose failure may be transient.
        """
        self.time_is_up = False
        self._service = service
        self._job_id = job_id
        self._clock = clock
        self._deadline_s = deadline_s
        self._retries = retries
        self._cursor: bytes | None = None
        self._gap = False

    async def read(self) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that came since the last read.

        Raises:
            ServiceError: The request failed once more than there are retries, or a retry cannot help.
        """
        import random

        failures = 0
        while True:
            try:
                async with aclosing(self._service.read_logs(self._job_id, self._cursor)) as pages:
                    while (page := await self._next(pages)) is not None:
                        failures = 0
                        self._cursor = page.cursor
                        yield page
                return
            except CursorExpiredError as error:
                if error.resume_cursor == self._cursor:
                    raise
                self._cursor, self._gap = error.resume_cursor, True
            except (ServiceUnavailableError, ProtocolError) as error:
                failures += 1
                if failures > self._retries:
                    raise
                asked_s = error.retry_after_s if isinstance(error, ServiceUnavailableError) else None
                wait_s = backoff_s(failures - 1, random.random(), retry_after_s=asked_s)
                if self._clock.monotonic_s() + wait_s >= self._deadline_s:
                    self.time_is_up = True
                    return
                await self._clock.sleep(wait_s)

    def take_gap(self) -> bool:
        """Return whether lines were lost since the last call."""
        gap, self._gap = self._gap, False
        return gap

    async def _next(self, pages: AsyncIterator[LogPage]) -> LogPage | None:
        import anyio

        with anyio.move_on_after(self._deadline_s - self._clock.monotonic_s()):
            return await anext(pages, None)
        self.time_is_up = True
        return None


def stamped(answer: Answer, service: JobService) -> Answer:
    """Return the answer with the service that gave it."""
    if answer._origin is not None and answer.service is not None:
        return answer
    return dataclasses.replace(answer, _origin=answer._origin or service, service=answer.service or service.name)


def newest_of(page: LogPage) -> Message:
    """Return the newest line of a page; ties go to the last."""
    newest, line, position = page.runs[0], 0, 0
    for run in page.runs:
        position += run.lines
        if run.time_unix_nano + run.lines >= newest.time_unix_nano + newest.lines:
            newest, line = run, position - 1
    last = newest._replace(lines=1, time_unix_nano=newest.time_unix_nano + newest.lines - 1)
    return next(LogPage([page.lines[line]], [last], page.cursor, tasks=page.tasks).messages())


def newer(one: Message | None, other: Message) -> Message:
    """Return the newer of two lines; ties go to the second."""
    return other if one is None or other["timestamp"] >= one["timestamp"] else one
