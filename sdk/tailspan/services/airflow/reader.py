"""Reads the logs of many attempts of tasks at a time, and merges their lines by time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence

from tailspan.errors import JobNotFoundError, RequestRejectedError
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, Line
from tailspan.services._requests import ServiceRequests
from tailspan.services.airflow.log import AirflowEntry, AttemptLog, LogSplitter

__all__ = ["AttemptReader", "merged"]

# Each log that is open holds some 100 KiB.
_MAX_OPEN = 32
_BAD_TOKEN = 400


class AttemptReader:
    """Reads the log of one attempt from its position on.

    Attributes:
        log: What was taken of the log.
        is_final: Whether the attempt ended so long ago that it writes no more lines.
    """

    def __init__(
        self,
        http: ServiceRequests,
        path: str,
        params: Mapping[str, int | str],
        log: AttemptLog,
        *,
        job_id: str,
        is_final: bool,
    ) -> None:
        """Request nothing yet.

        Args:
            http: Sends the request.
            path: The log.
            params: The query, without the token.
            log: As the attribute.
            job_id: The job that the attempt belongs to.
            is_final: As the attribute.
        """
        self.log = log
        self.is_final = is_final
        self._http = http
        self._path = path
        self._params = params
        self._job_id = job_id
        self._splitter = LogSplitter()
        self._reply: AsyncGenerator[list[AirflowEntry | str], None] | None = None
        self._is_over = False

    @property
    def is_read(self) -> bool:
        """Whether no line is left, now and later."""
        return self.is_final and self.log.is_whole

    async def next_line(self) -> Line | None:
        """Return the next line, which stays the next one until it is taken; None if there is no more now."""
        while self.log.head is None and not self._is_over:
            if self._reply is None:
                self._reply = self._open()
            try:
                self.log.add(await anext(self._reply))
            except StopAsyncIteration:
                self._is_over = True
                self.log.end(self._splitter.token)
            except JobNotFoundError:
                # This attempt has no log.
                self._is_over = True
                self.log.end(None)
            except RequestRejectedError as error:
                if error.status_code != _BAD_TOKEN or not self.log.token:
                    raise
                # The server's secret has changed, or another server answers.
                self.log.restart()
                self._reply = None
        return self.log.head

    async def aclose(self) -> None:
        """Close the connection."""
        if self._reply is not None:
            await self._reply.aclose()

    def _open(self) -> AsyncGenerator[list[AirflowEntry | str], None]:
        token = {"token": self.log.token} if self.log.token else {}
        return self._http.parts(
            self._path, {**self._params, **token}, self._make_splitter, "a log of Airflow", job_id=self._job_id
        )

    def _make_splitter(self) -> LogSplitter:
        self._splitter = LogSplitter()
        return self._splitter


async def merged(readers: Sequence[AttemptReader], first_ns: int) -> AsyncGenerator[list[Line], None]:
    """Yield the lines of many logs by time, in lists that fit into a page.

    Of more than 32 logs with lines of one time, some come after the others; the order within each log holds.

    Args:
        readers: The logs.
        first_ns: Yield only lines of this time and later, in ns since the epoch.
    """
    waiting = deque(sorted(readers, key=lambda reader: reader.log.begins_ns))
    # By the newest time so far: lines of one log may go back a little.
    opened: list[tuple[int, int, AttemptReader]] = []
    lines: list[Line] = []
    size = number = 0
    try:
        while waiting or opened:
            while waiting and len(opened) < _MAX_OPEN and (not opened or waiting[0].log.begins_ns <= opened[0][0]):
                reader = waiting.popleft()
                if (line := await reader.next_line()) is not None:
                    number += 1
                    heapq.heappush(opened, (line.time_unix_nano, number, reader))
            if not opened:
                continue
            newest_ns, place, reader = opened[0]
            line = reader.log.take()
            following = await reader.next_line()
            if following is None:
                heapq.heappop(opened)
            else:
                heapq.heapreplace(opened, (max(newest_ns, following.time_unix_nano), place, reader))
            if line.time_unix_nano < first_ns:
                continue
            lines.append(line)
            size += len(line.message) + 1
            if len(lines) == MAX_PAGE_LINES or size > MAX_PAGE_BYTES // 4:
                yield lines
                lines, size = [], 0
        if lines:
            yield lines
    finally:
        for reader in readers:
            await reader.aclose()
