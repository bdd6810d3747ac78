"""Reading `log.idx`, which may be torn at its end, damaged in its middle, or not there at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tailspan.errors import ProtocolError
from tailspan.local.index import ENTRY_BYTES, HEADER, HEADER_BYTES, NOTHING, Entry, unpack_entry

__all__ = ["NO_DIRECTORY", "IndexFile", "open_directory", "open_file", "read_at"]

NO_DIRECTORY = -1
"""Instead of the descriptor of a directory that is gone, or that is a link."""

_ENTRIES_PER_READ = 256
# O_PATH: searching a directory needs no permission to list it.
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


def open_directory(path: Path | str) -> int:
    """Return a descriptor of a job's directory, for `open_file`; neither it nor its parent may be a link.

    A store may belong to another user than its reader. As long as a reader holds the descriptor, no change of names
    leads it elsewhere.

    Raises:
        OSError: There is no such directory; ``ENOTDIR`` or ``ELOOP`` for a link.
    """
    parent, _, name = os.fspath(path).rpartition("/")
    parent_fd = os.open(parent or ".", _DIRECTORY)
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent_fd)
    finally:
        os.close(parent_fd)


def open_file(path: Path | str, dir_fd: int | None = None) -> int | None:
    """Return a file descriptor for reading, or None when there is no such file.

    A link or a FIFO under its name does not count: a reader with more rights than the job must not be led elsewhere.

    Args:
        path: The file; with ``dir_fd`` its name.
        dir_fd: From `open_directory`; `NO_DIRECTORY` has no files.
    """
    if dir_fd == NO_DIRECTORY:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def read_at(fd: int | None, offset: int, size: int) -> bytes:
    """Return the bytes at an offset: fewer than asked for only at the end of the file."""
    parts: list[bytes] = []
    while fd is not None and size and (part := os.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


class IndexFile:
    """The entries that the index has now.

    The checksum of each entry says whether it is one; a header that was lost is not missed.

    Attributes:
        count: How many entries there are up to the last that is whole. Some before it may be damaged.
    """

    def __init__(self, path: Path, dir_fd: int | None = None) -> None:
        """Open an index; one that is missing has no entries.

        Args:
            path: Where it is.
            dir_fd: Its directory, if that is open.

        Raises:
            ProtocolError: It was written by a newer version.
        """
        self._fd = open_file(path if dir_fd is None else path.name, dir_fd)
        self.count = 0
        try:
            header = read_at(self._fd, 0, HEADER_BYTES)
            if len(header) == HEADER_BYTES and header[:8] == HEADER[:8] and header != HEADER:
                raise ProtocolError(f"{path} was written by a newer version of Tailspan; upgrade this one")
            if self._fd is not None:
                self.count = max(0, os.fstat(self._fd).st_size - HEADER_BYTES) // ENTRY_BYTES
                while self.count and self.entry(self.count - 1) is None:
                    self.count -= 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def entry(self, number: int) -> Entry | None:
        """Return an entry by its number, from 0; None when it is damaged."""
        return unpack_entry(read_at(self._fd, HEADER_BYTES + number * ENTRY_BYTES, ENTRY_BYTES))

    def whole_at(self, number: int) -> tuple[int, Entry]:
        """Return the first entry from a number on that is not damaged, and its number."""
        for candidate, entry in enumerate(self.entries(number), number):
            if entry is not None:
                return candidate, entry
        raise ProtocolError("the index of the log has been changed while it was read")

    def whole_before(self, number: int) -> Entry:
        """Return the last entry before a number that is not damaged; `NOTHING` without one."""
        for candidate in range(number - 1, -1, -1):
            if entry := self.entry(candidate):
                return entry
        return NOTHING

    def last(self) -> Entry | None:
        """Return the last entry; None for an empty index."""
        return self.whole_at(self.count - 1)[1] if self.count else None

    def first_where(self, holds: Callable[[Entry], bool]) -> int:
        """Return the number of the first entry for which something holds, by bisection; `count` if for none.

        Args:
            holds: Once true, it is true for all later entries.
        """
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            number, entry = self.whole_at(middle)
            if holds(entry):
                high = middle
            else:
                low = number + 1
        return low

    def entries(self, number: int) -> Iterator[Entry | None]:
        """Yield the entries from a number on; None for a damaged one."""
        while number < self.count:
            wanted = min(self.count - number, _ENTRIES_PER_READ)
            raw = read_at(self._fd, HEADER_BYTES + number * ENTRY_BYTES, wanted * ENTRY_BYTES)
            for position in range(0, wanted * ENTRY_BYTES, ENTRY_BYTES):
                yield unpack_entry(raw[position : position + ENTRY_BYTES])
            number += wanted
