"""Log pages on the wire between `tailspan serve` and this SDK. Pure.

The job API's own log reply is a JSON object a line, which has only time and text of a line. Here a page goes as
it is: its lines in one piece, with the times and uids that they have where the job really runs. A reply consists of
frames, each four bytes, big-endian, with the length of the MessagePack array that follows:

    frame          [job, more, page]    job: its place in the request; more: request it again, at once and alone
    page           [cursor, runs, text, lines, digests, tasks, marks], see `tailspan.logs.page.LogPage`; nil ends a
                   reply for one job
    run            [lines, time_unix_nano, stream, flags, uid_prefix]
    text, lines    the lines with a newline after each; or one by one, where a line has a newline within
    tasks          [task_id, name, attempt]
    marks          [task, severity] of each run; empty where all are 0. Older readers ignore tasks and marks.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Annotated, NamedTuple

import msgspec

from tailspan._secrets import mask_and_cut
from tailspan.errors import ConfigError
from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_LINES, LineRun, LogPage, Stream, TaskRef
from tailspan.logs.text import count_lines

__all__ = [
    "CURSOR_MARK",
    "MAX_FRAME_BYTES",
    "MAX_JOBS",
    "MEDIA_TYPE",
    "RESUME_HEADER",
    "Frame",
    "FrameError",
    "FrameSplitter",
    "cursor_text",
    "encode_frame",
    "read_cursor",
]

MEDIA_TYPE = "application/vnd.tailspan.log-pages"
"""The type of a reply of frames."""
RESUME_HEADER = "Tailspan-Resume-Cursor"
"""With status 410 (lines after the cursor are gone), the cursor to continue at; empty: the oldest line left."""
CURSOR_MARK = b"@"
"""The first byte of a cursor of these pages at the client, which also has cursors by time."""
MAX_FRAME_BYTES = 64 << 20
MAX_JOBS = 200
"""Maximum number of jobs in one request."""

_MOST_LINES = 20 * MAX_PAGE_LINES  # a service of others may make larger pages than ours
_MAX_UID_PREFIX = 256
_length = struct.Struct(">I")


class FrameError(ValueError):
    """The reply does not have the format of this module; the text explains why."""


class Frame(NamedTuple):
    """A part of a reply.

    Attributes:
        job: The job's place in the request.
        more: Whether to request the job again at once, alone: it has more lines, or an error.
        page: Its next lines, if there are any.
    """

    job: int
    more: bool
    page: LogPage | None


_MAX_SEVERITY = 24

_Run = tuple[int, int, int, int, str]


class _Page(msgspec.Struct, array_like=True, gc=False):
    cursor: bytes
    runs: Annotated[list[_Run], msgspec.Meta(max_length=_MOST_LINES)]
    text: bytes
    lines: Annotated[list[bytes], msgspec.Meta(max_length=_MOST_LINES)]
    digests: bytes
    tasks: Annotated[list[TaskRef], msgspec.Meta(max_length=_MOST_LINES)] = []
    marks: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=_MOST_LINES)] = []


class _Frame(msgspec.Struct, array_like=True, gc=False):
    job: Annotated[int, msgspec.Meta(ge=0)]
    more: bool
    page: _Page | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Frame)


def encode_frame(page: LogPage | None, *, job: int = 0, more: bool = False) -> bytearray:
    """Return a frame; see `Frame`."""
    sent = None
    if page is not None:
        text, lines = page.joined(), list[bytes]()
        if not page.text and count_lines(text) != page.line_count:
            text, lines = b"", page.lines
        runs: list[_Run] = [run[:5] for run in page.runs]
        is_marked = any(run.task or run.severity for run in page.runs)
        marks = [(run.task, run.severity) for run in page.runs] if is_marked else []
        sent = _Page(page.cursor, runs, text, lines, page.digests, list(page.tasks), marks)
    frame = bytearray(_length.size)
    _encoder.encode_into(_Frame(job, more, sent), frame, _length.size)
    _length.pack_into(frame, 0, len(frame) - _length.size)
    return frame


def cursor_text(cursor: bytes) -> str:
    """Return a cursor as it stands in a query or a header."""
    return base64.urlsafe_b64encode(cursor).decode()


def read_cursor(text: str) -> bytes:
    """Return the cursor that `cursor_text` wrote.

    Raises:
        ConfigError: It is not a cursor.
    """
    try:
        return base64.b64decode(text.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(f"{mask_and_cut(text, 40, '')!r} is not a cursor") from None


class FrameSplitter:
    """Takes the pieces of one reply and gives its frames; holds one frame.

    Args:
        for_one: Whether the reply is for one job, so that only a frame without a page ends it.
    """

    def __init__(self, *, for_one: bool = False) -> None:
        self._buffer = bytearray()
        self._has_no_end = for_one

    def feed(self, piece: bytes) -> list[Frame]:
        """Take in the next piece and return the frames that are complete; often none.

        Raises:
            FrameError: This is not a reply of frames.
        """
        buffer = self._buffer
        buffer += piece
        frames = []
        start = 0
        while len(buffer) >= (begin := start + _length.size):
            (size,) = _length.unpack_from(buffer, start)
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"a part of it is larger than {MAX_FRAME_BYTES >> 20} MiB")
            if len(buffer) < begin + size:
                break
            start = begin + size
            with memoryview(buffer) as view, view[begin:start] as data:
                frames.append(_decoded(data))
        del buffer[:start]
        if frames and frames[-1].page is None:
            self._has_no_end = False
        return frames

    def close(self) -> list[Frame]:
        """End the reply.

        Raises:
            FrameError: It ends within a frame.
        """
        if self._buffer or self._has_no_end:
            raise FrameError("it ends early")
        return []


def _decoded(data: memoryview) -> Frame:
    try:
        frame = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(str(error)) from None
    except RecursionError:
        raise FrameError("it is nested too deeply") from None
    if frame.page is None:
        return Frame(frame.job, frame.more, None)
    found = frame.page
    # Not by `count_lines`, which 64 MiB of newlines would keep for a second.
    count = found.text.count(b"\n") if found.text else len(found.lines)
    if count > _MOST_LINES:
        raise FrameError(f"a page has over {_MOST_LINES} lines")
    if found.text and not found.text.endswith(b"\n"):
        raise FrameError("the last line of a page has no end")
    # A server may send anything; encoding relies on these. That the text is clean we find out ourselves.
    marks = found.marks or [(0, 0)] * len(found.runs)
    if len(marks) != len(found.runs):
        raise FrameError("the marks of a page are not those of its runs")
    if not all(0 <= task <= len(found.tasks) and 0 <= severity <= _MAX_SEVERITY for task, severity in marks):
        raise FrameError("a run of a page has an unknown task or severity")
    runs = [
        LineRun(lines, time, stream, 0, prefix, *mark)
        for (lines, time, stream, _, prefix), mark in zip(found.runs, marks, strict=True)
    ]
    if not 0 < count == sum(run.lines for run in runs):
        raise FrameError("the runs of a page are not those of its lines")
    if found.digests and len(found.digests) != DIGEST_BYTES * count:
        raise FrameError("the digests of a page are not those of its lines")
    for run in runs:
        numbered = run.lines <= MAX_PAGE_LINES and 0 < len(run.uid_prefix) <= _MAX_UID_PREFIX
        has_uids = bool(found.digests) or numbered
        if run.lines < 1 or not 0 <= run.stream < len(Stream.NAMES) or not has_uids:
            raise FrameError(f"a run of a page is not possible: {str(run)[:200]}")
    cursor, lines = CURSOR_MARK + found.cursor, None if found.text else found.lines
    page = LogPage(lines, runs, cursor, found.digests, found.text, tuple(found.tasks))
    return Frame(frame.job, frame.more, page)
