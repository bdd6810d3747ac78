"""`ReadLimit`: limits concurrent log reads per service, first come, first served."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

__all__ = ["ReadLimit"]


# The number orders the waiting reads of all queues.
_Turn = tuple[int, asyncio.Future[None]]


class ReadLimit:
    """Limits the reads of all queues together and of each queue; a full queue does not block the reads of others.

    Reads are admitted in the order in which they came, whatever their queue. With a limit per queue alone, the queues
    of a service that takes 20 requests a second would share them equally, and jobs of a longer queue would get fewer.

    Args:
        limit: The number of reads at a time.
        limit_per_queue: The number of reads at a time of one queue.
    """

    def __init__(self, limit: float, limit_per_queue: float) -> None:
        self._free = limit
        self._limit_per_queue = limit_per_queue
        self._reading: Counter[object] = Counter()
        self._waiting: dict[object, deque[_Turn]] = {}
        self._numbers = count()

    @asynccontextmanager
    async def of(self, queue: object) -> AsyncIterator[None]:
        """Wait for a place among the reads and hold it.

        Args:
            queue: The queue that takes the lines.
        """
        await self._enter(queue)
        try:
            yield
        finally:
            self._leave(queue)

    async def _enter(self, queue: object) -> None:
        turn = asyncio.get_running_loop().create_future()
        waiting = next(self._numbers), turn
        turns = self._waiting.setdefault(queue, deque())
        turns.append(waiting)
        self._admit()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it was admitted just now
                self._leave(queue)
            elif waiting in turns:
                turns.remove(waiting)
            raise

    def _leave(self, queue: object) -> None:
        self._free += 1
        self._reading[queue] -= 1
        self._admit()

    def _admit(self) -> None:
        while self._free > 0 and (next_queue := self._next()) is not None:
            queue, turns = next_queue
            _, turn = turns.popleft()
            if not turn.cancelled():
                turn.set_result(None)
                self._free -= 1
                self._reading[queue] += 1

    def _next(self) -> tuple[object, deque[_Turn]] | None:
        """Return the queue whose first read has waited longest, among queues below their limit."""
        waiting = [
            (queue, turns)
            for queue, turns in self._waiting.items()
            if turns and self._reading[queue] < self._limit_per_queue
        ]
        return min(waiting, key=lambda item: item[1][0][0], default=None)
