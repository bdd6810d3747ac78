"""`SpanLines`: the lines of a job that its span carries, for stores that keep only traces. Pure.

A span must stay small, so it carries the last lines and the newest warnings and errors. They are collected while the
log is relayed: a job's whole log may be far larger than memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tailspan.logs.page import LogPage, Stream
from tailspan_agent.otlp.log_record import Severity
from tailspan_agent.otlp.text import shorten_middle
from tailspan_agent.records.encode import LogContext, clean_lines, without_lower
from tailspan_agent.records.framing import LEFT_OUT, split_lines
from tailspan_agent.records.severity import SEVERITIES

__all__ = ["MAX_BYTES", "MAX_LINES", "SpanLine", "SpanLines"]

MAX_LINES: Final = 100
MAX_BYTES: Final = 64 * 1024
"""Limit of the texts of all lines on one span, in bytes."""

_LINE_BYTES = 2000  # below the length at which stores cut an attribute
_LAST_LINES = 20  # that are on the span however many warnings there are
_WARN = 13
_WARNS = bytes(index < len(SEVERITIES) and SEVERITIES[index].number >= _WARN for index in range(256))


@dataclass(frozen=True, slots=True)
class SpanLine:
    """One line on a span.

    Attributes:
        position: Its position in the log as relayed.
        time_unix_nano: Its time, in ns since the epoch.
        severity: Its severity.
        stream: ``stdout``, ``stderr`` or empty.
        text: The line, cleaned and redacted; a long one without its middle.
    """

    position: int
    time_unix_nano: int
    severity: Severity
    stream: str
    text: str

    @property
    def size(self) -> int:
        """Length of the text in bytes."""
        return len(self.text.encode("utf-8", "replace"))


class SpanLines:
    """Collects the lines of one job that its span carries.

    Args:
        whole: Whether the collection starts with the first line of the log.

    Attributes:
        whole: The same.
    """

    __slots__ = ("_count", "_last", "_warnings", "whole")

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        self._count = 0
        self._last = _Newest()
        self._warnings = _Newest()

    def add(self, page: LogPage, context: LogContext) -> None:
        """Collect the lines of the next page.

        Args:
            page: The lines as read.
            context: The context of the job's records: its minimum severity and redactor count here, too.
        """
        lines = clean_lines(page)
        severities = context.learner.find_all(lines)
        if context.min_severity:
            severities = severities.translate(without_lower(context.min_severity))
        positions = [index for index, severity in enumerate(severities) if severity != LEFT_OUT]
        last = set(positions[-MAX_LINES:])
        warnings = [index for index in positions if _WARNS[severities[index]]][-MAX_LINES:]
        texts, times = split_lines(lines), page.times_unix_nano()
        streams = [run.stream for run in page.runs for _ in range(run.lines)]
        for index in sorted(last.union(warnings)):
            text = texts[index].decode("utf-8", "replace")
            if context.redactor is not None:
                text = context.redactor.redact(text)[0]
            line = SpanLine(
                self._count + index,
                times[index],
                SEVERITIES[severities[index]],
                Stream.NAMES[streams[index]],
                shorten_middle(text, _LINE_BYTES),
            )
            if index in last:
                self._last.add(line)
            if _WARNS[severities[index]]:
                self._warnings.add(line)
        self._count += len(texts)

    def chosen(self) -> list[SpanLine]:
        """Return the lines for the span, in order: some last lines, the newest warnings, then further last lines."""
        last = list(self._last.lines)
        by_priority: Iterable[SpanLine] = (
            *reversed(last[-_LAST_LINES:]),
            *reversed(self._warnings.lines),
            *reversed(last[:-_LAST_LINES]),
        )
        chosen: dict[int, SpanLine] = {}
        size = 0
        for line in by_priority:
            if line.position not in chosen and len(chosen) < MAX_LINES and size + line.size <= MAX_BYTES:
                chosen[line.position] = line
                size += line.size
        return [chosen[position] for position in sorted(chosen)]

    @property
    def count(self) -> int:
        """Number of lines that were added."""
        return self._count


class _Newest:
    """The newest lines within the limits of a span."""

    __slots__ = ("_size", "lines")

    def __init__(self) -> None:
        self.lines: deque[SpanLine] = deque()
        self._size = 0

    def add(self, line: SpanLine) -> None:
        self.lines.append(line)
        self._size += line.size
        while len(self.lines) > MAX_LINES or self._size > MAX_BYTES:
            self._size -= self.lines.popleft().size
