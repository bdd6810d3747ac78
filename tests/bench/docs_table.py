"""The table of docs/benchmarks.md: new rows for the workloads that ran last, the other rows unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench.table import HEADS, Row
from tests.docs_tables import BENCHMARKS, part, rows, table, with_part

__all__ = ["BEGIN", "END", "with_rows", "write"]

COMMAND = "make bench BENCH_DOCS=1"
BEGIN, END = f"<!-- bench: written by `{COMMAND}` -->", "<!-- bench: end -->"
_COLUMNS = (*HEADS, "scale", "measured")
_FIGURE, _GOAL, _MET = (HEADS.index(name) for name in ("figure", "goal", "met"))


def with_rows(text: str, measured: Iterable[Row], *, when: str, where: str, scale: float) -> str:
    """Return the page's text with new rows for the workloads that were measured.

    Args:
        text: docs/benchmarks.md.
        measured: The rows.
        when: The date.
        where: The machine.
        scale: Share of the full size.

    Raises:
        LookupError: The text has no place for the table.
    """
    new = [[*row.cells(), f"{scale:g}", when] for row in measured]
    ran = {_workload(cells) for cells in new}
    kept = [cells for cells in rows(part(text, BEGIN, END), len(_COLUMNS)) if _workload(cells) not in ran]
    every = sorted([*kept, *new], key=_workload)
    goals = [[row[0], row[_FIGURE], row[_GOAL], row[_MET]] for row in every if row[_GOAL]]
    lines = [
        f"`{COMMAND}`, {where}. CPU is the whole process tree's, user and system. Figures are medians.",
        "",
        *table(("case", "measured", "goal", "met"), goals),
        "",
        f"<details><summary>All {len(every)} rows</summary>",
        "",
        *table(_COLUMNS, every),
        "",
        "</details>",
    ]
    return with_part(text, BEGIN, END, lines)


def write(measured: Iterable[Row], *, when: str, where: str, scale: float, path: Path = BENCHMARKS) -> None:
    """Write the rows into docs/benchmarks.md; see `with_rows`."""
    text = with_rows(path.read_text(encoding="utf-8"), measured, when=when, where=where, scale=scale)
    path.write_text(text, encoding="utf-8")


def _workload(cells: Sequence[str]) -> str:
    return cells[0].split(" ", 1)[0]
