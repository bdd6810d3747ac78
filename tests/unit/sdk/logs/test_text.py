"""`tailspan.logs.text`: texts of lines."""

from __future__ import annotations

import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs import text as text_module
from tailspan.logs.page import LineRun, LogPage
from tailspan.logs.text import IN_PYTHON, count_lines, split_text

TEXTS = st.lists(st.binary(max_size=5) | st.just(b"\n"), max_size=30).map(b"".join)


@given(TEXTS, st.integers(0, 70), st.sampled_from([1, 700]))
def test_lines_are_counted_as_bytes_does(text: bytes, newlines: int, repeats: int) -> None:
    """Only faster; of short texts and of long ones, with few newlines or nothing else, in C and in Python."""
    text = (text + b"\n" * newlines) * repeats
    assert count_lines(text) == IN_PYTHON(text) == text.count(b"\n")
    assert len(split_text(text + b"\n")) == text.count(b"\n") + 1


@given(
    st.lists(st.binary(max_size=5).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=9),
    st.integers(1, 12),
)
def test_a_page_of_a_text_is_the_page_of_its_lines(lines: list[bytes], count: int) -> None:
    """Whatever is asked of it first."""
    runs = [LineRun(len(lines), 5, uid_prefix="u")]
    text = b"".join(line + b"\n" for line in lines)
    page, one = LogPage(None, runs, b"c", text=text), LogPage(lines, runs, b"c")
    assert page.last_lines(count) == one.last_lines(count) == lines[-count:]
    assert (page.line_count, one.line_count) == (len(lines), len(lines))
    assert page.joined() == one.joined()
    assert page == one
    assert page.lines == lines


def test_what_is_no_bytes_is_refused() -> None:
    """In C as in Python: nothing is read that is not a text."""
    for one in (count_lines, IN_PYTHON):
        with pytest.raises((TypeError, AttributeError)):
            one("a\n")  # type: ignore[arg-type]


def test_python_does_it_where_nothing_was_compiled() -> None:
    """The same module, without its compiled part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailspan.logs.text", text_module)  # as which the package has the other one while this runs
        patch.setitem(sys.modules, "tailspan.logs._text", None)
        patch.delitem(sys.modules, text_module.__name__)
        alone = importlib.import_module(text_module.__name__)
        assert not alone.COMPILED
        assert alone.count_lines(b"a\n\nb") == 2
