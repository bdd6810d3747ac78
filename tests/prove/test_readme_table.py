"""README's table of the proof cannot go stale: it has the rows that the proof has, and all of them held."""

from __future__ import annotations

import re

import pytest

from tests.prove.readme import BEGIN, COLUMNS, END, README, rows_of, with_rows
from tests.prove.rows import groups, scenarios

TEXT = README.read_text(encoding="utf-8")
ROW = {**dict.fromkeys(COLUMNS, "0"), "verdict": "ok", "date": "2026-01-02 03:04 UTC", "seed": "7"}


def test_readme_has_each_row_of_the_proof_and_no_other() -> None:
    """Who adds a fault to the proof, or renames one, runs it and writes it down."""
    assert list(rows_of(TEXT)) == [scenario.name for scenario in scenarios(200)]


def test_readme_claims_what_its_rows_show() -> None:
    """No line is missing in any row, none came out of order or with another time, and none of the rows failed."""
    for row in rows_of(TEXT).values():
        assert (row["fault"], row["verdict"]) == (row["fault"], "ok")
        assert {row[name] for name in ("missing", "needless", "order", "time", "uid", "foreign", "spans")} == {"0"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", row["date"])
        assert row["seed"].isdigit()


def test_rows_that_ran_replace_those_that_were_there() -> None:
    """A run of some rows leaves the others; a row that the proof has no more goes; all else of README stays."""
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


def test_a_readme_without_a_place_for_it_is_said() -> None:
    """Markers that somebody deleted are an error, not a table that is not written."""
    with pytest.raises(LookupError, match=r"README\.md has no part between"):
        with_rows("# Head\n", [{**ROW, "fault": "x"}])
