"""Keys for programs that read them from their output's terminal: `less` and `more` do.

A job's standard input stays the real terminal, so that nothing is read ahead of it. A program that reads from its
standard output or standard error instead would wait for ever at the pseudo-terminal. The kernel shows what a process
waits for (``/proc/PID/syscall``): a key is passed on only while a process of the job waits for it there.

The supervisor imports this for a job at a terminal: standard library only.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios

from tailspan.local.process_tree import live_descendants

__all__ = ["TerminalKeys"]

_GET_NUMBER = 0x80045430  # TIOCGPTN, which `termios` does not have
_POLLFD = struct.Struct("=ihh")
_MOST_POLLED = 64
_READS = {"x86_64": (0,), "aarch64": (63,), "riscv64": (63,)}
_POLLS = {"x86_64": (7, 271), "aarch64": (73,), "riscv64": (73,)}
_LFLAG = 3


class TerminalKeys:
    """Passes keys of the real terminal on to a pseudo-terminal from which a process of the job reads them.

    Attributes:
        terminal_fd: The real terminal.
    """

    def __init__(self, pty_fd: int, terminal_fd: int) -> None:
        """Prepare for one pseudo-terminal.

        Args:
            pty_fd: Its end to read from.
            terminal_fd: The real terminal.
        """
        self.terminal_fd = terminal_fd
        self._pty_fd = pty_fd
        self._path = _path_of(pty_fd)
        machine = os.uname().machine
        self._reads, self._polls = _READS.get(machine, ()), _POLLS.get(machine, ())

    def are_awaited(self) -> bool:
        """Return whether a process of the job waits for a single key at the pseudo-terminal."""
        if self._path is None or not _is_readable(self.terminal_fd):
            return False
        try:
            if termios.tcgetattr(self._pty_fd)[_LFLAG] & termios.ICANON:
                # Whole lines come from standard input.
                return False
        except (OSError, termios.error):
            return False
        return any(self._is_reading(pid) for pid in live_descendants(os.getpid()))

    def pass_on(self) -> bool:
        """Pass one key on: what is typed after it may be for another program. Return False at the end of input."""
        try:
            key = os.read(self.terminal_fd, 1)
            return bool(key) and os.write(self._pty_fd, key) > 0
        except OSError:
            return False

    def _is_reading(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/syscall", "rb") as file:
                fields = file.read().split()
            number, first, second = int(fields[0]), int(fields[1], 16), int(fields[2], 16)
            if number in self._reads:
                fds = [first]
            elif number in self._polls:
                fds = _polled(pid, first, min(second, _MOST_POLLED))
            else:
                return False
            return any(os.readlink(f"/proc/{pid}/fd/{fd}") == self._path for fd in fds)
        except (OSError, ValueError, IndexError):
            # It runs, has ended, or is another user's.
            return False


def _polled(pid: int, address: int, count: int) -> list[int]:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        data = memory.read(count * _POLLFD.size)
    return [fd for fd, events, _ in _POLLFD.iter_unpack(data) if events & select.POLLIN]


def _path_of(pty_fd: int) -> str | None:
    try:
        (number,) = struct.unpack("I", fcntl.ioctl(pty_fd, _GET_NUMBER, bytes(4)))
    except OSError:
        return None
    return f"/dev/pts/{number}"


def _is_readable(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    except OSError:
        return False
