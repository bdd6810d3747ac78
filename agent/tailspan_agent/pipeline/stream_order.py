"""Oldest first: the order in which jobs of one stream catch up.

Loki refuses lines that are more than an hour behind the newest of their stream, and the jobs of one pipeline share a
stream. So while several of them have a backlog, one whose next lines are much newer waits for those that are behind.
"""

from __future__ import annotations

import asyncio

__all__ = ["StreamOrder"]

_WINDOW_NS = 30 * 60 * 1_000_000_000
"""Half of Loki's out-of-order window (``max_chunk_age / 2``, one hour by default): room for what is in flight."""


class StreamOrder:
    """Who is behind, by stream. A member joins with the time that it is at, and leaves when it has caught up."""

    def __init__(self) -> None:
        self._streams: dict[str, dict[object, int]] = {}
        self._changed = asyncio.Event()

    def join(self, stream: str, member: object, position_ns: int = 0) -> None:
        """Say that a member has lines to relay from this time on; joining again moves it there.

        Args:
            stream: What the store makes one stream of.
            member: Who is behind.
            position_ns: The time of its next lines, as well as it is known, in ns since the epoch. 0, while it is not
                known, lets all others wait.
        """
        self._streams.setdefault(stream, {})[member] = position_ns
        self._wake()

    def leave(self, stream: str, member: object) -> None:
        """Say that a member has caught up, or gave up for now; leaving twice is fine."""
        members = self._streams.get(stream, {})
        if members.pop(member, None) is not None:
            if not members:
                del self._streams[stream]
            self._wake()

    async def turn(self, stream: str, member: object) -> None:
        """Wait until nobody in the stream is so far behind that this member's lines would lock it out."""
        while not self._is_next(stream, member):
            await self._changed.wait()

    def _is_next(self, stream: str, member: object) -> bool:
        members = self._streams.get(stream, {})
        position_ns = members.get(member)
        return position_ns is None or position_ns <= min(members.values()) + _WINDOW_NS

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
