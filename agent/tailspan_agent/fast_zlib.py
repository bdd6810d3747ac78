"""gzip and crc32 with Intel's ISA-L if it is installed, else with zlib: the same format and the same checksums.

ISA-L's gzip is smaller than zlib's level 1 at a sixth of its cost, and its crc32 costs a twentieth
(``python -m tests.bench --only W1``). Its package has wheels for 64-bit Intel and ARM only.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import compress, crc32
except ImportError:
    from zlib import compress, crc32

__all__ = ["crc32", "gzip"]

# zlib's level 9 costs four times as much as this for 18% fewer bytes.
_LEVEL = 1
# A gzip header (RFC 1952) and zlib's window. The header has no time: the same payload gives the same bytes.
_GZIP_WBITS = 31


def gzip(payload: bytes) -> bytes:
    """Return a payload as gzip, always the same bytes for the same payload. It releases the GIL."""
    return compress(payload, _LEVEL, wbits=_GZIP_WBITS)
