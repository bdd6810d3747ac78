"""`NetworkStream`: one connection, by TCP or a Unix socket, plain or with TLS, made with asyncio directly."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import select
import socket
import ssl
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar, cast

from tailspan.http.errors import ConnectError, ConnectTimeout, ReadError, ReadTimeout, WriteError, WriteTimeout

__all__ = ["NetworkStream", "connect_reason", "connect_tcp", "connect_unix"]

# The most that asyncio reads at once: reading pauses while this much is unread.
_MAX_WAITING_BYTES = 256 << 10
_STREAM_BYTES = 64 << 10
# Finds a dead peer of a silent connection within a minute and a half.
_KEEP_ALIVE_OPTIONS = (("TCP_KEEPIDLE", 45), ("TCP_KEEPALIVE", 45), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3))
_TLS_BUFFER_BYTES = 16 << 10
# RFC 8305: how long to wait for one address before also trying the next.
_NEXT_ADDRESS_S = 0.25
_LONGER_S = 1.0
_ERRNO = re.compile(r"\[Errno (-?\d+)\]")

T = TypeVar("T")


async def connect_tcp(host: str, port: int, timeout_s: float | None = None, *, streams: bool = False) -> NetworkStream:
    """Connect to a port.

    Args:
        host: A name or an address.
        port: The port.
        timeout_s: Time limit in seconds.
        streams: See `NetworkStream`.

    Raises:
        ConnectError: The reason is in the system's own words.
        ConnectTimeout: There was no connection in time.
    """
    return await _in_time_or_not(_connect(host, port, partial(NetworkStream, streams=streams)), timeout_s)


async def connect_unix(path: str, timeout_s: float | None = None, *, streams: bool = False) -> NetworkStream:
    """Connect to a Unix socket; see `connect_tcp`."""
    loop = asyncio.get_running_loop()
    connecting = loop.create_unix_connection(partial(NetworkStream, streams=streams), path)
    return (await _in_time_or_not(connecting, timeout_s))[1]


async def _in_time_or_not(connecting: Awaitable[T], timeout_s: float | None) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await connecting
    except TimeoutError as error:
        raise ConnectTimeout(str(error)) from error
    except OSError as error:
        raise ConnectError(connect_reason(error)) from error


class NetworkStream(asyncio.Protocol):
    """One connection, with TLS after `start_tls`. At most one task reads and one writes at a time."""

    def __init__(self, *, streams: bool = False) -> None:
        """Wait for asyncio's connection.

        Args:
            streams: Whether the server may be silent for hours: TCP keep-alive then finds a dead one, and reading
                pauses while 64 KiB are unread instead of 256 KiB.
        """
        self._streams = streams
        self._max_waiting_bytes = _STREAM_BYTES if streams else _MAX_WAITING_BYTES
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._received: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._lost = False
        self._error: Exception | None = None
        self._read_again: asyncio.Future[None] | None = None
        self._write_again: asyncio.Future[None] | None = None
        self._is_full = False
        self._poll: Callable[[int], list[Any]] | None = None

    async def read(self, timeout_s: float | None = None) -> bytes:
        """Return the next bytes, or none at the end.

        Args:
            timeout_s: Time limit in seconds.

        Raises:
            ReadError: The connection broke.
            ReadTimeout: Nothing came in time.
        """
        if not self._received and not self._ended:
            self._read_again = self._loop.create_future()
            await _in_time(self._read_again, timeout_s, ReadTimeout)
        if self._received:
            piece = self._received.popleft()
            if self._waiting_bytes >= self._max_waiting_bytes > self._waiting_bytes - len(piece) and not self._ended:
                self._transport.resume_reading()
            self._waiting_bytes -= len(piece)
            return piece
        if self._error is not None:
            raise ReadError(str(self._error)) from self._error
        return b""

    async def write(self, buffer: bytes | memoryview, timeout_s: float | None = None) -> None:
        """Send, and return once most of the buffer has left.

        Args:
            buffer: The bytes.
            timeout_s: Time limit in seconds.

        Raises:
            WriteError: The connection broke, or the server has ended it.
            WriteTimeout: The bytes did not leave in time.
        """
        if not self._ended:
            self._transport.write(buffer)
            if self._is_full:
                self._write_again = self._loop.create_future()
                await _in_time(self._write_again, timeout_s, WriteTimeout)
        if self._error is not None or self._ended or self._transport.is_closing():
            raise WriteError(self._end) from self._error

    @property
    def _end(self) -> str:
        return str(self._error or "the server has closed the connection")

    async def aclose(self) -> None:
        """Close the connection without waiting for the other side."""
        self.abort()
        await asyncio.sleep(0)  # asyncio closes the socket in its next iteration, and this may be the last one

    def abort(self) -> None:
        """Close the connection and drop unsent bytes."""
        # A read that is still waiting must not take this for the server's end.
        self._error = self._error or ConnectionAbortedError("the connection was closed")
        if not self._lost:  # asyncio's abort fails after asyncio has closed the connection itself
            self._transport.abort()

    async def start_tls(self, context: ssl.SSLContext, server_name: str, timeout_s: float | None = None) -> None:
        """Switch to TLS.

        Args:
            context: What to trust, and what to show.
            server_name: The name in the server's certificate.
            timeout_s: Time limit in seconds.

        Raises:
            ConnectError: The handshake failed; the stream is closed.
            ConnectTimeout: It took too long; the stream is closed.
        """
        try:
            if self._received:
                # These bytes are not authenticated, but `read` would return them as if they had arrived by TLS.
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the server sent data before the TLS handshake")
            if self._ended or self._transport.is_closing():
                # asyncio would wait for the handshake of a closed connection.
                raise ConnectionResetError(self._end) from self._error
            async with asyncio.timeout(timeout_s):
                secured = await self._loop.start_tls(
                    self._transport,
                    self,
                    context,
                    server_hostname=server_name,
                    # asyncio reports its own limit as a broken connection.
                    ssl_handshake_timeout=timeout_s + _LONGER_S if timeout_s is not None else None,
                )
            if secured is None:  # asyncio returns None if the connection was closed meanwhile
                raise ConnectionResetError(self._end)
        except BaseException as error:
            end = self._end
            self.abort()
            if isinstance(error, TimeoutError):
                raise ConnectTimeout(str(error)) from error
            if isinstance(error, OSError):
                raise ConnectError(connect_reason(error) or end) from error
            raise
        self._transport = secured
        if self._streams:
            _shrink_tls_buffer(secured)

    @property
    def is_readable(self) -> bool:
        """Whether `read` returns at once: something has come, or the end."""
        return bool(self._received) or self._ended or self._has_something_to_read()

    def get_extra_info(self, name: str) -> Any:
        """Return information about the transport; see asyncio."""
        return self._transport.get_extra_info(name)

    def _has_something_to_read(self) -> bool:
        # The loop reports an end only when it runs again; the program may have been computing for a minute.
        found = self._transport.get_extra_info("socket")
        if found is None or found.fileno() < 0:
            return True
        if sys.platform == "win32":
            return bool(select.select([found], [], [], 0)[0])
        if self._poll is None:
            poll = select.poll()
            poll.register(found, select.POLLIN)
            self._poll = poll.poll
        return bool(self._poll(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        if self._streams:
            # A connection that is already broken has no options, and reports its error to `read`.
            with suppress(OSError):
                _set_stream_options(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._received.append(data)
        if self._waiting_bytes < self._max_waiting_bytes <= self._waiting_bytes + len(data):
            self._transport.pause_reading()
        self._waiting_bytes += len(data)
        _wake(self._read_again)

    def eof_received(self) -> None:
        """See asyncio."""
        self._ended = True
        _wake(self._read_again)
        _wake(self._write_again)  # an early answer is worth more than the rest of the request

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._ended = self._lost = True
        self._error = self._error or exc
        _wake(self._read_again)
        _wake(self._write_again)

    def pause_writing(self) -> None:
        """See asyncio."""
        self._is_full = True

    def resume_writing(self) -> None:
        """See asyncio."""
        self._is_full = False
        _wake(self._write_again)


def _set_stream_options(connected: socket.socket) -> None:
    if connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _STREAM_BYTES)
    for name, value in _KEEP_ALIVE_OPTIONS:
        if (option := getattr(socket, name, None)) is not None:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _shrink_tls_buffer(transport: Any) -> None:
    """Let asyncio read TLS in smaller pieces: its buffer of 256 KiB takes most of the memory of a silent connection.

    Source: ``asyncio.sslproto.SSLProtocol`` of Python 3.11 to 3.14; without these names it keeps its buffer.
    """
    protocol: Any = getattr(transport, "_ssl_protocol", None)
    if protocol is not None and hasattr(protocol, "_ssl_buffer") and hasattr(protocol, "_ssl_buffer_view"):
        protocol.max_size = _TLS_BUFFER_BYTES
        protocol._ssl_buffer = bytearray(_TLS_BUFFER_BYTES)
        protocol._ssl_buffer_view = memoryview(protocol._ssl_buffer)


async def _in_time(waiter: asyncio.Future[None], timeout: float | None, too_slow: type[Exception]) -> None:
    # A timer is cheaper than `asyncio.timeout`, which looks up the task and the loop each time.
    timer = None if timeout is None else waiter.get_loop().call_later(timeout, _give_up, waiter, too_slow)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()


def _give_up(waiter: asyncio.Future[None], too_slow: type[Exception]) -> None:
    if not waiter.done():
        waiter.set_exception(too_slow())


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def connect_reason(error: OSError) -> str:
    """Return why a connection failed in the system's own words, such as ``connection refused``.

    asyncio says "[Errno 111] Connect call failed ('127.0.0.1', 4318)", and names each address of a host.
    """
    numbers = {int(number) for number in _ERRNO.findall(str(error))}
    if len(numbers) != 1:
        return str(error)
    (number,) = numbers
    text = os.strerror(number) if number > 0 else _ERRNO.sub("", str(error)).strip()
    return text[:1].lower() + text[1:]


async def _connect(host: str, port: int, make_stream: Callable[[], NetworkStream]) -> NetworkStream:
    """Connect to the first address that answers: one by one, alternating between families (RFC 8305).

    asyncio's own implementation leaves a socket open if it is cancelled just when the socket is connected.
    """
    loop = asyncio.get_running_loop()
    left = await _addresses(host, port)
    attempts: list[asyncio.Task[tuple[asyncio.Transport, NetworkStream]]] = []
    running: set[asyncio.Task[tuple[asyncio.Transport, NetworkStream]]] = set()
    try:
        while left or running:
            if left:
                attempt = loop.create_task(loop.create_connection(make_stream, left.pop(0), port))
                attempts.append(attempt)
                running.add(attempt)
            done, running = await asyncio.wait(
                running, timeout=_NEXT_ADDRESS_S if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                if attempt.exception() is None:
                    attempts.remove(attempt)
                    return attempt.result()[1]
        failed = attempts[0].exception()
        assert failed is not None
        raise failed
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_drop)


async def _addresses(host: str, port: int) -> list[str]:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return [host]  # resolving would start a thread
    by_family: dict[int, list[str]] = {}
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        # A link-local address is useless without its interface.
        scope = f"%{address[3]}" if len(address) == 4 and address[3] else ""
        by_family.setdefault(family, []).append(f"{address[0]}{scope}")
    return [address for turn in zip_longest(*by_family.values()) for address in turn if address is not None]


def _drop(attempt: asyncio.Task[tuple[asyncio.Transport, NetworkStream]]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result()[1].abort()
