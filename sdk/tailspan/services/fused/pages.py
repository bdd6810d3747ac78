"""`ServedPages`: logs as the log pages of the service where the jobs run; see `tailspan.logs.page_wire`.

A log read from its start is a reply of its own. Later reads share requests: one request returns the next pages of many
jobs. Without that, an agent that follows a hundred busy jobs would send a hundred requests per second, each as
expensive as a thousand lines; twenty are allowed. A read waits for others until the next half second of the clock,
unless there were none lately; and while a request is on its way, new reads gather for the next one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from urllib.parse import urlencode

import anyio
import anyio.lowlevel

from tailspan._identity import check_job_id
from tailspan.errors import CursorExpiredError, ProtocolError, RequestRejectedError, ServiceError
from tailspan.logs.page import LogPage, Message
from tailspan.logs.page_wire import CURSOR_MARK, MAX_JOBS, Frame, FrameError, FrameSplitter, cursor_text
from tailspan.services._requests import Params, path_segment
from tailspan.services.fused.http import FusedHttp

__all__ = ["MessageSplitter", "ServedPages"]

_GATHER_S = 0.5
_LATELY_S = 2.0
# A request line of this length is accepted by every server.
_MOST_QUERY_CHARS = 6000


@dataclass(eq=False, slots=True)
class _Read:
    job_id: str
    cursor: str
    answer: tuple[LogPage | None, bool] | ServiceError | None = None

    @property
    def query_chars(self) -> int:
        return len(urlencode(_query([self])))


class _Gathering:
    """The waiting reads of one event loop."""

    def __init__(self) -> None:
        self.waiting: dict[_Read, None] = {}
        self.turn = anyio.Lock()
        self._last_jobs: set[str] = set()
        self._last_s = 0.0

    @property
    def last_jobs(self) -> set[str]:
        """The jobs of the last request; empty if it was some time ago."""
        return self._last_jobs if time.monotonic() - self._last_s < _LATELY_S else set()

    def batch(self, first: _Read) -> list[_Read]:
        """Return the reads of the next request: the first, and as many others as fit."""
        batch, room = [first], _MOST_QUERY_CHARS - first.query_chars
        for read in self.waiting:
            if read is not first and read.answer is None and len(batch) < MAX_JOBS and read.query_chars < room:
                batch.append(read)
                room -= read.query_chars + 1
        self._last_jobs, self._last_s = {read.job_id for read in batch}, time.monotonic()
        return batch


class ServedPages:
    """Reads log pages.

    Args:
        http: The job API.

    Attributes:
        offered: Whether the server offers log pages, by its last status reply; None before the first.
    """

    def __init__(self, http: FusedHttp) -> None:
        self.offered: bool | None = None
        self._http = http
        self._gathering = _Gathering()
        self._loop: object = None

    @property
    def gather_s(self) -> float:
        """How long a read waits for others at present, in seconds; 0 if there were none lately."""
        return _GATHER_S if len(self._gathering.last_jobs) > 1 else 0.0

    def are_for(self, cursor: bytes | None) -> bool:
        """Return whether to read log pages after a cursor; a cursor of times continues with times."""
        return bool(self.offered) if cursor is None else cursor.startswith(CURSOR_MARK)

    async def read(
        self, job_id: str, cursor: bytes | None, since_ms: int | None, long_reads: AbstractAsyncContextManager[object]
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that are readable now, after the cursor; see `tailspan.services.MergingService.read_logs`."""
        path = f"/log-pages/{path_segment(check_job_id(job_id))}"
        params: Params | None = None if since_ms is None else {"since_ms": max(0, since_ms)}
        if cursor is not None:
            if self.offered is False:
                raise CursorExpiredError(
                    "the server no longer offers log pages: the log is read again from its start, by times",
                    job_id=job_id,
                )
            page, more = await self._next(job_id, cursor)
            if page is not None:
                cursor = page.cursor
                yield page
            if not more:
                return
        async with long_reads:
            more = True
            while more:
                before = cursor
                if cursor is not None:
                    params = {"cursor": cursor_text(cursor[len(CURSOR_MARK) :])}
                splitter = partial(FrameSplitter, for_one=True)
                async with aclosing(self._http.parts(path, params, splitter, "log pages", job_id=job_id)) as parts:
                    async for frames in parts:
                        for frame in frames:
                            more = frame.more
                            if frame.page is not None:
                                cursor = frame.page.cursor
                                yield frame.page
                if cursor == before:
                    return  # the server made no progress: stop, although it reports more

    async def _next(self, job_id: str, cursor: bytes) -> tuple[LogPage | None, bool]:
        """Return a job's next page (None without one), and whether to continue with a request for this job alone."""
        gathering = self._open_gathering()
        read = _Read(job_id, cursor_text(cursor[len(CURSOR_MARK) :]))
        gathering.waiting[read] = None
        try:
            async with gathering.turn:
                # One read sends the request for all; the others find their answer when their turn comes.
                if read.answer is None:
                    if gathering.last_jobs - {job_id}:
                        await anyio.sleep(_GATHER_S - time.monotonic() % _GATHER_S)
                    await self._answer(gathering.batch(read))
        finally:
            gathering.waiting.pop(read, None)
        if isinstance(read.answer, ServiceError):
            raise copy.copy(read.answer)
        assert read.answer is not None
        return read.answer

    async def _answer(self, batch: list[_Read]) -> None:
        answers: dict[int, tuple[LogPage | None, bool]] = {}
        # A request for each job alone shows which one is wrong.
        rest: tuple[LogPage | None, bool] | ServiceError = None, True
        query = _query(batch)
        try:
            async with aclosing(
                self._http.parts("/log-pages", query, FrameSplitter, "log pages", job_id=None)
            ) as parts:
                async for frames in parts:
                    for frame in frames:
                        answers.setdefault(frame.job, (frame.page, frame.more))
        except (RequestRejectedError, ProtocolError, CursorExpiredError):
            pass
        except ServiceError as error:
            rest = error  # the pages before a broken end are valid
        for number, read in enumerate(batch):
            read.answer = answers.get(number, rest)

    def _open_gathering(self) -> _Gathering:
        # Locks belong to an event loop: after a fork and in the next loop they would never be released.
        loop = anyio.lowlevel.current_token()
        if self._loop != loop:
            self._gathering, self._loop = _Gathering(), loop
        return self._gathering


class MessageSplitter:
    """Turns the pieces of a reply of log pages for one job into messages, oldest first in each page."""

    def __init__(self) -> None:
        self._frames = FrameSplitter(for_one=True)

    def feed(self, piece: bytes) -> list[Message]:
        """Add the next piece and return the lines of complete pages; often none.

        Raises:
            FrameError: The reply has another form.
        """
        return self._messages(self._frames.feed(piece))

    def close(self) -> list[Message]:
        """End the reply.

        Raises:
            FrameError: The reply is incomplete.
        """
        return self._messages(self._frames.close())

    @staticmethod
    def _messages(frames: list[Frame]) -> list[Message]:
        if any(frame.more for frame in frames):
            raise FrameError("it is incomplete")
        # By page: the result must not depend on the pieces of the reply.
        when = itemgetter("timestamp")
        pages = [sorted(frame.page.messages(), key=when) for frame in frames if frame.page is not None]
        return list(chain.from_iterable(pages))


def _query(batch: list[_Read]) -> list[tuple[str, str]]:
    return [pair for read in batch for pair in (("job", read.job_id), ("cursor", read.cursor))]
