"""The tables of docs/proof.md: new rows for the faults that ran last, the other rows unchanged.

README has one row of them, the sum over all faults.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.docs_tables import PROOF, README, part, rows, table, with_part
from tests.prove.rows import groups

COMMAND = "make prove PROVE_DOCS=1"
BEGIN, END = f"<!-- proof: written by `{COMMAND}` -->", "<!-- proof: end -->"
COLUMNS = (
    "fault", "jobs", "lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans", "dead",
    "MiB", "s", "verdict", "date", "seed", "commit",
)  # fmt: skip
_COUNTED = ("lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans")

Cells = Mapping[str, str]


def rows_of(text: str) -> dict[str, Cells]:
    """Return the rows of the page's long table by fault."""
    found = rows(part(text, BEGIN, END), len(COLUMNS))
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in found}


def with_rows(text: str, measured: Iterable[Cells]) -> str:
    """Return the page's text with these rows in its tables, without the rows of removed faults.

    Raises:
        LookupError: The text has no place for the tables.
    """
    known = rows_of(text) | {row["fault"]: row for row in measured}
    by_group = {title: [known[name] for name in names if name in known] for title, names in groups().items()}
    return with_part(text, BEGIN, END, _render(by_group))


def with_sum(text: str, every: Sequence[Cells]) -> str:
    """Return README's text with the sum of these rows.

    Raises:
        LookupError: The text has no place for the sum.
    """
    return with_part(text, BEGIN, END, table(("faults", *_COUNTED, "failed"), [_sums(every)]))


def write(measured: Iterable[Cells], path: Path = PROOF, readme: Path = README) -> None:
    """Write these rows into docs/proof.md and the sum of all rows into README."""
    text = with_rows(path.read_text(encoding="utf-8"), measured)
    path.write_text(text, encoding="utf-8")
    readme.write_text(with_sum(readme.read_text(encoding="utf-8"), [*rows_of(text).values()]), encoding="utf-8")


def _render(by_group: Mapping[str, Sequence[Cells]]) -> list[str]:
    every = [row for group in by_group.values() for row in group]
    dates = sorted({row["date"] for row in every})
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return [
        f"`{COMMAND}`, {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'never run'}, {machine}:",
        "",
        *table(("faults", "rows", *_COUNTED, "failed"), ([title, *_sums(group)] for title, group in by_group.items())),
        "",
        f"<details><summary>All {len(every)} rows; rows with the same seed ran together</summary>",
        "",
        *table(COLUMNS, ([row[name] for name in COLUMNS] for row in every)),
        "",
        "</details>",
    ]


def _sums(group: Sequence[Cells]) -> list[str]:
    """Return the number of rows, the sum of each counted column, and the number of failed rows."""
    sums = [sum(int(row[name]) for row in group) for name in _COUNTED]
    failed = sum(row["verdict"] != "ok" for row in group)
    return [f"{number:,}" for number in (len(group), *sums, failed)]
