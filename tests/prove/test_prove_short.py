"""The short form of ``make prove``: fewer kills, fewer faults, the same oracle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.prove.evidence import STEPS, Step
from tests.prove.found import Found
from tests.prove.kills import sweep_world
from tests.prove.load import Load
from tests.prove.mutant import CHECKPOINT_BEFORE_ACK
from tests.prove.rows import run, scenarios
from tests.prove.scenarios import select
from tests.prove.table import Row, render

pytestmark = pytest.mark.timeout(600)  # a proof takes minutes on a loaded machine


def test_killed_at_each_step_the_agent_loses_nothing() -> None:
    """Killed seven times and started again: no line missing, none repeated that was acked, each span once as it was."""
    hits = Counter[Step]()
    found = sweep_world("short", len(STEPS) + 1, hits)
    assert hits.total() == len(STEPS) + 1
    assert found.complaints() == []
    assert found.lines.records >= found.lines.expected > 0


def test_the_sweep_finds_a_build_that_checkpoints_before_the_ack(tmp_path: Path) -> None:
    """Killed while it sends, such a build has lost lines: the proof would notice."""
    build = CHECKPOINT_BEFORE_ACK.build(tmp_path / "agent")
    # A kill may come too late, between two requests: on a loaded machine more often than not.
    sweeps = (sweep_world(f"short {turn}", 5, Counter(), path=build, aims=[Step.SENDING]) for turn in range(5))
    found = next((found for found in sweeps if found.lines.missing), None)
    assert found is not None
    assert any("missing" in complaint for complaint in found.complaints())


SHORT_ROWS = (
    "partial_success, 7 rejected",
    "gRPC: RESOURCE_EXHAUSTED without RetryInfo",
    "job service: equal lines that are two",
    "configuration: forty SIGHUPs",
)


@pytest.mark.parametrize("name", SHORT_ROWS)
def test_a_fault_loses_nothing(name: str) -> None:
    """One row of the long table from each group: all that was sent arrives or is in the dead letter."""
    assert run(name, kills=0, seed=1).verdict == "ok"


def test_a_hundred_jobs_at_once_lose_nothing() -> None:
    """The scaled form of the load rows: every job's lines, spans and run."""
    row = Load("load", fused_jobs=100).scenario().row(seed=1)
    assert row.verdict == "ok"
    assert Found.total(row.found).jobs == 100


def test_rows_are_found_by_the_command_that_is_shown_for_them() -> None:
    """The glob in ``again: make prove PROVE_ONLY=...`` selects that row and no other; names are unique."""
    rows = scenarios(1)
    assert [[row.name for row in select(rows, row.name)] for row in rows] == [[row.name] for row in rows]
    assert len({row.name for row in rows}) == len(rows)


def test_the_table_says_what_failed_and_how_to_see_it_again() -> None:
    """A row that failed has the reason and the command with its seed below the table."""
    bad = Found(1, exit_code=0)
    bad.lines.missing = 3
    row = Row("endpoint hangs", [bad], reproduce="make prove PROVE_SEED=7")
    text = render([Row("fine", [Found(2, exit_code=0)]), row])
    assert "FAILED: 3 missing" in text
    assert "again: make prove PROVE_SEED=7" in text
    assert [row.ok, row.to_json()["missing"], row.to_json()["verdict"]] == [False, "3", "3 missing"]
