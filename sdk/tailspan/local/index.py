"""`log.idx`: one small entry per read of a job's output, so that times and counts need no read of the text.

The file is a 32-byte header and then 32-byte entries, all little-endian. An entry says where its text ends in `log`,
when it was read, how many lines precede its end, from which stream it came and what kind of bytes it has; its
checksum detects a torn or damaged entry. `log` is written before `log.idx`.

Line ``i`` of an entry has the time ``time_unix_nano + i``: unique and in order within a job. An entry lies within one
millisecond, so that a search by ``since_ms`` never has to cut one.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import struct
import zlib
from collections import namedtuple

__all__ = [
    "CR",
    "ENTRY_BYTES",
    "ESC",
    "HEADER",
    "HEADER_BYTES",
    "MAX_ENTRY_BYTES",
    "MAX_ENTRY_LINES",
    "NON_ASCII",
    "NOTHING",
    "NO_NEWLINE",
    "NUL",
    "RECOVERED",
    "STEPPED_BACK",
    "UNCLEAN",
    "Entry",
    "entry_time",
    "pack_entry",
    "text_flags",
    "unpack_entry",
]

MAX_ENTRY_LINES = 4096
MAX_ENTRY_BYTES = 1 << 20

NON_ASCII = 1
CR = 2
ESC = 4
NUL = 8
NO_NEWLINE = 16
"""The entry's last line has no newline in `log`: the output ended there, or was cut."""
RECOVERED = 32
"""Not in the file: made by a reader for text that a killed supervisor had not yet entered."""
STEPPED_BACK = 64
"""The clock was set back before this entry or an earlier one: times are not sorted from here on."""
UNCLEAN = NON_ASCII | CR | ESC | NUL

_VERSION = 1
HEADER = struct.pack("<8sHH20x", b"tailspan", _VERSION, 32)
HEADER_BYTES = len(HEADER)

_ENTRY = struct.Struct("<QqQBBH")
_CHECKSUM = struct.Struct("<I")
ENTRY_BYTES = _ENTRY.size + _CHECKSUM.size

_NANOS_PER_MS = 1_000_000
_CLOCK_STEP_NANOS = 1_000_000_000


# Not `typing.NamedTuple`: importing `typing` costs a tenth of a supervisor's start.
class Entry(namedtuple("Entry", ("end", "time_unix_nano", "lines_end", "stream", "flags"))):
    """The lines of one read.

    Attributes:
        end: Offset in `log` where their text ends.
        time_unix_nano: Time of the first line; each further one is 1 ns later.
        lines_end: How many lines the log has up to ``end``.
        stream: 1 stdout, 2 stderr, 0 not known.
        flags: What kind of bytes the text has, and how it ends.
    """

    __slots__ = ()
    end: int
    time_unix_nano: int
    lines_end: int
    stream: int
    flags: int


NOTHING = Entry(0, 0, 0, 0, 0)
"""What precedes the first entry."""


def pack_entry(entry: Entry) -> bytes:
    """Return the entry as it stands in the file."""
    body = _ENTRY.pack(entry.end, entry.time_unix_nano, entry.lines_end, entry.stream, entry.flags, 0)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack_entry(raw: bytes) -> Entry | None:
    """Return the entry that 32 bytes of the file stand for; None when they are torn or damaged."""
    if len(raw) != ENTRY_BYTES or _CHECKSUM.unpack_from(raw, _ENTRY.size)[0] != zlib.crc32(raw[: _ENTRY.size]):
        return None
    # Not `Entry(...)`, a call in Python: a log may have millions.
    return tuple.__new__(Entry, _ENTRY.unpack_from(raw)[:5])


def text_flags(text: bytes) -> int:
    """Return what kind of bytes a text has; 0 means that nothing is to be cleaned in it."""
    flags = 0 if text.isascii() else NON_ASCII
    if b"\r" in text:
        flags |= CR
    if b"\x1b" in text:
        flags |= ESC
    if b"\0" in text:
        flags |= NUL
    return flags


def entry_time(floor_unix_nano: int, now_unix_nano: int, lines: int) -> tuple[int, bool]:
    """Return when an entry's first line is, so that no two lines of a job share a time.

    Args:
        floor_unix_nano: The first time after the lines of the entry before.
        now_unix_nano: When the text was read.
        lines: How many lines it has.

    Returns:
        The time in ns since the epoch, and whether the clock was set back. A small step back (NTP) is hidden by
        counting on; one of a second or more is taken as it is, or all further times would be wrong.
    """
    behind = floor_unix_nano - now_unix_nano
    stepped_back = behind >= _CLOCK_STEP_NANOS
    time = now_unix_nano if stepped_back else max(now_unix_nano, floor_unix_nano)
    if time // _NANOS_PER_MS != (time + lines - 1) // _NANOS_PER_MS:
        time = (time // _NANOS_PER_MS + 1) * _NANOS_PER_MS
    return time, stepped_back
