"""`SocketChanges`: change notifications of a job service that sends them over a WebSocket."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from tailspan.errors import ServiceError
from tailspan.services import Problem
from tailspan.services._requests import ServiceRequests

if TYPE_CHECKING:
    from tailspan.http.websocket import WebSocket

__all__ = ["SocketChanges"]


class SocketChanges(ABC):
    """A `ChangeFeed` over a WebSocket. A subclass subscribes, and says which jobs a message is about.

    The first `wait` connects, and reports that any job may have changed. A connection that ends is an error; the agent
    then polls, and opens another feed later.

    Attributes:
        http: Opens the connection, with the service's credentials.
        followed: Ids of the jobs whose changes are reported.
        changed: Ids that the next `wait` reports.
        probe_s: How often to call `probe`, in seconds.
    """

    probe_s: float = math.inf

    def __init__(self, http: ServiceRequests, path: str, *, subprotocol: str = "") -> None:
        """Open nothing yet.

        Args:
            http: As the attribute.
            path: Below the base URL, escaped.
            subprotocol: The protocol of the messages; empty: none.
        """
        self.http = http
        self.followed: set[str] = set()
        self.changed: set[str] = set()
        self._path = path
        self._subprotocol = subprotocol
        self._socket: WebSocket | None = None
        self._probe_at_s = 0.0

    @abstractmethod
    async def subscribe(self, socket: WebSocket) -> None:
        """Do what the service expects before it sends notifications."""

    @abstractmethod
    def read(self, message: Any) -> None:
        """Add the jobs that a message is about to `changed`: followed ones, and new ones.

        Args:
            message: What JSON has.
        """

    async def probe(self) -> None:
        """Add jobs to `changed` that no message reports; by default it adds none. May be cancelled."""
        return

    def follow(self, job_id: str) -> bool:
        """Begin to report a job; see `tailspan.services.ChangeFeed`."""
        self.followed.add(job_id)
        return True

    def leave(self, job_id: str) -> None:
        """Stop reporting a job; see `tailspan.services.ChangeFeed`."""
        self.followed.discard(job_id)

    async def wait(self) -> Collection[str] | None:
        """Return the changed jobs; see `tailspan.services.ChangeFeed`.

        Raises:
            ServiceUnavailableError: There is no connection.
            ProtocolError: A message is not what the service sends.
        """
        if self._socket is None:
            await self._connect()
            return None
        while not self.changed:
            left_s = self._probe_at_s - time.monotonic()
            if left_s <= 0:
                # A server that is too busy for one probe may answer the next one.
                with contextlib.suppress(ServiceError):
                    await self.probe()
                self._probe_at_s = time.monotonic() + self.probe_s
                continue
            with anyio.move_on_after(left_s):
                await self._receive(self._socket)
        found, self.changed = self.changed, set()
        return found

    async def find_problems(self) -> Sequence[Problem]:
        """Return why there are no notifications, if so; for `JobService.find_problems`, with a feed of its own."""
        try:
            await self._connect()
        except ServiceError as error:
            return [Problem(f"change notifications do not work, so jobs are polled: {error}", is_fatal=False)]
        self.close()
        return ()

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()

    async def _connect(self) -> None:
        socket = await self.http.open_socket(self._path, subprotocol=self._subprotocol)
        try:
            with self.http.socket_errors(self._path), anyio.fail_after(self.http.timeout_s):
                await self.subscribe(socket)
        except BaseException:
            socket.close()
            raise
        self._socket = socket
        self._probe_at_s = time.monotonic() + self.probe_s

    async def _receive(self, socket: WebSocket) -> None:
        with self.http.socket_errors(self._path):
            self.read(await socket.receive())
