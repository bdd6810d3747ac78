r"""A pseudo-terminal for the output of a job whose caller sits at a terminal.

Only standard output and standard error become the pseudo-terminal. Standard input, session and process group stay the
caller's: so the real terminal itself sends Ctrl-C, Ctrl-\ and Ctrl-Z to the job, once, and its input stays the job's.

Standard library only, and light: `tailspan run` imports this before it starts the command.
"""

from __future__ import annotations

import errno
import fcntl
import os
import termios

__all__ = ["ModeMirror", "copy_size", "foreground_group", "is_terminal", "open_like"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_IFLAG, _OFLAG, _LFLAG, _CC = 0, 1, 3, 6


def is_terminal(fd: int) -> bool:
    """Return whether a file descriptor is a terminal; False for one that is closed."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def open_like(fd: int) -> tuple[int, int] | None:
    """Open a pseudo-terminal with the settings and the size of a terminal.

    Its output is not processed, because the real terminal processes it: a newline stays a newline.

    Args:
        fd: The terminal.

    Returns:
        The end to read from and the end for the job; None where the system has no pseudo-terminal left.
    """
    try:
        master_fd, slave_fd = os.openpty()
    except OSError:
        return None
    try:
        settings = termios.tcgetattr(fd)
        settings[_OFLAG] &= ~termios.OPOST
        termios.tcsetattr(slave_fd, termios.TCSANOW, settings)
        copy_size(fd, master_fd)
    except (OSError, termios.error):
        os.close(master_fd)
        os.close(slave_fd)
        return None
    return master_fd, slave_fd


class ModeMirror:
    """Gives the real terminal the modes that a job sets on its pseudo-terminal.

    Programs such as `less` and those with curses ask for single keys through standard output or standard error, but
    the keys come from the real terminal. Only what a job changes is copied: what it sets through standard input stays.
    """

    def __init__(self, pty_fd: int, terminal_fd: int, runner_pid: int) -> None:
        """Take the present modes of the pseudo-terminal as the beginning.

        Args:
            pty_fd: The end of the pseudo-terminal to read from.
            terminal_fd: The real terminal.
            runner_pid: A process in the job's process group.
        """
        self._pty_fd = pty_fd
        self._terminal_fd = terminal_fd
        self._runner_pid = runner_pid
        self._known = _modes(pty_fd)

    def copy(self) -> None:
        """Copy what has changed, while the job is in the foreground of its terminal."""
        before, now = self._known, _modes(self._pty_fd)
        if now == before or now is None:
            return
        self._known = now
        if now[_OFLAG] & termios.OPOST:
            # The real terminal processes the output, and the log has it unprocessed.
            now[_OFLAG] &= ~termios.OPOST
            _set_modes(self._pty_fd, now)
        real = _modes(self._terminal_fd)
        if before is None or real is None or not self._is_in_foreground():
            return
        for place in (_IFLAG, _OFLAG, _LFLAG):
            changed = before[place] ^ now[place]
            if place == _OFLAG:
                changed &= ~termios.OPOST
            real[place] = real[place] & ~changed | now[place] & changed
        for number, (old, new) in enumerate(zip(before[_CC], now[_CC], strict=True)):
            if old != new:
                real[_CC][number] = new
        _set_modes(self._terminal_fd, real)

    def _is_in_foreground(self) -> bool:
        # A shell that has stopped the job sets modes of its own. The kernel answers TIOCGPGRP only to its session.
        try:
            with open(f"/proc/{self._runner_pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return False
        return fields[2] == fields[5]


def _modes(fd: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(fd)
    except (OSError, termios.error):
        return None


def _set_modes(fd: int, modes: list[Any]) -> None:
    try:
        termios.tcsetattr(fd, termios.TCSANOW, modes)
    except (OSError, termios.error):
        # The terminal is gone.
        pass


def copy_size(from_fd: int, to_fd: int) -> bool:
    """Give one terminal the size of another; return whether it changed."""
    try:
        size = fcntl.ioctl(from_fd, termios.TIOCGWINSZ, bytes(8))
        if size == fcntl.ioctl(to_fd, termios.TIOCGWINSZ, bytes(8)):
            return False
        fcntl.ioctl(to_fd, termios.TIOCSWINSZ, size)
    except OSError:
        return False
    return True


def foreground_group() -> int | None:
    """Return the process group in the foreground of this session's terminal; None where there is no terminal."""
    for fd in (0, 1, 2):
        try:
            return os.tcgetpgrp(fd)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EBADF):
                return None
    return None
