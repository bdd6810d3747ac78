"""Waiting for tasks, and cancelling them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Flag", "Patience", "Signal", "cancelled"]

_log = logging.getLogger(__name__)


class Flag:
    """An asyncio.Event at a tenth of its size: each of ten thousand followed jobs has two."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, *, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def set(self) -> None:
        """Set the flag and wake all waiting tasks."""
        self._is_set = True
        for waiter in self._waiters:
            _wake(waiter)

    def clear(self) -> None:
        """Clear the flag: from now on, `wait` waits."""
        self._is_set = False

    async def wait(self, patience: Patience | None = None) -> None:
        """Wait until the flag is set. It may be cleared again before the waiting task runs.

        Args:
            patience: Ends the wait; None: it has no limit.
        """
        if self._is_set:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters = *self._waiters, waiter
        if patience is not None:
            patience.end(waiter)
        try:
            await waiter
        finally:
            self._waiters = tuple([other for other in self._waiters if other is not waiter])


class Signal:
    """Notify tasks of changes. An asyncio.Condition without its lock: one loop needs none."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Wake all waiting tasks, in the order in which they came: what they wait for may hold now."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            _wake(waiter)

    async def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds; it is checked at once, and after each notification."""
        while not holds():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter


class Patience:
    """Ends waits that last too long. They share a timer: one for each costs more than most waits.

    Args:
        longest_s: How long each may last, in seconds.
    """

    __slots__ = ("_longest_s", "_timer", "_waits")

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._waits: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def end(self, waiter: asyncio.Future[None]) -> None:
        """Wake a task once it has waited long enough."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._longest_s
        self._waits.append((due_s, waiter))
        if self._timer is None:
            self._timer = loop.call_at(due_s, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        waits, now_s = self._waits, loop.time()
        while waits and (waits[0][0] <= now_s or waits[0][1].done()):
            _wake(waits.popleft()[1])
        if waits:
            self._timer = loop.call_at(waits[0][0], self._on_timer, loop)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end. Log their errors, if any: the caller has more to close."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a cancelled task had failed before", exc_info=error)
