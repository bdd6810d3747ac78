"""Nouns after numbers in messages. Pure."""

from __future__ import annotations

__all__ = ["plural"]


def plural(number: float, noun: str, many: str | None = None) -> str:
    """Return a noun in the form that follows a number: `1 line`, `2 lines`.

    Args:
        number: The number, which the caller writes in its own format.
        noun: The form after 1.
        many: The form after any other number, if it is not the noun with an s.
    """
    return noun if number == 1 else many or f"{noun}s"
