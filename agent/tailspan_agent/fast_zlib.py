"""gzip and crc32 with Intel's ISA-L if it is installed, else with zlib: the same format and the same checksums.

ISA-L's gzip is smaller than zlib's level 1 at a sixth of its cost, and its crc32 costs a twentieth
(``python -m tests.bench --only W1``). Its package has wheels for 64-bit Intel and ARM only.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

__all__ = ["crc32", "gzip"]

# zlib's level 9 costs four times as much as this for 18% fewer bytes.
_LEVEL = 1
# A gzip header (RFC 1952) and zlib's window. The header has no time: the same payload gives the same bytes.
_GZIP_WBITS = 31


@cache
def _library() -> ModuleType:
    """Load the library when there is something to do for it: it takes 0.4 MiB."""
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib
    return isal_zlib


def gzip(payload: bytes) -> bytes:
    """Return a payload as gzip, always the same bytes for the same payload. It releases the GIL."""
    packed: bytes = _library().compress(payload, _LEVEL, wbits=_GZIP_WBITS)
    return packed


def crc32(data: bytes, value: int = 0) -> int:
    """Return the checksum of the bytes behind those of a value; see zlib."""
    checksum: int = _library().crc32(data, value)
    return checksum
