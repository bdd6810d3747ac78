"""Signals that come while the agent starts: they are obeyed as soon as it can, and never end it as a crash would."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held", "stop_in_good_order"]

_STOP = (signal.SIGTERM, signal.SIGINT)
_ALL = (*_STOP, signal.SIGHUP)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


@contextmanager
def stop_in_good_order() -> Iterator[None]:
    """While nothing was read yet: SIGTERM and Ctrl-C end the process with 0, SIGHUP asks for what is done anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, _stop) for number in _STOP}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Hold signals back until the function that this gives is called, when there is somebody to take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield release
    finally:
        release()
