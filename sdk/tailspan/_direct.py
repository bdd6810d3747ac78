"""Running the verbs' coroutines without an event loop, where they wait for nothing: reads of local files.

Loading asyncio and anyio, and starting a thread with a loop, costs several times as much as such a read.
"""

from __future__ import annotations

import types
from collections.abc import AsyncGenerator, Awaitable, Generator
from typing import TypeVar, cast

__all__ = ["checkpoint", "iterate_directly", "run_directly"]

T = TypeVar("T")


@types.coroutine
def checkpoint() -> Generator[None, None, None]:
    """Let an event loop run other tasks; without one, go on.

    Source: asyncio takes a bare ``yield`` for that, as its ``sleep(0)`` does.
    """
    yield


def run_directly(awaitable: Awaitable[T]) -> T:
    """Run a coroutine to its end in this thread, and return its result.

    Args:
        awaitable: Suspends at `checkpoint` only.
    """
    steps = cast("Generator[None, None, T]", awaitable.__await__())
    while True:
        try:
            steps.send(None)
        except StopIteration as end:
            return cast("T", end.value)


def iterate_directly(items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield the items of an async generator, which ends with this one.

    Args:
        items: Suspends at `checkpoint` only.
    """
    try:
        while True:
            try:
                item = run_directly(anext(items))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run_directly(items.aclose())
