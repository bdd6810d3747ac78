"""From events and printed text to lines, and how far both were read. Pure: values in, values out.

Events are inserted by several processes at once. With PostgreSQL an event can become visible behind a cursor that was
returned a moment ago, since its id is drawn before its transaction ends. Measured with four processes: the cursor alone
never reads 6 of 1,600 events. So a read goes back by a few seconds and drops the events that it had, by their content:
events have no ids in the API.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from tailspan.errors import ConfigError
from tailspan.logs.page import NANOS_PER_MS, Line, TaskRef
from tailspan.services._http_service import drop_oldest, pack_cursor, unpack_cursor
from tailspan.services.dagster.wire import ErrorInfo, Event, Events

__all__ = [
    "Capture",
    "EventReader",
    "Item",
    "Position",
    "Printed",
    "Records",
    "error_lines",
    "event_items",
    "head_bytes",
    "output_items",
    "step_name",
]

_OVERLAP_S = 4.0
_OLD_S = 3600.0
# Equal events of one millisecond are inserted one after the other, with few of other processes between.
_OLDER_EVENTS = 32
_DIGEST_BYTES = 8
_REPLACEMENT = "\ufffd"
# CapturedLogs that was printed before the end of a step reaches its file a moment later.
_LATE_OUTPUT_S = 5.0
# An object store has it once it is uploaded.
_LATE_FILE_S = 60.0
# A record is printed first, and inserted as an event then.
_LATE_EVENT_S = 2.0
_MAX_RECORDS = 2000
_NANOS_A_PLACE, _MAX_PLACE = 1000, 998

_SEVERITIES = {"DEBUG": 5, "INFO": 9, "WARNING": 13, "ERROR": 17, "CRITICAL": 21}
_STEP_ENDS = frozenset({"STEP_SUCCESS", "STEP_FAILURE", "STEP_SKIPPED", "STEP_UP_FOR_RETRY"})
_RUN_ENDS = frozenset({"RUN_SUCCESS", "RUN_FAILURE", "RUN_CANCELED"})
_COLOUR = r"(?:\x1b\[[\d;]*m)?"
_RECORD = re.compile(
    rf"{_COLOUR}(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}){_COLOUR} - dagster - {_COLOUR}[A-Z]+{_COLOUR} - (.*)"
)
_IN_PROCESS = "Executing steps in process"
_LINKS = (
    "",
    "Stack Trace:",
    "The above exception was caused by the following exception:",
    "The above exception occurred during handling of the following exception:",
)


class Capture(msgspec.Struct, array_like=True):
    """What one process prints, and how far it was read.

    Attributes:
        key: The key of its file.
        step: The step that it executes; empty for a process of several steps.
        attempt: The attempt of that step.
        started_ms: When it began, in ms since the epoch.
        ended_ms: When its step or the run ended; 0 while it prints.
        offsets: Bytes read of stdout and stderr.
        lines: Lines in these bytes, also those that were left out.
    """

    key: str
    step: str
    attempt: int
    started_ms: int
    ended_ms: int
    offsets: tuple[int, int] = (0, 0)
    lines: tuple[int, int] = (0, 0)

    def time_ms(self, read_ms: int) -> int:
        """Return the time of lines that were read then, before the end: output has no times of its own."""
        return max(self.started_ms, min(read_ms, self.ended_ms - 1 if self.ended_ms else read_ms))

    def is_flushed(self, now_s: float) -> bool:
        """Return whether a last line without newline is complete."""
        return bool(self.ended_ms) and now_s > self.ended_ms / 1000 + _LATE_OUTPUT_S

    def is_over(self, now_s: float) -> bool:
        """Return whether nothing more will be printed."""
        return bool(self.ended_ms) and now_s > self.ended_ms / 1000 + _LATE_FILE_S


class Item(NamedTuple):
    """A line, and what was read once it is sent.

    Attributes:
        line: The line.
        event: The event that it completes.
        capture: The key of the file that it comes from.
        stream: 0: stdout, 1: stderr.
        offset: The end of the line in its stream, in bytes; None where only the end of its piece is known.
        number: The number of the line in its stream, from 1.
    """

    line: Line
    event: Event | None = None
    capture: str = ""
    stream: int = 0
    offset: int | None = None
    number: int = 0


class EventReader:
    """Separates the events of a read that are new from those that were read before."""

    def __init__(self, older: Sequence[bytes], known: Sequence[bytes]) -> None:
        """Begin.

        Args:
            older: Digests of the last events before the read begins.
            known: Digests of the events after its begin that were read before.
        """
        self._numbers = Counter(older)
        self._known = Counter(known)

    @property
    def missing(self) -> Counter[bytes]:
        """Digests of the events that were read before and have not come again, each with their number."""
        return self._known

    def new_events(self, events: Sequence[Event]) -> list[tuple[Event, str, int]]:
        """Return the events of the next page that were not read.

        Args:
            events: In the order of their insertion.

        Returns:
            Each with an id, from its content and the number of its repeats, and with the number of earlier events of
            its step and millisecond on the page.
        """
        found = []
        instants: Counter[tuple[int, str | None]] = Counter()
        for event in events:
            digest, instant = _digest(event), (event.timestamp, event.step_key)
            self._numbers[digest] += 1
            if not _take(self._known, digest):
                found.append((event, f"{digest.hex()}.{self._numbers[digest]}", instants[instant]))
            instants[instant] += 1
        return found


class Position:
    """How far a run's log was read.

    Attributes:
        after: The cursor after which events are requested; None: from the start.
        captures: What the processes print that may print more.
    """

    def __init__(self) -> None:
        self.after: str | None = None
        self.captures: dict[str, Capture] = {}
        # A later cursor, and when it was returned: it becomes `after` once nothing can appear behind it.
        self._next: str | None = None
        self._next_s = 0.0
        # Digests of the last events before `after`, of those between both cursors, and after the later one.
        self._older: list[bytes] = []
        self._before: list[bytes] = []
        self._since: list[bytes] = []
        self._retries: dict[str, int] = {}
        # Whether one process executes all steps: its capture names those that are known then, without dynamic ones.
        self._in_process = False

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> Position:
        """Return the position of a cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        if cursor is None:
            return cls()
        try:
            found = msgspec.convert(parts.get("d"), _Packed)
        except msgspec.ValidationError:
            text = f"{cursor[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None
        position = cls()
        position.after, position._next, position._next_s = found.after, found.next, found.next_s
        position._older, position._before, position._since = map(_split, (found.older, found.before, found.since))
        position._retries, position._in_process = found.retries, found.in_process
        position.captures = {capture.key: capture for capture in found.captures}
        return position

    def pack(self) -> bytes:
        """Return the cursor."""
        packed = _Packed(
            after=self.after,
            next=self._next,
            next_s=self._next_s,
            older=b"".join(self._older),
            before=b"".join(self._before),
            since=b"".join(self._since),
            retries=self._retries,
            in_process=self._in_process,
            captures=list(self.captures.values()),
        )
        return pack_cursor({"d": msgspec.to_builtins(packed, builtin_types=(bytes,))})

    def copy(self) -> Position:
        """Return a position that is changed apart from this one."""
        return Position.read(self.pack(), service="", job_id="")

    def reader(self) -> EventReader:
        """Return what separates new events from known ones, for a read from `after` on."""
        return EventReader(self._older, [*self._before, *self._since])

    def add(self, event: Event) -> None:
        """Note an event as read, and what it says of steps and processes."""
        self._since.append(_digest(event))
        kind, step, ms = event.event_type, self._step_of(event), event.timestamp
        self._in_process |= kind == "ENGINE_EVENT" and (event.message or "").startswith(_IN_PROCESS)
        if kind == "LOGS_CAPTURED" and event.file_key:
            self.captures[event.file_key] = Capture(event.file_key, step, self._attempt(step), ms, 0)
        elif kind in _STEP_ENDS or kind in _RUN_ENDS:
            for capture in self.captures.values():
                if not capture.ended_ms and (kind in _RUN_ENDS or (step and capture.step == step)):
                    capture.ended_ms = max(ms, capture.started_ms)
        if kind == "STEP_UP_FOR_RETRY":
            self._retries[step] = self._retries.get(step, 0) + 1

    def task_of(self, event: Event) -> TaskRef | None:
        """Return the attempt that an event belongs to, before it is added; None for one of the run."""
        step = self._step_of(event)
        return TaskRef(step, step_name(step), self._attempt(step)) if step else None

    def advance(self, item: Item) -> None:
        """Note a line as read."""
        if item.event is not None:
            self.add(item.event)
        elif item.capture in self.captures:
            self.printed(item.capture, item.stream, item.offset, item.number)

    def printed(self, key: str, stream: int, offset: int | None, number: int) -> None:
        """Note how far a process's output was read; without offset the next read begins where the last one did."""
        capture = self.captures[key]
        if offset is not None:
            other = 1 - stream
            offsets, lines = (offset, capture.offsets[other]), (number, capture.lines[other])
            capture.offsets, capture.lines = (offsets, lines) if stream == 0 else (offsets[::-1], lines[::-1])

    def move(self, reply: Events, reader: EventReader, now_s: float) -> None:
        """Note a reply whose events were all added.

        Args:
            reply: The reply.
            reader: What has read it, and the replies before.
            now_s: When it was requested, in seconds since the epoch.
        """
        if reader.missing and not reply.has_more:
            # All events have come, so these are before the cursor: they were late.
            missing = reader.missing.copy()
            self._before = [one for one in self._before if not _take(missing, one)]
            self._since = [one for one in self._since if not _take(missing, one)]
        elif reader.missing:
            return
        if not reply.cursor or not reply.events:
            return
        if max(event.timestamp for event in reply.events) / 1000 < now_s - _OLD_S:
            # Nothing appears behind events that are so old: there is no need to know what was read of them.
            self._older = [*self._older, *self._before, *self._since][-_OLDER_EVENTS:]
            self.after, self._next, self._before, self._since = reply.cursor, None, [], []
        elif self._next is None:
            self._next, self._next_s, self._before, self._since = reply.cursor, now_s, self._since, []
        elif reply.has_more or now_s - self._next_s >= _OVERLAP_S:
            self._older = [*self._older, *self._before][-_OLDER_EVENTS:]
            self.after, self._before, self._since = self._next, self._since, []
            self._next, self._next_s = reply.cursor, now_s

    def close(self, now_s: float) -> None:
        """Forget the processes that print nothing more."""
        self.captures = {key: one for key, one in self.captures.items() if not one.is_over(now_s)}

    def _step_of(self, event: Event) -> str:
        """Return the step of an event; empty for one of the run, or of several steps."""
        if event.step_key or len(event.step_keys) != 1 or self._in_process:
            return event.step_key or ""
        return event.step_keys[0]

    def _attempt(self, step: str) -> int:
        return self._retries.get(step, 0) + 1


class _Packed(msgspec.Struct, array_like=True):
    after: str | None
    next: str | None
    next_s: float
    older: bytes
    before: bytes
    since: bytes
    retries: dict[str, int]
    in_process: bool
    captures: list[Capture]


class Printed(NamedTuple):
    """A piece of what a process has printed to one stream.

    Attributes:
        text: The text; bytes that are not UTF-8 are U+FFFD.
        size: Its bytes.
        full: Whether there may be more behind it.
    """

    text: str
    size: int
    full: bool


class Records:
    """Which lines of stderr are Dagster's own records: the events of the run, which are lines already.

    Of a record, only the first line says so. Those that follow are known from the event.
    """

    def __init__(self, run_id: str) -> None:
        self._run = f" - {run_id} - "
        self._more: dict[str, frozenset[str]] = {}

    def add(self, event: Event) -> None:
        """Note the lines of an event's record that follow the first one."""
        first, *more = (event.message or "").split("\n")
        if event.error is not None:
            more += _LINKS
            for one in event.error.chain():
                more += "".join((one.message or "", *one.stack)).split("\n")
                more.append((one.message or "").strip() + ":")
        if more:
            self._more[first] = self._more.get(first, frozenset()) | frozenset(line.rstrip() for line in more)
            drop_oldest(self._more, _MAX_RECORDS)

    def match(self, line: str) -> tuple[float, frozenset[str]] | None:
        """Return the time of a record in seconds since the epoch, and the lines that may follow; None for others."""
        found = _RECORD.match(line) if self._run in line else None
        if found is None:
            return None
        time_s = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S %z").timestamp()
        parts = found[2].split(" - ")
        for start in range(1, len(parts)):
            more = self._more.get(" - ".join(parts[start:]))
            if more is not None:
                return time_s, more
        return time_s, frozenset()


def output_items(
    capture: Capture, stream: int, piece: Printed, consumed: int, records: Records, read_s: float
) -> tuple[list[Item], int, int]:
    """Return the lines of a piece, and up to which byte and line of its stream it is read.

    Args:
        capture: The process that printed it.
        stream: 0: stdout, 1: stderr.
        piece: What was read after the capture's offset.
        consumed: How many of its bytes are whole lines.
        records: What to leave out of stderr.
        read_s: When it was requested, in seconds since the epoch.
    """
    # The last line has no newline only where all of the piece is consumed.
    lines = piece.text.split("\n")
    unfinished = bool(lines[-1]) and consumed == piece.size
    if not unfinished:
        lines.pop()
    keep = _kept(lines, records, capture, piece, read_s) if stream else [True] * len(lines)
    task = TaskRef(capture.step, step_name(capture.step), capture.attempt) if capture.step else None
    nano, name = capture.time_ms(int(read_s * 1000)) * NANOS_PER_MS, ("stdout", "stderr")[stream]
    first, start = capture.offsets[stream], capture.lines[stream]
    ends = _ends(lines, first, first + consumed, unfinished=unfinished)
    items: list[Item] = []
    for place, (line, kept) in enumerate(zip(lines, keep, strict=False)):
        if kept:
            # Whatever page a line is in, it has the same place among those that were read at the same time.
            number = start + place
            at = nano + min(2 * number + stream, NANOS_PER_MS - 1)
            printed = Line(at, line, name, task, 0, f"{capture.key}.{name}.{number}")
            items.append(Item(printed, None, capture.key, stream, ends[place], number + 1))
    end = first + consumed
    if len(keep) < len(lines):
        # The rest waits for its events.
        end = (ends[len(keep) - 1] or first) if keep else first
    return items, end, start + len(keep)


def _ends(lines: Sequence[str], first: int, end: int, *, unfinished: bool) -> list[int | None]:
    """Return the byte at which each line of a stream ends; None where U+FFFD hides it, whose bytes are not known.

    Args:
        lines: The lines.
        first: The byte at which they begin.
        end: The byte at which they end.
        unfinished: Whether the last one has no newline.
    """
    ends: list[int | None] = [None] * len(lines)
    at = first
    for place, line in enumerate(lines):
        if _REPLACEMENT in line:
            break
        at = min(at + len(line.encode()) + 1, end)
        ends[place] = at
    at = end + unfinished
    for place in reversed(range(len(lines))):
        if ends[place] is not None:
            break
        ends[place] = min(at, end)
        if _REPLACEMENT in lines[place]:
            break
        at -= len(lines[place].encode()) + 1
    return ends


def _kept(lines: Sequence[str], records: Records, capture: Capture, piece: Printed, read_s: float) -> list[bool]:
    """Return for each line whether it is the program's own; fewer than lines where the rest must wait."""
    keep: list[bool] = []
    more: frozenset[str] = frozenset()
    for place, line in enumerate(lines):
        record = records.match(line)
        if record is not None:
            young = not capture.ended_ms and record[0] > read_s - _LATE_EVENT_S
            clear = not any(_REPLACEMENT in one for one in lines[:place])
            if clear and (young or (place and piece.full and _reaches_end(lines, place, record[1]))):
                return keep
            more = record[1]
        elif line.rstrip() not in more:
            more = frozenset()
        else:
            keep.append(False)
            continue
        keep.append(record is None)
    return keep


def _reaches_end(lines: Sequence[str], place: int, more: frozenset[str]) -> bool:
    return all(line.rstrip() in more for line in lines[place + 1 :])


def event_items(event: Event, uid: str, place: int, task: TaskRef | None) -> list[Item]:
    """Return the lines of an event: its message, and its error as Python prints it.

    Args:
        event: The event.
        uid: Its id.
        place: Its place among the events of its step in the same millisecond, from 0.
        task: The attempt that it belongs to.
    """
    texts = (event.message or event.event_type or "").split("\n") + error_lines(event.error)
    nano = event.timestamp * NANOS_PER_MS + min(place, _MAX_PLACE) * _NANOS_A_PLACE
    severity = _SEVERITIES.get(event.level or "", 0)
    items = [
        Item(Line(nano + min(number, _NANOS_A_PLACE - 1), text, "", task, severity, f"{uid}.{number}"))
        for number, text in enumerate(texts)
    ]
    items[-1] = items[-1]._replace(event=event)
    return items


def error_lines(error: ErrorInfo | None) -> list[str]:
    """Return the traceback of an error and of its causes, the program's own error last."""
    lines: list[str] = []
    for one in error.chain() if error is not None else ():
        lines += ["The above exception was caused by the following exception:"] if lines else []
        stack = "".join(one.stack).rstrip("\n")
        lines += ["Traceback (most recent call last):", *stack.split("\n")] if stack else []
        lines += one.text.split("\n")
    return lines


def head_bytes(piece: Printed) -> int | None:
    """Return how many bytes of a piece are whole lines; None if U+FFFD hides it."""
    cut = piece.text.rfind("\n") + 1
    head, rest = piece.text[:cut], piece.text[cut:]
    if _REPLACEMENT not in head:
        return len(head.encode())
    if _REPLACEMENT not in rest:
        return piece.size - len(rest.encode())
    return None


def step_name(step: str) -> str:
    """Return the name of a step: its key without the key of a dynamic output."""
    return step.partition("[")[0]


def _digest(event: Event) -> bytes:
    parts = (str(event.timestamp), event.event_type or "", event.step_key or "", event.message or "")
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=_DIGEST_BYTES).digest()


def _take(counts: Counter[bytes], digest: bytes) -> bool:
    """Count a digest down; return whether there was one."""
    if not counts[digest]:
        return False
    counts[digest] -= 1
    if not counts[digest]:
        del counts[digest]
    return True


def _split(digests: bytes) -> list[bytes]:
    return [digests[start : start + _DIGEST_BYTES] for start in range(0, len(digests), _DIGEST_BYTES)]
