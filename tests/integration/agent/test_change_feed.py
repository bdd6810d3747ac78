"""`agent run` with services that tell of news: heard at once, never relied on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import pytest

from tailspan.errors import ServiceError, ServiceUnavailableError
from tailspan.services import ChangeFeed, ChangeFeedService
from tailspan.testing import FakeService
from tailspan_agent.receiver import tailer
from tests.fakes.agents import Bench, looped, until
from tests.fakes.collector import Reply


class TellingService(FakeService, ChangeFeedService):
    """A fake service with news: it tells what the test lets it tell."""

    def __init__(self) -> None:
        # What is not told is found late: a test that passes has heard it.
        super().__init__("fake", poll_min_s=0.01, poll_max_s=2.0)
        self.followed: set[str] = set()
        self.told: asyncio.Queue[Collection[str] | ServiceError | None] = asyncio.Queue()
        self.opened = 0

    def open_changes(self) -> ChangeFeed:
        """Begin to tell."""
        self.opened += 1
        return self

    def follow(self, job_id: str) -> bool:
        """Tell of all but the job that is named so."""
        if job_id != "untold":
            self.followed.add(job_id)
        return job_id in self.followed

    def leave(self, job_id: str) -> None:
        """Tell no more."""
        self.followed.discard(job_id)

    async def wait(self) -> Collection[str] | None:
        """Wait for the test to tell something."""
        told = await self.told.get()
        if isinstance(told, ServiceError):
            raise told
        return told

    def close(self) -> None:
        """Forget all."""
        self.followed.clear()


@looped
async def test_news_are_heard_and_silence_costs_nothing(bench: Bench) -> None:
    """New jobs, lines and ends come with the news; between them nobody lists, asks or reads."""
    fake = bench.services["fake"] = TellingService()
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.followed == {"j1"} and fake.calls.count(("read_logs", "j1")) == 1)
        calls = len(fake.calls)
        fake.add_lines("j1", "a")
        fake.told.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a"])
        fake.add_job("j2")
        fake.told.put_nowait({"j2"})
        await until(lambda: fake.followed == {"j1", "j2"})
        assert fake.calls[calls:].count(("list_jobs", "")) == 1
        fake.set_state("j1", "SUCCEEDED")
        fake.told.put_nowait({"j1"})
        await bench.received(lambda: "run" in bench.spans("j1"))
        await until(lambda: fake.followed == {"j2"})
    assert fake.followed == set()


@pytest.mark.parametrize("told", [None, ServiceUnavailableError("no more")])
@looped
async def test_lost_news_are_looked_for(bench: Bench, told: ServiceError | None) -> None:
    """An overflow, or news that end: the next look at the list finds what was not told, and news go on."""
    fake = bench.services["fake"] = TellingService()
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.calls.count(("read_logs", "j1")) == 1)
        fake.add_lines("j1", "a")
        fake.told.put_nowait(told)
        await bench.received(lambda: bench.bodies() == ["a"])
        await until(lambda: fake.followed == {"j1"} and fake.opened == (1 if told is None else 2))
        fake.add_lines("j1", "b")
        fake.told.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a", "b"])


@looped
async def test_a_job_that_news_cannot_tell_of_is_polled(bench: Bench) -> None:
    """The kernel's limit is reached: the lines of that job come all the same, by itself without its list."""
    fake = bench.services["fake"] = TellingService()
    fake.add_job("untold")
    async with bench.running({"jobs": ["untold"]}):
        await until(lambda: fake.calls.count(("read_logs", "untold")) > 0)
        fake.add_lines("untold", "a")
        await bench.received(lambda: bench.bodies() == ["a"])


@looped
async def test_a_job_with_lines_in_flight_does_not_hold_up_its_stream(bench: Bench) -> None:
    """It falls silent while the endpoint is away: a younger job of its pipeline is relayed once they are acked."""
    fake = bench.services["fake"] = TellingService()
    fake.add_job("j1", job_name="etl")
    fake.add_lines("j1", "old", timestamp_ms=int(time.time() * 1000) - 3_600_000)
    bench.collector.always("logs", Reply(503))
    async with bench.running():
        # The reads that find nothing, all before the ack.
        await until(lambda: fake.calls.count(("read_logs", "j1")) >= 2)
        bench.collector.always("logs", Reply())
        await bench.received(lambda: bench.bodies() == ["old"])
        fake.add_job("j2", job_name="etl")
        fake.add_lines("j2", "new")
        fake.told.put_nowait({"j2"})
        await bench.received(lambda: bench.bodies() == ["old", "new"])


@looped
async def test_faulty_news_do_not_end_the_looking(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A service whose news cannot be opened is looked at like one that has none."""

    class Faulty(TellingService):
        def open_changes(self) -> ChangeFeed:
            raise RuntimeError("a fault")

    fake = bench.services["fake"] = Faulty()
    async with bench.running():
        await until(lambda: fake.calls.count(("list_jobs", "")) >= 1)
        fake.add_job("j1")
        fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
    assert "falling back to polling" in caplog.text


@looped
async def test_a_changed_watch_is_looked_at_at_once(bench: Bench) -> None:
    """Silence of the news, which may last a minute, does not delay what a reload asks for."""
    fake = bench.services["fake"] = TellingService()
    for job_id in ("etl", "web"):
        fake.add_job(job_id)
        fake.add_lines(job_id, job_id)
    async with bench.running({"discover": True, "name": "etl"}) as agent:
        await bench.received(lambda: bench.bodies() == ["etl"])
        await agent.reload(bench.settings({"discover": True}))
        await bench.received(lambda: bench.bodies() == ["etl", "web"])


@looped
async def test_lines_between_the_last_read_and_a_late_end_are_relayed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that was given up as open may end right behind a read, with a line that this read did not see."""
    monkeypatch.setattr(tailer, "_FOLLOW_TO_END_S", 0.2)
    fake = bench.services["fake"] = TellingService()
    fake.add_job("j1")
    fake.add_lines("j1", "a")

    def end() -> None:
        fake.add_lines("j1", "last")
        fake.set_state("j1", "SUCCEEDED")

    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["a"])
        fake.set_state("j1", "SUCCEEDED", logs_complete=False)
        fake.told.put_nowait({"j1"})
        await bench.received(lambda: "run" in bench.spans())
        # Of each turn the second status: the one after the read.
        fake.before_next("read_logs", lambda: fake.before_next("get_job", end))
        fake.told.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a", "last"])
