"""A page of lines as OTLP log records, column by column rather than line by line. Pure.

A record is five pieces. Each piece is a column over all lines, made with slices and tables; one join makes the bytes:

    head     tag and length of the record, its severity, tags and lengths of the body: a table by severity and length
    body     the line's text
    time     the time's tag and its low two bytes: a table, since the lines of a run are 1 ns apart
    middle   what the lines of a run share: the time's high bytes, stream, ids, time of reading, the uid but for its end
    uid      the end of the uid, the line's number in its run: a table

For services that know only times, `time` and `uid` hold the whole of either. Fields come in the order that keeps what
is constant together. Field numbers are listed in `tailspan_agent.encode`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import compress, groupby, repeat
from operator import getitem
from typing import Any, TypeAlias

from tailspan.clean import MAX_BODY_BYTES, clean, is_clean, split_long
from tailspan.identity import span_id
from tailspan.models import RunResponse
from tailspan.page import CLEAN, DIGEST_BYTES, MAX_PAGE_LINES, LogPage, Run, Stream
from tailspan_agent.encode_record import origin_fields, severity_fields
from tailspan_agent.redact import Redactor
from tailspan_agent.severity import SEVERITIES, SeverityLearner, severity_number
from tailspan_agent.wire import attributes_fields, bytes_field, fixed64_field, varint

__all__ = ["EncodedLines", "LogContext", "encode_lines"]


@dataclass(slots=True, kw_only=True)
class LogContext:
    """What all records of one job share.

    Attributes:
        trace_id: Of the job's trace, 16 bytes.
        span_id: Of the job's run span, 8 bytes.
        min_severity: Lines that are known to be below this severity number are dropped; 0 drops none.
        redactor: Takes secrets out of lines.
        learner: Finds severities; keep it for the job's next pages.
    """

    trace_id: bytes
    span_id: bytes
    min_severity: int = 0
    redactor: Redactor | None = None
    learner: SeverityLearner = field(default_factory=SeverityLearner)

    @classmethod
    def for_job(
        cls, job: RunResponse, *, min_severity: str | None = None, redactor: Redactor | None = None
    ) -> LogContext:
        """Return the context of a job's lines.

        Args:
            job: The job.
            min_severity: Name of the lowest level to relay; None relays all.
            redactor: Takes secrets out of lines.

        Raises:
            ConfigError: There is no such level.
        """
        return cls(
            trace_id=bytes.fromhex(job.trace_id),
            span_id=bytes.fromhex(span_id(job.identity, job.job_id, "run", job.attempt)),
            min_severity=severity_number(min_severity) if min_severity else 0,
            redactor=redactor,
        )


@dataclass(frozen=True, slots=True)
class EncodedLines:
    """The records of a page.

    Attributes:
        records: ``ScopeLogs.log_records`` fields, one after the other, in the order of the lines.
        count: How many records; a line over 256 KB makes several.
        dropped: Lines below the minimum severity, which have none.
        redactions: How many secrets were taken out.
    """

    records: bytes
    count: int
    dropped: int
    redactions: int


def encode_lines(page: LogPage, *, context: LogContext, observed_unix_nano: int) -> EncodedLines:
    """Return the records of a page's lines.

    Every line becomes a record, an empty one too. A line over 256 KB becomes several, with ``tailspan.line.part``
    from 0, and ``.part`` behind the line's uid: a store may take records of equal uid for repeats.

    Args:
        page: The lines as read.
        context: What the job's records share.
        observed_unix_nano: When the page was read, in ns since the epoch.
    """
    origin = origin_fields(context.trace_id, context.span_id, observed_unix_nano)
    bodies, text = _clean_bodies(page)
    severities = context.learner.find_all(bodies)
    ends = _ends_by_digest(page, origin) if page.digests else _ends_by_number(page, origin)
    lines = _Lines(bodies, severities, range(len(bodies)), *ends)
    if context.min_severity:
        too_low = {index for index in set(severities) if 0 < SEVERITIES[index].number < context.min_severity}
        lines = lines.without(too_low) if too_low else lines
    redactions = 0
    if context.redactor is not None:
        lines.bodies, redactions = context.redactor.redact_lines(lines.bodies, text)
    lines.lengths = list(map(len, lines.bodies))
    if max(lines.lengths, default=0) > MAX_BODY_BYTES:
        lines.rests = [
            _LONG if length > MAX_BODY_BYTES else rest for length, rest in zip(lines.lengths, lines.rests, strict=True)
        ]
    records: list[bytes] = []
    count = start = 0
    for rest, stop in _stretches(lines.rests):
        stretch = lines if stop - start == len(lines.rests) else lines.stretch(start, stop)
        if rest == _LONG:
            parts = _frame_long(stretch, page, origin)
            records += parts
            count += len(parts)
        else:
            records.append(_frame(stretch, rest))
            count += stop - start
        start = stop
    return EncodedLines(b"".join(records), count, len(page.lines) - len(lines.bodies), redactions)


def _clean_bodies(page: LogPage) -> tuple[list[bytes], bytes]:
    """Return the cleaned lines, without a call per line where nothing is to be cleaned, and their text where known."""
    if all(run.flags & CLEAN for run in page.runs):
        return page.lines, page.text
    text = page.joined()
    if is_clean(text) and text.count(b"\n") == len(page.lines):
        return page.lines, text
    return [clean(line).encode() for line in page.lines], b""


@dataclass(slots=True)
class _Lines:
    """What the records of lines are made of: a column per part."""

    bodies: list[bytes]
    severities: list[int]  # places in `SEVERITIES`
    positions: Sequence[int]  # in the page
    times: list[bytes]
    middles: list[bytes]
    uids: list[bytes]
    rests: list[int]  # how many bytes come behind the body
    lengths: list[int] = field(default_factory=list)  # of the bodies, once they are what is sent

    def stretch(self, start: int, stop: int) -> _Lines:
        part = slice(start, stop)
        return _Lines(*(column[part] for column in self._columns()))

    def without(self, severities: Set[int]) -> _Lines:
        keep = [index not in severities for index in self.severities]
        return _Lines(*(list(compress(column, keep)) for column in self._columns()))

    def _columns(self) -> tuple[Any, ...]:
        columns = self.bodies, self.severities, self.positions, self.times, self.middles, self.uids, self.rests
        return *columns, self.lengths


_LONG = -1
_UID = "log.record.uid"
_IOSTREAM = tuple(attributes_fields(6, {"log.iostream": name}) if name else b"" for name in Stream.NAMES)
_TIME_TAG = b"\x09"
_LOW_TIMES = 1 << 16
_DIGEST_DIGITS = 2 * DIGEST_BYTES
_ORDINALS = [b"%04x" % ordinal for ordinal in range(MAX_PAGE_LINES)]
_ORDINAL_DIGITS = 4
_MAX_TIME = (1 << 64) - 1
_pack_time = struct.Struct("<cQ").pack
_Ends: TypeAlias = tuple[list[bytes], list[bytes], list[bytes], list[int]]


def _ends_by_number(page: LogPage, origin: bytes) -> _Ends:
    """Return the columns behind the bodies of lines that are told by their number in their run."""
    times: list[bytes] = []
    middles: list[bytes] = []
    uids: list[bytes] = []
    rests: list[int] = []
    for run in page.runs:
        prefix = run.uid_prefix.encode()
        shared = _IOSTREAM[run.stream] + origin + _uid_head(len(prefix) + _ORDINAL_DIGITS) + prefix
        uids += _ORDINALS[: run.lines]
        for high, low, lines in _steps(run):
            times += _low_times()[low : low + lines]
            middle = high + shared
            middles += [middle] * lines
            rests += [len(_TIME_TAG) + 2 + len(middle) + _ORDINAL_DIGITS] * lines
    return times, middles, uids, rests


def _steps(run: Run) -> Iterator[tuple[bytes, int, int]]:
    """Yield the high six bytes of lines' times, the low two of the first of them, and how many lines that holds for."""
    done = 0
    while done < run.lines:
        # A source with a broken clock may say anything; its lines are relayed all the same.
        time = min(max(run.time_unix_nano + done, 0), _MAX_TIME)
        high, low = divmod(time, _LOW_TIMES)
        lines = min(run.lines - done, _LOW_TIMES - low) if time == run.time_unix_nano + done else 1
        yield high.to_bytes(6, "little"), low, lines
        done += lines


@cache
def _low_times() -> list[bytes]:
    """Return the tag of a time and its low two bytes, for each value of these."""
    octets = [bytes([octet]) for octet in range(256)]
    lowest = [_TIME_TAG + octet for octet in octets]
    return [low + octet for octet in octets for low in lowest]


def _ends_by_digest(page: LogPage, origin: bytes) -> _Ends:
    """Return the columns behind the bodies of lines that are told by their digests."""
    uids = page.digests.hex(" ", DIGEST_BYTES).encode().split(b" ")
    times = _pack_times(page.times_unix_nano())
    uid_head = _uid_head(_DIGEST_DIGITS)
    by_stream = [stream + origin + uid_head for stream in _IOSTREAM]
    streams = {run.stream for run in page.runs}
    if len(streams) == 1:  # These services make a run per millisecond.
        middles = [by_stream[streams.pop()]] * len(uids)
    else:
        middles = [middle for run in page.runs for middle in repeat(by_stream[run.stream], run.lines)]
    fixed = len(times[0]) + _DIGEST_DIGITS
    return times, middles, uids, [fixed + len(middle) for middle in middles]


@lru_cache(maxsize=64)
def _uid_head(digits: int) -> bytes:
    """Return the uid attribute of a record up to the uid itself."""
    return attributes_fields(6, {_UID: "0" * digits})[:-digits]


def _pack_times(times_unix_nano: list[int]) -> list[bytes]:
    try:
        return list(map(_pack_time, repeat(_TIME_TAG), times_unix_nano))
    except struct.error:
        # A source with a broken clock may say anything; its lines are relayed all the same.
        return [_pack_time(_TIME_TAG, min(max(time, 0), _MAX_TIME)) for time in times_unix_nano]


def _stretches(rests: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each value of consecutive equal ones, and where they end."""
    if rests and rests.count(rests[0]) == len(rests):
        yield rests[0], len(rests)
        return
    stop = 0
    for rest, group in groupby(rests):
        stop += len(list(group))
        yield rest, stop


def _frame(lines: _Lines, rest: int) -> bytes:
    """Return the records of lines: no Python call per line, only slices and tables."""
    used = set(lines.severities)
    pieces = [b""] * (5 * len(lines.bodies))
    if len(used) == 1:
        pieces[0::5] = map(_heads(used.pop(), rest).__getitem__, lines.lengths)
    else:
        tables = [_heads(index, rest) if index in used else _NO_HEADS for index in range(len(SEVERITIES))]
        pieces[0::5] = map(getitem, map(tables.__getitem__, lines.severities), lines.lengths)
    pieces[1::5] = lines.bodies
    pieces[2::5] = lines.times
    pieces[3::5] = lines.middles
    pieces[4::5] = lines.uids
    return b"".join(pieces)


class _Heads(dict[int, bytes]):
    """The start of a record up to the body's text, by the length of that text in bytes."""

    def __init__(self, severity: bytes, rest: int) -> None:
        self._severity = severity
        self._rest = rest

    def __missing__(self, length: int) -> bytes:
        body = b"\x0a" + varint(length)  # AnyValue.string_value
        fields = self._severity + b"\x2a" + varint(len(body) + length) + body
        head = b"\x12" + varint(len(fields) + length + self._rest) + fields  # ScopeLogs.log_records
        if length < _MAX_TABLE_LENGTH:
            self[length] = head
        return head


_MAX_TABLE_LENGTH = 1024
_NO_HEADS = _Heads(b"", 0)


@lru_cache(maxsize=64)
def _heads(index: int, rest: int) -> _Heads:
    return _Heads(severity_fields(SEVERITIES[index]), rest)


def _frame_long(lines: _Lines, page: LogPage, origin: bytes) -> list[bytes]:
    """Return one record per part of lines that are too long for one."""
    uids, times = page.uids(), page.times_unix_nano()
    streams = [run.stream for run in page.runs for _ in range(run.lines)]
    records = []
    for position, body, index in zip(lines.positions, lines.bodies, lines.severities, strict=True):
        shared = severity_fields(SEVERITIES[index]) + _IOSTREAM[streams[position]] + origin
        shared += fixed64_field(1, times[position])
        for part, text in enumerate(split_long(body)):
            attributes = attributes_fields(6, {_UID: f"{uids[position]}.{part}", "tailspan.line.part": part})
            records.append(bytes_field(2, shared + attributes + bytes_field(5, bytes_field(1, text))))
    return records
