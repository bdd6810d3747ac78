"""What the agent's HTTP server answers: the page, ``/healthz``, ``/readyz`` and ``/metrics``.

Health and readiness are open to probes and contain nothing private. Everything else is behind `access.AccessControl`.
The page, which shows logs, always requires a token, except on a Unix socket. Metrics and deliveries are numbers: they
require one only if it is configured, so that scrapers on this machine need none.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tailspan.http.server_limits import LimitedServer, limited_config
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.server_access import ServerAccess
from tailspan_agent.web.session import Session
from tailspan_agent.web.views import PageRoutes

__all__ = ["StatusApp"]

_STOP_GRACE_S = 1
_MAX_CONNECTIONS = 100


class StatusApp:
    """The endpoints, their access control and the HTTP server; handles no signals.

    Args:
        metrics: Returns the Prometheus text in pieces and its content type for an Accept header.
        readiness: Returns codes of what keeps the agent from relaying, without anything private; empty if ready.
        delivery: Returns the delivery state of a job's lines as plain values, for a service's identity and a job's id.
        view: The data for the page; None serves no page.
        access: Who may use what.
        own_names: The name that the server listens on, which requests may have in their Host header.
    """

    def __init__(
        self,
        *,
        metrics: Callable[[str], Awaitable[tuple[Iterator[bytes], str]]],
        readiness: Callable[[], Sequence[str]],
        delivery: Callable[[str, str], Awaitable[Mapping[str, object]]],
        view: AgentView | None,
        access: ServerAccess,
        own_names: Collection[str],
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._delivery = delivery
        owner = view.store.instance_id[:8] if view is not None else ""
        self._session = Session(access.token or access.page_token, owner, access.public_url)
        self._numbers_session = Session(access.token)
        page = self._page = PageRoutes(view, self._session) if view is not None else None
        self._own_names = own_names
        self._page_access = AccessControl(self._session, (), page.login_redirect if page else lambda _: None)
        self._numbers_access = AccessControl(self._numbers_session, ())
        self.change_access(access)
        app = Starlette(
            routes=[
                *(page.routes(self._page_access) if page else ()),
                Route("/metrics", self._numbers_access.require_token(self._get_metrics)),
                Route("/delivery", self._numbers_access.require_token(self._get_delivery)),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ]
        )
        self._server = _Server(
            limited_config(
                _BelowPrefix(app, self._session),
                max_connections=_MAX_CONNECTIONS,
                open_paths=("/healthz", "/readyz"),
                timeout_graceful_shutdown=_STOP_GRACE_S,
            )
        )

    def change_access(self, access: ServerAccess) -> None:
        """Apply changed access; if the token has changed, all sessions and live updates end.

        Args:
            access: The access from now on.
        """
        self._session.public_url = access.public_url
        self._numbers_session.change_token(access.token)
        public = urlsplit(access.public_url or "").hostname
        hosts = [*self._own_names, *access.allowed_hosts, *([public] if public else [])]
        self._page_access.change_hosts(hosts)
        self._numbers_access.change_hosts(hosts)
        if self._session.change_token(access.token or access.page_token) and self._page:
            self._page.end_streams()

    async def serve(self, listener: socket.socket) -> None:
        """Answer requests until `stop` is called."""
        await self._server.serve([listener])

    def stop(self) -> None:
        """Close idle connections at once, and give running responses one second."""
        self._server.should_exit = True
        if self._page:
            self._page.end_streams(for_good=True)

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, _: Request) -> Response:
        problems = self._readiness()
        return PlainTextResponse("".join(f"{each}\n" for each in problems or ["ready"]), 503 if problems else 200)

    async def _get_metrics(self, request: Request) -> Response:
        pieces, content_type = await self._metrics(request.headers.get("accept", ""))
        return StreamingResponse(_with_pauses(pieces), headers={"content-type": content_type})

    async def _get_delivery(self, request: Request) -> Response:
        query = request.query_params
        return JSONResponse(await self._delivery(query.get("identity", ""), query.get("job_id", "")))


class _BelowPrefix:
    """Answers requests with and without the prefix of ``agent.public_url``: some proxies take it away, some do not."""

    def __init__(self, app: ASGIApp, session: Session) -> None:
        self._app = app
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = self._session.root
        if root and scope["type"] == "http" and f"{scope['path']}/".startswith(f"{root}/"):
            path = scope["path"].removeprefix(root) or "/"
            raw_path = scope.get("raw_path", b"").removeprefix(root.encode()) or b"/"
            scope = {**scope, "path": path, "raw_path": raw_path}
        await self._app(scope, receive, send)


async def _with_pauses(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


class _Server(LimitedServer):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave SIGINT and SIGTERM to the agent, which drains first."""
        yield
