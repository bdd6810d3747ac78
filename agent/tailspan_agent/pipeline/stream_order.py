"""`StreamOrder`: the order in which jobs of one stream catch up, oldest first.

Loki rejects lines that are more than an hour behind the newest line of their stream, and the jobs of one pipeline share
a stream. While several of them catch up, a job whose next lines are much newer waits for the older ones.
"""

from __future__ import annotations

import asyncio

__all__ = ["CatchUp", "StreamOrder"]

_WINDOW_NS = 30 * 60 * 1_000_000_000
"""Half of Loki's out-of-order window (``max_chunk_age / 2``, one hour by default): room for what is in flight."""


class StreamOrder:
    """Jobs that are catching up, grouped by Loki stream and ordered by their next timestamp."""

    def __init__(self) -> None:
        self._streams: dict[str, dict[object, int]] = {}
        self._changed = asyncio.Event()

    def join(self, stream: str, member: object, position_ns: int = 0) -> None:
        """Add a member that has lines to relay, or move it to another time.

        Args:
            stream: What Loki stores as one stream.
            member: The job that catches up.
            position_ns: The time of its next lines as far as known, in ns since the epoch. 0, for an unknown time, lets
                all others wait.
        """
        self._streams.setdefault(stream, {})[member] = position_ns
        self._wake()

    def leave(self, stream: str, member: object) -> None:
        """Remove a member that has caught up or gave up for now; leaving twice is fine."""
        members = self._streams.get(stream, {})
        if members.pop(member, None) is not None:
            if not members:
                del self._streams[stream]
            self._wake()

    async def turn(self, stream: str, member: object) -> None:
        """Wait while another member of the stream is so far behind that Loki would reject its lines after ours."""
        while not self._is_next(stream, member):
            await self._changed.wait()

    def _is_next(self, stream: str, member: object) -> bool:
        members = self._streams.get(stream, {})
        position_ns = members.get(member)
        return position_ns is None or position_ns <= min(members.values()) + _WINDOW_NS

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class CatchUp:
    """The place of one job in the order of its stream, until the job has caught up.

    Args:
        order: The order.
        service_name: The service of the job.
        job_name: The job's name. If it is known, the job joins at once, at an unknown time: the order needs the oldest
            job of a pipeline before the first one is read.

    Attributes:
        catching_up: Whether the job has not caught up since it was found.
    """

    __slots__ = ("_order", "_stream", "catching_up")

    def __init__(self, order: StreamOrder, service_name: str, job_name: str) -> None:
        self.catching_up = True
        self._order = order
        self._stream = f"{service_name}/{job_name}"
        if job_name:
            order.join(self._stream, self)

    def move(self, service_name: str, job_name: str) -> None:
        """Leave the stream for that of another job name."""
        self.leave()
        self._stream = f"{service_name}/{job_name}"

    def leave(self) -> None:
        """Let the others of the stream continue; `turn` joins again."""
        self._order.leave(self._stream, self)

    async def turn(self, position_ns: int) -> None:
        """Wait for the job's turn; at once if it has caught up.

        Args:
            position_ns: The time of the job's next lines, in ns since the epoch.
        """
        if self.catching_up:
            self._order.join(self._stream, self, position_ns)
            await self._order.turn(self._stream, self)

    def caught_up(self) -> None:
        """Leave the stream for good."""
        self.catching_up = False
        self.leave()
