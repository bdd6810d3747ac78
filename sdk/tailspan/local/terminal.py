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

__all__ = ["copy_size", "foreground_group", "is_terminal", "open_like"]

_OFLAG = 1


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
