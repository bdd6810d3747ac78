"""`ReadLimit`: of one service some jobs are read at a time, and who has waited longest is next."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

__all__ = ["ReadLimit"]


# Its number, by which it is known who came first.
_Turn = tuple[int, asyncio.Future[None]]


class ReadLimit:
    """Reads at a time, of all lanes and of one: those that wait for a full lane keep no others waiting.

    Who came first goes first, whatever its lane. With a limit for each lane alone, the lanes of a service that may be
    asked 20 times a second would share that equally, and jobs of the fuller one would have fewer turns.

    Args:
        most: How many read at a time.
        most_a_lane: How many of them of one lane.
    """

    def __init__(self, most: float, most_a_lane: float) -> None:
        self._free = most
        self._most_a_lane = most_a_lane
        self._reading: Counter[object] = Counter()
        self._waiting: dict[object, deque[_Turn]] = {}
        self._numbers = count()

    @asynccontextmanager
    async def of(self, queue: object) -> AsyncIterator[None]:
        """Hold a place among the readers.

        Args:
            queue: Where what is read goes to.
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
        self._let_in()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # its turn had come
                self._leave(queue)
            elif waiting in turns:
                turns.remove(waiting)
            raise

    def _leave(self, queue: object) -> None:
        self._free += 1
        self._reading[queue] -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._free > 0 and (next_queue := self._next()) is not None:
            queue, turns = next_queue
            _, turn = turns.popleft()
            if not turn.cancelled():
                turn.set_result(None)
                self._free -= 1
                self._reading[queue] += 1

    def _next(self) -> tuple[object, deque[_Turn]] | None:
        """Return the lane whose first in line has waited longest, among those that have room for one more reader."""
        waiting = [
            (queue, turns)
            for queue, turns in self._waiting.items()
            if turns and self._reading[queue] < self._most_a_lane
        ]
        return min(waiting, key=lambda item: item[1][0][0], default=None)
