"""A server of an HTTP API with JSON, for fakes of services, and how tests read from the services of such servers."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_WR, socket
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import anyio
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side
from websockets.utils import accept_key

from tailspan import Client, load_settings
from tailspan.logs.page import LogPage
from tailspan.services import JobService

__all__ = ["FakeJsonApi", "FakeSocket", "client_of", "pages_of"]


class FakeSocket:
    """The server's side of a WebSocket with messages in JSON."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._protocol = Protocol(Side.SERVER)
        self._lock = threading.Lock()
        self._received: list[Any] = []

    def send(self, message: object) -> None:
        """Send a message; nothing if the client has gone."""
        with self._lock:
            self._protocol.send_text(json.dumps(message).encode())
            self._flush()

    def send_text(self, text: bytes) -> None:
        """Send text; nothing if the client has gone."""
        with self._lock:
            self._protocol.send_text(text)
            self._flush()

    def receive(self) -> Any:
        """Wait for a message and return it; None at the end."""
        while not self._received:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return None
            with self._lock:
                self._protocol.receive_data(data)
                frames = [one for one in self._protocol.events_received() if isinstance(one, Frame)]
                self._received += [json.loads(one.data) for one in frames if one.opcode is Opcode.TEXT]
                self._flush()
        return self._received.pop(0)

    def close(self, code: int = 1001, reason: str = "") -> None:
        """End the connection."""
        with self._lock, suppress(OSError):
            self._protocol.send_close(code, reason)
            self._flush()
            self._connection.shutdown(SHUT_WR)

    def _flush(self) -> None:
        with suppress(OSError):
            for data in self._protocol.data_to_send():
                self._connection.sendall(data)


class FakeJsonApi(ABC):
    """A server on loopback whose replies `reply` makes, one at a time. A context manager.

    Attributes:
        address: The URL of the server, without a path.
        url: The base URL of the API.
        token: What ``Authorization: Bearer`` must have; empty: nothing is needed.
        refusals: Statuses of the next replies, with their headers, before the right ones come.
        away: Whether requests get no answer, because the server is down.
        busy_each: Each such request is answered by 429; 0: none.
        socket_refusals: Statuses of the next answers to requests for a WebSocket.
        requests: ``METHOD /path`` of each request so far; ``SOCKET /path`` of one for a WebSocket.
        headers: Of the request that is answered, by lower-case name.
        content: Its body.
    """

    def __init__(self) -> None:
        self.token = ""
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.away = False
        self.busy_each = 0
        self.socket_refusals: list[int] = []
        self.requests: list[str] = []
        self.headers: dict[str, str] = {}
        self.content = b""
        self.lock = threading.RLock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def do_PATCH(self) -> None:
                self._answer("PATCH")

            def _answer(self, method: str) -> None:
                if fake.away:
                    self.close_connection = True
                    return
                if self.headers.get("upgrade") == "websocket":
                    fake.upgrade(self)
                    return
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers: dict[str, str] = {}
                parts = urlsplit(self.path)
                with fake.lock:
                    fake.requests.append(f"{method} {parts.path}")
                    fake.headers = {name.lower(): value for name, value in self.headers.items()}
                    fake.content = body
                    refused = fake.refuse(parts.path, self.headers.get("authorization", ""))
                    if fake.busy_each and len(fake.requests) % fake.busy_each == 0:
                        status, headers = 429, {"retry-after": "0"}
                        reply: object = {"detail": "busy"}
                    elif fake.refusals:
                        status, headers = fake.refusals.pop(0)
                        reply = {"detail": "refused"}
                    elif refused is not None:
                        status, reply = refused
                    else:
                        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
                        status, reply = fake.reply(method, parts.path, json.loads(body) if body else {}, query)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**headers, "content-type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def section(self) -> str:
        """The keys by which the configuration finds this server."""
        return f'base_url = "{self.url}"'

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def refuse(self, path: str, authorization: str) -> tuple[int, object] | None:
        """Return the reply to a request without the right credentials; None for one that has them."""
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {"detail": "Unauthorized"}
        return None

    def upgrade(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request for a WebSocket, and serve it."""
        path, status = urlsplit(request.path).path, 101
        with self.lock:
            self.requests.append(f"SOCKET {path}")
            if self.socket_refusals:
                status = self.socket_refusals.pop(0)
        request.close_connection = True
        request.send_response(status)
        headers = {"content-length": "0"}
        if status == 101:
            accept = accept_key(request.headers["sec-websocket-key"])
            headers = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-accept": accept}
            if "sec-websocket-protocol" in request.headers:
                headers["sec-websocket-protocol"] = request.headers["sec-websocket-protocol"]
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if status == 101:
            self.serve_socket(path, FakeSocket(request.connection))

    def serve_socket(self, path: str, socket: FakeSocket) -> None:
        """Serve a WebSocket until it ends, in a thread of its own; by default end it at once."""
        socket.close(1008, "nothing is here")

    @abstractmethod
    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the status and the JSON of a reply; bytes are sent as they are.

        Args:
            method: Of the request.
            path: Of the request, escaped.
            body: Its JSON; empty without one.
            query: Its parameters, the last one of each name.
        """


@contextmanager
def client_of(kind: str, base_url: str, directory: Path) -> Iterator[Client]:
    """Yield a client whose default service is of this type, and sends as many requests as it likes."""
    config = directory / "client.toml"
    section = f'[services.{kind}]\nbase_url = "{base_url}"\nrequests_per_second = 10000\n'
    config.write_text(f'default_service = "{kind}"\n{section}')
    with Client(load_settings(config)) as client:
        yield client


def pages_of(service: JobService, job_id: str, cursor: bytes | None = None, *, most: int = 10_000) -> list[LogPage]:
    """Read pages after a cursor, in a loop of their own, and close the service."""

    async def read() -> list[LogPage]:
        found: list[LogPage] = []
        async with aclosing(service), aclosing(service.read_logs(job_id, cursor)) as pages:
            async for page in pages:
                found.append(page)
                if len(found) == most:
                    break
        return found

    return anyio.run(read)
