"""A page of lines as OTLP log records, column by column rather than line by line. Pure.

A record is six pieces: its start up to the body's text (a table by severity and length), the body, its uid in two
pieces (what a run's lines share, and the rest), what all lines of a stream share, and its time. Each piece is a list
over all lines, made with slices and tables; one join makes the bytes. Fields come in the order that keeps what is
constant together. Field numbers are listed in `tailspan_agent.encode`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress, groupby

from tailspan.clean import MAX_BODY_BYTES, clean, is_clean, split_long
from tailspan.identity import span_id
from tailspan.models import RunResponse
from tailspan.page import CLEAN, MAX_PAGE_LINES, LogPage, Stream
from tailspan_agent.encode_record import origin_fields, severity_fields
from tailspan_agent.redact import Redactor
from tailspan_agent.severity import SEVERITIES, SeverityLearner, severity_number
from tailspan_agent.wire import attributes_fields, bytes_field, varint

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
    lines = _columns(page, context, origin_fields(context.trace_id, context.span_id, observed_unix_nano))
    redactions = 0
    if context.redactor is not None:
        lines.bodies, redactions = context.redactor.redact_lines(lines.bodies)
    if max(map(len, lines.bodies), default=0) > MAX_BODY_BYTES:
        lines.rests = [
            _LONG if len(body) > MAX_BODY_BYTES else rest for body, rest in zip(lines.bodies, lines.rests, strict=True)
        ]
    pieces: list[bytes] = []
    count = start = 0
    for rest, stop in _stretches(lines.rests):
        stretch = lines.stretch(start, stop)
        if rest == _LONG:
            records = _frame_long(stretch, page.uids())
            count += len(records)
        else:
            records = _frame(stretch, rest)
            count += stop - start
        pieces += records
        start = stop
    return EncodedLines(b"".join(pieces), count, len(page.lines) - len(lines.bodies), redactions)


def _clean_bodies(page: LogPage) -> list[bytes]:
    """Return the cleaned lines; the page's own, without a call per line, where there is nothing to clean."""
    if all(run.flags & CLEAN for run in page.runs):
        return page.lines
    text = b"\n".join(page.lines)
    if is_clean(text) and text.count(b"\n") == len(page.lines) - 1:
        return page.lines
    return [clean(line).encode() for line in page.lines]


@dataclass(slots=True)
class _Lines:
    """What the records of lines are made of, a list per part: bodies, and then what comes behind them."""

    bodies: list[bytes]
    severities: list[int]  # places in `SEVERITIES`
    positions: Sequence[int]  # in the page
    uid_heads: list[bytes]  # the uid attribute up to where the lines of a run differ
    uids: list[bytes]  # the rest of the uid
    tails: list[bytes]  # what is the same for all lines of a stream, ending in the tag of the time
    times: list[bytes]
    rests: list[int]  # how many bytes come behind the body

    def stretch(self, start: int, stop: int) -> _Lines:
        part = slice(start, stop)
        return _Lines(
            self.bodies[part],
            self.severities[part],
            self.positions[part],
            self.uid_heads[part],
            self.uids[part],
            self.tails[part],
            self.times[part],
            self.rests[part],
        )

    def without(self, severities: Set[int]) -> _Lines:
        keep = [index not in severities for index in self.severities]
        return _Lines(
            list(compress(self.bodies, keep)),
            list(compress(self.severities, keep)),
            list(compress(self.positions, keep)),
            list(compress(self.uid_heads, keep)),
            list(compress(self.uids, keep)),
            list(compress(self.tails, keep)),
            list(compress(self.times, keep)),
            list(compress(self.rests, keep)),
        )


_LONG = -1
_UID = "log.record.uid"
_IOSTREAM = tuple(attributes_fields(6, {"log.iostream": name}) if name else b"" for name in Stream.NAMES)
_TIME_TAG = b"\x09"
_TIME_BYTES = 8
_DIGEST_DIGITS = 16
_ORDINAL_DIGITS = 4
_ORDINALS = [b"%04x" % ordinal for ordinal in range(MAX_PAGE_LINES)]
_pack_time = struct.Struct("<Q").pack


def _columns(page: LogPage, context: LogContext, origin: bytes) -> _Lines:
    bodies = _clean_bodies(page)
    severities = context.learner.find_all(bodies)
    lines = _Lines(bodies, severities, range(len(bodies)), [], [], [], _pack_times(page.times_unix_nano()), [])
    tails = [stream + origin + _TIME_TAG for stream in _IOSTREAM]
    runs = page.runs
    if page.digests:
        digits = page.digests.hex().encode()
        lines.uids = [digits[start : start + _DIGEST_DIGITS] for start in range(0, len(digits), _DIGEST_DIGITS)]
        # Services with times make a run per millisecond; if all are of one stream, what follows is one run to us.
        if len({run.stream for run in runs}) == 1:
            runs = [runs[0]._replace(lines=len(bodies))]
    for run in runs:
        if page.digests:
            uid_head, uid_bytes = _uid_head(_DIGEST_DIGITS), _DIGEST_DIGITS
        else:
            prefix = run.uid_prefix.encode()
            uid_head, uid_bytes = _uid_head(len(prefix) + _ORDINAL_DIGITS) + prefix, _ORDINAL_DIGITS
            lines.uids += _ORDINALS[: run.lines]
        tail = tails[run.stream]
        lines.uid_heads += [uid_head] * run.lines
        lines.tails += [tail] * run.lines
        lines.rests += [len(uid_head) + uid_bytes + len(tail) + _TIME_BYTES] * run.lines
    too_low = {index for index in set(severities) if 0 < SEVERITIES[index].number < context.min_severity}
    return lines.without(too_low) if too_low else lines


@lru_cache(maxsize=64)
def _uid_head(digits: int) -> bytes:
    """Return the uid attribute of a record up to the uid itself."""
    return attributes_fields(6, {_UID: "0" * digits})[:-digits]


def _pack_times(times_unix_nano: list[int]) -> list[bytes]:
    try:
        return list(map(_pack_time, times_unix_nano))
    except struct.error:
        # A source with a broken clock may say anything; its lines are relayed all the same.
        return [_pack_time(min(max(time, 0), (1 << 64) - 1)) for time in times_unix_nano]


def _stretches(rests: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each value of consecutive equal ones, and where they end."""
    if rests and rests.count(rests[0]) == len(rests):
        yield rests[0], len(rests)
        return
    stop = 0
    for rest, group in groupby(rests):
        stop += len(list(group))
        yield rest, stop


def _frame(lines: _Lines, rest: int) -> list[bytes]:
    """Return the pieces of the records, six a line: no Python call per line, only slices and tables."""
    heads = {index: _heads(index, rest) for index in set(lines.severities)}
    pieces = [b""] * (6 * len(lines.bodies))
    pieces[0::6] = [heads[index][len(body)] for index, body in zip(lines.severities, lines.bodies, strict=True)]
    pieces[1::6] = lines.bodies
    pieces[2::6] = lines.uid_heads
    pieces[3::6] = lines.uids
    pieces[4::6] = lines.tails
    pieces[5::6] = lines.times
    return pieces


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


@lru_cache(maxsize=64)
def _heads(index: int, rest: int) -> _Heads:
    return _Heads(severity_fields(SEVERITIES[index]), rest)


def _frame_long(lines: _Lines, uids: list[str]) -> list[bytes]:
    """Return one record per part of lines that are too long for one."""
    records = []
    for number, body in enumerate(lines.bodies):
        severity = severity_fields(SEVERITIES[lines.severities[number]])
        uid = uids[lines.positions[number]]
        for part, text in enumerate(split_long(body)):
            attributes = attributes_fields(6, {_UID: f"{uid}.{part}", "tailspan.line.part": part})
            rest = lines.tails[number] + lines.times[number]
            records.append(bytes_field(2, severity + bytes_field(5, bytes_field(1, text)) + attributes + rest))
    return records
