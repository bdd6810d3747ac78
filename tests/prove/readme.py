"""The proof's table in README, as the rows that ran last have it; what did not run now stays as it was there."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.prove.rows import groups
from tests.readme_tables import README, part, rows, table, with_part

COMMAND = "make prove PROVE_README=1"
BEGIN, END = "<!-- proof: written by `make prove PROVE_README=1` -->", "<!-- proof: end -->"
COLUMNS = (
    "fault", "jobs", "lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans", "dead",
    "MiB", "s", "verdict", "date", "seed",
)  # fmt: skip
_COUNTED = ("lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans")

Cells = Mapping[str, str]


def rows_of(text: str) -> dict[str, Cells]:
    """Return the rows of README's long table by fault."""
    found = rows(part(text, BEGIN, END), len(COLUMNS))
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in found}


def with_rows(text: str, measured: Iterable[Cells]) -> str:
    """Return README's text with these rows in its tables; rows that the proof has no more go.

    Raises:
        LookupError: The text has no place for it.
    """
    known = rows_of(text) | {row["fault"]: row for row in measured}
    by_group = {title: [known[name] for name in names if name in known] for title, names in groups().items()}
    return with_part(text, BEGIN, END, _render(by_group))


def write(measured: Iterable[Cells], path: Path = README) -> None:
    """Write these rows into README."""
    path.write_text(with_rows(path.read_text(encoding="utf-8"), measured), encoding="utf-8")


def _render(by_group: Mapping[str, Sequence[Cells]]) -> list[str]:
    every = [row for group in by_group.values() for row in group]
    dates = sorted({row["date"] for row in every})
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return [
        f"`{COMMAND}`, {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'never run'}, {machine}:",
        "",
        *table(("faults", "rows", *_COUNTED, "failed"), _summary(by_group)),
        "",
        f"<details><summary>All {len(every)} rows; those of one seed ran together</summary>",
        "",
        *table(COLUMNS, ([row[name] for name in COLUMNS] for row in every)),
        "",
        "</details>",
    ]


def _summary(by_group: Mapping[str, Sequence[Cells]]) -> Iterable[Sequence[str]]:
    """Yield the rows of the short table."""
    for title, group in by_group.items():
        sums = [sum(int(row[name]) for row in group) for name in _COUNTED]
        failed = sum(row["verdict"] != "ok" for row in group)
        yield [title, *(f"{number:,}" for number in (len(group), *sums, failed))]
