"""The agent's page over real HTTP: content, access control, and no text of a job acts in a browser."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from tailspan import __version__
from tailspan.errors import ServiceUnavailableError
from tailspan.models import JobState
from tailspan.testing import FakeService
from tailspan_agent.agent import Agent
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.session import COOKIE, Session, local_path
from tests.fakes.agents import Bench, looped, until
from tests.fakes.collector import Reply

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> \u202egnp.exe"
TOKEN = "page-tökén-s3cret"


@asynccontextmanager
async def browsing(bench: Bench, *watches: dict, **keys) -> AsyncIterator[tuple[Agent, httpx.AsyncClient]]:
    """Run an agent with its page, and a browser-like client."""
    async with bench.running(*watches, listen="127.0.0.1:0", **keys) as agent:
        assert agent.server is not None
        async with httpx.AsyncClient(
            base_url=agent.server.url, trust_env=False, verify=False, headers={"accept": "text/html"}, timeout=20
        ) as client:
            yield agent, client


def ended(bench: Bench, job_id: str, *lines: str, state: JobState = JobState.SUCCEEDED, **fields) -> None:
    """Add an ended job."""
    bench.fake.add_job(job_id, **fields)
    bench.fake.add_lines(job_id, *lines)
    bench.fake.set_state(job_id, state)


async def relayed(bench: Bench, *job_ids: str) -> None:
    """Wait until the collector has the receipts of these jobs."""
    await bench.received(lambda: set(job_ids) <= set(bench.receipts()))


def listed_ids(text: str) -> list[str]:
    """Return the ids of the jobs in a table, in order."""
    return [html.unescape(found) for found in re.findall(r'class="id" title="([^"]*)"', text)]


async def job_page(client: httpx.AsyncClient, job_id: str, **query) -> httpx.Response:
    """Get a job's page."""
    return await client.get("/job", params={"service": "fake", "id": job_id, **query})


@looped
async def test_jobs_are_listed_running_ones_first(bench):
    """The table has running and ended jobs with state, last line and line count; ended ones survive a restart."""
    ended(bench, "old", "one", "two", job_name="nightly")
    bench.fake.add_job("busy", job_name="train", total_tasks=4, finished_tasks=1)
    bench.fake.add_lines("busy", "loading")
    async with browsing(bench) as (_, client):
        await relayed(bench, "old")
        await bench.received(lambda: bench.bodies("busy"))
        text = (await client.get("/")).text
    assert listed_ids(text) == ["busy", "old"]
    assert ">nightly</a>" in text
    assert 'value="0.2500"' in text
    assert "loading" in text
    async with browsing(bench) as (agent, client):
        await until(lambda: agent.tailers)
        assert "old" in listed_ids((await client.get("/")).text)


@looped
async def test_jobs_are_filtered_by_text_state_and_service(bench):
    """Filters are in the URL, so that a view can be shared; invalid filters are ignored."""
    ended(bench, "a-1", "x", job_name="alpha")
    ended(bench, "b-1", "x", job_name="beta", state=JobState.FAILED)
    async with browsing(bench) as (_, client):
        await relayed(bench, "a-1", "b-1")
        found = {
            query: listed_ids((await client.get(f"/?{query}")).text)
            for query in ("q=ALPH", "q=b-", "state=failed", "state=running", "service=none", "q=&page=9", "page=x")
        }
    assert found == {
        "q=ALPH": ["a-1"],
        "q=b-": ["b-1"],
        "state=failed": ["b-1"],
        "state=running": [],
        "service=none": [],
        "q=&page=9": found["page=x"],
        "page=x": found["page=x"],
    }
    assert set(found["page=x"]) == {"a-1", "b-1"}


@looped
async def test_the_start_page_says_what_is_wrong_now(bench, monkeypatch):
    """Counts with links, why jobs failed, missing pipelines, and attributes, whose secrets a filter does not find."""
    monkeypatch.setenv("PAGE_SECRET", "hunter2hunter2")
    trace = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "    boom()", "ValueError: no"]
    ended(bench, "sad", *trace, state=JobState.FAILED, exit_code=3, attributes={"team": "geo", "key": "hunter2hunter2"})
    ended(bench, "off", "x", state=JobState.CANCELED, attributes={"team": "geo"})
    bench.fake.add_job("busy", attributes={"team": "ml", "key": "hunter2hunter2"})
    more = '[redact]\nenv = ["PAGE_SECRET"]\n[[agent.expect]]\nname = "report"\nevery = "1ms"\ngrace = "0s"'
    async with browsing(bench, more=more) as (agent, client):
        await relayed(bench, "sad", "off")
        await until(lambda: agent._context.pipeline_stats.missing.get("report"))
        page = (await client.get("/")).text
        queries = ("attr=team%3Dgeo", "attr=team%3Dml", "attr=key%3Dhunter2hunter2", "attr=key%3D%5BREDACTED%5D")
        found = {query: set(listed_ids((await client.get(f"/?{query}")).text)) for query in queries}
    async with browsing(bench, more=more) as (_, client):
        again = (await client.get("/?state=failed")).text
    tiles = re.findall(r'class="tile[^"]*" href="([^"]+)"><b>(\d+)</b> <span>([^<]+)', page)
    assert [(html.unescape(link), number, label) for link, number, label in tiles] == [
        ("/?state=failed&range=24h", "1", "failed"),
        ("/?state=running", "1", "running"),
        ("/pipelines", "1", "late or missing"),
        ("/?state=silent", "0", "silent"),
        ("/agent", "0", "agent trouble"),
    ]
    assert "did not start in time" in page
    for text in (page, again):
        assert "<b>exit 3</b> ValueError: no</div>" in text
        assert 'class="failed"' in text, "the timeline has a bar"
    assert list(found.values()) == [{"sad", "off"}, {"busy"}, set(), {"sad", "busy"}]


class Markup(HTMLParser):
    """The parsed page: names of attributes, and sources of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: set[str] = set()
        self.scripts: set[str | None] = set()

    def handle_starttag(self, tag, attrs):
        """Record an element."""
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.add(dict(attrs).get("src"))


@looped
async def test_no_text_of_a_job_becomes_markup(bench):
    """Names, ids, lines, errors and attributes stay text and cannot reorder the text around them."""
    ended(
        bench, "evil", EVIL, f"ERROR {EVIL}", state=JobState.FAILED, job_name=EVIL, error=EVIL, attributes={EVIL: EVIL},
        url="javascript:alert(1)",
    )  # fmt: skip
    async with browsing(bench) as (_, client):
        await relayed(bench, "evil")
        pages = [
            await client.get("/"),
            await job_page(client, "evil"),
            await job_page(client, "evil", q="<script>"),
            await job_page(client, EVIL),
            await client.get("/pipelines"),
            await client.get("/", params={"q": EVIL[:50]}),
            await client.get("/login", params={"next": f"/{EVIL}"}),
        ]
    for page in pages:
        assert "<script>alert" not in page.text
        assert "<img src=x" not in page.text
        assert "\u202e" not in page.text
        assert "javascript:" not in page.text
        markup = Markup()
        markup.feed(page.text)
        assert markup.scripts <= {"/static/page.js"}
        assert not {name for name in markup.attributes if name.startswith("on") or name == "style"}
        policy = page.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
    assert html.escape("<script>alert(1)</script>") in pages[1].text
    assert pages[3].status_code == 404


@looped
async def test_texts_that_are_not_utf8_do_not_break_the_page(bench):
    """Names, tags, commands and errors may contain undecodable bytes; the link of a name finds its jobs."""
    bad = "caf\udce9\ud800"
    texts = {"job_name": bad, "error": bad, "attributes": {bad: bad}, "details": {"process.command_line": bad}}
    texts |= {"url": f"http://host/{bad}", "instance_id": bad}
    bench.fake.add_job("busy", **texts)
    ended(bench, "sad", f"ERROR {bad}", state=JobState.FAILED, **texts)
    async with browsing(bench) as (_, client):
        await relayed(bench, "sad")
        pages = {job_id: (await job_page(client, job_id)).text for job_id in ("busy", "sad")}
        link = html.unescape(re.search(r'href="(/\?pipeline=[^"]+)"', pages["busy"])[1])
        found = (await client.get(link)).text
        async with client.stream("GET", "/events/jobs") as answer:
            event = await next_event(answer.aiter_lines(), "jobs")
        others = [
            (await client.get(path)).status_code
            for path in ("/", "/pipelines", "/agent", "/job?service=fake&id=%ED%B3%A9")
        ]
    assert all(">caf??" in page and "http://host/caf??" in page for page in pages.values())
    assert listed_ids(found) == ["busy", "sad"]
    assert set(event["order"]) == {"fake\0busy", "fake\0sad"}
    assert others == [200, 200, 200, 404]
    assert job_path("fake", bad, q=bad) == "/job?service=fake&id=caf%3F%3F&q=caf%3F%3F"


@looped
async def test_a_failed_job_has_its_failure_on_top_and_a_searchable_log(bench):
    """The failure comes before the log; a search shows numbered lines; a jump leads to the first error."""
    lines = [f"INFO step {number}" for number in range(1, 1200)]
    trace = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "    boom()", "ValueError: no"]
    ended(bench, "sad", *lines, "ERROR it broke", *trace, state=JobState.FAILED, exit_code=3)
    ended(bench, "traced", "fine", *trace, state=JobState.FAILED)
    async with browsing(bench) as (_, client):
        await relayed(bench, "sad", "traced")
        page = (await job_page(client, "sad")).text
        found = (await job_page(client, "sad", q="STEP 7")).text
        jump = await job_page(client, "sad", jump="error")
        traced = await job_page(client, "traced", jump="error")
        window = (await job_page(client, "sad", **{"from": 500})).text
        last = (await job_page(client, "sad", **{"from": 99999})).text
    assert page.index("ValueError: no") < page.index('id="log"')
    assert "exit 3" in page
    assert "first seen now" in page
    assert page.count('class="text"') == 200
    assert found.count('class="text"') == 1 + 10 + 100
    assert 'id="L7"' in found
    assert jump.headers["location"].endswith("from=1180#L1200")
    assert traced.headers["location"].endswith("from=1#L2")
    assert window.count('class="text"') == 500
    assert ('id="L500"' in window, 'id="L999"' in window, 'id="L1000"' in window) == (True, True, False)
    assert "Earlier lines" in window
    assert "Later lines" in window
    assert "The log has no line 99,999" in last


@looped
async def test_a_job_links_to_its_trace_and_counts_equal_failures(bench):
    """Links come from the configuration; a repeated failure has its count."""
    links = """[links]\ntrace = "http://localhost:16686/trace/{trace_id}?job={job_name}"\n"""
    for number in range(2):
        ended(bench, f"run-{number}", "ERROR no such bucket", job_name="a b", state=JobState.FAILED, exit_code=1)
        async with browsing(bench, more=links) as (_, client):
            await relayed(bench, f"run-{number}")
            page = html.unescape((await job_page(client, f"run-{number}")).text)
    trace_id = bench.spans("run-1")["run"].trace_id
    assert f'href="http://localhost:16686/trace/{trace_id}?job=a%20b"' in page
    assert "seen 2 times since" in page


@looped
async def test_secrets_are_neither_shown_nor_found(bench, monkeypatch):
    """Text that is redacted from records is not on the page, and a search does not reveal it."""
    monkeypatch.setenv("PAGE_SECRET", "hunter2hunter2")
    ended(bench, "leak", "password hunter2hunter2 given", state=JobState.FAILED, error="bad hunter2hunter2")
    async with browsing(bench, more='[redact]\nenv = ["PAGE_SECRET"]') as (_, client):
        await relayed(bench, "leak")
        pages = [(await client.get("/")).text, (await job_page(client, "leak")).text]
        searched = (await job_page(client, "leak", q="hunter2hunter2")).text
    assert all("hunter2" not in page for page in pages)
    assert searched.count('class="text"') == 0


async def next_event(lines: AsyncIterator[str], name: str) -> dict:
    """Return the data of the next event with a name."""
    async for line in lines:
        if line == f"event: {name}":
            return json.loads((await anext(lines)).removeprefix("data: "))
    raise AssertionError(f"the stream ended without {name}")


@looped
async def test_live_updates_send_only_what_changed(bench):
    """The first event has all rows of the page; the next ones have changed rows only, with the order of all rows."""
    bench.fake.add_job("one", total_tasks=4, finished_tasks=1)
    bench.fake.add_job("two", state=JobState.PENDING)
    async with browsing(bench) as (_, client), client.stream("GET", "/events/jobs") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        known: dict[str, str] = {}
        while len(known) < 2:
            known |= (await next_event(lines, "jobs"))["rows"]
        bench.fake.set_state("two", JobState.RUNNING)
        event = await next_event(lines, "jobs")
        while "running" not in event["rows"].get("fake\0two", ""):
            event = await next_event(lines, "jobs")
        assert set(event["order"]) == {"fake\0one", "fake\0two"}


@looped
async def test_a_running_job_is_followed_live_to_its_end(bench):
    """Lines arrive as they are written, the head follows the state, and the last event ends the stream."""
    bench.fake.add_job("live")
    bench.fake.add_lines("live", "first")
    path = "/events/job?service=fake&id=live"
    async with browsing(bench) as (_, client):
        await bench.received(lambda: bench.bodies("live"))
        page = (await job_page(client, "live")).text
        assert html.unescape(re.findall(r'data-events="([^"]+)"', page)[0]) == path
        async with client.stream("GET", path) as answer:
            lines = answer.aiter_lines()
            first = (await next_event(lines, "reset"))["html"]
            assert "first" in first
            assert 'id="L1"' in first
            bench.fake.add_lines("live", "second <b>")
            second = (await next_event(lines, "lines"))["html"]
            assert "second &lt;b&gt;" in second
            assert 'id="L2"' in second
            bench.fake.set_state("live", JobState.SUCCEEDED)
            while not (await next_event(lines, "head"))["ended"]:
                pass
            assert await next_event(lines, "end") == {}


@looped
async def test_streams_are_limited_and_release_their_place(bench):
    """One stream too many is rejected; a closed stream releases its place."""
    async with browsing(bench) as (agent, client):
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False, timeout=20) as many:
            requests = [many.build_request("GET", "/events/jobs") for _ in range(20)]
            answers = [await many.send(request, stream=True) for request in requests]
            assert {answer.status_code for answer in answers} == {200}
            assert (await client.get("/events/jobs")).status_code == 503
        for _ in range(100):
            async with client.stream("GET", "/events/jobs") as answer:
                if answer.status_code == 200:
                    return
            await asyncio.sleep(0.05)
        raise AssertionError("no place was released")


@looped
async def test_an_agent_that_stops_ends_its_streams_without_log_lines(bench, caplog):
    """An open page neither delays the agent's end nor fills its log with errors."""
    async with browsing(bench) as (agent, client):
        request = client.build_request("GET", "/events/jobs")
        answer = await client.send(request, stream=True)
        parts = answer.aiter_text()
        await anext(parts)
        agent.stop()
        async for _ in parts:
            pass
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []


@looped
async def test_a_browser_logs_in_with_the_token_and_keeps_only_a_cookie(bench):
    """The token is sent once; the cookie does not contain it, and neither scripts nor other sites get the cookie."""
    async with browsing(bench, token=TOKEN) as (_, client):
        first = await client.get("/pipelines?x=1")
        assert (first.status_code, first.headers["location"]) == (303, "/login?next=%2Fpipelines%3Fx%3D1")
        assert (await client.get("/", headers={"accept": "*/*"})).status_code == 401
        assert (await client.get("/login", headers={"host": "evil.example"})).status_code == 421
        wrong = await client.post("/login", data={"token": "wrong", "next": "/"})
        assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
        right = await client.post("/login", data={"token": TOKEN, "next": "//evil.example"})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/", headers={"cookie": f"{COOKIE}=0000"})).status_code in (200, 303)
        for path in ("/healthz", "/readyz"):
            async with httpx.AsyncClient(base_url=client.base_url, trust_env=False, verify=False) as other_client:
                assert (await other_client.get(path)).status_code == 200
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False, verify=False) as other_client:
            for path in ("/", "/job?service=fake&id=x", "/events/jobs", "/events/job", "/agent"):
                assert (await other_client.get(path)).status_code == 401
            assert (await other_client.post("/cancel")).status_code == 401


@looped
async def test_two_agents_on_one_machine_keep_their_logins(tmp_path, bench, collector):
    """A browser sends a host's cookies to all its ports: a login at one agent must not end that at another."""
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other", collector)
    async with browsing(bench, token=TOKEN) as (_, client), browsing(other, token=TOKEN) as (_, second):
        names = set()
        for each in (client, second):
            answer = await each.post("/login", data={"token": TOKEN})
            names.add(answer.headers["set-cookie"].partition("=")[0])
            assert (await each.get("/")).status_code == 200
    assert len(names) == 2


@pytest.mark.parametrize(
    ("headers", "form", "sent_by_us"),
    [
        ({}, None, True),
        ({"origin": "http://127.0.0.1:8797", "sec-fetch-site": "same-origin"}, None, True),
        ({"origin": "http://evil.example"}, None, False),
        ({"origin": "null"}, None, False),
        ({"sec-fetch-site": "cross-site"}, None, False),
        ({"sec-fetch-site": "same-site"}, None, False),
        ({}, "", False),
        ({}, "0" * 64, False),
        ({}, "ä", False),
    ],
)
def test_only_our_own_form_is_accepted(headers, form, sent_by_us):
    """A form of another site is rejected by its origin, and a form without the secret field in any case."""
    session = Session(None)
    given = session.form_token if form is None else form
    assert session.sent_by_us({"host": "127.0.0.1:8797", **headers}, given) is sent_by_us


@pytest.mark.parametrize(
    ("target", "path"),
    [("/job?id=1", "/job?id=1"), ("//evil", "/"), ("https://evil", "/"), ("/\\evil", "/"), ("", "/"), ("/a\r\nb", "/")],
)
def test_a_login_redirects_to_this_server_only(target, path):
    """A redirect to another site after the login would help phishing."""
    assert local_path(target) == path


@looped
async def test_cancel_is_off_unless_allowed_and_needs_our_form(bench):
    """Without `allow_cancel` there is no button and no endpoint; with it only the page's own form cancels a job."""
    bench.fake.add_job("busy")
    async with browsing(bench) as (agent, client):
        await until(lambda: agent.tailers)
        assert 'action="/cancel"' not in (await job_page(client, "busy")).text
        assert (await client.post("/cancel", data={"service": "fake", "id": "busy"})).status_code == 403
    async with browsing(bench, allow_cancel=True) as (agent, client):
        page = (await job_page(client, "busy")).text
        form_token = re.findall(r'name="form_token" value="([0-9a-f]{64})"', page)[0]
        form = {"service": "fake", "id": "busy", "form_token": form_token}
        assert (await client.post("/cancel", data={**form, "form_token": "x"})).status_code == 403
        foreign = await client.post("/cancel", data=form, headers={"origin": "http://evil.example"})
        assert foreign.status_code == 403
        assert (await client.get("/cancel")).status_code == 405
        # with "no-referrer" a browser would send the form with the origin "null"
        assert (await job_page(client, "busy")).headers["referrer-policy"] == "same-origin"
        assert ("cancel", "busy") not in bench.fake.calls
        assert (await client.post("/cancel", data=form)).status_code == 303
        assert ("cancel", "busy") in bench.fake.calls


@looped
async def test_the_pages_of_pipelines_and_agent(bench):
    """Runs, success rate and durations of pipelines; endpoints and services of the agent."""
    for number in range(3):
        state = JobState.FAILED if number == 2 else JobState.SUCCEEDED
        ended(bench, f"run-{number}", "x", job_name="nightly", state=state)
    async with browsing(bench) as (_, client):
        await relayed(bench, "run-0", "run-1", "run-2")
        pipelines = (await client.get("/pipelines")).text
        agent_page = (await client.get("/agent")).text
        none = await client.get("/job?service=none&id=x")
    assert ">nightly</a>" in pipelines
    assert "67%" in pipelines
    assert pipelines.count("<rect") == 3
    assert bench.collector.http_url in agent_page
    assert "reachable" in agent_page
    assert none.status_code == 404


@looped
async def test_the_page_of_the_agent_has_what_an_operator_needs(bench):
    """Retries and last error of endpoints, age of the backlog, dead letter with its command, files, versions."""
    ended(bench, "bad", "x")
    bench.collector.always("logs", Reply(400, message="no such field"))
    async with browsing(bench) as (agent, client):
        await until(lambda: agent.endpoints.rejected)
        rejected = html.unescape((await client.get("/agent")).text)
        bench.collector.always("logs", Reply(503, message="busy"))
        bench.fake.add_job("busy")
        bench.fake.add_lines("busy", "y")
        await until(lambda: agent.endpoints.outages.get("logs") and agent.followed_jobs())
        async with client.stream("GET", "/events/agent") as answer:
            lines = answer.aiter_lines()
            waiting = r'<dt>Waiting</dt><dd class="num">[1-9]\d* <span class="dim">for '
            while not re.search(waiting, down := (await next_event(lines, "agent"))["html"]):
                pass
    config = bench.directory / "config.toml"
    for text in (f"tailspan agent dead-letter --config {config}", str(config), str(bench.state_dir), __version__):
        assert text in rejected
    assert re.search(r"[\d.]+ (B|KiB) of at most 10 GiB in <code>", rejected)
    assert "1 record rejected since the agent started: 1 invalid" in rejected
    assert re.search(r"retrying since <time .*?</time>, \d+ tr\w+: HTTP 503: busy", down)


@looped
async def test_viewing_a_job_does_not_use_up_a_pipeline_name(bench):
    """The number of pipeline names is limited: only followed jobs count."""
    bench.fake.add_job("other", job_name="curious")
    watch = {"discover": True, "name": "watched-*"}
    async with browsing(bench, watch, max_pipeline_names=1) as (_, client):
        assert ">curious" in (await job_page(client, "other")).text
        ended(bench, "real", "x", job_name="watched-one")
        await relayed(bench, "real")
        assert ">watched-one</a>" in (await client.get("/pipelines")).text


@looped
async def test_problems_of_the_agent_are_on_every_page(bench):
    """A paused endpoint is a banner, not just a line in a log."""
    bench.fake.add_job("busy")
    bench.fake.add_lines("busy", "x")
    bench.collector.always("logs", Reply(401))
    async with browsing(bench) as (agent, client):
        await until(agent.problems)
        for path in ("/", "/pipelines", "/agent", "/job?service=fake&id=busy"):
            text = (await client.get(path)).text
            assert re.search(r"Logs</strong>: paused since <time .*</time>, 1 try: HTTP 401; check otlp.endpoint", text)


@looped
async def test_a_job_is_shown_in_the_order_in_which_it_is_read(bench):
    """Head, reason with a closed traceback, log, side column with delivery, runs and attributes; hits are marked."""
    trace = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "    boom()", "ValueError: no"]
    fields = {"job_name": "nightly", "attributes": {"team": "geo"}, "instance_id": "worker-7"}
    ended(bench, "sad", "INFO a", *trace, state=JobState.FAILED, exit_code=3, **fields)
    ended(bench, "off", "INFO a", state=JobState.CANCELED, **fields)
    async with browsing(bench) as (_, client):
        await relayed(bench, "sad", "off")
        page, canceled = (await job_page(client, "sad")).text, (await job_page(client, "off")).text
        found = (await job_page(client, "sad", q="BOOM")).text
        pipelines = (await client.get("/pipelines")).text
    parts = ["<h1>nightly", "exit 3", "worker-7", "Why it failed", "<details><summary>Traceback", 'id="log"',
             "5 of 5 lines delivered", "This pipeline", "Attributes", "team"]  # fmt: skip
    places = {part: page.index(part) for part in parts}
    assert sorted(parts, key=places.__getitem__) == parts
    assert "    <mark>boom</mark>()" in found
    assert '<section class="failure"' in page
    assert '<section class="failure"' not in canceled
    assert ">0%<" in pipelines, "one failed and one canceled run: nothing succeeded, of one run"


@looped
async def test_a_log_is_downloaded_whole_and_without_secrets(bench, monkeypatch):
    """As text, as long as it may be; its name is safe; what cannot be read further is said in the last line."""
    monkeypatch.setenv("PAGE_SECRET", "hunter2hunter2")
    lines = [f"line {number} hunter2hunter2 \x1b[31m<b>" for number in range(3000)]
    ended(bench, "big", *lines, job_name='a/../b \r\n"c')
    async with browsing(bench, more='[redact]\nenv = ["PAGE_SECRET"]') as (_, client):
        await relayed(bench, "big")
        answer = await client.get("/log", params={"service": "fake", "id": "big"})
        bench.fake.fail_next("read_logs", ServiceUnavailableError("gone"))
        broken = await client.get("/log", params={"service": "fake", "id": "big"})
        none = await client.get("/log", params={"service": "fake", "id": "no"})
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="a-..-b-c.log"'
    assert answer.text.splitlines() == [f"line {number} [REDACTED] <b>" for number in range(3000)]
    assert broken.text == "(tailspan: the log cannot be read further: gone)\n"
    assert none.status_code == 404


@pytest.mark.parametrize("strips", [True, False])
@looped
async def test_the_page_works_below_the_path_of_a_proxy(bench, strips):
    """All links, forms, redirects and cookies have the path, whether or not the proxy takes it away."""
    ended(bench, "j1", "ERROR x", "y", state=JobState.FAILED, job_name="etl")
    bench.fake.add_job("busy")
    sent = "" if strips else "/tools/tailspan"
    keys = {"token": TOKEN, "public_url": "https://tools.test/tools/tailspan/", "allow_cancel": True}
    async with browsing(bench, **keys) as (agent, client):
        await relayed(bench, "j1")
        client.headers["host"] = "tools.test"
        client.headers["authorization"] = "Basic dXNlcjpwYXNzd29yZA=="  # of the proxy's own login
        first = await client.get(f"{sent}/agent?x=1")
        assert first.headers["location"] == "/tools/tailspan/login?next=%2Fagent%3Fx%3D1"
        login = await client.post(f"{sent}/login", data={"token": TOKEN, "next": "/agent"})
        assert login.headers["location"] == "/tools/tailspan/agent"
        assert "Path=/tools/tailspan;" in login.headers["set-cookie"]
        client.headers["cookie"] = login.headers["set-cookie"].partition(";")[0]
        paths = ["/", "/job?service=fake&id=j1", "/job?service=fake&id=busy", "/job?service=fake&id=j1&q=x", "/agent"]
        for path in (*paths, "/pipelines", "/job?service=fake&id=none"):
            text = (await client.get(sent + path)).text
            links = re.findall(r'(?:href|src|action|data-events)="(/[^"]*)"', text)
            assert [link for link in links if not link.startswith("/tools/tailspan/")] == [], path
        jump = await client.get(f"{sent}/job?service=fake&id=j1&jump=error")
        assert jump.headers["location"].startswith("/tools/tailspan/job?")
        assert (await client.get(f"{sent}/static/page.js")).status_code == 200
        assert agent.server.link == "https://tools.test/tools/tailspan"
    del client.headers["cookie"]


@looped
async def test_a_proxy_with_its_own_login_can_send_the_token(bench):
    """The proxy adds the header, so its users need no second login; forms come from its own address."""
    bench.fake.add_job("busy")
    keys = {"token": "proxys-own-token", "public_url": "https://tools.test", "allow_cancel": True}
    async with browsing(bench, **keys) as (agent, client):
        await until(lambda: agent.tailers)
        client.headers["authorization"] = "Bearer proxys-own-token"
        client.headers["origin"] = "https://tools.test"
        page = (await job_page(client, "busy")).text
        form_token = re.findall(r'name="form_token" value="([0-9a-f]{64})"', page)[0]
        form = {"service": "fake", "id": "busy", "form_token": form_token}
        assert (await client.post("/cancel", data=form)).status_code == 303


@looped
async def test_many_jobs_come_in_pages(bench):
    """Only the rows of one page are rendered; all jobs are counted and can be found."""
    bench.services["fake"] = FakeService(poll_min_s=30, poll_max_s=60, polls_are_free=False)
    for number in range(1_000):
        bench.fake.add_job(f"job-{number:04}", job_name=f"pipeline-{number % 50}")
    async with browsing(bench) as (agent, client):
        await until(lambda: sum(tailer.followed is not None for tailer in agent.tailers) == 1_000)
        page = (await client.get("/")).text
        last = (await client.get("/?page=20")).text
        one = (await client.get("/?q=job-0471")).text
    assert len(listed_ids(page)) == len(listed_ids(last)) == 50
    assert page.count("1–50 of 1,000") == 2, "paging is above and below the table"
    assert page.rindex('rel="next"') > page.index("</table>")
    assert listed_ids(one) == ["job-0471"]


def test_templates_and_files_of_the_page_are_in_the_package():
    """An installed agent has its page: Hatchling packs the files of the package."""
    import tailspan_agent.web

    folder = Path(tailspan_agent.web.__file__).parent
    assert {"page.css", "page.js", "icon.svg"} <= {path.name for path in (folder / "static").iterdir()}
    assert {"base.html", "jobs.html", "job.html"} <= {path.name for path in (folder / "templates").iterdir()}
