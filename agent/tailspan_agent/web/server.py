"""The agent's own HTTP server on ``agent.listen``: the page, ``/healthz``, ``/readyz`` and ``/metrics``.

Health and readiness are open to probes and say nothing private. All else is for people and Prometheus: with a token
configured it asks for it; and the Host header must name this server, so that a web page which lets its own name
resolve to 127.0.0.1 (DNS rebinding) reads nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Self
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tailspan._net import host_port
from tailspan.errors import ConfigError
from tailspan.http.server_limits import LimitedHttp
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.session import Session
from tailspan_agent.web.views import Page

__all__ = ["Guard", "StatusServer"]

_STOP_GRACE_S = 1
_MAX_CONNECTIONS = 100
_STALLED_S = 30.0

_Endpoint = Callable[[Request], Awaitable[Response]]


class Guard:
    """Who may see what is not open to everybody.

    Args:
        session: Knows the token to ask for, and the cookie of a browser that has shown it.
        hosts: Names that this server may be called by, besides ``localhost`` and any address.
        login: Returns where a browser may show the token; None answers it like any program.
    """

    def __init__(
        self, session: Session, hosts: Collection[str], login: Callable[[Request], Response | None] = lambda _: None
    ) -> None:
        self._session = session
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._login = login

    def stranger(self, host: str) -> Response | None:
        """Return the answer to a request for somebody else, from its Host header."""
        return None if self._knows(host) else PlainTextResponse("this host name is not in agent.allowed_hosts\n", 421)

    def refusal(self, host: str, authorization: str, cookie: str = "") -> Response | None:
        """Return the answer to a request that may not see it, from its headers and our cookie."""
        stranger = self.stranger(host)
        if stranger is not None or not self._session.needs_token or self._session.knows_cookie(cookie):
            return stranger
        scheme, _, given = authorization.partition(" ")
        # Headers are bytes: a token that is not ASCII comes as its UTF-8.
        if scheme.lower() == "bearer" and self._session.knows_token(given.encode("latin-1").decode("utf-8", "replace")):
            return None
        return PlainTextResponse(
            "this needs the header Authorization: Bearer TOKEN\n", 401, {"www-authenticate": "Bearer"}
        )

    def protect(self, endpoint: _Endpoint) -> _Endpoint:
        """Return the endpoint behind this guard."""

        async def guarded(request: Request) -> Response:
            headers, cookie = request.headers, request.cookies.get(self._session.cookie_name, "")
            refusal = self.refusal(headers.get("host", ""), headers.get("authorization", ""), cookie)
            if refusal is None:
                return await endpoint(request)
            return (self._login(request) if refusal.status_code == 401 else None) or refusal

        return guarded

    def only_us(self, endpoint: _Endpoint) -> _Endpoint:
        """Return an endpoint that asks for no token, but to be called by a name of ours."""

        async def guarded(request: Request) -> Response:
            return self.stranger(request.headers.get("host", "")) or await endpoint(request)

        return guarded

    def _knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        # rebinding needs a name that resolves to us; an address is always meant
        return True


class StatusServer:
    """Serves until it is stopped, in the event loop that starts it; signals are left alone.

    Args:
        address: Host and port to listen on; port 0 takes a free one.
        metrics: Returns the text for Prometheus and its content type, from the request's Accept header.
        readiness: Returns what keeps the agent from relaying, as short codes without anything private; empty: ready.
        delivery: Returns what became of a job's lines, from the service's identity and the job's id, as plain values.
        view: What the page may see; None serves no page.
        token: What the guarded pages ask for; None: nothing.
        allowed_hosts: Further names in the Host header to answer to.

    Raises:
        ConfigError: The address cannot be listened on.
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
        page = self._page = Page(view, session) if view is not None else None
        guard = Guard(session, [address[0], *allowed_hosts], page.login_redirect if page else lambda _: None)
        app = Starlette(
            routes=[
                *(page.routes(guard.protect, guard.only_us) if page else ()),
                Route("/metrics", guard.protect(self._get_metrics)),
                Route("/delivery", guard.protect(self._get_delivery)),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ]
        )
        self._socket = _listen(*address)
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=_STOP_GRACE_S,
                http=_ReadHttp,
                ws="none",
                limit_concurrency=_MAX_CONNECTIONS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server really listens on."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """Where the server is found, without a slash at the end."""
        return f"http://{host_port(*self.address)}"

    async def __aenter__(self) -> Self:
        """Begin to answer. Connections wait in the socket's queue from the constructor on."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="status server")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop: idle connections are closed at once, running answers get a second."""
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
        asked = request.query_params
        return JSONResponse(self._delivery(asked.get("identity", ""), asked.get("job_id", "")))


class _ReadHttp(LimitedHttp):
    """HTTP to clients that read: one that has stopped to would keep its connection, and what waits for it, for ever."""

    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Give a client some time to read on."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(_STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that it reads."""
        self._reads()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._reads()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End the connection; one that is not read cannot be ended in order."""
        if self._stalled is not None:
            self.transport.abort()
        else:
            super().shutdown()

    def _reads(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave SIGINT and SIGTERM to the agent, which drains first."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        # resolver errors have negative numbers of their own
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such host"
        hint = "; is another agent running?" if "in use" in reason else ""
        raise ConfigError(
            f"agent.listen: cannot listen on {host}:{port}: {reason}{hint}", key="agent.listen"
        ) from error
