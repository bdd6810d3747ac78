"""`Connection`: HTTP/1.1 over a stream, one request after the other. `Connections`: those of one client, kept alive.

h11 reads and writes the messages; the pieces of a body go to the stream as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import h11

from tailspan.http.errors import ConnectError, LocalProtocolError, RemoteProtocolError, WriteError
from tailspan.http.stream import NetworkStream

__all__ = ["Connection", "Connections", "Header"]

Header = tuple[bytes, bytes]

_MAX_HEADER_BYTES = 100 << 10
# A small body leaves in one packet with its header.
_SMALL_BYTES = 16 << 10


class Connection:
    """Sends a request and reads its answer, then the next one.

    Attributes:
        stream: The connection below.
        idle_since_s: When its last answer was complete, by the monotonic clock.
    """

    def __init__(self, stream: NetworkStream, *, read_s: float | None, write_s: float) -> None:
        """Send nothing yet.

        Args:
            stream: Nothing was read from it.
            read_s: Time limit for each wait on the answer, in seconds; None: none.
            write_s: Time limit for each wait on the server while the request is sent, in seconds.
        """
        self.stream = stream
        self.idle_since_s = 0.0
        self._read_s = read_s
        self._write_s = write_s
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)

    async def send(
        self, method: str, target: bytes, headers: list[Header], body: Iterable[bytes | memoryview] = ()
    ) -> h11.Response:
        """Send a request, and return the header of its answer.

        Args:
            method: ``GET``, ``POST`` ...
            target: The escaped path and query, or what a proxy expects.
            headers: With the length of the body, if there is one.
            body: Its pieces.

        Raises:
            HttpError: There is no answer.
        """
        try:
            await self._send(method, target, headers, body)
        except WriteError:
            # A server may refuse a large body before its end, with an answer that says why.
            pass
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event

    async def _send(
        self, method: str, target: bytes, headers: list[Header], body: Iterable[bytes | memoryview]
    ) -> None:
        try:
            waiting = self._http.send(h11.Request(method=method, target=target, headers=headers)) or b""
        except h11.LocalProtocolError as error:
            raise LocalProtocolError(_without_values(str(error), headers)) from None
        for piece in body:
            # h11 only counts the bytes of a body whose length is known.
            self._http.send_with_data_passthrough(h11.Data(data=piece))  # type: ignore[arg-type]
            if waiting and len(piece) <= _SMALL_BYTES:
                piece = b"".join((waiting, piece))
            elif waiting:
                await self.stream.write(waiting, self._write_s)
            waiting = b""
            await self.stream.write(piece, self._write_s)
        self._http.send(h11.EndOfMessage())
        if waiting:
            await self.stream.write(waiting, self._write_s)

    async def read(self) -> bytes:
        """Return the next piece of the answer's body; empty at its end.

        Raises:
            HttpError: The answer is not complete.
        """
        if self._http.their_state is h11.DONE:
            return b""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def _next_event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise RemoteProtocolError(error) from error
            if event is not h11.NEED_DATA:
                return event
            data = await self.stream.read(self._read_s)
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise RemoteProtocolError("Server disconnected without sending a response.")
            self._http.receive_data(data)

    def is_reusable(self) -> bool:
        """Return whether all was sent and read, and begin the next exchange then."""
        if not self._http.our_state is self._http.their_state is h11.DONE:
            return False
        if self._http.trailing_data[0]:
            return False  # it would pass for the answer of the next request
        self._http.start_next_cycle()
        self.idle_since_s = time.monotonic()
        return True

    def leave_stream(self) -> NetworkStream:
        """Return the stream of a tunnel, whose CONNECT was answered.

        Raises:
            RemoteProtocolError: The proxy sent something behind its answer, which would get lost.
        """
        if self._http.trailing_data[0]:
            raise RemoteProtocolError("the proxy sent data before the server could")
        return self.stream


def _without_values(text: str, headers: list[Header]) -> str:
    """Return an error of h11 about a request with the name of a header instead of its value, which may be a secret."""
    for name, value in headers:
        text = text.replace(f"header value {value!r}", f"value of the header {name.decode('latin-1')}")
    return text


class Connections:
    """The connections of one client. Any number may be busy; a few wait for the next request."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], *, keep_alive_s: float, max_idle: int) -> None:
        """Connect when a connection is taken.

        Args:
            connect: Makes a connection.
            keep_alive_s: How long an idle connection is kept, in seconds.
            max_idle: Number of idle connections to keep.
        """
        self._connect = connect
        self._keep_alive_s = keep_alive_s
        self._max_idle = max_idle
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()

    async def take(self) -> Connection:
        """Return an idle connection whose server is still there, or a new one; give it back after its answer.

        Raises:
            HttpError: There is no connection.
        """
        oldest_s = time.monotonic() - self._keep_alive_s
        while self._idle and self._idle[0].idle_since_s < oldest_s:
            await self._idle.pop(0).stream.aclose()
        while self._idle:
            connection = self._idle.pop()
            # Nothing can come here but the server's end.
            if not connection.stream.is_readable:
                break
            await connection.stream.aclose()
        else:
            busy = self._busy
            connection = await self._connect()
            if busy is not self._busy:
                await connection.stream.aclose()
                raise ConnectError("the client was closed meanwhile")
        self._busy.add(connection)
        return connection

    async def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request if its answer was read to the end; else close it."""
        if connection not in self._busy:
            return  # closed meanwhile
        self._busy.remove(connection)
        if connection.is_reusable() and len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            await connection.stream.aclose()

    async def aclose(self) -> None:
        """Close all of them."""
        closing = [*self._idle, *self._busy]
        self._idle, self._busy = [], set()
        for connection in closing:
            connection.stream.abort()
        await asyncio.sleep(0)  # as `NetworkStream.aclose`, but a cancellation leaves none of them open
