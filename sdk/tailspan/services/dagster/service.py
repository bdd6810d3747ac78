"""`DagsterService`: runs as jobs, steps as tasks, events and printed output as lines."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from pydantic import field_validator

from tailspan._identity import span_id, trace_id
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, Line, LogPage
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, SubmitService, TaskService
from tailspan.services._http_options import LoginOptions
from tailspan.services._http_service import HttpService, Login, Token, drop_oldest, parameter_value
from tailspan.services._requests import Authorizer, path_segment
from tailspan.services.dagster.log import (
    Capture,
    EventReader,
    Item,
    Position,
    Printed,
    Records,
    event_items,
    head_bytes,
    output_items,
)
from tailspan.services.dagster.tasks import STATES, Notes, Plan, read_plan, state_of, task_runs, utc
from tailspan.services.dagster.wire import (
    EVENTS_A_PAGE,
    JOBS,
    LAUNCH,
    NOTES,
    RUN,
    RUNS,
    TERMINATE,
    Answer,
    CapturedLogs,
    Event,
    Events,
    PieceRequest,
    Repositories,
    Run,
    Runs,
    log_query,
)

__all__ = ["DagsterOptions", "DagsterService"]

A = TypeVar("A", bound=Answer)
T = TypeVar("T")

_RUNS_A_PAGE = 100
_MAX_RUNS = 1_000
_FRESH_S = 1.0
# In JSON a byte takes six at most, and a reply has two streams: 6 MiB of the 8 that a reply may have.
_PIECE_BYTES = 512 << 10
_MAX_PIECES = 16
_NO_BYTES = 1 << 40  # an offset behind the end of any file: that stream is not in the reply
# A page ends before an event that might not fit.
_PAGE_LINES, _PAGE_BYTES = MAX_PAGE_LINES - 1000, MAX_PAGE_BYTES // 2


class DagsterOptions(LoginOptions):
    """The table ``services.NAME`` of type ``dagster``.

    Attributes:
        ui_url: Where people see the runs; ``base_url`` if it is missing.
        compute_logs: Whether to read what the steps print.
    """

    ui_url: str | None = None
    compute_logs: bool = True

    @field_validator("base_url")
    @classmethod
    def _without_graphql(cls, base_url: str) -> str:
        return base_url.strip().rstrip("/").removesuffix("/graphql")


@dataclass(slots=True)
class _KnownRun:
    """A run as last requested.

    Attributes:
        at_s: When, by the monotonic clock.
        reply: What the API said.
        plan: Its steps; they never change.
        notes: What its events said.
    """

    at_s: float
    reply: Run
    plan: Plan = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)


class DagsterService(HttpService, TaskService, SubmitService):
    """The runs of one Dagster deployment; see the package."""

    Options = DagsterOptions
    options: DagsterOptions
    poll_min_s = 2.0

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, environ=environ)
        self._runs: dict[str, _KnownRun] = {}
        self._records: dict[str, Records] = {}
        # By run: a cursor, and how much further was read without a line.
        self._further: dict[str, tuple[bytes, bytes]] = {}

    def make_credentials(self, environ: Mapping[str, str]) -> Authorizer:
        """Return the credentials: user and password, a bearer token for a proxy, or the token of Dagster+."""
        if self.options.user is not None:
            return Login(self.name, self.options)
        if (urlsplit(self.options.base_url).hostname or "").endswith(".dagster.cloud"):
            variable, header = "DAGSTER_CLOUD_API_TOKEN", "Dagster-Cloud-Api-Token"
            return Token(self.name, self.options, variable=variable, scheme="", header=header, environ=environ)
        return Token(self.name, self.options, environ=environ)

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of a run."""
        run = await self._load(job_id, fresh=True)
        reply, notes = run.reply, run.notes
        state = state_of(reply, notes)
        newest = {task.task_id: task for task in self._tasks(job_id, run)}
        tags = {tag.key: tag.value for tag in reply.tags if not tag.key.startswith(".")}
        before = reply.parent_run_id
        return self.make_status(
            job_id,
            state,
            job_name=reply.job_name,
            submitted_at=utc(reply.creation_time),
            started_at=utc(reply.start_time),
            finished_at=utc(reply.end_time or reply.update_time) if state.is_terminal else None,
            job_status=reply.status,
            error=notes.error,
            attributes={key: value for key, value in tags.items() if not key.startswith("dagster/")},
            details={key.replace("/", "."): value for key, value in tags.items() if key.startswith("dagster/")},
            parent=before and f"00-{trace_id(self.identity, before)}-{span_id(self.identity, before, 'run')}-01",
            url=self._url(job_id),
            total_tasks=len(newest),
            finished_tasks=sum(task.ended for task in newest.values()),
        )

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return the steps of a run, each attempt."""
        return self._tasks(job_id, await self._load(job_id))

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the runs, newest first."""
        cursor: str | None = None
        while True:
            found = await self._query(RUNS, {"cursor": cursor, "limit": _RUNS_A_PAGE}, "runsOrError", Runs)
            rows = [
                ListedJob(
                    job_id=run.run_id,
                    job_name=run.job_name,
                    state=STATES.get(run.status, JobState.UNKNOWN),
                    created_at=utc(run.creation_time),
                    state_since=utc(run.update_time),
                    service=self.name,
                )
                for run in found.results
            ]
            if rows:
                yield rows
            if len(rows) < _RUNS_A_PAGE:
                return
            cursor = rows[-1].job_id

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the events of a run, and what its steps print."""
        further = self._further.get(job_id)
        start = further[1] if further is not None and further[0] == cursor else cursor
        position = Position.read(start, service=self.name, job_id=job_id)
        records = self._records.setdefault(job_id, Records(job_id))
        first_nano = (since_ms or 0) * NANOS_PER_MS
        reader, after, more = position.reader(), position.after, True
        read: set[str] = set()
        while more:
            read_s = time.time()
            reply, pieces = await self._read(
                job_id, position, position.captures.keys() - read, events=True, after=after
            )
            after, more = reply.cursor, reply.has_more
            working = position.copy()
            items = _take_events(working, reader, reply.events, records)
            working.move(reply, reader, read_s)
            # The end of a process is the latest time of its output, so that is read once the end is known.
            due = {key for key, one in working.captures.items() if key not in read and (one.ended_ms or not more)}
            read |= due
            if due - pieces.keys():
                pieces |= (await self._read(job_id, working, due - pieces.keys()))[1]
            output = {key: pieces[key] for key in working.captures if key in due & pieces.keys()}
            while True:
                found, due = await self._take_output(job_id, working, output, records, read_s)
                if not more and not due:
                    working.close(read_s)
                for page in self._pages(job_id, items + found, position, working, first_nano):
                    cursor = page.cursor
                    yield page
                position = working
                if not due:
                    break
                working, items = position.copy(), []
                output = (await self._read(job_id, working, due))[1]
        if cursor is not None:
            self._further[job_id] = cursor, position.pack()
            drop_oldest(self._further, _MAX_RUNS)
        drop_oldest(self._records, _MAX_RUNS)

    async def cancel(self, job_id: str) -> JobStatus:
        """Terminate a run; an ended one stays as it is.

        Raises:
            RequestRejectedError: Dagster cannot terminate it.
        """
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        reply = await self._query(TERMINATE, {"id": job_id}, "terminateRun", Answer, job_id=job_id, reads=False)
        status = await self.get_job(job_id)
        if reply.typename != "TerminateRunSuccess" and not status.state.is_terminal:
            text = f"Dagster did not terminate the run: {reply.message or reply.typename}"
            raise RequestRejectedError(text, service=self.name, job_id=job_id)
        return status

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
        """Launch a run of a job.

        Args:
            command: ``JOB``, ``LOCATION/JOB`` or ``REPOSITORY@LOCATION/JOB``, then run config as ``PATH=VALUE``, for
                example ``ops.load.config.rows=5``; a value may be JSON.
            name: Not possible: a run has the name of its job.
            attributes: Become tags.
            timeout_s: Becomes the tag ``dagster/max_runtime``, for deployments with run monitoring.
            cwd: Not possible: the code location has its own.
            env: Not possible: the code location has its own.

        Raises:
            ConfigError: The command does not have this form, or an argument is not possible.
            JobNotFoundError: There is no such job.
        """
        target, config = _command(command)
        if name is not None or cwd is not None or env:
            raise ConfigError("Dagster takes neither name nor cwd nor env: set them in the job or its code location")
        tags = dict(attributes or {})
        if timeout_s is not None:
            tags["dagster/max_runtime"] = str(max(1, round(timeout_s)))
        params = {
            "selector": await self._selector(target),
            "runConfigData": config,
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        reply = await self._query(LAUNCH, {"params": params}, "launchRun", Answer, job_id=target, reads=False)
        if reply.run is None:
            why = "; ".join(one.message or "" for one in reply.errors) or reply.message or reply.typename
            raise RequestRejectedError(f"Dagster did not launch {target}: {why}", service=self.name)
        return await self.status_after_submit(reply.run.run_id, job_name=target.rpartition("/")[2])

    async def _selector(self, target: str) -> Mapping[str, str]:
        """Return where a job is defined.

        Raises:
            ConfigError: Several code locations have a job of that name.
            JobNotFoundError: None has.
        """
        place, _, name = target.rpartition("/")
        repository, _, location = place.rpartition("@")
        reply = await self._query(JOBS, {}, "repositoriesOrError", Repositories)
        found = [
            (node.location.name, node.name)
            for node in reply.nodes
            if any(job.name == name for job in node.jobs)
            and location in ("", node.location.name)
            and repository in ("", node.name)
        ]
        if not found:
            raise JobNotFoundError(f"service {self.name} has no job {target}", service=self.name, job_id=target)
        if len(found) > 1:
            names = ", ".join(f"{repository}@{location}/{name}" for location, repository in sorted(found))
            raise ConfigError(f"several jobs are called {target}: {names}")
        return {"repositoryLocationName": found[0][0], "repositoryName": found[0][1], "jobName": name}

    async def _load(self, job_id: str, *, fresh: bool = False) -> _KnownRun:
        """Return a run with its steps; not older than a second, or requested now."""
        known = self._runs.pop(job_id, None)
        if known is not None:
            # The runs that were not requested for the longest time come first.
            self._runs[job_id] = known
            if not fresh and time.monotonic() - known.at_s < _FRESH_S:
                return known
        variables = {"id": job_id, "plan": known is None or not known.plan}
        reply = await self._query(RUN, variables, "runOrError", Run, job_id=job_id)
        if known is None:
            known = _KnownRun(0.0, reply)
        known.at_s, known.reply = time.monotonic(), reply
        known.plan = known.plan or read_plan(reply)
        while known.notes.lacks(reply):
            variables = {"id": job_id, "after": known.notes.cursor, "limit": EVENTS_A_PAGE}
            found = await self._query(NOTES, variables, "logsForRun", Events, job_id=job_id)
            for event in found.events:
                known.notes.add(event)
            known.notes.cursor = found.cursor
            if not found.has_more:
                break
        self._runs[job_id] = known
        drop_oldest(self._runs, _MAX_RUNS)
        return known

    def _tasks(self, job_id: str, run: _KnownRun) -> list[TaskRun]:
        return task_runs(run.reply, run.plan, run.notes, self._url(job_id))

    def _pages(
        self, job_id: str, items: Sequence[Item], position: Position, end: Position, first_nano: int
    ) -> Iterator[LogPage]:
        """Yield the lines of a reply by time, and move the position along with them.

        Args:
            job_id: The run.
            items: The lines.
            position: Where the reply begins.
            end: The position once all of its lines are read.
            first_nano: The time of the first line to yield, in ns since the epoch.
        """
        lines: list[Line] = []
        size = 0
        # Of what the lines so far are only a part: a page cannot end there.
        parts: set[tuple[str, int]] = set()

        def page(after: Position) -> LogPage:
            return LogPage.from_lines(lines, cursor=after.pack(), identity=self.identity, job_id=job_id)

        for item in sorted(items, key=lambda item: item.line.time_unix_nano):
            if not parts and lines and (len(lines) >= _PAGE_LINES or size + len(item.line.message) > _PAGE_BYTES):
                yield page(position)
                lines, size = [], 0
            position.advance(item)
            whole = item.event is not None or item.offset is not None
            (parts.discard if whole else parts.add)((item.capture, item.stream))
            if item.line.time_unix_nano >= first_nano:
                lines.append(item.line)
                size += len(item.line.message)
        if lines:
            yield page(end)

    async def _take_output(
        self,
        job_id: str,
        position: Position,
        output: Mapping[str, tuple[Printed, Printed]],
        records: Records,
        read_s: float,
    ) -> tuple[list[Item], set[str]]:
        """Return the lines of output, and the processes that have more; move the position behind them."""
        items: list[Item] = []
        more: set[str] = set()
        for key, pieces in output.items():
            capture = position.captures[key]
            for stream, piece in enumerate(pieces):
                whole, size = await self._whole_lines(job_id, capture, stream, piece, read_s)
                found, end, number = output_items(capture, stream, whole, size, records, read_s)
                items += found
                if end > capture.offsets[stream] and whole.full:
                    more.add(key)
                position.printed(key, stream, end, number)
        return items, more

    async def _whole_lines(
        self, job_id: str, capture: Capture, stream: int, piece: Printed, read_s: float
    ) -> tuple[Printed, int]:
        """Return a piece, a longer one if it is the beginning of a long line, and how many of its bytes are lines."""
        size = head_bytes(piece)
        if size == 0 and piece.full and piece.size < MAX_PAGE_BYTES:
            piece = await self._piece(job_id, capture, stream, MAX_PAGE_BYTES)
            size = head_bytes(piece)
        if size is None:
            # Bytes that are not UTF-8: the last newline is where the number of newlines stops to grow.
            newlines, size, most = piece.text.count("\n"), 0, piece.size
            while size < most:
                half = (size + most) // 2
                begin = await self._piece(job_id, capture, stream, half)
                size, most = (size, half) if begin.text.count("\n") == newlines else (half + 1, most)
        if (not size and piece.full) or (not piece.full and capture.is_flushed(read_s)):
            return piece, piece.size
        return piece, size

    async def _piece(self, job_id: str, capture: Capture, stream: int, size: int) -> Printed:
        """Request bytes of one stream of a process."""
        if size == 0:
            return Printed("", 0, False)
        first = [_NO_BYTES, _NO_BYTES]
        first[stream] = capture.offsets[stream]
        request = PieceRequest(capture.key, *first)
        document, variables = log_query(job_id, None, [request], size, events=False)
        data = await self._send(document, variables, job_id=job_id)
        return self._pieces(data, "piece0", request, size)[stream]

    async def _read(
        self,
        job_id: str,
        position: Position,
        keys: Collection[str],
        *,
        events: bool = False,
        after: str | None = None,
    ) -> tuple[Events, dict[str, tuple[Printed, Printed]]]:
        """Request events after a position, and what processes have printed after it.

        Args:
            job_id: The run.
            position: From where to read output.
            keys: The processes.
            events: Whether to request events.
            after: The cursor before the events.
        """
        wanted = [one for key, one in position.captures.items() if key in keys] if self.options.compute_logs else []
        groups = [wanted[start : start + _MAX_PIECES] for start in range(0, len(wanted), _MAX_PIECES)]
        limit = _PIECE_BYTES // max(1, min(len(wanted), _MAX_PIECES))
        reply = Events()
        output: dict[str, tuple[Printed, Printed]] = {}
        for place, group in enumerate(groups or [[]] * events):
            requests = [PieceRequest(one.key, *one.offsets) for one in group]
            with_events = events and place == 0
            document, variables = log_query(job_id, after, requests, limit, events=with_events)
            data = await self._send(document, variables, job_id=job_id)
            if with_events:
                reply = self._checked(data, "logsForRun", Events, job_id)
            for number, request in enumerate(requests):
                output[request.key] = self._pieces(data, f"piece{number}", request, limit)
        return reply, output

    async def _query(
        self,
        document: str,
        variables: Mapping[str, Any],
        name: str,
        kind: type[A],
        *,
        job_id: str | None = None,
        reads: bool = True,
    ) -> A:
        """Return one field of a reply; see `_checked`."""
        return self._checked(await self._send(document, variables, job_id=job_id, reads=reads), name, kind, job_id)

    async def _send(
        self, document: str, variables: Mapping[str, Any], *, job_id: str | None = None, reads: bool = True
    ) -> dict[str, Any]:
        """Return the data of a reply.

        Raises:
            ProtocolError: There is no GraphQL API at this address.
            ServiceUnavailableError: The server could not resolve all of it.
        """
        body = {"query": document, "variables": variables}
        try:
            # Without a job: a status 404 is about the address, since an unknown run has a reply.
            reply = await self.http.send_json("POST", "/graphql", body, reads=reads)
        except RequestRejectedError as error:
            if error.status_code in (404, 405):
                raise self.http.protocol_error(f"{error}: this is not Dagster's API", job_id) from None
            raise
        if not isinstance(reply, dict) or not isinstance(reply.get("data"), dict):
            raise self.http.protocol_error("POST /graphql: the reply is not one of GraphQL", job_id)
        if reply.get("errors"):
            text = "; ".join(str(one.get("message")) for one in reply["errors"])
            raise ServiceUnavailableError(f"POST /graphql: {text}", service=self.name, job_id=job_id)
        data: dict[str, Any] = reply["data"]
        return data

    def _checked(self, data: Mapping[str, Any], name: str, kind: type[A], job_id: str | None) -> A:
        """Return one field of a reply's data; errors have HTTP status 200 and a type of their own.

        Raises:
            JobNotFoundError: There is no such run.
            ServiceError: Another error; see the tree in `tailspan.errors`.
        """
        answer = self._read_as(data, name, Answer, job_id)
        text = f"{name}: {answer.typename}: {answer.message}"
        if answer.typename == "RunNotFoundError":
            raise JobNotFoundError(f"service {self.name} knows no job {job_id}", service=self.name, job_id=job_id)
        if answer.typename == "UnauthorizedError":
            raise AuthError(text, service=self.name, job_id=job_id)
        if answer.typename == "PythonError":
            raise ServiceUnavailableError(text, service=self.name, job_id=job_id)
        return self._read_as(data, name, kind, job_id)

    def _read_as(self, data: Mapping[str, Any], name: str, kind: type[T], job_id: str | None) -> T:
        try:
            # A timestamp is a number as a text.
            return msgspec.convert(data.get(name), kind, strict=False)
        except msgspec.ValidationError as error:
            raise self.http.protocol_error(f"POST /graphql: {name}: {error}", job_id) from None

    def _pieces(self, data: Mapping[str, Any], name: str, request: PieceRequest, limit: int) -> tuple[Printed, Printed]:
        """Return the pieces of both streams; a file that is not there, or not yet, has none."""
        output = self._read_as(data, name, CapturedLogs, None)
        ends = (output.cursor or "0:0").split(":")
        if len(ends) != len(request) - 1 or not all(one.isdecimal() for one in ends):
            raise self.http.protocol_error(f"POST /graphql: {output.cursor!r} is not a cursor of output", None)
        sizes = [int(end) - start for start, end in zip(request[1:], ends, strict=True)]
        stdout, stderr = (
            Printed(text, size, size >= limit) if text and size > 0 else Printed("", 0, False)
            for text, size in zip((output.stdout, output.stderr), sizes, strict=True)
        )
        return stdout, stderr

    def _url(self, job_id: str) -> str:
        return f"{(self.options.ui_url or self.identity).rstrip('/')}/runs/{path_segment(job_id)}"


def _take_events(position: Position, reader: EventReader, events: Sequence[Event], records: Records) -> list[Item]:
    """Return the lines of the events that were not read; move the position behind them."""
    items: list[Item] = []
    for event, uid, place in reader.new_events(events):
        items += event_items(event, uid, place, position.task_of(event))
        position.add(event)
    for event in events:
        records.add(event)
    return items


def _command(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the job and the run config of a command.

    Raises:
        ConfigError: It does not have the form of `DagsterService.submit`.
    """
    target, *pairs = command
    config: dict[str, Any] = {}
    for pair in pairs:
        path, sign, text = pair.partition("=")
        *parents, last = path.split(".")
        if not sign or not all((*parents, last)):
            raise ConfigError("the command of a Dagster job is JOB or LOCATION/JOB, then PATH=VALUE of its run config")
        table = config
        for one in parents:
            table = table.setdefault(one, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: {one} is already a value")
        table[last] = parameter_value(text)
    return target, config
