"""The table of docs/benchmarks.md: a run replaces its own rows and keeps the others."""

from __future__ import annotations

import pytest

from tests.bench.docs_table import BEGIN, END, with_rows
from tests.bench.table import Goal, Row
from tests.docs_tables import BENCHMARKS


def test_only_the_workloads_that_ran_are_replaced() -> None:
    """A partial run keeps the other rows, and a removed row goes with its workload."""
    text = BENCHMARKS.read_text(encoding="utf-8")
    start = f"{text[: text.index(BEGIN)]}{BEGIN}\n{text[text.index(END) :]}"
    fast = Row(case="W1 none | gzip, slope", figure=1.04, unit="us", goal=Goal(1.1))
    gone = Row(case="W1 gone", figure=7.0, unit="x")
    slow = Row(case="W7 slopes, largest to smallest", figure=1.5, unit="x", goal=Goal(1.2))
    both = with_rows(start, [fast, gone, slow], when="2026-01-01 00:00 UTC", where="a machine", scale=1)
    assert "| W1 none \\| gzip, slope | 1.04 us | <= 1.1 | yes |\n" in both
    assert "All 3 rows" in both
    later = with_rows(both, [fast], when="2026-02-02 00:00 UTC", where="a machine", scale=0.5)
    table = later[later.index(BEGIN) : later.index(END)]
    assert [line.split(" | ")[-2:] for line in table.splitlines() if line.startswith("| W") and "UTC" in line] == [
        ["0.5", "2026-02-02 00:00 UTC |"],
        ["1", "2026-01-01 00:00 UTC |"],
    ]
    assert "| W7 slopes, largest to smallest | 1.5 x | <= 1.2 | NO |\n" in table
    assert "gone" not in table
    assert later.replace(table, "") == start.replace(start[start.index(BEGIN) : start.index(END)], "")


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    """The writer refuses a page without its markers."""
    with pytest.raises(LookupError, match="no part between"):
        with_rows("# Tailspan\n", [], when="", where="", scale=1)
