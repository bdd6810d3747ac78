"""A job service of scripted jobs, and the job API over it on a real port in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
import uvicorn
from starlette.types import Receive, Scope, Send

from tailspan._identity import trace_id
from tailspan.errors import JobNotFoundError
from tailspan.job_api.server import BASE_PATH, create_app, listen, make_server
from tailspan.logs.page import Line, LogPage
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, JobService

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
START_MS = 1_772_366_400_000
_MS = 1_000_000


@dataclass
class ScriptedJob:
    """A job that advances by one step with each request.

    Attributes:
        lines: Its lines, one ms apart from `START_MS` on.
        statuses: How many answers are RUNNING before ``state`` is reported; None: all.
        growing: Whether one more line is readable at each read, rather than all at once.
        page_lines: How many lines there are to a page.
        fails_at_page: Raise ``error`` instead of this page; 0: nothing at all can be read.
    """

    lines: Sequence[str | bytes] = ()
    state: JobState = JobState.SUCCEEDED
    statuses: int | None = 0
    growing: bool = False
    page_lines: int = 2
    fails_at_page: int | None = None
    error: Exception | None = None
    name: str = "nightly-etl"
    asked: int = field(default=0, init=False)
    reads: int = field(default=0, init=False)


class ScriptedService(JobService):
    """Jobs by id."""

    name = "scripted"
    identity = "scripted-identity"
    poll_min_s = 0.01
    poll_max_s = 0.1
    polls_are_free = True
    has_offsets = True

    def __init__(self, jobs: dict[str, ScriptedJob]) -> None:
        self.jobs = jobs
        self.closed = False
        self.pages_made = 0
        self.open_reads = 0
        self.read_ended = threading.Event()

    async def get_job(self, job_id: str) -> JobStatus:
        job = self._job(job_id)
        if job.error is not None and job.fails_at_page is None:
            raise job.error
        job.asked += 1
        running = job.statuses is None or job.asked <= job.statuses
        return self._status(job_id, JobState.RUNNING if running else job.state)

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        job = self._job(job_id)
        job.reads += 1
        readable = job.lines[: job.reads] if job.growing else job.lines
        lines = [Line((START_MS + index) * _MS, text, "stdout") for index, text in enumerate(readable)]
        lines = [line for line in lines if since_ms is None or line.time_unix_nano >= since_ms * _MS]
        self.open_reads += 1
        try:
            for number, start in enumerate(range(0, max(1, len(lines)), job.page_lines)):
                if number == job.fails_at_page:
                    assert job.error is not None
                    raise job.error
                self.pages_made += 1
                some = lines[start : start + job.page_lines]
                if some:
                    yield LogPage.from_lines(some, cursor=b"", identity=self.identity, job_id=job_id)
        finally:
            self.open_reads -= 1
            self.read_ended.set()

    async def cancel(self, job_id: str) -> JobStatus:
        job = self._job(job_id)
        if job.statuses is None:
            job.state, job.statuses = JobState.CANCELED, 0
        return self._status(job_id, job.state)

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        rows = [
            ListedJob(job_id=job_id, job_name=job.name, state=job.state, created_at=START, lines=len(job.lines))
            for job_id, job in self.jobs.items()
        ]
        for start in range(0, len(rows), 10):
            yield rows[start : start + 10]

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        job = self._job(job_id)
        return (START_MS, START_MS + len(job.lines) - 1) if job.lines else None

    async def aclose(self) -> None:
        self.closed = True

    def _job(self, job_id: str) -> ScriptedJob:
        if job_id not in self.jobs:
            raise JobNotFoundError(f"no such job: {job_id}", service=self.name, job_id=job_id)
        return self.jobs[job_id]

    def _status(self, job_id: str, state: JobState) -> JobStatus:
        return JobStatus.from_state(
            state,
            job_id=job_id,
            job_name=self._job(job_id).name,
            submitted_at=START,
            started_at=START,
            finished_at=START if state.is_terminal else None,
            exit_code={JobState.SUCCEEDED: 0, JobState.FAILED: 1}.get(state),
            attributes={"team": "geo"},
            service=self.name,
            identity=self.identity,
            trace_id=trace_id(self.identity, job_id),
            logs_complete=state.is_terminal,
        )


class RecordedRequest(NamedTuple):
    """One request as it came: the target is still escaped and has its query."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass
class RunningServer:
    """The job API on a port of this machine.

    Attributes:
        port: The port on 127.0.0.1.
        server: The HTTP server, for what only it knows.
        requests: What it was asked, in order.
    """

    port: int
    server: uvicorn.Server
    requests: list[RecordedRequest]

    @property
    def url(self) -> str:
        """The base URL that clients are given."""
        return f"http://127.0.0.1:{self.port}{BASE_PATH}"


@contextmanager
def serving(service: JobService, token: str | None = None) -> Iterator[RunningServer]:
    """Serve the jobs of a service in a thread until the block ends."""
    listener = listen("127.0.0.1", 0, token)
    app = create_app(service, token=token)
    requests: list[RecordedRequest] = []

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        requests.append(RecordedRequest(scope["method"], scope["raw_path"].decode() + query, headers))
        await app(scope, receive, send)

    server = make_server(recording)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield RunningServer(listener.getsockname()[1], server, requests)
    finally:
        server.should_exit = True
        thread.join()


def ask(
    service: JobService,
    path: str,
    *,
    method: str = "GET",
    token: str | None = None,
    headers: Mapping[str, str | bytes] | None = None,
) -> httpx.Response:
    """Return the reply of the application to one request, without a socket between."""
    app = create_app(service, token=token)

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1{BASE_PATH}") as client:
            return await client.request(method, path, headers=dict(headers or {}))

    return asyncio.run(request())
