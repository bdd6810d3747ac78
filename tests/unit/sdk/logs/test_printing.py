"""`tailspan.logs.printing`: open lines are printed as they grow, and each text once."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import Message, OpenLine
from tailspan.logs.printing import LinePrinter


class TerminalText(io.StringIO):
    """Text that says that it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def message(text: str) -> Message:
    """Return a line."""
    return Message(message=text, timestamp=0)


def open_line(text: str) -> OpenLine:
    """Return an open line."""
    return OpenLine(text.encode(), 0, "uid")


@given(st.lists(st.text("ab ", min_size=1), max_size=6), st.data())
def test_what_is_printed_is_what_the_job_wrote(lines: list[str], data: st.DataObject) -> None:
    """However often an open line is seen on its way."""
    file = io.StringIO()
    printer = LinePrinter(file)
    for line in lines:
        for end in sorted(data.draw(st.lists(st.integers(0, len(line)), max_size=3))):
            printer.open_line(open_line(line[:end]))
        printer.open_line(None)
        printer.messages([message(line)])
    assert file.getvalue() == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        (io.StringIO(), "Loading\nerr\nLoading done\n10%\r20%\r30%\rend\n"),
        (TerminalText(), "Loading\r\x1b[Kerr\nLoading done\n10%\r\x1b[K20%\r\x1b[K10%\n20%\r\x1b[K30%\r\x1b[Kend\n"),
    ],
    ids=["pipe", "terminal"],
)
def test_lines_that_do_not_continue_the_open_one(file: io.StringIO, shown: str) -> None:
    """One of the other stream takes its place; states of a progress bar come as the job wrote them."""
    printer = LinePrinter(file)
    printer.open_line(open_line("Loading"))
    printer.messages([message("err")])
    printer.open_line(open_line("Loading"))
    printer.messages([message("Loading done")])
    for state in ("10%\r", "10%\r20%\r"):
        printer.open_line(open_line(state))
    printer.messages([message("10%\r")])
    for state in ("20%\r", "20%\r30%\r"):
        printer.open_line(open_line(state))
    printer.messages([message("20%\r30%\rend")])
    assert file.getvalue() == shown


def test_a_note_begins_a_line() -> None:
    """So does what a command prints after it was stopped."""
    file = io.StringIO()
    printer = LinePrinter(file)
    printer.open_line(open_line("a"))
    printer.note("b")
    printer.open_line(open_line("c"))
    assert printer.has_open
    printer.close()
    printer.close()
    assert not printer.has_open
    assert file.getvalue() == "a\n[tailspan] b\nc\n"


def test_a_character_is_printed_once_it_is_whole() -> None:
    """The bytes of the next character may not have come yet."""
    file = io.StringIO()
    printer = LinePrinter(file)
    for end in range(1, 4):
        printer.open_line(OpenLine("a€".encode()[:end], 0, ""))
        assert file.getvalue() == "a"
    printer.open_line(open_line("a€"))
    assert file.getvalue() == "a€"
