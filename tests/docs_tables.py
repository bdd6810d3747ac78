"""Tables in the docs that measurements write: each stands between two comments, and its rows can be read back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PROOF = ROOT / "docs" / "proof.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"

_ROW = re.compile(r"^\| (.*) \|$", re.MULTILINE)
_BETWEEN_CELLS = re.compile(r"(?<!\\)\|")


def part(text: str, begin: str, end: str) -> str:
    """Return the text between two comments.

    Raises:
        LookupError: The text does not have them.
    """
    match = _pattern(begin, end).search(text)
    if match is None:
        raise LookupError(f"the page has no part between {begin!r} and {end!r}")
    return match[0]


def with_part(text: str, begin: str, end: str, lines: Iterable[str]) -> str:
    """Replace the text between two comments.

    Raises:
        LookupError: The text does not have them.
    """
    part(text, begin, end)
    return _pattern(begin, end).sub(lambda _: "".join(f"{line}\n" for line in lines), text)


def line(cells: Sequence[str]) -> str:
    """Return a row as a line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table: the first column is text, the others are numbers."""
    return [line(cells) for cells in (columns, ["---"] + ["--:"] * (len(columns) - 1), *rows)]


def rows(text: str, width: int) -> list[list[str]]:
    """Return the cells of all table rows with `width` columns, without the head rows."""
    found = [[cell.replace(r"\|", "|").strip() for cell in _BETWEEN_CELLS.split(m[1])] for m in _ROW.finditer(text)]
    wide = [cells for cells in found if len(cells) == width]
    return [cells for cells, after in zip(wide, [*wide[1:], []], strict=False) if not _rule(cells) and not _rule(after)]


def _rule(cells: Sequence[str]) -> bool:
    return bool(cells) and set("".join(cells)) <= set("-:")


def _pattern(begin: str, end: str) -> re.Pattern[str]:
    return re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
