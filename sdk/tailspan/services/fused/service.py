"""`FusedService`: jobs of a Fused job API, the hosted one or any server that speaks its wire protocol.

A line is known by its time and text only, and may become visible late: `tailspan.services.fused.window` says what
follows from that. If the server is `tailspan serve` over a service with offsets, it sends log pages instead, with the
times and uids that the lines have there, and one request reads many jobs: see `tailspan.logs.page_wire`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from tailspan._identity import check_job_id
from tailspan.errors import ConfigError, ProtocolError, RequestRejectedError
from tailspan.logs.page import LogPage, Message
from tailspan.logs.page_wire import MEDIA_TYPE
from tailspan.models import JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, MergingService
from tailspan.services._json_stream import STEP_BYTES, ArraySplitter, Splitter, decode_json
from tailspan.services._requests import Tls, normalise_base_url, path_segment
from tailspan.services.fused.auth import DEFAULT_SCHEME, Credentials
from tailspan.services.fused.http import FusedHttp
from tailspan.services.fused.log_times import Probe, find_times
from tailspan.services.fused.pages import MessageSplitter, ServedPages
from tailspan.services.fused.stream import lines, messages, pages
from tailspan.services.fused.window import LateWindow
from tailspan.services.fused.wire import (
    DEFAULT_BASE_URL,
    decode_row,
    decode_status,
    line_times,
)

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = ["FusedService"]

T = TypeVar("T")

_TRIES = 4
_ROWS = 100
_MOST_ROWS = 1600
_OVERLAP_ROWS = 10
# Clocks differ. A later time of a line (the year 2200) is not believed.
_MAX_AHEAD_S = 86400.0
_PROBE_LINES = 5_000
_PROBE_BYTES = 64 << 10
# How much of a list's text is cached until the next list; rows beyond that are decoded each time.
_REMEMBERED_BYTES = 16 << 20

_any_json = msgspec.json.Decoder()
_array_json = msgspec.json.Decoder(list[msgspec.Raw])


class FusedService(MergingService):
    """A job service over HTTP. One pool of connections; nothing is sent before the first call.

    Attributes:
        name: The configured name.
        identity: The normalised base URL.
        final_read: True: lines may become visible late.
    """

    poll_min_s = 1.0
    poll_max_s = 30.0
    final_read = True

    def __init__(
        self,
        name: str = "fused",
        *,
        base_url: str = DEFAULT_BASE_URL,
        token: str | None = None,
        token_file: Path | None = None,
        scheme: str = DEFAULT_SCHEME,
        requests_per_second: float = 20.0,
        timeout_s: float = 10.0,
        ca_file: Path | None = None,
        client_cert: Path | None = None,
        client_key: Path | None = None,
        tries: int = _TRIES,
        credentials: Credentials | None = None,
    ) -> None:
        """Configure the service. Nothing is sent or read yet.

        Args:
            name: The configured name.
            base_url: Where the API is, for example ``http://127.0.0.1:8798/server/v1``.
            token: A fixed token; None: see `tailspan.services.fused.auth`.
            token_file: A file with the token, read at each request.
            scheme: The authentication scheme, the word before the token.
            requests_per_second: Highest average rate of requests.
            timeout_s: Time limit for connecting and for each wait on the server, in seconds.
            ca_file: PEM certificates to trust instead of the system's.
            client_cert: PEM certificate to show to the server, for mutual TLS.
            client_key: Its key, where it is not in the same file.
            tries: Number of attempts of a request that only reads; 1 for callers with a schedule of their own. All
                attempts together take at most about 5 s and one timeout.
            credentials: Instead of token, token_file and scheme.

        Raises:
            ConfigError: `base_url` is not a valid URL.
        """
        self.name = name
        self.identity = normalise_base_url(base_url)
        self._most_rows = _MOST_ROWS
        # By their text, as last listed: of ten thousand running jobs hardly one has changed by the next time.
        self._listed: dict[bytes, ListedJob] = {}
        self._listed_bytes = 0
        self._http = FusedHttp(
            name,
            self.identity,
            credentials or Credentials(name, self.identity, token=token, token_file=token_file, scheme=scheme),
            timeout_s=timeout_s,
            tls=Tls(ca_file, client_cert, client_key),
            requests_per_second=requests_per_second,
            tries=tries,
            headers={"X-Fused-Cache-Disable": "true"},
        )
        self._pages = ServedPages(self._http)

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: Settings) -> FusedService:
        """Make the service of a section ``services.NAME``.

        Raises:
            ConfigError: An option is unknown or not valid; names the key.
        """
        from tailspan.services.fused.options import FusedOptions  # pydantic: only with a configuration

        found = FusedOptions.read(name, options)
        try:
            return cls(name, **found)
        except ConfigError as error:
            key = f"services.{name}.{error.key}"
            raise ConfigError(f"{key}: {error}", key=key, service=name) from None

    @property
    def gather_s(self) -> float:
        """See `tailspan.services.MergingService`."""
        return self._pages.gather_s

    def merges(self, cursor: bytes | None) -> bool:
        """See `tailspan.services.MergingService`."""
        return cursor is not None and self._pages.are_for(cursor)

    @property
    def tries(self) -> int:
        """How often a request that only reads is sent before its error is raised."""
        return self._http.tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self._http.tries = tries

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status."""
        path = _status_path(job_id)
        return self._status(f"GET {path}", await self._http.get(path, job_id=job_id), job_id)[0]

    async def cancel(self, job_id: str) -> JobStatus:
        """Ask the job to end and return its new status; an ended job stays as it is."""
        path = f"{_status_path(job_id)}/cancel"
        try:
            return self._status(f"POST {path}", await self._http.post(path, job_id=job_id), job_id)[0]
        except RequestRejectedError:
            # The server may refuse to cancel an ended job; that is not an error here.
            job = await self.get_job(job_id)
            if job.state.is_terminal:
                return job
            raise

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the service's jobs, newest first, page by page, each once.

        Requests overlap, because jobs that begin meanwhile shift all others. They grow, because most servers start from
        the newest job for each; the first is small, because most callers need no more.
        """
        known: set[str] = set()
        skip = longest = 0
        limit = _ROWS
        nothing_new = False
        before, self._listed, self._listed_bytes = self._listed, {}, 0
        while True:
            try:
                body = await self._http.get("/job/self", {"skip": skip, "limit": limit})
            except RequestRejectedError:
                if limit == _ROWS:
                    raise
                # The reply does not say how many rows are allowed.
                self._most_rows = limit = _ROWS
                continue
            rows = self._rows(body, before)
            limit = min(4 * limit, self._most_rows) if len(rows) >= limit else limit
            new = list({row.job_id: row for row in rows if row is not None and row.job_id not in known}.values())
            known.update(row.job_id for row in new)
            longest = max(longest, len(rows))
            # A full page without new jobs can also mean that a page of jobs began meanwhile.
            if not rows or (not new and (nothing_new or len(rows) < longest)):
                return
            nothing_new = not new
            if new:
                yield new
            skip += len(rows) if len(rows) <= _OVERLAP_ROWS or not new else len(rows) - _OVERLAP_ROWS

    def _rows(self, body: bytes, before: Mapping[bytes, ListedJob]) -> list[ListedJob | None]:
        """Return the rows of a reply, None for one without an id; a row that has not changed is not decoded again.

        Raises:
            ProtocolError: No row has an id: the reply is not a list of jobs.
        """
        request, expected = "GET /job/self", "an array of jobs"
        rows: list[ListedJob | None] = []
        for text in map(bytes, self._json(request, expected, body, None, _array_json)):
            row = before.get(text) or self._listed.get(text)
            row = row or decode_row(self._json(request, expected, text, None), service=self.name)
            rows.append(row)
            if row is None:
                continue
            self._listed_bytes += len(text)
            if self._listed_bytes <= _REMEMBERED_BYTES:
                self._listed[text] = row
        if rows and not any(rows):
            raise self._protocol_error(request, expected, "no row has an id", None)
        return rows

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
        long_reads: AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that are readable now, after the cursor; see `tailspan.services.MergingService.read_logs`."""
        if self._pages.are_for(cursor):
            async with aclosing(self._pages.read(job_id, cursor, since_ms, long_reads or nullcontext())) as served:
                async for page in served:
                    yield page
            return
        window = LateWindow(
            self.identity,
            job_id,
            cursor,
            since_ms=since_ms,
            late_window_s=late_window_s,
            latest_ms=int((time.time() + _MAX_AHEAD_S) * 1000),
        )
        async with aclosing(self._elements(job_id, window.since_ms, lines)) as parts:
            async for part in parts:
                for entries in part:
                    for page in pages(window, entries):
                        yield page

    async def read_messages(self, job_id: str, since_ms: int | None = None) -> AsyncGenerator[Sequence[Message], None]:
        """Yield the lines as the server sent them, with all keys, at or after ``since_ms``.

        Each sequence is sorted by time, which changes nothing if the server sends the oldest first. Our own server
        sends log pages, which have the same lines and cost less.
        """
        first_ms = max(0, since_ms or 0)
        since = first_ms - 1 if first_ms else None
        async with aclosing(self._elements(job_id, since, messages, others={MEDIA_TYPE: MessageSplitter})) as parts:
            async for entries in parts:
                found = [entry for entry in entries if entry["timestamp"] >= first_ms] if first_ms else entries
                if found:
                    yield found

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the first and the last line in ms since the epoch, or None without lines.

        Our own server reports them in the status. From another server this reads a short log whole, and a small part of
        a long one: its start, and what is needed to find its end; see `tailspan.services.fused.log_times`.
        """
        path = _status_path(job_id)
        job, reply = self._status(f"GET {path}", await self._http.get(path, job_id=job_id), job_id)
        is_reported, times = line_times(reply)
        if is_reported:
            return times

        async def probe(since_ms: int | None, most_lines: float = _PROBE_LINES) -> Probe:
            first_ms, last_ms, count = -1, -1, 0
            ask_ms = None if since_ms is None else since_ms - 1
            async with aclosing(self._elements(job_id, ask_ms, lines, step_bytes=_PROBE_BYTES)) as parts:
                async for entries in parts:
                    found = [ms for page in entries for ms in page.times_ms if ms >= (since_ms or 0)]
                    first_ms = min(found + [first_ms] * (first_ms >= 0), default=-1)
                    last_ms = max(last_ms, *found, -1)
                    count += len(found)
                    if count > most_lines:
                        return Probe(first_ms, last_ms, whole=False)
            return Probe(first_ms, last_ms, whole=True)

        async def read_newest_ms(since_ms: int) -> int:
            return (await probe(since_ms, math.inf)).last_ms

        now = datetime.now(UTC)
        end = job.job_status_date if job.state.is_terminal and job.job_status_date else now
        return await find_times(probe, read_newest_ms, end_ms=_ms(end), now_ms=_ms(now))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _elements(
        self,
        job_id: str,
        since_ms: int | None,
        decoder: msgspec.json.Decoder[list[T]],
        step_bytes: int = STEP_BYTES,
        *,
        others: Mapping[str, Callable[[], Splitter[T]]] | None = None,
    ) -> AsyncGenerator[list[T], None]:
        """Yield the elements of a log reply as they arrive; see `FusedHttp.parts` for ``others``."""
        path = f"/logs/{path_segment(check_job_id(job_id))}"
        params = None if since_ms is None else {"since_ms": max(0, since_ms)}
        expected = " or ".join(('an array of {"message": text, "timestamp": ms}', *(others or ())))
        splitter = partial(ArraySplitter, decoder, step_bytes)
        return self._http.parts(path, params, splitter, expected, job_id=job_id, others=others)

    def _status(self, request: str, body: bytes, job_id: str) -> tuple[JobStatus, Mapping[str, Any]]:
        expected = "the status of a job"
        reply = self._json(request, expected, body, job_id)
        if not isinstance(reply, dict):
            raise self._protocol_error(request, expected, "it is not an object", job_id)
        try:
            job = decode_status(reply, service=self.name, identity=self.identity)
        except msgspec.ValidationError as error:
            raise self._protocol_error(request, expected, str(error), job_id) from None
        self._pages.offered = reply.get("log_pages") is True
        return job, reply

    def _json(
        self,
        request: str,
        expected: str,
        body: bytes,
        job_id: str | None,
        decoder: msgspec.json.Decoder[Any] = _any_json,
    ) -> Any:
        try:
            return decode_json(decoder, body)
        except msgspec.ValidationError:
            raise self._protocol_error(request, expected, "it does not match that form", job_id) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            what = "it is HTML" if body.lstrip().startswith(b"<") else "it is not JSON" if body else "it is empty"
            raise self._protocol_error(request, expected, what, job_id) from None

    def _protocol_error(self, request: str, expected: str, found: str, job_id: str | None) -> ProtocolError:
        return ProtocolError(
            f"{request}: the reply should be {expected}, but {found}; check services.{self.name}.base_url "
            f"({self.identity})",
            service=self.name,
            job_id=job_id,
        )


def _status_path(job_id: str) -> str:
    return f"/run/by-id/{path_segment(check_job_id(job_id))}"


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
