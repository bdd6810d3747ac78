"""A job's output on its way from pipes into `log` and `log.idx`: cut into lines, then written.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import errno
import os
import time
from collections import namedtuple

from tailspan.local.index import (
    HEADER_BYTES,
    MAX_ENTRY_BYTES,
    MAX_ENTRY_LINES,
    NO_NEWLINE,
    STEPPED_BACK,
    Entry,
    entry_time,
    pack_entry,
    text_flags,
)
from tailspan.logs.text import count_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LineBuffer", "LogWriter", "Piece", "pieces_of"]


_RETRY_S = 1.0


class Piece(namedtuple("Piece", ("text", "lines", "flags"), defaults=(0,))):
    """Text that becomes one entry.

    Attributes:
        text: Whole lines, or one line that has no newline.
        lines: How many.
        flags: How it ends: `NO_NEWLINE` or 0.
    """

    __slots__ = ()
    text: bytes
    lines: int
    flags: int


def pieces_of(text: bytes, *, max_bytes: int = MAX_ENTRY_BYTES, max_lines: int = MAX_ENTRY_LINES) -> Iterator[Piece]:
    """Cut text into pieces that fit an entry.

    Where a line that is too long is cut depends on its bytes alone, never on how it was read.

    Args:
        text: Whole lines; the last may lack its newline.
        max_bytes: Of a piece, and of a line, both without the last newline.
        max_lines: Of a piece.
    """
    position = 0
    while position < len(text):
        newline = text.rfind(b"\n", position, position + max_bytes + 1)
        if newline >= 0:
            end = newline + 1
            yield from _by_lines(text[position:end], max_lines)
        else:
            end = len(text) if len(text) - position <= max_bytes else _cut(text, position + max_bytes)
            yield Piece(text[position:end], 1, NO_NEWLINE)
        position = end


def _cut(text: bytes, end: int) -> int:
    """Return where to cut a long line, at an offset or just before: not within a character, if it is UTF-8."""
    return next((end - back for back in range(4) if text[end - back] & 0xC0 != 0x80), end)


def _by_lines(text: bytes, max_lines: int) -> Iterator[Piece]:
    # Each piece but the last is full, so the text after a piece is cut in the same places when it is cut alone. So
    # text without entries has the same uids wherever its reading is resumed.
    lines, start = count_lines(text), 0
    while lines > max_lines:
        end = _after_lines(text, start, max_lines)
        yield Piece(text[start:end], max_lines)
        start, lines = end, lines - max_lines
    yield Piece(text[start:], lines)


def _after_lines(text: bytes, start: int, lines: int) -> int:
    """Return the offset behind the next N newlines, by halving rather than by finding each."""
    end = len(text)
    while end - start > 1:
        middle = (start + end) // 2
        found = count_lines(text[start:middle])
        if found < lines:
            start, lines = middle, lines - found
        else:
            end = middle
    return end


class LineBuffer:
    """Cuts the output of one stream, as it is read, into pieces of whole lines.

    Attributes:
        progress_is_waiting: Whether a line without newline shows progress, so that it should be seen before its
            newline comes.
    """

    def __init__(self, *, max_bytes: int = MAX_ENTRY_BYTES, max_lines: int = MAX_ENTRY_LINES) -> None:
        """Start without text; see `pieces_of` for the limits."""
        self._max_bytes = max_bytes
        self._max_lines = max_lines
        self._partial = bytearray()
        self.progress_is_waiting = False

    def feed(self, data: bytes | bytearray, size: int | None = None) -> list[Piece]:
        """Take in what was read; return the lines that it completes.

        Args:
            data: What was read. It is copied, once.
            size: How many bytes of it; None: all.
        """
        size = len(data) if size is None else size
        cut = data.rfind(b"\n", 0, size) + 1
        pieces: list[Piece] = []
        if cut:
            with memoryview(data) as read, read[:cut] as lines:
                text = b"".join((self._partial, lines))
            self._forget()
            pieces.extend(self._pieces(text))
        self._keep(data[cut:size])
        if len(self._partial) > self._max_bytes:
            *whole, rest = self._pieces(self._take())
            pieces.extend(whole)
            self._keep(rest.text)
        return pieces

    def progress(self) -> list[Piece]:
        """Return what a line without newline shows so far, up to a carriage return; the rest is kept.

        A carriage return at the very end is not counted: its newline may just not have been read.
        """
        text = self._take()
        cut = text.rfind(b"\r", 0, -1) + 1
        self._keep(text[cut:])
        return list(self._pieces(text[:cut]))

    @property
    def has_partial(self) -> bool:
        """Whether there is text without a newline."""
        return bool(self._partial)

    def partial(self) -> bytes:
        """Return what is left without a newline, and keep it."""
        return bytes(self._partial)

    def finish(self) -> list[Piece]:
        """Return what is left without a newline."""
        return list(self._pieces(self._take()))

    def _pieces(self, text: bytes) -> Iterator[Piece]:
        return pieces_of(text, max_bytes=self._max_bytes, max_lines=self._max_lines)

    def _keep(self, data: bytes | bytearray) -> None:
        self._partial += data
        self.progress_is_waiting = self.progress_is_waiting or b"\r" in data

    def _take(self) -> bytes:
        text = bytes(self._partial)
        self._forget()
        return text

    def _forget(self) -> None:
        self._partial.clear()
        self.progress_is_waiting = False


class LogWriter:
    """Appends pieces to `log` and their entries to `log.idx`. A failed write never blocks the job.

    Text that could not be written leaves a gap: its place in `log` stays empty, and its entries say how many bytes and
    lines are missing. Entries that could not be written wait in memory.

    Text is written at its own offset rather than appended: when another process truncates `log`, what comes after it
    still stands where the index says.

    Attributes:
        bytes: How long the log is, gaps included.
        lines: How many lines it has, gaps included.
        lost_bytes: How many bytes are missing.
        lost_lines: How many lines are missing.
        problem: Why the last write failed; None: it did not.
    """

    def __init__(self, log_fd: int, index_fd: int) -> None:
        """Start an empty log.

        Args:
            log_fd: The empty file `log`.
            index_fd: `log.idx` with its header only.
        """
        self.bytes = 0
        self.lines = 0
        self.lost_bytes = 0
        self.lost_lines = 0
        self.problem: str | None = None
        self._log_fd = log_fd
        self._index_fd = index_fd
        self._index_bytes = HEADER_BYTES
        self._unwritten = bytearray()
        self._gap: Entry | None = None
        self._gap_start = 0
        self._retry_at_s = 0.0
        self._preview_bytes = 0
        self._floor = 0
        self._sticky = 0

    def append(self, piece: Piece, stream: int, now_unix_nano: int | None = None) -> None:
        """Write a piece and then its entry."""
        now = time.time_ns() if now_unix_nano is None else now_unix_nano
        if not self._write(self._log_fd, piece.text, self.bytes):
            self._lose(piece, stream, now)
        else:
            if self._preview_bytes > len(piece.text):
                self._cut_preview(self.bytes + len(piece.text))
            self._close_gap()
            self._enter(piece, stream, now, text_flags(piece.text) | piece.flags)
        self._preview_bytes = 0
        self._flush()

    def preview(self, text: bytes) -> None:
        """Write an open line behind the last entry, where readers find it; a later piece replaces it."""
        if self._gap is None and self._write(self._log_fd, text, self.bytes):
            if self._preview_bytes > len(text):
                self._cut_preview(self.bytes + len(text))
            self._preview_bytes = len(text)
            # Changes nothing, but the kernel reports it to whom reads the log by its index.
            self._cut(self._index_fd, self._index_bytes)

    def finish(self) -> bool:
        """Enter what is left; return whether the index is complete."""
        self._close_gap()
        self._retry_at_s = 0.0
        self._flush()
        return not self._unwritten

    def _enter(self, piece: Piece, stream: int, now: int, flags: int) -> None:
        start, stepped_back = entry_time(self._floor, now, piece.lines)
        if stepped_back:
            self._sticky = STEPPED_BACK
        self._floor = start + piece.lines
        self.bytes += len(piece.text)
        self.lines += piece.lines
        self._unwritten += pack_entry(Entry(self.bytes, start, self.lines, stream, flags | self._sticky))

    def _lose(self, piece: Piece, stream: int, now: int) -> None:
        gap = self._gap
        size, lines = len(piece.text), piece.lines
        self.lost_bytes += size
        self.lost_lines += lines
        if gap is not None and (
            self.bytes + size - self._gap_start > MAX_ENTRY_BYTES
            or self.lines + lines - (gap.lines_end - 1) > MAX_ENTRY_LINES
            or gap.stream != stream
        ):
            self._close_gap()
            gap = None
        if gap is None:
            # Room for as many lines as the entry may get, all within one millisecond.
            start, stepped_back = entry_time(self._floor, now, MAX_ENTRY_LINES)
            if stepped_back:
                self._sticky = STEPPED_BACK
            self._gap_start = self.bytes
            # `lines_end` is the number of the first line until the gap is closed.
            self._gap = Entry(self.bytes, start, self.lines + 1, stream, self._sticky)
        self.bytes += size
        self.lines += lines

    def _close_gap(self) -> None:
        gap, self._gap = self._gap, None
        if gap is not None:
            self._floor = gap.time_unix_nano + self.lines - gap.lines_end + 1
            self._unwritten += pack_entry(gap._replace(end=self.bytes, lines_end=self.lines))

    def _flush(self) -> None:
        if self._unwritten and self._write(self._index_fd, self._unwritten, self._index_bytes):
            self._index_bytes += len(self._unwritten)
            self._unwritten.clear()

    def _cut_preview(self, end: int) -> None:
        # If it fails, readers take the rest for the beginning of the next line until that is written.
        self._cut(self._log_fd, end)

    def _cut(self, fd: int, end: int) -> None:
        try:
            os.ftruncate(fd, end)
        except OSError:
            pass

    def _write(self, fd: int, data: bytes | bytearray, offset: int) -> bool:
        """Return whether all of it was written; after a failure nothing is tried for a second."""
        if self._retry_at_s and time.monotonic() < self._retry_at_s:
            return False
        try:
            with memoryview(data) as view:
                done = 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            self.problem = error.strerror
            self._retry_at_s = time.monotonic() + _RETRY_S
            return False
        self._retry_at_s = 0.0
        return True
