"""Texts of lines, with a newline after each. Pure, stdlib only; the supervisor imports this.

Counting is done in C where that could be compiled (`_text.c`): a job that prints as fast as it can waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["COMPILED", "count_lines", "split_text"]


def count_lines(text: bytes) -> int:
    """Return how many newlines there are: faster than ``bytes.count`` for lines of 30 bytes or more."""
    return len(text) - len(text.replace(b"\n", b""))


def split_text(text: bytes) -> list[bytes]:
    """Return the lines, without their newlines."""
    lines = text.split(b"\n")
    lines.pop()
    return lines


IN_PYTHON = count_lines
"""`count_lines` as it stands above, also where a compiled one has taken its name."""

if not TYPE_CHECKING:
    try:
        from tailspan.logs._text import count_lines
    except ImportError:  # it was not compiled where this was built
        pass

COMPILED = count_lines is not IN_PYTHON
"""Whether the compiled part is here."""
