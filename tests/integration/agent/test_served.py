"""An agent on another machine: it reads jobs from `tailspan serve`, as log pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tailspan.config import Settings
from tailspan.services import JobService
from tailspan.services.fused import FusedService
from tailspan.testing import FakeService
from tests.fakes.agents import Bench, looped
from tests.fakes.collector import Collector
from tests.fakes.scripted_service import RunningServer, serving

LINES = [f"line {number}" for number in range(200)]


class ServedBench(Bench):
    """A bench whose agents reach its fake service by a job API."""

    server: RunningServer

    def open(self, name: str, settings: Settings) -> JobService:
        """Return a new client of that API."""
        return FusedService(name, base_url=self.server.url, requests_per_second=1000)

    def log_requests(self) -> list[str]:
        """Return the log requests, without queries."""
        targets = [request.target.removeprefix("/server/v1").partition("?")[0] for request in self.server.requests]
        return [target for target in targets if "log" in target]


@pytest.fixture
def bench(collector: Collector, tmp_path: Path) -> Iterator[ServedBench]:
    """Jobs whose pages hold three lines."""
    made = ServedBench(tmp_path, collector)
    made.services["fake"] = FakeService("fake", page_lines=3)
    with serving(made.fake) as made.server:
        yield made


@looped
async def test_followed_job_that_ends_behind_a_burst_is_relayed_whole(bench: ServedBench) -> None:
    """Many pages between two polls, the last of them after the end: all lines come once, and none is read again."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "first")
    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["first"])
        bench.fake.add_lines("j1", *LINES)
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: bench.receipts())
    assert bench.bodies() == ["first", *LINES]
    own = [page async for page in bench.fake.read_logs("j1")]
    assert [row.attributes["log.record.uid"] for row in bench.lines()] == [uid for page in own for uid in page.uids()]
    assert bench.receipts()["j1"].attributes["tailspan.lines.read"] == 201
    assert "/logs/j1" not in bench.log_requests()


@looped
async def test_jobs_that_speak_share_their_requests(bench: ServedBench) -> None:
    """Ten followed jobs need hardly more requests than one."""
    jobs = [f"j{number}" for number in range(10)]
    for job_id in jobs:
        bench.fake.add_job(job_id)
        bench.fake.add_lines(job_id, "first")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 10)
        bench.server.requests.clear()
        for number in range(3):
            for job_id in jobs:
                bench.fake.add_lines(job_id, f"{job_id} {number}")
            wanted = 20 + 10 * number
            await bench.received(lambda wanted=wanted: len(bench.bodies()) == wanted)
    for job_id in jobs:
        assert bench.bodies(job_id) == ["first", *(f"{job_id} {number}" for number in range(3))]
    assert len(bench.log_requests()) < 20


@looped
async def test_lines_that_are_gone_at_the_server_are_a_gap(bench: ServedBench) -> None:
    """The agent continues after the gap, and reports that lines are lost."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *LINES[:4])
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 4)
        bench.fake.add_lines("j1", *LINES[4:20])
        bench.fake.expire("j1", 12)
        await bench.received(lambda: len(bench.bodies()) == 12)
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: bench.receipts())
    assert bench.bodies() == [*LINES[:4], *LINES[12:20]]
    assert bench.metric("tailspan.agent.gaps", service="fake") == 1
