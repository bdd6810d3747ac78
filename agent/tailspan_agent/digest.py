"""Why a job failed, from the last lines of its log: the last traceback, joined, or else the last lines. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

__all__ = ["Digest", "digest_of"]

_HEADER = "Traceback (most recent call last):"
_GROUP_HEADER = "Exception Group Traceback (most recent call last):"
_CHAINS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_FRAME = re.compile(r'  File "[^"]*", line \d+')
_EXCEPTION = re.compile(r"((?:[^\W\d]\w*+|<locals>)(?:\.(?:[^\W\d]\w*+|<locals>))*+)(?:: (.*)|:?)\Z")
_MARGIN = re.compile(r" *+[|+]")
_GROUP_INDENT = "  + "
_MAX_TYPE_CHARS = 200
_MAX_MESSAGE_CHARS = 2000
_MAX_MESSAGE_LINES = 50
_MAX_LINE_CHARS = 4000
_MAX_LINES = 2000
_LAST_LINES = 20
_LAST_LINE_CHARS = 1000
# Loki refuses a record whose attributes together are over 64 KB.
_MAX_STACK_BYTES = 48 * 1024
_STACK_HEAD_BYTES = 8 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Why a job failed, as far as its log says.

    Attributes:
        exception_type: Of the exception that ended the last traceback; None without a traceback.
        message: Its message, or the last line that is not empty.
        stacktrace: The joined traceback with all that it is chained to, at most 48 KB; None without one.
        last_lines: The last lines that are not empty, at most 20, oldest first.
    """

    exception_type: str | None
    message: str
    stacktrace: str | None
    last_lines: tuple[str, ...]


def digest_of(lines: Sequence[str]) -> Digest | None:
    """Return why a job failed.

    A traceback counts if it has a frame and an exception; text that only begins like one does not. Lines may have a
    prefix of constant width (a worker's name), and the first line any (a logger's).

    Args:
        lines: The last lines of its log, cleaned, oldest first; some hundreds are enough.

    Returns:
        The digest; None if all lines are empty.
    """
    lines = [line[:_MAX_LINE_CHARS] for line in lines[-_MAX_LINES:]]
    last_lines = tuple(line[:_LAST_LINE_CHARS] for line in lines if line.strip())[-_LAST_LINES:]
    if not last_lines:
        return None
    found = _last_traceback(lines)
    if found is None:
        return Digest(
            exception_type=None, message=last_lines[-1][:_MAX_MESSAGE_CHARS], stacktrace=None, last_lines=last_lines
        )
    return Digest(
        exception_type=found.exception_type[:_MAX_TYPE_CHARS],
        message=found.message[:_MAX_MESSAGE_CHARS],
        stacktrace=_shortened("\n".join(found.lines)),
        last_lines=last_lines,
    )


@dataclass(frozen=True, slots=True)
class _Traceback:
    exception_type: str
    message: str
    lines: list[str]
    end: int


def _last_traceback(lines: Sequence[str]) -> _Traceback | None:
    last = None
    position = 0
    while position < len(lines):
        found = _traceback_at(lines, position)
        if found is None:
            position += 1
            continue
        # Chained exceptions are one stack: what stands between two of its tracebacks belongs to it.
        if last is not None and _is_chain(lines, last.end, position):
            text = [*last.lines, *lines[last.end : position], *found.lines]
            found = _Traceback(found.exception_type, found.message, text, found.end)
        last = found
        position = found.end
    return last


def _traceback_at(lines: Sequence[str], position: int) -> _Traceback | None:
    """Return the traceback whose first line is at a position, or None if there is none."""
    header = lines[position].rstrip()
    if header.endswith(_GROUP_INDENT + _GROUP_HEADER):
        start, margin, body_of = header.rindex(_GROUP_INDENT), "  | ", _group_body
    elif header.endswith(_HEADER):
        start, margin, body_of = header.rindex(_HEADER), "", _plain_body
    else:
        return None
    following = lines[position + 1] if position + 1 < len(lines) else ""
    for width in (0, start):
        if following.startswith(margin, width) and _FRAME.match(following, width + len(margin)):
            body, error = body_of(line[width:] for line in islice(lines, position + 1, None))
            if error:
                return _Traceback(error[1], error[2] or "", [header[start:], *body], position + 1 + len(body))
    return None


def _plain_body(lines: Iterable[str]) -> tuple[list[str], re.Match[str] | None]:
    """Return all lines up to the one that names the exception, and what that says."""
    body = []
    for line in lines:
        body.append(line)
        if not line.startswith("  "):
            return body, _EXCEPTION.match(line)
    return body, None


def _group_body(lines: Iterable[str]) -> tuple[list[str], re.Match[str] | None]:
    """Return all lines with a margin, the group's own and its members', and what names the group."""
    body = list(takewhile(_MARGIN.match, lines))
    named = next((line for line in body if line.startswith("  | ") and line[4:5] != " "), "")
    return body, _EXCEPTION.match(named[4:])


def _is_chain(lines: Sequence[str], start: int, stop: int) -> bool:
    """Return whether two tracebacks with these lines between them are one; messages may have several lines."""
    between = [line.strip() for line in lines[start:stop] if line.strip()]
    return len(between) <= _MAX_MESSAGE_LINES and bool(between) and between[-1].endswith(_CHAINS)


def _shortened(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= _MAX_STACK_BYTES:
        return text
    note = "\n  [... the middle is left out ...]\n"
    head = data[:_STACK_HEAD_BYTES].decode("utf-8", "ignore")
    # The end says which exception it was and where it was raised.
    tail = data[len(data) - (_MAX_STACK_BYTES - _STACK_HEAD_BYTES - len(note)) :].decode("utf-8", "ignore")
    return head + note + tail
