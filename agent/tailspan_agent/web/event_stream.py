"""Server-sent events: a bounded number of streams, each for a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import PlainTextResponse, Response, StreamingResponse

__all__ = ["KEEP_ALIVE", "REFRESH_S", "EventStreams", "format_event"]

_STREAM_S = 600.0
_MAX_STREAMS = 20

REFRESH_S = 1.0
"""The interval between two updates of a stream, in seconds."""

KEEP_ALIVE = ": keep-alive\n\n"
"""A comment that browsers ignore; sending it detects a lost connection."""


def format_event(name: str, data: Mapping[str, Any]) -> str:
    """Return an event in the wire format."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class EventStreams:
    """Limits the streams. A slow reader delays only its own: the next event is made once the last one is sent."""

    def __init__(self) -> None:
        self._open = 0
        self._timeouts: set[asyncio.Timeout] = set()
        self._is_stopped = False
        self._ended = 0

    def respond(self, events: Callable[[], AsyncGenerator[str, None]], headers: Mapping[str, str]) -> Response:
        """Return a response that streams events, or a 503 response if there are too many streams.

        Args:
            events: Yields formatted events. A browser whose time is up reconnects by itself.
            headers: The headers of the response.
        """
        if self._open >= _MAX_STREAMS:
            return PlainTextResponse("too many live pages are open; this page is not updated\n", 503)
        self._open += 1
        return _CountedStream(self._bounded(events), self._release, headers=headers, media_type="text/event-stream")

    def end(self, *, for_good: bool = True) -> None:
        """End all streams now, as if their time were up, so that a stopping server need not abort them.

        Args:
            for_good: Whether no further ones may start.
        """
        self._is_stopped = for_good
        self._ended += 1
        for timeout in self._timeouts:
            timeout.reschedule(asyncio.get_running_loop().time())

    def _release(self) -> None:
        self._open -= 1

    async def _bounded(self, events: Callable[[], AsyncGenerator[str, None]]) -> AsyncIterator[str]:
        # A client that vanished without closing its connection must not hold its place for ever.
        end_s = asyncio.get_running_loop().time() + _STREAM_S
        ended = self._ended
        async with aclosing(events()) as formatted:
            while not self._is_stopped and ended == self._ended:
                # The timeout covers only the making: while an event is sent, it would abort the sending.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end_s) as timeout:
                        self._timeouts.add(timeout)
                        try:
                            next_event = await anext(formatted, None)
                        finally:
                            self._timeouts.discard(timeout)
                if timeout.expired() or next_event is None:
                    return
                yield next_event


class _CountedStream(StreamingResponse):
    """A stream that releases its place when it ends, however it ends."""

    def __init__(self, content: AsyncIterator[str], release: Callable[[], None], **options: Any) -> None:
        super().__init__(content, **options)
        self._release = release

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._release()
