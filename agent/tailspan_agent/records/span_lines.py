"""`SpanLines`: the lines of a job that its spans carry, for stores that keep only traces. Pure.

A span must stay small, so that of a job carries the last lines and the newest warnings and errors, and that of a task's
attempt its last lines. They are collected while the log is relayed: a job's whole log may be far larger than memory,
and so may the lines of all its tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from tailspan.logs.page import LogPage, Stream
from tailspan_agent.otlp.log_record import Severity
from tailspan_agent.otlp.span import SpanEvent
from tailspan_agent.otlp.text import shorten_middle
from tailspan_agent.otlp.wire import AttributeValue
from tailspan_agent.records.encode import LogContext, clean_lines, with_known_severities, without_lower
from tailspan_agent.records.framing import LEFT_OUT, split_lines
from tailspan_agent.records.severity import SEVERITIES, find_severities

__all__ = [
    "MAX_BYTES",
    "MAX_LINES",
    "MAX_TASKS_BYTES",
    "MAX_TASK_BYTES",
    "MAX_TASK_LINES",
    "SpanLine",
    "SpanLines",
    "TaskLines",
]

MAX_LINES: Final = 100
MAX_BYTES: Final = 64 * 1024
"""Limit of the texts of all lines on one span, in bytes."""
MAX_TASK_LINES: Final = 50
MAX_TASK_BYTES: Final = 16 * 1024
"""Limit of the texts of all lines of one attempt of a task, in bytes."""
MAX_TASKS_BYTES: Final = 512 * 1024
"""Limit of the texts of all lines of a job's tasks whose spans are not written yet, in bytes."""
_MAX_TASKS: Final = 4096

_LINE_BYTES = 2000  # below the length at which stores cut an attribute
_LAST_LINES = 20  # that are on the span however many warnings there are
_WARN = 13
_WARNS = bytes(index < len(SEVERITIES) and SEVERITIES[index].number >= _WARN for index in range(256))

_TaskKey = tuple[str, int]


class SpanLine(msgspec.Struct, frozen=True):
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

    @property
    def event(self) -> SpanEvent:
        """The line as an event of a span."""
        attributes: dict[str, AttributeValue] = {"message": self.text}
        if self.severity.number:
            attributes["severity"] = self.severity.text
        if self.stream:
            attributes["log.iostream"] = self.stream
        return SpanEvent(time_unix_nano=max(0, self.time_unix_nano), name="log", attributes=attributes)


class SpanLines:
    """Collects the lines of one job that its span carries.

    Args:
        whole: Whether the collection starts with the first line of the log.

    Attributes:
        whole: The same.
        tasks: The lines of the job's tasks.
    """

    __slots__ = ("_count", "_last", "_warnings", "tasks", "whole")

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        self.tasks = TaskLines()
        self._count = 0
        self._last = _Newest(MAX_LINES, MAX_BYTES)
        self._warnings = _Newest(MAX_LINES, MAX_BYTES)

    def add(self, page: LogPage, context: LogContext) -> None:
        """Collect the lines of the next page.

        Args:
            page: The lines as read.
            context: The context of the job's records: its minimum severity and redactor count here, too.
        """
        lines = clean_lines(page)
        severities = with_known_severities(find_severities(lines), page.runs)
        if context.min_severity:
            severities = severities.translate(without_lower(context.min_severity))
        positions = [index for index, severity in enumerate(severities) if severity != LEFT_OUT]
        last = set(positions[-MAX_LINES:])
        warnings = [index for index in positions if _WARNS[severities[index]]][-MAX_LINES:]
        texts, times = split_lines(lines), page.times_unix_nano()
        streams = [run.stream for run in page.runs for _ in range(run.lines)]
        attempts = _last_of_attempts(page, positions)
        for index in sorted(last.union(warnings, attempts)):
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
            if index in attempts:
                self.tasks.add(attempts[index], line)
        self._count += len(texts)
        self.tasks.count_lines(page)

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


class TaskLines:
    """The last lines of each attempt of a job's tasks, until its span is written.

    Of too many lines together, those of the attempt that printed least recently go first.
    """

    __slots__ = ("_attempts", "_counts", "_size")

    def __init__(self) -> None:
        self._attempts: dict[_TaskKey, _Newest] = {}
        self._counts: dict[_TaskKey, int] = {}
        self._size = 0

    def add(self, key: tuple[str, int], line: SpanLine) -> None:
        """Take in a line.

        Args:
            key: The task's id and the attempt.
            line: The line, newer than those before.
        """
        lines = self._attempts.pop(key, None) or _Newest(MAX_TASK_LINES, MAX_TASK_BYTES)
        self._size -= lines.size
        lines.add(line)
        self._size += lines.size
        self._attempts[key] = lines  # the last one now
        while len(self._attempts) > 1 and (self._size > MAX_TASKS_BYTES or len(self._attempts) > _MAX_TASKS):
            self._size -= self._attempts.pop(next(iter(self._attempts))).size

    def count_lines(self, page: LogPage) -> None:
        """Count the lines of each attempt on a page; of too many attempts, the later ones are not counted."""
        for run in page.runs:
            if run.task:
                key = page.tasks[run.task - 1].key
                if key in self._counts or len(self._counts) < _MAX_TASKS:
                    self._counts[key] = self._counts.get(key, 0) + run.lines

    def of(self, key: tuple[str, int]) -> tuple[list[SpanLine], int]:
        """Return the lines of an attempt, and how many more it has."""
        lines = list(self._attempts[key].lines) if key in self._attempts else []
        return lines, max(0, self._counts.get(key, 0) - len(lines))

    def drop(self, key: tuple[str, int]) -> None:
        """Drop the lines of an attempt whose span is written."""
        self._counts.pop(key, None)
        if (lines := self._attempts.pop(key, None)) is not None:
            self._size -= lines.size

    @property
    def size(self) -> int:
        """Length of all texts in bytes."""
        return self._size


def _last_of_attempts(page: LogPage, positions: Sequence[int]) -> dict[int, _TaskKey]:
    """Return the positions of the last lines of each attempt, with the attempt."""
    if not page.tasks:
        return {}
    owners = [run.task for run in page.runs for _ in range(run.lines)]
    newest: dict[int, deque[int]] = {}
    for index in positions:
        if owners[index]:
            newest.setdefault(owners[index], deque(maxlen=MAX_TASK_LINES)).append(index)
    return {index: page.tasks[task - 1].key for task, found in newest.items() for index in found}


class _Newest:
    """The newest lines within limits."""

    __slots__ = ("_max_bytes", "_max_lines", "lines", "size")

    def __init__(self, max_lines: int, max_bytes: int) -> None:
        self.lines: deque[SpanLine] = deque()
        self.size = 0
        self._max_lines = max_lines
        self._max_bytes = max_bytes

    def add(self, line: SpanLine) -> None:
        self.lines.append(line)
        self.size += line.size
        while len(self.lines) > self._max_lines or self.size > self._max_bytes:
            self.size -= self.lines.popleft().size
