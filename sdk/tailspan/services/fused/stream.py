"""A log reply of a Fused API: its entries, and the pages of lines made of them. Pure."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, compress, repeat
from typing import Annotated, Any, NamedTuple, cast

import msgspec

from tailspan._native import compiled
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LineRun, LogPage, Stream
from tailspan.logs.text import split_text
from tailspan.services.fused.window import LateWindow, NewLines

__all__ = ["Entries", "entries_in_python", "lines", "messages", "pages", "usual_entries"]

# A time that fits into 64 bits of ns: until the year 2262.
_MAX_MS = 2**63 // NANOS_PER_MS
_STREAMS = {name: Stream.NAMES.index(name) for name in Stream.NAMES}


class Entries(NamedTuple):
    """Elements of a log reply, at most as many as a page has, in columns.

    A line ending at the end of a message is removed; newlines within the message are kept.

    Attributes:
        lines: The messages, as a text with a newline after each; as a list if one has a newline within.
        instants_ms: Their times, in ms since the epoch, without the repeats of one element after the other.
        counts: Number of elements of each of these times.
        streams: The stream of each element, see `Stream`.
    """

    lines: list[bytes] | bytes
    instants_ms: list[int]
    counts: list[int]
    streams: bytes

    @property
    def times_ms(self) -> list[int]:
        """The time of each element."""
        return list(chain.from_iterable(map(repeat, self.instants_ms, self.counts)))

    @property
    def bodies(self) -> list[bytes]:
        """The messages as a list."""
        return split_text(self.lines) if isinstance(self.lines, bytes) else self.lines


class _Entry(msgspec.Struct, gc=False):
    """One element of a log reply; other keys are ignored."""

    message: str
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=_MAX_MS)]
    stream: Any = None


_entries = msgspec.json.Decoder(list[_Entry])
_objects = msgspec.json.Decoder(list[dict[str, Any]])


def entries_in_python(json: bytes | memoryview) -> list[Entries]:
    """Return the elements of an array.

    Args:
        json: The array.

    Raises:
        msgspec.DecodeError: The text is not JSON, or (`msgspec.ValidationError`) not of a log.
    """
    try:
        found = _entries.decode(json)
    except msgspec.ValidationError:
        usable = _with_possible_values(_objects.decode(json))
        found = [_Entry(one["message"], one["timestamp"], one.get("stream")) for one in usable]
    bodies = [_without_ending(entry.message.encode()) for entry in found]
    return [_columns(bodies[start:end], found[start:end]) for start, end in _page_bounds(bodies)]


def _columns(bodies: list[bytes], found: Sequence[_Entry]) -> Entries:
    text = b"\n".join((*bodies, b""))
    times = [entry.timestamp for entry in found]
    starts = [0, *compress(range(1, len(times)), map(operator.ne, times[1:], times))]
    return Entries(
        text if text.count(b"\n") == len(bodies) else bodies,
        list(map(times.__getitem__, starts)),
        list(map(operator.sub, [*starts[1:], len(times)], starts)),
        bytes([_stream_of(entry.stream) for entry in found]),
    )


def _usual_entries_in_python(json: bytes | memoryview, /) -> list[tuple[Any, ...]] | None:
    """Return the elements of an array as `Entries` has them; None for a text that only `entries_in_python` reads."""
    return None


usual_entries = compiled("usual_entries", _usual_entries_in_python)


class _Lines:
    """Decodes lines."""

    def decode(self, text: bytes | memoryview) -> list[Entries]:
        """Return the elements of an array."""
        found = usual_entries(text)
        return entries_in_python(text) if found is None else [Entries(*columns) for columns in found]


class _Messages:
    """Decodes lines with all their keys."""

    def decode(self, text: bytes | memoryview) -> list[dict[str, Any]]:
        """Return the objects of an array, oldest first; `_Entry` has the required keys."""
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
    """Return lines whose values have the types of `_Entry`: one impossible line must not hide the others.

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


def pages(window: LateWindow, entries: Entries) -> Iterator[LogPage]:
    """Yield the lines that are new to the window as a page with the cursor after it, if there are any.

    Args:
        window: The read that these entries continue.
        entries: Elements of the reply, in its order.
    """
    lines, streams = entries.lines, entries.streams
    new = window.take_in_order(lines, entries.instants_ms, entries.counts)
    if new is None:
        bodies = entries.bodies
        new = window.take(entries.times_ms, bodies)
        if len(new.places) < len(bodies):
            lines, streams = [bodies[place] for place in new.places], bytes(streams[place] for place in new.places)
    if new.places:
        runs = _runs(new, streams)
        if isinstance(lines, bytes):
            yield LogPage(None, runs, window.cursor(), new.digests, lines)
        else:
            yield LogPage(lines, runs, window.cursor(), new.digests)


def _without_ending(body: bytes) -> bytes:
    return body[:-2] if body.endswith(b"\r\n") else body.removesuffix(b"\n")


def _stream_of(value: Any) -> int:
    # The value may have any type, also one that is not hashable.
    return _STREAMS.get(value, Stream.NONE) if value.__class__ is str else Stream.NONE


def _page_bounds(bodies: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the first index and the end of each page's lines."""
    ends = list(accumulate(map(len, bodies)))
    start = 0
    while start < len(bodies):
        most = MAX_PAGE_BYTES + (ends[start - 1] if start else 0)
        end = min(max(bisect_right(ends, most), start + 1), start + MAX_PAGE_LINES)
        yield start, end
        start = end


def _runs(new: NewLines, streams: bytes) -> list[LineRun]:
    """Return the runs: consecutive lines of one stream whose times count up by one nanosecond."""
    starts, firsts, end = new.starts, new.firsts_unix_nano, len(streams)
    if streams.count(streams[0]) != end:
        changes = compress(range(1, end), map(operator.ne, streams[1:], streams))
        cut = sorted({*starts, *changes})
        begun = [bisect_right(starts, start) - 1 for start in cut]
        firsts = [firsts[run] + start - starts[run] for run, start in zip(begun, cut, strict=True)]
        starts = cut
    counts = map(operator.sub, [*starts[1:], end], starts)
    kinds = map(streams.__getitem__, starts)
    # Most lines have a millisecond, and so a run, of their own: this makes `LineRun`s without a Python call for each.
    return list(map(_new_run, zip(counts, firsts, kinds, repeat(0), repeat(""), repeat(0), repeat(0), strict=False)))


_new_run = cast("Callable[[tuple[int, int, int, int, str, int, int]], LineRun]", partial(tuple.__new__, LineRun))
