"""The text of a container's log as the API sends it: lines with times, and how far a reader has come. Pure.

Each line is ``RFC3339Nano SPACE text``. A sentence of the kubelet between them, such as "unable to retrieve container
logs for containerd://...", has no time and is not a line of the job.

A log is read again from a time on, which the kubelet cuts to the whole second. So a position is the time of the last
line that was taken, and how many lines of exactly this time were taken; what a reply has up to there is skipped.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import NamedTuple

from tailspan.logs.page import MAX_PAGE_BYTES

__all__ = ["START", "LineCutter", "LinePosition", "TimedLine", "since_time"]

_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?")
_LONGEST_STAMP = 40
_NANOS = 1_000_000_000
# A longer line comes in several pieces with one time.
_MAX_LINE_BYTES = 8 * MAX_PAGE_BYTES
_MAX_NOTES = 5


class LinePosition(NamedTuple):
    """How far a log was taken.

    Attributes:
        time_ns: The time of the last line taken, in ns since the epoch.
        lines: How many lines of this time were taken.
    """

    time_ns: int
    lines: int


START = LinePosition(0, 0)


class TimedLine(NamedTuple):
    """A line of a log.

    Attributes:
        time_ns: Its time, in ns since the epoch.
        number: Its number among the lines of this time, from 0.
        text: The line without its newline.
    """

    time_ns: int
    number: int
    text: bytes

    @property
    def position(self) -> LinePosition:
        """The position after it."""
        return LinePosition(self.time_ns, self.number + 1)


def since_time(position: LinePosition) -> str | None:
    """Return the ``sinceTime`` of a request for the lines after a position; None for the start of the log."""
    if position.time_ns <= 0:
        return None
    return datetime.fromtimestamp(position.time_ns // _NANOS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class LineCutter:
    """Cuts a reply into lines and skips those up to a position.

    Attributes:
        notes: The first sentences of the kubelet that are not lines.
    """

    def __init__(
        self, after: LinePosition = START, *, before_ns: int | None = None, until_ns: int | None = None
    ) -> None:
        """Begin a reply.

        Args:
            after: Skip the lines up to here. A reply that has no line of this time begins after it: all is new.
            before_ns: But do not skip lines before this time, in ns since the epoch.
            until_ns: Skip lines of this time and later: the container has been restarted since.
        """
        self._until_ns = until_ns
        self._before_ns = before_ns or 0
        self.notes: list[str] = []
        self._after: LinePosition | None = after if after != START else None
        self._rest = b""
        self._is_cut = False
        self._last_time = 0
        self._number = 0
        self._zone = (b"", b"")
        self._second_ns = 0

    def feed(self, piece: bytes) -> list[TimedLine]:
        """Return the lines that end in a piece of the reply."""
        *lines, self._rest = (self._rest + piece if self._rest else piece).split(b"\n")
        found = [entry for line in lines if (entry := self._entry(line)) is not None]
        if len(self._rest) > _MAX_LINE_BYTES:
            long, self._rest = self._rest, b""
            entry = self._entry(long)
            self._is_cut = True
            found += [entry] if entry is not None else []
        return found

    def close(self) -> list[TimedLine]:
        """Return the last line, which may have no newline."""
        rest, self._rest = self._rest, b""
        entry = self._entry(rest) if rest else None
        return [entry] if entry is not None else []

    def _entry(self, line: bytes) -> TimedLine | None:
        if self._is_cut:
            time_ns, text = self._last_time, line
            self._is_cut = False
        else:
            parsed = self._stamp(line)
            if parsed is None:
                if line.strip() and len(self.notes) < _MAX_NOTES:
                    self.notes.append(line[:500].decode("utf-8", "replace"))
                return None
            time_ns, text = parsed
        self._number = self._number + 1 if time_ns == self._last_time else 0
        self._last_time = time_ns
        if self._until_ns is not None and time_ns >= self._until_ns:
            return None
        if self._after is not None:
            if time_ns < self._before_ns:
                return TimedLine(time_ns, self._number, text)
            if time_ns < self._after.time_ns:
                return None
            following = self._after.lines - self._number if time_ns == self._after.time_ns else 0
            if following <= 1:
                # The last line that was taken, or one after it. What follows is new, also if its time is before: lines
                # of stdout and stderr can be out of order by microseconds.
                self._after = None
            if following > 0:
                return None
        return TimedLine(time_ns, self._number, text)

    def _stamp(self, line: bytes) -> tuple[int, bytes] | None:
        found = _STAMP.match(line, 0, _LONGEST_STAMP)
        if found is None:
            return None
        second, fraction, zone = found.groups()
        if self._zone != (second, zone):
            try:
                moment = datetime.fromisoformat((second + zone).decode())
            except ValueError:
                return None
            self._zone, self._second_ns = (second, zone), int(moment.timestamp()) * _NANOS
        nanos = int(fraction.ljust(9, b"0")) if fraction else 0
        return self._second_ns + nanos, line[found.end() :]
