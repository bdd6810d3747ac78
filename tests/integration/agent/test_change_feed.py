"""`agent run` with change notifications: applied at once, never relied on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence

import pytest

from tailspan.errors import ServiceError, ServiceUnavailableError
from tailspan.models import ListedJob
from tailspan.services import ChangeFeed, ChangeFeedService
from tailspan.testing import FakeService
from tailspan_agent.receiver import discovery
from tests.fakes.agents import Bench, looped, until
from tests.fakes.collector import Reply


class NotifyingService(FakeService, ChangeFeedService):
    """A fake service whose change notifications come from the test."""

    def __init__(self) -> None:
        # Without a notification a change is found late: a test that passes has received it.
        super().__init__("fake", poll_min_s=0.01, poll_max_s=2.0)
        self.followed: set[str] = set()
        self.notified: asyncio.Queue[Collection[str] | ServiceError | None] = asyncio.Queue()
        self.opened = 0

    def open_changes(self) -> ChangeFeed:
        """Return the feed."""
        self.opened += 1
        return self

    def follow(self, job_id: str) -> bool:
        """Accept all jobs but one."""
        if job_id != "unwatchable":
            self.followed.add(job_id)
        return job_id in self.followed

    def leave(self, job_id: str) -> None:
        """Remove the job."""
        self.followed.discard(job_id)

    async def wait(self) -> Collection[str] | None:
        """Wait for a notification of the test."""
        change = await self.notified.get()
        if isinstance(change, ServiceError):
            raise change
        return change

    def close(self) -> None:
        """Remove all jobs."""
        self.followed.clear()


@looped
async def test_notified_jobs_cost_no_polls(bench: Bench) -> None:
    """New jobs, lines and ends are notified; between notifications there is no request."""
    fake = bench.services["fake"] = NotifyingService()
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.followed == {"j1"} and fake.calls.count(("read_logs", "j1")) == 1)
        calls = len(fake.calls)
        fake.add_lines("j1", "a")
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a"])
        fake.add_job("j2")
        fake.notified.put_nowait({"j2"})
        await until(lambda: fake.followed == {"j1", "j2"})
        assert fake.calls[calls:].count(("list_jobs", "")) == 1
        fake.set_state("j1", "SUCCEEDED")
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: "run" in bench.spans("j1"))
        await until(lambda: fake.followed == {"j2"})
    assert fake.followed == set()


class NamingService(NotifyingService):
    """One that has the rows of single jobs; the first request for them fails."""

    asked = 0

    async def rows(self, job_ids: Collection[str]) -> Sequence[ListedJob]:
        """Return the rows of jobs."""
        self.asked += 1
        if self.asked == 1:
            raise ServiceUnavailableError("down")
        return [row async for rows in super().list_jobs() for row in rows if row.job_id in job_ids]

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield all jobs, but those that a notification has reported."""
        async for rows in super().list_jobs():
            yield [row for row in rows if row.job_id == "j1"]


@looped
async def test_a_new_job_is_found_without_a_list_of_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may have a million jobs. A failed request is made again; a name that is no job does no harm."""
    monkeypatch.setattr(discovery, "_DISCOVER_S", 0.01)
    fake = bench.services["fake"] = NamingService()
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.followed == {"j1"})
        for job_id in ("j2", "j3"):
            fake.add_job(job_id)
            fake.add_lines(job_id, job_id)
        fake.notified.put_nowait({"j2", "not a job", "j3"})
        await until(lambda: fake.followed == {"j1", "j2", "j3"})
        await bench.received(lambda: sorted(bench.bodies()) == ["j2", "j3"])
    assert fake.asked == 2


@pytest.mark.parametrize("change", [None, ServiceUnavailableError("no more")])
@looped
async def test_lost_notifications_are_made_up_for(bench: Bench, change: ServiceError | None) -> None:
    """After an overflow or the end of a feed, the next scan finds what was missed, and notifications continue."""
    fake = bench.services["fake"] = NotifyingService()
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.calls.count(("read_logs", "j1")) == 1)
        fake.add_lines("j1", "a")
        fake.notified.put_nowait(change)
        await bench.received(lambda: bench.bodies() == ["a"])
        await until(lambda: fake.followed == {"j1"} and fake.opened == (1 if change is None else 2))
        fake.add_lines("j1", "b")
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a", "b"])


@looped
async def test_a_feed_that_never_works_is_not_opened_all_the_time(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is opened again at once, then only at full scans; one warning says so, and jobs are polled."""
    fake = bench.services["fake"] = NotifyingService()
    for _ in range(5):
        fake.notified.put_nowait(ServiceUnavailableError("no WebSocket here"))
    fake.add_job("j1")
    async with bench.running():
        await until(lambda: fake.opened == 2 and fake.notified.qsize() == 3)
        lists = fake.calls.count(("list_jobs", ""))
        await until(lambda: fake.calls.count(("list_jobs", "")) > lists)
        fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
        assert fake.opened == 2
    assert caplog.text.count("falling back to polling") == 1


@looped
async def test_a_job_without_notifications_is_polled(bench: Bench) -> None:
    """At the kernel's limit, the job is polled, also without a list."""
    fake = bench.services["fake"] = NotifyingService()
    fake.add_job("unwatchable")
    async with bench.running({"jobs": ["unwatchable"]}):
        await until(lambda: fake.calls.count(("read_logs", "unwatchable")) > 0)
        fake.add_lines("unwatchable", "a")
        await bench.received(lambda: bench.bodies() == ["a"])


@looped
async def test_a_job_with_lines_in_flight_does_not_hold_up_its_stream(bench: Bench) -> None:
    """It falls silent while the endpoint is down: a younger job of its pipeline is relayed after the ack."""
    fake = bench.services["fake"] = NotifyingService()
    fake.add_job("j1", job_name="etl")
    fake.add_lines("j1", "old", timestamp_ms=int(time.time() * 1000) - 3_600_000)
    bench.collector.always("logs", Reply(503))
    async with bench.running():
        # Reads without new lines, all before the ack.
        await until(lambda: fake.calls.count(("read_logs", "j1")) >= 2)
        bench.collector.always("logs", Reply())
        await bench.received(lambda: bench.bodies() == ["old"])
        fake.add_job("j2", job_name="etl")
        fake.add_lines("j2", "new")
        fake.notified.put_nowait({"j2"})
        await bench.received(lambda: bench.bodies() == ["old", "new"])


@looped
async def test_a_faulty_feed_falls_back_to_polling(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A service whose feed cannot be opened is polled."""

    class Faulty(NotifyingService):
        def open_changes(self) -> ChangeFeed:
            raise RuntimeError("a bug")

    fake = bench.services["fake"] = Faulty()
    async with bench.running():
        await until(lambda: fake.calls.count(("list_jobs", "")) >= 1)
        fake.add_job("j1")
        fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
    assert "falling back to polling" in caplog.text


@looped
async def test_a_changed_watch_is_applied_at_once(bench: Bench) -> None:
    """A reload applies at once, although no notification may come for a minute."""
    fake = bench.services["fake"] = NotifyingService()
    for job_id in ("etl", "web"):
        fake.add_job(job_id)
        fake.add_lines(job_id, job_id)
    async with bench.running({"discover": True, "name": "etl"}) as agent:
        await bench.received(lambda: bench.bodies() == ["etl"])
        await agent.reload(bench.settings({"discover": True}))
        await bench.received(lambda: bench.bodies() == ["etl", "web"])


@looped
async def test_lines_between_the_last_read_and_a_late_end_are_relayed(bench: Bench) -> None:
    """An open log may get its end mark right after a read, with a line that this read did not see."""
    fake = bench.services["fake"] = NotifyingService()
    fake.add_job("j1")
    fake.add_lines("j1", "a")

    def end() -> None:
        fake.add_lines("j1", "last")
        fake.set_state("j1", "SUCCEEDED")

    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["a"])
        fake.set_state("j1", "SUCCEEDED", logs_complete=False)
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: "run" in bench.spans())
        # The first status after the read.
        fake.before_next("read_logs", lambda: fake.before_next("get_job", end))
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: bench.bodies() == ["a", "last"])


@looped
async def test_silent_jobs_have_no_task(bench: Bench) -> None:
    """A hundred jobs that wait for a change cost no more tasks and timers than two; each is still followed."""
    fake = bench.services["fake"] = NotifyingService()
    jobs = [f"j{number}" for number in range(100)]
    for job_id in jobs[:2]:
        fake.add_job(job_id)
    async with bench.running() as agent:
        await until(lambda: all(tailer.schedule.is_resting for tailer in agent.tailers) and len(agent.tailers) == 2)
        tasks = len(asyncio.all_tasks())
        for job_id in jobs[2:]:
            fake.add_job(job_id)
        fake.notified.put_nowait(set(jobs[2:]))
        await until(lambda: len(agent.tailers) == 100 and all(tailer.schedule.is_resting for tailer in agent.tailers))
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        fake.add_lines("j7", "still followed")
        fake.notified.put_nowait({"j7"})
        await bench.received(lambda: bench.bodies() == ["still followed"])
        fake.set_state("j8", "SUCCEEDED")
        fake.notified.put_nowait({"j8"})
        await bench.received(lambda: "run" in bench.spans("j8"))


class CountingEvent(asyncio.Event):
    """An event that counts how often it is set."""

    times = 0

    def set(self) -> None:
        """Count, and set the event."""
        self.times += 1
        super().set()


@looped
async def test_a_silent_run_begins_once(bench: Bench) -> None:
    """Its row and its first poll are one beginning: ten thousand first polls export no metrics each few seconds."""
    fake = bench.services["fake"] = NotifyingService()
    jobs = {"j1", "j2", "j3"}
    async with bench.running() as agent:
        changes = agent.metrics.run_changes = CountingEvent()
        for job_id in jobs:
            fake.add_job(job_id)
        fake.notified.put_nowait(jobs)
        await until(lambda: len(agent.tailers) == 3 and all(tailer.schedule.is_resting for tailer in agent.tailers))
        assert changes.times == 3
        fake.set_state("j1", "SUCCEEDED")
        fake.notified.put_nowait({"j1"})
        await bench.received(lambda: "run" in bench.spans("j1"))
        assert changes.times > 3
