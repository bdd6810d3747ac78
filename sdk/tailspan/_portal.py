"""`Portal`: an event loop in a background thread, so that plain functions can use async code (anyio has the name).

Why not ``asyncio.run`` per call: a notebook already runs a loop in this thread, and a loop per call would lose the
kept-alive connections (a status request on loopback takes 1 ms with them, over 200 ms with a new client each time).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import anyio

__all__ = ["Portal"]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_CANCEL_CHECK_S = 0.1
_CLOSE_S = 2.0


class Portal(Generic[R]):
    """A background event loop with one resource; both are made at first use, and again after a fork or a close."""

    def __init__(self, resource: Callable[[], AbstractAsyncContextManager[R]]) -> None:
        """Start nothing yet.

        Args:
            resource: Makes the context manager that is entered in the background loop and exited when that stops.
        """
        self._resource = resource
        self._lock = threading.Lock()
        self._running: _Running[R] | None = None
        self._before_fork: list[object] = []
        _portals.add(self)

    def call(
        self, function: Callable[Concatenate[R, P], Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``function(resource, ...)`` in the background loop and return its result.

        Ctrl-C returns at once: it cancels the call and does not wait for it.
        """
        running = self._start()
        return _result(lambda: self._begin(running, function(running.resource, *args, **kwargs)))

    def iterate(
        self, function: Callable[Concatenate[R, P], AsyncGenerator[T, None]], *args: P.args, **kwargs: P.kwargs
    ) -> Generator[T, None, None]:
        """Run the async generator ``function(resource, ...)`` in the background loop and yield its items here.

        It is never more than one item ahead, and ends when this generator is closed. All of it runs in one task, so
        that it may hold cancel scopes.
        """
        running = self._start()
        send, receive = anyio.create_memory_object_stream[T](0)

        async def pump() -> None:
            async with send, receive, aclosing(function(running.resource, *args, **kwargs)) as items:
                async for item in items:
                    await send.send(item)

        pumping = self._begin(running, pump())
        try:
            while True:
                try:
                    item = _result(lambda: self._begin(running, receive.receive()))
                except (anyio.EndOfStream, anyio.ClosedResourceError):
                    break
                yield item
            _result(lambda: pumping)
        finally:
            pumping.cancel()

    def close(self) -> None:
        """Cancel running calls, exit the resource and end the thread. The next call starts them again."""
        with self._lock:
            running, self._running = self._running, None
            if running is not None:
                running.loop.call_soon_threadsafe(running.stop.set)
        if running is not None:
            running.thread.join(_CLOSE_S)

    def _start(self) -> _Running[R]:
        with self._lock:
            if self._running is None:
                started: concurrent.futures.Future[_Running[R]] = concurrent.futures.Future()
                threading.Thread(target=self._serve, args=(started,), name="tailspan", daemon=True).start()
                self._running = started.result()
            return self._running

    def _begin(self, running: _Running[R], coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        # One message to the loop; anyio's portal waits for a second one, a quarter of a short request's time.
        try:
            if threading.current_thread() is running.thread:
                raise RuntimeError("a job function was called in the event loop thread that must answer it")
            # The loop takes messages in order: closing cancels every call that began before it.
            with self._lock:
                if self._running is not running:
                    raise RuntimeError("the client was closed during the call")
                return asyncio.run_coroutine_threadsafe(coroutine, running.loop)
        except BaseException:
            # Ctrl-C too: Python warns about a coroutine that was never awaited.
            with contextlib.suppress(RuntimeError, ValueError):
                coroutine.close()
            raise

    def _serve(self, started: concurrent.futures.Future[_Running[R]]) -> None:
        async def main() -> None:
            async with self._resource() as resource:
                stop = asyncio.Event()
                started.set_result(_Running(asyncio.get_running_loop(), resource, threading.current_thread(), stop))
                await stop.wait()
                tasks = asyncio.all_tasks() - {asyncio.current_task()}
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        try:
            anyio.run(main)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def _after_fork(self) -> None:
        # The child has no such thread. Keep its loop: closing it would remove sockets from the epoll set that the child
        # shares with the parent.
        self._before_fork.append(self._running)
        self._running = None
        self._lock = threading.Lock()


# One hook for all: a hook cannot be removed, and would keep the portals of closed clients.
_portals: weakref.WeakSet[Portal[Any]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for portal in list(_portals):
        portal._after_fork()


def _close_all() -> None:
    for portal in list(_portals):
        portal.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)


@dataclass(frozen=True)
class _Running(Generic[R]):
    loop: asyncio.AbstractEventLoop
    resource: R
    thread: threading.Thread
    stop: asyncio.Event


def _result(start: Callable[[], concurrent.futures.Future[T]]) -> T:
    # Under asyncio.run, Ctrl-C does not raise here: it cancels the main task, which this function blocks. Count its
    # cancellations before anything starts: Ctrl-C may come at any moment from then on.
    task = _task_of_this_thread()
    requests = task.cancelling() if task is not None else 0
    future = start()
    try:
        if task is None:
            return future.result()
        while not concurrent.futures.wait([future], _CANCEL_CHECK_S).done:
            if task.cancelling() > requests:
                raise asyncio.CancelledError
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _task_of_this_thread() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
