"""docs/proof.md cannot go stale: it has the rows that the proof has, and none of them failed."""

from __future__ import annotations

import re

import pytest

from tests.docs_tables import PROOF, README
from tests.prove.docs_table import BEGIN, COLUMNS, END, rows_of, with_rows, with_sum
from tests.prove.rows import groups, scenarios

ROOT = README.parent
TEXT = PROOF.read_text(encoding="utf-8")
ROW = {**dict.fromkeys(COLUMNS, "0"), "verdict": "ok", "date": "2026-01-02 03:04 UTC", "seed": "7", "commit": "0123abc"}


def test_the_page_has_each_row_of_the_proof_and_no_other() -> None:
    """A fault that is added to the proof, or renamed, must be run and recorded."""
    assert list(rows_of(TEXT)) == [scenario.name for scenario in scenarios(200)]


def test_the_page_claims_what_its_rows_show() -> None:
    """In every row, no line is missing, out of order or with another time, and the verdict is `ok`."""
    for row in rows_of(TEXT).values():
        assert (row["fault"], row["verdict"]) == (row["fault"], "ok")
        assert {row[name] for name in ("missing", "needless", "order", "time", "uid", "foreign", "spans")} == {"0"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", row["date"])
        assert row["seed"].isdigit()
        assert re.fullmatch(r"[0-9a-f]{7}\+?", row["commit"])


def test_readme_has_the_sum_of_all_rows() -> None:
    """The one row of figures in README agrees with docs/proof.md."""
    readme = README.read_text(encoding="utf-8")
    assert with_sum(readme, [*rows_of(TEXT).values()]) == readme


def test_each_fault_of_a_store_has_a_row_or_a_test() -> None:
    """What the table of faults names is there."""
    faults = [line for line in TEXT.partition("## Faults of real stores")[2].splitlines() if line.startswith("| ")][1:]
    assert len(faults) >= 17
    names = [scenario.name for scenario in scenarios(200)]
    for line in faults:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", line)
        rows = re.findall(r'"([^"]+)"', line)
        assert tests or rows, line
        assert set(rows) <= set(names)
        for file, test in tests:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_rows_that_ran_replace_the_old_ones() -> None:
    """A run of some rows keeps the other rows and all other text, and drops rows of removed faults."""
    (first, second), *_ = (names for names in groups().values() if len(names) == 2)
    text = f"# Head\n{BEGIN}\n{END}\ntail | x\n"
    once = with_rows(text, [{**ROW, "fault": first}, {**ROW, "fault": second, "lines": "1500"}])
    gone = once.replace(f"| {first} |", "| no longer there |", 1)
    twice = with_rows(gone, [{**ROW, "fault": second, "lines": "2500", "verdict": "FAILED"}])
    assert {name: row["lines"] for name, row in rows_of(once).items()} == {first: "0", second: "1500"}
    assert list(rows_of(twice)) == [second]
    assert "| SIGKILL | 1 | 2,500 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 |" in twice
    assert twice.startswith("# Head\n")
    assert twice.endswith(f"{END}\ntail | x\n")


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    """The writer refuses a page without its markers."""
    with pytest.raises(LookupError, match="the page has no part between"):
        with_rows("# Head\n", [{**ROW, "fault": "x"}])
