"""The requests and replies of the job API: what `tailspan.job_api.server` answers, byte by byte.

Source: the published ``fused`` clients 1.1.2 to 2.9.5, whose response models are strict about types but ignore keys
that they do not know: every reply has their keys and adds ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tailspan._identity import check_job_id
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
from tailspan.logs.page_wire import MAX_JOBS, MEDIA_TYPE, RESUME_HEADER, cursor_text, encode_frame, read_cursor
from tailspan.models import JobState, JobStatus, ListedJob

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from tailspan.services import JobService

__all__ = ["BASE_PATH", "JobApi", "encode_lines", "error_reply", "on_bug", "on_http_exception", "on_tailspan_error"]

BASE_PATH = "/server/v1"

_Parts = AsyncGenerator[bytes | bytearray, None]
_DEFAULT_ROWS, _MAX_ROWS = 25, 10_000
_RETRY_AFTER_S = 1.0
# Of one job in a reply for many: who has more is asked for alone, so that nobody needs to hold much of each.
_MOST_BYTES_OF_EACH, _MOST_BYTES_OF_MANY = 64 << 10, 4 << 20
# One job's log that cannot be read now must not keep those of all others.
_MOST_S_OF_MANY = 0.5
# The one control character that JSON leaves as it is, so that lines can be encoded as one text and split again.
_SEPARATOR = b"\x7f"
# From so many lines of one time on it is cheaper to escape each run for itself than to cut what was escaped.
_LONG_RUN = 16
_HEAD = b'{"message":"'
_TAILS = [
    b'","timestamp":%d' + (b',"stream":"' + name.encode() + b'"' if name else b"") + b"}," + _HEAD
    for name in Stream.NAMES
]
_JOB_STATUS = {
    state: JobStatus.from_state(state, job_id="", job_name="", identity="", trace_id="").job_status
    for state in JobState
}
_NOT_SENT = {"service", "_origin"}

_logger = logging.getLogger("tailspan.job_api.server")
_encoder = msgspec.json.Encoder()


def encode_lines(page: LogPage, before: bytes = b"") -> bytes:
    """Return the lines of a page as JSON objects with commas between them, as they stand in the array of a reply.

    The same as encoding each of ``page.messages()``, at a quarter of the time: one text is escaped, not one a line.

    Args:
        page: The lines, at least one.
        before: What goes before them: put in front later it would copy them all once more.
    """
    if _SEPARATOR in page.joined():
        return before + _encoder.encode(list(page.messages()))[1:-1]
    parts = [before + _HEAD]
    start = 0
    runs_are_long = page.line_count >= _LONG_RUN * len(page.runs)
    bodies = [] if runs_are_long else _escaped(page.lines).split(_SEPARATOR)
    for run in page.runs:
        stop = start + run.lines
        tail = _TAILS[run.stream]
        ms, past_ms = divmod(run.time_unix_nano, NANOS_PER_MS)
        between = tail % ms
        if past_ms + run.lines > NANOS_PER_MS:
            for index, line in enumerate(page.lines[start:stop]):
                parts += _escaped([line]), tail % ((run.time_unix_nano + index) // NANOS_PER_MS)
        elif runs_are_long:
            parts += _escaped(page.lines[start:stop]).replace(_SEPARATOR, between), between
        else:
            parts += between.join(bodies[start:stop]), between
        start = stop
    parts[-1] = parts[-1].removesuffix(b"," + _HEAD)
    return b"".join(parts)


def _escaped(lines: Sequence[bytes]) -> bytes:
    """Return lines as they stand between the quotes of JSON, with separators between them."""
    return _encoder.encode(_SEPARATOR.join(lines).decode("utf-8", "replace"))[1:-1]


class JobApi:
    """The four requests of the job API over one service, and its log pages where the service has offsets."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    @property
    def routes(self) -> list[Route]:
        """Which method answers which request; the paths are matched as sent, still escaped."""
        routes = [
            Route(f"{BASE_PATH}/run/by-id/{{job_id}}", self.status, methods=["GET"]),
            Route(f"{BASE_PATH}/run/by-id/{{job_id}}/cancel", self.cancel, methods=["POST"]),
            Route(f"{BASE_PATH}/logs/{{job_id}}", self.logs, methods=["GET"]),
            Route(f"{BASE_PATH}/job/self", self.list_jobs, methods=["GET"]),
        ]
        if self._has_pages:
            routes += [
                Route(f"{BASE_PATH}/log-pages/{{job_id}}", self.log_pages, methods=["GET"]),
                Route(f"{BASE_PATH}/log-pages", self.log_pages_of_many, methods=["GET"]),
            ]
        return routes

    async def status(self, request: Request) -> Response:
        """Return the job's status."""
        return await self._status_reply(await self._service.get_job(_job_id(request)))

    async def cancel(self, request: Request) -> Response:
        """Ask the job to end and return its new status."""
        return await self._status_reply(await self._service.cancel(_job_id(request)))

    async def logs(self, request: Request) -> Response:
        """Return the job's lines, oldest first; with ``since_ms``, those at or after it."""
        job_id = _job_id(request)
        pages = self._service.read_logs(job_id, since_ms=_since_ms(request))
        # The first page is read before the reply starts: until then an error can still be told by its status.
        first = await anext(pages, None)
        accepted = request.headers.get("accept", "").replace(";", ",").replace(" ", "").split(",")
        if self._has_pages and MEDIA_TYPE in accepted:
            return _LogReply(f"job {job_id!r}", _frames(first, pages, told=()), MEDIA_TYPE)
        return _LogReply(f"job {job_id!r}", _array(first, pages), "application/json")

    async def log_pages(self, request: Request) -> Response:
        """Return the job's lines as log pages: those after ``cursor``, or as `logs` does."""
        job_id = _job_id(request)
        cursor = request.query_params.get("cursor")
        if cursor is None:
            pages = self._service.read_logs(job_id, since_ms=_since_ms(request))
        else:
            pages = self._service.read_logs(job_id, read_cursor(cursor))
        return _LogReply(f"job {job_id!r}", _frames(await anext(pages, None), pages), MEDIA_TYPE)

    async def log_pages_of_many(self, request: Request) -> Response:
        """Return the next lines of many jobs as log pages, at most 64 KiB of each."""
        jobs, cursors = request.query_params.getlist("job"), request.query_params.getlist("cursor")
        if not 0 < len(jobs) == len(cursors) <= MAX_JOBS:
            raise ConfigError(f"expected as many of job as of cursor, 1 to {MAX_JOBS}")
        asked = list(zip(map(check_job_id, jobs), map(read_cursor, cursors), strict=True))
        return _LogReply(f"{len(asked)} jobs", self._frames_of(asked), MEDIA_TYPE)

    async def _frames_of(self, asked: Sequence[tuple[str, bytes]]) -> _Parts:
        sent = 0
        until_s = asyncio.get_running_loop().time() + _MOST_S_OF_MANY
        for number, (job_id, cursor) in enumerate(asked):
            frame = None
            if sent < _MOST_BYTES_OF_MANY:
                try:
                    async with asyncio.timeout_at(until_s):
                        frame = await self._next_frame(number, job_id, cursor)
                except (TailspanError, TimeoutError):
                    pass
                except Exception:
                    _logger.exception("reading the log of job %r failed", job_id)
            if frame is None or len(frame) > _MOST_BYTES_OF_EACH:
                # Who asks for it alone is told what is wrong with it, or has all of it.
                frame = encode_frame(None, job=number, more=True)
            sent += len(frame)
            yield frame

    async def _next_frame(self, number: int, job_id: str, cursor: bytes) -> bytearray:
        rest = self._service.read_logs(job_id, cursor)
        async with aclosing(_filled(await anext(rest, None), rest)) as pages:
            page = await anext(pages, None)
            more = page is not None and await anext(pages, None) is not None
            return encode_frame(page, job=number, more=more)

    @property
    def _has_pages(self) -> bool:
        """Whether lines are told by offsets, so that pages of them are the same for whoever reads them."""
        return self._service.has_offsets

    async def list_jobs(self, request: Request) -> Response:
        """Return some rows of the list, newest first."""
        skip = _whole_number(request, "skip", 0, math.inf)
        limit = _whole_number(request, "limit", _DEFAULT_ROWS, _MAX_ROWS)
        rows: list[Mapping[str, Any]] = []
        pages = self._service.list_jobs()
        try:
            while len(rows) < limit and (page := await anext(pages, None)) is not None:
                rows += [self._row(job) for job in islice(page, min(skip, len(page)), None)]
                skip = max(0, skip - len(page))
        finally:
            await _close(pages)
        return _json_reply(rows[:limit])

    async def _status_reply(self, job: JobStatus) -> Response:
        # A service that knows only times would have to fetch the log to say when it begins and ends.
        times = None if not self._service.has_offsets else await self._service.log_times_ms(job.job_id)
        first_ms, last_ms = times or (None, None)
        fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
        reply = {name: value for name, value in fields.items() if name not in _NOT_SENT}
        reply |= {"attributes": dict(job.attributes), "details": dict(job.details)}
        own = {"first_line_ms": first_ms, "last_line_ms": last_ms, "log_pages": self._has_pages}
        return _json_reply(reply | own)

    def _row(self, job: ListedJob) -> Mapping[str, Any]:
        return {
            "id": job.job_id,
            "user_id": self._service.name,
            # The wire wants a date; now keeps a job without one within everybody's lookback.
            "creation_date": job.created_at or job.state_since or datetime.now(UTC),
            "execution_environment_id": self._service.identity,
            "job_status": _JOB_STATUS[job.state],
            "job_status_date": job.state_since,
            "instance_id": job.instance_id,
            "instance_type": job.instance_type,
            "job_name": job.job_name,
            "state": job.state,
            "lines": job.lines,
        }


async def _filled(first: LogPage | None, rest: AsyncIterator[LogPage]) -> AsyncGenerator[LogPage, None]:
    """Yield the pages that have lines; the others a service need not leave out. Closes the rest."""
    page = first
    try:
        while page is not None:
            if page.line_count:
                yield page
            page = await anext(rest, None)
    finally:
        await _close(rest)


async def _array(first: LogPage | None, rest: AsyncIterator[LogPage]) -> _Parts:
    """Yield the parts of one JSON array of lines."""
    opening = b"["
    async with aclosing(_filled(first, rest)) as pages:
        async for page in pages:
            yield encode_lines(page, opening)
            opening = b","
    yield b"[]" if opening == b"[" else b"]"


async def _frames(first: LogPage | None, rest: AsyncIterator[LogPage], told: Any = CursorExpiredError) -> _Parts:
    """Yield log pages, and what says that there is no more, or by which errors one has to ask again."""
    is_gap = False
    try:
        async with aclosing(_filled(first, rest)) as pages:
            async for page in pages:
                yield encode_frame(page)
    except told:
        is_gap = True  # who asks again is told of it by the status
    yield encode_frame(None, more=is_gap)


class _LogReply(Response):
    """A log, sent part by part: holds one page, however long the log and however slow the reader."""

    def __init__(self, what: str, parts: _Parts, media_type: str) -> None:
        super().__init__(headers={"Content-Type": media_type, "Cache-Control": "no-store"})
        del self.headers["Content-Length"]
        self._what = what
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # One task for the whole reply: asking before each page costs a tenth of the page.
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body in self._parts:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)  # others have their turn, and what tells that the client is gone
                if gone.done():
                    return
            await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            # Returning without the last chunk makes the server cut the connection, which is an error to every client;
            # a closed array would be a lie.
            _logger.warning(
                "reading the log of %s failed, the reply was cut off: %s",
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


def _job_id(request: Request) -> str:
    try:
        return check_job_id(unquote(request.path_params["job_id"], errors="strict"))
    except UnicodeDecodeError:
        raise ConfigError("the job id in the path is not UTF-8") from None


def _since_ms(request: Request) -> int | None:
    text = request.query_params.get("since_ms")
    if text is None:
        return None
    # Times are kept in 64-bit nanoseconds: until the year 2262.
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or int(text) > 2**63 // NANOS_PER_MS:
        raise ConfigError(f"since_ms is {text[:40]!r}, expected a whole number of ms since 1970")
    return max(0, int(text))


def _whole_number(request: Request, name: str, default: int, maximum: float) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > maximum:
        most = f" of at most {maximum:,.0f}" if maximum != math.inf else ""
        raise ConfigError(f"{name} is {text[:40]!r}, expected a whole number{most}")
    return int(text)


def _json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Names of jobs may hold the lone surrogates of an undecodable argument, which a strict encoder refuses.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=datetime.isoformat)
    # Exactly this type: the published clients ignore an error's text when a charset follows.
    fixed = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return Response(body.encode("utf-8", "replace"), status, {**fixed, **(headers or {})})


def error_reply(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make an error whose text the published clients show."""
    return _json_reply({"message": message}, status, headers)


async def on_tailspan_error(request: Request, error: Exception) -> Response:
    """Answer what the service said with the HTTP status that means it."""
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
            # An AuthError too: it is this server's credentials that the service refused, not the caller's.
            status = HTTPStatus.BAD_GATEWAY
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
    return error_reply(status, str(error), headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
    return error_reply(error.status_code, message, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer an error that nobody foresaw; the traceback goes to the log only."""
    _logger.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return error_reply(500, "the server failed; its log says why")


async def _close(pages: AsyncIterator[Any]) -> None:
    # Services write generators, but the protocol asks only for an iterator.
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()
