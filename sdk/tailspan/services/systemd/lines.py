"""From entries of the journal to lines: parts of long lines are joined, and a position says where to continue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tailspan.errors import ConfigError
from tailspan.logs.page import MAX_PAGE_BYTES, Line
from tailspan.services._http_service import pack_cursor, unpack_cursor
from tailspan.services.systemd.entries import JournalEntry, MessageId, message_of, severity_of

__all__ = ["JournalPosition", "LineJoiner"]

_LINE_MAX = "line-max"
_MAX_ORDINAL = 999
_CURSOR = re.compile(r"(?:[a-z]+=[0-9a-f]*(?:;|$))*")


class JournalPosition(NamedTuple):
    """A place in the log of an invocation, after an entry.

    Attributes:
        cursor: The journal's cursor of the last entry before it; empty: the start.
        parts_from: The cursor of the entry that the oldest line begins with whose end has not come; empty: none.
        lines: Number of lines before it; None if it is not known.
        time_us: The time of the last line, in µs since the epoch.
        ordinal: The number of lines before the last one that have the same time.
        is_gone: Whether the reader was already informed that the journal has dropped the entry.
    """

    cursor: str = ""
    parts_from: str = ""
    lines: int | None = 0
    time_us: int = 0
    ordinal: int = 0
    is_gone: bool = False

    @classmethod
    def unpack(cls, cursor: bytes | None, *, service: str, job_id: str) -> JournalPosition:
        """Return the position of a page's cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        found = cls(
            parts.get("c", ""),
            parts.get("p", ""),
            parts.get("n", 0),
            parts.get("t", 0),
            parts.get("o", 0),
            bool(parts.get("g")),
        )
        texts, numbers = found[:2], (found.lines or 0, *found[3:5])
        are_cursors = all(isinstance(one, str) and _CURSOR.fullmatch(one) for one in texts)
        if not are_cursors or not all(isinstance(one, int) for one in numbers):
            shown = (cursor or b"")[:40]
            raise ConfigError(f"{shown!r} is not a cursor of this service", service=service, job_id=job_id)
        return found

    def pack(self) -> bytes:
        """Return the cursor of a page that ends here."""
        parts = {"c": self.cursor, "n": self.lines, "t": self.time_us, "o": self.ordinal}
        parts |= {"p": self.parts_from} if self.parts_from else {}
        return pack_cursor(parts | ({"g": 1} if self.is_gone else {}))

    @property
    def first_cursor(self) -> str:
        """The cursor of the entry to continue reading with; empty: the first one."""
        return self.parts_from or self.cursor


class LineJoiner:
    """Makes the lines of one invocation from its entries, in their order.

    A line of more than 48 KiB is stored in parts (``_LINE_BREAK=line-max``), between which lines of other outputs may
    be. A line of more than 1 MiB becomes several.

    Attributes:
        position: The place after the last entry.
    """

    def __init__(self, position: JournalPosition) -> None:
        self.position = position
        self._parts: dict[str, list[bytes]] = {}
        self._begun: dict[str, str] = {}

    def replay(self, entry: JournalEntry) -> None:
        """Add an entry before the position, whose line may end after it."""
        stream = str(entry.stream_id)
        text = _bytes(message_of(entry.message) or b"")
        if entry.line_break == _LINE_MAX:
            self._add_part(stream, entry.cursor, text)
            if _is_full(self._parts[stream]):
                self._take(stream)
        else:
            self._take(stream)

    def add(self, entry: JournalEntry) -> Sequence[Line]:
        """Add the next entry and return the lines that end with it."""
        # The journal itself wrote the report that it dropped lines, not the job.
        message = None if entry.message_id == MessageId.SUPPRESSED else message_of(entry.message)
        stream = str(entry.stream_id)
        lines: list[Line] = []
        self.position = self.position._replace(cursor=entry.cursor, is_gone=False)
        if message is None:
            return lines
        if entry.line_break == _LINE_MAX:
            self._add_part(stream, entry.cursor, _bytes(message))
            if not _is_full(self._parts[stream]):
                self._set_parts_from()
                return lines
            message = b""
        begun, parts = self._take(stream)
        if parts:
            text: str | bytes = b"".join((*parts, _bytes(message)))
            lines = [self._line(entry, text, begun)]
        elif entry.transport != "stdout" and b"\n" in _bytes(message):
            texts = _bytes(message).split(b"\n")
            lines = [self._line(entry, one, f"{entry.cursor}.{place}") for place, one in enumerate(texts)]
        else:
            lines = [self._line(entry, message, entry.cursor)]
        self._set_parts_from()
        return lines

    def close(self) -> Sequence[Line]:
        """Return the lines whose end will not come, because the unit and its journal have ended."""
        lines = []
        for stream in list(self._parts):
            begun, parts = self._take(stream)
            lines.append(self._line_at(self.position.time_us, b"".join(parts), begun, 0))
        self._set_parts_from()
        return lines

    def _add_part(self, stream: str, cursor: str, text: bytes) -> None:
        self._begun.setdefault(stream, cursor)
        self._parts.setdefault(stream, []).append(text)

    def _take(self, stream: str) -> tuple[str, list[bytes]]:
        return self._begun.pop(stream, ""), self._parts.pop(stream, [])

    def _set_parts_from(self) -> None:
        self.position = self.position._replace(parts_from=next(iter(self._begun.values()), ""))

    def _line(self, entry: JournalEntry, text: str | bytes, uid: str) -> Line:
        return self._line_at(entry.time_us, text, uid, severity_of(entry))

    def _line_at(self, time_us: int, text: str | bytes, uid: str, severity: int) -> Line:
        at = self.position
        # Lines that are written together have one time: their order must survive stores that sort by time.
        ordinal = min(at.ordinal + 1, _MAX_ORDINAL) if time_us == at.time_us else 0
        lines = None if at.lines is None else at.lines + 1
        self.position = at._replace(lines=lines, time_us=time_us, ordinal=ordinal)
        return Line(time_us * 1000 + ordinal, text, severity=severity, uid=uid)


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _is_full(parts: Sequence[bytes]) -> bool:
    return sum(map(len, parts)) >= MAX_PAGE_BYTES
