"""`ReadLimit`: limits concurrent log reads per service, first come, first served."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import AbstractAsyncContextManager
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

    def of(self, queue: object) -> AbstractAsyncContextManager[None]:
        """Return a context that waits for a place among the reads and holds it.

        Args:
            queue: The queue that takes the lines.
        """
        return _HeldRead(self, queue)

    async def enter(self, queue: object) -> None:
        """Wait for a place among the reads; see `of`."""
        if not self._waiting and self._free > 0 and self._reading[queue] < self._limit_per_queue:
            self._free -= 1
            self._reading[queue] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        waiting = next(self._numbers), turn
        turns = self._waiting.setdefault(queue, deque())
        turns.append(waiting)
        self._admit()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it was admitted just now
                self.leave(queue)
            elif waiting in turns:
                turns.remove(waiting)
                if not turns:
                    del self._waiting[queue]
            raise

    def leave(self, queue: object) -> None:
        """Give the place to the read that has waited longest."""
        self._free += 1
        self._reading[queue] -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._free > 0 and (next_queue := self._next()) is not None:
            queue, turns = next_queue
            _, turn = turns.popleft()
            if not turns:
                del self._waiting[queue]
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


class _HeldRead(AbstractAsyncContextManager[None]):
    """A place among the reads; a class, because each read of each job takes one."""

    __slots__ = ("_limit", "_queue")

    def __init__(self, limit: ReadLimit, queue: object) -> None:
        self._limit = limit
        self._queue = queue

    async def __aenter__(self) -> None:
        await self._limit.enter(self._queue)

    async def __aexit__(self, *_: object) -> None:
        self._limit.leave(self._queue)
