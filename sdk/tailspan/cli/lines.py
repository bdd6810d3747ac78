"""Which lines of a log a command prints, and how a terminal shows them."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from tailspan.cli.moments import moment_text
from tailspan.logs.printing import LinePrinter, is_terminal

if TYPE_CHECKING:
    from tailspan.logs.page import Message, OpenLine

__all__ = ["LineChoice", "line_options", "line_printer"]

Command = TypeVar("Command", bound=Callable[..., Any])

_RED, _YELLOW, _DIM, _RESET = "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
_ERROR, _WARN, _INFO = 17, 13, 9


class LineChoice(NamedTuple):
    """Which lines to print, and whether with their times.

    Attributes:
        pattern: Only lines in which this is found; None: all.
        stream: Only lines of ``stdout`` or ``stderr``; None: of both, and of services that report none.
        times: Whether each line begins with its time.
    """

    pattern: re.Pattern[str] | None
    stream: str | None
    times: bool

    @property
    def is_all(self) -> bool:
        """Whether no line is left out."""
        return self.pattern is None and self.stream is None

    def of(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the lines that are printed."""
        if self.is_all:
            return messages
        return [
            one
            for one in messages
            if (self.stream is None or one.get("stream") == self.stream)
            and (self.pattern is None or self.pattern.search(one["message"]))
        ]

    def of_open(self, line: OpenLine | None) -> OpenLine | None:
        """Return the line whose newline has not come if it is printed; its stream is not known."""
        if line is None or self.stream is not None:
            return None
        return line if self.pattern is None or self.pattern.search(line.message) else None


def line_options(command: Command) -> Command:
    """Add ``--grep``, ``--stream`` and ``-t``; the command gets them as ``choice``."""

    @functools.wraps(command)
    def chosen(*args: Any, grep: re.Pattern[str] | None, stream: str | None, times: bool, **kwargs: Any) -> Any:
        return command(*args, choice=LineChoice(grep, stream, times), **kwargs)

    wrapped = click.option("-t", "--timestamps", "times", is_flag=True, help="Print the time of each line.")(chosen)
    wrapped = click.option(
        "--stream", type=click.Choice(["stdout", "stderr"]), help="Only lines of this stream of the job."
    )(wrapped)
    return click.option(
        "--grep", metavar="RE", callback=_pattern, help="Only lines in which this regular expression is found."
    )(wrapped)  # type: ignore[return-value]


def line_printer(choice: LineChoice) -> LinePrinter:
    """Return a printer to standard output: at a terminal errors are red, warnings yellow and debug lines dim."""
    terminal = is_terminal(sys.stdout)
    printer = LinePrinter(sys.stdout)
    if choice.times:
        printer.prefix = functools.partial(_time_prefix, local=terminal)
    if terminal and not os.environ.get("NO_COLOR"):
        printer.style = _coloured
    return printer


def _pattern(ctx: click.Context, param: click.Parameter, given: str | None) -> re.Pattern[str] | None:
    try:
        return None if given is None else re.compile(given)
    except re.error as error:
        raise click.BadParameter(f"{given!r} is not a regular expression: {error}", ctx=ctx, param=param) from None


def _time_prefix(time_ms: int, *, local: bool) -> str:
    return f"{moment_text(datetime.fromtimestamp(time_ms / 1000, UTC), local=local, milliseconds=True)} "


def _coloured(message: Message, text: str) -> str:
    colour = _colour_of(_severity_of(message))
    return f"{colour}{text}{_RESET}" if colour and text and "\x1b" not in text else text


def _severity_of(message: Message) -> int:
    """Return the severity number of a line: the service's, or the one in its text; 0 without one."""
    from tailspan.logs.severity import LEVEL_NUMBERS, LEVELS, find_level

    if level := message.get("level"):
        return LEVEL_NUMBERS.get(level.upper(), 0)
    return LEVELS[find_level(message["message"].encode("utf-8", "replace"))][0]


def _colour_of(severity: int) -> str:
    if severity >= _ERROR:
        return _RED
    if severity >= _WARN:
        return _YELLOW
    return _DIM if 0 < severity < _INFO else ""
