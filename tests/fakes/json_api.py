"""A server of an HTTP API with JSON, for fakes of services; see `FakeJsonApi`."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

__all__ = ["FakeJsonApi"]


class FakeJsonApi(ABC):
    """A server on loopback whose replies `reply` makes, one at a time. A context manager.

    Attributes:
        address: The URL of the server, without a path.
        url: The base URL of the API.
        token: What ``Authorization: Bearer`` must have; empty: nothing is needed.
        refusals: Statuses of the next replies, with their headers, before the right ones come.
        busy_each: Each such request is answered by 429; 0: none.
        requests: ``METHOD /path`` of each request so far.
    """

    def __init__(self) -> None:
        self.token = ""
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.busy_each = 0
        self.requests: list[str] = []
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
