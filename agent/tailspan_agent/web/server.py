"""The agent's own HTTP server on ``agent.listen``: the page, ``/healthz``, ``/readyz`` and ``/metrics``.

Health and readiness are open to probes and contain nothing private. Everything else is behind `access.AccessControl`.
The page, which shows logs, always requires a token, except on a Unix socket. Metrics and deliveries are numbers: they
require one only if it is configured, so that scrapers on this machine need none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlencode, urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tailspan._net import host_port
from tailspan.errors import ConfigError
from tailspan.http.server_limits import BACKLOG, LimitedServer, limited_config
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.session import Session
from tailspan_agent.web.views import PageRoutes

__all__ = ["ServerAccess", "StatusServer"]

_STOP_GRACE_S = 1
_OWN_MODE = 0o177
_MAX_CONNECTIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAccess:
    """Who may use what.

    Attributes:
        token: The configured token: everything but health requires it. None: see `page_token`.
        page_token: Required by the page if there is no `token`; None requires none.
        allowed_hosts: Further accepted names in the Host header.
        public_url: The URL of a proxy in front of the server.
    """

    token: str | None = None
    page_token: str | None = None
    allowed_hosts: Collection[str] = ()
    public_url: str | None = None


class StatusServer:
    """Serves in the event loop that starts it, until it is stopped; handles no signals.

    Args:
        address: Host and port to listen on; port 0 means any free port. Or the path of a Unix socket.
        metrics: Returns the Prometheus text in pieces and its content type for an Accept header.
        readiness: Returns codes of what keeps the agent from relaying, without anything private; empty if ready.
        delivery: Returns the delivery state of a job's lines as plain values, for a service's identity and a job's id.
        view: The data for the page; None serves no page.
        access: Who may use what.

    Raises:
        ConfigError: The server cannot listen on the address.
    """

    def __init__(
        self,
        address: tuple[str, int] | Path,
        *,
        metrics: Callable[[str], Awaitable[tuple[Iterator[bytes], str]]],
        readiness: Callable[[], Sequence[str]],
        delivery: Callable[[str, str], Awaitable[Mapping[str, object]]],
        view: AgentView | None = None,
        access: ServerAccess = ServerAccess(),
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._delivery = delivery
        owner = view.store.instance_id[:8] if view is not None else ""
        self._session = Session(access.token or access.page_token, owner, access.public_url)
        self._numbers_session = Session(access.token)
        page = self._page = PageRoutes(view, self._session) if view is not None else None
        self._path = address if isinstance(address, Path) else None
        self._own_names = [] if isinstance(address, Path) else [address[0]]
        self._page_access = AccessControl(self._session, (), page.login_redirect if page else lambda _: None)
        self._numbers_access = AccessControl(self._numbers_session, ())
        self._access = access
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
        self._socket = _listen_on_path(address) if isinstance(address, Path) else _listen(*address)
        self._server = _Server(
            limited_config(
                _BelowPrefix(app, self._session),
                max_connections=_MAX_CONNECTIONS,
                open_paths=("/healthz", "/readyz"),
                timeout_graceful_shutdown=_STOP_GRACE_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that the server listens on; no valid ones on a Unix socket."""
        if self._path is not None:
            return "localhost", 0
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return f"unix:{self._path}" if self._path is not None else f"http://{host_port(*self.address)}"

    @property
    def page_url(self) -> str | None:
        """The page's URL without a token; None on a Unix socket that no proxy publishes."""
        return self._access.public_url or (self.url if self._path is None else None)

    @property
    def link(self) -> str:
        """The page's URL; with the token if the agent has made it, because no other file of the user has it."""
        url = (self._access.public_url or self.url).rstrip("/")
        own = self._access.page_token if self._access.token is None else None
        return f"{url}/?{urlencode({'token': own})}" if own else url

    def change_access(self, access: ServerAccess) -> None:
        """Apply changed access; if the token has changed, all sessions and live updates end.

        Args:
            access: The access from now on.
        """
        self._access = access
        self._session.public_url = access.public_url
        self._numbers_session.change_token(access.token)
        public = urlsplit(access.public_url or "").hostname
        hosts = [*self._own_names, *access.allowed_hosts, *([public] if public else [])]
        self._page_access.change_hosts(hosts)
        self._numbers_access.change_hosts(hosts)
        if self._session.change_token(access.token or access.page_token) and self._page:
            self._page.end_streams()

    async def __aenter__(self) -> Self:
        """Start to answer. Connections wait in the socket's queue since the constructor."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="status server")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop: close idle connections at once, and give running responses one second."""
        self._server.should_exit = True
        if self._page:
            self._page.end_streams(for_good=True)
        if self._serving:
            await self._serving
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

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


def _listen_on_path(path: Path) -> socket.socket:
    """Return a Unix socket that only this user can connect to; it replaces one that no process listens on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not _is_used(path):
                path.unlink()
        # The mode of the socket decides who may connect, and it must never be another one.
        before = os.umask(_OWN_MODE)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        hint = "; is another agent running?" if "in use" in reason else ""
        raise ConfigError(f"agent.listen: cannot listen on {path}: {reason}{hint}", key="agent.listen") from error
    return listener


def _is_used(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True
