"""`HttpClient`: requests to one origin over kept-alive connections, with bodies of any size in pieces.

What httpx and httpcore have besides (cookies, redirects, other event loops, HTTP/2) is not needed here. On loopback it
costs more than the request itself (``python -m tests.bench --only W1,W5``), and 2.5 MiB of each agent.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from tailspan._net import default_tls, host_port
from tailspan._secrets import add_secret
from tailspan._version import __version__
from tailspan.errors import ConfigError
from tailspan.http.connection import Connection, Connections, Header
from tailspan.http.errors import ConnectError, ConnectTimeout, HttpError, LocalProtocolError, ProxyError, TooSlow
from tailspan.http.proxy import ascii_host, basic, proxy_of
from tailspan.http.stream import NetworkStream, connect_tcp, connect_unix

if TYPE_CHECKING:
    import ssl

    import h11

__all__ = ["BROKEN", "FAULTY", "NEVER_SENT", "TOO_SLOW", "HttpClient", "Reply", "user_agent"]

NEVER_SENT = (ConnectError, ConnectTimeout, ProxyError)
"""Errors of a request that cannot have reached the server."""

BROKEN = (HttpError,)
"""All errors of a request without a complete answer."""

TOO_SLOW = TooSlow
"""The errors of `BROKEN` that are timeouts."""

FAULTY = LocalProtocolError
"""The errors of `BROKEN` for a request that cannot be sent to any server: do not retry it."""

_SLICE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
_DEFAULT_PORTS = {"http": 80, "https": 443}
# RFC 3986: characters that a target may contain unescaped; a percent sign begins an escape.
_IN_TARGET = "/?:@!$&'()*+,;=-._~%[]"


class Reply:
    """An answer with an unread body; the caller must close it.

    Attributes:
        status: The status code.
        reason: The reason phrase; often empty.
        headers: Values by lower-case name; values of repeated headers are joined with commas.
    """

    def __init__(self, response: h11.Response, connection: Connection, connections: Connections) -> None:
        self.status = response.status_code
        self.reason = response.reason.decode("latin-1")
        self.headers: dict[str, str] = {}
        for name, value in response.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
        self._connection = connection
        self._connections = connections
        self._is_closed = False

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body, decompressed, in pieces of bounded size.

        Raises:
            zlib.error: The body is not compressed as its header says.
            HttpError: The body is incomplete; see `BROKEN`.
        """
        encoding = self.headers.get("content-encoding", "").strip().lower()
        unpacker = _Unpacker() if encoding in ("gzip", "x-gzip", "deflate") else None
        while True:
            if self._is_closed:
                raise RuntimeError("the reply is closed: its connection may have another one now")
            if not (chunk := await self._connection.read()):
                break
            if unpacker is None:
                yield chunk
                continue
            for piece in unpacker.feed(chunk):
                yield piece
        if unpacker is not None:
            unpacker.close()

    async def read_into(self, body: bytearray, most_bytes: int) -> None:
        """Append the body, but stop reading once ``body`` has more than ``most_bytes`` bytes. See `pieces`."""
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > most_bytes:
                    return

    async def aclose(self) -> None:
        """Keep the connection for the next request, or close it if part of the body is unread."""
        if not self._is_closed:
            self._is_closed = True
            await self._connections.give_back(self._connection)


class HttpClient:
    """Sends requests to the origin of one URL, through a proxy if the environment names one.

    Nothing is sent before the first request. The client belongs to the event loop of that request.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        headers: Mapping[str, str],
        timeout_s: float,
        tls: ssl.SSLContext | None = None,
        keep_alive_s: float,
        max_idle: int,
        uses_proxy: bool = True,
        socket: Path | None = None,
        server_name: str | None = None,
        streams: bool = False,
    ) -> None:
        """Configure the client.

        Args:
            url: An http or https URL; its user and password are sent as basic authentication.
            key: The configuration key of the URL, for errors.
            headers: Sent with each request.
            timeout_s: Time limit for connecting and for each wait on the server, in seconds.
            tls: The TLS context; required for https.
            keep_alive_s: How long an idle connection is kept, in seconds.
            max_idle: Number of idle connections to keep. Busy connections have no limit: a reply that is read slowly
                holds its connection, and other requests must not wait for it.
            uses_proxy: Whether to read the environment for a proxy; False for requests to this host.
            socket: The Unix socket to connect to instead of the URL's host.
            server_name: The name in the server's certificate; None: the URL's host.
            streams: Whether bodies may be silent for hours: a wait for the body then has no time limit, TCP keep-alive
                finds a dead server, and little is read ahead of the caller.

        Raises:
            ConfigError: The URL, the server's name, or the proxy that the environment names is not usable.
        """
        try:
            parts = urlsplit(url)
            host, port = ascii_host(parts.hostname or ""), parts.port
        except ValueError:
            host = ""
        if not host or parts.scheme not in _DEFAULT_PORTS:
            raise ConfigError(f"{key}: {url.rpartition('@')[2]} is not a usable URL", key=key)
        try:
            self._server_name = ascii_host(server_name or host)
        except ValueError:
            raise ConfigError(f"{key}: {server_name!r} cannot be the name in a certificate", key=key) from None
        self._path = parts.path
        self._query = parts.query
        self._timeout_s = timeout_s
        self._streams = streams
        self._socket = socket
        self._host, self._port = host, port or _DEFAULT_PORTS[parts.scheme]
        self._tls = (tls or default_tls()) if parts.scheme == "https" else None
        named = host_port(host, None if port == _DEFAULT_PORTS[parts.scheme] else port)
        own = {"Host": named, "User-Agent": user_agent(), "Accept": "*/*", "Accept-Encoding": "gzip"}
        self._headers = _encoded(own)
        if parts.username is not None:
            credentials = basic(unquote(parts.username).encode(), unquote(parts.password or "").encode())
            self._headers.append((b"Authorization", credentials))
            add_secret(credentials.decode())
        self._headers = _replaced(self._headers, headers)
        self._proxy = None
        if uses_proxy and socket is None:
            self._proxy = proxy_of(parts.scheme, host_port(host, self._port), host)
        # Without a tunnel, a proxy needs the whole URL.
        self._origin = ""
        if self._proxy is not None and not self._proxy.is_socks and self._tls is None:
            self._origin = f"http://{named}"
            self._headers = [*self._proxy.headers, *self._headers]
        self._connections = Connections(self._connect, keep_alive_s=keep_alive_s, max_idle=max_idle)

    async def send(
        self,
        method: str,
        path: str = "",
        query: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Reply:
        """Send a request and return the answer as soon as its header has arrived.

        Args:
            method: ``GET``, ``POST`` ...
            path: Added to the path of the client's URL.
            query: The query, escaped; empty: the query of the client's URL.
            headers: More headers; they replace the client's headers of the same names.
            content: The body.

        Raises:
            HttpError: There is no answer; see `BROKEN`.
        """
        target = quote((self._path + path) or "/", safe=_IN_TARGET)
        if found := query or self._query:
            target += "?" + quote(found, safe=_IN_TARGET)
        sent = _replaced(self._headers, headers) if headers else self._headers
        if content is not None or method == "POST":
            sent = [*sent, (b"Content-Length", str(len(content or b"")).encode())]
        connection = await self._connections.take()
        try:
            response = await connection.send(method, (self._origin + target).encode(), sent, _slices(content or b""))
        except BaseException:
            await self._connections.give_back(connection)
            raise
        return Reply(response, connection, self._connections)

    async def _connect(self) -> Connection:
        stream = await self._open()
        if self._tls is not None:
            self._tls.set_alpn_protocols(["http/1.1"])
            await stream.start_tls(self._tls, self._server_name, self._timeout_s)
        return Connection(stream, read_s=None if self._streams else self._timeout_s, write_s=self._timeout_s)

    async def _open(self) -> NetworkStream:
        if self._socket is not None:
            return await connect_unix(os.fspath(self._socket), self._timeout_s, streams=self._streams)
        if self._proxy is None:
            return await connect_tcp(self._host, self._port, self._timeout_s, streams=self._streams)
        if self._origin:
            return await self._proxy.connect(self._timeout_s, streams=self._streams)
        return await self._proxy.tunnel(self._host, self._port, self._timeout_s, streams=self._streams)

    async def fetch(
        self,
        method: str,
        path: str = "",
        query: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        max_bytes: int,
    ) -> tuple[Reply, bytes]:
        """Send a request and return the answer, closed, and its body; see `send`.

        Args:
            method: ``GET``, ``POST`` ...
            path: Added to the path of the client's URL.
            query: The query, escaped.
            headers: More headers.
            content: The body to send.
            max_bytes: Where to stop reading the body; the result may be a little longer.

        Raises:
            HttpError: There is no answer; see `BROKEN`.
            zlib.error: The body is not compressed as its header says.
        """
        reply = await self.send(method, path, query, headers=headers, content=content)
        body = bytearray()
        try:
            await reply.read_into(body, max_bytes)
        finally:
            await reply.aclose()
        return reply, bytes(body)

    async def aclose(self) -> None:
        """Close the connections; a later request opens new ones."""
        await self._connections.aclose()


def user_agent() -> str:
    """Return the value of the User-Agent header."""
    return f"tailspan/{__version__}"


def _slices(content: bytes) -> Iterator[memoryview]:
    """Yield a body in slices, because asyncio copies the part of a write that the socket does not accept at once."""
    view = memoryview(content)
    for start in range(0, len(view), _SLICE_BYTES):
        yield view[start : start + _SLICE_BYTES]


class _Unpacker:
    """Decompresses gzip or zlib (by the first bytes) in bounded pieces: a few bytes can expand to gigabytes."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self._begun = True
        while chunk:
            if self._inflate.eof:
                # RFC 1952: the compressed form of two texts, one after the other, is that of both.
                self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
            if piece := self._inflate.decompress(chunk, _PIECE_BYTES):
                yield piece
            chunk = self._inflate.unconsumed_tail or self._inflate.unused_data

    def close(self) -> None:
        if self._begun and not self._inflate.eof:
            raise zlib.error("the compressed data is incomplete")


def _encoded(headers: Mapping[str, str]) -> list[Header]:
    return [(name.encode("latin-1"), value.encode("utf-8")) for name, value in headers.items()]


def _replaced(own: list[Header], headers: Mapping[str, str]) -> list[Header]:
    """Return headers with others added; these replace headers of the same names."""
    given = _encoded(headers)
    names = {name.lower() for name, _ in given}
    return [*(pair for pair in own if pair[0].lower() not in names), *given]
