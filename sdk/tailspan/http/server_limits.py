"""Limits for each client of our HTTP servers: what one client does must not keep the others from their answers.

uvicorn alone waits for ever for the rest of a request or for a client to read, refuses everybody once its connections
are used up, and logs a traceback for a request that breaks. Here, the longest idle connection of the address with the
most of them makes room for a new one. Behind a proxy there is only one address, which then loses its oldest.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, cast

import h11
import uvicorn
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["REQUEST_S", "UNREAD_S", "LimitedHttp", "LimitedServer", "limited_config"]

REQUEST_S = 10.0
"""How long a client may take to send a whole request, header and body, in seconds."""

UNREAD_S = 30.0
"""How long a client may read nothing of its answer, in seconds; it is checked this often."""

BACKLOG = 16
"""How many connections asyncio accepts at once. Before limits apply, each takes an open file. And a request is read
before newer connections make its own the longest idle."""

_QUEUE = 1024
_RESERVE = 32
"""Connections beyond the limit: they get an answer of health, or 503."""

_CLOSING = frozenset({401, 403, 421, 429})
"""After these answers the connection ends: a client without access must not hold one."""

_MOST_PIPELINED = 16
"""How many requests a client may send before their answers, which would keep its connection busy for ever."""

_MOST_HEAD_BYTES = 64 << 10
_MOST_HEADERS = 200
"""How many headers a request may have: parsing ten thousand takes a tenth of a second."""

_LOG_EVERY_S = 60.0

_logger = logging.getLogger(__name__)


def limited_config(
    app: Any, *, max_connections: int, open_paths: Collection[str] = (), **options: Any
) -> uvicorn.Config:
    """Return the configuration of a `LimitedServer`.

    Args:
        app: The ASGI application.
        max_connections: Number of connections at a time; at most a quarter of the files that the process may open.
        open_paths: Paths that are answered beyond this limit: cheap ones, such as health.
        options: Further options of uvicorn.
    """
    # Most open files are for what the connections ask for.
    most = min(max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def protocol(**given: Any) -> LimitedHttp:
        return LimitedHttp(most, open_paths, **given)

    return uvicorn.Config(
        app,
        http=cast("Any", protocol),
        ws="none",
        lifespan="off",
        # Requests are logged here, in one line each; uvicorn would add a traceback to each reply that breaks off.
        log_config=None,
        log_level=logging.CRITICAL,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        **options,
    )


class LimitedServer(uvicorn.Server):
    """A server that makes room when the process has no open file left for a connection."""

    async def startup(self, sockets: Any = None) -> None:
        """Start, and handle the errors of accepting connections."""
        loop = asyncio.get_running_loop()
        self._before = loop.get_exception_handler()
        loop.set_exception_handler(self._on_error)
        await super().startup(sockets)
        # Connections that wait here need no open file; without room for them, clients try again only after a second.
        for listener in sockets or ():
            listener.listen(_QUEUE)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop, and leave errors to their former handler."""
        try:
            await super().shutdown(sockets)
        finally:
            asyncio.get_running_loop().set_exception_handler(self._before)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # asyncio reports a failed accept() in these words, up to BACKLOG times a second, with a traceback each.
        if "socket.accept()" in str(context.get("message", "")):
            connections = cast("set[LimitedHttp]", self.server_state.connections)
            for _ in range(4):
                _make_room(connections)
            _log_seldom("a connection was not accepted (%s): idle connections were closed", context.get("exception"))
        elif self._before is not None:
            self._before(loop, context)
        else:
            loop.default_exception_handler(context)


class LimitedHttp(H11Protocol):
    """HTTP/1.1 with limits in time and number; uvicorn itself limits headers to 64 KiB and the idle time between.

    Args:
        max_connections: See `limited_config`.
        open_paths: See `limited_config`.
        given: uvicorn's own arguments.
    """

    def __init__(self, max_connections: int, open_paths: Collection[str], **given: Any) -> None:
        super().__init__(**given)
        self._inner, self.app = self.app, self._answer
        self._most = max_connections
        self._open_paths = open_paths
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._unread = 0
        self._pipelined = 0
        self.address = ""
        self.idle_since_s = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether the connection waits for a request or for the rest of one."""
        return self.cycle is None or self.cycle.response_complete or self.conn.their_state is h11.SEND_BODY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Start the deadline of the first request; make room if there are too many connections."""
        self.idle_since_s = time.monotonic()
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        connections = _living(self.connections)
        if len(connections) > self._most:
            made_room = _make_room(connections - {self})
            _log_seldom("more than %d connections are open: the longest idle ones are closed", self._most)
            if not made_room and len(connections) > self._most + _RESERVE:
                self.transport.abort()
        self._expect()
        self._reading = self.loop.call_later(UNREAD_S, self._check_reading)

    def data_received(self, data: bytes) -> None:
        """Handle a part of a request; its deadline starts with the first byte."""
        super().data_received(data)
        self._expect()

    def handle_events(self) -> None:
        """Handle what has come; reject a request with too many headers before they are parsed."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            text = self.conn.trailing_data[0]
            head, _, body = text.partition(b"\r\n\r\n") if self.conn.their_state is h11.IDLE else (b"", b"", text)
            # After the last chunk of a body, of length 0, there may be more headers.
            last = (b"\r\n" + body).partition(b"\r\n0\r\n")[2]
            if max(head.count(b"\n"), last.count(b"\n")) > _MOST_HEADERS or len(head) > _MOST_HEAD_BYTES:
                self.send_400_response(f"more than {_MOST_HEADERS} headers, or {_MOST_HEAD_BYTES} bytes of them")
                return
        super().handle_events()

    def on_response_complete(self) -> None:
        """Count the idle time from here; end the connection of a client that only sends."""
        self.idle_since_s = time.monotonic()
        self._pipelined = self._pipelined + 1 if self.conn.trailing_data[0] else 0
        if self._pipelined > _MOST_PIPELINED:
            self.transport.close()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._settle()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """Note that the client reads."""
        self._unread = 0
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection; abort it if the client does not read, because it cannot end properly."""
        if self.flow.write_paused:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer a broken request, unless its answer has begun: then end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    async def _answer(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        cycle = self.cycle

        async def send_or_close(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start" and message["status"] in _CLOSING:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        path = str(cast("dict[str, Any]", scope)["path"])
        try:
            if len(_living(self.connections)) > self._most and path not in self._open_paths:
                await _refuse(send_or_close)
            else:
                await self._inner(scope, receive, send_or_close)
        except asyncio.CancelledError:
            self._give_up(cycle)  # the server stops
        except Exception as error:
            if not cycle.disconnected and type(error).__name__ != "ClientDisconnect":
                _log_seldom("a request failed: unexpected error (a bug in Tailspan): %s", _place(error))
            self._give_up(cycle)

    def _give_up(self, cycle: Any) -> None:
        if not cycle.response_complete:
            cycle.disconnected = True
            self.transport.abort()

    def _check_reading(self) -> None:
        """Abort the connection of a client that stopped reading: it would hold its answer for ever."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread >= self._unread > 0:
            self.transport.abort()
            return
        self._unread = unread
        self._reading = self.loop.call_later(UNREAD_S, self._check_reading)

    def _expect(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._settle()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _living(connections: Collection[Any]) -> set[LimitedHttp]:
    """Return the connections that are not ending: those need nothing but the rest of their answer to be sent."""
    return {each for each in connections if not each.transport.is_closing()}


def _make_room(connections: set[LimitedHttp]) -> bool:
    """End the longest idle connection of the address that has the most of them; return False if none is idle."""
    waiting = [each for each in connections if each.is_waiting and not each.transport.is_closing()]
    if not waiting:
        return False
    counted = Counter(each.address for each in waiting)
    greediest = max(counted.values())
    min((each for each in waiting if counted[each.address] == greediest), key=_idle_since_s).transport.abort()
    return True


def _idle_since_s(connection: LimitedHttp) -> float:
    return connection.idle_since_s


def _network(address: str) -> str:
    """Return what one client can have many of: an IPv4 address, or the /64 of an IPv6 address."""
    return ":".join(address.split(":")[:4]) if address.count(":") > 1 and not address.startswith("::") else address


async def _refuse(send: Callable[[Any], Any]) -> None:
    text = b"too many requests at a time: try again later\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
    headers += [(b"retry-after", b"1"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": text, "more_body": False})


def _place(error: BaseException) -> str:
    """Return an error's type and where it was raised; its text may quote the request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in {trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{where}"


_logged_s: dict[str, float] = {}


def _log_seldom(text: str, *values: object) -> None:
    """Log each line at most once a minute: a client must not fill the log."""
    now_s, line = time.monotonic(), text % values
    if now_s - _logged_s.get(line, float("-inf")) >= _LOG_EVERY_S:
        _logged_s[line] = now_s
        _logger.warning("%s", line)
