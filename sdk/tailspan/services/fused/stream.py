"""A log reply of a Fused API: its entries, and the pages of lines made of them. Pure."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, compress, repeat
from typing import Annotated, Any, cast

import msgspec

from tailspan.logs.page import CLEAN, MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LineRun, LogPage, Stream
from tailspan.services.fused.window import LateWindow, NewLines

__all__ = ["LogEntry", "lines", "messages", "pages"]

# A time that fits into 64 bits of ns: until the year 2262.
_MAX_MS = 2**63 // NANOS_PER_MS
_STREAMS = {name: Stream.NAMES.index(name) for name in Stream.NAMES}


class LogEntry(msgspec.Struct, gc=False):
    """One element of a log reply; other keys are ignored."""

    message: str
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=_MAX_MS)]
    stream: Any = None


_entries = msgspec.json.Decoder(list[LogEntry])
_objects = msgspec.json.Decoder(list[dict[str, Any]])


class _Lines:
    """Decodes lines."""

    def decode(self, text: bytes | memoryview) -> list[LogEntry]:
        """Return the elements of an array."""
        try:
            return _entries.decode(text)
        except msgspec.ValidationError:
            found = _with_possible_values(_objects.decode(text))
            return [LogEntry(one["message"], one["timestamp"], one.get("stream")) for one in found]


class _Messages:
    """Decodes lines with all their keys."""

    def decode(self, text: bytes | memoryview) -> list[dict[str, Any]]:
        """Return the objects of an array, oldest first; `LogEntry` has the required keys."""
        found = _objects.decode(text)
        try:
            kinds = set(map(type, map(_MESSAGE, found)))
            times = list(map(_TIMESTAMP, found))
        except KeyError as missing:
            raise msgspec.ValidationError(f"Object missing required field {missing}") from None
        in_order = sorted(times) if {*map(type, times)} <= {int} else [-1]
        if kinds - {str} or (in_order and not 0 <= in_order[0] <= in_order[-1] <= _MAX_MS):
            found = _with_possible_values(found)
            times, in_order = [-1], []
        if times != in_order:
            found.sort(key=_TIMESTAMP)
        return found


def _with_possible_values(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines whose values have the types of `LogEntry`: one impossible line must not hide the others.

    An impossible time becomes 0: the year 1970, so that the reads that follow still find the lines after it.

    Raises:
        msgspec.ValidationError: No line has a possible time and a text, so these are not lines.
    """
    if found and not any(_is_time(one.get("timestamp")) and isinstance(one.get("message"), str) for one in found):
        raise msgspec.ValidationError("Expected `message` as `str` and `timestamp` as `int` ms >= 0")
    return [
        {
            **one,
            "message": _text(one.get("message")),
            "timestamp": one["timestamp"] if _is_time(one.get("timestamp")) else 0,
        }
        for one in found
    ]


def _is_time(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_MS


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()


_MESSAGE, _TIMESTAMP = operator.itemgetter("message"), operator.itemgetter("timestamp")
lines: Any = _Lines()
messages: Any = _Messages()


def pages(window: LateWindow, entries: Sequence[LogEntry]) -> Iterator[LogPage]:
    """Yield the lines that are new to the window, each page with the cursor after it.

    A line ending at the end of a message is removed; newlines within the message are kept.

    Args:
        window: The read that these entries continue.
        entries: Elements of the reply, in its order.
    """
    times = list(map(_timestamp, entries))
    bodies, flags = _bodies(list(map(_message, entries)))
    streams = _streams(list(map(_stream, entries)))
    for start, end in _page_bounds(bodies):
        new = window.take(times[start:end], bodies[start:end])
        if not new.places:
            continue
        whole = len(new.places) == end - start
        page_lines = bodies[start:end] if whole else [bodies[start + place] for place in new.places]
        page_streams = streams
        if isinstance(streams, list):
            page_streams = streams[start:end] if whole else [streams[start + place] for place in new.places]
        runs = _runs(new, page_streams, flags)
        yield LogPage(page_lines, runs, window.cursor(), b"".join(new.digests))


_timestamp = operator.attrgetter("timestamp")
_message = operator.attrgetter("message")
_stream = operator.attrgetter("stream")


def _bodies(texts: list[str]) -> tuple[list[bytes], int]:
    """Return the lines as bytes, without their endings, and their flags; without a step for each line if possible."""
    if not texts:
        return [], CLEAN
    joined = "\0".join(texts).encode()
    plain = joined.isascii() and b"\r" not in joined and b"\x1b" not in joined
    if plain and joined.endswith(b"\n") and joined.count(b"\n") == len(texts):
        bodies = joined[:-1].split(b"\n\0")
        if len(bodies) == len(texts) and joined.count(b"\0") == len(texts) - 1:
            return bodies, CLEAN
    bodies = joined.split(b"\0")
    plain = plain and len(bodies) == len(texts)
    if len(bodies) != len(texts):
        bodies = [text.encode() for text in texts]
    if b"\n" in joined:
        bodies = [_without_ending(body) if body[-1:] == b"\n" else body for body in bodies]
        plain = plain and not any(b"\n" in body for body in bodies)
    return bodies, CLEAN if plain else 0


def _without_ending(body: bytes) -> bytes:
    return body[:-2] if body.endswith(b"\r\n") else body[:-1]


def _streams(values: list[Any]) -> int | list[int]:
    """Return the stream of each line, or one value if all are the same."""
    if values and values.count(values[0]) == len(values):
        return _stream_of(values[0])
    return list(map(_stream_of, values))


def _stream_of(value: Any) -> int:
    # The value may have any type, also one that is not hashable.
    return _STREAMS.get(value, Stream.NONE) if value.__class__ is str else Stream.NONE


def _page_bounds(bodies: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the first index and the end of each page's lines."""
    if len(bodies) <= MAX_PAGE_LINES and sum(map(len, bodies)) <= MAX_PAGE_BYTES:
        yield 0, len(bodies)
        return
    ends = list(accumulate(map(len, bodies)))
    start = 0
    while start < len(bodies):
        most = MAX_PAGE_BYTES + (ends[start - 1] if start else 0)
        end = min(max(bisect_right(ends, most), start + 1), start + MAX_PAGE_LINES)
        yield start, end
        start = end


def _runs(new: NewLines, streams: int | Sequence[int], flags: int) -> list[LineRun]:
    """Return the runs: consecutive lines of one stream whose times count up by one nanosecond."""
    starts, firsts, end = new.starts, new.firsts_unix_nano, len(new.digests)
    if not isinstance(streams, int):
        changes = compress(range(1, end), map(operator.ne, streams[1:], streams))
        cut = sorted({*starts, *changes})
        begun = [bisect_right(starts, start) - 1 for start in cut]
        firsts = [firsts[run] + start - starts[run] for run, start in zip(begun, cut, strict=True)]
        starts = cut
    counts = map(operator.sub, [*starts[1:], end], starts)
    kinds = repeat(streams) if isinstance(streams, int) else map(streams.__getitem__, starts)
    # Most lines have a millisecond, and so a run, of their own: this makes `LineRun`s without a Python call for each.
    return list(
        map(_new_run, zip(counts, firsts, kinds, repeat(flags), repeat(""), repeat(0), repeat(0), strict=False))
    )


_new_run = cast("Callable[[tuple[int, int, int, int, str, int, int]], LineRun]", partial(tuple.__new__, LineRun))
