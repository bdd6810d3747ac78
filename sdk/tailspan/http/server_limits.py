"""Limits for each client of our HTTP servers: uvicorn alone waits for ever for the rest of a request."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["REQUEST_S", "LimitedHttp"]

REQUEST_S = 10.0
"""How long a client may take to send a whole request, header and body, in seconds."""


class LimitedHttp(H11Protocol):
    """HTTP/1.1 with a deadline for each request; uvicorn itself limits headers to 64 KiB and the idle time between.

    Without the deadline, a few hundred connections that send a byte now and then use up all connections (Slowloris).
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Handle a part of a request; its deadline starts with the first byte."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._settle()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._settle()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
