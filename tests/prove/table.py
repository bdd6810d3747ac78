"""The table of the proof: one row for each fault, in plain text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.prove.world import Found

COLUMNS = (
    "fault", "jobs", "lines", "missing", "repeated", "needless", "order", "time", "uid", "foreign", "spans", "dead",
    "MiB", "s", "verdict",
)  # fmt: skip
LEGEND = """\
lines: lines that the jobs wrote. missing: lines that never arrived, nor are in the dead letter. repeated: records whose
uid had come before. needless: repeats of acked lines. order, time, uid, foreign: lines out of order, with a wrong time,
with more than one uid, or that nobody wrote. spans: spans missing, or repeated with another id or other bytes.
dead: records in the dead letter. MiB: the agent's memory, at most. verdict: ok, or what is wrong."""


@dataclass
class Row:
    """What was found under one fault.

    Attributes:
        fault: What was done.
        found: What the oracle counted; several worlds are added up.
        problems: What else is wrong, in words.
        seconds: How long it took.
        reproduce: The command that does it again.
        notes: What there is to know besides.
    """

    fault: str
    found: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reproduce: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``ok``, or what is wrong."""
        wrong = list(self.problems)
        for found in self.found:
            wrong += found.complaints()
        return "; ".join(wrong) or "ok"

    @property
    def ok(self) -> bool:
        """Whether the guarantee held."""
        return self.verdict == "ok"

    def cells(self) -> list[str]:
        """Return the row's cells, as in `COLUMNS`."""
        total = Found.total(self.found)
        lines = total.lines
        counted = [
            total.jobs, lines.expected, lines.missing, lines.repeated, lines.needless, lines.out_of_order,
            lines.wrong_time, lines.uid_unstable, lines.foreign, total.spans.faults, total.dead_lettered,
            round(total.peak_rss / (1 << 20)), round(self.seconds),
        ]  # fmt: skip
        return [self.fault, *map(str, counted), "ok" if self.ok else "FAILED"]

    def to_json(self) -> dict[str, Any]:
        """Return the row for machines."""
        return {
            **dict(zip(COLUMNS, self.cells(), strict=True)),
            "verdict": self.verdict,
            "notes": self.notes,
            "reproduce": self.reproduce,
        }


def render(rows: Sequence[Row]) -> str:
    """Return the table as text; below it the notes, and of rows that failed what is wrong and how to see it again."""
    table = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    lines.insert(1, "-" * len(lines[0]))
    for row in rows:
        lines += ["", f"{row.fault}:"] if row.notes or not row.ok else []
        lines += [f"  {note}" for note in row.notes]
        lines += [] if row.ok else [f"  FAILED: {row.verdict}", f"  again: {row.reproduce}"]
    return "\n".join([*lines, "", LEGEND])


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()
