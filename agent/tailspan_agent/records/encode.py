"""A page of lines as OTLP log records: the fields that lines share, and the lines that need more. Pure.

`tailspan_agent.records.framing` does the work for every line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import cast

import msgspec

from tailspan._identity import span_id
from tailspan._native import COMPILED
from tailspan.logs.clean import MAX_BODY_BYTES, clean, is_clean, split_long
from tailspan.logs.page import CLEAN, DIGEST_BYTES, NANOS_PER_MS, LineRun, LogPage, Stream, TaskRef
from tailspan.logs.text import count_lines
from tailspan.models import JobStatus
from tailspan_agent.otlp.log_record import observed_field, origin_fields, severity_fields
from tailspan_agent.otlp.wire import UINT64_MAX, attributes_fields, bytes_field, fixed64_field
from tailspan_agent.records.framing import LEFT_OUT, FramedRun, Lines, frame, split_lines
from tailspan_agent.records.redact import CUT_BYTES, CUT_WINDOW_CHARS, Redactor
from tailspan_agent.records.severity import SEVERITIES, find_severities, severity_index, severity_number

__all__ = [
    "PIECE_BYTES",
    "EncodedLines",
    "LogContext",
    "clean_lines",
    "encode_lines",
    "span_id_of",
    "task_run_id",
    "task_span_id",
    "with_known_severities",
    "without_lower",
]

PIECE_BYTES = 512 << 10
"""The most that a piece of a page takes in a store: requests are filled with whole pieces."""


class LogContext(msgspec.Struct, kw_only=True):
    """The context that all records of one job share.

    Attributes:
        trace_id: The job's trace, 16 bytes.
        span_id: The job's run span, 8 bytes.
        min_severity: Lines with a lower, known severity number are dropped; 0 drops none.
        redactor: Redacts lines.
        job: The job, for the spans of its tasks; a job without tasks needs none.
        cut_ends: By stream, the unredacted end of a line that capture cut and that goes on in the next line.
    """

    trace_id: bytes
    span_id: bytes
    min_severity: int = 0
    redactor: Redactor | None = None
    cut_ends: dict[int, str] = msgspec.field(default_factory=dict)
    job: JobStatus | None = None
    _origins: dict[TaskRef | None, bytes] = msgspec.field(default_factory=dict)

    @classmethod
    def for_job(
        cls, job: JobStatus, *, min_severity: str | None = None, redactor: Redactor | None = None
    ) -> LogContext:
        """Return the context of a job's lines.

        Args:
            job: The job.
            min_severity: The name of the lowest level to relay; None relays all lines.
            redactor: Redacts lines.

        Raises:
            ConfigError: The level is unknown.
        """
        return cls(
            trace_id=bytes.fromhex(job.trace_id),
            span_id=bytes.fromhex(span_id_of(job, "run")),
            job=job,
            min_severity=severity_number(min_severity) if min_severity else 0,
            redactor=redactor,
        )

    def origins(self, tasks: Sequence[TaskRef]) -> list[bytes]:
        """Return the fields of the records by the place of the task in `LineRun.task`: its span and its names.

        Args:
            tasks: The tasks of a page.
        """
        return [self._origins.get(task) or self._add_origin(task) for task in (None, *tasks)]

    def _add_origin(self, task: TaskRef | None) -> bytes:
        if task is None or self.job is None:
            origin = origin_fields(self.trace_id, self.span_id)
        else:
            origin = origin_fields(self.trace_id, bytes.fromhex(task_span_id(self.job, task.task_id, task.attempt)))
            name = self.redactor.redact(task.name)[0] if self.redactor is not None else task.name
            names = {
                "cicd.pipeline.task.name": name,
                "cicd.pipeline.task.run.id": task_run_id(task.task_id, task.attempt),
            }
            origin += attributes_fields(6, names)
        if len(self._origins) >= _MAX_ORIGINS:
            self._origins.clear()
        self._origins[task] = origin
        return origin


def span_id_of(job: JobStatus, name: str) -> str:
    """Return the id of one of a job's spans; see `tailspan_agent.job.mapping` for their names."""
    return _known_span_id(job.identity, job.job_id, name, job.attempt)


# The id of the run span is in all spans and records of a job: for as many jobs as catch up at a time.
_known_span_id = lru_cache(maxsize=1024)(span_id)


def task_span_id(job: JobStatus, task_id: str, attempt: int) -> str:
    """Return the id of the span of an attempt of a job's task."""
    return span_id_of(job, f"task\0{task_id}\0{attempt}")


def task_run_id(task_id: str, attempt: int) -> str:
    """Return the id of an attempt of a task, unique within the job."""
    return task_id if attempt == 1 else f"{task_id}.{attempt}"


class EncodedLines(msgspec.Struct, frozen=True):
    """The records of a page.

    Attributes:
        pieces: ``ScopeLogs.log_records`` fields in the order of the lines, and their number, for each piece.
        count: Number of records; a line above 256 KB has several.
        dropped: Number of lines below the minimum severity; they have no record.
        redactions: Number of redacted secrets.
    """

    pieces: list[tuple[bytes, int]]
    count: int
    dropped: int
    redactions: int


def encode_lines(page: LogPage, *, context: LogContext, copied: int = 0) -> EncodedLines:
    """Return the records of a page's lines.

    Every line becomes a record, also an empty one. A line above 256 KB becomes several records with
    ``tailspan.line.part`` from 0 and ``.part`` after the line's uid: a store may drop records with an equal uid.

    Args:
        page: The lines as read.
        context: The context of the job's records.
        copied: Bytes that a store adds to each record: the smaller are the pieces.
    """
    lines = clean_lines(page)
    severities = with_known_severities(find_severities(lines), page.runs)
    dropped = 0
    if context.min_severity:
        severities = severities.translate(without_lower(context.min_severity))
        if dropped := severities.count(LEFT_OUT):
            pairs = zip(split_lines(lines), severities, strict=True)
            lines = [b"" if severity == LEFT_OUT else line for line, severity in pairs]
    redactions = 0
    if context.redactor is not None:
        lines, redactions = _redacted(page, lines, context.redactor, context.cut_ends)
    origins = context.origins(page.tasks)
    runs = _timed_runs(page, origins) if page.digests else _numbered_runs(page, origins)
    pieces = frame(lines, severities, _SEVERITY_FIELDS, runs, page.digests, MAX_BODY_BYTES, PIECE_BYTES, copied)
    count = len(severities) - dropped
    if pieces is None:
        pieces = list(_with_long(split_lines(lines), severities, runs, page, origins, copied))
        count = sum(many for _, many in pieces)
    return EncodedLines(pieces, count, dropped, redactions)


def with_known_severities(severities: bytes, runs: Sequence[LineRun]) -> bytes:
    """Return the severities of lines with those that the service has, in place of what was found in the text.

    Args:
        severities: What was found in the text, an index into `SEVERITIES` for each line.
        runs: The runs of the lines.
    """
    if not any(run.severity for run in runs):
        return severities
    known = b"".join(bytes([severity_index(run.severity) if run.severity else LEFT_OUT]) * run.lines for run in runs)
    return bytes(found if own == LEFT_OUT else own for own, found in zip(known, severities, strict=True))


def clean_lines(page: LogPage) -> Lines:
    """Return the cleaned lines, without a call for each line if all are clean."""
    text = page.text
    if not all(run.flags & CLEAN for run in page.runs):
        text = page.joined()
        if not is_clean(text) or (not page.text and count_lines(text) != page.line_count):
            return [clean(line).encode() for line in page.lines]
    return text if COMPILED and text else page.lines


def _redacted(page: LogPage, lines: Lines, redactor: Redactor, cut_ends: dict[int, str]) -> tuple[Lines, int]:
    """Return redacted lines and the number of redactions, also of secrets that a cut has divided."""
    if not cut_ends and (len(page.text) or sum(map(len, page.lines))) < CUT_BYTES:
        return redactor.redact_lines(lines)
    streams = [run.stream for run in page.runs for _ in range(run.lines)]
    redacted: list[bytes] = []
    total = 0
    for read, line, stream in zip(page.lines, split_lines(lines), streams, strict=True):
        text, before = line.decode("utf-8", "replace"), cut_ends.pop(stream, "")
        if len(read) >= CUT_BYTES:
            cut_ends[stream] = text[-CUT_WINDOW_CHARS:]
        kept, count = redactor.redact(text, before=before)
        redacted.append(kept.encode() if count else line)
        total += count
    return redacted, total


_IOSTREAM = tuple(attributes_fields(6, {"log.iostream": name}) if name else b"" for name in Stream.NAMES)
_SEVERITY_FIELDS = tuple(map(severity_fields, SEVERITIES))
_UID = "log.record.uid"
_LEFT_OUT = bytes([LEFT_OUT])
_ORDINAL_DIGITS = 4
_MAX_ORIGINS = 4096


@lru_cache(maxsize=64)
def without_lower(least: int) -> bytes:
    """Return a table for ``bytes.translate`` that marks known, lower severities as left out."""
    table = bytearray(range(256))
    for index, severity in enumerate(SEVERITIES):
        if 0 < severity.number < least:
            table[index] = LEFT_OUT
    return bytes(table)


def _numbered_runs(page: LogPage, origins: Sequence[bytes]) -> list[FramedRun]:
    """Return the runs of a page of lines that are named by their number in the run, which is whole on every page."""
    framed = []
    for lines, nano, stream, _, prefix, task, _ in page.runs:
        time = nano if 0 <= nano < _ANY_TIME else _possible_time(nano, lines)
        name = prefix.encode()
        uid = _uid_head(len(name) + _ORDINAL_DIGITS) + name
        framed.append(_framed_run((lines, time, _IOSTREAM[stream] + origins[task] + observed_field(time) + uid)))
    return framed


def _timed_runs(page: LogPage, origins: Sequence[bytes]) -> list[FramedRun]:
    """Return the lines of a page by the millisecond that they share, from which on other pages may have them, too."""
    framed = []
    uid = _uid_head(2 * DIGEST_BYTES)
    for lines, nano, stream, _, _, task, _ in page.runs:
        time = nano if 0 <= nano < _ANY_TIME else _possible_time(nano, lines)
        shared = _IOSTREAM[stream] + origins[task]
        while time % NANOS_PER_MS + lines > NANOS_PER_MS:
            count = NANOS_PER_MS - time % NANOS_PER_MS
            framed.append(_framed_run((count, time, shared + observed_field(time) + uid)))
            time, lines = time + count, lines - count
        framed.append(_framed_run((lines, time, shared + observed_field(time) + uid)))
    return framed


# Makes one without a Python call; a page may have thousands.
_framed_run = cast("Callable[[tuple[int, int, bytes]], FramedRun]", partial(tuple.__new__, FramedRun))
_ANY_TIME = 1 << 63


def _possible_time(nano: int, lines: int) -> int:
    """Return a time near that of a broken clock from which on this many lines have one that can be sent."""
    return max(0, min(nano, UINT64_MAX + 1 - lines))


@lru_cache(maxsize=64)
def _uid_head(digits: int) -> bytes:
    """Return the uid attribute of a record without the uid itself."""
    return attributes_fields(6, {_UID: "0" * digits})[:-digits]


def _with_long(
    lines: list[bytes], severities: bytes, runs: list[FramedRun], page: LogPage, origins: list[bytes], copied: int
) -> Iterator[tuple[bytes, int]]:
    """Yield the pieces of lines, also of lines that are too long for one record."""

    def pieces_between(start: int, stop: int) -> list[tuple[bytes, int]]:
        only = severities[start:stop].rjust(stop, _LEFT_OUT).ljust(len(lines), _LEFT_OUT)
        pieces = frame(lines, only, _SEVERITY_FIELDS, runs, page.digests, MAX_BODY_BYTES, PIECE_BYTES, copied)
        assert pieces is not None
        return pieces

    uids = page.uids()
    times = [time for run in runs for time in range(run.time_unix_nano, run.time_unix_nano + run.lines)]
    shared_fields = [_IOSTREAM[run.stream] + origins[run.task] for run in page.runs for _ in range(run.lines)]
    start = 0
    for position, body in enumerate(lines):
        if len(body) <= MAX_BODY_BYTES:
            continue
        yield from pieces_between(start, position)
        shared = _SEVERITY_FIELDS[severities[position]] + shared_fields[position]
        shared += observed_field(times[position]) + fixed64_field(1, times[position])
        for part, text in enumerate(split_long(body)):
            attributes = attributes_fields(6, {_UID: f"{uids[position]}.{part}", "tailspan.line.part": part})
            yield bytes_field(2, shared + attributes + bytes_field(5, bytes_field(1, text))), 1
        start = position + 1
    yield from pieces_between(start, len(lines))
