"""Real local jobs whose log a background process keeps open: over for the agent at once, and their late lines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailspan import AsyncJobClient
from tests.fakes.agents import Bench, looped
from tests.fakes.local_jobs import LocalJobs

WATCH = {"service": "local", "discover": True}
LATE = "(until [ -e go ]; do sleep 0.05; done; echo late) &"


@pytest.fixture
def local(tmp_path: Path, bench: Bench) -> Iterator[LocalJobs]:
    """Return local jobs that the bench's agents follow."""
    with LocalJobs(tmp_path / "jobs") as jobs:
        bench.services["local"] = jobs.service
        yield jobs


def events(bench: Bench) -> list[str]:
    """Return all records in order: the event's name, or the line."""
    return [row.event_name or row.body for row in bench.collector.log_records()]


@pytest.mark.parametrize("once", [False, True], ids=["running", "once"])
def test_a_job_is_over_when_its_main_process_is(tmp_path: Path, bench: Bench, local: LocalJobs, once: bool) -> None:
    """Span, failure, count and receipt do not wait for a background process; a running agent and `--once` agree."""
    job_id = local.start("sh", "-c", f"echo early; {LATE} exit 3", cwd=str(tmp_path))
    local.ended(job_id)
    if once:
        bench.once(WATCH)
        assert not local.service.status(job_id).logs_complete
        check_end(bench)
        (tmp_path / "go").touch()
        local.complete(job_id)
        bench.once(WATCH)
    else:
        follow(tmp_path, bench, job_id)
    assert bench.bodies() == ["early", "late"]
    receipt = bench.receipts()[job_id]
    assert receipt.attributes["tailspan.receipt.amends"] >= 1
    assert (receipt.attributes["tailspan.lines.read"], receipt.attributes["tailspan.logs.complete"]) == (2, True)
    assert len(bench.collector.spans()) == 4
    assert bench.metric("cicd.pipeline.run.duration").count == 1


@looped
async def follow(tmp_path: Path, bench: Bench, job_id: str) -> None:
    """Follow the job with a running agent; let it print its last line once it is over."""
    async with bench.running(WATCH) as agent:
        await bench.received(lambda: job_id in bench.receipts())
        check_end(bench)
        # What `wait --delivered` asks for.
        while not (await agent.delivery(bench.services["local"].identity, job_id))["logs_complete"]:
            await asyncio.sleep(0.005)
        (tmp_path / "go").touch()
        await bench.received(lambda: bench.receipts()[job_id].attributes["tailspan.logs.complete"])


def check_end(bench: Bench) -> None:
    """Check what a job has at its end, while its log is open."""
    assert events(bench) == ["early", "exception", "tailspan.receipt"]
    run = bench.spans()["run"]
    assert (run.attributes["cicd.pipeline.result"], run.attributes["tailspan.logs.complete"]) == ("failure", False)
    (receipt,) = bench.receipts().values()
    assert receipt.severity_text == "INFO"
    assert (receipt.attributes["tailspan.lines.read"], receipt.attributes["tailspan.logs.complete"]) == (1, False)


@looped
async def test_wait_and_tail_end_with_the_main_process(tmp_path: Path, local: LocalJobs) -> None:
    """Also while a background process prints without end."""
    job_id = local.start("sh", "-c", "echo early; (while [ ! -e go ]; do echo on; sleep 0.1; done) & exit 3")
    async with AsyncJobClient(service=local.service) as client:
        assert (await client.job_wait_for_job(job_id, 0.01)).state == "FAILED"
        updates = [update async for update in client.follow_logs(job_id, 0.05)]
    assert updates[-1].complete
    assert not updates[-1].status.logs_complete
    assert next(message["message"] for update in updates for message in update.messages) == "early"
    local.kill(local.state(job_id))


def test_a_filter_of_the_output_belongs_to_its_job(tmp_path: Path, bench: Bench, local: LocalJobs) -> None:
    """What prints the last lines a moment after the main process is in the first receipt."""
    job_id = local.start("bash", "-c", "exec > >(sleep 0.3; cat); echo early; echo last", cwd=str(tmp_path))
    local.ended(job_id)
    bench.once({**WATCH, "settle": 10})
    assert events(bench) == ["early", "last", "tailspan.receipt"]
    assert bench.receipts()[job_id].attributes["tailspan.logs.complete"] is True
