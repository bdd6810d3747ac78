"""The job API over HTTP: any job service behind the wire protocol that the published ``fused`` clients speak.

    GET  /server/v1/run/by-id/{id}            status
    GET  /server/v1/logs/{id}[?since_ms=N]    all lines, or those at or after N
    POST /server/v1/run/by-id/{id}/cancel     cancel, then status
    GET  /server/v1/job/self?skip=S&limit=L   list, newest first

Services with offsets (local jobs) also offer log pages (`tailspan.logs.page_wire`), as ``log_pages`` in a status says:

    GET  /server/v1/log-pages/{id}[?cursor=C]                  all lines, or those after C
    GET  /server/v1/log-pages?job={id}&cursor=C[&job=...]      the next lines of many jobs, at most 64 KiB for each

A request for all lines whose Accept header has their media type is answered with log pages instead of JSON.

Errors are ``{"message": ...}``. Nothing here knows the kind of service, and no path of a request reaches a file.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

from tailspan._net import host_port, is_loopback
from tailspan.errors import ConfigError, TailspanError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware

    from tailspan.http.server_limits import BACKLOG, LimitedServer, limited_config
    from tailspan.job_api.endpoints import BASE_PATH, JobApi
    from tailspan.job_api.replies import error_reply, on_bug, on_http_exception, on_tailspan_error
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    raise ModuleNotFoundError(
        f"serving jobs needs {package}, which is not installed: pip install 'tailspan[serve]'", name=package
    ) from missing

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from tailspan.services import JobService

__all__ = ["BASE_PATH", "create_app", "listen", "make_server", "serve"]

_MAX_REQUEST_BYTES = 64 << 10
# Below the usual 1,024 open files of a process.
_MAX_CONNECTIONS = 400
# Clients poll at most every 30 s: keeping the connection saves the next handshake.
_KEEP_ALIVE_S = 75
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:@/]+)(?::[0-9]*)?")


def create_app(service: JobService, *, token: str | None = None, host: str = "127.0.0.1") -> ASGIApp:
    """Return the ASGI application that serves the jobs of one service.

    Args:
        service: The service; the caller closes it.
        token: Required in requests as ``Authorization: <any scheme> <token>``. None accepts every request with a
            loopback name in its Host header: for loopback only.
        host: The name that the server is bound to: without a token, requests may also use it in the Host header.

    Returns:
        The application; its only state is the service.

    Raises:
        ConfigError: The token is empty.
    """
    if token is not None and not token.strip():
        raise ConfigError("the token is empty, which would accept every request", key="token")
    app = Starlette(
        routes=JobApi(service).routes,
        middleware=[Middleware(_AccessMiddleware, token=token, host=host)],
        exception_handlers={TailspanError: on_tailspan_error, HTTPException: on_http_exception, Exception: on_bug},
    )
    # A redirect from `/logs/x/` would send the token to another path than the requested one.
    app.router.redirect_slashes = False
    return app


def serve(
    service: JobService,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the jobs of a service until SIGTERM or SIGINT, then close the service.

    Args:
        service: The service; closed at the end.
        host: Address or name to listen on.
        port: Port; 0 lets the system choose one.
        token: Required in requests; needed except on loopback.
        on_ready: Called once with the URL, as soon as connections are accepted.

    Raises:
        ConfigError: The address cannot be listened on, or it is not loopback and there is no token.
    """
    server = make_server(create_app(service, token=token, host=host))
    with listen(host, port, token) as listener, _stopped_by_signals(server):
        bound_port = listener.getsockname()[1]
        if on_ready is not None:
            on_ready(f"http://{host_port(host, bound_port)}{BASE_PATH}")
        asyncio.run(_serve(service, server, listener))


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Open the socket of the server; connections wait in it until the server runs.

    Args:
        host: Address or name.
        port: Port; 0 lets the system choose one.
        token: Without a token only a loopback address is allowed; its value does not matter here.

    Raises:
        ConfigError: The address cannot be listened on, or it is not loopback and there is no token.
    """
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        if token is None and not is_loopback(str(address[0])):
            raise ConfigError(
                f"{host} is not a loopback address, and there is no token: set --token-file or"
                " TAILSPAN_SERVE_TOKEN, or listen on 127.0.0.1",
                key="token",
            )
        # asyncio sets TCP_NODELAY only on sockets that were made with a protocol number. uvicorn's own are not: each
        # keep-alive reply would wait 44 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}", key="host") from error
    return listener


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Return the HTTP server for an application of `create_app`; set its ``should_exit`` to stop it."""
    return LimitedServer(
        limited_config(
            app,
            max_connections=_MAX_CONNECTIONS,
            loop="asyncio",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=0,
        )
    )


class _AccessMiddleware:
    """Rejects requests without access, and passes the path on as it was sent."""

    def __init__(self, app: ASGIApp, *, token: str | None, host: str) -> None:
        self._app = app
        self._token = token.encode() if token is not None else None
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        # `a%2Fb` is one id: routes match the path as it was sent, and the id is unescaped afterwards.
        raw = scope.get("raw_path") or quote(scope["path"]).encode()
        await self._app({**scope, "path": raw.decode("latin-1")}, receive, send)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        if self._token is not None:
            if not self._is_token(headers.get("authorization", "")):
                message = "this server requires a token: send 'Authorization: <scheme> <token>'"
                return error_reply(401, message, {"WWW-Authenticate": "Bearer"})
        # Without a token, a web page could reach this server by a host name of its own, or post to it blindly.
        elif not self._is_own_host(headers.get("host", "")):
            return error_reply(403, "this server has no token and accepts only loopback names in the Host header")
        elif "origin" in headers:
            return error_reply(403, "this server has no token and rejects requests of web pages")
        if method not in ("GET", "POST"):
            return error_reply(405, f"{method} is not allowed here", {"Allow": "GET, POST"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _MAX_REQUEST_BYTES or "transfer-encoding" in headers:
            return error_reply(413, "requests of the job API have no body", {"Connection": "close"})
        return None

    def _is_token(self, authorization: str) -> bool:
        _, _, sent = authorization.strip().partition(" ")
        assert self._token is not None
        return hmac.compare_digest(sent.strip().encode("latin-1"), self._token)

    def _is_own_host(self, host: str) -> bool:
        match = _HOST.fullmatch(host.lower())
        return match is not None and (match[1] == self._host or is_loopback(match[1].strip("[]")))


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    # uvicorn handles these signals while it runs and raises them again after it has stopped. A requested stop is not a
    # failure, and a signal may come before uvicorn handles it.
    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(service: JobService, server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve(sockets=[listener])
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=1)
    finally:
        await service.aclose()
