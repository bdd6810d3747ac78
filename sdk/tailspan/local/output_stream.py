"""One output stream of a job: where it is read, its unfinished line, and where it is relayed.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select

from tailspan.local.capture import LineBuffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from codecs import IncrementalDecoder

__all__ = ["READ_BYTES", "OutputStream"]

READ_BYTES = 256 * 1024
"""How much is read at once; pipes are made that large where the system allows it."""


class OutputStream:
    """One output stream of the job: its pipe or pseudo-terminal, its unfinished line, and where it is relayed.

    Attributes:
        number: 1 stdout, 2 stderr, 0 both.
        fd: The end to read from.
        lines: Output that does not make a line yet.
        capacity: How many bytes the pipe holds.
        failure: The errno of a relay that failed, because the reader is gone or its disk is full; 0: none did.
        is_terminal: Whether it is a pseudo-terminal.
    """

    def __init__(
        self, number: int, fd: int, relay_fd: int | None, *, is_terminal: bool = False, encoding: str | None = None
    ) -> None:
        """Take over the end to read from, and the file descriptor to relay to.

        Args:
            number: 1 stdout, 2 stderr, 0 both.
            fd: The end to read from.
            relay_fd: The caller's own output; None: nowhere.
            is_terminal: Whether `fd` is a pseudo-terminal.
            encoding: The codec of the output; None: its bytes are kept as they are.
        """
        self.number = number
        self.fd = fd
        self.lines = LineBuffer()
        self.is_terminal = is_terminal
        self.capacity = _enlarge(fd)
        self.failure = 0
        self._relay_fd = relay_fd
        self._decoder = None if encoding is None else _decoder(encoding)
        os.set_blocking(fd, False)

    @property
    def relay_fd(self) -> int | None:
        """The caller's own output; None: nothing is relayed, or not any more."""
        return self._relay_fd

    def relay(self, data: bytearray, size: int) -> None:
        """Pass output on to the caller's own output at once."""
        if self._relay_fd is None:
            return
        with memoryview(data) as whole, whole[:size] as view:
            done = 0
            while done < size and self._relay_fd is not None:
                try:
                    done += os.write(self._relay_fd, view[done:])
                except BlockingIOError:
                    poller = select.poll()
                    poller.register(self._relay_fd, select.POLLOUT)
                    poller.poll()
                except OSError as error:
                    if self._relay_fd is not None:
                        self._fail(error.errno or errno.EIO)

    def text_of(self, data: bytearray, size: int) -> tuple[bytes | bytearray, int]:
        """Return output as it is captured, and its size: as UTF-8 where its encoding is known to be another."""
        if self._decoder is None:
            return data, size
        text = self._decoder.decode(bytes(data[:size]), final=not size).encode("utf-8", "replace")
        return text, len(text)

    def stop_relaying(self) -> None:
        """Let go of the caller's output, also within a signal handler while a write to it is blocked."""
        if self._relay_fd is not None:
            # The number stays taken: the write that goes on after the handler must not find another file there.
            null_fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_fd, self._relay_fd, inheritable=False)
            os.close(null_fd)
            self._relay_fd = None

    def _fail(self, number: int) -> None:
        # A terminal that is gone has sent SIGHUP; the job that ignores it goes on, as it would without us.
        if not (self.is_terminal and number == errno.EIO):
            self.failure = number
        self.stop_relaying()


def _decoder(encoding: str) -> IncrementalDecoder:
    import codecs

    return codecs.getincrementaldecoder(encoding)("replace")


def _enlarge(fd: int) -> int:
    """Make room in a pipe, so that a job need not wait for us; return how many bytes it holds."""
    try:
        return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, READ_BYTES)
    except (AttributeError, OSError):
        # Not Linux, not a pipe, or this user's pipes are at their limit: at most what a pipe has by default.
        return 64 * 1024
