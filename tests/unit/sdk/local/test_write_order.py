"""The order of lines of two pipes, from the order of their writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tailspan.local.capture import Piece
from tailspan.local.write_order import in_order


def merged(first: bytes, second: bytes, writes: list[int], known: int | None = None) -> tuple[bytes, bytes, list[int]]:
    """Return the text in order, the text that is left, and the writes that are left."""
    pieces = {number: [Piece(text, text.count(b"\n"))] if text else [] for number, text in ((1, first), (2, second))}
    order = list(writes)
    text = b"".join(piece.text for _, piece in in_order(pieces, order, len(writes) if known is None else known))
    return text, b"".join(piece.text for rest in pieces.values() for piece in rest), order


def test_each_write_has_a_line() -> None:
    """The common case, and it is exact."""
    assert merged(b"a\nb\n", b"c\nd\n", [2, 1, 2, 1]) == (b"c\na\nd\nb\n", b"", [])


def test_what_is_left_belongs_to_the_last_write() -> None:
    """Several lines by one write, or by writes that the kernel reports as one."""
    assert merged(b"a\nb\nc\n", b"d\n", [1, 2]) == (b"a\nb\nc\nd\n", b"", [])
    assert merged(b"a\n", b"d\n", []) == (b"a\nd\n", b"", [])


def test_a_write_without_a_line_was_part_of_one() -> None:
    """`printf a; printf b`."""
    assert merged(b"a\n", b"d\n", [1, 1, 2]) == (b"a\nd\n", b"", [])


def test_lines_after_an_unread_write_wait() -> None:
    """What was written before them is read next."""
    assert merged(b"a\n", b"c\nd\n", [1, 2, 1, 2], known=2) == (b"a\nc\n", b"d\n", [1, 2])


def test_lines_of_one_stream_are_not_copied() -> None:
    """A job that prints fast into one of its pipes: what was read of it becomes an entry as it is."""
    piece = Piece(b"a\nb\nc\n", 3)
    pieces, writes = {1: [piece], 2: []}, [1, 1]
    ((number, found),) = in_order(pieces, writes, 1)
    assert (number, pieces, writes) == (1, {1: [], 2: []}, [])
    assert found is piece


def test_writes_of_one_stream_that_follow_each_other_make_one_piece() -> None:
    """Each piece costs two writes to the disk."""
    pieces = {1: [Piece(b"a\nb\nc\n", 3)], 2: [Piece(b"d\n", 1)]}
    found = [(number, piece.text) for number, piece in in_order(pieces, [1, 1, 2, 1], 4)]
    assert found == [(1, b"a\nb\n"), (2, b"d\n"), (1, b"c\n")]


@given(st.lists(st.sampled_from([1, 2]), max_size=40), st.integers(0, 40), st.integers(0, 9), st.integers(0, 9))
def test_no_line_is_lost_and_none_changes_places_within_its_stream(
    writes: list[int], known: int, first: int, second: int
) -> None:
    """Whatever the kernel reports."""
    one = b"".join(b"a%d\n" % number for number in range(first))
    two = b"".join(b"b%d\n" % number for number in range(second))
    text, left, _ = merged(one, two, writes, known)
    lines = (text + left).split(b"\n")
    assert [line for line in lines if line.startswith(b"a")] == one.split(b"\n")[:-1]
    assert [line for line in lines if line.startswith(b"b")] == two.split(b"\n")[:-1]
