"""gzip and crc32 by Intel's ISA-L where it is installed, by zlib elsewhere: the same formats, and the same checksums.

ISA-L makes smaller gzip than zlib's level 1 at a sixth of its cost, and sums at a twentieth
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
# RFC 1952 framing, of zlib's window. The header has no time in it, so that the same bytes make the same bytes again.
_GZIP_WBITS = 31


def gzip(payload: bytes) -> bytes:
    """Return a payload as gzip; the same bytes for the same payload. Other threads run meanwhile."""
    return compress(payload, _LEVEL, wbits=_GZIP_WBITS)
