"""Lines of `logs` and `tail` at a terminal: colours by severity, local times."""

from __future__ import annotations

import io
import sys

import pytest

from tailspan.cli.lines import LineChoice, line_printer
from tailspan.logs.page import Message, OpenLine


class TerminalText(io.StringIO):
    """Text that says that it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


MESSAGES = [
    Message(message="ERROR: bad", timestamp=1_000),
    Message(message="[WARNING] hm", timestamp=1_000),
    Message(message="DEBUG: x", timestamp=1_000),
    Message(message="INFO: no error", timestamp=1_000),
    Message(message="\x1b[32mERROR: own colour\x1b[0m", timestamp=1_000),
    Message(message="by the service", timestamp=1_000, level="CRITICAL"),
]
COLOURED = [
    "\x1b[31mERROR: bad\x1b[0m",
    "\x1b[33m[WARNING] hm\x1b[0m",
    "\x1b[2mDEBUG: x\x1b[0m",
    "INFO: no error",
    "\x1b[32mERROR: own colour\x1b[0m",
    "\x1b[31mby the service\x1b[0m",
]


def printed(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, choice: LineChoice) -> list[str]:
    """Print the messages and an open line to that standard output."""
    monkeypatch.setattr(sys, "stdout", file)
    printer = line_printer(choice)
    printer.messages(MESSAGES)
    printer.open_line(OpenLine(b"half", 2_000_000_000, "uid"))
    return file.getvalue().split("\n")


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line with colours of its own keeps them; NO_COLOR and pipes have none of ours."""
    choice = LineChoice(None, None, False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert printed(monkeypatch, TerminalText(), choice) == [*COLOURED, "half"]
    assert printed(monkeypatch, io.StringIO(), choice)[0] == "ERROR: bad"
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(monkeypatch, TerminalText(), choice)[0] == "ERROR: bad"


def test_times_are_local_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their zone, also before an open line; in a pipe they are UTC."""
    choice = LineChoice(None, None, True)
    at_terminal = printed(monkeypatch, TerminalText(), choice)
    assert at_terminal[3].startswith("1970-01-01 ") or at_terminal[3].startswith("1969-12-31 ")
    assert at_terminal[3].endswith(" INFO: no error")
    in_pipe = printed(monkeypatch, io.StringIO(), choice)
    assert (in_pipe[3], in_pipe[-1]) == ("1970-01-01T00:00:01.000Z INFO: no error", "1970-01-01T00:00:02.000Z half")
