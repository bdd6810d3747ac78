"""`ServedPages`: logs as the log pages of the service where the jobs run; see `tailspan.logs.page_wire`.

A log read from its start is a reply of its own. Later reads share requests: one request returns the next pages of many
jobs. Without that, an agent that follows a hundred busy jobs would send a hundred requests per second, each as
expensive as a thousand lines; twenty are allowed. A read waits for others until the next half second of the clock,
unless there were none lately; and while a request is on its way, new reads gather for the next one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import NamedTuple, TypeAlias
from urllib.parse import urlencode

from tailspan._identity import check_job_id
from tailspan.errors import CursorExpiredError, ProtocolError, RequestRejectedError, ServiceError
from tailspan.logs.page import LogPage, Message
from tailspan.logs.page_wire import CURSOR_MARK, MAX_JOBS, Frame, FrameError, FrameSplitter, cursor_text
from tailspan.services._gathering import Gathering, Waiting
from tailspan.services._requests import Params, path_segment
from tailspan.services.fused.http import FusedHttp

__all__ = ["MessageSplitter", "ServedPages"]

_GATHER_S = 0.5
# A request line of this length is accepted by every server.
_MOST_QUERY_CHARS = 6000


_Answer: TypeAlias = tuple[LogPage | None, bool]
"""A job's next page (None without one), and whether to continue with a request for this job alone."""


class _Read(NamedTuple):
    """A read of the page after a cursor."""

    job_id: str
    cursor: str

    @property
    def query_chars(self) -> int:
        """The length of its part of a query."""
        return len(urlencode(_query([self])))


def _fitting(
    first: Waiting[_Read, _Answer], others: Sequence[Waiting[_Read, _Answer]]
) -> list[Waiting[_Read, _Answer]]:
    """Return the reads of the next request: the first, and as many others as fit."""
    batch, room = [first], _MOST_QUERY_CHARS - first.question.query_chars
    for one in others:
        size = one.question.query_chars
        if len(batch) < MAX_JOBS and size < room:
            batch.append(one)
            room -= size + 1
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
        self._gathering: Gathering[_Read, _Answer] = Gathering(
            _fitting, self._answer, _GATHER_S, lambda read: read.job_id
        )

    @property
    def gather_s(self) -> float:
        """How long a read waits for others at present, in seconds; 0 if there were none lately."""
        return self._gathering.gather_s

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
            page, more = await self._gathering.ask(_Read(job_id, cursor_text(cursor[len(CURSOR_MARK) :])))
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

    async def _answer(self, batch: list[Waiting[_Read, _Answer]]) -> None:
        answers: dict[int, _Answer] = {}
        # A request for each job alone shows which one is wrong.
        rest: _Answer | None = None, True
        failure: ServiceError | None = None
        query = _query([one.question for one in batch])
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
            rest, failure = None, error  # the pages before a broken end are valid
        for number, one in enumerate(batch):
            one.answer = answers.get(number, rest)
        if failure is not None:
            raise failure


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


def _query(batch: Sequence[_Read]) -> list[tuple[str, str]]:
    return [pair for read in batch for pair in (("job", read.job_id), ("cursor", read.cursor))]
