"""A job with tasks on the page: its chart, live, and the lines of one task."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tailspan.errors import ServiceUnavailableError
from tailspan.logs.page import TaskRef
from tailspan.models import TaskRun
from tailspan.testing import FakeTaskService
from tailspan_agent.agent import Agent
from tailspan_agent.web import job_events, log_window
from tailspan_agent.web.log_window import LogWindowReader
from tests.fakes.agents import Bench, looped
from tests.integration.agent.web.test_page import EVIL, browsing, job_page, listed_ids, next_event, relayed

START = datetime.now(UTC) - timedelta(minutes=10)
EXTRACT, LOAD_1, LOAD_2 = TaskRef("e", "extract"), TaskRef("l", "load"), TaskRef("l", "load", 2)


@pytest.fixture
def service(bench: Bench) -> FakeTaskService:
    """A service with tasks in place of the one without, and a running job."""
    service = FakeTaskService("fake", page_lines=1000)
    bench.services["fake"] = service
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    return service


def attempt(ref: TaskRef, result: str | None, start: float | None, end: float | None, **fields) -> TaskRun:
    """Return an attempt of a task with times in seconds."""
    times = [None if seconds is None else START + timedelta(seconds=seconds) for seconds in (start, end)]
    return TaskRun(
        task_id=ref.task_id,
        name=ref.name,
        attempt=ref.attempt,
        result=result,
        submitted_at=fields.pop("submitted_at", START),
        started_at=times[0],
        finished_at=times[1],
        **fields,
    )


def add_lines(service: FakeTaskService, *lines: tuple[TaskRef | None, str], job_id: str = "j1") -> None:
    """Add lines of tasks, a second apart."""
    for number, (task, text) in enumerate(lines):
        timestamp_ms = int(START.timestamp() * 1000) + 1000 * number
        service.add_lines(job_id, text, timestamp_ms=timestamp_ms, task=task)


def rows(text: str) -> list[tuple[str, str]]:
    """Return name, with attempt and mark, and result of each row of a chart."""
    found = re.findall(r'<th scope="row">(.*?)</th>.*?<td class="state">(.*?)</td>', text, re.DOTALL)
    return [
        tuple(" ".join(html.unescape(re.sub("<[^>]+>", " ", cell)).split()) for cell in row)  # type: ignore[misc]
        for row in found
    ]


def shown_lines(text: str) -> list[str]:
    """Return the lines of the log on a page."""
    return [re.sub("</?mark>", "", line) for line in re.findall(r'<td class="text">(.*?)</td>', text)]


@asynccontextmanager
async def followed(bench: Bench, lines: int, **keys) -> AsyncIterator[tuple[Agent, httpx.AsyncClient]]:
    """Run an agent until the block ends, which begins when lines of `j1` have arrived."""
    async with browsing(bench, **keys) as (agent, client):
        await bench.received(lambda: len(bench.bodies("j1")) >= lines)
        yield agent, client


@looped
async def test_a_job_with_tasks_shows_every_attempt(bench: Bench, service: FakeTaskService) -> None:
    """Queued, running, retried, failed and skipped attempts, with the critical path, in the order of their start."""
    service.set_task("j1", attempt(EXTRACT, "success", 2, 60, url="https://example.test/extract"))
    service.set_task("j1", attempt(LOAD_1, "failure", 61, 100, after=("e",), error="disk full <b>"))
    service.set_task("j1", attempt(LOAD_2, "success", 130, 200, after=("e",)))
    service.set_task("j1", attempt(TaskRef("r", "report"), "error", 201, 210, after=("l",)))
    service.set_task("j1", attempt(TaskRef("t", "train"), None, 220, None, after=("l",)))
    service.set_task(
        "j1", attempt(TaskRef("n", "notify"), None, None, None, submitted_at=START + timedelta(seconds=230))
    )
    service.set_task("j1", attempt(TaskRef("s", "branch"), "skip", None, None, submitted_at=None))
    add_lines(service, (EXTRACT, "reading"), (LOAD_1, "copying"))
    async with followed(bench, 2) as (_, client):
        page = (await job_page(client, "j1")).text
    assert rows(page) == [
        ("extract critical", "succeeded"),
        ("load critical", "failed, retried disk full <b>"),
        ("load attempt 2 critical", "succeeded"),
        ("report critical", "failed"),
        ("train", "running"),
        ("notify", "queued"),
        ("branch", "skipped"),
    ]
    assert "6 tasks, 7 attempts" in page
    path = re.search(r'<p class="path">(.*?)</p>', page, re.DOTALL)[1]  # type: ignore[index]
    words = " ".join(re.sub("<[^>]+>", "", path).split())
    assert words.startswith(
        "Critical path so far: extract → load → load attempt 2 → report · 4 attempts, executing for 2m"
    )
    assert '<a href="https://example.test/extract" rel="noreferrer"' in page
    assert page.count('<rect class="critical"') == 4
    # the page's policy forbids inline styles
    assert "style=" not in page
    tasks = re.findall(r'class="from"><span class="task" title="(\w+)">', page)
    assert tasks == ["extract", "load"]


@looped
async def test_a_job_without_tasks_has_a_closed_waterfall_of_its_own_spans(bench: Bench) -> None:
    """Run and execution; its lines have no task."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a line")
    async with followed(bench, 1) as (_, client):
        page = (await job_page(client, "j1")).text
    assert '<details class="trace"><summary>' in page
    assert re.findall(r'<th scope="row" class="own level\d">(\w+)</th>', page) == ["run", "executing"]
    assert rows(page) == []
    assert '<td class="from"></td><td class="text">a line</td>' in page


@looped
async def test_the_lines_of_one_task_are_shown_searched_and_followed(bench: Bench, service: FakeTaskService) -> None:
    """The filter stays in the links of the page until it is removed; a line keeps its number in the whole log."""
    service.set_task("j1", attempt(EXTRACT, None, 0, None))
    service.set_task("j1", attempt(LOAD_1, None, 0, None))
    lines = [
        (EXTRACT, "e1"),
        (LOAD_1, "l1"),
        (None, "job"),
        (LOAD_2, "l2"),
        (EXTRACT, "ERROR e2"),
        (LOAD_2, "ERROR l3"),
    ]
    add_lines(service, *lines)
    async with followed(bench, 6) as (_, client):
        link = html.unescape(re.findall(r'<th scope="row"><a href="([^"]*)"', (await job_page(client, "j1")).text)[1])
        page = (await client.get(link)).text
        assert shown_lines(page) == ["l1", "l2", "ERROR l3"]
        assert re.findall(r'<tr id="L(\d+)"', page) == ["2", "4", "6"]
        assert "Only lines of the task <strong>load</strong>" in page
        assert 'class="task"' not in page
        assert '<input type="hidden" name="task" value="l">' in page
        assert 'aria-current="true">load</a>' in page
        assert 'href="/job?service=fake&amp;id=j1#log">Show the lines of all tasks' in page
        by_name = await job_page(client, "j1", task="load", **{"from": 3})
        assert shown_lines(by_name.text) == ["l2", "ERROR l3"]
        assert shown_lines((await job_page(client, "j1", task="l", q="L")).text) == ["l1", "l2", "ERROR l3"]
        assert shown_lines((await job_page(client, "j1", task="e", q="l")).text) == []
        error = await job_page(client, "j1", task="l", jump="error")
        assert (error.status_code, error.headers["location"]) == (303, "/job?service=fake&id=j1&task=l&from=1#L6")
        missing = await job_page(client, "j1", task="<b>none", **{"from": 1})
        assert "No line is of this task." in missing.text
        assert "<b>none" not in missing.text
        path = html.unescape(re.findall(r'data-events="([^"]+)"', page)[0])
        assert path == "/events/job?service=fake&id=j1&task=l"
        async with client.stream("GET", path) as answer:
            events = answer.aiter_lines()
            assert shown_lines((await next_event(events, "reset"))["html"]) == ["l1", "l2", "ERROR l3"]
            service.add_lines("j1", "e3", task=EXTRACT)
            service.add_lines("j1", "l4", task=LOAD_2)
            update = (await next_event(events, "lines"))["html"]
            assert shown_lines(update) == ["l4"]
            assert 'id="L8"' in update


@looped
async def test_the_chart_is_updated_live(bench: Bench, service: FakeTaskService, monkeypatch) -> None:
    """A new attempt and a result are shown at once, and bars that grow every few seconds."""
    monkeypatch.setattr(job_events, "REFRESH_S", 0.05)
    add_lines(service, (None, "started"))
    async with followed(bench, 1) as (_, client):
        page = (await job_page(client, "j1")).text
        assert rows(page) == []
        async with client.stream("GET", "/events/job?service=fake&id=j1") as answer:
            events = answer.aiter_lines()
            assert rows((await next_event(events, "tasks"))["html"]) == []
            service.set_task("j1", attempt(EXTRACT, None, 0, None))
            assert rows((await next_event(events, "tasks"))["html"]) == [("extract", "running")]
            service.set_task("j1", attempt(EXTRACT, "success", 0, 30))
            assert rows((await next_event(events, "tasks"))["html"]) == [("extract critical", "succeeded")]
            monkeypatch.setattr(job_events, "_CHART_S", 0.0)
            service.set_task("j1", attempt(LOAD_1, None, 31, None))
            while len(rows((await next_event(events, "tasks"))["html"])) < 2:
                pass
            assert ("load", "running") in rows((await next_event(events, "tasks"))["html"])


@looped
async def test_a_job_that_is_no_longer_followed_has_the_tasks_of_its_service(
    bench: Bench, service: FakeTaskService, monkeypatch
) -> None:
    """They are redacted as those of a followed job; a service that does not answer leaves the chart out."""
    monkeypatch.setenv("HIDDEN_NAME", "s3cret-name")
    secret = TaskRef("x", "s3cret-name")
    service.set_task("j1", attempt(EXTRACT, "success", 0, 60))
    service.set_task("j1", attempt(secret, "failure", 61, 70, error="no s3cret-name"))
    add_lines(service, (secret, "a line"))
    service.set_state("j1", "FAILED", finished_at=START + timedelta(seconds=80))
    async with browsing(bench, more='[redact]\nenv = ["HIDDEN_NAME"]') as (_, client):
        await relayed(bench, "j1")
        page = (await job_page(client, "j1")).text
        assert [name for name, _ in rows(page)] == ["extract", "[REDACTED] critical"]
        assert "s3cret-name" not in page
        assert shown_lines((await job_page(client, "j1", task="x")).text) == ["a line"]

        async def unavailable(job_id: str) -> list[TaskRun]:
            raise ServiceUnavailableError("no", job_id=job_id)

        monkeypatch.setattr(service, "list_tasks", unavailable)
        page = (await job_page(client, "j1")).text
        assert rows(page) == []
        assert 'class="own level0"' in page


@looped
async def test_no_text_of_a_task_becomes_markup(bench: Bench, service: FakeTaskService) -> None:
    """Ids, names, errors and URLs stay text; a service that breaks its promises has no chart or a plain one."""
    evil = TaskRef(EVIL, EVIL)
    service.set_task("j1", attempt(evil, "failure", 0, 1, error=EVIL, url="javascript:alert(1)", after=(EVIL,)))
    service.set_task("j1", attempt(TaskRef("long", "x" * 100_000), EVIL, 1, 2, parent="long"))
    service.set_task("j1", attempt(TaskRef("\ud800", "\ud800"), "success", 1e9, -1e9))
    add_lines(service, (evil, "a line"))
    async with followed(bench, 1) as (_, client):
        pages = [
            await job_page(client, "j1"),
            await job_page(client, "j1", task=EVIL),
            await job_page(client, "j1", task=EVIL, q="a"),
            await job_page(client, "j1", task="x" * 5000),
        ]
    for page in pages:
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "<img src=x" not in page.text
        assert "\u202e" not in re.sub('<input type="hidden" name="task"[^>]*>', "", page.text)
        assert 'href="javascript' not in page.text
        assert len(rows(page.text)) == 3
        assert "x" * 200 not in page.text.replace("x" * 1024, "")
    assert shown_lines(pages[1].text) == ["a line"]


@looped
async def test_a_job_with_thousands_of_tasks_has_a_page(bench: Bench, service: FakeTaskService, monkeypatch) -> None:
    """The page has a limited number of rows, says how many are left out, and lists jobs as before."""
    tasks = [attempt(TaskRef(f"t{n}", f"part {n}"), "success", n / 10, n / 10 + 1) for n in range(1300)]
    tasks[1234] = replace(tasks[1234], result="failure")

    async def list_tasks(job_id: str) -> list[TaskRun]:
        return tasks

    monkeypatch.setattr(service, "list_tasks", list_tasks)
    add_lines(service, (None, "a line"))
    async with followed(bench, 1) as (_, client):
        page = (await job_page(client, "j1")).text
        assert listed_ids((await client.get("/")).text) == ["j1"]
    found = rows(page)
    assert len(found) == 200
    assert ("part 1234", "failed") in found
    assert "1,300 tasks" in page
    assert "1,100 attempts are not shown" in page
    assert len(page) < 400_000


@looped
async def test_a_line_has_the_severity_that_its_service_reports(service: FakeTaskService) -> None:
    """An error without the word is found and coloured; a word in a line of another severity is not an error."""
    service.add_lines("j1", "an ERROR only in words", severity=9)
    service.add_lines("j1", "it broke", severity=17)
    reader = LogWindowReader(str)
    assert [line.level for line in (await reader.window(service, "j1", 1)).lines] == ["info", "error"]
    assert [line.number for line in (await reader.first_error(service, "j1")).lines] == [2]


@pytest.mark.parametrize("known_lines", [10, 10**9], ids=["counted", "long"])
@looped
async def test_the_end_of_a_tasks_lines_is_found_behind_those_of_others(
    service: FakeTaskService, known_lines: int
) -> None:
    """The last lines of a task may be far from the end of the log, and more of them may come before."""
    texts = [(EXTRACT, f"e{number}") for number in range(600)] + [(LOAD_1, f"l{number}") for number in range(600)]
    add_lines(service, *texts)
    last_ns = int(START.timestamp() * 1e9) + 1200 * 10**9
    tail = await LogWindowReader(str).tail(
        service, "j1", known_lines=known_lines, last_line_ns=last_ns, lines=5, task="e"
    )
    assert [line.text for line in tail.lines[-5:]] == [f"e{number}" for number in range(595, 600)]
    assert tail.before
    assert {line.number is None for line in tail.lines} == {known_lines > 10}
    service.add_lines("j1", "l600", task=LOAD_1)
    service.add_lines("j1", "e600", task=EXTRACT)
    new = await LogWindowReader(str).after(service, "j1", tail, task="e")
    assert ([line.text for line in new.lines], new.left_out) == (["e600"], 0)


@looped
async def test_earlier_and_later_lines_are_those_of_the_task(
    bench: Bench, service: FakeTaskService, monkeypatch
) -> None:
    """Every line of the task is on one of the pages, whichever way they are read."""
    add_lines(service, *[(EXTRACT if number % 3 else LOAD_1, f"{number}") for number in range(3300)])
    service.set_state("j1", "SUCCEEDED", finished_at=START + timedelta(hours=1))
    expected = [str(number) for number in range(0, 3300, 3)]

    async def read(label: str, page: str) -> list[list[str]]:
        pages = [shown_lines(page)]
        while link := re.search(f'<a href="([^"]+)">{label}</a>', page):
            page = (await client.get(html.unescape(link[1]))).text
            pages.append(shown_lines(page))
        return pages

    async with browsing(bench) as (_, client):
        backwards = await read("Earlier lines", (await job_page(client, "j1", task="l")).text)
        forwards = await read("Later lines", (await job_page(client, "j1", task="l", **{"from": 1})).text)
        middle = (await job_page(client, "j1", task="l", until="1000")).text
        first = (await job_page(client, "j1", task="e", until="1")).text
        monkeypatch.setattr(log_window, "_SCAN_S", 0.0)
        late = (await job_page(client, "j1", task="l", until="3000")).text
    assert [line for page in reversed(backwards) for line in page] == expected
    assert [line for page in forwards for line in page] == expected
    assert shown_lines(middle) == [number for number in expected if int(number) < 1000]
    assert "No line before here is of this task." in first
    assert "data-events" not in middle
    assert "Line 3,000 was not reached in time." in late
