"""`DockerService`: containers of Docker or Podman as jobs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, field_validator

from tailspan._identity import trace_id
from tailspan._times import time_of_ms
from tailspan.config import Options, PositiveDuration, UserPath
from tailspan.config.fields import StrList
from tailspan.errors import ConfigError, CursorExpiredError, JobNotFoundError, RequestRejectedError, TailspanError
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, Line, LogPage
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, ChangeFeed, ChangeFeedService, Problem
from tailspan.services._json_stream import ArraySplitter
from tailspan.services._requests import Authorization, Authorizer, ServiceRequests, Tls, path_segment
from tailspan.services.docker.streams import ContainerStream, LiveContainers
from tailspan.services.docker.wire import (
    ContainerLine,
    ContainerPosition,
    EngineContainer,
    EngineLogSplitter,
    EventSplitter,
    api_time,
    container_of,
)

__all__ = ["DockerOptions", "DockerService"]

_DEFAULT_HOST = "unix:///var/run/docker.sock"
_VARIABLES = ("DOCKER_HOST", "CONTAINER_HOST")
_RESTART_S = 10.0
_LIST_PAGE = 500
_NOT_MODIFIED = 304
_EXIT_TEXT = re.compile(r"Exited \((-?\d+)\)")
_NAME_LABELS = ("tailspan.name", "com.docker.compose.service", "io.podman.compose.service")
_SIGNALS = {128 + one.value: one.name for one in signal.Signals}
_TERMINATED = 128 + signal.SIGTERM
_ACTIONS = (
    "create",
    "init",
    "start",
    "die",
    "died",
    "kill",
    "stop",
    "oom",
    "restart",
    "destroy",
    "remove",
    "pause",
    "unpause",
)


class DockerOptions(Options):
    """The table ``services.NAME`` of type ``docker``.

    Attributes:
        host: The engine's address: ``unix:///PATH``, ``tcp://HOST:PORT``, ``http://...`` or ``https://...``; by default
            what ``DOCKER_HOST`` or ``CONTAINER_HOST`` has, else Docker's socket.
        labels: ``KEY`` or ``KEY=VALUE``; only containers with all of them are jobs.
        names: Globs; only containers with such a name are jobs. Empty: all.
        max_streams: Number of containers whose logs are followed at a time; further ones are polled.
        timeout: Limit for one request, in seconds.
        ca_file: Certificates to trust, for TLS.
        client_cert: Certificate to show to the engine.
        client_key: Its key, if it is not in the same file.
    """

    host: str | None = None
    labels: StrList = Field(default_factory=list)
    names: StrList = Field(default_factory=list)
    max_streams: int = Field(default=500, gt=0)
    timeout: PositiveDuration = 10.0
    ca_file: UserPath | None = None
    client_cert: UserPath | None = None
    client_key: UserPath | None = None

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str | None) -> str | None:
        if host is not None:
            _address(host, tls=False)
        return host


class _ListedContainer(msgspec.Struct, rename="pascal"):
    """What is used of a container in the engine's list."""

    id: str
    names: list[str] | None = None
    labels: dict[str, str] | None = None
    state: str | None = None
    status: str | None = None
    created: Any = None

    @property
    def name(self) -> str:
        """Its name, without the slash."""
        return self.names[0].lstrip("/") if self.names else ""

    @property
    def job_state(self) -> JobState:
        """Its state, as far as the list has it."""
        if self.state in ("exited", "dead"):
            code = _EXIT_TEXT.match(self.status or "")
            return JobState.SUCCEEDED if code and code[1] == "0" else JobState.FAILED
        return JobState.PENDING if self.state == "created" else JobState.RUNNING


_containers = msgspec.json.Decoder(list[_ListedContainer])


class _NoCredentials(Authorizer):
    """Sends no credentials: the engine has none but the right to its socket, and client certificates."""

    async def authorization(self) -> Authorization:
        """Return no header."""
        return Authorization("", "nowhere")

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return None: there are none."""
        return None


class _EngineRequests(ServiceRequests):
    """Requests to an engine; 304 says that there was nothing to do."""

    url_key = "host"

    def error_of(self, status: int, headers: Mapping[str, str], text: str, job_id: str | None) -> TailspanError | None:
        """Return the error for 304; None for other statuses."""
        return RequestRejectedError(text, status_code=status, job_id=job_id) if status == _NOT_MODIFIED else None

    def _reason(self, error: Exception) -> str:
        text = super()._reason(error)
        if self._socket is None:
            return text
        cure = "is the engine running?"
        if "Permission denied" in text:
            cure = "add the agent's user to the socket's group, such as docker"
        return f"{text} (socket {self._socket}: {cure})"


class DockerService(ChangeFeedService):
    """The containers of one engine; see the module."""

    Options = DockerOptions
    has_offsets = True
    # Podman 4.3 loses lines of a log that is followed while much is written.
    final_read = True

    def __init__(self, name: str, options: DockerOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        """Open nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
            environ: The environment.

        Raises:
            ConfigError: The address of the environment is not valid.
        """
        host = options.host or next((environ[one] for one in _VARIABLES if environ.get(one)), _DEFAULT_HOST)
        url, socket = _address(host, tls=options.client_cert is not None or options.ca_file is not None)
        self.name = name
        self.options = options
        self.identity = f"docker:{socket or url}"
        self._live: LiveContainers | None = None
        self._canceled: set[str] = set()
        self._rows: dict[str, ListedJob] = {}

        def requests(*, streams: bool) -> _EngineRequests:
            return _EngineRequests(
                name,
                url,
                _NoCredentials(),
                timeout_s=options.timeout,
                tls=Tls(options.ca_file, options.client_cert, options.client_key),
                requests_per_second=200,
                tries=3,
                socket=socket,
                streams=streams,
            )

        self._http = requests(streams=False)
        # The stream of a silent container sends nothing for as long as it is silent.
        self._streams = requests(streams=True)

    @property
    def tries(self) -> int:
        """How often a request that only reads is sent before it raises its error."""
        return self._http.tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self._http.tries = self._streams.tries = tries

    def open_changes(self) -> ChangeFeed:
        """Follow events, and the logs of running containers."""
        if self._live is not None:
            self._live.close()
        self._live = LiveContainers(self.name, self, max_streams=self.options.max_streams)
        return self._live

    async def aclose(self) -> None:
        """Close the streams and connections."""
        live, self._live = self._live, None
        if live is not None:
            await live.aclose()
        await self._http.aclose()
        await self._streams.aclose()

    async def find_problems(self) -> Sequence[Problem]:
        """Return a warning for containers whose logs the engine cannot read."""
        info = await self._http.get_json("/info")
        driver = info.get("LoggingDriver") if isinstance(info, dict) else None
        if driver in ("none", "passthrough"):
            text = f"the engine's log driver is {driver!r}: it keeps no lines; use json-file or k8s-file"
            return (Problem(text),)
        return ()

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of a container, also of one that was removed while it was followed."""
        return self._status(await self._container(job_id))

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the containers, newest first, and those that were removed while they were followed."""
        found = await self._listed(every=True)
        live = self._live
        known = {container.id for container in found}
        self._rows = {container.id: self._row(container) for container in found}
        rows = list(self._rows.values())
        if live is not None:
            rows += [self._row_of(one) for one in live.gone.values() if one.container_id not in known]
        rows.sort(key=lambda row: row.created_at or datetime.fromtimestamp(0, UTC), reverse=True)
        for start in range(0, len(rows), _LIST_PAGE):
            yield rows[start : start + _LIST_PAGE]

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of a container."""
        position = ContainerPosition.unpack(cursor, service=self.name, job_id=job_id)
        if cursor is None and since_ms is not None:
            position = position._replace(lines=None)
        stream = None if since_ms is not None else await self._stream(job_id, position)
        kept = None if stream is None else stream.take(position)
        pages = _ContainerPages(self, job_id, position)
        if kept is not None:
            for line in kept:
                for page in pages.add(line):
                    yield page
        else:
            stored = self._stored(job_id, position, since_ms)
            async with aclosing(stored):
                async for line in stored:
                    for page in pages.add(line):
                        yield page
        for page in pages.rest():
            yield page

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop the container; an ended one stays as it is."""
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        self._canceled.add(job_id)
        try:
            # The engine answers once the container has ended: after its own time limit, 10 s by default.
            await self._streams.post(f"/containers/{path_segment(job_id)}/stop", job_id=job_id)
        except RequestRejectedError as error:
            self._canceled.discard(job_id)
            if error.status_code != _NOT_MODIFIED:
                raise
        except TailspanError:
            self._canceled.discard(job_id)
            raise
        return await self.get_job(job_id)

    # What `LiveContainers` needs.

    def chooses(self, name: str, labels: Mapping[str, str]) -> bool:
        """Return whether a container is a job, by its name and labels."""
        wanted = (one.partition("=") for one in self.options.labels)
        has_labels = all(key in labels and (not equal or labels[key] == value) for key, equal, value in wanted)
        return has_labels and (not self.options.names or any(fnmatchcase(name, one) for one in self.options.names))

    async def inspect(self, container_id: str) -> EngineContainer:
        """Return a container.

        Raises:
            JobNotFoundError: The engine has no such container.
        """
        reply = await self._http.get_json(f"/containers/{path_segment(container_id)}/json", job_id=container_id)
        try:
            return container_of(reply)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._http.protocol_error("the reply is not a container", container_id) from None

    async def find_running(self) -> Collection[str]:
        """Return the ids of the chosen containers that run."""
        return [container.id for container in await self._listed(every=False)]

    async def follow_events(self, since_ns: int) -> AsyncGenerator[list[Mapping[str, Any]], None]:
        """Yield events of containers after a time, and those that come."""
        chosen = _json({"type": ["container"], "event": list(_ACTIONS)})
        params = {"filters": chosen, "since": api_time(since_ns)}
        parts = self._streams.parts("/events", params, EventSplitter, "events", job_id=None)
        async with aclosing(parts):
            async for events in parts:
                yield events

    async def follow_log(
        self, container_id: str, position: ContainerPosition
    ) -> AsyncGenerator[list[ContainerLine], None]:
        """Yield the lines after a position, and those that come, until the container ends."""
        lines = self._log(container_id, position.since_ns, follow=True)
        async with aclosing(lines):
            async for found in lines:
                yield [line for line in found if line.place > position.place]

    async def _log(
        self, container_id: str, since_ns: int, *, follow: bool
    ) -> AsyncGenerator[list[ContainerLine], None]:
        params: dict[str, int | str] = {"stdout": 1, "stderr": 1, "timestamps": 1}
        params |= {"follow": 1} if follow else {}
        params |= {"since": api_time(since_ns)} if since_ns else {}
        http = self._streams if follow else self._http
        parts = http.parts(
            f"/containers/{path_segment(container_id)}/logs", params, EngineLogSplitter, "a log", job_id=container_id
        )
        async with aclosing(parts):
            async for lines in parts:
                yield lines

    async def _stored(
        self, job_id: str, position: ContainerPosition, since_ms: int | None
    ) -> AsyncGenerator[ContainerLine, None]:
        """Yield the lines after a position that the engine has.

        Raises:
            CursorExpiredError: It has dropped the line of the position.
        """
        since_ns = position.since_ns if since_ms is None else since_ms * 1_000_000
        # The line before must be there: rotation drops the oldest ones.
        missing = position.time_ns > 0 and not position.is_gone
        async with aclosing(self._log(job_id, since_ns, follow=False)) as found:
            async for lines in found:
                for line in lines:
                    if line.place == position.place:
                        missing = False
                    elif line.place > position.place and (since_ms is None or line.time_ns >= since_ns):
                        if missing:
                            raise self._expired(job_id, position)
                        yield line

    def _expired(self, job_id: str, position: ContainerPosition) -> CursorExpiredError:
        resume = position._replace(is_gone=True).pack()
        text = f"the engine has dropped lines of container {job_id[:12]}"
        return CursorExpiredError(text, resume_cursor=resume, service=self.name, job_id=job_id)

    async def _stream(self, job_id: str, position: ContainerPosition) -> ContainerStream | None:
        """Return the stream of a container that is followed; None if its log is read by requests."""
        live = self._live
        if live is None:
            return None
        stream = live.stream(job_id)
        if stream is not None or job_id in live.gone:
            return stream
        container = await self._container(job_id)
        return live.open(job_id, position) if not container.has_ended and container.started_at else None

    async def _container(self, job_id: str) -> EngineContainer:
        live = self._live
        try:
            return await self.inspect(job_id)
        except JobNotFoundError:
            container = None if live is None else live.removed(job_id)
            if container is None:
                raise
            return container

    async def _listed(self, *, every: bool) -> list[_ListedContainer]:
        params: dict[str, int | str] = {"all": 1} if every else {}
        params |= {"filters": _json({"label": self.options.labels})} if self.options.labels else {}
        parts = self._http.parts(
            "/containers/json", params, lambda: ArraySplitter(_containers), "an array of containers", job_id=None
        )
        found: list[_ListedContainer] = []
        async with aclosing(parts):
            async for some in parts:
                found += [one for one in some if self.chooses(one.name, one.labels or {})]
        return found

    def _row(self, container: _ListedContainer) -> ListedJob:
        """Return the row of a container; that of one which has not changed is not made again."""
        state, lines, known = container.job_state, self._counted(container.id), self._rows.get(container.id)
        name = _job_name(container.name, container.labels or {})
        if known is not None and (known.state, known.lines, known.job_name) == (state, lines, name):
            return known
        return ListedJob(
            job_id=container.id,
            job_name=name,
            state=state,
            created_at=time_of_ms(container.created * 1000) if isinstance(container.created, int) else None,
            service=self.name,
            lines=lines,
        )

    def _row_of(self, container: EngineContainer) -> ListedJob:
        return ListedJob(
            job_id=container.container_id,
            job_name=_job_name(container.name, container.labels),
            state=JobState.UNKNOWN,
            created_at=container.created_at,
            service=self.name,
            lines=self._counted(container.container_id),
        )

    def _counted(self, job_id: str) -> int | None:
        stream = self._live.streams.get(job_id) if self._live is not None else None
        return None if stream is None else stream.lines

    def _status(self, one: EngineContainer) -> JobStatus:
        state = self._state(one)
        ended = state.is_terminal
        details = {f"container.label.{key}": value for key, value in one.labels.items()}
        details |= {"container.id": one.container_id, "container.name": one.name, "container.image.name": one.image}
        details |= {"process.command": one.command}
        attempt = one.restarts + 1
        return self.make_status(
            one.container_id,
            state,
            job_name=_job_name(one.name, one.labels),
            submitted_at=one.created_at,
            started_at=one.started_at,
            finished_at=one.finished_at if ended else None,
            job_status=one.status,
            exit_code=one.exit_code if ended else None,
            error=_error(one, state) if ended and state is not JobState.SUCCEEDED else None,
            details={key: value for key, value in details.items() if value},
            attempt=attempt,
            trace_id=trace_id(self.identity, one.container_id, attempt),
            logs_complete=self._is_complete(one) if ended else None,
        )

    def _state(self, one: EngineContainer) -> JobState:
        if not one.state.is_terminal:
            return one.state
        live = self._live
        stopped = one.container_id in self._canceled or (live is not None and one.container_id in live.stopped)
        if one.has_ended and not one.oom_killed and (stopped or one.exit_code == _TERMINATED):
            return JobState.CANCELED
        # The engine restarts it in a moment: this end is not the last one.
        recent = one.finished_at is not None and datetime.now(UTC) - one.finished_at < timedelta(seconds=_RESTART_S)
        return JobState.RUNNING if one.may_restart and recent else one.state

    def _is_complete(self, one: EngineContainer) -> bool | None:
        """Return True once no line will follow; None while the stream has not ended."""
        stream = self._live.streams.get(one.container_id) if self._live is not None else None
        return True if stream is None or stream.has_ended else None


class _ContainerPages:
    """Pages of lines as they come."""

    def __init__(self, service: DockerService, job_id: str, position: ContainerPosition) -> None:
        self._service = service
        self._job_id = job_id
        self._position = position
        self._lines: list[Line] = []
        self._size = 0

    def add(self, line: ContainerLine) -> list[LogPage]:
        """Add a line and return the page that it does not fit into."""
        size = len(line.text) + 1
        full = len(self._lines) >= MAX_PAGE_LINES or (self._lines and self._size + size > MAX_PAGE_BYTES)
        pages = self.rest() if full else []
        self._lines.append(line.line())
        self._size += size
        self._position = self._position.after(line)
        return pages

    def rest(self) -> list[LogPage]:
        """Return the last page, if there is one."""
        if not self._lines:
            return []
        identity = self._service.identity
        page = LogPage.from_lines(self._lines, cursor=self._position.pack(), identity=identity, job_id=self._job_id)
        self._lines, self._size = [], 0
        return [page]


def _error(one: EngineContainer, state: JobState) -> str:
    if state is JobState.CANCELED:
        return "the container was stopped"
    if one.oom_killed:
        return f"killed because it was out of memory (exit code {one.exit_code})"
    if one.error:
        return one.error
    name = _SIGNALS.get(one.exit_code)
    return f"exit code {one.exit_code}" + (f" ({name})" if name else "")


def _job_name(name: str, labels: Mapping[str, str]) -> str:
    return next((labels[one] for one in _NAME_LABELS if labels.get(one)), name)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _address(host: str, *, tls: bool) -> tuple[str, Path | None]:
    """Return the base URL and the socket of an engine's address.

    Raises:
        ConfigError: It is not an address that can be used.
    """
    scheme, separator, rest = host.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return "http://localhost", Path(rest)
    if separator and rest and scheme in ("tcp", "http", "https"):
        chosen = ("https" if tls else "http") if scheme == "tcp" else scheme
        return f"{chosen}://{rest.rstrip('/')}", None
    text = f"{host!r} is not an engine's address: use unix:///PATH, tcp://HOST:PORT or https://HOST:PORT"
    raise ConfigError(text)
