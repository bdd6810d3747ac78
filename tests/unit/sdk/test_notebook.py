"""Cards and tables for notebooks, the card that is live while a verb waits, and rows for pandas."""

from __future__ import annotations

import asyncio
import io
import pickle
import re
import sys
import types
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from tailspan import AsyncJobClient, Client, JobState, Rows, RunResponse, TaskRun, WaitTimeoutError, job_list
from tailspan.models import JobStatus
from tailspan.testing import FakeService

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\"'&"


class Parser(HTMLParser):
    """Collects the tags, the attributes and the text of well-formed HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Record a tag."""
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        """Check that it closes the last open one."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Record text."""
        self.text += data


@pytest.fixture
def service():
    """Return a service in memory with one running job, ``j``, of two lines."""
    service = FakeService()
    service.add_job("j", job_name="etl")
    service.add_lines("j", "one", "two", timestamp_ms=1000, step_ms=250)
    return service


@pytest.fixture
def shown(monkeypatch):
    """Pretend to run in a notebook; return what it displays, in order."""
    shown: list[object] = []

    class Handle:
        def update(self, value):
            shown.append(value)

    def display(value, *, display_id):
        assert display_id is True
        shown.append(value)
        return Handle()

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def status_of(**fields):
    """Return a status with these fields."""
    known = {"job_id": "j", "job_name": "etl", "identity": "i", "trace_id": "t" * 32}
    return RunResponse.from_state(fields.pop("state", JobState.RUNNING), **{**known, **fields})


def test_a_card_shows_state_progress_reason_and_links(monkeypatch, tmp_path):
    """The card has what a reader asks first, and the links of the configuration."""
    config = tmp_path / "config.toml"
    config.write_text('[links]\ntrace = "https://jaeger.example/trace/{trace_id}"\n')
    monkeypatch.setenv("TAILSPAN_CONFIG", str(config))
    begun = datetime(2026, 3, 1, 12, tzinfo=UTC)
    job = status_of(
        state=JobState.FAILED,
        total_tasks=20,
        finished_tasks=9,
        error="ValueError: no rows",
        exit_code=1,
        started_at=begun,
        finished_at=begun + timedelta(seconds=12.3),
        url="https://airflow.example/j",
    )
    card = Parser(job._repr_html_())
    for text in ("etl", "FAILED", "12.3 s", "45% (9 of 20)", "ValueError: no rows", "t" * 32):
        assert text in card.text
    assert [value for name, value in card.attributes if name == "href"] == [
        "https://jaeger.example/trace/" + "t" * 32,
        "https://airflow.example/j",
    ]
    assert ("max", "20") in card.attributes


def test_a_card_needs_no_configuration(monkeypatch):
    """A configuration that cannot be read takes the links away, not the card."""
    monkeypatch.setenv("TAILSPAN_CONFIG", "/nowhere/config.toml")
    assert "etl" in status_of()._repr_html_()


@pytest.mark.parametrize("field", ["job_name", "error", "url", "instance_id", "attributes"])
def test_nothing_that_a_service_reports_becomes_markup(field):
    """Names, reasons, URLs and attributes are text; an URL that is a script is no link."""
    value = f"javascript:{HOSTILE}" if field == "url" else HOSTILE
    job = status_of(**{field: {HOSTILE: value} if field == "attributes" else value})
    for html in (job._repr_html_(), Rows([job])._repr_html_()):
        seen = Parser(html)
        assert "script" not in seen.tags
        assert not any(name.startswith("on") or name == "href" for name, _ in seen.attributes)
        assert "\x1b" not in html


def test_a_long_reason_is_folded():
    """Of a traceback the first line shows; the rest opens."""
    card = Parser(status_of(state=JobState.FAILED, error="first\nsecond")._repr_html_())
    assert {"details", "summary", "pre"} <= card.tags


def test_the_html_is_readable_in_light_and_dark():
    """No text has a colour and nothing a background: both come from the page. No style sheet, no script."""
    job = status_of(state=JobState.FAILED, error="a\nb", total_tasks=3)
    for html in (job._repr_html_(), Rows([job])._repr_html_()):
        assert "background" not in html
        assert {"style", "script"} & Parser(html).tags == set()
        # The one thing with a colour is the dot before a state.
        assert set(re.findall(r'style="color:[^"]*">([^<]*)', html)) == {"&#9679;"}


def test_a_list_of_jobs_is_a_table(service):
    """Each job is a row; columns that no row fills are left out; a slice is a table, too."""
    service.add_job("k", state="FAILED")
    rows = job_list(service=service)
    table = Parser(rows._repr_html_())
    assert all(text in table.text for text in ("state", "RUNNING", "FAILED", "j", "k"))
    assert "machine" not in table.text
    assert isinstance(rows, list)
    assert isinstance(rows[:1], Rows)
    assert rows[0].job_id == "k"
    assert pickle.loads(pickle.dumps(rows)) == rows
    assert "(no rows)" in Rows()._repr_html_()


def test_a_long_list_is_cut(service):
    """Of jobs the newest show, of lines the last; the rest is counted."""
    rows = job_list(service=service) * 150
    assert "and 50 more jobs" in Rows(rows)._repr_html_()
    lines = Rows({"message": f"line {number}", "timestamp": number} for number in range(101))
    html = lines._repr_html_()
    assert "and 1 earlier line" in html
    assert ("line 100" in html, "line 0<" in html) == (True, False)


def test_rows_are_dicts_for_pandas(service):
    """Lines have time, stream, severity and text; jobs and tasks their fields, without what is ours."""
    more = Rows([{"message": "x", "timestamp": 2000, "level": "WARN", "task": "t", "pod": "p"}])
    with Client(service=service) as client:
        lines = client.get_logs("j").to_dicts()
        (job,) = client.list_jobs().to_dicts()
        status = Rows([client.get_status("j")]).to_dicts()[0]
    assert len(lines) == 2
    assert lines[0] == {"time": datetime.fromtimestamp(1, UTC), "stream": None, "severity": None, "text": "one"}
    assert more.to_dicts()[0] == {
        "time": datetime.fromtimestamp(2, UTC),
        "stream": None,
        "severity": "WARN",
        "text": "x",
        "task": "t",
        "pod": "p",
    }
    found = [
        {"message": text, "timestamp": 0} for text in ("a warning: b", "WARNING:root:a", "\x1b[31mERROR: a\x1b[0m")
    ]
    assert [line["severity"] for line in Rows(found).to_dicts()] == [None, "WARN", "ERROR"]
    assert (job["job_id"], job["state"], type(job["state"])) == ("j", "RUNNING", str)
    assert {"duration", "trace_id", "attributes"} <= set(status)
    assert not any(name.startswith("_") for name in (*job, *status))
    task = Rows([TaskRun(task_id="t", name="load", result="success")])
    assert task.to_dicts()[0]["name"] == "load"
    assert "load" in task._repr_html_()
    with pytest.raises(TypeError, match="int is not a row"):
        Rows([1]).to_dicts()


def test_tail_shows_a_card_that_is_live(service, shown, capsys):
    """The card shows the states that the job passes; lines are printed as ever."""
    service.set_state("j", "PENDING")
    with Client(service=service) as client:
        job = client.jobs.get("j")
        original = service.get_job

        async def get_job(job_id):
            service.set_state("j", "RUNNING" if len(shown) == 1 else "SUCCEEDED" if len(shown) > 1 else "PENDING")
            return await original(job_id)

        service.get_job = get_job
        job.tail_logs(0.01, sample_logs=False, settle_seconds=0)
    assert [one.state for one in shown] == ["PENDING", "RUNNING", "SUCCEEDED"]
    assert all(one._repr_html_() for one in shown)
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize("is_async", [False, True])
def test_waiting_shows_a_card_that_ends_as_one_line(service, shown, is_async):
    """The result has a card of its own, so the live one leaves a line."""
    original = service.get_job

    async def get_job(job_id):
        if shown:
            service.set_state("j", "SUCCEEDED")
        return await original(job_id)

    service.get_job = get_job

    async def wait():
        async with AsyncJobClient(service=service) as client:
            return await client.wait_for_job("j", 0.01)

    if is_async:
        ended = asyncio.run(wait())
    else:
        with Client(service=service) as client:
            ended = client.wait_for_job("j", 0.01)
    assert ended.state is JobState.SUCCEEDED
    *cards, line = shown
    assert [one.state for one in cards] == ["RUNNING", "SUCCEEDED"]
    assert repr(line) == "job j succeeded"
    assert "SUCCEEDED" in Parser(line._repr_html_()).text


def test_a_wait_that_fails_keeps_its_error_and_its_card(service, shown):
    """The error is the same as elsewhere."""
    with Client(service=service) as client, pytest.raises(WaitTimeoutError) as caught:
        client.wait_for_job("j", 0.01, timeout=0.05)
    assert isinstance(caught.value.last_status, JobStatus)
    assert shown[-1].state is JobState.RUNNING


def test_a_front_end_that_fails_stops_nothing(service, shown, monkeypatch):
    """The wait goes on without a card."""
    monkeypatch.setattr(sys.modules["IPython.display"], "display", lambda *args, **kwargs: 1 / 0)
    service.set_state("j", "SUCCEEDED")
    with Client(service=service) as client:
        assert client.wait_for_job("j", 0.01).state is JobState.SUCCEEDED


def test_lines_for_a_file_show_no_card(service, shown):
    """Output that the caller sends elsewhere needs no cell."""
    service.set_state("j", "SUCCEEDED")
    file = io.StringIO()
    with Client(service=service) as client:
        client.tail_logs("j", 0.01, sample_logs=False, file=file)
    assert (file.getvalue(), shown) == ("one\ntwo\n", [])


def test_a_terminal_has_no_card(service, shown, monkeypatch):
    """IPython in a terminal has a shell and no kernel."""
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: types.SimpleNamespace())
    service.set_state("j", "SUCCEEDED")
    with Client(service=service) as client:
        client.wait_for_job("j", 0.01)
    assert shown == []


def test_a_service_that_does_not_answer_shows_on_the_card():
    """The last known state stays, with a note."""
    assert "the service does not answer" in status_of(stale=True)._repr_html_()
