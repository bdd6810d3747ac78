"""`ServedPages`: logs of jobs as the pages that they are where the jobs run; see `tailspan.logs.page_wire`.

From its start a log is a reply of its own. Where reading goes on, one request brings the next page of many jobs. An
agent that follows a hundred speaking jobs would need a hundred requests a second, each of which costs as much as a
thousand lines, and twenty are allowed. Who asks waits for the others until the next half second of the clock begins,
unless there were no others lately; and while a request is on its way, all who ask gather for the next one.
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
from tailspan.services.fused.http import FusedHttp, Params
from tailspan.services.fused.wire import path_segment

__all__ = ["MessageSplitter", "ServedPages"]

_GATHER_S = 0.5
_LATELY_S = 2.0
# A request line that every server takes.
_MOST_QUERY_CHARS = 6000


@dataclass(eq=False, slots=True)
class _Ask:
    job_id: str
    cursor: str
    answer: tuple[LogPage | None, bool] | ServiceError | None = None

    @property
    def query_chars(self) -> int:
        return len(urlencode(_query([self])))


class _Gathering:
    """Those who ask, in one event loop."""

    def __init__(self) -> None:
        self.waiting: dict[_Ask, None] = {}
        self.turn = anyio.Lock()
        self._last_jobs: set[str] = set()
        self._last_s = 0.0

    @property
    def last_jobs(self) -> set[str]:
        """The jobs of the last request; none where that was some time ago."""
        return self._last_jobs if time.monotonic() - self._last_s < _LATELY_S else set()

    def batch(self, first: _Ask) -> list[_Ask]:
        """Return those whose turn it is with one of them: as many as one request takes."""
        batch, room = [first], _MOST_QUERY_CHARS - first.query_chars
        for ask in self.waiting:
            if ask is not first and ask.answer is None and len(batch) < MAX_JOBS and ask.query_chars < room:
                batch.append(ask)
                room -= ask.query_chars + 1
        self._last_jobs, self._last_s = {ask.job_id for ask in batch}, time.monotonic()
        return batch


class ServedPages:
    """Reads log pages.

    Args:
        http: The job API.

    Attributes:
        offered: Whether the server sends them, as it said in its last status reply; None before the first.
    """

    def __init__(self, http: FusedHttp) -> None:
        self.offered: bool | None = None
        self._http = http
        self._gathering = _Gathering()
        self._loop: object = None

    @property
    def gather_s(self) -> float:
        """For how long a read waits for others at present, in seconds; 0 where there were none lately."""
        return _GATHER_S if len(self._gathering.last_jobs) > 1 else 0.0

    def are_for(self, cursor: bytes | None) -> bool:
        """Return whether to read on after a cursor by pages: one that knows times goes on as it began."""
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
                    "the server sends no log pages any more: the log is read anew, by times", job_id=job_id
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
                    return  # whatever it says, it has no more

    async def _next(self, job_id: str, cursor: bytes) -> tuple[LogPage | None, bool]:
        """Return a job's next page, None without one, and whether to go on with a request for this job alone."""
        gathering = self._open_gathering()
        ask = _Ask(job_id, cursor_text(cursor[len(CURSOR_MARK) :]))
        gathering.waiting[ask] = None
        try:
            async with gathering.turn:
                # Whoever has the turn asks for the others, too; most find their answer when they get it.
                if ask.answer is None:
                    if gathering.last_jobs - {job_id}:
                        await anyio.sleep(_GATHER_S - time.monotonic() % _GATHER_S)
                    await self._answer(gathering.batch(ask))
        finally:
            gathering.waiting.pop(ask, None)
        if isinstance(ask.answer, ServiceError):
            raise copy.copy(ask.answer)
        assert ask.answer is not None
        return ask.answer

    async def _answer(self, batch: list[_Ask]) -> None:
        answers: dict[int, tuple[LogPage | None, bool]] = {}
        # Which of them is to blame shows when each asks alone.
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
            rest = error  # of a reply that breaks off, what came is good
        for number, ask in enumerate(batch):
            ask.answer = answers.get(number, rest)

    def _open_gathering(self) -> _Gathering:
        # Locks belong to an event loop: after a fork, and in the next loop, nobody would ever give them free.
        loop = anyio.lowlevel.current_token()
        if self._loop != loop:
            self._gathering, self._loop = _Gathering(), loop
        return self._gathering


class MessageSplitter:
    """Takes the pieces of a reply of log pages for one job, and gives each page's lines as messages, oldest first."""

    def __init__(self) -> None:
        self._frames = FrameSplitter(for_one=True)

    def feed(self, piece: bytes) -> list[Message]:
        """Take in the next piece and return the lines of the pages that are complete; often none.

        Raises:
            FrameError: This is no such reply.
        """
        return self._messages(self._frames.feed(piece))

    def close(self) -> list[Message]:
        """Say that the reply has ended.

        Raises:
            FrameError: It has no end.
        """
        return self._messages(self._frames.close())

    @staticmethod
    def _messages(frames: list[Frame]) -> list[Message]:
        if any(frame.more for frame in frames):
            raise FrameError("it has no end")
        # Page by page, whatever pieces the reply came in.
        when = itemgetter("timestamp")
        pages = [sorted(frame.page.messages(), key=when) for frame in frames if frame.page is not None]
        return list(chain.from_iterable(pages))


def _query(batch: list[_Ask]) -> list[tuple[str, str]]:
    return [pair for ask in batch for pair in (("job", ask.job_id), ("cursor", ask.cursor))]
