"""`FakeEngine`: Docker's API, or Podman's, with what was measured of Podman 4.3.1 and what Docker documents."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

__all__ = ["FakeContainer", "FakeEngine"]

_NANOS = 1_000_000_000
_NEVER = "0001-01-01T00:00:00Z"


def _moment(time_ns: int) -> str:
    seconds = datetime.fromtimestamp(time_ns // _NANOS, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{seconds}.{time_ns % _NANOS:09d}Z" if time_ns else _NEVER


@dataclass
class FakeContainer:
    """A container.

    Attributes:
        container_id: Its id.
        name: Its name.
        labels: Its labels.
        tty: Whether it has a terminal.
        auto_remove: Whether it is removed at its end.
        policy: Its restart policy.
        log: Entries of its log: time in ns, stream, text (without newline: a part of a line).
        fields: Further fields of its state.
    """

    container_id: str
    name: str
    labels: dict[str, str]
    tty: bool = False
    auto_remove: bool = False
    policy: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    exit_code: int = 0
    restarts: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    log: list[tuple[int, int, bytes]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


class FakeEngine:
    """An engine on loopback. A context manager.

    Attributes:
        url: Its address, for ``host``.
        whole_seconds: Whether times of lines have no fraction, as Podman's.
        sends_stops: Whether it reports that a container was stopped, as Docker does.
        requests: ``METHOD /path`` of each request so far.
        lock: Held while a reply is made; hold it to change several things at once.
    """

    def __init__(self, *, whole_seconds: bool = False, sends_stops: bool = True) -> None:
        self.whole_seconds = whole_seconds
        self.sends_stops = sends_stops
        self.requests: list[str] = []
        self.lock = threading.Condition()
        self.removed: dict[str, FakeContainer] = {}
        self.log_driver = "json-file"
        self.broken_logs = 0
        self._containers: dict[str, FakeContainer] = {}
        self._events: list[dict[str, Any]] = []
        self._closed = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # its client was killed
                    super().handle()

            def do_GET(self) -> None:
                fake._answer(self, "GET")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                fake._answer(self, "POST")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.lock:
            self._closed = True
            self.lock.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def section(self) -> str:
        """The keys of a service for it."""
        return f'type = "docker"\nhost = {json.dumps(self.url)}'

    def run(self, name: str = "etl", **options: Any) -> str:
        """Start a container and return its id."""
        with self.lock:
            labels = options.pop("labels", {})
            container_id = f"{len(self._containers) + len(self.removed) + 1:064x}"
            container = FakeContainer(container_id, name, labels, **{"started_ns": time.time_ns(), **options})
            self._containers[container_id] = container
            self._event("create", container)
            if container.status == "running":
                self._event("start", container)
            return container_id

    def write(self, container_id: str, text: str | bytes, stream: int = 1, at_ns: int | None = None) -> None:
        """Write to a container's log; without a newline at its end the text is a part of a line."""
        data = text.encode() if isinstance(text, str) else text
        with self.lock:
            self._containers[container_id].log.append((time.time_ns() if at_ns is None else at_ns, stream, data))
            self.lock.notify_all()

    def reply(self, container_id: str, *, entries: int) -> bytes:
        """Return the beginning of a reply with a container's log, up to a number of writes."""
        container = self._containers[container_id]
        return b"".join(self._entry(container, *entry) for entry in container.log[:entries])

    def end(self, container_id: str, exit_code: int = 0, *, stopped: bool = False, **fields: Any) -> None:
        """End a container; with ``--rm`` it is removed at once."""
        with self.lock:
            container = self._containers[container_id]
            if stopped and self.sends_stops:
                self._event("kill", container, signal="15")
            container.status, container.exit_code = "exited", exit_code
            container.finished_ns = time.time_ns()
            container.fields |= fields
            self._event("die", container, exitCode=str(exit_code))
            if container.auto_remove:
                self.remove(container_id)

    def restart(self, container_id: str) -> None:
        """Start an ended container again, as its restart policy does."""
        with self.lock:
            container = self._containers[container_id]
            container.status, container.restarts = "running", container.restarts + 1
            container.started_ns = time.time_ns()
            self._event("start", container)

    def remove(self, container_id: str) -> None:
        """Remove a container with its log."""
        with self.lock:
            container = self.removed[container_id] = self._containers.pop(container_id)
            self._event("destroy", container)

    def rotate(self, container_id: str, lines: int) -> None:
        """Drop the first lines of a log."""
        with self.lock:
            del self._containers[container_id].log[:lines]

    def _event(self, action: str, container: FakeContainer, **attributes: str) -> None:
        own = {"name": container.name, "image": "box:1", **container.labels, **attributes}
        actor = {"ID": container.container_id, "Attributes": own}
        self._events.append({"Type": "container", "Action": action, "Actor": actor, "timeNano": time.time_ns()})
        self.lock.notify_all()

    def _answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        with self.lock:
            self.requests.append(f"{method} {parts.path}")
            _, *path = parts.path.split("/")
        match path:
            case ["events"]:
                self._stream_events(handler, query)
            case ["info"]:
                self._send(handler, 200, {"LoggingDriver": self.log_driver, "Name": "vm"})
            case ["containers", "json"]:
                self._send(handler, 200, self._list(query))
            case ["containers", container_id, what]:
                with self.lock:
                    container = self._containers.get(container_id)
                if container is None:
                    self._send(handler, 404, {"message": f"No such container: {container_id}"})
                elif what == "json":
                    self._send(handler, 200, self._inspect(container))
                elif what == "logs":
                    self._stream_log(handler, container, query)
                elif container.status != "running":
                    self._send(handler, 304, None)
                else:
                    self.end(container_id, 143, stopped=True)
                    self._send(handler, 204, None)
            case _:
                self._send(handler, 404, {"message": "page not found"})

    def _list(self, query: dict[str, str]) -> list[dict[str, Any]]:
        labels = json.loads(query.get("filters", "{}")).get("label", [])
        with self.lock:
            return [
                {
                    "Id": one.container_id,
                    "Names": [f"/{one.name}"],
                    "Labels": one.labels,
                    "State": one.status,
                    "Status": f"Exited ({one.exit_code}) 1 second ago" if one.status == "exited" else "Up 1 second",
                    "Created": one.started_ns // _NANOS,
                }
                for one in self._containers.values()
                if (query.get("all") or one.status == "running")
                and all(
                    key in one.labels and (not equal or one.labels[key] == value)
                    for key, equal, value in (label.partition("=") for label in labels)
                )
            ]

    def _inspect(self, one: FakeContainer) -> dict[str, Any]:
        with self.lock:
            return {
                "Id": one.container_id,
                "Name": f"/{one.name}",
                "Created": _moment(one.started_ns),
                "Path": "sh",
                "Args": ["-c", "work"],
                "RestartCount": one.restarts,
                "State": {
                    "Status": one.status,
                    "ExitCode": one.exit_code,
                    "OOMKilled": False,
                    "StartedAt": _moment(one.started_ns),
                    "FinishedAt": _moment(one.finished_ns),
                    **one.fields,
                },
                "Config": {"Image": "box:1", "Labels": one.labels, "Tty": one.tty},
                "HostConfig": {"AutoRemove": one.auto_remove, "RestartPolicy": one.policy},
            }

    def _send(self, handler: BaseHTTPRequestHandler, status: int, reply: object) -> None:
        data = b"" if reply is None else json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _stream_events(self, handler: BaseHTTPRequestHandler, query: dict[str, str]) -> None:
        since_ns = int(query.get("since", "0")) * _NANOS
        chunks = _Chunks(handler, "application/json")
        sent = 0
        while True:
            with self.lock:
                while sent == len(self._events) and not self._closed:
                    self.lock.wait()
                if self._closed:
                    return
                new, sent = self._events[sent:], len(self._events)
            for event in new:
                if event["timeNano"] >= since_ns:
                    chunks.send(json.dumps(event).encode() + b"\n")

    def _stream_log(self, handler: BaseHTTPRequestHandler, container: FakeContainer, query: dict[str, str]) -> None:
        since_ns = int(query.get("since", "0")) * _NANOS
        chunks = _Chunks(handler, "application/octet-stream")
        sent = 0
        with self.lock:
            breaks = self.broken_logs > 0
            self.broken_logs -= breaks
        while True:
            with self.lock:
                new, sent = container.log[sent:], len(container.log)
                # A container that was removed has ended, and its reader gets all of it.
                over = container.status != "running" or self._closed or not query.get("follow")
            for at_ns, stream, text in new:
                if at_ns >= since_ns:
                    chunks.send(self._entry(container, at_ns, stream, text))
            if breaks:
                handler.connection.close()
                return
            if over:
                chunks.end()
                return
            with self.lock:
                while sent == len(container.log) and container.status == "running" and not self._closed:
                    self.lock.wait()

    def _entry(self, container: FakeContainer, at_ns: int, stream: int, text: bytes) -> bytes:
        stamp = _moment(at_ns)
        if self.whole_seconds:
            stamp = stamp.partition(".")[0] + "Z"
        if container.tty:
            return stamp.encode() + b" " + text.replace(b"\n", b"\r\n")
        body = stamp.encode() + b" " + text
        return bytes((stream, 0, 0, 0)) + len(body).to_bytes(4, "big") + body


class _Chunks:
    """A reply in chunks."""

    def __init__(self, handler: BaseHTTPRequestHandler, media_type: str) -> None:
        self._handler = handler
        handler.send_response(200)
        handler.send_header("content-type", media_type)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True

    def send(self, data: bytes) -> None:
        """Send a chunk; a reader that is gone gets none."""
        try:
            self._handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        except OSError:
            return

    def end(self) -> None:
        """Send the last chunk."""
        try:
            self._handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            return
