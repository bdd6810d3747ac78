"""The table of the benchmarks: rows of costs and figures, their goals, and the ratios that must not get worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.measure import Usage

__all__ = ["Goal", "Row", "ratios", "render", "worse"]

MIB = 1 << 20
HEADS = ("case", "lines", "us/line", "wall s", "lines/s", "MiB", "requests", "MB sent", "figure", "goal", "met")


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit that a figure should keep.

    Attributes:
        limit: The limit.
        at_least: Whether the figure should be as large as that, rather than as small.
    """

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Return whether a figure keeps it."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: what a case cost, or a figure, or both.

    Attributes:
        case: Workload and case.
        lines: How many lines there were.
        usage: What they cost.
        requests: How many requests were sent.
        sent: How many bytes those had.
        figure: A figure, in the unit.
        unit: Its unit; ``x`` marks a ratio within one run: those are guarded by ``expected.json``.
        goal: What the figure should be.
    """

    case: str
    lines: int = 0
    usage: Usage | None = None
    requests: int = 0
    sent: int = 0
    figure: float | None = None
    unit: str = ""
    goal: Goal | None = None

    def cells(self) -> list[str]:
        """Return the cells, as in `HEADS`."""
        used, lines = self.usage, self.lines
        cost = [
            f"{lines:,}" if lines else "",
            f"{used.cpu_s / lines * 1e6:.2f}" if used and lines else "",
            f"{used.wall_s:.2f}" if used else "",
            f"{lines / used.wall_s:,.0f}" if used and lines else "",
            f"{used.rss / MIB:.0f}" if used else "",
            f"{self.requests:,}" if self.requests else "",
            f"{self.sent / 1e6:.1f}" if self.sent else "",
        ]
        if self.figure is None:
            return [self.case, *cost, "", "", ""]
        figure = f"{_short(self.figure)} {self.unit}"
        if self.goal is None:
            return [self.case, *cost, figure, "", ""]
        sign = ">=" if self.goal.at_least else "<="
        met = "yes" if self.goal.met(self.figure) else "NO"
        return [self.case, *cost, figure, f"{sign} {_short(self.goal.limit)}", met]

    def to_json(self) -> dict[str, Any]:
        """Return the row for machines."""
        met = None if self.goal is None or self.figure is None else self.goal.met(self.figure)
        return {**asdict(self), "met": met}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def render(rows: Sequence[Row]) -> str:
    """Return the table as text."""
    table = [list(HEADS), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        first, *rest = zip(cells, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Return the figures that are ratios within one run, by case."""
    return {row.case: row.figure for row in rows if row.unit == "x" and row.figure is not None}


def worse(rows: Sequence[Row], expected: dict[str, dict[str, float]]) -> list[str]:
    """Return in words which ratios are worse than they may be.

    Args:
        rows: What was measured.
        expected: By case, ``min`` or ``max`` of the ratio; cases that were not run do not count.
    """
    found = []
    for case, ratio in ratios(rows).items():
        limits = expected.get(case, {})
        if ratio < limits.get("min", float("-inf")) or ratio > limits.get("max", float("inf")):
            found.append(f"{case}: {_short(ratio)} x; expected {limits}")
    return found
