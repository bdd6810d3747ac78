"""One output stream of a job: its pipe, its unfinished line, and where it is shown.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import fcntl
import os
import select

from tailspan.local.capture import LineBuffer

__all__ = ["READ_BYTES", "OutputStream"]

READ_BYTES = 256 * 1024
"""How much is read at once; pipes are made that large where the system allows it."""


class OutputStream:
    """One output stream of the job: its pipe, its unfinished line, and where it is shown.

    Attributes:
        number: 1 stdout, 2 stderr.
        fd: Read end of its pipe.
        lines: What was read and does not make a line yet.
        capacity: How many bytes the pipe holds.
    """

    def __init__(self, number: int, fd: int, show_fd: int | None) -> None:
        """Take over a pipe, and the file descriptor of a terminal to show its output on."""
        self.number = number
        self.fd = fd
        self.lines = LineBuffer()
        self.capacity = _enlarge(fd)
        self._show_fd = show_fd
        os.set_blocking(fd, False)

    def show(self, data: bytearray, size: int) -> None:
        """Show output at once to the person who typed the command; a terminal that is gone ends only the showing."""
        view = memoryview(data)[:size]
        while view and self._show_fd is not None:
            try:
                view = view[os.write(self._show_fd, view) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self._show_fd, select.POLLOUT)
                poller.poll()
            except OSError:
                self.stop_showing()

    def stop_showing(self) -> None:
        """Let go of the terminal."""
        if self._show_fd is not None:
            os.close(self._show_fd)
            self._show_fd = None


def _enlarge(fd: int) -> int:
    """Make room in a pipe, so that a job need not wait for us; return how many bytes it holds."""
    try:
        return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, READ_BYTES)
    except (AttributeError, OSError):
        # Not Linux, or this user's pipes are at their limit: at most what a pipe has by default.
        return 64 * 1024
