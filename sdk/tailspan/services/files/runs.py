"""`RunBook`: which runs wrote a file that is used again, by truncating it or by appending to it.

Nothing in such a file says that its text is another run's, so what it held is stored: a digest of its beginning and of
its last known end. A text without that digest is a new content; its runs have other ids. Every process that reads the
jobs keeps the same book, one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tailspan.services._log_file import FileAccess, LogFile, LogPosition
from tailspan.services.files.ends import RunEnd, marker_end

__all__ = ["Content", "FileRun", "RunBook"]

_OLD_CONTENTS = 4
_MOST_RUNS = 1_000
_CHUNK = 1 << 20
_MAX_LINE = 64 << 10
_MAX_BOOK_BYTES = 64 << 20
_SAVE_EACH_S = 30.0
_FORGOTTEN_NS = 40 * 86_400 * 10**9  # longer than a month, in which some runs come once


class FileRun(msgspec.Struct):
    """A part of a file that one run wrote.

    Attributes:
        start: Where it begins.
        end: Where the line with its end marker ends; None: it has none yet.
        ended: How it ended, if an end marker says so.
    """

    start: int
    end: int | None = None
    ended: RunEnd | None = None


class Content(msgspec.Struct):
    """What a file holds until it is truncated, replaced or rotated.

    Attributes:
        mark: Distinguishes it from the file's other contents; empty for the first one.
        inode: The file that has it.
        size: How many bytes of it are known.
        check: See `LogFile.check`.
        written_ns: When it was written last, as the file system has it.
        runs: Its runs, oldest first.
    """

    mark: str
    inode: int
    size: int = 0
    check: bytes = b""
    written_ns: int = 0
    runs: list[FileRun] = msgspec.field(default_factory=list)

    @property
    def position(self) -> LogPosition:
        """Where the known text ends."""
        return LogPosition(offset=self.size, inode=self.inode, check=self.check)


class _Book(msgspec.Struct):
    contents: dict[str, list[Content]] = msgspec.field(default_factory=dict)


class RunBook:
    """The contents and runs of files, stored in a file of the agent's state directory."""

    def __init__(self, path: Path, access: FileAccess, marker: re.Pattern[bytes] | None) -> None:
        """Read nothing yet.

        Args:
            path: The file of the book.
            access: Which log files may be read.
            marker: Ends the runs of a file that is appended to; None: a content is one run.
        """
        self._path = path
        self._access = access
        self._marker = marker
        self._book = _Book()
        self._stored_at: tuple[int, int] | None = None
        self._looked: dict[str, tuple[int, int, int]] = {}
        self._saved_s = float("-inf")
        self._changed = self._must_save = False

    def update(self, root: Path, paths: Mapping[str, os.stat_result]) -> Mapping[str, list[Content]]:
        """Return the contents of files, the present one last, after what changed was read.

        Args:
            root: The directory of the files.
            paths: The files that there are.
        """
        with self._locked():
            self._load()
            for path in self._book.contents.keys() - paths.keys():
                # It may come back: cron's next run makes it again.
                known = self._book.contents[path]
                if not known or time.time_ns() - known[-1].written_ns > _FORGOTTEN_NS:
                    del self._book.contents[path]
            for path, found in paths.items():
                looked = found.st_ino, found.st_size, found.st_mtime_ns
                if self._looked.get(path) != looked or path not in self._book.contents:
                    self._look(path, root / path)
                    self._looked[path] = looked
            if self._must_save or (self._changed and time.monotonic() - self._saved_s > _SAVE_EACH_S):
                self._save()
        return self._book.contents

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the book's lock; a process that may not write there reads only."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _load(self) -> None:
        try:
            found = self._path.stat()
        except OSError:
            return
        if (found.st_ino, found.st_mtime_ns) == self._stored_at or found.st_size > _MAX_BOOK_BYTES:
            return
        # What cannot be read is made again: at worst, one run comes once more.
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
            self._book = msgspec.json.decode(self._path.read_bytes(), type=_Book)
            self._looked.clear()
        self._stored_at = found.st_ino, found.st_mtime_ns

    def _save(self) -> None:
        place = self._path.with_suffix(".new")
        self._saved_s = time.monotonic()
        with contextlib.suppress(OSError):
            place.write_bytes(msgspec.json.encode(self._book))
            place.chmod(0o600)
            place.replace(self._path)
            found = self._path.stat()
            self._stored_at = found.st_ino, found.st_mtime_ns
            self._changed = self._must_save = False

    def _look(self, path: str, file: Path) -> None:
        """Bring the contents of a file up to date."""
        contents = self._book.contents.setdefault(path, [])
        with LogFile(file, self._access) as log:
            if not log.exists:
                return
            current = contents[-1] if contents else None
            if current is None or not self._goes_on(current, log):
                # A run whose last lines were not known yet may be in the rotated file.
                if current is not None:
                    self._look_at_rotated(log, current)
                current = Content(_new_mark(contents), log.inode)
                contents.append(current)
                del contents[: -_OLD_CONTENTS - 1]
                self._scan(current, log, is_first=len(contents) == 1)
                self._must_save = True
            elif (log.size, log.inode, log.stored_time_ns) != (current.size, current.inode, current.written_ns):
                self._scan(current, log, is_first=False)

    def _goes_on(self, content: Content, log: LogFile) -> bool:
        # A run often writes the very text of the run before it.
        is_again = log.size == content.size > 0 and log.stored_time_ns != content.written_ns
        return log.has(content.position) and not (is_again and self._marker is None)

    def _look_at_rotated(self, log: LogFile, content: Content) -> None:
        for old in log.rotated():
            with old:
                if old.size > content.size and old.has(content.position):
                    self._scan(content, old, is_first=False)
                    return

    def _scan(self, content: Content, log: LogFile, *, is_first: bool) -> None:
        """Find the runs in what was added to a content.

        Args:
            content: The content.
            log: The file that has it.
            is_first: Whether nothing is known of the file: what is before its last run is the past then.
        """
        runs = content.runs or [FileRun(0)]
        if self._marker is not None:
            found = list(_markers(log, _line_start(log, max(runs[-1].start, content.size)), self._marker))
            if is_first:
                # Other runs than the last are the past; that one begins behind the marker before it.
                is_over = bool(found) and found[-1][0] == log.size
                found, before = (found[-1:], found[:-1]) if is_over else ([], found)
                runs = [FileRun(before[-1][0] if before else 0)]
            elif runs[-1].end is not None:
                runs.append(FileRun(runs[-1].end))
            for end, match in found:
                runs[-1].end, runs[-1].ended = end, marker_end(match, log.modified_unix_nano)
                self._must_save = True
                runs.append(FileRun(end))
            if len(runs) > 1 and runs[-1].start >= log.size:
                runs.pop()
        content.runs = runs[-_MOST_RUNS:]
        content.inode, content.size, content.check = log.inode, log.size, log.check(log.size)
        content.written_ns = log.stored_time_ns
        self._changed = True


def _line_start(log: LogFile, offset: int) -> int:
    """Return where the line begins that an offset is in; the offset itself in a line that is too long."""
    start, text = log.tail(_MAX_LINE, offset)
    cut = text.rfind(b"\n") + 1
    return start + cut if cut or not start else offset


def _markers(log: LogFile, start: int, marker: re.Pattern[bytes]) -> Iterator[tuple[int, re.Match[bytes]]]:
    """Yield the complete lines from an offset on that have an end marker, and where these lines end."""
    while start < log.size:
        begin, data = log.tail(_CHUNK, min(start + _CHUNK, log.size))
        data = data[start - begin :]
        cut = data.rfind(b"\n") + 1
        if not cut:
            if start + len(data) >= log.size:
                return
            start += len(data)
            continue
        done = 0
        while match := marker.search(data, done, cut):
            done = data.find(b"\n", max(match.start(), match.end() - 1)) + 1
            yield start + done, match
        start += cut


def _new_mark(contents: list[Content]) -> str:
    """Return the mark of a new content: the time at which it was found."""
    if not contents:
        return ""
    mark = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    known = {content.mark for content in contents}
    return next(one for one in (mark, *(f"{mark}.{number}" for number in range(1, 99))) if one not in known)
