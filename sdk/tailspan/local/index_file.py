"""Reading `log.idx`, which may be torn at its end, damaged in its middle, or not there at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tailspan.errors import ProtocolError
from tailspan.local.index import ENTRY_BYTES, HEADER, HEADER_BYTES, NOTHING, Entry, unpack_entry

__all__ = [
    "NO_DIRECTORY",
    "IndexFile",
    "data_end",
    "data_start",
    "open_directory",
    "open_file",
    "open_sized",
    "read_at",
]

NO_DIRECTORY = -1
"""Instead of the descriptor of a directory that is gone, or that is a link."""

_ENTRIES_PER_READ = 256
# All that a reader needs who follows a job: one read.
_TAIL_ENTRIES = 32
_START_BYTES = HEADER_BYTES + _TAIL_ENTRIES * ENTRY_BYTES
# A power failure damages what was written within seconds. More than this was never an index: 8 MiB, a quarter of a
# second. A hole in the file (`truncate -s 1T`) is skipped and does not count.
_MOST_DAMAGED = 1 << 18
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# O_PATH: searching a directory needs no permission to list it.
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


def open_directory(path: Path | str, parent_fd: int | None = None) -> int:
    """Return a descriptor of a job's directory, for `open_file`; neither it nor its parent may be a link.

    A store may belong to another user than its reader. As long as a reader holds the descriptor, no change of names
    leads it elsewhere.

    Args:
        path: The directory.
        parent_fd: Its parent, if that is open.

    Raises:
        OSError: There is no such directory; ``ENOTDIR`` or ``ELOOP`` for a link.
    """
    parent, _, name = os.fspath(path).rpartition("/")
    if parent_fd is not None:
        return os.open(name, _DIRECTORY, dir_fd=parent_fd)
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
    return open_sized(path, dir_fd)[0]


def open_sized(path: Path | str, dir_fd: int | None) -> tuple[int | None, int]:
    """Return what `open_file` does, and the size of the file in bytes."""
    if dir_fd == NO_DIRECTORY:
        return None, 0
    try:
        fd = os.open(path, _FILE, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None, 0
        raise
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode):
        return fd, found.st_size
    os.close(fd)
    return None, 0


def read_at(fd: int | None, offset: int, size: int) -> bytes:
    """Return the bytes at an offset: fewer than asked for only at the end of the file."""
    parts: list[bytes] = []
    while fd is not None and size and (part := os.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def data_end(fd: int | None, offset: int) -> int:
    """Return where the data that has an offset ends: the next hole of a sparse file, or the end of the file.

    A file system without holes, or without an answer, has data everywhere.
    """
    return _seek(fd, offset, "SEEK_HOLE")


def data_start(fd: int | None, offset: int) -> int:
    """Return the first offset from one on that has data; the end of the file if the rest is a hole."""
    return _seek(fd, offset, "SEEK_DATA")


def _seek(fd: int | None, offset: int, whence: str) -> int:
    if fd is None:
        return offset
    size = os.fstat(fd).st_size
    if offset >= size:
        return size
    fallback = offset if whence == "SEEK_DATA" else size
    try:
        return os.lseek(fd, offset, getattr(os, whence))
    except AttributeError:
        return fallback
    except OSError as error:
        return size if error.errno == errno.ENXIO else fallback


class IndexFile:
    """The entries that the index has now.

    The checksum of each entry says whether it is one; a header that was lost is not missed. Any program can write this
    file, and can make it as large as it likes: no loop here is longer than what the file really holds, or than
    `_MOST_DAMAGED` entries.
    """

    def __init__(self, path: Path | str, dir_fd: int | None = None) -> None:
        """Open an index; one that is missing has no entries.

        Args:
            path: Where it is.
            dir_fd: Its directory, if that is open.

        Raises:
            ProtocolError: It was written by a newer version.
        """
        self._path = path
        self._fd, size = open_sized(path if dir_fd is None else os.path.basename(path), dir_fd)
        try:
            # A short index, as most jobs have, takes one read.
            start = read_at(self._fd, 0, size if size <= _START_BYTES else HEADER_BYTES)
            header = start[:HEADER_BYTES]
            if header != HEADER and len(header) == HEADER_BYTES and header[:8] == HEADER[:8]:
                raise ProtocolError(f"{path} was written by a newer version of Tailspan; upgrade this one")
            self._places = max(0, size - HEADER_BYTES) // ENTRY_BYTES
            self._tail_start = max(0, self._places - _TAIL_ENTRIES)
            is_whole = size <= _START_BYTES
            self._tail = start[HEADER_BYTES:] if is_whole else self._read(self._tail_start, self._places)
            self._newest: dict[int, Entry] = {}
            self._is_last_known = False
            self._known_last: tuple[int, Entry] | None = None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def is_plain(self) -> bool:
        """Whether no search for whole entries is needed: there is no hole, and one of the last entries is whole."""
        if self._places <= _TAIL_ENTRIES:
            return True  # all of them are in memory
        if self.entry(self._places - 1) is None:
            block = self._block(max(0, self._places - _ENTRIES_PER_READ), self._places)
            if not any(block):
                return False
        return data_end(self._fd, 0) >= HEADER_BYTES + self._places * ENTRY_BYTES

    @property
    def count(self) -> int:
        """How many entries there are up to the last that is whole. Some before it may be damaged.

        Raises:
            ProtocolError: More entries are damaged than a power failure can damage.
        """
        return 0 if self._last is None else self._last[0] + 1

    @property
    def _last(self) -> tuple[int, Entry] | None:
        # Not a `cached_property`: its lock costs more than the search.
        if not self._is_last_known:
            self._known_last = self._last_whole(self._places)
            self._is_last_known = True
        return self._known_last

    def entry(self, number: int) -> Entry | None:
        """Return an entry by its number, from 0; None when it is damaged."""
        if (known := self._newest.get(number)) is not None:
            return known
        entry = unpack_entry(self._raw(number, number + 1))
        if entry is not None and number >= self._tail_start:
            self._newest[number] = entry
        return entry

    def whole_at(self, number: int) -> tuple[int, Entry]:
        """Return the first entry from a number on that is not damaged, and its number."""
        if number < self.count and (whole := self.entry(number)) is not None:
            return number, whole
        for candidate, entry in self._numbered(number):
            if entry is not None:
                return candidate, entry
        raise ProtocolError("the index of the log has been changed while it was read")

    def whole_before(self, number: int) -> Entry:
        """Return the last entry before a number that is not damaged; `NOTHING` without one."""
        found = self._last_whole(number)
        return NOTHING if found is None else found[1]

    def last(self) -> Entry | None:
        """Return the last entry; None for an empty index."""
        last = self._last
        return None if last is None else last[1]

    def newest_after(self, offset: int) -> list[Entry] | None:
        """Return the entry whose text ends at an offset and all after it, as a reader needs who follows a job.

        Returns:
            None if the last entries do not have one, or one of them is damaged.
        """
        found: list[Entry] = []
        for number in range(self._places - 1, self._tail_start - 1, -1):
            entry = self.entry(number)
            if entry is None or entry.end < offset:
                return None
            found.append(entry)
            if entry.end == offset:
                return found[::-1]
        return None

    def first_where(self, holds: Callable[[Entry], bool]) -> int:
        """Return the number of the first entry for which something holds, by bisection; `count` if for none.

        Args:
            holds: Once true, it is true for all later entries.
        """
        low, high, step = 0, self.count, 1
        while low < high:
            # From the end first, where a reader goes on who follows a job.
            middle, step = max((low + high) // 2, high - step), 2 * step
            number, entry = self.whole_at(middle)
            if holds(entry):
                high = middle
            else:
                low = number + 1
        return low

    def entries(self, number: int) -> Iterable[Entry | None]:
        """Return the entries from a number on; None for a damaged one, and one or more None for a hole of the file."""
        if number >= self._tail_start:
            return self._block(number, self.count)
        return (entry for _, entry in self._numbered(number))

    def _numbered(self, number: int) -> Iterator[tuple[int, Entry | None]]:
        """Yield the entries from a number on with their numbers; see `entries`."""
        damaged = 0
        while number < self.count:
            block = self._block(number, min(number + _ENTRIES_PER_READ, self.count))
            # An entry is no hole: its checksum is not zero.
            if block[0] is None and (after := self._after_hole(number)) > number:
                yield number, None
                number = after
                continue
            for candidate, entry in enumerate(block, number):
                damaged = 0 if entry is not None else self._check(damaged + 1)
                yield candidate, entry
            number += len(block)

    def _after_hole(self, number: int) -> int:
        """Return the number of the first entry from one on that has data in the file."""
        start = HEADER_BYTES + number * ENTRY_BYTES
        # Rounded down, so that no entry is skipped whose end has data.
        return max(number, (data_start(self._fd, start) - HEADER_BYTES) // ENTRY_BYTES)

    def _last_whole(self, number: int) -> tuple[int, Entry] | None:
        """Return the last entry before a number that is not damaged, and its number; None without one."""
        if not number:
            return None
        if (entry := self.entry(number - 1)) is not None:
            return number - 1, entry
        damaged = 0
        for start, end in reversed(self._data_before(number)):
            while end > start:
                first = max(start, end - _ENTRIES_PER_READ)
                for candidate, entry in reversed(list(enumerate(self._block(first, end), first))):
                    if entry is not None:
                        return candidate, entry
                damaged = self._check(damaged + end - first)
                end = first
        return None

    def _data_before(self, number: int) -> list[tuple[int, int]]:
        """Return the ranges of entries before a number that have data in the file."""
        ranges: list[tuple[int, int]] = []
        position = 0
        while position < number:
            start = self._after_hole(position)
            offset = HEADER_BYTES + start * ENTRY_BYTES
            end = min(
                number,
                -(-(data_end(self._fd, max(offset, data_start(self._fd, offset))) - HEADER_BYTES) // ENTRY_BYTES),
            )
            if start < number:
                ranges.append((start, max(end, start + 1)))
                self._check(len(ranges))
            position = max(end, start + 1)
        return ranges

    def _block(self, number: int, end: int) -> list[Entry | None]:
        raw = self._raw(number, end)
        if not raw.strip(b"\0"):
            return [None] * (end - number)
        wanted = (end - number) * ENTRY_BYTES
        return [unpack_entry(raw[position : position + ENTRY_BYTES]) for position in range(0, wanted, ENTRY_BYTES)]

    def _raw(self, number: int, end: int) -> bytes:
        """Return the bytes of entries."""
        if number < self._tail_start:
            return self._read(number, end)
        start = self._tail_start
        return self._tail[(number - start) * ENTRY_BYTES : (end - start) * ENTRY_BYTES]

    def _read(self, number: int, end: int) -> bytes:
        return read_at(self._fd, HEADER_BYTES + number * ENTRY_BYTES, (end - number) * ENTRY_BYTES)

    def _check(self, damaged: int) -> int:
        if damaged > _MOST_DAMAGED:
            raise ProtocolError(f"{self._path} has more than {_MOST_DAMAGED} damaged entries in a row")
        return damaged
