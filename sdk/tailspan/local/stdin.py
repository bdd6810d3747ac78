"""A job's standard input: this process's own, or what is typed at this terminal."""

from __future__ import annotations

import os
import select
from types import TracebackType
from typing import Self

__all__ = ["Stdin", "inherited_stdin"]

_FOREGROUND_CHECK_MS = 500
_READ_BYTES = 64 * 1024


def inherited_stdin() -> int | None:
    """Return standard input for a job in the background: not a terminal, which belongs to the foreground."""
    try:
        return None if os.isatty(0) or os.fstat(0) is None else 0
    except OSError:
        # Closed, as daemons do.
        return None


class Stdin:
    """Standard input of a job in the foreground.

    A file or a pipe is simply handed on. A terminal cannot be: the job is not in its session. So what is typed is
    pumped through a pipe, while this process is in the terminal's foreground.

    Attributes:
        for_job: File descriptor to start the job with; None: nothing to read.
    """

    def __init__(self) -> None:
        self._write_fd: int | None = None
        self._pending = b""
        self.for_job = inherited_stdin()
        if self.for_job is None and os.isatty(0):
            self.for_job, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.hand_over()
        self._close()

    def hand_over(self) -> None:
        """Leave the read end to the job alone, so that writing fails once nobody reads."""
        if self._write_fd is not None and self.for_job:
            os.close(self.for_job)
            self.for_job = None

    def register(self, poller: select.poll) -> int | None:
        """Register what to wait for; return for how long at most, in ms."""
        if self._write_fd is None:
            return None
        poller.register(self._write_fd, select.POLLOUT if self._pending else 0)
        if self._pending:
            return None
        if os.tcgetpgrp(0) != os.getpgrp():
            # Reading now would stop this process; it may be brought to the foreground later.
            return _FOREGROUND_CHECK_MS
        poller.register(0, select.POLLIN)
        return None

    def pump(self, ready_fd: int) -> None:
        """Move on what was typed."""
        if ready_fd == self._write_fd and not self._pending:
            # Nothing was waited for but an error: the job has closed its input.
            self._close()
            return
        try:
            if ready_fd == 0:
                self._pending = os.read(0, _READ_BYTES)
                if not self._pending:
                    self._close()
            if self._write_fd is not None:
                self._pending = self._pending[os.write(self._write_fd, self._pending) :]
        except BlockingIOError:
            pass
        except OSError:
            # The job has closed its input, or the terminal is gone.
            self._close()

    def _close(self) -> None:
        if self._write_fd is not None:
            os.close(self._write_fd)
            self._write_fd = None
