"""The agent's own HTTP server on ``agent.listen``: the page, ``/healthz``, ``/readyz`` and ``/metrics``.

Health and readiness are open to probes and contain nothing private. Everything else is behind `access.AccessControl`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tailspan._net import host_port
from tailspan.errors import ConfigError
from tailspan.http.server_limits import BACKLOG, LimitedServer, limited_config
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.session import Session
from tailspan_agent.web.views import PageRoutes

__all__ = ["StatusServer"]

_STOP_GRACE_S = 1
_MAX_CONNECTIONS = 100


class StatusServer:
    """Serves in the event loop that starts it, until it is stopped; handles no signals.

    Args:
        address: Host and port to listen on; port 0 means any free port.
        metrics: Returns the Prometheus text and its content type for an Accept header.
        readiness: Returns codes of what keeps the agent from relaying, without anything private; empty if ready.
        delivery: Returns the delivery state of a job's lines as plain values, for a service's identity and a job's id.
        view: The data for the page; None serves no page.
        token: Required by protected endpoints; None requires none.
        allowed_hosts: Further accepted names in the Host header.

    Raises:
        ConfigError: The server cannot listen on the address.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        metrics: Callable[[str], tuple[bytes, str]],
        readiness: Callable[[], Sequence[str]],
        delivery: Callable[[str, str], Mapping[str, object]],
        view: AgentView | None = None,
        token: str | None = None,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._delivery = delivery
        session = Session(token, view.store.instance_id[:8] if view is not None else "")
        page = self._page = PageRoutes(view, session) if view is not None else None
        access = AccessControl(session, [address[0], *allowed_hosts], page.login_redirect if page else lambda _: None)
        app = Starlette(
            routes=[
                *(page.routes(access) if page else ()),
                Route("/metrics", access.require_token(self._get_metrics)),
                Route("/delivery", access.require_token(self._get_delivery)),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ]
        )
        self._socket = _listen(*address)
        self._server = _Server(
            limited_config(
                app,
                max_connections=_MAX_CONNECTIONS,
                open_paths=("/healthz", "/readyz"),
                timeout_graceful_shutdown=_STOP_GRACE_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that the server listens on."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return f"http://{host_port(*self.address)}"

    async def __aenter__(self) -> Self:
        """Start to answer. Connections wait in the socket's queue since the constructor."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="status server")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop: close idle connections at once, and give running responses one second."""
        self._server.should_exit = True
        if self._page:
            self._page.end_streams()
        if self._serving:
            await self._serving
        self._socket.close()

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, _: Request) -> Response:
        problems = self._readiness()
        return PlainTextResponse("".join(f"{each}\n" for each in problems or ["ready"]), 503 if problems else 200)

    async def _get_metrics(self, request: Request) -> Response:
        text, content_type = self._metrics(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def _get_delivery(self, request: Request) -> Response:
        query = request.query_params
        return JSONResponse(self._delivery(query.get("identity", ""), query.get("job_id", "")))


class _Server(LimitedServer):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave SIGINT and SIGTERM to the agent, which drains first."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except OSError as error:
        # resolver errors have their own negative numbers
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such host"
        hint = "; is another agent running?" if "in use" in reason else ""
        raise ConfigError(
            f"agent.listen: cannot listen on {host}:{port}: {reason}{hint}", key="agent.listen"
        ) from error
