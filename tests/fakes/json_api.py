"""A server of an HTTP API with JSON, for fakes of services, and how tests read from the services of such servers."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import anyio

from tailspan import Client, load_settings
from tailspan.logs.page import LogPage
from tailspan.services import JobService

__all__ = ["FakeJsonApi", "client_of", "pages_of"]


class FakeJsonApi(ABC):
    """A server on loopback whose replies `reply` makes, one at a time. A context manager.

    Attributes:
        address: The URL of the server, without a path.
        url: The base URL of the API.
        token: What ``Authorization: Bearer`` must have; empty: nothing is needed.
        refusals: Statuses of the next replies, with their headers, before the right ones come.
        busy_each: Each such request is answered by 429; 0: none.
        requests: ``METHOD /path`` of each request so far.
        headers: Of the request that is answered, by lower-case name.
        content: Its body.
    """

    def __init__(self) -> None:
        self.token = ""
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.busy_each = 0
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
                data = json.dumps(reply).encode()
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

    @abstractmethod
    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the status and the JSON of a reply.

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
