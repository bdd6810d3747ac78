"""The log of one attempt of a task, as Airflow returns it: entries to lines, and the position in it. Pure.

Airflow sorts the entries of an attempt by time and continues after a number of them. A line that arrives late sorts
before that number: Airflow then returns no late line, and repeats the last ones instead.

Source: airflow/utils/log/file_task_handler.py and routes/public/log.py of Airflow 3.3.2.
"""

from __future__ import annotations

import re
from _blake2 import blake2b
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from tailspan.logs.page import NANOS_PER_MS, Line, TaskRef
from tailspan.services._json_stream import ArraySplitter, ReplyError, decode_json

__all__ = ["AirflowEntry", "AttemptLog", "LogSplitter", "unix_nano"]

_STEP_BYTES = 128 << 10
_RECENT = 64
_HASH_BYTES = 8
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

    Attributes:
        ref: The attempt.
        lines: How many lines were taken since the start of the log.
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
        self._is_over = False
        self.lines, self._token, self._token_lines, self._token_at, recent = 0, "", 0, (begins_ns, 0), b""
        if packed is not None:
            self.lines, self._token, self._token_lines, self._token_at, recent = _position(packed)
        hashes = (recent[start : start + _HASH_BYTES] for start in range(0, len(recent), _HASH_BYTES))
        self._recent = deque(hashes, maxlen=_RECENT)
        self._waiting: deque[tuple[Line, bytes]] = deque()
        self._next: str | None = None
        self._may_repeat = self._in_header = self._is_first = False
        self._begin_reply()

    @property
    def token(self) -> str:
        """Where to continue; empty: at the start."""
        return self._token

    @property
    def head(self) -> Line | None:
        """The next line; None if the reply so far has no more."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def is_whole(self) -> bool:
        """Whether all lines up to the end of the log were taken."""
        return self._is_over and not self._waiting

    def restart(self) -> None:
        """Continue without the token, which the server does not know; lines that were taken are skipped by number."""
        self._token, self._token_lines, self._token_at = "", 0, (self.begins_ns, 0)
        self._begin_reply()

    def add(self, entries: Iterable[AirflowEntry | str]) -> None:
        """Add the next entries of a reply."""
        for line, mark in self._parse(entries):
            if self._skip:
                self._skip -= 1
            elif self._may_repeat and mark in self._known:
                # A late line sorts before the token: what was read last comes again.
                self.lines += 1
            else:
                self._may_repeat = False
                self._waiting.append((line, mark))

    def end(self, token: str | None) -> None:
        """End a reply.

        Args:
            token: Where the next reply continues; None at the end of the log.
        """
        self._next = token
        self._is_over = token is None
        self._settle()

    def take(self) -> Line:
        """Return the next line, which must exist, and advance the position."""
        line, mark = self._waiting.popleft()
        self.lines += 1
        self._recent.append(mark)
        self._settle()
        return line

    def pack(self) -> list[object]:
        """Return the position, for a cursor."""
        return [self.lines, self._token, self._token_lines, *self._token_at, b"".join(self._recent)]

    def _begin_reply(self) -> None:
        self._next = None
        self._at = self._token_at
        self._skip = self.lines - self._token_lines
        self._known = frozenset(self._recent)
        self._may_repeat = bool(self._known)
        self._in_header = not self._token
        self._is_first = self._in_header

    def _settle(self) -> None:
        """Continue at the new token once all lines before it were taken."""
        if self._next and not self._waiting:
            self._token, self._token_lines, self._token_at, self._next = self._next, self.lines, self._at, None

    def _parse(self, entries: Iterable[AirflowEntry | str]) -> Iterator[tuple[Line, bytes]]:
        """Yield each line, and what marks it as read."""
        nano, ordinal = self._at
        for entry in entries:
            if isinstance(entry, str):
                entry = AirflowEntry(event=entry)
            event = entry.event if isinstance(entry.event, str) else str(entry.event)
            if self._in_header and self._skips_header(event):
                continue
            moment = unix_nano(entry.timestamp)
            if moment is not None and moment != nano:
                nano, ordinal = moment, 0
            level = entry.level.lower() if isinstance(entry.level, str) else ""
            stream = _STREAMS.get(entry.logger, "") if isinstance(entry.logger, str) else ""
            for place, text in enumerate((*event.split("\n"), *_traceback(entry.error_detail))):
                # The number within its instant keeps equal lines apart, and is known only from the instant's start on.
                uid = f"{self.ref.task_id}\0{self.ref.attempt}\0{nano}\0{ordinal}\0{text}"
                mark = _hash(f"{nano}\0{ordinal if moment is None else f'-{place}'}\0{text}")
                line = Line(
                    nano + min(ordinal, NANOS_PER_MS - 1), text, stream, self.ref, _SEVERITIES.get(level, 0), uid
                )
                ordinal += 1
                self._at = nano, ordinal
                yield line, mark

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


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=_HASH_BYTES).digest()


def _position(packed: object) -> tuple[int, str, int, tuple[int, int], bytes]:
    if not isinstance(packed, list):
        raise TypeError("a position is a list")
    lines, token, token_lines, nano, ordinal, recent = packed
    numbers = (lines, token_lines, nano, ordinal)
    if not all(type(one) is int and one >= 0 for one in numbers) or token_lines > lines:
        raise TypeError("a position has numbers")
    if not isinstance(token, str) or not isinstance(recent, bytes):
        raise TypeError("a position has a token and hashes")
    return lines, token, token_lines, (nano, ordinal), recent


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
