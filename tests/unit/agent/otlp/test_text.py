"""Shortened texts: within their limit, with their start and their end."""

from __future__ import annotations

import pytest

from tailspan_agent.otlp.text import shorten_middle, shorten_stack


@pytest.mark.parametrize("text", ["x" * 2048, "é" * 1024, ""])
def test_what_fits_stays(text: str) -> None:
    """A text of exactly the limit is not changed; the limit counts bytes."""
    assert shorten_middle(text, 2048) == text


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("max_bytes", [40, 41, 42, 43])
def test_the_middle_is_left_out(character: str, max_bytes: int) -> None:
    """Start and end remain, and no character is cut in two."""
    short = shorten_middle(f"start {character * 100} end", max_bytes)
    assert len(short.encode()) <= max_bytes
    assert short.startswith("start ")
    assert short.endswith(" end")
    assert " [...] " in short
    assert set(short) <= set("start [...] end") | {character}


def test_a_stack_keeps_more_of_its_end() -> None:
    """The exception and the frames that raised it come last."""
    short = shorten_stack("\n".join(f"  frame {number}" for number in range(1000)) + "\nValueError: no", 2048)
    head, tail = short.split("\n  [... the middle is left out ...]\n")
    assert len(short.encode()) <= 2048
    assert len(tail) > 3 * len(head)
    assert tail.endswith("  frame 999\nValueError: no")
