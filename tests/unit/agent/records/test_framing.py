"""`tailspan_agent.records.framing`: the functions in C return exactly what those in Python return."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan._native import COMPILED
from tailspan.logs.page import MAX_PAGE_LINES
from tailspan_agent.otlp.wire import varint_at
from tailspan_agent.records.framing import (
    LEFT_OUT,
    FramedRun,
    Lines,
    frame,
    frame_in_python,
    split_lines,
)

compiled = pytest.mark.skipif(not COMPILED, reason="Tailspan was installed without its C part")

LINE = st.binary(max_size=200).map(lambda line: line.replace(b"\n", b" ")) | st.sampled_from(
    [b"", b"2026-01-01 12:00:00 INFO x", b"2027-01-01 12:00:00 INFO y", b"0", b"9" * 70, b"n" * 17000, b"\xff" * 128]
)


class Changes:
    """A number whose conversion could change the lines while C reads them."""

    def __index__(self) -> int:
        """Return an integer, as numbers do."""
        return 2


FIELDS = (b"", b"\x10\x09\x1a\x04INFO", b"f" * 130)


@st.composite
def lines_(draw: st.DrawFn) -> Lines:
    """Lines as a list or as a text."""
    lines = draw(st.lists(LINE, max_size=40))
    return b"".join(line + b"\n" for line in lines) if draw(st.booleans()) else lines


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    """Matching arguments of `frame`."""
    lines = draw(lines_())
    left = count = len(split_lines(lines))
    runs = []
    while left:
        many = draw(st.integers(1, left))
        start = draw(st.sampled_from([0, 1, (1 << 16) - 3, (1 << 64) - many]) | st.integers(0, (1 << 64) - many))
        runs.append(FramedRun(many, start, draw(st.binary(max_size=150))))
        left -= many
    places = st.sampled_from([0, 1, 2, LEFT_OUT])
    severities = bytes(draw(st.lists(places, min_size=count, max_size=count)))
    digests = draw(st.binary(min_size=8 * count, max_size=8 * count)) if draw(st.booleans()) else b""
    most, copied = draw(st.sampled_from([0, 300, 1 << 20])), draw(st.sampled_from([0, 90]))
    return lines, severities, FIELDS, runs, digests, draw(st.sampled_from([128, 20_000])), most, copied


@compiled
@given(calls())
def test_records_are_the_same_in_c(call: tuple[Any, ...]) -> None:
    """Byte for byte, for any lines."""
    assert frame(*call) == frame_in_python(*call)


@compiled
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"lines": [b"a"]}, IndexError),
        ({"lines": [b"a", b"b", b"c"]}, ValueError),
        ({"lines": [b"a", "b"]}, TypeError),
        ({"lines": b"a\n"}, IndexError),
        ({"lines": b"a\nb"}, IndexError),
        ({"lines": b"a\nb\nc"}, ValueError),
        ({"lines": b""}, IndexError),
        ({"lines": (b"a", b"b")}, TypeError),
        ({"severities": b"\0"}, ValueError),
        ({"severities": b"\0\0\0"}, ValueError),
        ({"severities": bytearray(2)}, TypeError),
        ({"fields": ("x",)}, TypeError),
        ({"fields": (b"",) * 300}, ValueError),
        ({"runs": []}, ValueError),
        ({"runs": [FramedRun(1, 5, b"")]}, ValueError),
        ({"runs": [FramedRun(3, 5, b"")]}, ValueError),
        ({"runs": [FramedRun(-1, 5, b""), FramedRun(3, 5, b"")]}, ValueError),
        ({"runs": [FramedRun(2, -5, b"")]}, OverflowError),
        ({"runs": [FramedRun(2, 1 << 64, b"")]}, OverflowError),
        ({"runs": [(2, 5)]}, TypeError),
        ({"runs": [[2, 5, b""]]}, TypeError),
        ({"runs": [(2, "5", b"")]}, TypeError),
        ({"runs": [(Changes(), 5, b"")]}, TypeError),
        ({"runs": [(2, 5, "")]}, TypeError),
        ({"digests": bytes(8)}, ValueError),
        ({"digests": bytes(24)}, ValueError),
        ({"most": -1}, ValueError),
        ({"copied": -1}, ValueError),
    ],
)
def test_arguments_that_do_not_match_are_errors(wrong: dict[str, Any], error: type[Exception]) -> None:
    """C never reads memory outside of them."""
    call = {"lines": [b"a", b"b"], "severities": bytes(2), "fields": FIELDS, "runs": [FramedRun(2, 5, b"")]}
    call |= {"digests": b"", "max_body": 10, "most": 100, "copied": 0} | wrong
    with pytest.raises(error):
        frame(*call.values())


def test_a_numbered_run_of_more_lines_than_a_page_may_have_is_an_error() -> None:
    """No service may make such a page; with digests it is allowed."""
    many = MAX_PAGE_LINES + 1
    run = [FramedRun(many, 5, b"")]
    for one in {frame, frame_in_python}:
        with pytest.raises(ValueError, match="too many lines"):
            one(b"\n" * many, bytes(many), FIELDS, run, b"", 10, 100, 0)
        assert one(b"\n" * many, bytes(many), FIELDS, run, bytes(8 * many), 10, 100, 0)


@given(st.lists(st.integers(0, 20_000), max_size=30), st.integers(0, 50_000), st.integers(0, 900))
def test_a_piece_has_as_many_records_as_fit(lengths: list[int], most: int, copied: int) -> None:
    """In both forms; a piece of more than one record is within the limit, and the next record did not fit."""
    lines = [b"x" * length for length in lengths]
    run = [FramedRun(len(lines), 5, b"shared")] if lines else []
    whole = frame(lines, bytes(len(lines)), FIELDS, run, b"", 20_000, 1 << 40, 0) or [(b"", 0)]
    for one in {frame, frame_in_python}:
        pieces = one(lines, bytes(len(lines)), FIELDS, run, b"", 20_000, most, copied)
        assert pieces is not None
        assert (b"".join(records for records, _ in pieces), sum(count for _, count in pieces)) == whole[0]
        assert all(len(records) + count * copied <= most for records, count in pieces if count != 1)
        for (records, count), (after, _) in pairwise(pieces):
            size, start = varint_at(after, 1)
            assert len(records) + start + size + (count + 1) * copied > most
