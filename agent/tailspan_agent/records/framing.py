"""What is done for every line: finding its severity by how it starts, and framing it as an OTLP log record. Pure.

In C where that could be compiled (`_framing.c`), with the same results; this is the reference, and what runs elsewhere.
It makes no Python call per line either. A record is five pieces, each a column over all lines, made with slices and
tables; one join makes the bytes:

    head     tag and length of the record, its severity, tags and lengths of the body: a table by severity and length
    body     the line's text
    time     the time's tag and its low two bytes: a table, since the lines of a run are 1 ns apart
    middle   what the lines of a run share: the time's high bytes, stream, ids, time of reading, the uid but for its end
    uid      the end of the uid, the line's number in its run: a table

For services that know only times, `time` and `uid` hold the whole of either. Fields come in the order that keeps what
is constant together. Field numbers are listed in `tailspan_agent.otlp.requests`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import compress, groupby, repeat
from operator import getitem, itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_LINES
from tailspan.logs.text import split_text
from tailspan_agent.otlp.wire import varint

__all__ = [
    "COMPILED",
    "IN_PYTHON",
    "LEFT_OUT",
    "SAME_DIGITS",
    "UNKNOWN",
    "FramedRun",
    "Lines",
    "find_severities",
    "first_lines",
    "frame",
    "split_lines",
]

UNKNOWN = LEFT_OUT = 255
"""Instead of a severity: what `find_severities` did not find, and what `frame` makes no record of."""

Lines: TypeAlias = list[bytes] | bytes
"""The lines of a page: each on its own, or a text with a newline after each."""

SAME_DIGITS = bytes(ord("0") if 0x30 <= byte <= 0x39 else byte for byte in range(256))
"""For ``bytes.translate``: all digits become 0."""


class FramedRun(NamedTuple):
    """Consecutive lines of one instant and one stream.

    Attributes:
        lines: How many; at most `MAX_PAGE_LINES` where they are numbered.
        time_unix_nano: The time of the first, from 0; each further line is 1 ns later, at most 2**64 - 1.
        shared: Fields that their records share; the uid comes last, but for its end.
    """

    lines: int
    time_unix_nano: int
    shared: bytes


def split_lines(lines: Lines) -> list[bytes]:
    """Return each line on its own."""
    return split_text(lines) if isinstance(lines, bytes) else lines


def first_lines(lines: Lines, count: int) -> list[bytes]:
    """Return the first lines, each on its own; fewer where there are fewer."""
    if not isinstance(lines, bytes):
        return lines[:count]
    *found, _ = lines.split(b"\n", count)
    return found


def find_severities(lines: Lines, width: int, known: dict[bytes, int], /) -> bytes:
    """Return a byte per line: what is known of its start, or `UNKNOWN`.

    Args:
        lines: The lines.
        width: How many bytes make a start.
        known: Severities by start, which has all digits as 0.
    """
    lines = split_lines(lines)
    starts = map(bytes.translate, map(itemgetter(slice(width)), lines), repeat(SAME_DIGITS))
    return bytes(map(known.get, starts, repeat(UNKNOWN)))


def frame(
    lines: Lines,
    severities: bytes,
    fields: tuple[bytes, ...],
    runs: list[FramedRun],
    digests: bytes,
    max_body: int,
    /,
) -> bytes | None:
    """Return the records of lines, one after the other; None if one of them needs more than one record.

    Args:
        lines: UTF-8, cleaned.
        severities: A byte per line, its place in ``fields``; a line with another is left out.
        fields: Fields by severity.
        runs: What else the lines have; their numbers of lines add up.
        digests: 8 bytes a line, with which the uids end in hexadecimal; empty where they end with the line's number in
            its run, as four such digits.
        max_body: How many bytes a record's body may have.
    """
    lines = split_lines(lines)
    if any(run.lines < 0 or (run.lines > MAX_PAGE_LINES and not digests) for run in runs):
        raise ValueError("a run cannot have so many lines")
    if not sum(run.lines for run in runs) == len(lines) == len(severities):
        raise ValueError("the runs or the severities are of other lines")
    if len(digests) not in (0, DIGEST_BYTES * len(lines)):
        raise ValueError("there are not as many digests as lines")
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
    return b"".join(pieces)


_TIME_TAG = b"\x09"
_LOW_TIMES = 1 << 16
_ORDINALS = [b"%04x" % ordinal for ordinal in range(MAX_PAGE_LINES)]
_pack_time = struct.Struct("<cQ").pack


def _by_number(runs: list[FramedRun]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the columns behind the bodies of lines that are told by their number in their run."""
    times: list[bytes] = []
    middles: list[bytes] = []
    uids: list[bytes] = []
    for run in runs:
        uids += _ORDINALS[: run.lines]
        for high, low, lines in _steps(run):
            times += _low_times()[low : low + lines]
            middles += [high + run.shared] * lines
    return times, middles, uids


def _steps(run: FramedRun) -> Iterator[tuple[bytes, int, int]]:
    """Yield the high six bytes of lines' times, the low two of the first of them, and how many lines that holds for."""
    done = 0
    while done < run.lines:
        high, low = divmod(run.time_unix_nano + done, _LOW_TIMES)
        lines = min(run.lines - done, _LOW_TIMES - low)
        yield high.to_bytes(6, "little"), low, lines
        done += lines


@cache
def _low_times() -> list[bytes]:
    """Return the tag of a time and its low two bytes, for each value of these."""
    octets = [bytes([octet]) for octet in range(256)]
    lowest = [_TIME_TAG + octet for octet in octets]
    return [low + octet for octet in octets for low in lowest]


def _by_digest(runs: list[FramedRun], digests: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the columns behind the bodies of lines that are told by their digests."""
    values = [time for run in runs for time in range(run.time_unix_nano, run.time_unix_nano + run.lines)]
    middles = [shared for run in runs for shared in repeat(run.shared, run.lines)]
    return (
        list(map(_pack_time, repeat(_TIME_TAG), values)),
        middles,
        digests.hex(" ", DIGEST_BYTES).encode().split(b" "),
    )


def _stretches(rests: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each value of consecutive equal ones, and where they end."""
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
    """The start of a record up to the body's text, by the length of that text in bytes."""

    def __init__(self, severity: bytes, rest: int) -> None:
        self._severity = severity
        self._rest = rest  # how many bytes come behind the body

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


IN_PYTHON = find_severities, frame
"""`find_severities` and `frame` as they stand above, also where compiled ones have taken their names."""

if not TYPE_CHECKING:
    try:
        from tailspan_agent.records._framing import find_severities, frame
    except ImportError:  # it was not compiled where this was built
        pass

COMPILED = frame is not IN_PYTHON[1]
"""Whether the compiled part is here: it takes a text as it is, while Python would split it again in each function."""
