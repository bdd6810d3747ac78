"""`WebSocket`: the messages of a server over a WebSocket: change notifications, or text.

Needs the package websockets, which the agent installs and the SDK alone does not: import this module where it is used.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from tailspan._net import host_port
from tailspan.errors import ConfigError
from tailspan.http.client import user_agent
from tailspan.http.proxy import ascii_host, proxy_of

__all__ = ["WebSocket", "WebSocketError"]

_MAX_MESSAGE_BYTES = 4 << 20
_PING_S = 20.0
_NORMAL = 1000
_FAULTS = (WebSocketException, ConfigError, OSError, TimeoutError, ImportError, ValueError)


class WebSocketError(Exception):
    """The connection cannot be opened, or has ended.

    Attributes:
        status: The HTTP status by which the server refused the connection; 0 for another reason.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class _Connect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        # Credentials are for the configured host only.
        return exc


class WebSocket:
    """An open connection for messages in JSON, or in text. It belongs to the event loop that opened it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        headers: Mapping[str, str],
        subprotocol: str = "",
        pings: bool = True,
        max_bytes: int = _MAX_MESSAGE_BYTES,
        timeout_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> WebSocket:
        """Connect, through a proxy if the environment names one for HTTP to this host.

        Args:
            url: A ws or wss URL.
            headers: Sent with the request.
            subprotocol: The protocol of the messages; empty: none.
            pings: Whether to end a connection whose server answers no pings; some servers answer none while they send.
            max_bytes: The largest message.
            timeout_s: Time limit for connecting, in seconds.
            tls: The TLS context; required for wss.

        Raises:
            WebSocketError: There is no connection.
        """
        try:
            connection = await _Connect(
                url,
                subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
                additional_headers=dict(headers),
                user_agent_header=user_agent(),
                # A small message may expand to gigabytes.
                compression=None,
                max_size=max_bytes,
                ping_interval=_PING_S if pings else None,
                open_timeout=timeout_s,
                proxy=_proxy_url(url),
                ssl=tls,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            raise WebSocketError(f"HTTP {status} {error.response.reason_phrase}".rstrip(), status) from None
        except _FAULTS as error:
            raise WebSocketError(str(error) or type(error).__name__) from error
        return cls(connection)

    async def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            WebSocketError: The connection has ended.
        """
        try:
            await self._connection.send(msgspec.json.encode(message).decode())
        except ConnectionClosed as error:
            raise _closed(error) from None

    async def receive(self) -> Any:
        """Wait for the next message. The wait may be cancelled without losing a message.

        Raises:
            WebSocketError: The connection has ended, or the message is not JSON.
        """
        try:
            return msgspec.json.decode(await self._connection.recv())
        except ConnectionClosed as error:
            raise _closed(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.close()
            raise WebSocketError("the server sent a message that is not JSON") from None

    async def receive_text(self) -> bytes | None:
        """Wait for the next message and return its text in UTF-8; None if the server has ended the connection as usual.

        The wait may be cancelled without losing a message.

        Raises:
            WebSocketError: The connection has ended for another reason.
        """
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == _NORMAL:
                return None
            raise _closed(error) from None

    def close(self) -> None:
        """End the connection without a farewell."""
        cast("Any", self._connection.transport).abort()


def _proxy_url(url: str) -> str | None:
    # The package's own search has other rules, and its errors show the proxy's password.
    parts = urlsplit(url)
    scheme, port = ("https", 443) if parts.scheme == "wss" else ("http", 80)
    host = ascii_host(parts.hostname or "")
    proxy = proxy_of(scheme, host_port(host, parts.port or port), host)
    return None if proxy is None else proxy.url


def _closed(error: ConnectionClosed) -> WebSocketError:
    frame = error.rcvd
    if frame is None:
        return WebSocketError("the connection broke off")
    return WebSocketError(f"the server closed the connection ({frame.code}): {frame.reason or 'no reason given'}")
