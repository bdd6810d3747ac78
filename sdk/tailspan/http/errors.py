"""What can go wrong with a request before its answer is complete. `tailspan.http.client` groups these errors."""

from __future__ import annotations

__all__ = [
    "ConnectError",
    "ConnectTimeout",
    "HttpError",
    "LocalProtocolError",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "TooSlow",
    "WriteError",
    "WriteTimeout",
]


class HttpError(Exception):
    """There is no complete answer."""


class TooSlow(HttpError):
    """A time limit has passed."""


class ConnectTimeout(TooSlow):
    """There was no connection in time."""


class ReadTimeout(TooSlow):
    """The server sent nothing in time."""


class WriteTimeout(TooSlow):
    """The server accepted nothing in time."""


class ConnectError(HttpError):
    """There is no connection."""


class ProxyError(HttpError):
    """The proxy does not connect us with the server."""


class ReadError(HttpError):
    """The connection broke before the end of the answer."""


class WriteError(HttpError):
    """The connection broke, or the server closed it, before the end of the request."""


class LocalProtocolError(HttpError):
    """The request is not valid HTTP."""


class RemoteProtocolError(HttpError):
    """The answer is not valid HTTP."""
