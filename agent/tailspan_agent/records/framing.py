"""The work per line: frame it as an OTLP log record. Pure.

The functions here are in C where C was compiled (`tailspan._native`); the forms in Python below are the reference, and
run everywhere else. `frame` makes no Python call per line either. A record is five pieces; each piece is a column over
all lines, made with slices and tables, and one join makes the bytes:

    head     tag and length of the record, its severity, tags and lengths of the body: a table by severity and length
    body     the line's text
    time     the time's tag and its low two bytes: a table, because the lines of a run are 1 ns apart
    middle   shared by a run: the time's high bytes, stream, ids, time of reading, and the uid without its end
    uid      the end of the uid, the line's number in its run: a table

For services that know only times, `time` and `uid` are the whole time and the whole uid. The order of the fields keeps
the constant ones together. `tailspan_agent.otlp.requests` lists the field numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import compress, groupby, repeat
from operator import getitem
from typing import NamedTuple, TypeAlias

from tailspan._native import compiled
from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_LINES
from tailspan.logs.text import split_text
from tailspan_agent.otlp.wire import varint

__all__ = [
    "LEFT_OUT",
    "FramedRun",
    "Lines",
    "frame",
    "frame_in_python",
    "split_lines",
]

LEFT_OUT = 255
"""In place of a severity: `frame` drops the line."""

Lines: TypeAlias = list[bytes] | bytes
"""The lines of a page: a list, or a text with a newline after each line."""


class FramedRun(NamedTuple):
    """Consecutive lines of one instant and one stream.

    Attributes:
        lines: Number of lines; at most `MAX_PAGE_LINES` without digests.
        time_unix_nano: Time of the first line, from 0; each next line is 1 ns later, up to 2**64 - 1.
        shared: Fields that the records share; the uid without its end comes last.
    """

    lines: int
    time_unix_nano: int
    shared: bytes


def split_lines(lines: Lines) -> list[bytes]:
    """Return the lines as a list."""
    return split_text(lines) if isinstance(lines, bytes) else lines


def frame_in_python(
    lines: Lines,
    severities: bytes,
    fields: tuple[bytes, ...],
    runs: list[FramedRun],
    digests: bytes,
    max_body: int,
    most: int,
    copied: int,
    /,
) -> list[tuple[bytes, int]] | None:
    """Return the records of the lines in pieces; None if a line does not fit into one record.

    Args:
        lines: UTF-8, cleaned.
        severities: One byte per line, an index into ``fields``; a line with any other value is dropped.
        fields: The encoded fields of each severity.
        runs: Times and shared fields; their line counts add up to the number of lines.
        digests: 8 bytes per line, the end of its uid (written in hexadecimal); empty: the uid ends with the line's
            number in its run, as four hexadecimal digits.
        max_body: Longest body of a record, in bytes.
        most: The most bytes that a piece may take in a store that adds ``copied`` bytes to each record; a larger record
            is a piece of its own.
        copied: Bytes that a store adds to each record.

    Returns:
        Concatenated records and their number, for each piece.

    Raises:
        ValueError: The arguments do not describe the same lines.
    """
    lines = split_lines(lines)
    if most < 0 or copied < 0:
        raise ValueError("a limit is negative")
    if any(run.lines < 0 or (run.lines > MAX_PAGE_LINES and not digests) for run in runs):
        raise ValueError("a run has too many lines")
    if not sum(run.lines for run in runs) == len(lines) == len(severities):
        raise ValueError("the runs or the severities do not match the lines")
    if len(digests) not in (0, DIGEST_BYTES * len(lines)):
        raise ValueError("there must be as many digests as lines")
    times, middles, uids = _by_digest(runs, digests) if digests else _by_number(runs)
    rests = [len(time) + len(middle) + len(uid) for time, middle, uid in zip(times, middles, uids, strict=True)]
    columns: tuple[Sequence[bytes], ...] = lines, times, middles, uids
    if max(severities, default=0) >= len(fields):
        kept = [severity < len(fields) for severity in severities]
        columns = tuple(list(compress(column, kept)) for column in columns)
        severities, rests = bytes(compress(severities, kept)), list(compress(rests, kept))
    lengths = list(map(len, columns[0]))
    if max(lengths, default=0) > max_body:
        return None
    pieces = [b""] * (5 * len(lengths))
    start = 0
    for rest, stop in _stretches(rests):
        pieces[5 * start : 5 * stop : 5] = _heads_of(severities[start:stop], lengths[start:stop], fields, rest)
        start = stop
    for place, column in enumerate(columns, 1):
        pieces[place::5] = column
    return [
        (b"".join(pieces[5 * first : 5 * last]), last - first)
        for first, last in _pieces(
            [sum(map(len, pieces[at : at + 5])) for at in range(0, len(pieces), 5)], most, copied
        )
    ]


frame = compiled("frame", frame_in_python)


def _pieces(sizes: Sequence[int], most: int, copied: int) -> Iterator[tuple[int, int]]:
    """Yield the index of the first record of each piece, and of the first behind it; see `frame_in_python`."""
    first = taken = 0
    for last, size in enumerate(sizes):
        if last > first and taken + size + copied > most:
            yield first, last
            first, taken = last, 0
        taken += size + copied
    if first < len(sizes):
        yield first, len(sizes)


_TIME_TAG = b"\x09"
_LOW_TIMES = 1 << 16
_pack_time = struct.Struct("<cQ").pack


def _by_number(runs: list[FramedRun]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the columns after the body, for uids that end with the line's number in its run."""
    times: list[bytes] = []
    middles: list[bytes] = []
    uids: list[bytes] = []
    for run in runs:
        uids += _ordinals()[: run.lines]
        for high, low, lines in _steps(run):
            times += _low_times()[low : low + lines]
            middles += [high + run.shared] * lines
    return times, middles, uids


def _steps(run: FramedRun) -> Iterator[tuple[bytes, int, int]]:
    """Yield the high six bytes of the time, the low two of the first line, and the number of lines with these."""
    done = 0
    while done < run.lines:
        high, low = divmod(run.time_unix_nano + done, _LOW_TIMES)
        lines = min(run.lines - done, _LOW_TIMES - low)
        yield high.to_bytes(6, "little"), low, lines
        done += lines


@cache
def _ordinals() -> list[bytes]:
    """Return the end of a uid for each number of a line; made where lines are framed in Python only."""
    return [b"%04x" % ordinal for ordinal in range(MAX_PAGE_LINES)]


@cache
def _low_times() -> list[bytes]:
    """Return the tag of a time with its low two bytes, for each value of these two."""
    octets = [bytes([octet]) for octet in range(256)]
    lowest = [_TIME_TAG + octet for octet in octets]
    return [low + octet for octet in octets for low in lowest]


def _by_digest(runs: list[FramedRun], digests: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the columns after the body, for uids that end with a digest."""
    values = [time for run in runs for time in range(run.time_unix_nano, run.time_unix_nano + run.lines)]
    middles = [shared for run in runs for shared in repeat(run.shared, run.lines)]
    return (
        list(map(_pack_time, repeat(_TIME_TAG), values)),
        middles,
        digests.hex(" ", DIGEST_BYTES).encode().split(b" "),
    )


def _stretches(rests: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the value of each stretch of equal values, and the index after it."""
    if rests and rests.count(rests[0]) == len(rests):
        yield rests[0], len(rests)
        return
    stop = 0
    for rest, group in groupby(rests):
        stop += len(list(group))
        yield rest, stop


def _heads_of(severities: bytes, lengths: list[int], fields: tuple[bytes, ...], rest: int) -> Iterator[bytes]:
    used = set(severities)
    if len(used) == 1:
        return map(_heads(fields[used.pop()], rest).__getitem__, lengths)
    tables = {severity: _heads(fields[severity], rest) for severity in used}
    return map(getitem, map(tables.__getitem__, severities), lengths)


class _Heads(dict[int, bytes]):
    """The bytes of a record before its text, by the length of that text in bytes."""

    def __init__(self, severity: bytes, rest: int) -> None:
        self._severity = severity
        self._rest = rest  # bytes after the body

    def __missing__(self, length: int) -> bytes:
        body = b"\x0a" + varint(length)  # AnyValue.string_value
        fields = self._severity + b"\x2a" + varint(len(body) + length) + body
        head = b"\x12" + varint(len(fields) + length + self._rest) + fields  # ScopeLogs.log_records
        if length < _MAX_TABLE_LENGTH:
            self[length] = head
        return head


_MAX_TABLE_LENGTH = 1024


@lru_cache(maxsize=64)
def _heads(severity: bytes, rest: int) -> _Heads:
    return _Heads(severity, rest)
