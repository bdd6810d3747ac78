"""`HttpClient`: requests to one origin over kept-alive connections, with bodies of any size in pieces.

This is httpcore, the part of httpx that pools connections, uses proxies and speaks HTTP/1.1. The rest of httpx
(cookies, redirects, authentication flows, models) is not needed here, and on loopback it costs as much as the request
itself (``python -m tests.bench --only W1,W5``).
"""

from __future__ import annotations

import base64
import importlib.util
import os
import socket as sockets
import ssl
import sys
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import httpcore

from tailspan._net import host_port, is_loopback
from tailspan._secrets import add_secret
from tailspan._version import __version__
from tailspan.errors import ConfigError
from tailspan.http.asyncio_backend import AsyncioBackend

__all__ = ["BROKEN", "FAULTY", "NEVER_SENT", "TOO_SLOW", "HttpClient", "Reply", "user_agent"]

NEVER_SENT = (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout, httpcore.ProxyError)
"""Errors of a request that cannot have reached the server."""

# A server reports a missing client certificate while its answer is read; httpcore passes that error through.
BROKEN = (*NEVER_SENT, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError)
"""All errors of a request without a complete answer."""

TOO_SLOW = httpcore.TimeoutException
"""The errors of `BROKEN` that are timeouts."""

FAULTY = httpcore.LocalProtocolError
"""The errors of `BROKEN` for a request that cannot be sent to any server: do not retry it."""

_SLICE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PROXY_SCHEMES = (b"http", b"https", b"socks5", b"socks5h")
# Finds a dead peer of a silent connection within a minute and a half.
_KEEP_ALIVE_OPTIONS = (("TCP_KEEPIDLE", 45), ("TCP_KEEPALIVE", 45), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3))
_STREAM_BYTES = 64 << 10
# RFC 3986: characters that a target may contain unescaped; a percent sign begins an escape.
_IN_TARGET = "/?:@!$&'()*+,;=-._~%[]"


class Reply:
    """An answer with an unread body; the caller must close it.

    Attributes:
        status: The status code.
        reason: The reason phrase; often empty.
        headers: Values by lower-case name; values of repeated headers are joined with commas.
    """

    def __init__(self, response: httpcore.Response) -> None:
        self.status = response.status
        self.reason = cast("bytes", response.extensions.get("reason_phrase", b"")).decode("latin-1")
        self.headers: dict[str, str] = {}
        for name, value in response.headers:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
        self._response = response

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body, decompressed, in pieces of bounded size.

        Raises:
            zlib.error: The body is not compressed as its header says.
            httpcore.NetworkError: The body is incomplete; see `BROKEN`.
        """
        encoding = self.headers.get("content-encoding", "").strip().lower()
        unpacker = _Unpacker() if encoding in ("gzip", "x-gzip", "deflate") else None
        unpack = unpacker.feed if unpacker is not None else _as_it_is
        # An unclosed generator would hold the connection until it is garbage collected.
        async with aclosing(cast("AsyncGenerator[bytes, None]", self._response.aiter_stream())) as chunks:
            async for chunk in chunks:
                for piece in unpack(chunk):
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
        """Return the connection to the pool, or close it if part of the body is unread."""
        await self._response.aclose()


class HttpClient:
    """Sends requests to the origin of one URL, through a proxy if the environment names one, as httpx does.

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
            ConfigError: The URL, or the proxy that the environment names, is not usable.
        """
        try:
            parts = urlsplit(url)
            host, port = _ascii_host(parts.hostname or ""), parts.port
        except ValueError:
            host = ""
        if not host or parts.scheme not in _DEFAULT_PORTS:
            raise ConfigError(f"{key}: {url.rpartition('@')[2]} is not a usable URL", key=key)
        self._path = parts.path
        self._query = parts.query
        timeouts = {"connect": timeout_s, "read": None if streams else timeout_s, "write": timeout_s}
        self._extensions = {"timeout": timeouts, "sni_hostname": server_name}
        self._origin = parts.scheme.encode(), host.encode(), port
        default_port = _DEFAULT_PORTS[parts.scheme]
        named = host_port(host, None if port == default_port else port)
        own = {"Host": named, "User-Agent": user_agent(), "Accept": "*/*", "Accept-Encoding": "gzip"}
        if parts.username is not None:
            own["Authorization"] = _basic(unquote(parts.username), unquote(parts.password or ""))
            add_secret(own["Authorization"])
        self._headers = _replaced(_encoded(own), headers)
        self._pool = httpcore.AsyncConnectionPool(
            tls,
            proxy=_proxy_of(parts.scheme, host_port(host, port or default_port), host) if uses_proxy else None,
            max_connections=None,
            max_keepalive_connections=max_idle,
            keepalive_expiry=keep_alive_s,
            uds=None if socket is None else os.fspath(socket),
            network_backend=AsyncioBackend(_STREAM_BYTES) if streams else AsyncioBackend(),
            socket_options=list(_stream_options()) if streams and socket is None else None,
        )

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
            httpcore.NetworkError: There is no answer; see `BROKEN`.
        """
        target = quote((self._path + path) or "/", safe=_IN_TARGET)
        if found := query or self._query:
            target += "?" + quote(found, safe=_IN_TARGET)
        sent = _replaced(self._headers, headers) if headers else self._headers
        if content is not None or method == "POST":
            sent = [*sent, (b"Content-Length", str(len(content or b"")).encode())]
        scheme, host, port = self._origin
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=scheme, host=host, port=port, target=target.encode()),
            headers=sent,
            content=_Slices(content) if content else None,
            extensions=dict(self._extensions),
        )
        return Reply(await self._pool.handle_async_request(request))

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
            httpcore.NetworkError: There is no answer; see `BROKEN`.
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
        await self._pool.aclose()


def user_agent() -> str:
    """Return the value of the User-Agent header."""
    return f"tailspan/{__version__}"


class _Slices:
    """A body in slices, because asyncio copies the part of a write that the socket does not accept at once.

    It drops its reference to the body when all is sent: responses are part of reference cycles, which keep alive what
    their requests hold.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[Any]:
        view, self._content = memoryview(self._content), b""
        for start in range(0, len(view), _SLICE_BYTES):
            yield view[start : start + _SLICE_BYTES]


class _Unpacker:
    """Decompresses gzip or zlib (by the first bytes) in bounded pieces: a few bytes can expand to gigabytes."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self._begun = True
        while chunk and not self._inflate.eof:
            if piece := self._inflate.decompress(chunk, _PIECE_BYTES):
                yield piece
            chunk = self._inflate.unconsumed_tail

    def close(self) -> None:
        if self._begun and not self._inflate.eof:
            raise zlib.error("the compressed data is incomplete")


def _as_it_is(chunk: bytes) -> Iterator[bytes]:
    yield chunk


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("utf-8")) for name, value in headers.items()]


def _replaced(own: list[tuple[bytes, bytes]], headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers with others added; these replace headers of the same names."""
    given = _encoded(headers)
    names = {name.lower() for name, _ in given}
    return [*(pair for pair in own if pair[0].lower() not in names), *given]


def _ascii_host(host: str) -> str:
    """Return a host in ASCII (IDNA). Raise ValueError for a name that has no such form."""
    if host.isascii():
        # The limits of RFC 1035; the resolver would raise an error of another kind.
        if any(not 0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
            raise ValueError(host)
        return host
    import idna

    return idna.encode(host).decode()


def _stream_options() -> Iterator[tuple[int, int, int]]:
    yield sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1
    yield sockets.SOL_SOCKET, sockets.SO_RCVBUF, _STREAM_BYTES
    for name, value in _KEEP_ALIVE_OPTIONS:
        if (option := getattr(sockets, name, None)) is not None:
            yield sockets.IPPROTO_TCP, option, value


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _proxy_of(scheme: str, named: str, host: str) -> httpcore.Proxy | None:
    """Return the proxy that the environment (or macOS, or Windows) names for a host, if any; never for this machine.

    A proxy elsewhere could not reach a service of this machine, but would read its token.
    """
    if is_loopback(host):
        return None
    if sys.platform not in ("darwin", "win32") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return None  # importing urllib.request takes longer than a request
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or proxy_bypass(named) or proxy_bypass(host):
        return None
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        url = httpcore.URL(
            scheme=parts.scheme.encode(), host=_ascii_host(parts.hostname or "").encode(), port=parts.port, target=b"/"
        )
    except ValueError:
        url = httpcore.URL(scheme=b"", host=b"", target=b"/")
    if not url.host or url.scheme not in _PROXY_SCHEMES:
        raise ConfigError("the proxy that the environment names is not an http, https or socks5 URL: check HTTPS_PROXY")
    if url.scheme.startswith(b"socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError("the environment names a SOCKS proxy, which needs: pip install 'httpcore[socks]'")
    if parts.username is None:
        return httpcore.Proxy(url)
    add_secret(_basic(unquote(parts.username), unquote(parts.password or "")))
    return httpcore.Proxy(url, (unquote(parts.username).encode(), unquote(parts.password or "").encode()))
