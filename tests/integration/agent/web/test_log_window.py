"""Log windows of slow services, of long logs and of logs that the agent has not read to the end."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncGenerator
from itertools import accumulate

import pytest

from tailspan.errors import ServiceUnavailableError
from tailspan.logs.page import LogPage
from tailspan.testing import FakeService
from tailspan_agent.web import log_window, views
from tailspan_agent.web.log_window import LogWindowReader
from tests.fakes.agents import looped, until
from tests.fakes.collector import Reply
from tests.integration.agent.web.test_page import browsing, ended, job_page, next_event, relayed


class SlowService(FakeService):
    """A service with slow pages, a job whose log hangs, and errors on demand.

    Attributes:
        page_s: The time after each page, in seconds.
        hangs: The job whose log never arrives.
        error: Raised by every read of a log.
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
    """Create a service with one job ``a`` whose lines are numbers from 0."""
    service = SlowService(page_lines=page_lines)
    service.add_job("a")
    service.add_lines("a", *map(str, range(lines)), timestamp_ms=int(time.time() * 1000) - lines, step_ms=1)
    service.page_s = page_s
    return service


def numbers(text: str) -> list[int]:
    """Return the line numbers on a page."""
    return [int(found) for found in re.findall(r'<tr id="L(\d+)"', text)]


def hints(text: str) -> list[str]:
    """Return the texts with links before and after the lines of a page."""
    return [html.unescape(found) for found in re.findall(r'class="more">(.*?)</p>', text)]


@looped
async def test_a_slow_log_is_shown_as_far_as_it_was_read(bench, monkeypatch):
    """The link to later lines continues after the last line that was read."""
    bench.services["fake"] = service = slow(30, page_lines=1)
    async with browsing(bench) as (_, client):
        await bench.received(lambda: len(bench.bodies("a")) == 30)
        monkeypatch.setattr(log_window, "_SCAN_S", 0.05)
        service.page_s = 0.02
        whole = await job_page(client, "a")
        part = (await job_page(client, "a", **{"from": 1})).text
        far = (await job_page(client, "a", **{"from": 30})).text
    assert whole.status_code == 200
    read = numbers(part)
    assert read == list(range(1, len(read) + 1)) != []
    assert hints(part) == [f'<a href="/job?service=fake&id=a&from={len(read) + 1}#log">Later lines</a>']
    assert "Line 30 was not reached in time" in hints(far)[-1]


@looped
async def test_the_end_of_a_log_does_not_depend_on_the_agents_progress(bench):
    """While the endpoint is down the page shows the newest lines of a job, not those where the agent has stopped."""
    bench.collector.always("logs", Reply(503))
    bench.fake.add_job("a")
    bench.fake.add_lines("a", *map(str, range(5000)))
    async with browsing(bench) as (_, client):
        await until(lambda: ("read_logs", "a") in bench.fake.calls)
        assert numbers((await job_page(client, "a")).text) == list(range(4801, 5001))


@looped
async def test_live_updates_start_with_the_lines_of_the_page(bench):
    """The lines of a short log do not disappear when its live updates start."""
    bench.fake.add_job("a")
    bench.fake.add_lines("a", *map(str, range(450)))
    async with browsing(bench) as (_, client):
        await bench.received(lambda: len(bench.bodies("a")) == 450)
        page = (await job_page(client, "a")).text
        async with client.stream("GET", "/events/job?service=fake&id=a") as answer:
            first = (await next_event(answer.aiter_lines(), "reset"))["html"]
    assert numbers(page) == numbers(first) == list(range(1, 451))


@looped
async def test_the_end_of_a_long_log_is_read_by_its_time(monkeypatch):
    """The read starts near the time of the newest line; if it does not reach the end, the window says so."""
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
async def test_a_service_that_hangs_does_not_block_the_logs_of_another(bench, monkeypatch):
    """However many browsers wait for its jobs."""
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
async def test_live_updates_survive_a_lost_log(bench, caplog):
    """They still send the head and lines that return, and the agent's own log stays silent."""
    bench.services["fake"] = service = slow(1, page_lines=10)
    async with browsing(bench) as (_, client):
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
async def test_live_updates_of_a_slow_log_make_progress(bench, monkeypatch):
    """Each update resumes where the last one stopped, and carries the number of skipped lines."""
    monkeypatch.setattr(views, "_SERVICE_TIMEOUT_S", 1)
    monkeypatch.setattr(log_window, "_SCAN_S", 0.3)
    bench.services["fake"] = service = slow(1, page_lines=1)
    async with browsing(bench) as (_, client):
        await bench.received(lambda: bench.bodies("a"))
        async with client.stream("GET", "/events/job?service=fake&id=a") as answer:
            lines = answer.aiter_lines()
            await next_event(lines, "reset")
            service.page_s = 0.2
            service.add_lines("a", *["x"] * 40)
            assert "L2" in (await next_event(lines, "lines"))["html"]
        service.page_s = 0
        monkeypatch.setattr(log_window, "_SCAN_S", 60)
        reader = LogWindowReader(str)
        seen = await reader.after(service, "a", await reader.window(service, "a", 1), lines=10)
    assert (len(seen.lines), seen.left_out) == (10, 31)


@looped
async def test_the_first_error_of_a_long_log_is_found_in_many_steps(bench, monkeypatch):
    """Browsers limit redirects to about 20; a page that refreshes itself has no limit, and shows its progress."""
    monkeypatch.setattr(log_window, "_SCAN_S", 0.0)
    bench.services["fake"] = FakeService(page_lines=10)
    ended(bench, "a", *["INFO fine"] * 100, "ERROR broken")
    async with browsing(bench) as (_, client):
        await relayed(bench, "a")
        steps, answer = 0, await job_page(client, "a", jump="error")
        while answer.status_code == 200:
            assert "No error in lines 1 to" in answer.text
            steps, url = steps + 1, answer.headers["refresh"].removeprefix("0; url=")
            answer = await client.get(url)
    assert answer.headers["location"].endswith("#L101")
    assert steps == 10


@looped
async def test_the_runs_of_a_page_are_counted_once(monkeypatch):
    """A service with times only has one run per line, so that counting them for each line would be quadratic."""
    counts: list[int] = []

    def counting(lines):
        counts.append(1)
        return accumulate(lines)

    monkeypatch.setattr(log_window, "accumulate", counting)
    monkeypatch.setattr(log_window, "_SCAN_S", 60.0)
    service = slow(5000, page_lines=5000)
    assert len((await LogWindowReader(str).window(service, "a", 1)).lines) == 500
    assert len(counts) == 1
    assert (await LogWindowReader(str).search(service, "a", "nothing")).lines == []
    assert len(counts) == 1


@pytest.mark.parametrize("word", ["needle", "NEEDLE"])
@looped
async def test_a_search_covers_all_of_a_long_line(word):
    """A long line is truncated for display, not for the search."""
    service = slow(1, page_lines=10)
    service.add_lines("a", "x" * 10_000 + "needle")
    found = await LogWindowReader(str).search(service, "a", word)
    assert [line.number for line in found.lines] == [2]
