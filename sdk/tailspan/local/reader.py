"""Reading `log` through `log.idx`: pages and totals. Reads only what is asked for; never writes."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tailspan._identity import job_hash
from tailspan.errors import CursorExpiredError, ProtocolError
from tailspan.local.capture import LineBuffer, Piece
from tailspan.local.index import (
    MAX_ENTRY_BYTES,
    MAX_ENTRY_LINES,
    NO_NEWLINE,
    NOTHING,
    NUL,
    RECOVERED,
    STEPPED_BACK,
    UNCLEAN,
    Entry,
    entry_time,
    text_flags,
)
from tailspan.local.index_file import (
    NO_DIRECTORY,
    IndexFile,
    data_end,
    data_start,
    open_directory,
    open_file,
    read_at,
)
from tailspan.logs.page import CLEAN, MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LineRun, LogPage, OpenLine, Stream
from tailspan.logs.text import count_lines

__all__ = ["LogReader", "Totals"]

_READ_BYTES = 1 << 20
_MAX_OPEN_BYTES = 64 << 10
_MOST_DIGITS = 20
_FEW_BYTES = 1 << 20
_MOST_RECOVERED_BYTES = 64 << 20
_SPANS_A_GAP = 1 << 16
_STREAMS = range(len(Stream.NAMES))
_prefix = functools.lru_cache(maxsize=256)(job_hash)  # an agent reads the same jobs many times a second


class Totals(NamedTuple):
    """How much a log has.

    Attributes:
        lines: How many lines.
        first_unix_nano: Time of the first line; 0 without lines.
        last_unix_nano: Time of the last line; 0 without lines.
    """

    lines: int = 0
    first_unix_nano: int = 0
    last_unix_nano: int = 0


class _Span(NamedTuple):
    """An entry, with where its text begins and how many lines it has."""

    start: int
    lines: int
    entry: Entry

    @property
    def is_possible(self) -> bool:
        """Whether our capture can have made it: the checksum detects damage, but not another writer."""
        size = self.entry.end - self.start
        return 0 < size <= MAX_ENTRY_BYTES + 1 and 0 < self.lines <= MAX_ENTRY_LINES and self.entry.stream in _STREAMS


class LogReader:
    """One job's log as it is now. A context manager; it holds the files open, so a pruned job stays readable."""

    def __init__(self, directory: Path | str, job_id: str, *, ended: bool, dir_fd: int | None = None) -> None:
        """Open a log as it is now. Later lines are for the next reader, or a busy job would never end this one.

        Args:
            directory: The job's directory.
            job_id: The job, for errors and uids.
            ended: Whether the job has ended: text that a killed supervisor had not yet indexed then counts as lines.
            dir_fd: The job's directory, if the caller holds it open.
        """
        self._job_id = job_id
        self._ended = ended
        if dir_fd is not None:
            self._open(directory, dir_fd)
            return
        try:
            dir_fd = open_directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            self._open(directory, NO_DIRECTORY)
            return
        try:
            self._open(directory, dir_fd)
        finally:
            os.close(dir_fd)

    def _open(self, directory: Path | str, dir_fd: int) -> None:
        self._index = IndexFile(f"{directory}/log.idx", dir_fd)
        try:
            self._log_fd = open_file("log", dir_fd)
        except BaseException:
            self._index.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._index.close()
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None

    @property
    def has_more_text(self) -> bool:
        """Whether the log has text behind the last entry: the next lines, or what a killed supervisor left."""
        last = self._index.last()
        return self._log_size() > (last.end if last else 0)

    @property
    def is_plain(self) -> bool:
        """Whether reading takes a millisecond a page. If not, call `totals` and `pages` off the event loop."""
        if not self._index.is_plain:
            return False
        last = self._index.last()
        return not self._ended or self._log_size() - (last.end if last else 0) <= _FEW_BYTES

    def totals(self) -> Totals:
        """Return how many lines the log has and when its first and last were written.

        Raises:
            ProtocolError: More of its text has no entry than a killed supervisor can leave.
            CursorExpiredError: Text without an entry is gone.
        """
        if self._ended and self._log_size() - (last.end if (last := self._index.last()) else 0) > _MOST_RECOVERED_BYTES:
            raise ProtocolError(
                f"job {self._job_id}: its log is {_MOST_RECOVERED_BYTES >> 20} MiB longer than its index"
            )
        first = self._index.whole_at(0)[1] if self._index.count else None
        last, lines = self._index.last(), 0
        if last:
            before = self._index.entry(self._index.count - 2) if self._index.count > 1 else None
            lines = last.lines_end - (before.lines_end if before else 0)
        for span in self._recovered():
            first = first or span.entry
            last, lines = span.entry, span.lines
        if first is None or last is None:
            return Totals()
        return Totals(last.lines_end, first.time_unix_nano, last.time_unix_nano + lines - 1)

    def pages(self, identity: str, cursor: bytes | None = None, since_ms: int | None = None) -> Iterator[LogPage]:
        """Yield the lines after a cursor, oldest first, in pages of whole entries.

        Args:
            identity: The service's identity; with the job id it makes the uids.
            cursor: A page's cursor; None: from the start.
            since_ms: Only without cursor: lines at or after this time, in ms since the epoch.

        Raises:
            CursorExpiredError: The log no longer has the lines that its index speaks of, or the cursor is not of
                this log. Reading can go on from the error's cursor.
        """
        prefix = _prefix(identity, self._job_id)
        if cursor is not None:
            spans = self._after(cursor)
        elif since_ms is not None:
            spans = self._since(since_ms * NANOS_PER_MS)
        else:
            spans = self._spans(0)
        for batch in _batches(spans):
            page = self._page(batch, prefix)
            if page is None:
                intact = list(itertools.takewhile(lambda span: self._page([span], prefix) is not None, batch))
                page = self._page(intact, prefix) if intact else None
                if page is not None:
                    yield page
                raise self._gap(batch[len(intact)].start)
            yield page

    def open_line(self, identity: str) -> OpenLine | None:
        """Return the line whose newline has not come, at most its first 64 KiB; None without one.

        Args:
            identity: The service's identity.
        """
        if self._ended or self._log_fd is None:
            return None
        last = self._index.last() or NOTHING
        text = read_at(self._log_fd, last.end, _MAX_OPEN_BYTES)
        # Whole lines wait for their entry, and a gap reads as NULs.
        if not text or b"\n" in text or text.startswith(b"\0"):
            return None
        written_ns = os.fstat(self._log_fd).st_mtime_ns
        return OpenLine(text, written_ns, f"{job_hash(identity, self._job_id)}-{last.end:012x}-open-{len(text):x}")

    def _page(self, batch: list[_Span], prefix: str) -> LogPage | None:
        """Return the lines of entries that follow each other; None when the text is not what the index says."""
        start, end = batch[0].start, batch[-1].entry.end
        text = read_at(self._log_fd, start, end - start)
        # Truncating the log of a running job leaves a hole, which reads as NULs.
        if len(text) < end - start or (b"\0" in text and not any(span.entry.flags & NUL for span in batch)):
            return None
        runs = [
            LineRun(
                span.lines,
                span.entry.time_unix_nano,
                span.entry.stream,
                0 if span.entry.flags & UNCLEAN else CLEAN,
                f"{prefix}-{span.start:012x}-",
            )
            for span in batch
        ]
        cursor = str(end).encode()
        if not any(span.entry.flags & NO_NEWLINE for span in batch):
            is_whole = text.endswith(b"\n") and count_lines(text) == sum(span.lines for span in batch)
            return LogPage(None, runs, cursor, text=text) if is_whole else None
        lines: list[bytes] = []
        done = pending = 0
        for span in batch:
            pending += span.lines
            unfinished = span.entry.flags & NO_NEWLINE
            if unfinished or span.entry.end == end:
                found = text[done : span.entry.end - start].split(b"\n")
                if (not unfinished and found.pop()) or len(found) != pending:
                    return None
                lines += found
                done, pending = span.entry.end - start, 0
        return LogPage(lines, runs, cursor)

    def _gap(self, start: int) -> CursorExpiredError:
        """Return the error for lines that are gone, with the first place after them that can be read."""
        resume, size = start, self._log_size()
        # A longer gap is reported in parts: the next read goes on from here.
        for span in itertools.islice(self._after(str(start).encode()), _SPANS_A_GAP):
            if span.start >= size:
                last = self._index.last()
                resume = max(span.entry.end, last.end if last else 0)
                break
            if self._page([span], "") is not None:
                break
            resume = span.entry.end
        return self._expired(f"the bytes {start} to {resume} of its log are gone", resume)

    def _expired(self, problem: str, resume: int | None) -> CursorExpiredError:
        return CursorExpiredError(
            f"job {self._job_id}: {problem}",
            resume_cursor=None if resume is None else str(resume).encode(),
            job_id=self._job_id,
        )

    def _forged(self) -> ProtocolError:
        return ProtocolError(f"job {self._job_id}: the index of its log is not one that Tailspan wrote")

    def _after(self, cursor: bytes) -> Iterator[_Span]:
        if not cursor.isdigit() or len(cursor) > _MOST_DIGITS:
            raise self._expired(f"{cursor[:40]!r} is not a cursor of its log", None)
        offset = int(cursor)
        newest = self._index.newest_after(offset)
        if newest is not None:
            yield from map(self._span, newest, newest[1:])
            yield from self._recovered(offset)
            return
        last = self._index.last()
        end = last.end if last else 0
        for span in self._spans(self._index.first_where(lambda entry: entry.end > offset), offset):
            end = span.entry.end
            if span.start < offset < end:
                # Entries that this cursor knew are gone: better some lines twice than never.
                raise self._expired("its index is not the one that the cursor was made with", span.start)
            if span.start >= offset:
                yield span
        # An emptied index knows nothing until its next entry; the log's size shows whether the cursor belongs to it.
        if offset > max(end, self._log_size()):
            raise self._expired("its log is shorter than when the cursor was made", end)

    def _since(self, least_unix_nano: int) -> Iterator[_Span]:
        last = self._index.last()
        if last and last.flags & STEPPED_BACK:
            # Times are not sorted.
            first = 0
        else:
            first = self._index.first_where(lambda entry: entry.time_unix_nano >= least_unix_nano)
        return (span for span in self._spans(first) if span.entry.time_unix_nano >= least_unix_nano)

    def _spans(self, number: int, offset: int = 0) -> Iterator[_Span]:
        """Yield what the index has from an entry's number on, and then what the supervisor could not enter.

        Text whose entries are damaged gets new entries: see `_rebuilt`.
        """
        before = self._index.whole_before(number)
        damaged = number > 0 and self._index.entry(number - 1) is None
        for entry in self._index.entries(number):
            if entry is None:
                damaged = True
                continue
            if damaged:
                yield from self._rebuilt(before, entry.end, entry.time_unix_nano, offset)
            else:
                yield self._span(before, entry)
            before, damaged = entry, False
        yield from self._recovered(offset)

    def _span(self, before: Entry, entry: Entry) -> _Span:
        span = _Span(before.end, entry.lines_end - before.lines_end, entry)
        if not span.is_possible:
            raise self._forged()
        return span

    def _recovered(self, offset: int = 0) -> Iterator[_Span]:
        """Yield entries for the text behind the last entry, once no supervisor can index it."""
        if not self._ended or self._log_fd is None:
            return
        last = self._index.last() or NOTHING
        log = os.fstat(self._log_fd)
        if max(last.end, offset) < log.st_size:
            yield from self._rebuilt(last, log.st_size, log.st_mtime_ns, offset)

    def _rebuilt(self, before: Entry, end: int, written_unix_nano: int, offset: int) -> Iterator[_Span]:
        """Yield entries for text that has none.

        They are not written down, because a reader may not be allowed to; but they are the same each time.

        Args:
            before: The last entry before that text.
            end: Where the text ends.
            written_unix_nano: When it had been written.
            offset: A cursor that knows the lines up to there, perhaps from entries that were lost.

        Raises:
            CursorExpiredError: The text is gone, too.
        """
        last = self._index.last()
        if end <= before.end or (last is not None and end > max(last.end, self._log_size())):
            raise self._forged()
        start = before.end
        if start < offset < end and self._restarts_at(start, offset, end):
            start = offset
        lines = before.lines_end
        sticky = before.flags & STEPPED_BACK | RECOVERED
        # How many lines the entry before has does not matter: none has as many as this.
        floor = before.time_unix_nano + MAX_ENTRY_LINES
        done = start
        for position, piece in self._pieces(start, end):
            time, stepped_back = entry_time(floor, written_unix_nano, piece.lines)
            sticky |= STEPPED_BACK if stepped_back else 0
            flags = text_flags(piece.text) | piece.flags | sticky
            yield _Span(done, piece.lines, Entry(position, time, lines + piece.lines, 0, flags))
            done, lines, floor = position, lines + piece.lines, time + piece.lines
        if done != end:
            hole = data_end(self._log_fd, done)
            resume = min(data_start(self._log_fd, hole), end) if hole < self._log_size() else end
            raise self._expired(f"the bytes {done} to {resume} of its log are gone", resume)

    def _restarts_at(self, start: int, offset: int, end: int) -> bool:
        """Return whether text without entries is read from a cursor on, rather than from its start.

        Args:
            start: Where the text begins.
            offset: The cursor.
            end: Where the text ends.
        """
        if data_end(self._log_fd, start) < offset:
            return True  # behind a hole
        if not self._begins_line(offset):
            return False
        if offset - start > _MOST_RECOVERED_BYTES:
            return True  # or each page would cost a read of all text before it
        ends = (position for position, _ in self._pieces(start, end))
        return next(itertools.dropwhile(lambda position: position < offset, ends), None) != offset

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, Piece]]:
        """Yield the text between two offsets in pieces, each with where it ends; up to the first hole of the file."""
        buffer = LineBuffer()
        hole = data_end(self._log_fd, start)
        end = min(end, hole) if hole < self._log_size() else end
        position = read = start
        while text := read_at(self._log_fd, read, min(_READ_BYTES, end - read)):
            read += len(text)
            for piece in itertools.chain(buffer.feed(text), buffer.finish() if read == end else ()):
                position += len(piece.text)
                yield position, piece

    def _begins_line(self, offset: int) -> bool:
        return read_at(self._log_fd, offset - 1, 1) == b"\n"

    def _log_size(self) -> int:
        return os.fstat(self._log_fd).st_size if self._log_fd is not None else 0


def _batches(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Yield entries that follow each other and fit one page."""
    batch: list[_Span] = []
    lines = 0
    try:
        for span in spans:
            if batch and (
                lines + span.lines > MAX_PAGE_LINES
                or span.entry.end - batch[0].start > MAX_PAGE_BYTES
                or span.start != batch[-1].entry.end
            ):
                yield batch
                batch, lines = [], 0
            batch.append(span)
            lines += span.lines
    except CursorExpiredError:
        # What precedes a gap is not part of it.
        if batch:
            yield batch
        raise
    if batch:
        yield batch
