"""Waiting for tasks, and cancelling them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

__all__ = ["Flag", "Signal", "cancelled"]

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

    async def wait(self, longest_s: float | None = None) -> None:
        """Wait until the flag is set. It may be cleared again before the waiting task runs.

        Args:
            longest_s: How long to wait for it, in seconds; None: without limit.
        """
        if self._is_set:
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters = *self._waiters, waiter
        # Not `asyncio.timeout`, which costs each job that ends three times as much.
        timer = None if longest_s is None else loop.call_later(longest_s, _wake, waiter)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
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
