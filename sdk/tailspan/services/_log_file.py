"""Reading log files that other programs write, by offset: `LogFile`, and where its reading stopped, `LogPosition`.

Such a file can be truncated, rotated or replaced at any moment, and may be anything: a FIFO, a link, a file of 1 TiB
without data. A read takes what the file really holds now and ends.

A line's uid is its offset. The file has no times: a line has the time of the last write before it was read first.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from _blake2 import blake2b
from array import array
from collections.abc import Generator, Iterator
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tailspan._identity import job_hash
from tailspan.errors import AuthError, CursorExpiredError
from tailspan.local.capture import pieces_of
from tailspan.local.index import NO_NEWLINE
from tailspan.local.index_file import data_start, open_file, read_at
from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_BYTES, MAX_PAGE_LINES, LineRun, LogPage, OpenLine, Stream
from tailspan.logs.text import count_lines

__all__ = [
    "CHECKED_BYTES",
    "FileAccess",
    "LogFile",
    "LogGapError",
    "LogPart",
    "LogPosition",
    "SeenTimes",
    "check_of",
    "follow_log",
    "lines_of",
    "page_of",
    "uid_key",
]

CHECKED_BYTES = 256
_MAX_OPEN_BYTES = 64 << 10
# Of NULs, which are no text: where the file system reports no holes, more than this is not searched in one read.
_MAX_NULS = 256 << 20
_MOST_SEEN = 512
_MOST_ROTATED = 64  # the newest; all are open at the same time
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".Z", ".lz4")
_ROTATED = (".", "-", "_")
# Without the factor 2, multiplying permutes the numbers of 64 bits: lines of one file never share a uid.
_SPREAD = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class FileAccess(NamedTuple):
    """Which files may be read. A reader with more rights than the job must not be led to other files.

    Attributes:
        root: The directory that must contain the file, links resolved; None: any.
        owner: The user id that must own it; None: any.
    """

    root: Path | None = None
    owner: int | None = None

    def open(self, path: Path) -> int | None:
        """Return a file descriptor for reading; None if there is no such regular file that may be read.

        Raises:
            AuthError: The file, or a directory before it, is not open to this user.
        """
        try:
            fd = open_file(path)
        except PermissionError as error:
            raise AuthError(f"{path} is not readable for this user: {error.strerror}") from None
        if fd is None:
            return None
        if self._allows(path, fd):
            return fd
        os.close(fd)
        return None

    def _allows(self, path: Path, fd: int) -> bool:
        if self.owner is not None and os.fstat(fd).st_uid != self.owner:
            return False
        if self.root is None:
            return True
        found = path.resolve()
        # The path can have changed since the file was opened.
        same = os.path.samestat(os.stat(found, follow_symlinks=False), os.fstat(fd)) if found.exists() else False
        return same and found.is_relative_to(self.root.resolve())


class LogPosition(NamedTuple):
    """Where the reading of a log stopped; a part of a cursor.

    Attributes:
        offset: The end of the lines that were read, in bytes.
        inode: The file that has them.
        check: A digest of its first bytes and of those before the offset; see `LogFile.has`.
        earlier: How many bytes were read of earlier contents: before a truncation or rotation.
        next_unix_nano: The earliest time of the next line, so that lines stay in order.
    """

    offset: int = 0
    inode: int = 0
    check: bytes = b""
    earlier: int = 0
    next_unix_nano: int = 0

    @classmethod
    def unpack(cls, parts: Any) -> LogPosition:
        """Return the position that `list` made of one.

        Raises:
            ValueError: It is not a position.
        """
        if not isinstance(parts, list) or list(map(type, parts)) != [int, int, bytes, int, int]:
            raise ValueError("not a position")
        return cls(*parts)

    def restart(self) -> LogPosition:
        """Return the start of a new content of the log."""
        return LogPosition(earlier=self.earlier + self.offset, next_unix_nano=self.next_unix_nano)


class SeenTimes:
    """When the text of a log up to an offset was seen first, so that this process gives its lines the same times again.

    It is bounded: of many moments, neighbours become one.
    """

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._nanos: list[int] = []

    def note(self, end: int, unix_nano: int) -> None:
        """Note the time of the text between the last noted end and this one."""
        if self._ends and end <= self._ends[-1]:
            return
        if len(self._ends) >= _MOST_SEEN:
            del self._ends[::2], self._nanos[::2]
        self._ends.append(end)
        self._nanos.append(unix_nano)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ends of the parts of a text that have one time, with these times; the last may lack a time (0)."""
        for noted, nano in zip(self._ends, self._nanos, strict=True):
            if noted > start:
                yield min(noted, end), nano
                start = noted
            if noted >= end:
                return
        if start < end:
            yield end, 0


class LogPart(NamedTuple):
    """Lines of a log, and where they end.

    Attributes:
        page: The lines; its cursor is empty.
        position: Where to go on.
    """

    page: LogPage
    position: LogPosition

    def since(self, unix_nano: int) -> LogPage | None:
        """Return the lines at or after a time, in ns since the epoch; None without one."""
        runs = self.page.runs
        if runs[0].time_unix_nano >= unix_nano:
            return self.page
        left_out = sum(min(run.lines, max(0, unix_nano - run.time_unix_nano)) for run in runs)
        if left_out == self.page.line_count:
            return None
        kept = []
        for run in runs:
            lost = min(run.lines, max(0, unix_nano - run.time_unix_nano))
            if lost < run.lines:
                kept.append(run._replace(lines=run.lines - lost, time_unix_nano=run.time_unix_nano + lost))
        digests = self.page.digests[left_out * DIGEST_BYTES :]
        return LogPage(self.page.lines[left_out:], kept, self.page.cursor, digests, tasks=self.page.tasks)


class LogGapError(CursorExpiredError):
    """The text after a position is gone; the service adds the cursor.

    Attributes:
        position: Where to go on.
    """

    def __init__(self, message: str, position: LogPosition) -> None:
        super().__init__(message)
        self.position = position


class LogFile:
    """A log as it is now. A context manager.

    Attributes:
        size: How many bytes it has; later ones are for the next reader, or a busy job would never end this one.
        modified_unix_nano: When it was written last, in ns since the epoch; not in the future.
        stored_time_ns: The same as the file system has it.
    """

    def __init__(self, path: Path, access: FileAccess = FileAccess()) -> None:  # noqa: B008 - immutable
        """Open a log; one that does not exist, or may not be read, is empty.

        Raises:
            AuthError: The file is not open to this user.
        """
        self.path = path
        self._access = access
        self._fd = access.open(path)
        found = os.fstat(self._fd) if self._fd is not None else None
        self.size = found.st_size if found else 0
        self.inode = found.st_ino if found else 0
        self.stored_time_ns = found.st_mtime_ns if found else 0
        self.modified_unix_nano = min(self.stored_time_ns, time.time_ns())

    @property
    def exists(self) -> bool:
        """Whether there is a file that may be read."""
        return self._fd is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def head(self, size: int) -> bytes:
        """Return the first bytes."""
        return read_at(self._fd, 0, min(size, self.size))

    def tail(self, size: int, end: int | None = None) -> tuple[int, bytes]:
        """Return the last bytes before an offset, by default the end, and where they begin."""
        end = self.size if end is None else min(end, self.size)
        start = max(0, end - size)
        return start, read_at(self._fd, start, end - start)

    def check(self, offset: int) -> bytes:
        """Return a digest of the first bytes, and of those before an offset."""
        first = read_at(self._fd, 0, min(CHECKED_BYTES, offset))
        last = read_at(self._fd, max(0, offset - CHECKED_BYTES), min(CHECKED_BYTES, offset))
        return blake2b(first + last, digest_size=DIGEST_BYTES).digest()

    def has(self, position: LogPosition) -> bool:
        """Return whether the file has the text that was read up to a position, so that reading can go on there."""
        if position.offset == 0:
            return True
        return self.size >= position.offset and self.check(position.offset) == position.check

    def rotated(self) -> list[LogFile]:
        """Return what stands under the names that rotation gives (``log.1``, ``log-20261129``), oldest first, open."""
        found: list[tuple[int, Path]] = []
        try:
            with os.scandir(self.path.parent) as entries:
                for entry in entries:
                    rest = entry.name.removeprefix(self.path.name)
                    if not rest or rest == entry.name or rest[0] not in _ROTATED or rest.endswith(_PACKED):
                        continue
                    known = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(known.st_mode):
                        found.append((known.st_mtime_ns, Path(entry.path)))
        except OSError:
            return []
        files: list[LogFile] = []
        for _, path in sorted(found)[-_MOST_ROTATED:]:
            with contextlib.suppress(AuthError, OSError):
                files.append(LogFile(path, self._access))
        return files

    def open_line(self, identity: str, log: str, earlier: int = 0) -> OpenLine | None:
        """Return the text behind the last newline, at most 64 KiB; None without one.

        Args:
            identity: The identity of the service.
            log: What identifies the log there: the job, and which of its logs.
            earlier: See `LogPosition`.
        """
        start, text = self.tail(_MAX_OPEN_BYTES)
        cut = text.rfind(b"\n") + 1
        if cut == len(text) or (not cut and start) or b"\0" in text[cut:]:
            return None
        uid = f"{job_hash(identity, log)}-{earlier + start + cut:012x}-open-{len(text) - cut:x}"
        return OpenLine(text[cut:], self.modified_unix_nano, uid)

    def parts(
        self,
        position: LogPosition,
        *,
        identity: str,
        log: str,
        ended: bool,
        end: int | None = None,
        stream: int = Stream.NONE,
        seen: SeenTimes | None = None,
    ) -> Iterator[LogPart]:
        """Yield the lines from a position of this file on, as pages.

        Args:
            position: Where to go on.
            identity: The identity of the service.
            log: What identifies the log there: the job, and which of its logs.
            ended: Whether text without a newline at the end is a line, because no more of it will come.
            end: Up to which offset to read; None: to the present end.
            stream: One of `Stream`.
            seen: When the lines were seen first.

        Raises:
            LogGapError: The file goes on with NULs for longer than one read searches.
        """
        key = int.from_bytes(blake2b(f"{identity}\0{log}\0file".encode(), digest_size=DIGEST_BYTES).digest())
        end = self.size if end is None else min(end, self.size)
        offset, skipped = position.offset, 0
        while offset < end:
            offset = self._data_after(offset, end)
            data = read_at(self._fd, offset, min(MAX_PAGE_BYTES, end - offset))
            if not data:
                return
            # After a truncation, a program goes on at its old offset: what is before that reads as NULs.
            if data[0] == 0 and (nuls := len(data) - len(data.lstrip(b"\0"))):
                offset, skipped = offset + nuls, skipped + nuls
                if skipped > _MAX_NULS:
                    text = f"{self.path} has more than {_MAX_NULS >> 20} MiB of NULs before offset {offset}"
                    raise LogGapError(text, self._at(offset, position))
                continue
            lines, is_whole = lines_of(data, at_end=offset + len(data) == end, ended=ended)
            if not lines:
                return
            runs = self._runs(lines, offset, is_whole, position, stream, seen)
            page = page_of(lines, is_whole, runs, key, position.earlier + offset)
            last = runs[-1]
            offset += len(lines)
            position = self._at(offset, position._replace(next_unix_nano=last.time_unix_nano + last.lines))
            yield LogPart(page, position)

    def _at(self, offset: int, position: LogPosition) -> LogPosition:
        return position._replace(offset=offset, inode=self.inode, check=self.check(offset))

    def _data_after(self, offset: int, end: int) -> int:
        """Return the first offset from one on that is not in a hole of the file."""
        return min(max(offset, data_start(self._fd, offset)), end)

    def _runs(
        self, text: bytes, offset: int, is_whole: bool, position: LogPosition, stream: int, seen: SeenTimes | None
    ) -> list[LineRun]:
        """Return the times of a text's lines, and note those that it has now."""
        start, end = position.earlier + offset, position.earlier + offset + len(text)
        runs: list[LineRun] = []
        floor, done = position.next_unix_nano, start
        parts = list(seen.parts(start, end)) if seen is not None else [(end, 0)]
        if not is_whole:
            parts = parts[-1:]
        for until, nano in parts:
            lines = count_lines(text[done - start : until - start]) if is_whole else 1
            done = until
            if not lines:
                continue
            first = max(floor, nano or self.modified_unix_nano)
            floor = first + lines
            runs.append(LineRun(lines, first, stream))
            if seen is not None and not nano:
                seen.note(until, first)
        return runs


def check_of(first: bytes, last: bytes) -> bytes:
    """Return the digest of the first bytes of a log, and of those before an offset; of each at most `CHECKED_BYTES`."""
    return blake2b(first + last, digest_size=DIGEST_BYTES).digest()


def uid_key(identity: str, log: str) -> int:
    """Return what the uids of a log's lines are made of, beside their offsets."""
    return int.from_bytes(blake2b(f"{identity}\0{log}\0file".encode(), digest_size=8).digest())


def lines_of(data: bytes, *, at_end: bool, ended: bool) -> tuple[bytes, bool]:
    """Return the lines that data begins with, and whether they end with a newline; otherwise it is one line.

    Args:
        data: What was read.
        at_end: Whether the file ends with it.
        ended: Whether no more will be written.
    """
    # Where a line that is too long is cut depends on its bytes alone, never on how it was read.
    full = len(data) >= MAX_PAGE_BYTES
    cut = data.rfind(b"\n") + 1
    if not cut and not full and not (at_end and ended):
        return b"", False
    piece = next(pieces_of(data[:cut] or data, max_bytes=MAX_PAGE_BYTES - 1, max_lines=MAX_PAGE_LINES))
    return piece.text, not piece.flags & NO_NEWLINE


def page_of(text: bytes, is_whole: bool, runs: list[LineRun], key: int, start: int) -> LogPage:
    """Return the page of a text; its uids are made of the lines' offsets."""
    lines = text.split(b"\n") if is_whole else [text]
    if is_whole:
        lines.pop()
    starts = list(accumulate(map(len, lines[:-1]), lambda done, size: done + size + 1, initial=start))
    has_nuls = b"\0" in text
    if has_nuls:
        # A read that starts at these NULs skips them: the line must be the same.
        stripped = [line.lstrip(b"\0") for line in lines]
        starts = [one + len(line) - len(rest) for one, line, rest in zip(starts, lines, stripped, strict=True)]
        lines = stripped
    uids = array("Q", [(key + (one + 1) * _SPREAD) & _MASK for one in starts])
    if sys.byteorder == "little":
        uids.byteswap()
    digests = uids.tobytes()
    if is_whole and not has_nuls:
        return LogPage(None, runs, b"", digests, text)
    return LogPage(lines, runs, b"", digests)


def follow_log(
    path: Path, position: LogPosition, *, access: FileAccess, ended: bool, **options: Any
) -> Generator[LogPart, None, None]:
    """Yield the lines of a log from a position on, through its rotation: by a new name (``create``) or by a copy.

    Args:
        path: The log.
        position: Where to go on.
        access: Which files may be read.
        ended: See `LogFile.parts`.
        **options: Further options of `LogFile.parts`.

    Raises:
        AuthError: The file is not open to this user.
        LogGapError: The log was truncated or replaced, and the rest of its old content is gone.
    """
    with LogFile(path, access) as current:
        if position.inode in (0, current.inode) and current.has(position):
            yield from current.parts(position, ended=ended, **options)
            return
        older = current.rotated()
        try:
            first = _index_of(position, older)
            if first is None:
                if not current.exists:
                    return
                if position.offset:
                    text = f"{path} was truncated or replaced at about offset {position.offset}: lines may be lost"
                    raise LogGapError(text, position.restart())
            for file in older[len(older) if first is None else first :]:
                # Its writer may not have opened the new file yet: until that has text, more can come.
                is_last = file is older[-1] and not current.size
                for part in file.parts(position, ended=ended or not is_last, **options):
                    yield part
                    position = part.position
                if is_last:
                    return
                position = position.restart()
            yield from current.parts(position, ended=ended, **options)
        finally:
            for file in older:
                file.close()


def _index_of(position: LogPosition, files: list[LogFile]) -> int | None:
    """Return which file has the text up to a position: the same one under another name, else the newest copy."""
    same = [index for index, file in enumerate(files) if file.inode == position.inode and file.has(position)]
    copies = [index for index, file in enumerate(files) if position.offset and file.has(position)]
    found = same or copies
    return found[-1] if found else None
