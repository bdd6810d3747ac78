"""`tailspan.text`: texts of lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tailspan.page import LogPage, Run
from tailspan.text import count_lines, split_text

TEXTS = st.lists(st.binary(max_size=5) | st.just(b"\n"), max_size=30).map(b"".join)


@given(TEXTS)
def test_lines_are_counted_as_bytes_does(text: bytes) -> None:
    """Only faster."""
    assert count_lines(text) == text.count(b"\n")
    assert len(split_text(text + b"\n")) == text.count(b"\n") + 1


@given(
    st.lists(st.binary(max_size=5).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=9),
    st.integers(1, 12),
)
def test_a_page_of_a_text_is_the_page_of_its_lines(lines: list[bytes], count: int) -> None:
    """Whatever is asked of it first."""
    runs = [Run(len(lines), 5, uid_prefix="u")]
    text = b"".join(line + b"\n" for line in lines)
    page, one = LogPage(None, runs, b"c", text=text), LogPage(lines, runs, b"c")
    assert page.last_lines(count) == one.last_lines(count) == lines[-count:]
    assert (page.line_count, one.line_count) == (len(lines), len(lines))
    assert page.joined() == one.joined()
    assert page == one
    assert page.lines == lines
