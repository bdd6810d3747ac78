"""Nouns after numbers, and a search for messages that do without."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailspan._plural import plural

ROOT = Path(__file__).parents[3]
_NOUNS = (
    "attempts|batches|bytes|characters|errors|files|jobs|lines|records|requests|rows|runs|tasks|times|tries|warnings"
)
_COUNTED = re.compile(rf"(%d|%s|{{[^{{}}]*}}) (?:\w+ )?(?:{_NOUNS})\b")
_CONSTANT = re.compile(r"(?i)max|most|min_|job_id")


def texts_of(source: str) -> Iterator[str]:
    """Yield string literals; of f-strings with the expressions in braces."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                for part in node.values
            )
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"0 {plural(0, 'line')}", "0 lines"),
        (f"1 {plural(1, 'line')}", "1 line"),
        (f"2 {plural(2, 'line')}", "2 lines"),
        (f"1 {plural(1, 'batch', 'batches')}", "1 batch"),
        (f"2 {plural(2, 'try', 'tries')}", "2 tries"),
    ],
)
def test_a_noun_follows_its_number(text: str, shown: str) -> None:
    """One has the singular, all others have the plural."""
    assert text == shown


def counted_plurals(source: str) -> list[str]:
    """Return the places of a text where a number stands before a plural noun, unless the number is a constant."""
    places = (place for text in texts_of(source) for place in _COUNTED.finditer(text))
    return [place[0] for place in places if not _CONSTANT.search(place[1])]


@pytest.mark.parametrize("package", ["sdk/tailspan", "agent/tailspan_agent"])
def test_no_message_counts_one_lines(package: str) -> None:
    """A number is followed by `plural`, since it may be 1."""
    found = {path.name: counted_plurals(path.read_text()) for path in sorted((ROOT / package).rglob("*.py"))}
    assert {name: places for name, places in found.items() if places} == {}


def test_counted_plurals_are_found() -> None:
    """The search finds a format, an f-string and a word between; a constant is left out."""
    source = (
        """f"{len(found)} lines"; "%d failed attempts"; f"{_MAX} bytes"; f"{n} {plural(n, 'line')}"; "two lines" """
    )
    assert counted_plurals(source) == ["{len(found)} lines", "%d failed attempts"]
