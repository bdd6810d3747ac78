"""`Proxy`: the HTTP or SOCKS proxy that the environment names for a host."""

from __future__ import annotations

import base64
import ipaddress
import os
import sys
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from tailspan._net import default_tls, host_port, is_loopback
from tailspan._secrets import add_secret
from tailspan.errors import ConfigError
from tailspan.http.connection import Connection, Header
from tailspan.http.errors import ConnectTimeout, ProxyError, ReadError, RemoteProtocolError, TooSlow, WriteError
from tailspan.http.stream import NetworkStream, connect_tcp

__all__ = ["Proxy", "ascii_host", "basic", "proxy_of"]

_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
_SOCKS = 5
_NO_LOGIN, _LOGIN = 0, 2
_MAX_LOGIN_BYTES = 255
_ADDRESS_BYTES = {1: 4, 4: 16}
_NAME = 3
# RFC 1928, section 6.
_SOCKS_FAULTS = (
    "", "general failure", "connection not allowed", "network unreachable", "host unreachable", "connection refused",
    "TTL expired", "command not supported", "address type not supported",
)  # fmt: skip


class Proxy(NamedTuple):
    """A proxy.

    Attributes:
        scheme: ``http``, ``https``, ``socks5`` or ``socks5h``; both SOCKS proxies look up the names.
        host: Its host.
        port: Its port.
        login: User and password, if the environment has them.
    """

    scheme: str
    host: str
    port: int
    login: tuple[bytes, bytes] | None

    @property
    def is_socks(self) -> bool:
        """Whether it passes on bytes of any kind."""
        return self.scheme.startswith("socks")

    @property
    def headers(self) -> list[Header]:
        """Sent with each request to the proxy itself, or through it without a tunnel."""
        return [] if self.login is None else [(b"Proxy-Authorization", basic(*self.login))]

    @property
    def url(self) -> str:
        """With its login."""
        login = "" if self.login is None else ":".join(quote(part, safe="") for part in self.login) + "@"
        return f"{self.scheme}://{login}{host_port(self.host, self.port)}"

    def __repr__(self) -> str:
        return f"<proxy {self.scheme}://{host_port(self.host, self.port)}>"

    async def connect(self, timeout_s: float, *, streams: bool) -> NetworkStream:
        """Connect to the proxy itself, with TLS if its URL says so.

        Args:
            timeout_s: Time limit for each wait, in seconds.
            streams: See `NetworkStream`.

        Raises:
            HttpError: There is no connection.
        """
        tls = default_tls() if self.scheme == "https" else None
        stream = await connect_tcp(self.host, self.port, timeout_s, streams=streams)
        if tls is not None:
            await stream.start_tls(tls, self.host, timeout_s)
        return stream

    async def tunnel(self, host: str, port: int, timeout_s: float, *, streams: bool) -> NetworkStream:
        """Return a connection to a server, through the proxy.

        Args:
            host: The server's host.
            port: The server's port.
            timeout_s: Time limit for each wait on the proxy, in seconds.
            streams: See `NetworkStream`.

        Raises:
            HttpError: There is no connection.
        """
        stream = await self.connect(timeout_s, streams=streams)
        try:
            if self.is_socks:
                await self._ask_socks(stream, host, port, timeout_s)
            else:
                await self._ask_http(stream, host, port, timeout_s)
        except BaseException as error:
            await stream.aclose()
            # The request itself was not sent.
            if isinstance(error, TooSlow):
                raise ConnectTimeout from error
            if isinstance(error, (ReadError, RemoteProtocolError, WriteError)):
                raise ProxyError(f"no tunnel through the proxy: {error}") from error
            raise
        return stream

    async def _ask_http(self, stream: NetworkStream, host: str, port: int, timeout_s: float) -> None:
        target = host_port(host, port).encode()
        connection = Connection(stream, read_s=timeout_s, write_s=timeout_s)
        headers = [(b"Host", target), (b"Accept", b"*/*"), *self.headers]
        answer = await connection.send("CONNECT", target, headers)
        if not 200 <= answer.status_code < 300:
            raise ProxyError(f"{answer.status_code} {answer.reason.decode('ascii', 'ignore')}")
        connection.leave_stream()

    async def _ask_socks(self, stream: NetworkStream, host: str, port: int, timeout_s: float) -> None:
        """Source: RFC 1928 (SOCKS 5) and RFC 1929 (user and password)."""
        reader = _Exactly(stream, timeout_s)
        method = _NO_LOGIN if self.login is None else _LOGIN
        await stream.write(bytes((_SOCKS, 1, method)), timeout_s)
        if await reader.read(2) != bytes((_SOCKS, method)):
            raise ProxyError("the SOCKS proxy wants another way of authentication")
        if self.login is not None:
            user, password = self.login
            await stream.write(b"\1" + _with_length(user) + _with_length(password), timeout_s)
            if (await reader.read(2))[1]:
                raise ProxyError("the SOCKS proxy rejects the user or the password")
        await stream.write(bytes((_SOCKS, 1, 0)) + _socks_address(host) + port.to_bytes(2, "big"), timeout_s)
        _, fault, _, kind = await reader.read(4)
        if fault:
            text = _SOCKS_FAULTS[fault] if fault < len(_SOCKS_FAULTS) else f"error {fault}"
            raise ProxyError(f"the SOCKS proxy could not connect: {text}")
        size = _ADDRESS_BYTES.get(kind) or (await reader.read(1))[0]
        await reader.read(size + 2)
        if reader.rest:
            raise ProxyError("the SOCKS proxy sent data before the server could")


class _Exactly:
    """Reads a number of bytes from a stream.

    Attributes:
        rest: What was received and not read.
    """

    def __init__(self, stream: NetworkStream, timeout_s: float) -> None:
        self.rest = b""
        self._stream = stream
        self._timeout_s = timeout_s

    async def read(self, size: int) -> bytes:
        while len(self.rest) < size:
            piece = await self._stream.read(self._timeout_s)
            if not piece:
                raise ProxyError("the SOCKS proxy has closed the connection")
            self.rest += piece
        found, self.rest = self.rest[:size], self.rest[size:]
        return found


def _with_length(text: bytes) -> bytes:
    return bytes((len(text),)) + text


def _socks_address(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bytes((_NAME,)) + _with_length(host.encode())
    return bytes((1 if address.version == 4 else 4,)) + address.packed


def proxy_of(scheme: str, named: str, host: str) -> Proxy | None:
    """Return the proxy that the environment (or macOS, or Windows) names for a host, if any; never for this machine.

    A proxy elsewhere could not reach a service of this machine, but would read its token.

    Args:
        scheme: ``http`` or ``https``.
        named: The host with its port.
        host: The host.

    Raises:
        ConfigError: The environment names something else.
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
        its_host, its_port = ascii_host(parts.hostname or ""), parts.port or _PORTS.get(parts.scheme)
        user, password = unquote(parts.username or "").encode(), unquote(parts.password or "").encode()
    except ValueError:
        its_host, its_port = "", None
    is_too_long = parts.scheme.startswith("socks") and max(len(user), len(password)) > _MAX_LOGIN_BYTES
    if not its_host or its_port is None or parts.scheme not in _PORTS or is_too_long:
        raise ConfigError("the proxy that the environment names is not an http, https or socks5 URL: check HTTPS_PROXY")
    if parts.username is None:
        return Proxy(parts.scheme, its_host, its_port, None)
    add_secret(basic(user, password).decode())
    return Proxy(parts.scheme, its_host, its_port, (user, password))


def basic(user: bytes, password: bytes) -> bytes:
    """Return the value of a header for basic authentication."""
    return b"Basic " + base64.b64encode(user + b":" + password)


def ascii_host(host: str) -> str:
    """Return a host in ASCII (IDNA).

    Raises:
        ValueError: It has no such form.
    """
    if host.isascii():
        # The limits of RFC 1035; the resolver would raise an error of another kind.
        name = host.removesuffix(".")
        if not name.isprintable() or len(name) > 253 or any(not 0 < len(label) < 64 for label in name.split(".")):
            raise ValueError(host)
        return host
    import idna

    return idna.encode(host).decode()
