"""The short form of the faults of local jobs: all of them at once."""

from __future__ import annotations

import time

import pytest

from tests.prove.faults_local import FAULTS, run_together
from tests.prove.steered_jobs import steered_job
from tests.prove.table import Row
from tests.prove.world import Found, World

pytestmark = pytest.mark.timeout(600)  # a proof takes minutes on a loaded machine


@pytest.mark.parametrize("served", [False, True], ids=["beside them", "by the job API"])
def test_no_captured_line_is_lost_whatever_happens_to_local_jobs(served: bool) -> None:
    """Supervisors die, files are damaged, jobs and the agent are killed: what was captured arrives, nothing twice."""
    row = run_together("short", served=served)
    assert row.verdict == "ok"
    found = Found.total(row.found)
    assert found.jobs > len(FAULTS)
    assert found.lines.expected > 10_000


@pytest.mark.parametrize("cut", ["j #00", "j #0000003 17", "j"])
def test_what_a_killed_supervisor_wrote_of_a_line_is_that_line(cut: str) -> None:
    """Wherever it was cut; no other text is."""
    with World("short") as world:
        job = steered_job(world, "j")
        job.put(3)
        with (job.directory / "log").open("a") as log:
            log.write(cut)
        job.kill(command_too=True)
        for number, text in enumerate(job.captured):
            job.tally.take(text, int(time.time() * 1e9) if text == cut else int(text.rpartition(" ")[2]), f"{number}")
        assert job.tally.count(job.written).faults == 0
        job.tally.take("j #0", 1, "another")
        assert job.tally.count(job.written).foreign == 1


def test_a_line_that_was_not_relayed_is_seen() -> None:
    """The proof of the proof: a line that was captured and did not come is missing, one that was destroyed is not."""
    with World("short") as world:
        job = steered_job(world, "j")
        job.put(3)
        for text in job.captured[:2]:
            job.tally.take(text, int(text.rpartition(" ")[2]), text)
        job.end()
        assert Row("", [world.count(0)]).verdict.startswith("1 missing")
        job.destroyed(2, 3)
        assert job.tally.count(job.written).missing == 0
