"""Find stack traces of Python, Java, Node.js and Rust in lines. Pure; its time is linear in the lines.

The formats are those that the runtimes print: tests/data/failures has real output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from tailspan_agent.records.severity import UNSPECIFIED, find_severity

__all__ = ["Stack", "last_stack"]

_HEADER = "Traceback (most recent call last):"
_GROUP_HEADER = "Exception Group Traceback (most recent call last):"
_CHAINS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_IGNORED = "Exception ignored in"
_FRAME = re.compile(r'  File "[^"]*", line \d+')
_EXCEPTION = re.compile(r"((?:[^\W\d]\w*+|<locals>)(?:\.(?:[^\W\d]\w*+|<locals>))*+)(?:: (.*)|:?)\Z")
_SYNTAX = re.compile(r"((?:Syntax|Indentation|Tab)Error): (.*)\Z")
_DATE = re.compile(r"\[?\d{2,4}[-/]\d\d[-/]\d\d")
_MARGIN = re.compile(r" *+[|+]")
_GROUP_INDENT = "  + "
_MAX_MESSAGE_LINES = 50
_MAX_MORE_LINES = 20
_MAX_GAP = 50
# Headers within headers without any exception would take the square of the lines.
_STEPS_A_LINE, _MORE_STEPS = 10, 2000

_AT = re.compile(r"\s++at \S")
_THROWN = re.compile(
    r"(?:.* )?((?:[\w$]++\.)*+[\w$]*(?:Error|Exception|Throwable|Failure|Interrupt)[\w$]*+)(?:: (.*)|)\Z"
)
_JAVA_MORE = re.compile(r"(?:\s++at \S|\s++\.\.\. \d|\s*+(?:Caused by|Suppressed): )")
_NODE_MORE = re.compile(r"\s++(?:at \S|\.\.\. \d|\[\w)|\}\Z|\s++\}\Z|\s++\w++: ")
_PANIC = re.compile(r"thread '[^']*+' (?:\(\d++\) )?panicked at \S+:\Z")
_RUST_MORE = re.compile(r"stack backtrace:|\s++\d++: |\s++at |note: ")

_Numbered = Iterator[tuple[int, str]]


class Stack(msgspec.Struct, frozen=True):
    """One stack trace.

    Attributes:
        exception_type: The type of the exception, as printed.
        message: The message of the exception; may have several lines.
        lines: All lines, including those of chained stacks, without the prefix of a launcher.
        end: The position after its last line.
    """

    exception_type: str
    message: str
    lines: list[str]
    end: int


def last_stack(lines: Sequence[str]) -> Stack | None:
    """Return the last stack trace, the likely reason of a failure; None without one.

    Args:
        lines: Cleaned, oldest first.
    """
    last = None
    position = 0
    left = _STEPS_A_LINE * len(lines) + _MORE_STEPS
    while position < len(lines):
        found, steps = _python_at(lines, position) if left > 0 else (None, 0)
        left -= steps
        found = found or _foreign_at(lines, position)
        if found is None:
            position += 1
            continue
        # An ignored exception (of a destructor or a callback) did not end the program.
        if position == 0 or _IGNORED not in lines[position - 1]:
            # Chained exceptions are one stack, including the lines between its tracebacks.
            if last is not None and _is_chain(lines, last.end, position):
                text = [*last.lines, *lines[last.end : position], *found.lines]
                found = Stack(found.exception_type, found.message, text, found.end)
            last = found
        position = found.end
    return last


def _python_at(lines: Sequence[str], position: int) -> tuple[Stack | None, int]:
    """Return the Python traceback that starts at a position, or None; and the number of lines that were searched."""
    header = lines[position].rstrip()
    if header.endswith(_GROUP_INDENT + _GROUP_HEADER):
        start, margin = header.rindex(_GROUP_INDENT), "  | "
    elif header.endswith(_HEADER):
        start, margin = header.rindex(_HEADER), ""
    else:
        return _syntax_error_at(lines, position) if header.startswith('  File "') else None, 1
    steps = 1
    for way, numbered in enumerate(_ways(lines, position, start)):
        first = next(numbered, (0, ""))
        if not first[1].startswith(margin) or not _FRAME.match(first[1], len(margin)):
            continue
        # With a varying prefix, the message and the lines of other workers look alike.
        body, error, end = _group(first, numbered) if margin else _plain(first, numbered, is_separable=way < 2)
        steps += end - position
        if error:
            lines_of_message = [] if margin else body[body.index(error.string) + 1 :]
            message = "\n".join((error[2] or "", *lines_of_message))
            return Stack(error[1], message, [header[start:], *body], end), steps
    return None, steps


def _ways(lines: Sequence[str], position: int, start: int) -> Iterator[_Numbered]:
    """Yield the lines after a header without the header's prefix, in each way that it may continue.

    A logger writes a prefix once; a launcher before each line, with lines of other workers between; a container
    runtime writes another prefix of the same width before each line.
    """
    behind = range(position + 1, len(lines))
    yield ((index, lines[index]) for index in behind)
    if start:
        yield _of_worker(lines, position, start)
        yield ((index, lines[index][start:]) for index in behind)


def _of_worker(lines: Sequence[str], position: int, start: int) -> _Numbered:
    prefix = lines[position][:start]
    last = position
    for index in range(position + 1, len(lines)):
        if lines[index].startswith(prefix):
            last = index
            yield index, lines[index][start:]
        elif index - last > _MAX_GAP:
            return


def _plain(
    first: tuple[int, str], numbered: _Numbered, *, is_separable: bool
) -> tuple[list[str], re.Match[str] | None, int]:
    """Return all lines up to the end of the message, the match of the exception, and the position after them.

    A message of several lines, and notes, follow the exception and end at an empty line or a logger's line.
    """
    body, end, error = [first[1]], first[0] + 1, None
    more = 0
    for index, line in numbered:
        if error is not None and (more == _MAX_MORE_LINES or _starts_other_output(line)):
            break
        body.append(line)
        end = index + 1
        if error is not None:
            more += 1
        elif not line.startswith("  "):
            error = _EXCEPTION.match(line)
            if error is None or not is_separable:
                break
    return body, error, end


def _starts_other_output(line: str) -> bool:
    return (
        not line.strip()
        or line.startswith((_HEADER, _GROUP_INDENT, _IGNORED, "Exception in thread "))
        or _DATE.match(line) is not None
        or find_severity(line.encode("utf-8", "replace")) != UNSPECIFIED
    )


def _group(first: tuple[int, str], numbered: _Numbered) -> tuple[list[str], re.Match[str] | None, int]:
    """Return all lines of an exception group and its members, the match of the group, and the position after them."""
    body, end = [first[1]], first[0] + 1
    for index, line in numbered:
        if not _MARGIN.match(line):
            break
        body.append(line)
        end = index + 1
    named = next((line for line in body if line.startswith("  | ") and line[4:5] != " "), "")
    return body, _EXCEPTION.match(named[4:]), end


def _syntax_error_at(lines: Sequence[str], position: int) -> Stack | None:
    """Return a syntax error in the program itself: Python prints it without the header of a traceback."""
    if not _FRAME.fullmatch(lines[position]):
        return None
    for index in range(position + 1, min(position + 4, len(lines))):
        error = _SYNTAX.match(lines[index])
        if error:
            return Stack(error[1], error[2], list(lines[position : index + 1]), index + 1)
        if not lines[index].startswith("    "):
            return None
    return None


def _is_chain(lines: Sequence[str], start: int, stop: int) -> bool:
    """Return whether the lines between two tracebacks chain them; a message may have several lines."""
    between = [line.strip() for line in lines[start:stop] if line.strip()]
    return len(between) <= _MAX_MESSAGE_LINES and bool(between) and between[-1].endswith(_CHAINS)


def _foreign_at(lines: Sequence[str], position: int) -> Stack | None:
    """Return the stack of Java, Node.js or Rust that starts at a position, or None."""
    behind = lines[position + 1] if position + 1 < len(lines) else ""
    if _AT.match(behind):
        error = _THROWN.match(lines[position].rstrip(" {"))
        if error is None:
            return None
        # Java indents with a tab, Node.js with spaces; they chain causes differently.
        more = _JAVA_MORE if behind.startswith("\t") else _NODE_MORE
        end = _end(lines, position + 1, more)
        return Stack(error[1], error[2] or "", list(lines[position:end]), end)
    if "panicked at " in lines[position]:
        panic = _PANIC.match(lines[position])
        if panic is not None and behind.strip():
            end = _end(lines, position + 2, _RUST_MORE)
            return Stack("panic", behind, list(lines[position:end]), end)
    return None


def _end(lines: Sequence[str], start: int, more: re.Pattern[str]) -> int:
    return next((index for index in range(start, len(lines)) if not more.match(lines[index])), len(lines))
