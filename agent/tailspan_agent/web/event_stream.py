"""Server-sent events: a bounded number of streams, each of them for a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import PlainTextResponse, Response, StreamingResponse

__all__ = ["ALIVE", "REFRESH_S", "Streams", "event"]

_STREAM_S = 600.0
_MAX_STREAMS = 20

REFRESH_S = 1.0
"""How long a stream waits before it looks again, in seconds."""

ALIVE = ": still here\n\n"
"""A comment: nobody sees it, and a connection that is gone shows itself."""


def event(name: str, data: Mapping[str, Any]) -> str:
    """Return an event as it is sent."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class Streams:
    """Counts who is looking. A slow reader holds up only its own stream: what comes next is made when it was sent."""

    def __init__(self) -> None:
        self._open = 0
        self._times: set[asyncio.Timeout] = set()
        self._is_over = False

    def answer(self, events: Callable[[], AsyncGenerator[str, None]], headers: Mapping[str, str]) -> Response:
        """Return the answer that streams these events, or one that refuses.

        Args:
            events: Makes them; a browser whose time is over comes back by itself.
            headers: Of the answer.
        """
        if self._open >= _MAX_STREAMS:
            return PlainTextResponse("too many are looking; this page is as it was when it was loaded\n", 503)
        self._open += 1
        return _Counted(self._bounded(events), self._left, headers=headers, media_type="text/event-stream")

    def end(self) -> None:
        """End all streams now, as if their time was over: a server that stops need not break them off."""
        self._is_over = True
        for time in self._times:
            time.reschedule(asyncio.get_running_loop().time())

    def _left(self) -> None:
        self._open -= 1

    async def _bounded(self, events: Callable[[], AsyncGenerator[str, None]]) -> AsyncIterator[str]:
        # One that is gone without a word must not hold its place for ever.
        end_s = asyncio.get_running_loop().time() + _STREAM_S
        async with aclosing(events()) as made:
            while not self._is_over:
                # Only what is made is timed: a timeout that is over while an event is sent would break off the sending.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end_s) as time:
                        self._times.add(time)
                        try:
                            one = await anext(made, None)
                        finally:
                            self._times.discard(time)
                if time.expired() or one is None:
                    return
                yield one


class _Counted(StreamingResponse):
    """A stream that says when it has ended, however it ends."""

    def __init__(self, content: AsyncIterator[str], left: Callable[[], None], **options: Any) -> None:
        super().__init__(content, **options)
        self._left = left

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._left()
