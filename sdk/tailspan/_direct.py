"""Running the verbs' coroutines without an event loop, where they wait for nothing: reads of local files.

Loading asyncio, and starting a thread with a loop, costs several times as much as such a read.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TypeVar, cast

__all__ = ["beside_loop", "checkpoint", "iterate_directly", "run_directly"]

T = TypeVar("T")

_running = threading.local()
"""``directly``: whether this thread runs a coroutine by `run_directly`, perhaps inside of an event loop."""


@types.coroutine
def checkpoint() -> Generator[None, None, None]:
    """Let an event loop run other tasks; without one, go on.

    Source: asyncio takes a bare ``yield`` for that, as its ``sleep(0)`` does.
    """
    yield


async def beside_loop(function: Callable[..., T], *args: object) -> T:
    """Call a function that may take long: in another thread if an event loop runs, so that it is free.

    A caller that is cancelled waits for the end of the function, which may use what the caller then closes.

    Args:
        function: What to call.
        *args: Its arguments.
    """
    if getattr(_running, "directly", False):
        return function(*args)
    import asyncio  # not anyio, which the agent needs for nothing else

    call = asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        call.exception()
        raise cancelled
    return call.result()


def run_directly(awaitable: Awaitable[T]) -> T:
    """Run a coroutine to its end in this thread, and return its result.

    Args:
        awaitable: Suspends at `checkpoint` only.
    """
    steps = cast("Generator[None, None, T]", awaitable.__await__())
    outer = getattr(_running, "directly", False)
    _running.directly = True
    try:
        while True:
            try:
                steps.send(None)
            except StopIteration as end:
                return cast("T", end.value)
    finally:
        _running.directly = outer


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
