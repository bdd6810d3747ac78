"""How a job's output is cut into lines and entered: pure parts, checked on any output and any way of reading it."""

from __future__ import annotations

import itertools
import os

from hypothesis import given
from hypothesis import strategies as st

from tailspan.local import capture, index
from tailspan.local.capture import LineBuffer, LogWriter, Piece, pieces_of
from tailspan.local.index import NO_NEWLINE, Entry, entry_time, pack_entry, text_flags, unpack_entry

OUTPUT = st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\0", b"\x1b[0m", b"\xff", "ü€😀".encode(), b"line\n"])).map(
    b"".join
)


# So small that small outputs reach them.
LIMITS = {"max_bytes": 16, "max_lines": 4}


def fed(output: bytes, cuts: list[int]) -> list[Piece]:
    """Return the pieces of an output that was read in parts."""
    buffer = LineBuffer(**LIMITS)
    bounds = sorted({0, len(output), *(cut % (len(output) + 1) for cut in cuts)})
    # What is left of an earlier read behind a shorter one belongs to nobody.
    reads = [(bytearray(output[low:high] + b"stale\n"), high - low) for low, high in itertools.pairwise(bounds)]
    pieces = [piece for read, size in reads for piece in buffer.feed(read, size)]
    return pieces + buffer.finish()


def lines_of(pieces: list[Piece]) -> list[bytes]:
    """Return the lines as a reader will see them."""
    lines: list[bytes] = []
    for piece in pieces:
        lines += piece.text.split(b"\n") if piece.flags & NO_NEWLINE else piece.text.split(b"\n")[:-1]
    return lines


@given(OUTPUT, st.lists(st.integers(0, 1000)))
def test_no_byte_is_lost_or_added(output, cuts):
    """However an output is read, the pieces put together are the output."""
    assert b"".join(piece.text for piece in fed(output, cuts)) == output


@given(OUTPUT, st.lists(st.integers(0, 1000)))
def test_lines_do_not_depend_on_reads(output, cuts):
    """The same output has the same lines, whether it is read at once or byte by byte."""
    assert lines_of(fed(output, cuts)) == lines_of(fed(output, [])) == lines_of(fed(output, list(range(len(output)))))


@given(OUTPUT, st.lists(st.integers(0, 1000)))
def test_a_piece_fits_an_entry_and_counts_its_lines(output, cuts):
    """Each piece is within the limits, ends at a newline or says that it does not, and counts its lines right."""
    for piece in fed(output, cuts):
        assert 0 < len(piece.text) <= 16 + 1
        assert 0 < piece.lines <= 4
        assert piece.text.endswith(b"\n") is not bool(piece.flags & NO_NEWLINE)
        assert piece.text.count(b"\n") + bool(piece.flags & NO_NEWLINE) == piece.lines


@given(st.lists(st.integers(0, 9)), st.integers(1, 5))
def test_all_pieces_of_short_lines_but_the_last_are_full(lengths, max_lines):
    """An entry takes 32 bytes; and what follows a piece is cut the same when it is cut for itself."""
    text = b"".join(b"x" * length + b"\n" for length in lengths)
    pieces = list(pieces_of(text, max_lines=max_lines))
    assert all(piece.lines == max_lines for piece in pieces[:-1])
    for number, piece in enumerate(pieces):
        text = text.removeprefix(piece.text)
        assert list(pieces_of(text, max_lines=max_lines)) == pieces[number + 1 :]


@given(st.text(st.sampled_from("aü€😀"), min_size=20))
def test_a_long_line_is_not_cut_within_a_character(text):
    """The parts of a long UTF-8 line are valid UTF-8."""
    assert "".join(piece.text.decode() for piece in pieces_of(text.encode(), **LIMITS)) == text


def test_a_line_of_just_the_limit_is_whole():
    """The newline does not count: 16 bytes are one line, 17 are two parts."""
    assert [piece.lines for piece in pieces_of(b"x" * 16 + b"\n", **LIMITS)] == [1]
    assert [piece.text for piece in pieces_of(b"x" * 17 + b"\n", **LIMITS)] == [b"x" * 16, b"x\n"]


def test_progress_is_shown_up_to_its_last_state():
    """What a progress bar has drawn is entered before its newline, except a last carriage return on its own."""
    buffer = LineBuffer()
    assert not buffer.feed(b"10%\r20%\r3")
    assert buffer.progress_is_waiting
    assert buffer.progress() == [Piece(b"10%\r20%\r", 1, NO_NEWLINE)]
    assert not buffer.progress_is_waiting
    assert buffer.feed(b"0%\r") == []
    assert buffer.progress() == []
    assert buffer.feed(b"\n") == [Piece(b"30%\r\n", 1)]


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.integers(1, 4096))
def test_entry_times_never_meet(floor, now, lines):
    """An entry starts at or after the one before has ended, unless the clock was set back by a second or more."""
    time, stepped_back = entry_time(floor, now, lines)
    assert stepped_back is (floor - now >= 10**9)
    assert time >= now
    assert stepped_back or time >= floor
    assert time // 10**6 == (time + lines - 1) // 10**6
    assert time - max(now, 0 if stepped_back else floor) < 4096


@given(
    st.builds(
        Entry,
        st.integers(0, 2**64 - 1),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2),
        st.integers(0, 127),
    ),
    st.integers(0, 31),
    st.integers(1, 255),
)
def test_a_changed_byte_is_noticed(entry, position, change):
    """An entry is read as it was written; with any byte changed, or torn, it is none."""
    raw = bytearray(pack_entry(entry))
    assert unpack_entry(bytes(raw)) == entry
    assert unpack_entry(bytes(raw[:position])) is None
    raw[position] ^= change
    assert unpack_entry(bytes(raw)) is None


def test_flags_tell_what_is_to_be_cleaned():
    """Plain text has no flag, and each kind of byte its own."""
    assert text_flags(b"plain text\twith tab\n") == 0
    assert [text_flags(text) for text in (b"\xc3\xbc", b"\r", b"\x1b", b"\0")] == [
        index.NON_ASCII,
        index.CR,
        index.ESC,
        index.NUL,
    ]


def test_a_failed_write_leaves_a_gap_with_its_size(tmp_path, monkeypatch):
    """A full disk holds nothing up: what it had no room for is a gap, and what comes later stands behind it."""
    log_fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    # Stands for a disk without room: every write fails until the file is in its place.
    broken_fd = os.open("/dev/full", os.O_WRONLY)
    index_fd = os.open(tmp_path / "idx", os.O_RDWR | os.O_CREAT)
    writer = LogWriter(broken_fd, index_fd)
    writer.append(Piece(b"a\nb\n", 2), 1, now_unix_nano=5_000_000)
    writer.append(Piece(b"c\n", 1), 1, now_unix_nano=5_000_000)
    assert (writer.lost_bytes, writer.lost_lines, writer.problem) == (6, 3, "No space left on device")
    os.dup2(log_fd, broken_fd)
    monkeypatch.setattr(capture, "_RETRY_S", 0.0)
    writer._retry_at_s = 0.0
    writer.append(Piece(b"d", 1, NO_NEWLINE), 2, now_unix_nano=5_000_000)
    assert writer.finish()
    assert (tmp_path / "log").read_bytes() == b"\0" * 6 + b"d"
    raw = (tmp_path / "idx").read_bytes()[32:]
    assert [unpack_entry(raw[:32]), unpack_entry(raw[32:])] == [
        Entry(6, 5_000_000, 3, 1, 0),
        Entry(7, 5_000_003, 4, 2, NO_NEWLINE),
    ]
    for fd in (log_fd, broken_fd, index_fd):
        os.close(fd)
