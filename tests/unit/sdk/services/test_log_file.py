"""Log files that other programs write: rotated, truncated, sparse, endless, or no files at all."""

from __future__ import annotations

import gzip
import os
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from tailspan.errors import AuthError
from tailspan.local import index_file
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES
from tailspan.services._log_file import FileAccess, LogFile, LogGapError, LogPosition, SeenTimes, follow_log

TIB = 1 << 40
WAYS = {"identity": "test", "log": "job"}


class Reader:
    """Reads as an agent does: each time from where the last read stopped.

    Attributes:
        lines: All lines so far.
        uids: Their uids.
        gaps: How often lines were gone.
    """

    def __init__(self, path: Path, **options: object) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.uids: list[str] = []
        self.times: list[int] = []
        self.gaps = 0
        self.position = LogPosition()
        self._options = {"access": FileAccess(), "ended": False, **WAYS, **options}

    def read(self, most: int | None = None, **options: object) -> list[bytes]:
        """Read at most some pages; return their lines."""
        found: list[bytes] = []
        try:
            for page, position in islice(follow_log(self.path, self.position, **self._options | options), most):
                assert page.line_count == len(page.lines) == len(page.uids()) == len(page.times_unix_nano())
                found += page.lines
                self.uids += page.uids()
                self.times += page.times_unix_nano()
                self.position = LogPosition.unpack(list(position))
        except LogGapError as gap:
            self.gaps += 1
            self.position = gap.position
            return found + self.read(most, **options)
        self.lines += found
        return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log is."""
    return tmp_path / "run.log"


def by_renaming(path: Path) -> None:
    """Rotate as logrotate does with ``create``."""
    for number in range(8, 0, -1):
        if (old := path.with_name(f"run.log.{number}")).exists():
            old.rename(path.with_name(f"run.log.{number + 1}"))
    path.rename(path.with_name("run.log.1"))
    path.touch()


def by_copying(path: Path) -> None:
    """Rotate as logrotate does with ``copytruncate``."""
    by_renaming(path)
    shutil.copyfile(path.with_name("run.log.1"), path.with_name("copy"))
    path.unlink()
    path.with_name("run.log.1").rename(path)
    path.with_name("copy").rename(path.with_name("run.log.1"))
    os.truncate(path, 0)


@pytest.mark.parametrize("rotate", [by_renaming, by_copying])
@pytest.mark.parametrize("seed", range(4))
def test_each_line_is_read_once_through_rotation(path: Path, rotate: Callable[[Path], None], seed: int) -> None:
    """Whatever is written and rotated between two reads, no line is missing or repeated, and each has its own uid."""
    chance = random.Random(seed)
    reader = Reader(path)
    path.write_bytes(b"first\n")
    written = reader.read()
    rotated = 0  # since the last read; only eight old files are kept
    for _ in range(100):
        match chance.randrange(5):
            case 0 if rotated < 8:
                rotate(path)
                rotated += 1
            case 1 | 2:
                with path.open("ab") as log:
                    for _ in range(chance.randrange(30)):
                        written.append(b"line %d \xff" % len(written))
                        log.write(written[-1] + b"\n")
            case _:
                reader.read()
                rotated = 0
        # Times of files are as exact as the kernel's tick: a rotation within one is not ordered.
        for number, file in enumerate(sorted(path.parent.iterdir(), key=lambda one: one.name)):
            moment = 10**18 + (100 - number) * 10**9 if file != path else 10**18 + 200 * 10**9
            os.utime(file, ns=(moment, moment))
    reader.read(ended=True)
    assert reader.lines == written
    assert len(set(reader.uids)) == len(written)
    assert reader.gaps == 0
    assert reader.times == sorted(reader.times)


def test_old_writer_after_rotation(path: Path) -> None:
    """A program writes to the renamed file until it opens the new one: those lines come too."""
    with path.open("ab", buffering=0) as log:
        log.write(b"a\nhalf")
        reader = Reader(path)
        assert reader.read() == [b"a"]
        by_renaming(path)
        log.write(b" line\nb\n")
        assert reader.read() == [b"half line", b"b"]
        log.write(b"c")
    path.write_bytes(b"d\n")
    os.utime(path, ns=(10**18 * 3, 10**18 * 3))
    assert reader.read() == [b"c", b"d"]
    assert reader.gaps == 0


@pytest.mark.parametrize("packed", [False, True])
def test_truncation_is_a_gap_and_reading_goes_on(path: Path, packed: bool) -> None:
    """Truncated, also to a text that is longer than what was read, or rotated into an archive: what is new comes."""
    path.write_bytes(b"one\ntwo\n")
    reader = Reader(path)
    reader.read()
    if packed:
        path.with_name("run.log.1.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(b"another text that is longer\n")
    assert reader.read() == [b"another text that is longer"]
    path.write_bytes(b"")
    reader.read()
    path.write_bytes(b"x\n")
    assert reader.read() == [b"x"]
    assert reader.gaps == 2
    assert len(set(reader.uids)) == len(reader.uids) == 4


def test_half_line_waits_for_its_end(path: Path) -> None:
    """Text without a newline is an open line, then a line; a progress bar is one line."""
    reader = Reader(path)
    assert reader.read() == []
    path.write_bytes(b"10%\r50%")
    assert reader.read() == []
    with LogFile(path) as log:
        line = log.open_line(**WAYS)
    assert line is not None
    assert line.text == b"10%\r50%"
    with path.open("ab") as log:
        log.write(b"\r100%\r\nrest")
    assert reader.read() == [b"10%\r50%\r100%\r"]
    assert reader.read(ended=True) == [b"rest"]
    with LogFile(path) as log:
        assert log.open_line(**WAYS) is not None


def test_pages_and_long_lines_have_the_same_uids_from_every_position(path: Path) -> None:
    """Pages keep their limits, a line of 3 MiB is cut, and a read from any position has the same lines and uids."""
    path.write_bytes(b"x\n" * 12_000 + b"y" * (3 << 20) + b"\n" + b"\0" * 70 + b"z\nend \xf0\x9f")
    reader = Reader(path, ended=True)
    positions = []
    while reader.read(1):
        positions.append((reader.position, len(reader.lines)))
    assert b"".join(reader.lines[12_000:-2]) == b"y" * (3 << 20)
    assert reader.lines[-2:] == [b"z", b"end \xf0\x9f"]
    for page, _ in follow_log(path, LogPosition(), access=FileAccess(), ended=True, **WAYS):
        assert page.line_count <= MAX_PAGE_LINES
        assert len(page.joined()) <= MAX_PAGE_BYTES + 1
    for position, count in positions:
        again = Reader(path, ended=True)
        again.position = position
        again.read()
        assert (again.lines, again.uids) == (reader.lines[count:], reader.uids[count:])


def test_times_are_those_of_the_first_read(path: Path) -> None:
    """A line has the time of the last write before it was read first, also when it is read again."""
    seen = SeenTimes()
    reader = Reader(path, seen=seen)
    for moment in range(1, 800):
        with path.open("ab") as log:
            log.write(b"line\n")
        os.utime(path, ns=(moment * 1000, moment * 1000))
        reader.read()
    assert reader.times[:3] == [1000, 2000, 3000]
    whole = Reader(path, seen=seen)
    whole.read()
    assert whole.lines == reader.lines
    assert whole.uids == reader.uids
    assert whole.times == sorted(whole.times)
    assert whole.times[-1] == reader.times[-1]
    os.utime(path, ns=(10**30 // 10**11, 10**30 // 10**11))
    with LogFile(path) as log:
        assert log.modified_unix_nano < 10**19  # not in the future


def test_only_what_the_file_holds_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of 1 TiB is skipped: a program that goes on at its old offset after a truncation leaves one."""
    reads: list[int] = []
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        reads.append(size)
        assert len(reads) < 100, "the loop does not end"
        return real(fd, size, offset)

    monkeypatch.setattr(index_file.os, "pread", pread)
    with path.open("wb") as log:
        log.write(b"first\n")
        log.truncate(TIB)
    reader = Reader(path)
    assert reader.read() == [b"first"]
    assert reader.read() == []
    with path.open("r+b") as log:
        log.seek(TIB)
        log.write(b"second\n")
    assert reader.read() == [b"second"]
    assert reader.gaps == 0


def test_nuls_without_holes_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system reports no holes, one read searches a bounded number of NULs, and the next goes on there."""
    monkeypatch.setattr("tailspan.services._log_file.data_start", lambda fd, offset: offset)
    monkeypatch.setattr("tailspan.services._log_file._MAX_NULS", 3 << 20)
    with path.open("wb") as log:
        log.truncate(8 << 20)
        log.seek(8 << 20)
        log.write(b"text\n")
    reader = Reader(path)
    assert reader.read() == [b"text"]
    assert reader.gaps == 2


def test_text_over_nuls_is_read_once_it_is_there(path: Path) -> None:
    """A file that is allocated before it is written ends with NULs: what takes their place is read."""
    path.write_bytes(b"a\n" + b"\0" * 100)
    reader = Reader(path)
    assert reader.read() == [b"a"]
    with path.open("r+b") as log:
        log.seek(2)
        log.write(b"b\n")
    assert reader.read() == [b"b"]


def test_other_files_are_not_read(tmp_path: Path) -> None:
    """Links, FIFOs, devices and directories are no logs, nor are files outside the root or of another user."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret\n")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(secret)
    (root / "zero").symlink_to("/dev/zero")
    (root / "up").symlink_to(tmp_path)
    (root / "directory").mkdir()
    os.mkfifo(root / "fifo")
    (root / "mine").write_bytes(b"mine\n")
    for name in ("link", "zero", "up/secret", "directory", "fifo", "missing", "mine/below"):
        assert Reader(root / name, access=FileAccess(root)).read(ended=True) == [], name
    assert Reader(Path("/dev/zero")).read() == []
    assert Reader(root / "mine", access=FileAccess(root, os.getuid())).read() == [b"mine"]
    assert Reader(root / "mine", access=FileAccess(root, os.getuid() + 1)).read() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_names_itself(path: Path) -> None:
    """A file that this user may not read is an error that names it."""
    path.write_bytes(b"x\n")
    path.chmod(0)
    with pytest.raises(AuthError, match=r"run\.log is not readable"):
        Reader(path).read()


def test_positions_of_others_are_refused() -> None:
    """What is not a position is an error, not a crash."""
    for parts in (None, [], [1, 2, 3, 4, 5], ["x"] * 5, [0, 0, b"", 0, "0"]):
        with pytest.raises(ValueError, match="position"):
            LogPosition.unpack(parts)
