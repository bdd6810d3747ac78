"""Files of a job that another program has made: sparse, endless, damaged, or no files at all.

The number of reads is counted: a time would depend on the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from tailspan.errors import CursorExpiredError, ProtocolError, TailspanError
from tailspan.local import index_file
from tailspan.local.index import HEADER, Entry, pack_entry
from tailspan.local.reader import LogReader
from tailspan.local.state import iso_time
from tailspan.local.status import quick_totals
from tailspan.local.store import JobStore, new_job_id
from tailspan.services.local import LocalService

TIB = 1 << 40
LINES = 100
TEXT = b"".join(b"line %02d\n" % number for number in range(LINES))
SIZE = len(TEXT) // LINES
NOW_NS = time.time_ns()
MOST_READS = 3000
PATIENCE_S = 60.0


def entry(number: int) -> bytes:
    return pack_entry(Entry((number + 1) * SIZE, NOW_NS + number * 1000, number + 1, 1, 0))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The directory of an ended job with a hundred lines."""
    store = JobStore(tmp_path / "state")
    directory = store.jobs / new_job_id(NOW_NS)
    directory.mkdir(parents=True)
    moment = iso_time(NOW_NS)
    (directory / "job.json").write_text('{"name": "etl", "command": ["x"]}')
    (directory / "state.json").write_text(
        f'{{"state": "FAILED", "name": "etl", "started_at": "{moment}", "finished_at": "{moment}", "end": "{moment}"}}'
    )
    (directory / "log").write_bytes(TEXT)
    (directory / "log.idx").write_bytes(HEADER + b"".join(map(entry, range(LINES))))
    (directory / "lock").touch()
    return directory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the bytes of each read of a file."""
    sizes: list[int] = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        sizes.append(len(data))
        assert len(sizes) < MOST_READS, "the loop does not end"
        return data

    real = os.pread
    monkeypatch.setattr(index_file.os, "pread", pread)
    return sizes


def read_all(directory: Path) -> tuple[int, int]:
    """Read as an agent does, from gap to gap; return the numbers of lines and of gaps."""
    lines = gaps = 0
    cursor: bytes | None = None

    async def read() -> None:
        nonlocal lines, gaps, cursor
        service = LocalService(state_dir=directory.parent.parent)
        with anyio.fail_after(PATIENCE_S):
            while True:
                try:
                    async for page in service.read_logs(directory.name, cursor):
                        lines += page.line_count
                        cursor = page.cursor
                    return
                except CursorExpiredError as error:
                    gaps += 1
                    if error.resume_cursor == cursor:
                        raise
                    cursor = error.resume_cursor

    anyio.run(read)
    return lines, gaps


def long_index(job: Path) -> None:
    os.truncate(job / "log.idx", TIB)


def long_log(job: Path) -> None:
    os.truncate(job / "log", TIB)


def long_both(job: Path) -> None:
    long_index(job)
    long_log(job)


def empty_index(job: Path) -> None:
    """A hole and nothing else, so that all text needs new entries."""
    os.truncate(job / "log.idx", 0)
    long_both(job)


def entry_behind_a_hole(job: Path) -> None:
    with (job / "log.idx").open("r+b") as file:
        file.seek(TIB)
        file.write(entry(LINES))


def hole_before_the_entries(job: Path) -> None:
    """What a supervisor leaves whose index was emptied while it wrote."""
    os.truncate(job / "log.idx", 0)
    with (job / "log.idx").open("r+b") as file:
        file.seek(len(HEADER) + 32 * (1 << 20))
        file.write(entry(LINES - 1))


@pytest.mark.parametrize(
    "change", [long_index, long_log, long_both, empty_index, entry_behind_a_hole, hole_before_the_entries]
)
def test_a_sparse_file_is_read_in_a_few_steps(job: Path, reads: list[int], change: Callable[[Path], None]) -> None:
    """``truncate -s 1T`` costs nothing, so reading it must cost little: all text that is there is read."""
    change(job)
    lines, gaps = read_all(job)
    # The block at the end of the text is padded with NULs, which make a line.
    assert LINES <= lines <= LINES + 1
    assert gaps <= 2
    LocalService(state_dir=job.parent.parent).status(job.name)
    assert sum(reads) < 16 << 20


def test_text_behind_a_hole_is_read(job: Path, reads: list[int]) -> None:
    """The hole is a gap; what was written behind it is not lost."""
    with (job / "log").open("r+b") as file:
        file.seek(1 << 36)
        file.write(b"one\ntwo\n")
    lines, gaps = read_all(job)
    assert gaps == 1
    assert lines >= LINES + 2


@pytest.mark.parametrize("filling", [os.urandom, bytes])
def test_an_index_of_garbage_is_refused(job: Path, filling: Callable[[int], bytes]) -> None:
    """A power failure damages seconds, not hundreds of thousands of entries; the job's row is shown all the same."""
    with (job / "log.idx").open("ab") as file:
        file.write(filling(10 << 20))
    with pytest.raises(ProtocolError, match="damaged entries in a row"):
        read_all(job)
    with LogReader(job, job.name, ended=True) as reader:
        assert not reader.is_plain
    assert rows(job) == [None]


def test_a_damaged_end_is_passed_over(job: Path) -> None:
    """As after a power failure: the entries before it count."""
    with (job / "log.idx").open("ab") as file:
        file.write(bytes(1 << 20) + os.urandom(1 << 20))
    assert read_all(job) == (LINES, 0)


def test_a_log_that_is_much_longer_than_its_index_has_no_quick_count(job: Path) -> None:
    """A list must not read hundreds of megabytes of one job; a reader gets them page by page."""
    (job / "log.idx").unlink()
    with (job / "log").open("ab") as file:
        for _ in range(2):
            file.write(b"x" * (1 << 20) + b"\n")
    assert rows(job) == [None]
    assert read_all(job) == (LINES + 2, 0)


def rows(job: Path) -> list[int | None]:
    """Return the line counts of the list."""

    async def listed() -> list[int | None]:
        service = LocalService(state_dir=job.parent.parent)
        return [row.lines async for page in service.list_jobs() for row in page]

    return anyio.run(listed)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, TIB)


def items(path: Path) -> None:
    path.write_text('{"state": "SUCCEEDED", "x": [' + "[]," * 300_000 + "0]}")


@pytest.mark.parametrize("name", ["log", "log.idx", "state.json", "job.json", "lock"])
@pytest.mark.parametrize("make", [fifo, link_to_a_device, directory, sparse, items])
def test_something_else_in_place_of_a_file(job: Path, name: str, make: Callable[[Path], None]) -> None:
    """It counts as a missing or damaged file: no read waits, follows it, or takes memory for it."""
    (job / name).unlink()
    make(job / name)
    service = LocalService(state_dir=job.parent.parent)
    assert service.status(job.name).job_id == job.name
    assert len(rows(job)) == 1
    try:
        read_all(job)
    except TailspanError:
        assert name in ("log", "log.idx")


def test_other_entries_of_the_directory_are_not_jobs(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: their names are not kept."""

    class Names:
        """What `os.scandir` returns, for a directory that would take minutes to make."""

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            found = os.fspath(job.parent)
            return (entry for _ in range(1000) for entry in real(found))

        def __exit__(self, *_: object) -> None:
            return

    (job.parent / "not-a-job").mkdir()
    real = os.scandir
    store = JobStore(job.parent.parent)
    monkeypatch.setattr("tailspan.local.store.os.scandir", lambda _: Names())
    assert set(store.job_ids()) == {job.name}


def test_totals_of_a_plain_log(job: Path) -> None:
    """What all of this must not change."""
    store = JobStore(job.parent.parent)
    totals = quick_totals(store.load(job.name))
    assert totals is not None
    assert (totals.lines, totals.first_unix_nano) == (LINES, NOW_NS)
