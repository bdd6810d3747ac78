"""Shorten texts that a store would cut at their end. Pure."""

from __future__ import annotations

__all__ = ["STORED_BYTES", "shorten_middle", "shorten_stack"]

STORED_BYTES = 2048
"""Length at which many trace stores cut an attribute, in bytes: the default of Tempo's `max_attribute_bytes`."""

_STACK_NOTE = "\n  [... the middle is left out ...]\n"


def shorten_middle(text: str, max_bytes: int, *, note: str = " [...] ", head_bytes: int | None = None) -> str:
    """Return a text with its middle left out if it is too long: the start and the end say most.

    Args:
        text: The text.
        max_bytes: The most that it may take in UTF-8, the note included.
        note: ASCII text that replaces the middle.
        head_bytes: Length of the start, in bytes; None: as long as the end.
    """
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return text
    room = max_bytes - len(note)
    head = room // 2 if head_bytes is None else min(head_bytes, room)
    return data[:head].decode("utf-8", "ignore") + note + data[len(data) - (room - head) :].decode("utf-8", "ignore")


def shorten_stack(text: str, max_bytes: int) -> str:
    """Return a stack trace with its middle left out if it is too long.

    Its end is longer than its start: there are the exception and the place that raised it.

    Args:
        text: The stack trace.
        max_bytes: The most that it may take in UTF-8.
    """
    return shorten_middle(text, max_bytes, note=_STACK_NOTE, head_bytes=max_bytes // 6)
