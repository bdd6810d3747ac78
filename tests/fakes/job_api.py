"""`FakeJobApi`: a Fused job API on 127.0.0.1 for tests, scripted by request counts rather than by sleeping.

    with FakeJobApi(inclusive=False) as api:
        job = api.add_job("job-1", name="etl")            # running, no lines
        job.line("first", 1_000)                          # message, timestamp in ms
        job.line("late", 1_000, from_read=3)              # visible from the third log request for this job on
        job.line("slow", 2_000, after_s=0.2)              # visible 0.2 s after it was added
        job.becomes("Done", from_status=2)                # the second status request and all later ones say so
        api.fault(status_fault(503, headers={"Retry-After": "1"}), on="logs", times=2)
        ...  # api.base_url is the `base_url` of a service

A line's visibility is decided when a log request comes in; `since_ms` is inclusive or exclusive as the fake was made.
Replies are sorted by timestamp (stable) unless ``sort=False``. Anything else is a hook: ``job.on_read`` and
``job.on_status`` are called with the number of the request (from 1) before it is answered, ``api.on_list`` likewise;
``job.on_answered`` is called with the number of a log request when its answer is written.
``job.body`` replaces a job's log by chunks of bytes (any callable), for replies too large to hold.

Faults are taken in the order they were added, each for ``times`` requests of its kind; see `Fault`. All requests are
recorded in ``api.requests``. Leaving the ``with`` block ends all threads and connections, hung ones too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

PREFIX = "/server/v1"
Verb = Literal["status", "logs", "cancel", "list", "oauth", "any"]

_ENDED = {"Done", "Failed", "Canceled"}
_INSTANCE = {"Pending": "pending", "Running": "running"}


@dataclass(frozen=True)
class Request:
    """One request as it came in; ``target`` is the raw path with query, ``verb`` what it was taken for."""

    method: str
    target: str
    verb: str
    job_id: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at_s: float


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of an answer.

    Attributes:
        kind: ``reply`` (status, headers and body as given), ``truncated`` (the true answer, cut in the middle, then the
            connection is closed), ``hang`` (no answer until the fake is closed), ``reset`` (RST without an answer).
        status: HTTP status of a ``reply``.
        body: Its body.
        headers: Its headers; Content-Type is ``application/json`` unless given.
    """

    kind: Literal["reply", "truncated", "hang", "reset"] = "reply"
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def status_fault(status: int, message: str = "no luck", headers: Mapping[str, str] | None = None) -> Fault:
    """Return an error reply as the real server words it."""
    return Fault("reply", status, json.dumps({"message": message}).encode(), headers or {})


HTML = Fault("reply", 200, b"<!doctype html><html><body>Sign in</body></html>", {"Content-Type": "text/html"})
HANG = Fault("hang")
RESET = Fault("reset")
TRUNCATED = Fault("truncated")


@dataclass
class _Line:
    message: Mapping[str, Any]
    from_read: int
    visible_at_s: float


@dataclass
class FakeJob:
    """A job of the fake: its lines, its status script, its hooks.

    Attributes:
        status: The fields of the status reply; change them at will, or add keys.
        row: Further keys of its row in the list.
        reads: How many log requests came in.
        statuses: How many status requests came in.
        cancels: How many cancel requests came in.
        body: Instead of lines: called with since_ms (or None), yields chunks of the reply's bytes.
    """

    job_id: str
    status: dict[str, Any]
    row: dict[str, Any] = field(default_factory=dict)
    reads: int = 0
    statuses: int = 0
    cancels: int = 0
    on_read: Callable[[int], object] = lambda number: None
    on_answered: Callable[[int], object] = lambda number: None
    on_status: Callable[[int], object] = lambda number: None
    body: Callable[[int | None], Iterable[bytes]] | None = None
    _lines: list[_Line] = field(default_factory=list)
    _script: list[tuple[int, float, dict[str, Any]]] = field(default_factory=list)

    def line(self, message: str, timestamp: int, *, from_read: int = 1, after_s: float = 0.0, **keys: Any) -> None:
        """Add a line that is visible from that log request on, and not before `after_s` from now."""
        entry = {"message": message, "timestamp": timestamp, **keys}
        self._lines.append(_Line(entry, from_read, time.monotonic() + after_s))

    def becomes(
        self,
        job_status: str,
        *,
        instance: str | None = None,
        from_status: int = 1,
        after_s: float = 0.0,
        **keys: Any,
    ) -> None:
        """Script the status: this one holds from that status request on, and not before `after_s` from now.

        Args:
            job_status: ``Pending``, ``Running``, ``Done``, ``Failed``, ``Canceled`` or another word.
            instance: Status of the instance; fits the job's unless given.
            from_status: Number of the first status request (from 1) that it answers.
            after_s: Seconds from now.
            **keys: Further fields of the reply.
        """
        ended = job_status in _ENDED
        fields: dict[str, Any] = {
            "job_status": job_status,
            "finished_job_status": ended,
            "status": instance or _INSTANCE.get(job_status, "terminated"),
        }
        fields["terminal_status"] = fields["status"] not in _INSTANCE.values()
        self._script.append((from_status, time.monotonic() + after_s, {**fields, **keys}))

    def _visible(self) -> list[Mapping[str, Any]]:
        now = time.monotonic()
        return [line.message for line in self._lines if line.from_read <= self.reads and line.visible_at_s <= now]

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        for first, at_s, fields in self._script:
            if first <= self.statuses and at_s <= now:
                self.status.update(fields)
        return self.status


class FakeJobApi:
    """The server; see the module's docstring.

    Attributes:
        base_url: What a service is configured with.
        oauth_url: A token URL that answers with ``oauth_reply``.
        requests: All requests so far, oldest first.
        authorizations: Accepted ``Authorization`` values; None accepts every request.
        jobs: The jobs by id, oldest first.
        connections: How many connections were opened so far.
        max_limit: Rows that a list reply has at most, whatever was asked for.
        on_list: Called with the number of each list request before it is answered.
        change_rows: Changes the rows of the whole list, newest first, before a page of it is taken.
        before_json: Bytes before each JSON reply.
    """

    def __init__(
        self,
        *,
        inclusive: bool = True,
        sort: bool = True,
        authorizations: Iterable[str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.authorizations = None if authorizations is None else set(authorizations)
        self.jobs: dict[str, FakeJob] = {}
        self.oauth_reply: dict[str, Any] = {"access_token": "new-token", "expires_in": 3600, "token_type": "Bearer"}
        self.connections = 0
        self.max_limit = 1000
        self.on_list: Callable[[int], object] = lambda number: None
        self.change_rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda rows: rows
        self.before_json = b""
        self._inclusive = inclusive
        self._sort = sort
        self._tls = tls
        self._faults: list[tuple[Verb, Fault, Iterable[int]]] = []
        self._lists = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._connections: set[socket.socket] = set()

    def __enter__(self) -> FakeJobApi:
        api = self

        class Handler(_Handler):
            fake = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        if self._tls:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        scheme = "https" if self._tls else "http"
        host = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self.base_url = f"{host}{PREFIX}"
        self.oauth_url = f"{host}/oauth/token"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        self._server.shutdown()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()

    def add_job(self, job_id: str, *, name: str = "etl", job_status: str = "Running", **status: Any) -> FakeJob:
        """Add a job, newer than all others; further arguments are fields of its status reply."""
        fields: dict[str, Any] = {
            "job_id": job_id,
            "job_name": name,
            "instance_id": "i-0",
            "instance_type": "m5.large",
            "last_heartbeat": None,
            "job_status_date": None,
            "total_tasks": 0,
            "finished_tasks": 0,
        }
        job = FakeJob(job_id, fields)
        job.becomes(job_status, from_status=0)
        job._status().update(status)
        job._script.clear()
        self.jobs[job_id] = job
        return job

    def fault(self, fault: Fault, *, on: Verb = "any", times: int | None = 1) -> None:
        """Spoil the next ``times`` requests of that kind (None: all of them)."""
        self._faults.append((on, fault, itertools.count() if times is None else iter(range(times))))

    def clear_faults(self) -> None:
        """Answer properly from now on."""
        self._faults.clear()

    def asked(self, verb: Verb) -> list[Request]:
        """Return the requests of one kind, oldest first."""
        return [request for request in self.requests if verb in ("any", request.verb)]

    def _take_fault(self, verb: str) -> Fault | None:
        for on, fault, left in self._faults:
            if on in ("any", verb) and next(iter(left), None) is not None:
                return fault
        return None

    def _rows(self, query: Mapping[str, str]) -> list[dict[str, Any]]:
        skip, limit = int(query.get("skip", 0)), min(int(query.get("limit", 25)), self.max_limit)
        rows = [
            {
                "id": job.job_id,
                "user_id": "u-1",
                "creation_date": "2026-01-01T00:00:00+00:00",
                "execution_environment_id": "e-1",
                "job_status": job.status.get("job_status"),
                "job_status_date": job.status.get("job_status_date"),
                "instance_id": job.status.get("instance_id"),
                "instance_type": job.status.get("instance_type"),
                **job.row,
            }
            for job in reversed(list(self.jobs.values()))
        ]
        return self.change_rows(rows)[skip : skip + limit]

    def _lines(self, job: FakeJob, since_ms: int | None) -> list[Mapping[str, Any]]:
        lines = job._visible()
        if since_ms is not None:
            first = since_ms if self._inclusive else since_ms + 1
            lines = [line for line in lines if line["timestamp"] >= first]
        return sorted(lines, key=lambda line: line["timestamp"]) if self._sort else lines


class _Handler(BaseHTTPRequestHandler):
    """One connection; kept alive, without Nagle's delay."""

    fake: FakeJobApi
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        with self.fake._lock:
            self.fake._connections.add(self.connection)
            self.fake.connections += 1
        if self.fake._closed.is_set():
            self.close_connection = True

    def finish(self) -> None:
        with self.fake._lock:
            self.fake._connections.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        fake = self.fake
        verb, job_id = self._verb()
        query = {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(
            self.command, self.path, verb, job_id, query, dict(self.headers.items()), body, time.monotonic()
        )
        with fake._lock:
            fake.requests.append(request)
            fault = fake._take_fault(verb)
        if fault is None or fault.kind == "truncated":
            self._answer(request, truncate=fault is not None)
        elif fault.kind == "hang":
            fake._closed.wait()
            self.close_connection = True
        elif fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # an orderly close would send FIN
            self.close_connection = True
        else:
            self._reply(fault.status, fault.body, headers=fault.headers)

    def _verb(self) -> tuple[str, str | None]:
        path = urlsplit(self.path).path
        if path == "/oauth/token":
            return "oauth", None
        match path.removeprefix(PREFIX).split("/"):
            case ["", "job", "self"]:
                return "list", None
            case ["", "run", "by-id", job_id]:
                return "status", unquote(job_id)
            case ["", "run", "by-id", job_id, "cancel"]:
                return "cancel", unquote(job_id)
            case ["", "logs", job_id]:
                return "logs", unquote(job_id)
        return "unknown", None

    def _answer(self, request: Request, *, truncate: bool) -> None:
        fake = self.fake
        if request.verb == "oauth":
            self._json(fake.oauth_reply, truncate=truncate)
            return
        if fake.authorizations is not None and request.headers.get("Authorization") not in fake.authorizations:
            self._reply(401, b'{"detail": "Not authenticated"}')
            return
        if request.verb == "list":
            fake._lists += 1
            fake.on_list(fake._lists)
            self._json(fake._rows(request.query), truncate=truncate)
            return
        job = fake.jobs.get(request.job_id or "")
        if job is None:
            self._reply(404, b'{"detail": "Not Found"}')
        elif request.verb == "logs":
            job.reads += 1
            job.on_read(job.reads)
            since = request.query.get("since_ms")
            since_ms = None if since is None else int(since)
            if job.body is not None:
                self._stream(job.body(since_ms))
            else:
                self._json(fake._lines(job, since_ms), truncate=truncate)
            job.on_answered(job.reads)
        elif request.verb == "cancel":
            job.cancels += 1
            if not job.status["finished_job_status"]:
                job.becomes("Canceled", from_status=0)
            self._json(job._status(), truncate=truncate)
        else:
            job.statuses += 1
            job.on_status(job.statuses)
            self._json(job._status(), truncate=truncate)

    def _json(self, value: Any, *, truncate: bool) -> None:
        body = self.fake.before_json + json.dumps(value).encode()
        self._reply(200, body, cut=len(body) // 2 if truncate else None)

    def _reply(
        self, status: int, body: bytes, *, headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True

    def _stream(self, chunks: Iterable[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            if self.fake._closed.is_set():
                break
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        else:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
