"""Signals that arrive while the agent starts: handled as soon as possible, never as a crash."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["exit_on_stop_signals", "hold_signals"]

_STOP = (signal.SIGTERM, signal.SIGINT)
_ALL = (*_STOP, signal.SIGHUP)


@contextmanager
def exit_on_stop_signals() -> Iterator[None]:
    """Exit with 0 on SIGTERM and Ctrl-C, and ignore SIGHUP, before anything was read.

    A reload at this time is pointless: the configuration is about to be loaded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        sys.exit(0)

    before = {number: signal.signal(number, stop) for number in _STOP}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stopped:
            # Python drops an exception that is raised in a destructor or in some callbacks of C code.
            sys.exit(0)


@contextmanager
def hold_signals() -> Iterator[Callable[[], None]]:
    """Block signals until the yielded function is called, which is once their handlers are set."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield release
    finally:
        release()
