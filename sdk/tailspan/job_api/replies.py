"""The bodies of the job API's replies: lines as JSON or as log pages, other values as JSON, and errors.

Source: as in `tailspan.job_api.endpoints`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from datetime import datetime
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tailspan.errors import (
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.logs.page import NANOS_PER_MS, LogPage, Stream
from tailspan.logs.page_wire import RESUME_HEADER, cursor_text, encode_frame
from tailspan.logs.text import count_lines, lines_end

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = [
    "LogReply",
    "Parts",
    "encode_lines",
    "error_reply",
    "json_array",
    "json_reply",
    "on_bug",
    "on_http_exception",
    "on_tailspan_error",
    "page_frames",
    "with_lines",
]

Parts: TypeAlias = AsyncGenerator[bytes | bytearray, None]
"""The parts of a reply's body."""

_RETRY_AFTER_S = 1.0
# The one control character that JSON does not escape: lines are encoded as one text and split at it afterwards.
_SEPARATOR = b"\x7f"
# From this many lines per run on, escaping each run is cheaper than splitting the escaped text.
_LONG_RUN = 16
_HEAD = b'{"message":"'
_TAILS = [
    b'","timestamp":%d' + (b',"stream":"' + name.encode() + b'"' if name else b"") + b"}," + _HEAD
    for name in Stream.NAMES
]

_logger = logging.getLogger("tailspan.job_api.server")
_encoder = msgspec.json.Encoder()


def encode_lines(page: LogPage, before: bytes = b"") -> bytes:
    """Return the lines of a page as JSON objects with commas between them: a part of a reply's array.

    The same as encoding each of ``page.messages()``, in a quarter of the time: it escapes one text, not each line.

    Args:
        page: The lines, at least one.
        before: Bytes to put before them; adding these later would copy all lines once more.
    """
    text, line_count = page.joined(), page.line_count
    if _SEPARATOR in text or (not page.text and count_lines(text) != line_count):
        return before + _encoder.encode(list(page.messages()))[1:-1]
    parts = [before + _HEAD]
    runs_are_long = line_count >= _LONG_RUN * len(page.runs)
    for run, escaped in zip(
        page.runs, _long_runs(page, text) if runs_are_long else _short_runs(page, text), strict=True
    ):
        tail = _TAILS[run.stream]
        ms, past_ms = divmod(run.time_unix_nano, NANOS_PER_MS)
        if past_ms + run.lines > NANOS_PER_MS:
            for index, line in enumerate(escaped.split(_SEPARATOR)):
                parts += line, tail % ((run.time_unix_nano + index) // NANOS_PER_MS)
        else:
            between = tail % ms
            parts += escaped.replace(_SEPARATOR, between), between
    parts[-1] = parts[-1].removesuffix(b"," + _HEAD)
    return b"".join(parts)


def _long_runs(page: LogPage, text: bytes) -> Iterator[bytes]:
    """Yield the lines of each run as `_escaped` does."""
    start = 0
    for run in page.runs:
        end = lines_end(text, start, run.lines)
        yield _escaped(text[start : end - 1])
        start = end


def _short_runs(page: LogPage, text: bytes) -> Iterator[bytes]:
    """Return the lines of each run as `_escaped` does: all are escaped at once, and then split."""
    lines = _escaped(text[:-1]).split(_SEPARATOR)
    if len(page.runs) == len(lines):
        return iter(lines)
    rest = iter(lines)
    return (_SEPARATOR.join(islice(rest, run.lines)) for run in page.runs)


def _escaped(text: bytes) -> bytes:
    """Return lines escaped for JSON, without quotes, and with separators for the newlines between them."""
    return _encoder.encode(text.replace(b"\n", _SEPARATOR).decode("utf-8", "replace"))[1:-1]


async def with_lines(first: LogPage | None, rest: AsyncGenerator[LogPage, None]) -> AsyncGenerator[LogPage, None]:
    """Yield the pages that have lines, because a service may also yield empty ones. Closes ``rest``."""
    page = first
    try:
        while page is not None:
            if page.line_count:
                yield page
            page = await anext(rest, None)
    finally:
        await rest.aclose()


async def json_array(first: LogPage | None, rest: AsyncGenerator[LogPage, None]) -> Parts:
    """Yield the parts of one JSON array of lines."""
    opening = b"["
    async with aclosing(with_lines(first, rest)) as pages:
        async for page in pages:
            yield encode_lines(page, opening)
            opening = b","
    yield b"[]" if opening == b"[" else b"]"


async def page_frames(
    first: LogPage | None, rest: AsyncGenerator[LogPage, None], gaps: Any = CursorExpiredError
) -> Parts:
    """Yield log pages and an end frame; after one of the errors in ``gaps`` it asks the client to request again."""
    is_gap = False
    try:
        async with aclosing(with_lines(first, rest)) as pages:
            async for page in pages:
                yield encode_frame(page)
    except gaps:
        is_gap = True  # the next request gets this error as its status
    yield encode_frame(None, more=is_gap)


class LogReply(Response):
    """A log, sent in parts: holds one page, however long the log and however slow the client."""

    def __init__(self, what: str, parts: Parts, media_type: str) -> None:
        super().__init__(headers={"Content-Type": media_type, "Cache-Control": "no-store"})
        del self.headers["Content-Length"]
        self._what = what
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply; see ASGI."""
        # One task for the whole reply: a check before each page would cost a tenth of the page.
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body in self._parts:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)  # let other tasks run, and the one that notices that the client is gone
                if gone.done():
                    return
            await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            # Without the last chunk the server cuts the connection, which is an error to every client; a closed array
            # would look complete.
            _logger.warning(
                "reading the log of %s failed; the reply was cut off: %s",
                self._what,
                error,
                exc_info=not isinstance(error, TailspanError),
            )
        finally:
            gone.cancel()
            await self._parts.aclose()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a value as JSON; times become ISO 8601."""
    # Names of jobs may hold the lone surrogates of an undecodable argument, which a strict encoder rejects.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=datetime.isoformat)
    # Exactly this type: the published clients ignore an error's text if a charset follows.
    fixed = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return Response(body.encode("utf-8", "replace"), status, {**fixed, **(headers or {})})


def error_reply(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error whose text the published clients show."""
    return json_reply({"message": message}, status, headers)


async def on_tailspan_error(request: Request, error: Exception) -> Response:
    """Answer an error of the service with the HTTP status that means the same."""
    headers: dict[str, str] = {}
    match error:
        case JobNotFoundError():
            status: int = HTTPStatus.NOT_FOUND
        case RequestRejectedError(status_code=code) if code is not None and 400 <= code < 500:
            status = code
        case RequestRejectedError() | ConfigError():
            status = HTTPStatus.BAD_REQUEST
        case CursorExpiredError():
            status = HTTPStatus.GONE
            headers[RESUME_HEADER] = "" if error.resume_cursor is None else cursor_text(error.resume_cursor)
        case ServiceUnavailableError():
            status = HTTPStatus.SERVICE_UNAVAILABLE
            headers["Retry-After"] = str(math.ceil(error.retry_after_s or _RETRY_AFTER_S))
        case ServiceError():
            # Also AuthError: the service refused this server's credentials, not the caller's.
            status = HTTPStatus.BAD_GATEWAY
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
    return error_reply(status, str(error), headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
    return error_reply(error.status_code, message, error.headers)


async def on_bug(_: Request, error: Exception) -> Response:
    """Answer an unexpected error; `tailspan.http.server_limits` logs it."""
    return error_reply(500, "the server failed; see its log")
