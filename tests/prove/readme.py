"""The proof's table in README, as the rows that ran last have it; what did not run now stays as it was there."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.prove.rows import groups

README = Path(__file__).parents[2] / "README.md"
COMMAND = "make prove PROVE_README=1"
BEGIN, END = "<!-- proof: written by `make prove PROVE_README=1` -->", "<!-- proof: end -->"
COLUMNS = (
    "fault", "jobs", "lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans", "dead",
    "MiB", "s", "verdict", "date", "seed",
)  # fmt: skip
_COUNTED = ("lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans")
_PART = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
_ROW = re.compile(r"^\| (.*) \|$", re.MULTILINE)

Cells = Mapping[str, str]


def rows_of(text: str) -> dict[str, Cells]:
    """Return the rows of README's long table by fault."""
    part = _PART.search(text)
    found = [match[1].replace(r"\|", "|").split(" | ") for match in _ROW.finditer(part[0])] if part else []
    _, _, *rows = [cells for cells in found if len(cells) == len(COLUMNS)] or [(), ()]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in rows}


def with_rows(text: str, rows: Iterable[Cells]) -> str:
    """Return README's text with these rows in its tables; rows that the proof has no more go.

    Raises:
        LookupError: The text has no place for it.
    """
    if not _PART.search(text):
        raise LookupError(f"README.md has no part between {BEGIN!r} and {END!r}")
    known = rows_of(text) | {row["fault"]: row for row in rows}
    part = _render({title: [known[name] for name in names if name in known] for title, names in groups().items()})
    return _PART.sub(lambda _: part, text)


def write(rows: Iterable[Cells], path: Path = README) -> None:
    """Write these rows into README."""
    path.write_text(with_rows(path.read_text(encoding="utf-8"), rows), encoding="utf-8")


def _render(by_group: Mapping[str, Sequence[Cells]]) -> str:
    rows = [row for group in by_group.values() for row in group]
    dates = sorted({row["date"] for row in rows})
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    long = [COLUMNS, ["---"] + ["--:"] * (len(COLUMNS) - 1), *([row[name] for name in COLUMNS] for row in rows)]
    return "\n".join(
        [
            f"`{COMMAND}`, {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'never run'}, {machine}:",
            "",
            *map(_line, _summary(by_group)),
            "",
            f"<details><summary>All {len(rows)} rows; those of one seed ran together</summary>",
            "",
            *map(_line, long),
            "",
            "</details>",
            "",
        ]
    )


def _summary(by_group: Mapping[str, Sequence[Cells]]) -> Iterable[Sequence[str]]:
    """Yield the rows of the short table."""
    yield ["faults", "rows", *_COUNTED, "failed"]
    yield ["---", *["--:"] * (len(_COUNTED) + 2)]
    for title, rows in by_group.items():
        sums = [sum(int(row[name]) for row in rows) for name in _COUNTED]
        failed = sum(row["verdict"] != "ok" for row in rows)
        yield [title, *(f"{number:,}" for number in (len(rows), *sums, failed))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
