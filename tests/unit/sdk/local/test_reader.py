"""Reading logs whose files are whole, torn, damaged or cut short: every line once, or a gap that is told."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan._identity import job_hash
from tailspan.errors import CursorExpiredError, ProtocolError
from tailspan.local.capture import LineBuffer, LogWriter
from tailspan.local.index import ENTRY_BYTES, HEADER, HEADER_BYTES
from tailspan.local.index_file import IndexFile
from tailspan.local.reader import LogReader, Totals
from tailspan.logs.page import CLEAN, MAX_PAGE_LINES, LogPage
from tests.property.effort import fuzz

JOB = "20260101-000000000-aaaaaa"
MS = 10**6
T0 = 1_700_000_000_000 * MS


@contextmanager
def directory():
    """Yield a new directory; hypothesis wants one for each example."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def write(path: Path, reads: list[tuple[int, bytes, int]]) -> None:
    """Write a log from reads: stream, bytes, and the time in ms after T0."""
    log_fd = os.open(path / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    index_fd = os.open(path / "log.idx", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(index_fd, HEADER)
    writer = LogWriter(log_fd, index_fd)
    buffers = {1: LineBuffer(), 2: LineBuffer()}
    for stream, data, at_ms in reads:
        for piece in buffers[stream].feed(data):
            writer.append(piece, stream, T0 + at_ms * MS)
    for stream, buffer in buffers.items():
        for piece in buffer.finish():
            writer.append(piece, stream, T0 + 10_000 * MS)
    os.close(log_fd)
    os.close(index_fd)


def pages(
    path: Path, cursor: bytes | None = None, *, ended: bool = False, since_ms: int | None = None
) -> list[LogPage]:
    """Return all pages after a cursor."""
    with LogReader(path, JOB, ended=ended) as reader:
        return list(reader.pages("store", cursor, since_ms))


def lines(path: Path, cursor: bytes | None = None, **options: object) -> list[bytes]:
    """Return all lines after a cursor."""
    return [line for page in pages(path, cursor, **options) for line in page.lines]


def until_gap(path: Path) -> tuple[list[bytes], bytes | None]:
    """Return the lines before the first gap, and where to go on after it."""
    seen: list[bytes] = []
    with LogReader(path, JOB, ended=True) as reader:
        try:
            for page in reader.pages("store"):
                seen += page.lines
        except CursorExpiredError as error:
            return seen, error.resume_cursor
    raise AssertionError("there is no gap")


def test_lines_have_times_streams_and_uids(tmp_path):
    """Each read is a run with its own time, stream and flags; lines count up in ns and in uid."""
    write(tmp_path, [(1, b"a\nb\n", 0), (2, b"\x1b[31mred\n", 1), (1, b"end", 2)])
    (page,) = pages(tmp_path)
    prefix = job_hash("store", JOB)
    assert page.lines == [b"a", b"b", b"\x1b[31mred", b"end"]
    assert page.times_unix_nano() == [T0, T0 + 1, T0 + MS, T0 + 10_000 * MS]
    assert page.uids() == [
        f"{prefix}-000000000000-0000",
        f"{prefix}-000000000000-0001",
        f"{prefix}-000000000004-0000",
        f"{prefix}-00000000000d-0000",
    ]
    assert [(run.stream, run.flags) for run in page.runs] == [(1, CLEAN), (2, 0), (1, CLEAN)]
    assert page.cursor == b"16"
    with LogReader(tmp_path, JOB, ended=False) as reader:
        assert reader.totals() == Totals(4, T0, T0 + 10_000 * MS)


READS = st.lists(
    st.tuples(
        st.sampled_from([1, 2]),
        st.binary(min_size=1, max_size=8).map(lambda data: data.replace(b"x", b"\n")),
        st.integers(0, 9),
    ),
    max_size=12,
)


@given(READS)
def test_every_cursor_resumes_exactly(reads):
    """Read from the start, or from the cursor after any entry: the same lines, each once, with the same uids."""
    with directory() as path:
        write(path, reads)
        whole = pages(path)
        uids = [uid for page in whole for uid in page.uids()]
        assert len(set(uids)) == len(uids)
        ends = [int(run.uid_prefix.split("-")[1], 16) for page in whole for run in page.runs]
        before = 0
        counts = [run.lines for page in whole for run in page.runs]
        for start, count in zip(ends, counts, strict=True):
            rest = [uid for page in pages(path, str(start).encode()) for uid in page.uids()]
            assert rest == uids[before:]
            before += count


def test_text_without_entries_resumes_exactly():
    """Also where it has more lines than an entry may have, and the cursor is an entry's that is lost."""
    with directory() as path:
        text = b"".join(b"%d %s\n" % (n, b"x" * (n * 7919 % 90)) for n in range(14_000))
        write(path, [])
        (path / "log").write_bytes(text)
        whole = pages(path, str(text.index(b"\n", 60_000) + 1).encode(), ended=True)
        assert len(whole) > 1
        for number, page in enumerate(whole):
            rest = pages(path, page.cursor, ended=True)
            assert [uid for one in rest for uid in one.uids()] == [
                uid for one in whole[number + 1 :] for uid in one.uids()
            ]


@given(READS, st.integers(0, 400))
def test_an_index_torn_anywhere_loses_no_line(reads, keep):
    """While the job runs, a torn index ends early; once its supervisor is gone, the rest is recovered."""
    with directory() as path:
        write(path, reads)
        whole = lines(path)
        text = (path / "log").read_bytes()
        os.truncate(path / "log.idx", min(keep, (path / "log.idx").stat().st_size))
        seen = lines(path)
        assert seen == whole[: len(seen)]
        if len(text) > 0:
            recovered = pages(path, ended=True)
            assert b"".join(line.replace(b"\n", b"") for page in recovered for line in page.lines) == text.replace(
                b"\n", b""
            )
            assert [page.uids() for page in pages(path, ended=True)] == [page.uids() for page in recovered]
            cursor = pages(path)[-1].cursor if seen else None
            after = [uid for page in pages(path, cursor, ended=True) for uid in page.uids()]
            assert after == [uid for page in recovered for uid in page.uids()][len(seen) :]
            assert lines(path, recovered[-1].cursor, ended=True) == []


@given(READS, st.integers(0, 100))
def test_a_log_cut_short_is_a_gap_that_is_told(reads, keep):
    """What is left of the log is read, and then the error says where reading can go on."""
    with directory() as path:
        write(path, reads)
        whole = lines(path)
        size = (path / "log").stat().st_size
        runs = [run for page in pages(path) for run in page.runs]
        ends = [int(run.uid_prefix.split("-")[1], 16) for run in runs[1:]] + [size]
        left = sum(run.lines for run, end in zip(runs, ends, strict=False) if end <= keep)
        os.truncate(path / "log", min(keep, size))
        if keep >= size:
            assert lines(path) == whole
            return
        seen, resume = until_gap(path)
        assert seen == whole[:left]
        assert resume == str(size).encode()
        assert lines(path, resume, ended=True) == []


def test_lines_after_a_truncation_are_read(tmp_path):
    """Somebody empties the log of a running job: what was there is a gap, what comes is read."""
    log, index = tmp_path / "log", tmp_path / "log.idx"
    index.write_bytes(HEADER)
    log.touch()
    writer = LogWriter(os.open(log, os.O_WRONLY), os.open(index, os.O_WRONLY))
    buffer = LineBuffer()
    for data in (b"one\n", b"two\n"):
        writer.append(buffer.feed(data)[0], 1)
    log.write_bytes(b"")
    writer.append(buffer.feed(b"three\n")[0], 1)
    with pytest.raises(CursorExpiredError, match="bytes 0 to 8 of its log are gone") as caught:
        lines(tmp_path)
    assert lines(tmp_path, caught.value.resume_cursor) == [b"three"]


def test_a_damaged_entry_loses_no_line(tmp_path):
    """The log itself says what lies between the entries that are whole: once for each cursor, and always the same."""
    write(tmp_path, [(1, b"one\n", 0), (1, b"two\n", 1), (1, b"three\n", 2), (1, b"four\n", 3)])
    whole = pages(tmp_path)[0]
    with open(tmp_path / "log.idx", "r+b") as file:
        file.seek(HEADER_BYTES + ENTRY_BYTES + 3)
        file.write(b"\xff")
    (page,) = pages(tmp_path)
    assert page.lines == whole.lines
    assert page.uids()[:2] == whole.uids()[:2]
    assert page.times_unix_nano() == [T0, T0 + 2 * MS, T0 + 2 * MS + 1, T0 + 3 * MS]
    assert [lines(tmp_path, cursor) for cursor in (b"4", b"8", b"14")] == [
        [b"two", b"three", b"four"],
        [b"three", b"four"],
        [b"four"],
    ]
    assert lines(tmp_path, since_ms=T0 // MS + 3) == [b"four"]


def test_an_index_that_was_emptied_loses_no_line(tmp_path):
    """Somebody empties the index of a running job: with its next entry all lines are there, after any cursor."""
    log, index = tmp_path / "log", tmp_path / "log.idx"
    index.write_bytes(HEADER)
    log.touch()
    writer = LogWriter(os.open(log, os.O_WRONLY), os.open(index, os.O_WRONLY))
    buffer = LineBuffer()
    for data in (b"one\n", b"two\n"):
        writer.append(buffer.feed(data)[0], 1)
    index.write_bytes(b"")
    assert lines(tmp_path) == []
    assert lines(tmp_path, b"4") == []
    assert lines(tmp_path, b"4", ended=True) == [b"two"]
    for data in (b"three\n", b"four\n"):
        writer.append(buffer.feed(data)[0], 1)
    assert lines(tmp_path) == [b"one", b"two", b"three", b"four"]
    assert lines(tmp_path, b"4") == [b"two", b"three", b"four"]
    with pytest.raises(CursorExpiredError, match="not the one that the cursor was made with"):
        lines(tmp_path, b"5")


def test_text_that_has_neither_entry_nor_bytes_is_a_gap(tmp_path):
    """An entry is damaged and its text cut off: what follows can be read from the error's cursor."""
    write(tmp_path, [(1, b"one\n", 0), (1, b"two\n", 1), (1, b"three\n", 2)])
    with open(tmp_path / "log.idx", "r+b") as file:
        file.seek(HEADER_BYTES + ENTRY_BYTES + 3)
        file.write(b"\xff")
    os.truncate(tmp_path / "log", 6)
    seen, resume = until_gap(tmp_path)
    assert (seen, resume) == ([b"one"], b"14")


def test_files_that_are_gone(tmp_path):
    """Without index the log is recovered; without log its lines are a gap; without both there are none."""
    write(tmp_path, [(1, b"one\ntwo\n", 0)])
    (tmp_path / "log.idx").unlink()
    assert lines(tmp_path) == []
    assert lines(tmp_path, ended=True) == [b"one", b"two"]
    (tmp_path / "log").unlink()
    assert lines(tmp_path, ended=True) == []
    write(tmp_path, [(1, b"one\n", 0)])
    (tmp_path / "log").unlink()
    with pytest.raises(CursorExpiredError):
        lines(tmp_path)


def test_a_foreign_cursor_is_refused_with_a_place_to_go_on(tmp_path):
    """A cursor that is none, or beyond the log, or within an entry."""
    write(tmp_path, [(1, b"one\n", 0), (1, b"two\n", 1)])
    for cursor, resume in ((b"nonsense", None), (b"-1", None), (b"99", b"8"), (b"5", b"4")):
        with pytest.raises(CursorExpiredError) as caught:
            lines(tmp_path, cursor)
        assert caught.value.resume_cursor == resume


def test_a_newer_index_is_refused(tmp_path):
    """A format that this version does not know is not guessed at."""
    (tmp_path / "log.idx").write_bytes(HEADER[:8] + b"\x63" + HEADER[9:])
    with pytest.raises(ProtocolError, match="newer version"):
        lines(tmp_path)


@given(READS, st.integers(-1, 10))
def test_since_ms_finds_the_lines_from_that_time_on(reads, since):
    """Lines at or after the time, each once, in order; a clock that was set back does not hide any."""
    with directory() as path:
        # A step back of hours in the middle.
        moved = [
            (s, data, at if i < 6 else at - 3_600_000)
            for i, (s, data, at) in enumerate(sorted(reads, key=lambda r: r[2]))
        ]
        for chosen in (sorted(reads, key=lambda read: read[2]), moved):
            for name in ("log", "log.idx"):
                (path / name).unlink(missing_ok=True)
            write(path, chosen)
            since_ms = T0 // MS + since
            expected = [
                line
                for page in pages(path)
                for line, time in zip(page.lines, page.times_unix_nano(), strict=True)
                if time // MS >= since_ms
            ]
            assert lines(path, since_ms=since_ms) == expected


@fuzz(60)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8))
def test_pages_are_bounded(counts):
    """A page has at most 5,000 lines and 1 MiB."""
    with directory() as path:
        write(path, [(1, b"%0100d\n" % 0 * count, at) for at, count in enumerate(counts)])
        found = pages(path)
        assert all(len(page.lines) <= MAX_PAGE_LINES and sum(map(len, page.lines)) <= 1 << 20 for page in found)
        assert sum(len(page.lines) for page in found) == sum(counts)
        assert all(sum(run.lines for run in page.runs) == len(page.lines) for page in found)


def test_a_disk_that_cannot_be_read_costs_no_file(tmp_path, monkeypatch):
    """An agent tries again and again: each try closes what it had opened."""
    (tmp_path / "log.idx").write_bytes(HEADER)

    def fail(*_):
        raise OSError(errno.EIO, "no luck")

    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="no luck"):
                IndexFile(tmp_path / "log.idx")
    assert len(os.listdir("/dev/fd")) == before
