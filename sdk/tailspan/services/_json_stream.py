"""JSON replies of any size: cuts an array into lists of its elements as it arrives. Pure.

No Python code runs per byte. To find the end of an element, the splitter tries the last ``},{"`` in the buffer. The
text before it is valid JSON exactly if it is a boundary between elements: inside a string the string would be
unterminated, and inside an object the object would be incomplete. So decoding the prefix proves the boundary, and the
elements are decoded by then.
"""

from __future__ import annotations

import math
import re
from typing import Generic, Protocol, TypeVar

import msgspec

__all__ = ["MAX_ELEMENT_BYTES", "STEP_BYTES", "ArraySplitter", "ReplyError", "Splitter", "decode_json"]

T = TypeVar("T")

# As text with one wide character, an element takes four times this, and its cleaning as much again: with 8 MiB an agent
# stays below 256 MiB (docs/agent.md).
MAX_ELEMENT_BYTES = 8 << 20
STEP_BYTES = 512 << 10
_SEARCH_BYTES = 8 << 10
_MAX_CANDIDATES = 16
_MOST_PIECES = 1024

_BOUNDARY = re.compile(rb"\}\s*,\s*(?=\{\s*\")")
_SPACE = b" \t\r\n"
_CLOSING = ord("]")
_BOM = b"\xef\xbb\xbf"
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)")
_STRING_OR_NUMBER = re.compile(rb'"(?:[^"\\]++|\\.)*+"|-?(?:NaN|Infinity)|-?[0-9][0-9.eE+-]*+')
_IMPOSSIBLE = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}|[0-9]{300}")
_MOST_DIGITS = 300
_LONE_SURROGATE_BYTES = len(b"\\ud800")


class ReplyError(ValueError):
    """The reply is not the expected JSON; the message describes what it is instead."""


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
