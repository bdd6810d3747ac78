"""`Source`: a job service as the agent reads it: limits on concurrent reads, and every value in range."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import UTC, datetime
from typing import Any

from tailspan.errors import JobNotFoundError
from tailspan.logs.page import LogPage, OpenLine
from tailspan.models import JobStatus, ListedJob, TaskRun
from tailspan.services import ChangeFeedService, JobService, MergingService, TaskService
from tailspan_agent.job.bounds import bounded_open_line, bounded_page, bounded_row, bounded_status, bounded_tasks
from tailspan_agent.pipeline.queue import LogQueue
from tailspan_agent.receiver.read_limits import ReadLimit

__all__ = ["Source"]

# Reads wait for their service most of the time. If one of two queues is stuck, the other has two reads left.
_READS, _READS_PER_QUEUE = 8, 6
# Free reads cost only CPU: with a second one, a long log does not delay all other jobs.
_FREE_READS_PER_QUEUE = 2
# Merged reads share one request; each holds at most 64 KiB.
_MERGED_READS_PER_QUEUE = 64
_PAGES_PER_TURN = 8
_FIRST_POLLS = 100
_FIRST_POLLS_PER_S = 1.0
_MOST_NOTED = 10_000

_log = logging.getLogger(__name__)


class Source:
    """A job service with a bounded number of reads at a time, however many jobs it has.

    Nothing that the service returns reaches other code as it is: see `tailspan_agent.job.bounds`.

    Args:
        service: The service.
        on_dropped: Called with the number of attributes of a job that were dropped or cut, once for each job.
    """

    def __init__(self, service: JobService, on_dropped: Callable[[int], object] = lambda _: None) -> None:
        self.service = service
        self._on_dropped = on_dropped
        self._noted: set[str] = set()
        self._task_service = service if isinstance(service, TaskService) else None
        self._merging = service if isinstance(service, MergingService) else None
        self._notifying = service if isinstance(service, ChangeFeedService) else None
        self._reads = (
            ReadLimit(math.inf, _FREE_READS_PER_QUEUE) if self.polls_are_free else ReadLimit(_READS, _READS_PER_QUEUE)
        )
        self._merged_reads = ReadLimit(math.inf, _MERGED_READS_PER_QUEUE)
        self._first_poll_at_s = float("-inf")

    async def get_job(self, job_id: str) -> JobStatus:
        """Return a job's status, with all values in range; see `tailspan.services.JobService`.

        Raises:
            JobNotFoundError: The service has no such job.
        """
        status = await self.service.get_job(job_id)
        bounded, notes, dropped = bounded_status(status, job_id, identity=self.service.identity, now=datetime.now(UTC))
        if notes and self._note(job_id, "; ".join(notes)) and dropped:
            self._on_dropped(dropped)
        return bounded

    def _note(self, job_id: str, what: str, part: str = "") -> bool:
        """Log what was brought into range, once for each job and part of it; return whether this was the first time."""
        key = f"{job_id}\0{part}"
        if key in self._noted:
            return False
        if len(self._noted) >= _MOST_NOTED:
            self._noted.clear()
        self._noted.add(key)
        _log.warning("job %s of service %s: changed or dropped: %s", job_id, self.service.name, what)
        return True

    async def list_jobs(self, is_known: Callable[[ListedJob], bool]) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the service's jobs, with all values in range; see `tailspan.services.JobService`.

        Args:
            is_known: Returns whether a row is an earlier one that was in range: services return equal rows again.
        """
        async with aclosing(self.service.list_jobs()) as listing:
            async for rows in listing:
                yield _bounded_rows(rows, is_known)

    async def rows(self, job_ids: Collection[str], is_known: Callable[[ListedJob], bool]) -> Sequence[ListedJob] | None:
        """Return the rows of some jobs; None if the service can only list all. See `list_jobs`.

        Args:
            job_ids: The jobs.
            is_known: As for `list_jobs`.
        """
        rows = None if self._notifying is None else await self._notifying.rows(job_ids)
        return None if rows is None else _bounded_rows(rows, is_known)

    async def list_tasks(self, job_id: str) -> list[TaskRun] | None:
        """Return the attempts of a job's tasks, with all values in range; None if the service has no tasks.

        Raises:
            JobNotFoundError: The service has no such job.
        """
        if self._task_service is None:
            return None
        return bounded_tasks(await self._task_service.list_tasks(job_id), now=datetime.now(UTC))

    @property
    def has_tasks(self) -> bool:
        """Whether the service reports tasks."""
        return self._task_service is not None

    @property
    def polls_are_free(self) -> bool:
        """Whether a poll costs no request."""
        return self.service.polls_are_free

    def merges(self, cursor: bytes | None) -> bool:
        """See `tailspan.services.MergingService`; False for other services."""
        return self._merging is not None and self._merging.merges(cursor)

    def may_be_late(self, cursor: bytes | None) -> bool:
        """Return whether lines may become visible behind this cursor."""
        exact = self._merging is not None and not self._merging.merged_late and self._merging.merges(cursor)
        return self.service.final_read and not exact

    def gather_s(self, cursor: bytes | None) -> float:
        """Return how long a read after this cursor waits for reads of other jobs, in seconds."""
        return self._merging.gather_s if self._merging is not None and self._merging.merges(cursor) else 0.0

    @property
    def pages_per_turn(self) -> float:
        """How many pages of a log are read before other jobs get their turn; an HTTP reply is read to its end."""
        return _PAGES_PER_TURN if self.polls_are_free else math.inf

    def open_log(
        self, job_id: str, cursor: bytes | None, queue: LogQueue | None, *, late_window_s: float
    ) -> AbstractAsyncContextManager[AsyncGenerator[LogPage, None]]:
        """Return the pages of a log as a context that holds a place among the reads of a queue.

        Args:
            job_id: The job.
            cursor: The end of the lines that were read; None reads from the start.
            queue: The queue that takes the lines; None if none are sent.
            late_window_s: How far before the cursor to search for late lines, in seconds.
        """
        limit, options = self._reads.of(queue), {}
        if self.merges(cursor):
            # A merged read waits for a place among the other reads only if its job has a reply of its own.
            limit, options = self._merged_reads.of(queue), {"long_reads": limit}
        return _OpenLog(limit, self.pages(job_id, cursor, late_window_s=late_window_s, **options))

    async def pages(self, job_id: str, cursor: bytes | None = None, **options: Any) -> AsyncGenerator[LogPage, None]:
        """Yield the pages of a log without a limit; no pages if the job exists and has no log.

        Args:
            job_id: The job.
            cursor: The end of the lines that were read; None reads from the start.
            **options: Further options of `JobService.read_logs`.

        Raises:
            JobNotFoundError: The service has no such job.
        """
        pages = self.service.read_logs(job_id, cursor, **options)
        # Closed at whatever page the task is cancelled, so that its connection is free at once.
        async with aclosing(pages):
            try:
                async for page in pages:
                    bounded = bounded_page(page)
                    if bounded is not page:
                        self._note(job_id, "lines with an impossible time, stream, severity, task or flag", "lines")
                    yield bounded
            except JobNotFoundError:
                # A job that wrote nothing may have no log; only its status says whether the job is gone.
                await self.get_job(job_id)

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the line whose newline has not come, with its time in range; see `JobService.open_line`."""
        line = await self.service.open_line(job_id)
        return None if line is None else bounded_open_line(line)

    def first_poll_delay_s(self) -> float:
        """Return the delay before the first poll of one more job that has nothing new, in seconds.

        The first hundred jobs are polled at once. With thousands, jobs with new lines must not wait for all the others.
        """
        if self.polls_are_free:
            return 0.0
        now_s = time.monotonic()
        begun_s = now_s - _FIRST_POLLS / _FIRST_POLLS_PER_S
        self._first_poll_at_s = max(self._first_poll_at_s, begun_s) + 1 / _FIRST_POLLS_PER_S
        return max(0.0, self._first_poll_at_s - now_s)


def _bounded_rows(rows: Sequence[ListedJob], is_known: Callable[[ListedJob], bool]) -> list[ListedJob]:
    now = datetime.now(UTC)
    # Without an id that is text, a row is of no job; it must not hide the other rows.
    return [row if is_known(row) else bounded_row(row, now=now) for row in rows if isinstance(row.job_id, str)]


class _OpenLog(AbstractAsyncContextManager[AsyncGenerator[LogPage, None]]):
    """The pages of a log; a class, because each poll of each job opens one."""

    __slots__ = ("_pages", "_place")

    def __init__(self, place: AbstractAsyncContextManager[None], pages: AsyncGenerator[LogPage, None]) -> None:
        self._place = place
        self._pages = pages

    async def __aenter__(self) -> AsyncGenerator[LogPage, None]:
        await self._place.__aenter__()
        return self._pages

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._pages.aclose()
        finally:
            await self._place.__aexit__(*error)
