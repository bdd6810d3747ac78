"""The settings of access to the agent's own HTTP server."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

__all__ = ["ServerAccess"]


class ServerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Who may use what.

    Attributes:
        token: The configured token: everything but health requires it. None: see `page_token`.
        page_token: Required by the page if there is no `token`; None requires none.
        allowed_hosts: Further accepted names in the Host header.
        public_url: The URL of a proxy in front of the server.
    """

    token: str | None = None
    page_token: str | None = None
    allowed_hosts: Collection[str] = ()
    public_url: str | None = None
