"""The log of one attempt of a task, as Airflow returns it: entries to lines, and the position in it. Pure.

Airflow sorts the entries of an attempt by time and continues after a number of them. A line that is written late sorts
before that number: Airflow then repeats the last lines and does not return the late one.

Source: airflow/utils/log/file_task_handler.py and routes/public/log.py of Airflow 3.3.2.
"""

from __future__ import annotations

import re
from _blake2 import blake2b
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from tailspan.logs.page import NANOS_PER_MS, Line, TaskRef
from tailspan.services._json_stream import ArraySplitter, ReplyError, decode_json

__all__ = ["AirflowEntry", "AttemptLog", "LogSplitter", "unix_nano"]

_STEP_BYTES = 128 << 10
# How many entries a read has again: at least the first number, if there are as many; mostly fewer than twice the other.
_LEAST_AGAIN = 32
_MOST_AGAIN = 500
_RECENT = 256
_HASH_BYTES = 4
_MARK_BYTES = 8 + _HASH_BYTES
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SEVERITIES: Mapping[str, int] = {
    "debug": 5,
    "info": 9,
    "warning": 13,
    "warn": 13,
    "error": 17,
    "exception": 17,
    "critical": 21,
    "fatal": 21,
}
_STREAMS: Mapping[str, str] = {"task.stdout": "stdout", "task.stderr": "stderr"}
_HEADER = "::group::Log message source details"
_HEADER_END = "::endgroup::"


class AirflowEntry(msgspec.Struct, gc=False):
    """An entry of a log; other keys are ignored."""

    event: Any = ""
    timestamp: Any = None
    level: Any = None
    logger: Any = None
    error_detail: Any = None


class _Reply(msgspec.Struct, gc=False):
    content: list[AirflowEntry | str]
    continuation_token: str | None = None


_entries = msgspec.json.Decoder(list[AirflowEntry | str])
_whole = msgspec.json.Decoder(_Reply)
_TOKEN_KEY = rb'"continuation_token"\s*:\s*(?:null|"(?P<token>[^"\\]*)")'
_BEGINNING = re.compile(rb"\s*\{\s*(?:" + _TOKEN_KEY + rb'\s*,\s*)?"content"\s*:\s*(?=\[)')
_MAX_BEGINNING_BYTES = 4096


class LogSplitter(ArraySplitter[AirflowEntry | str]):
    """Turns the pieces of a reply into lists of entries.

    Attributes:
        token: Where the next reply continues, known after `close`; None if the log is at its end.
    """

    def __init__(self) -> None:
        super().__init__(_entries, _STEP_BYTES)
        self.token: str | None = None

    def close(self) -> list[AirflowEntry | str]:
        """End the reply and return the remaining entries.

        Raises:
            ReplyError: The reply is not a log, or is incomplete.
        """
        self._join()
        try:
            text = b'{"content":' + self._buffer if self._begun else bytes(self._buffer)
            reply = decode_json(_whole, text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplyError(str(error)) from None
        self.token = self.token or reply.continuation_token
        return reply.content

    def _begin(self) -> None:
        found = _BEGINNING.match(self._buffer)
        if found is not None:
            self.token = found["token"].decode() if found["token"] else None
            del self._buffer[: found.end()]
            self._begun = True
            return
        start = bytes(self._buffer.lstrip()[:20])
        if len(self._buffer) > _MAX_BEGINNING_BYTES or not start.startswith(b"{"):
            raise ReplyError("it is HTML" if start.startswith(b"<") else f"it starts with {start!r}")


class AttemptLog:
    """The log of one attempt, read from a position on. The position advances with each line that is taken.

    A read starts at a token that lies some entries back, so that it has most of the lines that were written late; what
    was read before is recognized by time and text.

    Attributes:
        ref: The attempt.
        begins_ns: No line is older, in ns since the epoch; for lines without a time.
    """

    def __init__(self, ref: TaskRef, begins_ns: int, packed: object = None) -> None:
        """Begin at a position.

        Args:
            ref: The attempt.
            begins_ns: As the attribute.
            packed: The position as `pack` returned it; None: the start.

        Raises:
            TypeError, ValueError: It is not a position.
        """
        self.ref = ref
        self.begins_ns = begins_ns
        start = _Place("", begins_ns, 0)
        self._from, self._then, self._since_then, self._part, self._seen = start, start, 0, 0, _Seen()
        if packed is not None:
            self._from, self._then, self._since_then, self._part, self._seen = _position(packed)
        self._waiting: deque[_Waiting] = deque()
        self._end: _Place | None = None
        self._unfinished: _Mark | None = None
        self._is_over = self._in_header = self._is_first = False
        self._begin_reply()

    @property
    def token(self) -> str:
        """Where to read from; empty: from the start."""
        return self._from.token

    @property
    def head(self) -> Line | None:
        """The next line; None if the reply so far has no more."""
        return self._waiting[0].line if self._waiting else None

    @property
    def is_whole(self) -> bool:
        """Whether all lines up to the end of the log were taken."""
        return self._is_over and not self._waiting

    def restart(self) -> None:
        """Read from the start, because the server does not know the token; what was read stays known."""
        self._from = self._then = _Place("", self.begins_ns, 0)
        self._begin_reply()

    def add(self, entries: Iterable[AirflowEntry | str]) -> None:
        """Add the next entries of a reply."""
        for one in entries:
            entry = AirflowEntry(event=one) if isinstance(one, str) else one
            event = entry.event if isinstance(entry.event, str) else str(entry.event)
            if self._in_header and self._skips_header(event):
                continue
            lines, mark = self._lines_of(entry, event)
            first = 0
            if self._before.has(mark):
                if mark != self._unfinished:
                    continue
                first, self._unfinished = self._part, None
            last = len(lines) - 1
            self._waiting += [
                _Waiting(line, None if place else mark, place == last)
                for place, line in enumerate(lines)
                if place >= first
            ]

    def end(self, token: str | None) -> None:
        """End a reply.

        Args:
            token: Where the next reply would continue; None at the end of the log.
        """
        self._is_over = token is None
        self._end = _Place(token, *self._at) if token else None
        self._settle()

    def take(self) -> Line:
        """Return the next line, which must exist, and advance the position."""
        line, mark, is_last = self._waiting.popleft()
        if mark is not None:
            self._seen.add(mark)
            self._since_then += 1
        self._part = 0 if is_last else self._part + 1
        self._settle()
        return line

    def pack(self) -> list[object]:
        """Return the position, for a cursor."""
        return [*self._from, *self._then, self._since_then, self._part, *self._seen.pack()]

    def _begin_reply(self) -> None:
        self._at = self._from.nano, self._from.ordinal
        self._end, self._is_over = None, False
        self._before = _Seen(*self._seen.pack())
        self._unfinished = self._before.newest if self._part else None
        self._in_header = self._is_first = not self._from.token

    def _settle(self) -> None:
        """Move the place to read from, once all lines of a reply were taken."""
        if self._end is None or self._waiting:
            return
        if self._since_then > _MOST_AGAIN:
            self._from = self._then = self._end
            self._since_then = 0
        elif self._since_then >= _LEAST_AGAIN:
            self._from, self._then = self._then, self._end
            self._since_then = 0
        self._end = None

    def _lines_of(self, entry: AirflowEntry, event: str) -> tuple[list[Line], _Mark]:
        """Return the lines of an entry, and what marks it as read."""
        nano, ordinal = self._at
        moment = unix_nano(entry.timestamp)
        if moment is not None and moment != nano:
            nano, ordinal = moment, 0
        # Entries without a time have the one of the entry before them, and their number from there on.
        mark = _Mark(nano + min(ordinal, NANOS_PER_MS - 1) if moment is None else nano, _hash(event))
        level = entry.level.lower() if isinstance(entry.level, str) else ""
        severity = _SEVERITIES.get(level, 0)
        stream = _STREAMS.get(entry.logger, "") if isinstance(entry.logger, str) else ""
        lines: list[Line] = []
        for text in (*event.split("\n"), *_traceback(entry.error_detail)):
            # The number within its instant keeps equal lines apart.
            uid = f"{self.ref.task_id}\0{self.ref.attempt}\0{nano}\0{ordinal}\0{text}"
            lines.append(Line(nano + min(ordinal, NANOS_PER_MS - 1), text, stream, self.ref, severity, uid))
            ordinal += 1
        self._at = nano, ordinal
        return lines, mark

    def _skips_header(self, event: str) -> bool:
        """Return whether an entry belongs to the header, which names files and hosts of the server."""
        if self._is_first:
            self._is_first = False
            self._in_header = event == _HEADER
            return self._in_header
        self._in_header = event != _HEADER_END
        return True


def unix_nano(time: object) -> int | None:
    """Return a time of Airflow in ns since the epoch; None for what is not a time."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError:
            return None
    if not isinstance(time, datetime):
        return None
    delta = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
    return max(0, (delta.days * 86_400 + delta.seconds) * 1_000_000_000 + delta.microseconds * 1_000)


class _Place(NamedTuple):
    """A token, and the state of the parser there: the time of the newest entry, and the number of lines since."""

    token: str
    nano: int
    ordinal: int


class _Mark(NamedTuple):
    """An entry that was read: its time and the hash of its text."""

    nano: int
    digest: bytes


class _Waiting(NamedTuple):
    """A line of a reply: the mark of its entry if it is the first one, and whether it is the last one."""

    line: Line
    mark: _Mark | None
    is_last: bool


class _Seen:
    """The entries that were read last."""

    def __init__(self, newest_ns: int = -1, unknown_ns: int = -1, digests: bytes = b"") -> None:
        """Begin with what `pack` returned.

        Args:
            newest_ns: The time of the newest entry.
            unknown_ns: Entries up to this time are not known one by one.
            digests: Of the others.
        """
        self._newest_ns = newest_ns
        self._unknown_ns = unknown_ns
        self._marks = deque(
            _Mark(int.from_bytes(digests[start : start + 8]), digests[start + 8 : start + _MARK_BYTES])
            for start in range(0, len(digests), _MARK_BYTES)
        )
        self._known = frozenset(self._marks)

    @property
    def newest(self) -> _Mark | None:
        """The entry that was read last."""
        return self._marks[-1] if self._marks else None

    def has(self, mark: _Mark) -> bool:
        """Return whether an entry was read; those older than the known ones count as read, until the last read."""
        return mark.nano <= self._newest_ns and (mark.nano <= self._unknown_ns or mark in self._known)

    def add(self, mark: _Mark) -> None:
        """Note an entry as read."""
        self._newest_ns = max(self._newest_ns, mark.nano)
        self._marks.append(mark)
        if len(self._marks) > _RECENT:
            self._unknown_ns = max(self._unknown_ns, self._marks.popleft().nano)

    def pack(self) -> tuple[int, int, bytes]:
        """Return it for a cursor."""
        digests = b"".join(mark.nano.to_bytes(8) + mark.digest for mark in self._marks)
        return self._newest_ns, self._unknown_ns, digests


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=_HASH_BYTES).digest()


def _position(packed: object) -> tuple[_Place, _Place, int, int, _Seen]:
    if not isinstance(packed, list):
        raise TypeError("a position is a list")
    token, nano, ordinal, then_token, then_nano, then_ordinal, since, part, newest_ns, unknown_ns, digests = packed
    numbers = (nano, ordinal, then_nano, then_ordinal, since, part, newest_ns + 1, unknown_ns + 1)
    if not all(type(one) is int and one >= 0 for one in numbers):
        raise TypeError("a position has numbers")
    if not (isinstance(token, str) and isinstance(then_token, str) and isinstance(digests, bytes)):
        raise TypeError("a position has tokens and hashes")
    seen = _Seen(newest_ns, unknown_ns, digests)
    return _Place(token, nano, ordinal), _Place(then_token, then_nano, then_ordinal), since, part, seen


def _traceback(details: object) -> list[str]:
    """Return an exception in the form in which Python prints it: first the one that was raised first."""
    texts: list[str] = []
    if not isinstance(details, list):
        return texts
    following: dict[str, Any] | None = None
    for detail in reversed([one for one in details if isinstance(one, dict)]):
        if following is not None:
            how = (
                "The above exception was the direct cause of the following exception:"
                if following.get("is_cause")
                else "During handling of the above exception, another exception occurred:"
            )
            texts += ["", how, ""]
        texts += _exception(detail)
        following = detail
    return texts


def _exception(detail: Mapping[str, Any]) -> list[str]:
    frames = [one for one in _list(detail.get("frames")) if isinstance(one, dict)]
    texts = ["Traceback (most recent call last):"] if frames else []
    texts += [f'  File "{one.get("filename")}", line {one.get("lineno")}, in {one.get("name")}' for one in frames]
    kind, value = detail.get("exc_type") or "Exception", str(detail.get("exc_value") or "")
    texts += f"{kind}: {value}".split("\n") if value else [str(kind)]
    for note in _list(detail.get("exc_notes")):
        texts += str(note).split("\n")
    for number, nested in enumerate(_list(detail.get("exceptions")), 1):
        texts += [f"  ---------------- {number} ----------------", *(f"  {text}" for text in _traceback(nested))]
    return texts


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
