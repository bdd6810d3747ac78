"""The look of the page: contrast, caching, accessible names and correct claims."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

import tailspan_agent.web
from tailspan.models import JobState
from tailspan.testing import FakeService
from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.web.formatting import ago, duration, marked, time_tag, visible
from tests.fakes.agents import looped, until
from tests.integration.agent.web.test_page import browsing, ended, job_page, relayed

WEB = Path(tailspan_agent.web.__file__).parent
CSS = (WEB / "static" / "page.css").read_text()
Colour = tuple[float, ...]


def palette(scheme: str) -> dict[str, Colour]:
    """Return the colours of a scheme by name."""
    start = CSS.index(":root {" if scheme == "light" else ':root[data-theme="dark"] {')
    found = re.findall(r"--(\w+): #([0-9a-f]{3,6});", CSS[start : CSS.index("}", start)])
    wide = {name: "".join(digit * (6 // len(code)) for digit in code) for name, code in found}
    return {name: tuple(int(code[at : at + 2], 16) for at in (0, 2, 4)) for name, code in wide.items()}


def contrast(one: Colour, other: Colour) -> float:
    """Return the contrast ratio of WCAG."""
    light = []
    for colour in (one, other):
        parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        light.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_and_all_edges_have_the_contrast_of_wcag_aa(scheme):
    """Text has 4.5 on each of its backgrounds, also in a linked line; the edges of controls have 3."""
    colours = palette(scheme)
    share = int(re.search(r":target td .*?--accent\) (\d+)%", CSS)[1]) / 100
    linked = tuple(share * a + (1 - share) * b for a, b in zip(colours["accent"], colours["card"], strict=True))
    texts = dict.fromkeys(("text", "dim", "accent", "bad", "warn", "ok"), ("bg", "card", "soft"))
    pairs = [(text, colours[ground]) for text, grounds in texts.items() for ground in grounds]
    pairs += [(text, linked) for text in ("text", "dim", "bad", "warn", "accent")]
    pairs += [(text, colours["warnbg"]) for text in ("text", "warn", "accent")]
    pairs += [(text, colours["badbg"]) for text in ("text", "bad", "dim")]
    assert [(text, ground) for text, ground in pairs if contrast(colours[text], ground) < 4.5] == []
    edge = re.search(r"button, .button, input, select {.*?border: 1px solid var\(--(\w+)\)", CSS)[1]
    assert all(contrast(colours[edge], colours[ground]) >= 3 for ground in ("bg", "card"))


def test_every_list_of_terms_has_a_layout():
    """The class of each `<dl>` in the templates is a class of the style sheet: a rename must change both."""
    html = "".join(file.read_text() for file in (WEB / "templates").glob("*.html"))
    names = {name for classes in re.findall(r'<dl class="([^"{]+)"', html) for name in classes.split()}
    assert "summary" in names
    assert [name for name in sorted(names) if f".{name} " not in CSS and f".{name}." not in CSS] == []


@looped
async def test_a_browser_revalidates_static_files(bench):
    """After an update the new page does not run the old script; an unchanged file is not sent again."""
    async with browsing(bench) as (_, client):
        script = await client.get("/static/page.js")
        again = await client.get("/static/page.js", headers={"if-none-match": script.headers["etag"]})
    assert script.headers["cache-control"] == "no-cache"
    assert script.headers["x-content-type-options"] == "nosniff"
    assert again.status_code == 304


@looped
async def test_a_job_that_is_not_followed_is_never_silent(bench):
    """Its lines are not read, so silence means nothing; and the page labels times as UTC."""
    began = datetime.now(UTC) - timedelta(hours=5)
    bench.fake.add_job("other", job_name="nightly", started_at=began)
    watches = [{"discover": True, "name": "watched-*"}]
    async with bench.running(*watches, listen="127.0.0.1:0") as agent:
        for number in range(12):
            agent._context.pipeline_stats.histories.add(
                PastRun(
                    pipeline="nightly", job_id=f"{number}", identity="fake", trace_id="0" * 32, result="success",
                    started_unix_nano=1, ended_unix_nano=number, duration_s=36_000.0, quiet_s=1.0,
                )
            )  # fmt: skip
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            page = (await job_page(client, "other")).text
    assert "usually 10h" in page
    assert "silent" not in page
    assert "times are UTC" in page


@looped
async def test_a_job_that_was_never_followed_has_the_times_of_its_service(bench):
    """The page shows the times of the status; a missing time has no row."""
    began = datetime.now(UTC) - timedelta(hours=5, minutes=1)
    times = {"submitted_at": began - timedelta(hours=2), "started_at": began}
    bench.fake.add_job("other", job_name="nightly", **times)
    bench.fake.add_job("done", job_name="nightly", **times)
    bench.fake.set_state("done", JobState.SUCCEEDED, finished_at=began + timedelta(hours=4))
    bench.fake.add_job("pending", job_name="nightly", state=JobState.PENDING, submitted_at=began, started_at=None)
    async with browsing(bench, {"discover": True, "name": "watched-*"}) as (_, client):
        times_by_job, heads = {}, {}
        for job_id in ("other", "done", "pending"):
            page = (await job_page(client, job_id)).text
            times_by_job[job_id] = dict(
                re.findall(r'<dt>(submitted|started|ended)</dt><dd><time datetime="([^"]*)"', page)
            )
            heads[job_id] = re.findall(r"(submitted|started|ended) <time [^>]*>([^<]*)<", page)[0]
    submitted, started, finished = (
        f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"
        for time in (began - timedelta(hours=2), began, began + timedelta(hours=4))
    )
    assert times_by_job == {
        "other": {"submitted": submitted, "started": started},
        "done": {"submitted": submitted, "started": started, "ended": finished},
        "pending": {"submitted": started},
    }
    assert heads == {"other": ("started", "5h ago"), "done": ("ended", "1h ago"), "pending": ("submitted", "5h ago")}


@looped
async def test_jobs_and_pipelines_without_a_name_have_a_readable_label(bench):
    """A job without a name has its id as label; a pipeline without its own name has no search link."""
    for job_id, name in (("first", "known"), ("nameless", ""), ("blank", " ")):
        ended(bench, job_id, "x", job_name=name)
    async with browsing(bench) as (_, client):
        await relayed(bench, "first", "nameless", "blank")
        page, table = (await job_page(client, "nameless")).text, (await client.get("/")).text
        none = (await client.get("/pipelines")).text
    bench.fake.add_job("late", job_name="more")
    async with browsing(bench, max_pipeline_names=1) as (_, client):
        other = (await client.get("/pipelines")).text
    assert "<h1>nameless</h1>" in page
    assert '<a href="/?q=nameless">nameless</a>' in page
    assert "<title>nameless ·" in page
    assert ">nameless</a>" in table
    assert ">blank</a>" in table
    assert "without a name" in none
    assert "></a>" not in none
    assert ">#other#</span>" in other
    assert "other%23" not in other


@looped
async def test_graphics_have_text_labels(bench):
    """A progress bar has a name, a stderr line has a label, and selecting from a list does not navigate."""
    bench.services["other"] = FakeService("other", identity="other")
    bench.fake.add_job("busy", job_name="train", total_tasks=4, finished_tasks=1)
    bench.fake.add_lines("busy", "out", stream="stdout")
    bench.fake.add_lines("busy", "oops", stream="stderr")
    async with browsing(bench, {"discover": True}, {"service": "other", "discover": True}) as (agent, client):
        await until(lambda: agent.followed_jobs())
        table, page = (await client.get("/")).text, (await job_page(client, "busy")).text
        script = (await client.get("/static/page.js")).text
    assert re.findall(r"<progress[^>]*>", table + page) != []
    assert all('aria-label="' in bar for bar in re.findall(r"<progress[^>]*>", table + page))
    labels = re.findall(r'class="from"[^>]*>(.*?)</td><td class="text">([^<]*)', page)
    assert labels == [("", "out"), ('<span class="unseen">stderr</span>', "oops")]
    assert '<select name="service" aria-label="Service">' in table
    assert "requestSubmit" not in script


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (59.94, "59.9 s"), (59.96, "1m 00s"), (3599.6, "1h 00m")],
)
def test_a_duration_does_not_fill_its_unit(seconds, text):
    """A value that rounds up to the next unit is shown in that unit."""
    assert duration(seconds) == text


@looped
async def test_a_job_that_logs_to_stderr_does_not_look_ill(bench):
    """Python's loggers write to stderr: only the level of a line has a colour, the stream is a faint mark."""
    bench.fake.add_job("busy")
    bench.fake.add_lines("busy", "INFO all is well", "WARNING slow", "ERROR no", stream="stderr")
    async with browsing(bench) as (_, client):
        await bench.received(lambda: len(bench.bodies("busy")) == 3)
        page = (await job_page(client, "busy")).text
    assert re.findall(r'<tr id="L\d" class="([^"]*)"', page) == ["info stderr", "warn stderr", "error stderr"]
    rules = re.findall(r"([^{}]*stderr[^{}]*){([^}]*)}", CSS)
    assert [colours for _, colours in rules if "--warn" in colours or "--bad" in colours] == []


def test_times_are_for_programs_and_for_people():
    """A time has its instant, and a text in UTC for browsers without scripts; one beyond the calendar is a number."""
    at = 1_795_954_336_123_456_789
    assert time_tag(at) == (
        '<time datetime="2026-11-29T12:12:16.123Z" data-form="full" title="2026-11-29 12:12:16.123 UTC">'
        "2026-11-29 12:12:16 UTC</time>"
    )
    assert [re.sub("<[^>]*>", "", time_tag(at, form, at + 3_600_000_000_000)) for form in ("clock", "line", "ago")] == [
        "12:12:16",
        "12:12:16.123",
        "1h ago",
    ]
    assert (time_tag(None), time_tag(1 << 70)) == ("", f"{1 << 70} ns")


def test_hits_of_a_search_are_marked_and_stay_text():
    """Each hit, in upper or lower case; what is searched is no pattern, and markup stays text."""
    assert marked("A <b> a", "a") == "<mark>A</mark> &lt;b&gt; <mark>a</mark>"
    assert marked("x.y xzy <i>", "X.Y") == "<mark>x.y</mark> xzy &lt;i&gt;"
    assert marked("<i>", "") == "&lt;i&gt;"


def test_no_duration_is_negative():
    """Clocks differ: what would be negative is nothing."""
    assert duration(-8.311) == "0 ms"


def test_sixty_seconds_are_a_minute():
    """A time is never shown as 60s ago."""
    assert [ago(0, int(seconds * 1e9)) for seconds in (0.9, 59.9, 60)] == ["now", "59s ago", "1m ago"]


def test_characters_that_reorder_text_are_replaced():
    """All of Unicode's list, including the Arabic letter mark."""
    marks = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert visible(marks) == "\ufffd" * len(marks)
