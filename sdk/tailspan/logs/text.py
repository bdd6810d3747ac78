"""Texts of lines, with a newline after each line. Pure; standard library only, because the supervisor imports it.

A job that prints as fast as it can waits for `count_lines`, so that is in C where C was compiled (`tailspan._native`).
"""

from __future__ import annotations

from tailspan._native import compiled

__all__ = ["count_lines", "count_lines_in_python", "lines_end", "lines_end_in_python", "split_text"]


def count_lines_in_python(text: bytes) -> int:
    """Return the number of newlines; for lines of 30 bytes or more this is faster than ``bytes.count``."""
    return len(text) - len(text.replace(b"\n", b""))


count_lines = compiled("count_lines", count_lines_in_python)


def lines_end_in_python(text: bytes, start: int, count: int, /) -> int:
    """Return the end of some lines of a text.

    Args:
        text: The lines, with a newline after each.
        start: Where the first of them begins.
        count: Their number.

    Raises:
        ValueError: There are not as many lines.
    """
    for _ in range(count):
        start = text.index(b"\n", start) + 1
    return start


lines_end = compiled("lines_end", lines_end_in_python)


def split_text(text: bytes) -> list[bytes]:
    """Return the lines, without their newlines."""
    lines = text.split(b"\n")
    lines.pop()
    return lines
