"""The agent's page in a real browser (Debian's chromium, driven by playwright): `make test-services`."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from tailspan.logs.page import TaskRef
from tailspan.models import JobState, TaskRun
from tailspan.testing import FakeService, FakeTaskService
from tailspan_agent.agent import Agent
from tailspan_agent.web import event_stream
from tests.fakes.agents import Bench, until

pytestmark = [
    pytest.mark.services,
    # playwright leaves its driver's pipe to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\"><b>bold</b>"
JOBS = 10_000


class Site:
    """A running agent with its page, for a browser in another thread.

    Attributes:
        url: The URL of the page.
        fake: The service with the jobs.
    """

    def __init__(self, url: str, fake: FakeService, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.fake = fake
        self._loop = loop

    def call(self, change: Callable[..., object], *args: object, **keys: object) -> None:
        """Change the service in the agent's loop, and wait for the change."""

        async def run() -> None:
            change(*args, **keys)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)


@contextmanager
def serving(
    bench: Bench, tab, ready: Callable[[Agent], bool] = lambda _: True, watches: Sequence[dict] = (), **keys
) -> Iterator[Site]:
    """Run an agent in a thread until the block ends and the tab has left it; the block starts once `ready` is true."""
    started, ended = threading.Event(), threading.Event()
    found: list[Site] = []

    async def main() -> None:
        async with bench.running(*watches, listen="127.0.0.1:0", **keys) as agent:
            await until(lambda: ready(agent))
            assert agent.server is not None
            found.append(Site(agent.server.url, bench.fake, asyncio.get_running_loop()))
            started.set()
            await asyncio.to_thread(ended.wait)

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
        yield found[0]
    finally:
        tab.goto("about:blank")
        ended.set()
        thread.join(30)


def add(bench: Bench, job_id: str, *lines: str, state: JobState = JobState.SUCCEEDED, **fields) -> None:
    """Add a job with its lines."""
    bench.fake.add_job(job_id, **fields)
    bench.fake.add_lines(job_id, *lines)
    bench.fake.set_state(job_id, state)


def seen(bench: Bench, *job_ids: str) -> Callable[[Agent], bool]:
    """Return a condition: the collector has the receipts of these jobs."""
    return lambda _: set(job_ids) <= set(bench.receipts())


@pytest.fixture(scope="module")
def chromium():
    """Start the browser once for all tests of this file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """Open a browser context for a test; no script may fail in it, and no policy may be violated."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert page.problems == []


def colour(tab, name: str = "background-color") -> tuple[int, ...]:
    """Return a computed colour of the page's body."""
    text = tab.evaluate("name => getComputedStyle(document.body).getPropertyValue(name)", name)
    return tuple(int(float(part)) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def luminance(rgb: tuple[int, ...]) -> float:
    """Return the relative luminance of WCAG."""
    parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_every_page_opens_from_its_tab(bench, tab):
    """Jobs, a job, pipelines and the agent are one click from each other, without an error in the console."""
    add(bench, "j-1", "one", "two", job_name="nightly")
    with serving(bench, tab, seen(bench, "j-1")) as site:
        tab.goto(site.url)
        for name in ("Pipelines", "Agent", "Jobs"):
            tab.locator("nav a", has_text=name).first.click()
            tab.get_by_role("heading", level=1, name=name).wait_for()
        tab.get_by_role("link", name="nightly").click()
        tab.locator("#L2").wait_for()
        assert tab.locator("#lines td.text").all_inner_texts() == ["one", "two"]


def test_a_job_that_starts_appears_and_changes_without_a_reload(bench, tab):
    """A new job, its progress and its end appear in the loaded page by themselves."""
    with serving(bench, tab) as site:
        tab.goto(site.url)
        tab.locator("#empty", has_text="tailspan run -- echo hello").wait_for()
        tab.evaluate("window.sameDocument = true")
        site.call(site.fake.add_job, "new", job_name="train", total_tasks=4, finished_tasks=1)
        tab.locator("#rows tr", has_text="train").locator("progress").wait_for()
        site.call(add_end, site.fake, "new")
        tab.locator("#rows tr", has_text="succeeded").wait_for()
        assert tab.locator("#rows tr").count() == 1
        assert tab.evaluate("window.sameDocument") is True


def add_end(fake: FakeService, job_id: str) -> None:
    """Let a job end."""
    fake.add_lines(job_id, "bye")
    fake.set_state(job_id, JobState.SUCCEEDED)


def test_the_log_of_a_running_job_is_followed(bench, tab):
    """New lines are appended, each once, while the page is open."""
    bench.fake.add_job("busy", job_name="train")
    bench.fake.add_lines("busy", "first")
    with serving(bench, tab, lambda _: bool(bench.bodies("busy"))) as site:
        tab.goto(f"{site.url}/job?service=fake&id=busy")
        tab.locator("#lines", has_text="first").wait_for()
        for text in ("second", "third"):
            site.call(site.fake.add_lines, "busy", text)
            tab.locator("#lines", has_text=text).wait_for()
        assert tab.locator("#lines td.text").all_inner_texts() == ["first", "second", "third"]
        site.call(site.fake.add_lines, "busy", *(f"line {number}" for number in range(300)))
        tab.locator("#lines", has_text="line 299").wait_for()
        box = "document.querySelector('.logbox')"
        at_end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 40"
        tab.wait_for_function(at_end)
        # Who scrolls up stays there, and returns by the button.
        tab.evaluate("document.querySelector('.logbox').scrollTop = 0")
        tab.get_by_role("button", name="Jump to newest").wait_for()
        site.call(site.fake.add_lines, "busy", "one more")
        tab.get_by_role("button", name="Jump to newest (1 new)").wait_for()
        assert tab.evaluate("document.querySelector('.logbox').scrollTop") == 0
        tab.get_by_role("button", name="Jump to newest").click()
        tab.wait_for_function(at_end)
        site.call(site.fake.add_lines, "busy", "and one")
        tab.locator("#lines", has_text="and one").wait_for()
        tab.wait_for_function(at_end)
        assert not tab.get_by_role("button", name="Jump to newest").is_visible()


def test_search_by_key_finds_jobs_and_lines(bench, tab):
    """The slash focuses the search; the searched text is in the URL."""
    add(bench, "a-1", "needle here", "hay", job_name="alpha")
    add(bench, "b-1", "x", job_name="beta")
    with serving(bench, tab, seen(bench, "a-1", "b-1")) as site:
        tab.goto(site.url)
        tab.keyboard.press("/")
        tab.keyboard.type("alph")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**q=alph**")
        assert tab.locator("#rows td.name a").all_inner_texts() == ["alpha"]
        tab.get_by_role("link", name="alpha").click()
        # The script shows its buttons once it handles keys; on a busy machine lines appear long before.
        tab.get_by_role("button", name="Keyboard shortcuts").wait_for()
        tab.keyboard.press("/")
        tab.keyboard.type("needle")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**q=needle**")
        assert tab.locator("#lines td.text").all_inner_texts() == ["needle here"]


def test_keys_go_through_the_table_and_back(bench, tab):
    """j and k move a visible focus, Enter opens, u goes up, ? lists the keys, Tab finds the skip link."""
    add(bench, "a-1", "x", job_name="alpha")
    add(bench, "b-1", "x", job_name="beta")
    with serving(bench, tab, seen(bench, "a-1", "b-1")) as site:
        tab.goto(site.url)
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.getAttribute('href')") == "#main"
        names = tab.locator("#rows td.name a").all_inner_texts()
        tab.keyboard.press("j")
        tab.keyboard.press("j")
        assert names[1] in tab.evaluate("document.activeElement.innerText")
        marked = "getComputedStyle(document.querySelector('#rows tr:focus td')).boxShadow"
        assert tab.evaluate(marked) != "none"
        tab.keyboard.press("k")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**/job?**")
        tab.get_by_role("heading", level=1, name=names[0]).wait_for()
        tab.keyboard.press("?")
        tab.locator("dialog#keys[open]").wait_for()
        tab.keyboard.press("Escape")
        tab.locator("dialog#keys[open]").wait_for(state="hidden")
        tab.keyboard.press("u")
        tab.get_by_role("heading", level=1, name="Jobs").wait_for()


def test_keys_can_be_turned_off(bench, tab):
    """A letter then does nothing, also after a reload; the button still lists the keys."""
    add(bench, "a-1", "x", job_name="alpha")
    with serving(bench, tab, seen(bench, "a-1")) as site:
        tab.goto(site.url)
        tab.keyboard.press("?")
        tab.get_by_label("Enable keyboard shortcuts").uncheck()
        tab.keyboard.press("Escape")
        tab.reload()
        for key in ("j", "t", "/", "?"):
            tab.keyboard.press(key)
        assert tab.evaluate("document.activeElement.tagName") == "BODY"
        assert tab.evaluate("document.documentElement.dataset.theme") is None
        tab.get_by_role("button", name="Keyboard shortcuts").click()
        tab.get_by_label("Enable keyboard shortcuts").check()
        tab.get_by_role("button", name="Close").click()
        tab.keyboard.press("/")
        assert tab.evaluate("document.activeElement.type") == "search"


def test_a_service_is_chosen_by_the_keyboard_without_leaving(bench, tab):
    """Arrow keys change the selection; only the button submits it."""
    bench.services["other"] = FakeService("other", identity="other")
    add(bench, "a-1", "x", job_name="alpha")
    with serving(bench, tab, watches=[{"discover": True}, {"service": "other", "discover": True}]) as site:
        tab.goto(site.url)
        tab.get_by_label("Service").focus()
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowDown")
        assert tab.get_by_label("Service").input_value() == "other"
        tab.wait_for_timeout(300)
        assert "service=" not in tab.url
        tab.get_by_role("button", name="Search").click()
        tab.wait_for_url("**service=other**")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_switch(bench, tab, scheme):
    """The system's setting applies, the switch reverses it and is stored; text has the contrast of WCAG AA."""
    tab.emulate_media(color_scheme=scheme)
    with serving(bench, tab) as site:
        tab.goto(site.url)
        for is_dark in (scheme == "dark", scheme != "dark"):
            ground, text = luminance(colour(tab)), luminance(colour(tab, "color"))
            assert (ground < text) is is_dark
            assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 4.5
            tab.keyboard.press("t")
        tab.keyboard.press("t")
        tab.reload()
        assert (luminance(colour(tab)) < 0.5) is (scheme != "dark")


def test_no_text_of_a_job_acts_in_the_browser(bench, tab):
    """Names, lines and errors with markup are shown as text, also in a live update."""
    add(bench, "evil", EVIL, f"ERROR {EVIL}", state=JobState.FAILED, job_name=EVIL, error=EVIL, attributes={EVIL: EVIL})
    bench.fake.add_job("live", job_name=f"live {EVIL}")
    bench.fake.add_lines("live", EVIL)
    with serving(bench, tab, lambda agent: seen(bench, "evil")(agent) and bool(bench.bodies("live"))) as site:
        for path in ("/", "/job?service=fake&id=evil", "/pipelines", "/agent"):
            tab.goto(site.url + path)
            assert "Tailspan" in tab.title()
            assert tab.locator("main b", has_text="bold").count() == 0
            assert tab.locator("main script, main img").count() == 0
        tab.goto(f"{site.url}/job?service=fake&id=live")
        site.call(site.fake.add_lines, "live", f"later {EVIL}")
        tab.locator("#lines", has_text="later").wait_for()
        assert tab.locator("#lines td.text").last.inner_text() == f"later {EVIL}"
        assert tab.title() != "owned"


def hide(tab, hidden: bool) -> None:
    """Hide a tab, or show it again."""
    script = "hidden => Object.defineProperty(document, 'hidden', {value: hidden, configurable: true})"
    tab.evaluate(script, hidden)
    tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_many_tabs_do_not_keep_each_other_from_loading(bench, tab):
    """Only the visible tab holds one of the six connections; a tab that is shown again resumes."""
    bench.fake.add_job("busy", job_name="train")
    bench.fake.add_lines("busy", "first")
    with serving(bench, tab, lambda _: bool(bench.bodies("busy"))) as site:
        tabs = [tab, *(tab.context.new_page() for _ in range(8))]
        for one in tabs:
            one.goto(f"{site.url}/job?service=fake&id=busy", timeout=10_000)
            hide(one, True)
        hide(tab, False)
        site.call(site.fake.add_lines, "busy", "second")
        tab.locator("#lines", has_text="second").wait_for()
        for one in tabs[1:]:
            one.close()


def test_live_updates_leave_the_focus_where_it_is(bench, tab):
    """Moving through links by the keyboard does not start over every second."""
    bench.fake.add_job("busy", job_name="train")
    with serving(bench, tab, lambda agent: bool(agent.followed_jobs())) as site:
        tab.goto(site.url)
        for number, link in enumerate(("#rows a", ".chips a")):
            tab.locator(link).first.focus()
            text = tab.evaluate("document.activeElement.pathname + document.activeElement.search")
            site.call(site.fake.add_job, f"new-{number}")
            tab.locator("#rows tr", has_text=f"new-{number}").wait_for()
            assert tab.evaluate("document.activeElement.pathname + document.activeElement.search") == text


def test_a_page_that_is_not_live_is_labelled(bench, tab, monkeypatch):
    """With too many live pages, a page stays as it was loaded and says that it is not live."""
    monkeypatch.setattr(event_stream, "_MAX_STREAMS", 0)
    with serving(bench, tab) as site:
        tab.goto(site.url)
        tab.get_by_text("not live").wait_for()
    tab.problems.clear()  # the browser reports the response 503


def test_a_job_is_canceled_by_its_button(bench, tab):
    """After a confirmation the job is cancelled, by the browser's own form with the browser's own headers."""
    bench.fake.add_job("busy", job_name="train")
    tab.on("dialog", lambda dialog: dialog.accept())
    with serving(bench, tab, lambda agent: bool(agent.tailers), allow_cancel=True) as site:
        tab.goto(f"{site.url}/job?service=fake&id=busy")
        tab.get_by_role("button", name="Cancel the job").click()
        tab.locator("#jobhead", has_text="canceled").wait_for()
        assert ("cancel", "busy") in bench.fake.calls


def test_the_streams_of_a_log_can_be_hidden_and_a_line_is_linked(bench, tab):
    """The first error is one key away, and a line's number is a link to it that marks it."""
    lines = [f"line {number}" for number in range(1, 3001)]
    lines[2499] = "ERROR it broke"
    add(bench, "big", *lines, state=JobState.FAILED, job_name="big")
    with serving(bench, tab, seen(bench, "big")) as site:
        tab.goto(f"{site.url}/job?service=fake&id=big")
        tab.keyboard.press("e")
        tab.wait_for_url("**#L2500")
        assert tab.locator("#lines tr:target td.text").inner_text() == "ERROR it broke"
        assert tab.locator("#lines tr").count() <= 1000


def test_tasks_are_a_chart_whose_rows_filter_the_log(bench, tab):
    """An update keeps the focus; a click on a task shows its lines only; a bar has its colour, a text its own."""
    bench.services["fake"] = fake = FakeTaskService("fake")
    fake.add_job("dag", job_name="etl")
    started = datetime.now(UTC) - timedelta(minutes=1)
    evil = TaskRun(task_id="evil", name=EVIL, started_at=started)
    fake.set_task("dag", TaskRun(task_id="t", name="load", started_at=started))
    fake.set_task("dag", evil)
    fake.add_lines("dag", "of load", task=TaskRef("t", "load"))
    fake.add_lines("dag", "of evil", task=TaskRef("evil", EVIL))
    with serving(bench, tab, lambda agent: bool(agent.followed_jobs())) as site:
        tab.goto(f"{site.url}/job?service=fake&id=dag")
        rows = tab.locator("#tasks tbody.attempts tr")
        rows.nth(1).wait_for()
        rows.nth(0).locator("th a").focus()
        site.call(fake.set_task, "dag", dataclasses.replace(evil, result="failure", finished_at=datetime.now(UTC)))
        tab.locator("#tasks tbody.attempts tr", has_text="failed").wait_for()
        assert tab.evaluate("document.activeElement.textContent") == "load"
        assert tab.locator("#tasks td.axis rect.failed").count() == 1
        box = tab.locator("#tasks td.state .dot").nth(1).bounding_box()
        assert (box["width"], box["height"]) == (tab.locator("#jobhead .dot").bounding_box()["width"],) * 2
        tab.keyboard.press("Enter")
        tab.locator(".filter", has_text="load").wait_for()
        assert tab.locator("#lines td.text").all_inner_texts() == ["of load"]
        assert tab.title() != "owned"
        site.call(fake.add_lines, "dag", "more of load", task=TaskRef("t", "load"))
        tab.locator("#lines", has_text="more of load").wait_for()
        tab.locator(".filter a").click()
        tab.locator("#lines", has_text="of evil").wait_for()
        tab.set_viewport_size({"width": 390, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_phone_shows_all_without_scrolling_sideways(bench, tab):
    """At 390 px the page is no wider than the screen; wide tables scroll by themselves."""
    add(bench, "j-1", "x" * 5000, "ERROR y", state=JobState.FAILED, job_name="nightly-" + "long-" * 20)
    tab.set_viewport_size({"width": 390, "height": 780})
    with serving(bench, tab, seen(bench, "j-1")) as site:
        for path in ("/", "/job?service=fake&id=j-1", "/pipelines", "/agent"):
            tab.goto(site.url + path)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, path


def test_the_pages_work_without_javascript(bench, chromium):
    """Without scripts the table, the search, a job and its log still work."""
    add(bench, "a-1", "needle", "hay", job_name="alpha")
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    with serving(bench, tab, seen(bench, "a-1")) as site:
        tab.goto(f"{site.url}/?q=alpha")
        tab.get_by_role("link", name="alpha").click()
        tab.locator("[data-search]").fill("needle")
        tab.locator("[data-search]").press("Enter")
        tab.wait_for_url("**q=needle**")
        assert tab.locator("#lines td.text").all_inner_texts() == ["needle"]
    context.close()


def test_ten_thousand_jobs_do_not_slow_the_page_down(bench, tab):
    """With 10,000 running jobs a page is a small document, and a search finds its job at once."""
    for number in range(JOBS):
        bench.fake.add_job(f"j-{number}", job_name=f"pipeline-{number % 50}")
    with serving(bench, tab, lambda agent: len(agent.followed_jobs()) == JOBS) as site:
        tab.goto(site.url, timeout=30_000)
        assert tab.locator("#rows tr").count() <= 200
        assert "10,000" in tab.locator("#head").inner_text()
        tab.goto(f"{site.url}/?q=j-9999", timeout=30_000)
        assert tab.locator("#rows tr").count() == 1
