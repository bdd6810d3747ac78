"""The live state line: what a job is doing, rewritten in place on the terminal's last line."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tailspan._durations import duration_text
from tailspan.logs.clean import printable
from tailspan.logs.printing import is_terminal, progress_text
from tailspan.models import JobStatus

__all__ = ["StateLine", "state_text"]

_TICK_S = 1.0
_ERASE = "\r\x1b[2K"


def state_text(status: JobStatus, seen_s: float) -> str:
    """Return the line for a status: state, progress, time and name.

    Args:
        status: The newest status.
        seen_s: Seconds since the command began; shown where the job reports no start.
    """
    parts = [str(status.state)]
    if progress := progress_text(status):
        parts.append(progress)
    duration = status.duration
    parts.append(duration_text(seen_s if duration is None else duration.total_seconds()))
    parts.append(status.job_name)
    if status.stale:
        parts.append("(the service does not answer)")
    return printable(" ".join("  ".join(parts).split("\n")), colours=False)


class StateLine:
    """Shows the line on standard error if that is a terminal.

    A thread redraws it, so that the time advances between two requests.
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self._shown = is_terminal(sys.stderr)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._status: JobStatus | None = None
        self._ticks = 0
        self._thread = threading.Thread(target=self._tick, name="tailspan-state-line", daemon=True)

    def __enter__(self) -> Self:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        with self.paused():
            pass

    def show(self, status: JobStatus) -> None:
        """Show this status from now on."""
        with self._lock:
            self._status = status
            self._draw()

    def hide(self) -> None:
        """Show nothing until the next `show`: the last line of the terminal is in use."""
        with self.paused():
            self._status = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the line away while something else is printed; the next `show` or tick brings it back."""
        with self._lock:
            if self._shown and self._status is not None:
                sys.stderr.write(_ERASE)
                sys.stderr.flush()
            yield

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_S):
            with self._lock:
                self._ticks += 1
                if not self._stopped.is_set():
                    self._draw()

    def _draw(self) -> None:
        if self._shown and self._status is not None:
            width = shutil.get_terminal_size().columns - 1
            text = state_text(self._status, self._ticks * _TICK_S)
            sys.stderr.write(_ERASE + text[:width])
            sys.stderr.flush()
