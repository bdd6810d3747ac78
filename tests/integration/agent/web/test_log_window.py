"""The part of a log that the page shows: of slow services, long logs and ones that the agent is behind."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncGenerator

import pytest

from tailspan.errors import ServiceUnavailableError
from tailspan.logs.page import LogPage
from tailspan.testing import FakeService
from tailspan_agent.web import log_window, views
from tailspan_agent.web.log_window import LogWindowReader
from tests.fakes.agents import looped, until
from tests.fakes.collector import Reply
from tests.integration.agent.web.test_page import ended, job_page, looking, next_event, relayed


class SlowService(FakeService):
    """Each page takes its time, and the log of one job may never come.

    Attributes:
        page_s: How long a page takes, in seconds.
        hangs: The job whose log never comes.
        error: What every read of a log raises.
    """

    page_s = 0.0
    hangs = ""
    error: Exception | None = None

    async def read_logs(self, job_id: str, cursor: bytes | None = None, **keys) -> AsyncGenerator[LogPage, None]:
        """Yield the lines; see the class."""
        if self.error is not None:
            raise self.error
        if job_id == self.hangs:
            await asyncio.Event().wait()
        async for page in super().read_logs(job_id, cursor, **keys):
            yield page
            await asyncio.sleep(self.page_s)


def slow(lines: int, *, page_lines: int, page_s: float = 0.0) -> SlowService:
    """Make a service with one job ``a`` whose lines are numbers from 0."""
    service = SlowService(page_lines=page_lines)
    service.add_job("a")
    service.add_lines("a", *map(str, range(lines)), timestamp_ms=int(time.time() * 1000) - lines, step_ms=1)
    service.page_s = page_s
    return service


def numbers(text: str) -> list[int]:
    """Return the numbers of the lines that a page shows."""
    return [int(found) for found in re.findall(r'<tr id="L(\d+)"', text)]


def ways_on(text: str) -> list[str]:
    """Return what a page says before and behind its lines."""
    return [html.unescape(found) for found in re.findall(r'class="more">(.*?)</p>', text)]


@looped
async def test_lines_that_came_in_time_are_not_called_missing(bench, monkeypatch):
    """A slow log is shown as far as it was read, and goes on behind that rather than with the same lines."""
    bench.services["fake"] = service = slow(30, page_lines=1)
    async with looking(bench) as (_, client):
        await bench.received(lambda: len(bench.bodies("a")) == 30)
        monkeypatch.setattr(log_window, "_SCAN_S", 0.05)
        service.page_s = 0.02
        whole = await job_page(client, "a")
        part = (await job_page(client, "a", **{"from": 1})).text
        far = (await job_page(client, "a", **{"from": 30})).text
    assert whole.status_code == 200
    shown = numbers(part)
    assert shown == list(range(1, len(shown) + 1)) != []
    assert ways_on(part) == [f'<a href="/job?service=fake&id=a&from={len(shown) + 1}#log">Later lines</a>']
    assert "Line 30 was not reached in time" in ways_on(far)[-1]


@looped
async def test_the_end_of_a_log_is_its_end_although_the_agent_is_behind(bench):
    """While the endpoint is down the page shows the newest lines of a job, not where the agent has stopped."""
    bench.collector.always("logs", Reply(503))
    bench.fake.add_job("a")
    bench.fake.add_lines("a", *map(str, range(5000)))
    async with looking(bench) as (_, client):
        await until(lambda: ("read_logs", "a") in bench.fake.calls)
        assert numbers((await job_page(client, "a")).text) == list(range(4801, 5001))


@looped
async def test_live_updates_begin_with_what_the_page_shows(bench):
    """The lines of a short log do not vanish as soon as it is followed."""
    bench.fake.add_job("a")
    bench.fake.add_lines("a", *map(str, range(450)))
    async with looking(bench) as (_, client):
        await bench.received(lambda: len(bench.bodies("a")) == 450)
        page = (await job_page(client, "a")).text
        async with client.stream("GET", "/events/job?service=fake&id=a") as answer:
            first = (await next_event(answer.aiter_lines(), "reset"))["html"]
    assert numbers(page) == numbers(first) == list(range(1, 451))


@looped
async def test_lines_that_are_not_the_last_are_not_called_so(monkeypatch):
    """The end of a long log is looked for where its service says that it is; where it is not found, that is said."""
    monkeypatch.setattr(log_window, "_SCAN_S", 0.1)
    far_ns = int((time.time() - 3600) * 1e9)
    service = slow(20_000, page_lines=100, page_s=0.02)
    found = await LogWindowReader(str).tail(service, "a", known_lines=300_000, last_line_ns=far_ns, lines=10)
    assert found.after
    monkeypatch.setattr(log_window, "_SCAN_S", 0.5)
    service = SlowService(page_lines=10)
    service.page_s = 0.01
    service.add_job("a")
    service.add_lines("a", *map(str, range(2000)), timestamp_ms=far_ns // 1_000_000, step_ms=1000)
    found = await LogWindowReader(str).tail(service, "a", known_lines=300_000, last_line_ns=far_ns, lines=10)
    assert [line.text for line in found.lines] == [str(number) for number in range(1990, 2000)]
    assert not found.after


@looped
async def test_a_service_that_hangs_keeps_nobody_from_the_logs_of_another(bench, monkeypatch):
    """However many look at its jobs."""
    bench.services["other"] = other = SlowService("other", identity="other")
    other.add_job("h")
    other.add_lines("h", "x")
    ended(bench, "a", "line")
    watches = [{"discover": True}, {"service": "other", "discover": True}]
    async with bench.running(*watches, listen="127.0.0.1:0"):
        await relayed(bench, "a")
        await bench.received(lambda: bench.bodies("h"))
        other.hangs = "h"
        reader = LogWindowReader(str)
        waiting = [asyncio.create_task(reader.window(other, "h", 1)) for _ in range(10)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert len((await reader.window(bench.fake, "a", 1)).lines) == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@looped
async def test_a_log_that_is_gone_neither_breaks_nor_hangs_its_live_updates(bench, caplog):
    """What is known without the log is told, up to the job's end, and the agent's own log has no word of it."""
    bench.services["fake"] = service = slow(1, page_lines=10)
    async with looking(bench) as (_, client):
        await bench.received(lambda: bench.bodies("a"))
        service.error = ServiceUnavailableError("gone", service="fake", job_id="a")
        async with client.stream("GET", "/events/job?service=fake&id=a") as answer:
            lines = answer.aiter_lines()
            assert not (await next_event(lines, "head"))["ended"]
            service.error = None
            assert "0" in (await next_event(lines, "reset"))["html"]
            service.expire("a", 3)
            service.add_lines("a", "lost", "lost too", "later")
            again = (await next_event(lines, "reset"))["html"]
    assert ("lost" in again, "later" in again) == (False, True)
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []


@looped
async def test_a_log_that_is_read_slowly_is_followed_all_the_same(bench, monkeypatch):
    """Live updates show how far reading went rather than begin anew each time; what they leave out is said."""
    monkeypatch.setattr(views, "_SERVICE_TIMEOUT_S", 1)
    monkeypatch.setattr(log_window, "_SCAN_S", 0.3)
    bench.services["fake"] = service = slow(1, page_lines=1)
    async with looking(bench) as (_, client):
        await bench.received(lambda: bench.bodies("a"))
        async with client.stream("GET", "/events/job?service=fake&id=a") as answer:
            lines = answer.aiter_lines()
            await next_event(lines, "reset")
            service.page_s = 0.2
            service.add_lines("a", *["x"] * 40)
            assert "L2" in (await next_event(lines, "lines"))["html"]
        service.page_s = 0
        reader = LogWindowReader(str)
        seen = await reader.after(service, "a", await reader.window(service, "a", 1), lines=10)
    assert (len(seen.lines), seen.left_out) == (10, 31)


@looped
async def test_the_first_error_of_a_long_log_is_found_in_many_steps(bench, monkeypatch):
    """A browser follows some 20 redirects; a page that goes on by itself takes any number, and says how far it is."""
    monkeypatch.setattr(log_window, "_SCAN_S", 0.0)
    bench.services["fake"] = FakeService(page_lines=10)
    ended(bench, "a", *["INFO fine"] * 100, "ERROR broken")
    async with looking(bench) as (_, client):
        await relayed(bench, "a")
        steps, answer = 0, await job_page(client, "a", jump="error")
        while answer.status_code == 200:
            assert "No error in the first" in answer.text
            steps, url = steps + 1, answer.headers["refresh"].removeprefix("0; url=")
            answer = await client.get(url)
    assert answer.headers["location"].endswith("#L101")
    assert steps == 10


@looped
async def test_a_page_of_many_times_is_looked_through_in_linear_time():
    """A service that knows only times has a run for each line; 500 of them must not hold up the loop for long."""
    # Going through the runs for each line took 150 us a line: this log was left unfinished after the 2 s for it.
    found = await LogWindowReader(str).search(slow(20_000, page_lines=5000), "a", "nothing")
    assert found.reached is None


@pytest.mark.parametrize("word", ["needle", "NEEDLE"])
@looped
async def test_a_search_finds_also_what_stands_far_behind_in_a_line(word):
    """A long line is cut off where it is shown, not where it is searched."""
    service = slow(1, page_lines=10)
    service.add_lines("a", "x" * 10_000 + "needle")
    found = await LogWindowReader(str).search(service, "a", word)
    assert [line.number for line in found.lines] == [2]
