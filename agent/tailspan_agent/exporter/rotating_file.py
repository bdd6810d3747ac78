"""`RotatingFile`: an append-only file of lines, rotated by size. After a crash each line is complete or absent.

    {stem}.jsonl            the newest lines
    {stem}-000001.jsonl     older lines; the number counts up, so names sort by age and an open reader loses nothing

A line is written only after ``fdatasync``: an acknowledgement that survives a power failure needs a line that does.
A partial line, left by a crash or a full disk, is truncated before the next line; it was never acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from pathlib import Path

from tailspan._private_dirs import make_private

__all__ = ["RotatingFile", "existing_files"]

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def existing_files(directory: Path, stem: str) -> list[Path]:
    """Return the files of a stem, oldest lines first."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)\.jsonl")
    rotated = [
        (int(match[1]), path) for path in directory.glob(f"{stem}-*.jsonl") if (match := pattern.fullmatch(path.name))
    ]
    newest = directory / f"{stem}.jsonl"
    return [path for _, path in sorted(rotated)] + ([newest] if newest.exists() else [])


class RotatingFile:
    """A file of lines and its rotated predecessors. Thread-safe; for one process at a time.

    Args:
        directory: Created with the first line, readable by its owner only.
        stem: Beginning of the file names.
        max_size: Size in bytes at which a file is rotated; only a single longer line exceeds it.
        keep: Number of files to keep, including the newest; None keeps all.
    """

    def __init__(self, directory: Path, stem: str, *, max_size: int, keep: int | None) -> None:
        self.path = directory / f"{stem}.jsonl"
        self._directory = directory
        self._stem = stem
        self._max_size = max_size
        self._keep = keep
        self._lock = threading.Lock()
        self._file: int | None = None

    def append(self, line: bytes) -> None:
        """Write one line, including its newline, and wait until it is on disk.

        Raises:
            OSError: The line was not written; the file is unchanged.
        """
        with self._lock:
            file = self._open()
            size = os.fstat(file).st_size
            if size and size + len(line) > self._max_size:
                self._rotate()
                file = self._open()
                size = 0
            try:
                _write_all(file, line)
                _sync(file)
            except OSError:
                # The next line would be appended to a partial one.
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)
                self._close()
                raise

    def total_bytes(self) -> int:
        """Return the total size of all files in bytes."""
        with self._lock:
            return sum(path.stat().st_size for path in existing_files(self._directory, self._stem))

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        with self._lock:
            self._close()

    def _open(self) -> int:
        if self._file is not None and not self._is_current(self._file):
            # The file was moved or deleted: start a new one, since what is written to the old one is lost.
            self._close()
        if self._file is None:
            make_private(self._directory)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = _whole_lines_size(file)
                os.ftruncate(file, size)
                if not size:
                    _sync_directory(self._directory)
            except OSError:
                os.close(file)
                raise
            self._file = file
        return self._file

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        self._close()
        rotated = [path for path in existing_files(self._directory, self._stem) if path != self.path]
        number = int(rotated[-1].stem.rpartition("-")[2]) + 1 if rotated else 1
        target = self._directory / f"{self._stem}-{number:06d}.jsonl"
        self.path.rename(target)
        if self._keep is not None:
            rotated.append(target)
            for old in rotated[: len(rotated) - self._keep + 1]:
                old.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _sync_directory(directory: Path) -> None:
    """Make the name of a new file as durable as its content."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(file, view)
        if not written:
            raise OSError(errno.ENOSPC, "no space to write")
        view = view[written:]


def _whole_lines_size(file: int) -> int:
    """Return the size up to the last newline, inclusive."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
