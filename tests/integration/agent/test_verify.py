"""`agent verify` compares the acknowledged lines with those that the service has now."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from tailspan.errors import CursorExpiredError, JobNotFoundError
from tailspan_agent.commands.reason import known_reason
from tailspan_agent.commands.verify import VerifyReport, verify
from tailspan_agent.errors import CheckpointError
from tests.fakes.agents import Bench, OddService
from tests.fakes.collector import Reply


def verdict(bench: Bench, job_id: str = "j1") -> VerifyReport:
    return asyncio.run(verify(bench.settings(), "fake", job_id, bench.open))


def ended(bench: Bench, *lines: str) -> None:
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *lines, timestamp_ms=1_700_000_000_000)
    bench.fake.set_state("j1", "SUCCEEDED")


def test_a_job_that_was_relayed_completely(bench: Bench) -> None:
    """Count and hash match the log; the service is closed afterwards."""
    ended(bench, "a", "b", "a")
    bench.once()
    report = verdict(bench)
    assert (report.verdict, report.lines_relayed, report.lines_now) == ("verified", 3, 3)
    assert bench.fake.calls[-1] == ("aclose", "")


def test_a_job_relayed_by_several_passes(bench: Bench) -> None:
    """Restarts between passes make no difference, and lines dropped by severity count as read."""
    bench.fake.add_job("j1")
    for number in range(3):
        bench.fake.add_lines("j1", f"[INFO] {number}", f"[ERROR] {number}", timestamp_ms=1_700_000_000_000 + number)
        bench.once({"discover": True, "min_severity": "ERROR"})
    bench.fake.set_state("j1", "SUCCEEDED")
    bench.once({"discover": True, "min_severity": "ERROR"})
    assert verdict(bench).verdict == "verified"


@pytest.mark.parametrize("late", [1, 2, 4])
def test_late_lines_count_once(bench: Bench, late: int) -> None:
    """Even if a whole second is sent again because its sums do not identify the missing lines."""
    bench.services["fake"] = service = OddService("fake")
    service.final_read = True
    service.add_job("j1")
    service.add_lines("j1", "a", "b", timestamp_ms=1_700_000_000_000, step_ms=100)
    bench.once()
    for number in range(late):
        service.add_late("j1", f"late {number}", timestamp_ms=1_700_000_000_050 + number)
    service.set_state("j1", "SUCCEEDED")
    bench.once()
    report = verdict(bench)
    assert (report.verdict, report.lines_now) == ("verified", 2 + late)


def test_a_job_that_is_not_complete_yet(bench: Bench) -> None:
    """Still running, or with lines that the endpoint has not acknowledged."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.once()
    assert verdict(bench).verdict == "incomplete"
    bench.fake.add_lines("j1", "b")
    bench.fake.set_state("j1", "SUCCEEDED")
    bench.collector.always("logs", Reply(503))
    bench.once(timeout_s=0.3)
    report = verdict(bench)
    assert (report.verdict, report.lines_relayed, report.lines_now) == ("incomplete", 1, 2)


def test_a_source_that_changed(bench: Bench) -> None:
    """More lines or other lines are `different`; lines that the service did not keep are `source_gone`."""
    ended(bench, "a", "b")
    bench.once()
    bench.fake.add_lines("j1", "c")
    assert verdict(bench).verdict == "different"
    bench.services["fake"] = type(bench.fake)("fake")
    ended(bench, "a", "B")
    assert verdict(bench).verdict == "different"
    bench.fake.expire("j1", 1)
    assert verdict(bench).verdict == "source_gone"
    bench.fake.fail_next("read_logs", CursorExpiredError("nothing is left"))
    assert verdict(bench).verdict == "source_gone"


def test_a_job_that_the_agent_does_not_know(bench: Bench) -> None:
    """Also without a store; a job that the service does not know is an error."""
    ended(bench, "a")
    assert verdict(bench).verdict == "not_relayed"
    with pytest.raises(JobNotFoundError):
        verdict(bench, "typo")


def test_a_damaged_store_is_an_error(bench: Bench) -> None:
    """A ledger that cannot be read gives no verdict."""
    ended(bench, "a")
    bench.once()
    with closing(sqlite3.connect(bench.state_dir / "checkpoints.db")) as db, db:
        db.execute("UPDATE jobs SET facts = '{'")
    with pytest.raises(CheckpointError, match="damaged"):
        verdict(bench)


def test_it_reads_beside_a_running_agent(bench: Bench) -> None:
    """The lock belongs to the agent; reading needs none."""
    ended(bench, "a")
    bench.once()
    agent: Any = bench.agent()
    assert verdict(bench).verdict == "verified"
    agent.store.close()


def test_the_reason_of_a_failure_is_known_on_this_machine(bench: Bench) -> None:
    """It is what the log says; nothing of a job that was not relayed, or whose log says no more than its status."""
    bench.fake.add_job("j1")
    lines = ("Traceback (most recent call last):", '  File "etl.py", line 7, in load', "ValueError: bad row 7")
    bench.fake.add_lines("j1", *lines, timestamp_ms=1_700_000_000_000)
    job = bench.fake.set_state("j1", "FAILED", exit_code=1)
    assert known_reason(bench.state_dir, job) is None
    bench.once()
    assert known_reason(bench.state_dir, job) == "ValueError: bad row 7"
    assert known_reason(bench.state_dir, replace(job, error="ValueError: bad row 7")) is None
