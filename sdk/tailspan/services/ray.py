"""`RayService`: the jobs of a Ray cluster.

On the head node a job's lines are read from its log file, by offset. Elsewhere they come from a WebSocket that sends
the log from its start: it stays open between reads, and after a restart it is read up to the cursor. Both have the
same text, so a cursor and the uids of lines are those of offsets in it. The other request for a log returns the whole
log in one piece of JSON, which has stopped head nodes (ray-project/ray#59025): it is not used.

Source: Ray 2.60.0, as measured, and its modules ``dashboard.modules.job``.
"""

from __future__ import annotations

import os
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
import msgspec

from tailspan._identity import job_hash
from tailspan._times import time_of_ms
from tailspan.config import UserPath
from tailspan.errors import ConfigError, CursorExpiredError, JobNotFoundError, ServiceUnavailableError
from tailspan.local.job_name import default_name
from tailspan.logs.page import MAX_PAGE_BYTES, NANOS_PER_MS, LineRun, LogPage, OpenLine
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, Problem, SubmitService
from tailspan.services._http_options import LoginOptions
from tailspan.services._http_service import HttpService, Token, drop_oldest, pack_cursor, unpack_cursor
from tailspan.services._json_stream import ArraySplitter
from tailspan.services._log_file import (
    CHECKED_BYTES,
    FileAccess,
    LogFile,
    LogGapError,
    LogPart,
    LogPosition,
    SeenTimes,
    check_of,
    follow_log,
    lines_of,
    page_of,
    uid_key,
)
from tailspan.services._requests import Authorizer, is_local, path_segment

if TYPE_CHECKING:
    from tailspan.http.websocket import WebSocket

__all__ = ["RayOptions", "RayService"]

_TEMP_DIR = Path("/tmp/ray")  # noqa: S108 - where Ray has it
_LIST_PAGE = 500
_FRESH_S = 2.0
_SESSION_S = 60.0
_MOST_KNOWN = 10_000
_MOST_SEEN = 2_000
_MOST_TAILS = 50
_MAX_OPEN_BYTES = 64 << 10
_MAX_LINE_BYTES = 32 << 20  # Ray never divides a line
# The WebSocket sends ten lines at a time without a pause, until the end of the log; then it looks for more each second.
_FIRST_TEXT_S = 3.0
_MORE_TEXT_S = 0.3
_WAITING_TEXT_S = 0.05
_ERROR_CHARS = 500
_AFTER_ERROR = ", last available logs"

_STATES: Mapping[str, JobState] = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "STOPPED": JobState.CANCELED,
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
}


class _RayJob(msgspec.Struct, frozen=True):
    """What a row needs of a job; the rest of its JSON, which can be 20,000 characters of log, is skipped."""

    type: str | None = None
    submission_id: str | None = None
    status: str | None = None
    entrypoint: str | None = None
    error_type: str | None = None
    start_time: float | None = None
    end_time: float | None = None
    metadata: Any = None
    driver_node_id: str | None = None


class _RayDetails(_RayJob, frozen=True):
    """What a status needs of a job."""

    job_id: str | None = None
    message: str | None = None
    driver_exit_code: int | None = None
    runtime_env: Any = None


_jobs = msgspec.json.Decoder(list[_RayJob])


class RayOptions(LoginOptions):
    """The table ``services.NAME`` of type ``ray``.

    Attributes:
        cluster: The name of the cluster, from which its ids are computed instead of ``base_url``.
        temp_dir: Ray's directory on this machine, where it has the log files; None: ``/tmp/ray`` if ``base_url`` is
            this machine.
    """

    cluster: str | None = None
    temp_dir: UserPath | None = None


class _KnownStatus(NamedTuple):
    """What was last seen of a job.

    Attributes:
        at_s: When, by the monotonic clock.
        status: Its status.
    """

    at_s: float
    status: JobStatus


class _Tail:
    """The log of a job as its WebSocket sends it.

    Attributes:
        offset: The end of the lines that were taken, in bytes of the text.
        text: What was received after that.
        received_unix_nano: When the last of it was received.
        is_complete: Whether the server has sent everything.
    """

    def __init__(self, socket: WebSocket, errors: Callable[[], AbstractContextManager[None]]) -> None:
        """Receive nothing yet.

        Args:
            socket: The connection.
            errors: Raises its errors as ours.
        """
        self.offset = 0
        self.text = bytearray()
        self.received_unix_nano = 0
        self.is_complete = False
        self._socket = socket
        self._errors = errors
        self._first = b""
        self._last = b""

    def check(self) -> bytes:
        """Return the digest of the text before the offset, as `LogFile.check` returns it."""
        return check_of(self._first[: min(CHECKED_BYTES, self.offset)], self._last)

    async def receive(self, timeout_s: float) -> bool:
        """Wait for text and add it; return whether there was any.

        Raises:
            ServiceUnavailableError: The connection has ended before the end of the log.
        """
        piece: bytes | None = b""
        with self._errors(), anyio.move_on_after(timeout_s):
            piece = await self._socket.receive_text()
        if piece is None:
            self.is_complete = True
        if not piece:
            return False
        self.text += piece
        self.received_unix_nano = time.time_ns()
        return True

    def take(self, size: int) -> None:
        """Drop the first bytes of the text: their lines were taken."""
        taken = bytes(self.text[:size])
        del self.text[:size]
        self.offset += len(taken)
        if len(self._first) < CHECKED_BYTES:
            self._first = (self._first + taken)[:CHECKED_BYTES]
        self._last = (self._last + taken)[-CHECKED_BYTES:]

    def close(self) -> None:
        """Close the WebSocket."""
        self._socket.close()


class RayService(HttpService, SubmitService):
    """The submitted jobs of one Ray cluster; see the module."""

    Options = RayOptions
    poll_max_s = 10.0

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, environ=environ)
        self._base_url = self.identity
        if self._ray.cluster:
            self.identity = f"ray:{self._ray.cluster}"
        self._jobs: dict[str, _KnownStatus] = {}
        # By job: when it was first seen to run, after it was seen to wait; None while it waits.
        self._started: dict[str, datetime | None] = {}
        self._rows: dict[str, tuple[_RayJob, ListedJob]] = {}
        self._session: tuple[float, str] = float("-inf"), ""
        self._tails: dict[str, _Tail] = {}
        self._tails_loop: object = None
        self._read_whole: dict[str, int] = {}
        self._seen: dict[str, SeenTimes] = {}

    def make_credentials(self, environ: Mapping[str, str]) -> Authorizer:
        """Return the credentials: a token of Ray's token authentication, or those of a proxy."""
        if self.options.user is not None:
            return super().make_credentials(environ)
        return Token(self.name, self.options, variable="RAY_AUTH_TOKEN", environ=environ)

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status."""
        job = await self.http.get_json(f"/api/jobs/{path_segment(job_id)}", job_id=job_id)
        try:
            found = msgspec.convert(job, _RayDetails)
        except msgspec.ValidationError as error:
            raise self.http.protocol_error(f"the reply is not a job: {error}", job_id) from None
        if found.status is None:
            raise self.http.protocol_error("the reply is not a job: it has no status", job_id)
        if found.type != "SUBMISSION" or found.submission_id != job_id:
            text = f"{job_id} is not the submission id of a job: Ray has no log of other drivers"
            raise JobNotFoundError(text, service=self.name, job_id=job_id)
        status = self._status(job_id, found)
        self._jobs.pop(job_id, None)
        self._jobs[job_id] = _KnownStatus(time.monotonic(), status)
        drop_oldest(self._jobs, _MOST_KNOWN)
        return status

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the submitted jobs, newest first. Ray returns all jobs at once, in any order."""
        found: list[ListedJob] = []
        parts = self.http.parts("/api/jobs/", None, lambda: ArraySplitter(_jobs), "an array of jobs", job_id=None)
        async with aclosing(parts):
            async for jobs in parts:
                found += [row for job in jobs if (row := self._row(job)) is not None]
        if len(self._rows) > len(found):
            self._rows = {row.job_id: self._rows[row.job_id] for row in found}
        found.sort(key=_created, reverse=True)
        for start in range(0, len(found), _LIST_PAGE):
            yield found[start : start + _LIST_PAGE]

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of the job's driver and its children."""
        position = self._position(cursor, job_id)
        status = await self._recent(job_id)
        file = await self._log_file(job_id)
        found = self._parts_of_file(file, position, status) if file else self._parts_of_tail(position, status)
        async with aclosing(found):
            async for part in found:
                page = part.since((since_ms or 0) * NANOS_PER_MS)
                if page is not None:
                    page.cursor = _cursor(part.position)
                    yield page

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the line whose newline has not come."""
        if (await self._recent(job_id)).state.is_terminal:
            return None
        if (file := await self._log_file(job_id)) is not None:
            with LogFile(file, FileAccess(file.parent)) as log:
                return log.open_line(self.identity, job_id)
        tail = self._tails.get(job_id)
        if tail is None or not tail.text:
            return None
        text = bytes(tail.text[:_MAX_OPEN_BYTES])
        uid = f"{job_hash(self.identity, job_id)}-{tail.offset:012x}-open-{len(text):x}"
        return OpenLine(text, tail.received_unix_nano, uid)

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop a job; an ended one stays as it is. It ends some seconds later."""
        await self.http.post(f"/api/jobs/{path_segment(job_id)}/stop", job_id=job_id)
        return await self.get_job(job_id)

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Submit a job.

        Args:
            command: The entrypoint.
            name: The job's name, in the metadata as ``job_name``.
            attributes: Become metadata.
            timeout_s: Not possible.
            cwd: Not possible: a job runs in a directory of the cluster.
            env: Environment of the job.

        Raises:
            ConfigError: An argument is not possible.
        """
        if timeout_s is not None or cwd is not None:
            raise ConfigError("Ray takes neither timeout nor cwd: use `timeout` and `cd` in the command")
        # With an id of our own, a job whose reply was lost is found.
        job_id = f"raysubmit_{secrets.token_hex(8)}"
        body: dict[str, Any] = {"entrypoint": shlex.join(command), "submission_id": job_id}
        metadata = {**(attributes or {}), **({"job_name": name} if name else {})}
        body |= {"metadata": metadata} if metadata else {}
        body |= {"runtime_env": {"env_vars": dict(env)}} if env else {}
        try:
            await self.http.send_json("POST", "/api/jobs/", body)
        except ServiceUnavailableError as error:
            try:
                return await self.get_job(job_id)
            except JobNotFoundError:
                raise error from None
        return await self.status_after_submit(job_id, job_name=name or default_name(command))

    async def find_problems(self) -> Sequence[Problem]:
        """Return whether log files are there and may not be read."""
        folder = await self._logs_dir()
        if folder is None and self._ray.temp_dir is not None:
            text = f"{self._ray.temp_dir} has no session of this cluster: lines are read through its API"
            return [Problem(text, is_fatal=False)]
        if folder is not None and not os.access(folder, os.R_OK | os.X_OK):
            text = f"{folder} is not readable for this user: lines are read through Ray's API, which costs more"
            return [Problem(text, is_fatal=False)]
        return []

    async def aclose(self) -> None:
        """Close the connections."""
        self._drop_tails(0)
        await super().aclose()

    @property
    def _ray(self) -> RayOptions:
        assert isinstance(self.options, RayOptions)
        return self.options

    async def _recent(self, job_id: str) -> JobStatus:
        """Return a job's status, not older than two seconds; that of an ended job does not change."""
        known = self._jobs.get(job_id)
        if known is not None and (known.status.state.is_terminal or time.monotonic() - known.at_s < _FRESH_S):
            return known.status
        return await self.get_job(job_id)

    def _status(self, job_id: str, job: _RayDetails) -> JobStatus:
        state, code = _state(job.status, job.error_type), job.driver_exit_code
        metadata = {str(key): str(value) for key, value in _table(job.metadata).items()}
        submitted = time_of_ms(job.start_time)
        details = {
            "process.command": job.entrypoint,
            "ray.job.id": job.job_id,
            "ray.job.error_type": job.error_type,
        }
        environment = _table(_table(job.runtime_env).get("env_vars"))
        return self.make_status(
            job_id,
            state,
            job_name=_name(job_id, job.entrypoint, job.metadata),
            instance_id=job.driver_node_id,
            submitted_at=submitted,
            started_at=self._start(job_id, state, submitted),
            finished_at=time_of_ms(job.end_time) if state.is_terminal else None,
            job_status=job.status,
            exit_code=None if code is None else 128 - code if code < 0 else code,
            error=_error(job.message) if state in (JobState.FAILED, JobState.LOST) else None,
            attributes={key: value for key, value in metadata.items() if key != "job_name"},
            details={key: value for key, value in details.items() if value},
            parent=environment.get("TRACEPARENT"),
            url=f"{self._base_url}/#/jobs/{path_segment(job_id)}",
        )

    def _start(self, job_id: str, state: JobState, submitted: datetime | None) -> datetime | None:
        """Return when a job began: Ray has only the time of its submission, which can be minutes before."""
        if state is JobState.PENDING:
            self._started.setdefault(job_id, None)
            drop_oldest(self._started, _MOST_KNOWN)
            return None
        if job_id in self._started and self._started[job_id] is None and state is JobState.RUNNING:
            self._started[job_id] = datetime.now(UTC)
        return self._started.get(job_id) or submitted

    def _row(self, job: _RayJob) -> ListedJob | None:
        """Return the row of a job; that of a job which has not changed is not made again."""
        if job.type != "SUBMISSION" or job.submission_id is None:
            return None
        known = self._rows.get(job.submission_id)
        if known is not None and known[0] == job:
            return known[1]
        created = time_of_ms(job.start_time)
        row = ListedJob(
            job_id=job.submission_id,
            job_name=_name(job.submission_id, job.entrypoint, job.metadata),
            state=_state(job.status, job.error_type),
            created_at=created,
            state_since=time_of_ms(job.end_time) or created,
            instance_id=job.driver_node_id,
            service=self.name,
        )
        self._rows[job.submission_id] = job, row
        return row

    def _position(self, cursor: bytes | None, job_id: str) -> LogPosition:
        parts = unpack_cursor(cursor, service=self.name, job_id=job_id)
        try:
            return LogPosition.unpack(parts["p"]) if parts else LogPosition()
        except (KeyError, ValueError):
            text = f"{(cursor or b'')[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=self.name, job_id=job_id) from None

    async def _logs_dir(self) -> Path | None:
        """Return the directory of the cluster's log files; None if this machine does not have it."""
        temp_dir = self._ray.temp_dir
        if temp_dir is None:
            if not is_local(self._base_url):
                return None
            temp_dir = _TEMP_DIR
        at_s, session = self._session
        if time.monotonic() - at_s > _SESSION_S:
            found = await self.http.get_json("/api/version")
            session = str(found.get("session_name") or "") if isinstance(found, dict) else ""
            self._session = time.monotonic(), session
        # Not session_latest: that may be another cluster of this machine.
        folder = temp_dir / session / "logs"
        return folder if session and "/" not in session and folder.is_dir() else None

    async def _log_file(self, job_id: str) -> Path | None:
        """Return the job's log file; None if it is on another node, or may not be read."""
        folder = await self._logs_dir()
        if folder is None or "/" in job_id or "\0" in job_id:
            return None
        file = folder / f"job-driver-{job_id}.log"
        return file if os.access(file, os.R_OK) else None

    async def _parts_of_file(
        self, file: Path, position: LogPosition, status: JobStatus
    ) -> AsyncGenerator[LogPart, None]:
        seen = self._seen.setdefault(status.job_id, SeenTimes())
        drop_oldest(self._seen, _MOST_SEEN)
        parts = follow_log(
            file,
            position,
            access=FileAccess(file.parent),
            ended=status.state.is_terminal,
            identity=self.identity,
            log=status.job_id,
            seen=seen,
        )
        with closing(parts):
            try:
                for part in parts:
                    yield part
            except LogGapError as error:
                raise self._gap(str(error), error.position, status.job_id) from None

    def _gap(self, text: str, position: LogPosition, job_id: str) -> CursorExpiredError:
        return CursorExpiredError(text, resume_cursor=_cursor(position), service=self.name, job_id=job_id)

    async def _parts_of_tail(self, position: LogPosition, status: JobStatus) -> AsyncGenerator[LogPart, None]:
        job_id, ended = status.job_id, status.state.is_terminal
        if status.state is JobState.PENDING or (ended and self._read_whole.get(job_id) == position.offset):
            return
        tail = self._take_tail(position, job_id)
        was_open = tail is not None
        while True:
            try:
                if tail is None:
                    tail = await self._open_tail(position, job_id)
                async for part in self._received(tail, position, status, was_open=was_open):
                    position = part.position
                    yield part
            except ServiceUnavailableError as error:
                _close(tail)
                if not was_open:
                    text = f"the log broke off: {error}; Ray also ends it at bytes that are not UTF-8"
                    raise ServiceUnavailableError(text, service=self.name, job_id=job_id) from None
                # For example a proxy that closes silent connections.
                tail, was_open = None, False
            except GeneratorExit:
                self._keep_tail(job_id, tail)
                raise
            except BaseException:
                _close(tail)
                raise
            else:
                break
        if ended:
            self._read_whole[job_id] = tail.offset
            drop_oldest(self._read_whole, _MOST_KNOWN)
            _close(tail)
        else:
            self._keep_tail(job_id, tail)

    async def _received(
        self, tail: _Tail, position: LogPosition, status: JobStatus, *, was_open: bool
    ) -> AsyncGenerator[LogPart, None]:
        """Yield the complete lines that come now; of an ended job, all."""
        timeout_s = _FIRST_TEXT_S
        if was_open or tail.received_unix_nano:
            timeout_s = _WAITING_TEXT_S if was_open else _MORE_TEXT_S
        more = True
        while more:
            # The server closes the WebSocket some seconds after it has sent the whole log of an ended job.
            more = not tail.is_complete and await tail.receive(
                self.options.timeout if status.state.is_terminal else timeout_s
            )
            timeout_s = _MORE_TEXT_S
            if not more and status.state.is_terminal and not tail.is_complete:
                text = f"it has no end within {self.options.timeout:g} s"
                raise ServiceUnavailableError(text, service=self.name, job_id=status.job_id)
            if not more or len(tail.text) >= MAX_PAGE_BYTES:
                for part in self._cut(tail, position, status, is_last=not more):
                    position = part.position
                    yield part

    def _cut(self, tail: _Tail, position: LogPosition, status: JobStatus, *, is_last: bool) -> Iterator[LogPart]:
        """Yield the complete lines of what was received."""
        ended = tail.is_complete and status.state.is_terminal
        key = uid_key(self.identity, status.job_id)
        while tail.text:
            data = bytes(tail.text[:MAX_PAGE_BYTES])
            if len(data) < MAX_PAGE_BYTES and not is_last:
                return
            lines, is_whole = lines_of(data, at_end=len(data) == len(tail.text), ended=ended)
            if not lines:
                return
            nano = tail.received_unix_nano
            if status.finished_at is not None:
                nano = min(nano, int(status.finished_at.timestamp() * 1000) * NANOS_PER_MS)
            run = LineRun(lines.count(b"\n") if is_whole else 1, max(nano, position.next_unix_nano))
            page = page_of(lines, is_whole, [run], key, position.earlier + tail.offset)
            tail.take(len(lines))
            position = LogPosition(tail.offset, 0, tail.check(), position.earlier, run.time_unix_nano + run.lines)
            yield LogPart(page, position)

    def _take_tail(self, position: LogPosition, job_id: str) -> _Tail | None:
        """Return the open WebSocket of a job that goes on at a position; None without one."""
        loop = anyio.lowlevel.current_token()
        if self._tails_loop != loop:
            # Connections belong to an event loop.
            self._tails, self._tails_loop = {}, loop
        tail = self._tails.pop(job_id, None)
        if tail is None or (tail.offset == position.offset and (not tail.offset or tail.check() == position.check)):
            return tail
        _close(tail)
        return None

    async def _open_tail(self, position: LogPosition, job_id: str) -> _Tail:
        """Open the WebSocket of a job and read the text before a position.

        Raises:
            CursorExpiredError: The log does not have that text.
        """
        path = f"/api/jobs/{path_segment(job_id)}/logs/tail"
        # Ray reads nothing from the connection, so it answers no pings.
        socket = await self.http.open_socket(path, pings=False, max_bytes=_MAX_LINE_BYTES)
        tail = _Tail(socket, partial(self.http.socket_errors, path))
        try:
            while tail.offset < position.offset:
                if not tail.text and not await tail.receive(self.options.timeout):
                    break
                tail.take(min(len(tail.text), position.offset - tail.offset))
            if position.offset and tail.check() != position.check:
                text = f"the log of {job_id} does not have the text that was read before: it was replaced"
                raise self._gap(text, position.restart(), job_id)
        except BaseException:
            _close(tail)
            raise
        return tail

    def _keep_tail(self, job_id: str, tail: _Tail | None) -> None:
        """Keep the WebSocket open for the next read, and close the oldest of very many."""
        _close(self._tails.pop(job_id, None))
        if tail is not None:
            self._tails[job_id] = tail
        self._drop_tails(_MOST_TAILS)

    def _drop_tails(self, most: int) -> None:
        while len(self._tails) > most:
            _close(self._tails.pop(next(iter(self._tails))))


def _close(tail: _Tail | None) -> None:
    if tail is not None:
        tail.close()


def _cursor(position: LogPosition) -> bytes:
    return pack_cursor({"p": list(position)})


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _created(row: ListedJob) -> float:
    return row.created_at.timestamp() if row.created_at is not None else 0.0


def _state(status: str | None, error_type: str | None) -> JobState:
    state = _STATES.get(status or "", JobState.UNKNOWN)
    # The node or the supervisor of the job is gone.
    return JobState.LOST if state is JobState.FAILED and error_type == "JOB_SUPERVISOR_ACTOR_DIED" else state


def _name(job_id: str, entrypoint: str | None, metadata: Mapping[str, Any] | None) -> str:
    """Return the job's name: of its metadata, or the program of its entrypoint."""
    if given := _table(metadata).get("job_name"):
        return str(given)
    try:
        command = shlex.split(entrypoint or "")
    except ValueError:
        command = (entrypoint or "").split()
    return default_name(command) if command else job_id


def _error(text: str | None) -> str | None:
    """Return why a job failed; Ray's message goes on with the end of the log, up to 20,000 characters."""
    message = (text or "").partition(_AFTER_ERROR)[0].strip()
    return message[:_ERROR_CHARS] or None
