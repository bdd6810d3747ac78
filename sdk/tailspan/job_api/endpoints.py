"""The requests of the job API: what `tailspan.job_api.server` answers to each.

Source: the published ``fused`` clients 1.1.2 to 2.9.5, whose response models are strict about types but ignore unknown
keys: every reply has their keys and adds ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tailspan._identity import check_job_id
from tailspan._plural import plural
from tailspan.errors import ConfigError, TailspanError
from tailspan.job_api.replies import LogReply, Parts, json_array, json_reply, page_frames, with_lines
from tailspan.logs.page import NANOS_PER_MS
from tailspan.logs.page_wire import MAX_JOBS, MEDIA_TYPE, encode_frame, read_cursor
from tailspan.models import JobState, JobStatus, ListedJob

if TYPE_CHECKING:
    from tailspan.services import JobService

__all__ = ["BASE_PATH", "JobApi"]

BASE_PATH = "/server/v1"

_DEFAULT_ROWS, _MAX_ROWS = 25, 10_000
# Limits of a reply for many jobs: a job with more lines is requested alone, so that nothing holds many long pages.
_MAX_JOB_BYTES, _MAX_REPLY_BYTES = 64 << 10, 4 << 20
# One job's slow log must not delay the logs of all others.
_MAX_REPLY_S = 0.5
_JOB_STATUS = {
    state: JobStatus.from_state(state, job_id="", job_name="", identity="", trace_id="").job_status
    for state in JobState
}
_NOT_SENT = {"service", "_origin"}

_logger = logging.getLogger("tailspan.job_api.server")


class JobApi:
    """The four requests of the job API over one service, and its log pages if the service has offsets."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    @property
    def routes(self) -> list[Route]:
        """The methods that answer each request; paths are matched as sent, still escaped."""
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
        """Cancel the job and return its new status."""
        return await self._status_reply(await self._service.cancel(_job_id(request)))

    async def logs(self, request: Request) -> Response:
        """Return the job's lines, oldest first; with ``since_ms``, those at or after it."""
        job_id = _job_id(request)
        pages = self._service.read_logs(job_id, since_ms=_since_ms(request))
        # Read the first page before the reply starts: until then an error can still have a status of its own.
        first = await anext(pages, None)
        accepted = request.headers.get("accept", "").replace(";", ",").replace(" ", "").split(",")
        if self._has_pages and MEDIA_TYPE in accepted:
            return LogReply(f"job {job_id!r}", page_frames(first, pages, gaps=()), MEDIA_TYPE)
        return LogReply(f"job {job_id!r}", json_array(first, pages), "application/json")

    async def log_pages(self, request: Request) -> Response:
        """Return the job's lines as log pages: the lines after ``cursor``, or the same lines as `logs`."""
        job_id = _job_id(request)
        cursor = request.query_params.get("cursor")
        if cursor is None:
            pages = self._service.read_logs(job_id, since_ms=_since_ms(request))
        else:
            pages = self._service.read_logs(job_id, read_cursor(cursor))
        return LogReply(f"job {job_id!r}", page_frames(await anext(pages, None), pages), MEDIA_TYPE)

    async def log_pages_of_many(self, request: Request) -> Response:
        """Return the next lines of many jobs as log pages, at most 64 KiB for each."""
        jobs, cursors = request.query_params.getlist("job"), request.query_params.getlist("cursor")
        if not 0 < len(jobs) == len(cursors) <= MAX_JOBS:
            raise ConfigError(f"expected equally many `job` and `cursor` parameters, 1 to {MAX_JOBS} of each")
        asked = list(zip(map(check_job_id, jobs), map(read_cursor, cursors), strict=True))
        return LogReply(f"{len(asked)} {plural(len(asked), 'job')}", self._frames_of(asked), MEDIA_TYPE)

    async def _frames_of(self, asked: Sequence[tuple[str, bytes]]) -> Parts:
        sent = 0
        until_s = asyncio.get_running_loop().time() + _MAX_REPLY_S
        for number, (job_id, cursor) in enumerate(asked):
            frame = None
            if sent < _MAX_REPLY_BYTES:
                try:
                    async with asyncio.timeout_at(until_s):
                        frame = await self._next_frame(number, job_id, cursor)
                except (TailspanError, TimeoutError):
                    pass
                except Exception:
                    _logger.exception("reading the log of job %r failed", job_id)
            if frame is None or len(frame) > _MAX_JOB_BYTES:
                # A request for this job alone returns its error, or all of its lines.
                frame = encode_frame(None, job=number, more=True)
            sent += len(frame)
            yield frame

    async def _next_frame(self, number: int, job_id: str, cursor: bytes) -> bytearray:
        rest = self._service.read_logs(job_id, cursor)
        async with aclosing(with_lines(await anext(rest, None), rest)) as pages:
            page = await anext(pages, None)
            more = page is not None and await anext(pages, None) is not None
            return encode_frame(page, job=number, more=more)

    @property
    def _has_pages(self) -> bool:
        """Whether the service has offsets, so that its pages are the same for every reader."""
        return self._service.has_offsets

    async def list_jobs(self, request: Request) -> Response:
        """Return some rows of the list, newest first."""
        skip = _whole_number(request, "skip", 0, math.inf)
        limit = _whole_number(request, "limit", _DEFAULT_ROWS, _MAX_ROWS)
        rows: list[Mapping[str, Any]] = []
        async with aclosing(self._service.list_jobs()) as pages:
            while len(rows) < limit and (page := await anext(pages, None)) is not None:
                rows += [self._row(job) for job in islice(page, min(skip, len(page)), None)]
                skip = max(0, skip - len(page))
        return json_reply(rows[:limit])

    async def _status_reply(self, job: JobStatus) -> Response:
        # A service that knows only times would have to fetch the log to find its first and last line.
        times = None if not self._service.has_offsets else await self._service.log_times_ms(job.job_id)
        first_ms, last_ms = times or (None, None)
        fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
        reply = {name: value for name, value in fields.items() if name not in _NOT_SENT}
        reply |= {"attributes": dict(job.attributes), "details": dict(job.details)}
        own = {"first_line_ms": first_ms, "last_line_ms": last_ms, "log_pages": self._has_pages}
        return json_reply(reply | own)

    def _row(self, job: ListedJob) -> Mapping[str, Any]:
        return {
            "id": job.job_id,
            "user_id": self._service.name,
            # The wire requires a date; the present keeps a job without one within every lookback.
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
