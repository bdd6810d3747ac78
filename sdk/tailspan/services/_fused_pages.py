"""`ServedPages`: logs of jobs as the pages that they are where the jobs run; see `tailspan.page_frames`.

From its start a log is a reply of its own. Where reading goes on, one request brings the next page of many jobs:
An agent that follows a hundred speaking jobs would need a hundred requests a second, each of which costs as much as a
thousand lines, and twenty are allowed. Who asks waits for the others until the next half second of the clock begins,
unless there were no others lately; and while a request is on its way, all who ask gather for the next one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import anyio

from tailspan.errors import CursorExpiredError, ProtocolError, RequestRejectedError, ServiceError
from tailspan.identity import check_job_id
from tailspan.page import LogPage
from tailspan.page_frames import CURSOR_MARK, MAX_JOBS, FrameError, FrameSplitter, cursor_text
from tailspan.services._fused_http import FusedHttp, Params
from tailspan.services._fused_wire import path_segment

__all__ = ["GATHER_S", "ServedPages"]

GATHER_S = 0.5
_REPLIES = 8
# A request line that every server takes.
_MOST_QUERY_CHARS = 6000


@dataclass(eq=False, slots=True)
class _Ask:
    job_id: str
    cursor: str
    answer: tuple[LogPage | None, bool] | ServiceError | None = None


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
        self._replies = anyio.Semaphore(_REPLIES)
        self._waiting: dict[_Ask, None] = {}
        self._turn = anyio.Lock()
        self._before: set[str] = set()

    def are_for(self, cursor: bytes | None) -> bool:
        """Return whether to read on after a cursor by pages: one that knows times goes on as it began."""
        return bool(self.offered) if cursor is None else cursor.startswith(CURSOR_MARK)

    async def read(self, job_id: str, cursor: bytes | None, since_ms: int | None) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that are readable now, after the cursor; see `tailspan.services.JobService.read_logs`."""
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
            params = {"cursor": cursor_text(cursor[len(CURSOR_MARK) :])}
        # Each holds a page, whoever reads it and however slowly.
        async with (
            self._replies,
            aclosing(self._http.parts(path, params, FrameSplitter, "log pages", job_id=job_id)) as parts,
        ):
            async for frames in parts:
                for frame in frames:
                    if frame.page is not None:
                        yield frame.page

    async def _next(self, job_id: str, cursor: bytes) -> tuple[LogPage | None, bool]:
        """Return a job's next page, None without one, and whether to go on with a request for this job alone."""
        ask = _Ask(job_id, cursor_text(cursor[len(CURSOR_MARK) :]))
        self._waiting[ask] = None
        try:
            async with self._turn:
                # Whoever has the turn asks for the others, too; most find their answer when they get it.
                if ask.answer is None:
                    if self._before - {job_id}:
                        await anyio.sleep(GATHER_S - time.monotonic() % GATHER_S)
                    batch = self._batch(ask)
                    self._before = {each.job_id for each in batch}
                    await self._answer(batch)
        finally:
            self._waiting.pop(ask, None)
        if isinstance(ask.answer, ServiceError):
            raise copy.copy(ask.answer)
        assert ask.answer is not None
        return ask.answer

    def _batch(self, first: _Ask) -> list[_Ask]:
        """Return those whose turn it is with one of them: as many as one request takes."""
        batch, room = [first], _MOST_QUERY_CHARS
        for ask in self._waiting:
            room -= len(ask.job_id) + len(ask.cursor) + len("&job=&cursor=")
            if room < 0 or len(batch) == MAX_JOBS:
                break
            if ask is not first and ask.answer is None:
                batch.append(ask)
        return batch

    async def _answer(self, batch: list[_Ask]) -> None:
        query = [pair for ask in batch for pair in (("job", ask.job_id), ("cursor", ask.cursor))]
        answers: list[tuple[LogPage | None, bool]] = [(None, True)] * len(batch)
        try:
            splitter = FrameSplitter()
            frames = splitter.feed(await self._http.get("/log-pages", query)) + splitter.close()
            for frame in frames:
                answers[frame.job] = frame.page, frame.more
        except (RequestRejectedError, ProtocolError, FrameError, IndexError):
            pass  # which of them is to blame shows when each asks alone
        except ServiceError as error:
            for ask in batch:
                ask.answer = error
            return
        for ask, answer in zip(batch, answers, strict=True):
            ask.answer = answer
