"""`tailspan.logs.text`: texts of lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import LineRun, LogPage
from tailspan.logs.text import (
    count_lines,
    count_lines_in_python,
    lines_end,
    lines_end_in_python,
    split_text,
)

TEXTS = st.lists(st.binary(max_size=5) | st.just(b"\n"), max_size=30).map(b"".join)


@given(TEXTS, st.integers(0, 70), st.sampled_from([1, 700]))
def test_newlines_are_counted_as_bytes_count_does(text: bytes, newlines: int, repeats: int) -> None:
    """In C and in Python; in short and long texts, with few newlines or only newlines."""
    text = (text + b"\n" * newlines) * repeats
    assert count_lines(text) == count_lines_in_python(text) == text.count(b"\n")
    assert len(split_text(text + b"\n")) == text.count(b"\n") + 1


@given(TEXTS, st.integers(-2, 70), st.integers(0, 40))
def test_the_end_of_lines_is_found(text: bytes, start: int, count: int) -> None:
    """In C and in Python; an error where there are fewer lines."""
    start = min(max(start, 0), len(text)) if text else 0
    known = [at + 1 for at in range(start, len(text)) if text[at : at + 1] == b"\n"]
    for end_of in (lines_end, lines_end_in_python):
        if count > len(known):
            with pytest.raises(ValueError, match=r"."):
                end_of(text, start, count)
        else:
            assert end_of(text, start, count) == [start, *known][count]


def test_no_start_reads_outside_a_text() -> None:
    """C trusts no position."""
    if lines_end is not lines_end_in_python:
        for start in (-1, 3, 2**62):
            with pytest.raises(ValueError, match="fewer lines"):
                lines_end(b"a\n", start, 1)


@given(
    st.lists(st.binary(max_size=5).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=9),
    st.integers(1, 12),
)
def test_a_page_of_a_text_is_the_page_of_its_lines(lines: list[bytes], count: int) -> None:
    """In any order of calls."""
    runs = [LineRun(len(lines), 5, uid_prefix="u")]
    text = b"".join(line + b"\n" for line in lines)
    page, one = LogPage(None, runs, b"c", text=text), LogPage(lines, runs, b"c")
    assert page.last_lines(count) == one.last_lines(count) == lines[-count:]
    assert (page.line_count, one.line_count) == (len(lines), len(lines))
    assert page.joined() == one.joined()
    assert page == one
    assert page.lines == lines


def test_other_types_than_bytes_are_errors() -> None:
    """In C as in Python."""
    for count in (count_lines, count_lines_in_python):
        with pytest.raises((TypeError, AttributeError)):
            count("a\n")  # type: ignore[arg-type]
