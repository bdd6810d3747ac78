"""A log reply as a stream: cuts one JSON array of any size into lists of lines, and these into pages. Pure.

No Python code runs per byte. To find the end of an element, the splitter tries the last ``},{"`` in the buffer. The
text before it is valid JSON exactly if it is a boundary between elements: inside a string the string would be
unterminated, and inside an object the object would be incomplete. So decoding the prefix proves the boundary, and the
lines are decoded by then.
"""

from __future__ import annotations

import math
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise, repeat
from typing import Annotated, Any, Generic, Protocol, TypeVar, cast

import msgspec

from tailspan.logs.page import CLEAN, MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LineRun, LogPage, Stream
from tailspan.services.fused.window import LateWindow

__all__ = [
    "STEP_BYTES",
    "ArraySplitter",
    "LogEntry",
    "ReplyError",
    "Splitter",
    "decode_json",
    "lines",
    "messages",
    "pages",
]

T = TypeVar("T")

# As text with one wide character, an element takes four times this, and its cleaning as much again: with 8 MiB an agent
# stays below 256 MiB (docs/agent.md).
MAX_ELEMENT_BYTES = 8 << 20
STEP_BYTES = 512 << 10
_SEARCH_BYTES = 8 << 10
_MAX_CANDIDATES = 16
_MOST_PIECES = 1024
# A time that fits into 64 bits of ns: until the year 2262.
_MAX_MS = 2**63 // NANOS_PER_MS

_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{\s*\")")
_SPACE = b" \t\r\n"
_CLOSING = ord("]")
_BOM = b"\xef\xbb\xbf"
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)")
_STRING_OR_NUMBER = re.compile(rb'"(?:[^"\\]++|\\.)*+"|-?(?:NaN|Infinity)|-?[0-9][0-9.eE+-]*+')
_IMPOSSIBLE = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}|[0-9]{300}")
_MOST_DIGITS = 300
_LONE_SURROGATE_BYTES = len(b"\\ud800")
_STREAMS = {name: Stream.NAMES.index(name) for name in Stream.NAMES}


class ReplyError(ValueError):
    """The reply is not the expected JSON; the message describes what it is instead."""


class LogEntry(msgspec.Struct, gc=False):
    """One element of a log reply; other keys are ignored."""

    message: str
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=_MAX_MS)]
    stream: Any = None


_entries = msgspec.json.Decoder(list[LogEntry])
_objects = msgspec.json.Decoder(list[dict[str, Any]])


def decode_json(decoder: msgspec.json.Decoder[T], text: bytes | memoryview) -> T:
    """Decode JSON. Invalid UTF-8 and halves of surrogate pairs become U+FFFD; a BOM is removed.

    Numbers that no number type can hold (``NaN``, ``1e400``) become null: one of them must not hide the other elements.

    Raises:
        msgspec.DecodeError: The text is not JSON, or (`msgspec.ValidationError`) not of the decoder's type.
    """
    try:
        return decoder.decode(text)
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, msgspec.ValidationError) and "out of range" not in str(error):
            raise
        repaired = _repair(bytes(text))
        if repaired == text:
            raise
        return decoder.decode(repaired)


def _repair(text: bytes) -> bytes:
    text = text.removeprefix(_BOM).decode("utf-8", "replace").encode()
    if b"\\ud" in text.lower():
        text = _ESCAPE.sub(_whole_pair, text)
    return _STRING_OR_NUMBER.sub(_possible, text) if _IMPOSSIBLE.search(text) else text


def _possible(token: re.Match[bytes]) -> bytes:
    found = token[0]
    if found.startswith(b'"'):
        return found
    return found if len(found) <= _MOST_DIGITS and math.isfinite(float(found)) else b"null"


def _whole_pair(escape: re.Match[bytes]) -> bytes:
    found = escape[0]
    is_half = len(found) == _LONE_SURROGATE_BYTES
    return b"\\ufffd" if is_half else found


class Splitter(Protocol[T]):
    """Turns the pieces of a reply into its parts."""

    def feed(self, piece: bytes) -> list[T]:
        """Add the next piece and return the complete parts; often none."""
        ...

    def close(self) -> list[T]:
        """End the reply and return the remaining parts."""
        ...


class ArraySplitter(Generic[T]):
    """Turns the pieces of one JSON array of objects into lists of its elements, with a bounded buffer."""

    def __init__(self, decoder: msgspec.json.Decoder[list[T]], step_bytes: int = STEP_BYTES) -> None:
        """Begin a reply.

        Args:
            decoder: Decodes a JSON array of elements.
            step_bytes: How much to gather before cutting off elements.
        """
        self._decoder = decoder
        self._step_bytes = step_bytes
        self._want_bytes = step_bytes
        self._buffer = bytearray()
        self._came: list[bytes] = []
        self._came_bytes = 0
        self._begun = False

    def feed(self, piece: bytes) -> list[T]:
        """Add the next piece and return the complete elements; often none.

        Raises:
            ReplyError: The reply is not an array of such elements, or an element is larger than 8 MiB.
        """
        self._came.append(piece)
        self._came_bytes += len(piece)
        # Pieces are joined together, because a growing buffer is copied for each piece. A long element does grow the
        # buffer, so that it is not held twice.
        gathers = self._begun and len(self._buffer) <= self._step_bytes and len(self._came) < _MOST_PIECES
        if gathers and len(self._buffer) + self._came_bytes < self._want_bytes:
            return []
        self._join()
        return self._cut() if len(self._buffer) >= self._want_bytes else []

    def close(self) -> list[T]:
        """End the reply and return the remaining elements.

        Raises:
            ReplyError: The reply is not an array of such elements, or is incomplete.
        """
        self._join()
        if not self._begun:
            raise ReplyError("it is empty")
        return self._decode(bytes(self._buffer))

    def _join(self) -> None:
        if len(self._came) == 1:
            self._buffer += self._came[0]
        else:
            self._buffer = bytearray().join((self._buffer, *self._came))
        self._came.clear()
        self._came_bytes = 0
        if not self._begun:
            self._begin()

    def _begin(self) -> None:
        start = self._buffer.lstrip(_BOM + _SPACE)
        if start and not start.startswith(b"["):
            raise ReplyError("it is HTML" if start.startswith(b"<") else f"it starts with {bytes(start[:1])!r}")
        if start:
            self._buffer = start
            self._begun = True

    def _cut(self) -> list[T]:
        buffer = self._buffer
        size = len(buffer)
        # From the second byte on: the opening bracket stays before each part.
        tail = max(1, size - _SEARCH_BYTES)
        # Elements begin with the same key, unlike the objects in lists within them.
        opening = bytes(buffer[1 : buffer.find(b":") + 1])
        alike = re.compile(_BOUNDARY.pattern + b"(?=" + re.escape(opening) + b")")
        found: list[re.Match[bytes]] = []
        for boundary, begin in ((alike, tail), (alike, 1), (_BOUNDARY, tail), (_BOUNDARY, 1)):
            found = found or list(boundary.finditer(buffer, begin))
        for start, end in [match.span() for match in found[: -_MAX_CANDIDATES - 1 : -1]]:
            # Close the array in place, without a copy: the replaced byte is a space or the comma.
            replaced, buffer[start + 1] = buffer[start + 1], _CLOSING
            try:
                with memoryview(buffer) as text:
                    elements = self._decode(text[: start + 2])
            except _NotJsonError:
                buffer[start + 1] = replaced
                continue
            buffer[:end] = b"["
            self._want_bytes = len(buffer) + self._step_bytes
            return elements
        if size > MAX_ELEMENT_BYTES:
            raise ReplyError(f"an element is larger than {MAX_ELEMENT_BYTES >> 20} MiB, or it is not JSON")
        # Trying again after each piece would take quadratic time.
        self._want_bytes = min(2 * size, MAX_ELEMENT_BYTES + 1)
        return []

    def _decode(self, text: bytes | memoryview) -> list[T]:
        try:
            return decode_json(self._decoder, text)
        except msgspec.ValidationError as error:
            raise ReplyError(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _NotJsonError(f"it is not valid JSON: {error}") from None


class _NotJsonError(ReplyError):
    """Invalid JSON. For a prefix, this only means that the cut was not at an element boundary."""


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
        runs = _runs(new.times_unix_nano, page_streams, flags)
        yield LogPage(page_lines, runs, window.cursor(), b"".join(new.digests))


_timestamp = operator.attrgetter("timestamp")
_message = operator.attrgetter("message")
_stream = operator.attrgetter("stream")


def _bodies(texts: list[str]) -> tuple[list[bytes], int]:
    """Return the lines as bytes, without their endings, and their flags; in one step if no line has a NUL."""
    joined = "\0".join(texts).encode()
    bodies = joined.split(b"\0") if texts else []
    plain = len(bodies) == len(texts) and joined.isascii() and b"\r" not in joined and b"\x1b" not in joined
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


def _runs(times_unix_nano: Sequence[int], streams: int | Sequence[int], flags: int) -> list[LineRun]:
    """Return the runs: consecutive lines of one stream whose times count up by one nanosecond."""
    following = pairwise(times_unix_nano)
    starts = [0, *(place for place, (nano, after) in enumerate(following, 1) if after - nano != 1)]
    if not isinstance(streams, int):
        changes = (place for place in range(1, len(streams)) if streams[place] != streams[place - 1])
        starts = sorted({*starts, *changes})
    counts = map(operator.sub, [*starts[1:], len(times_unix_nano)], starts)
    firsts = map(times_unix_nano.__getitem__, starts)
    kinds = repeat(streams) if isinstance(streams, int) else map(streams.__getitem__, starts)
    # Most lines have a millisecond, and so a run, of their own: this makes `LineRun`s without a Python call for each.
    return list(
        map(_new_run, zip(counts, firsts, kinds, repeat(flags), repeat(""), repeat(0), repeat(0), strict=False))
    )


_new_run = cast("Callable[[tuple[int, int, int, int, str, int, int]], LineRun]", partial(tuple.__new__, LineRun))
