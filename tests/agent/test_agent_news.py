"""`agent run` with services that tell of news: heard at once, never relied on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from tailspan.errors import ServiceError, ServiceUnavailableError
from tailspan.services import News
from tailspan.testing import FakeService
from tests.fakes.agents import Bench, looped, until


class TellingService(FakeService):
    """A fake service with news: it tells what the test lets it tell."""

    def __init__(self) -> None:
        # What is not told is found late: a test that passes has heard it.
        super().__init__("fake", poll_min_s=0.01, poll_max_s=2.0)
        self.followed: set[str] = set()
        self.told: asyncio.Queue[Collection[str] | ServiceError | None] = asyncio.Queue()
        self.opened = 0

    def open_news(self) -> News:
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
