"""Dagster's runs as jobs, against a fake that has what was measured of the real server."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan import Client, load_settings
from tailspan._identity import trace_id
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from tailspan.logs.page import LogPage
from tailspan.models import JobState
from tailspan.services.dagster import DagsterOptions, DagsterService
from tailspan.services.registry import open_service
from tailspan.testing import ServiceConformance, check_service
from tests.fakes.dagster import START_S, FakeDagster, error
from tests.fakes.json_api import client_of, pages_of

RECORDED = Path(__file__).parents[4] / "data" / "dagster"


@pytest.fixture
def dagster() -> Iterator[FakeDagster]:
    """A server without runs."""
    with FakeDagster() as fake:
        yield fake


def service_of(dagster: FakeDagster, **options: object) -> DagsterService:
    """The service of that server; it sends as many requests as it likes."""
    keys = {"base_url": dagster.url, "requests_per_second": 10_000, **options}
    return DagsterService("dagster", DagsterOptions.model_validate(keys), environ={})


@pytest.fixture
def client(dagster: FakeDagster, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that server."""
    with client_of("dagster", f"{dagster.url}/graphql", tmp_path) as client:
        yield client


def texts_of(pages: list[LogPage]) -> list[str]:
    """The lines of pages."""
    return [message["message"] for page in pages for message in page.messages()]


def add_flaky(dagster: FakeDagster) -> str:
    """Add a run whose first step is retried once, whose second is skipped and whose third fails."""
    run_id = dagster.add_run(plan={"flaky": [], "extract": ["flaky"], "load": ["extract", "flaky"], "never": ["load"]})
    dagster.event(run_id, "RUN_ENQUEUED", 0, level="INFO")
    dagster.event(run_id, "STEP_WORKER_STARTING", 1, message="Launching.", stepKey="flaky")
    dagster.capture(run_id, "first", 2, "flaky")
    dagster.event(run_id, "STEP_START", 2.5, message="Started.", stepKey="flaky")
    dagster.log(run_id, "about to fail", 3, step="flaky", level="WARNING")
    dagster.write(run_id, "first", b"plain\n", b"to stderr\n")
    cause = error("ValueError", "no\nsecond line", stack=['  File "jobs.py", line 6, in flaky\n    raise ValueError\n'])
    wrapped = error("RetryRequestedFromPolicy", "retry", cause)
    dagster.event(run_id, "STEP_UP_FOR_RETRY", 4, message="Asks for a retry.", stepKey="flaky", error=wrapped)
    dagster.event(run_id, "STEP_WORKER_STARTING", 5, message="Launching.", stepKey="flaky")
    dagster.capture(run_id, "second", 6, "flaky")
    dagster.event(run_id, "STEP_RESTARTED", 6.5, message="Restarted.", stepKey="flaky")
    dagster.write(run_id, "second", b"again\nno newline")
    dagster.event(run_id, "STEP_SUCCESS", 8, message="Finished.", stepKey="flaky")
    dagster.event(run_id, "STEP_SKIPPED", 9, message="Skipped.", stepKey="extract")
    dagster.event(run_id, "STEP_START", 10, message="Started.", stepKey="load")
    dagster.event(run_id, "STEP_FAILURE", 11, message="Failed.", stepKey="load", level="ERROR", error=cause)
    return run_id


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, dagster: FakeDagster) -> None:
        """An ended run with several pages of events and of output, some of it not UTF-8."""
        self.dagster, self.job_id = dagster, add_flaky(dagster)
        dagster.page = 100
        dagster.capture(self.job_id, "long", 12, "never")
        for number in range(210):
            dagster.log(self.job_id, f"line {number // 2}", 13 + number // 4 * 0.5, step="never")
        dagster.write(self.job_id, "long", b"".join(b"output %d \xc3\xa4\n" % number for number in range(4300)))
        dagster.write(self.job_id, "long", b"", b"bad \xff\n" * 3 + b"x" * 100 + b"\n\n\n")
        dagster.end(self.job_id, "FAILURE", 400, "Steps failed: ['load'].")

    def make_service(self) -> DagsterService:
        """A new service."""
        return service_of(self.dagster)


def test_steps_attempts_and_lines(dagster, client):
    """An attempt for each time that a step ran; events and output are lines of their attempt, in the order of time."""
    job_id = add_flaky(dagster)
    dagster.end(job_id, "FAILURE", 12, "Execution of run failed. Steps failed: ['load'].")
    status = client.get_status(job_id)
    assert (status.state, status.job_name, status.job_status) == (JobState.FAILED, "nightly", "FAILURE")
    assert status.error == "Execution of run failed. Steps failed: ['load']."
    assert (status.total_tasks, status.finished_tasks) == (4, 4)
    assert status.url == f"{dagster.url}/runs/{job_id}"
    tasks = client.get_tasks(job_id)
    assert [(task.name, task.attempt, task.result, task.error, task.after) for task in tasks] == [
        ("flaky", 1, "failure", "ValueError: no\nsecond line", ()),
        ("flaky", 2, "success", None, ()),
        ("extract", 1, "skip", None, ("flaky",)),
        ("load", 1, "failure", "ValueError: no\nsecond line", ("extract", "flaky")),
        ("never", 1, "skip", None, ("load",)),
    ]
    times = [(task.submitted_at, task.started_at, task.finished_at) for task in tasks[:2]]
    assert [[one.timestamp() - START_S for one in row] for row in times] == [[1, 2.5, 4], [5, 6.5, 8]]
    assert tasks[0].url == f"{dagster.url}/runs/{job_id}?selection=flaky&logs=step%3Aflaky"
    lines = client.get_logs(job_id)
    shown = [
        (one["message"], one.get("task"), one.get("attempt"), one.get("level"), one.get("stream")) for one in lines
    ]
    assert shown[:23] == [
        ("RUN_ENQUEUED", None, None, "INFO", None),
        ("Launching.", "flaky", 1, "DEBUG", None),
        ("Capturing logs for process (pid: 7).", "flaky", 1, "DEBUG", None),
        ("Started.", "flaky", 1, "DEBUG", None),
        ("about to fail", "flaky", 1, "WARN", None),
        ("plain", "flaky", 1, None, "stdout"),
        ("to stderr", "flaky", 1, None, "stderr"),
        ("Asks for a retry.", "flaky", 1, "DEBUG", None),
        ("RetryRequestedFromPolicy: retry", "flaky", 1, "DEBUG", None),
        ("The above exception was caused by the following exception:", "flaky", 1, "DEBUG", None),
        ("Traceback (most recent call last):", "flaky", 1, "DEBUG", None),
        ('  File "jobs.py", line 6, in flaky', "flaky", 1, "DEBUG", None),
        ("    raise ValueError", "flaky", 1, "DEBUG", None),
        ("ValueError: no", "flaky", 1, "DEBUG", None),
        ("second line", "flaky", 1, "DEBUG", None),
        ("Launching.", "flaky", 2, "DEBUG", None),
        ("Capturing logs for process (pid: 7).", "flaky", 2, "DEBUG", None),
        ("Restarted.", "flaky", 2, "DEBUG", None),
        ("again", "flaky", 2, None, "stdout"),
        ("no newline", "flaky", 2, None, "stdout"),
        ("Finished.", "flaky", 2, "DEBUG", None),
        ("Skipped.", "extract", 1, "DEBUG", None),
        ("Started.", "load", 1, "DEBUG", None),
    ]
    assert [one["message"] for one in client.get_logs(job_id, task="extract")] == ["Skipped."]


def test_a_running_step_and_one_that_waits_for_its_retry(dagster, client):
    """The API has only attempts that ended: the events say when the next one began, and whether it has."""
    job_id = dagster.add_run(plan={"flaky": [], "later": ["flaky"]})
    dagster.event(job_id, "STEP_START", 2, stepKey="flaky")
    assert [(task.started_at is not None, task.result) for task in client.get_tasks(job_id)] == [
        (True, None),
        (False, None),
    ]
    dagster.event(job_id, "STEP_UP_FOR_RETRY", 4, stepKey="flaky", error=error("ValueError", "no"))
    client.get_status(job_id)
    waits = [(task.name, task.started_at is not None, task.result) for task in client.get_tasks(job_id)]
    assert waits == [("flaky", True, "failure"), ("later", False, None), ("flaky", False, None)]
    dagster.event(job_id, "STEP_RESTARTED", 6, stepKey="flaky")
    status = client.get_status(job_id)
    assert (status.state, status.total_tasks, status.finished_tasks) == (JobState.RUNNING, 2, 0)
    assert [task.started_at for task in client.get_tasks(job_id)][1].timestamp() == START_S + 6


def test_dynamic_steps(dagster, client):
    """Steps of a dynamic output have the name of their op; they wait for their own key, a collecting one for all."""
    plan = {"gather": ["two[?]"], "fan": [], "one[?]": ["fan"], "two[?]": ["one[?]"]}
    job_id = dagster.add_run(plan=plan)
    assert client.get_status(job_id).total_tasks == 2
    for place, step in enumerate(("fan", "one[a]", "one[b]", "two[a]", "two[b]", "gather")):
        dagster.event(job_id, "STEP_START", 10 + place, stepKey=step)
        dagster.event(job_id, "STEP_SUCCESS", 10.5 + place, stepKey=step)
    status = client.get_status(job_id)
    assert (status.total_tasks, status.finished_tasks) == (6, 6)
    assert [(task.task_id, task.name, task.after) for task in client.get_tasks(job_id)] == [
        ("fan", "fan", ()),
        ("one[a]", "one", ("fan",)),
        ("one[b]", "one", ("fan",)),
        ("two[a]", "two", ("one[a]",)),
        ("two[b]", "two", ("one[b]",)),
        ("gather", "gather", ("two[a]", "two[b]")),
    ]


# Of each run recorded at a real server: its tasks, what they printed, and the error of the run.
RUNS: dict[str, tuple[list[tuple[str, int, str]], list[tuple[str, str]], str | None]] = {
    "nightly": (
        [("flaky", 1, "failure"), ("flaky", 2, "success")]
        + [(step, 1, "success") for step in ("extract", "slow", "load")],
        [("flaky", "plain print 0"), ("flaky", "err before"), ("flaky", "plain print 1")]
        + [("flaky", "err before"), ("flaky", "err after"), ("extract", "err of a library")]
        + [("slow", f"tick {number} " + "\u00e4\U0001f600" * (number % 9)) for number in range(10)]
        + [("slow", "not \ufffd\ufffd UTF-8"), ("slow", ""), ("slow", "x" * 400), ("slow", "no newline at the end")]
        + [("slow", "err raw \ufffd")],
        None,
    ),
    "broken": (
        [("boom", 1, "failure"), ("never", 1, "skip")],
        [("boom", "about to fail")],
        "Execution of run for \"broken\" failed. Steps failed: ['boom'].",
    ),
    "hanging": ([("hang", 1, "cancellation"), ("never", 1, "skip")], [("hang", "hanging")], None),
    "mapped": (
        [(step, 1, "success") for step in ("fan", "work[a]", "work[b]", "work[c]", "gather")],
        [("", "work a"), ("", "work b"), ("", "work c"), ("", "err gathered")],
        None,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_recorded_at_a_real_server(dagster, client, name):
    """Tasks, output and error of runs as the real API returns them: with retry, failure, cancel and dynamic output."""
    tasks, printed, failure = RUNS[name]
    job_id = dagster.load(RECORDED / f"{name}.json")
    status = client.get_status(job_id)
    assert (status.job_name, status.error) == (name, failure)
    assert (status.total_tasks, status.finished_tasks) == (len({task[0] for task in tasks}),) * 2
    assert [(task.task_id, task.attempt, task.result) for task in client.get_tasks(job_id)] == tasks
    lines = client.get_logs(job_id)
    output = [one for stream in ("stdout", "stderr") for one in lines if one.get("stream") == stream]
    assert sorted((one.get("task") or "", one["message"]) for one in output) == sorted(printed)
    assert [one["timestamp"] for one in lines] == sorted(one["timestamp"] for one in lines)
    events = json.loads((RECORDED / f"{name}.json").read_text())["events"]
    assert {(one["timestamp"], one["message"]) for one in lines}.issuperset(
        (int(event["timestamp"]), text)
        for event in events
        for text in (event["message"] or event["eventType"]).split("\n")
    )
    check_service(lambda: service_of(dagster), job_id=job_id, promises=["pages", "resume"])


@pytest.mark.parametrize(
    ("status", "tags", "message", "expected"),
    [
        ("QUEUED", {}, "", JobState.PENDING),
        ("NOT_STARTED", {}, "", JobState.PENDING),
        ("STARTING", {}, "", JobState.PENDING),
        ("STARTED", {}, "", JobState.RUNNING),
        ("CANCELING", {}, "", JobState.RUNNING),
        ("SUCCESS", {}, "", JobState.SUCCEEDED),
        ("FAILURE", {}, "Execution of run failed.", JobState.FAILED),
        ("FAILURE", {}, "Exceeded maximum runtime of 5 seconds.", JobState.TIMED_OUT),
        ("FAILURE", {"dagster/failure_reason": "START_TIMEOUT"}, "", JobState.TIMED_OUT),
        ("CANCELED", {}, "", JobState.CANCELED),
        ("NEW", {}, "", JobState.UNKNOWN),
    ],
)
def test_states(dagster, client, status, tags, message, expected):
    """Every status has a state of ours."""
    job_id = dagster.add_run(status, tags=[{"key": key, "value": value} for key, value in tags.items()])
    if expected.is_terminal:
        dagster.end(job_id, status, 5, message)
    found = client.get_status(job_id)
    assert found.state is expected
    assert (found.finished_at is not None) is expected.is_terminal
    assert [row.job_id for row in client.list_jobs()] == [job_id]


def test_a_step_that_was_interrupted_and_one_whose_process_is_gone(dagster, client):
    """A canceled run's step fails by an interruption: canceled, not failed. One without an end is an error."""
    canceled = dagster.add_run(plan={"hang": [], "never": ["hang"]})
    dagster.event(canceled, "STEP_START", 2, stepKey="hang")
    dagster.event(canceled, "STEP_FAILURE", 4, stepKey="hang", error=error("DagsterExecutionInterruptedError", ""))
    dagster.end(canceled, "CANCELED", 5)
    assert [task.result for task in client.get_tasks(canceled)] == ["cancellation", "skip"]
    gone = dagster.add_run(plan={"hang": []})
    dagster.event(gone, "STEP_START", 2, stepKey="hang")
    dagster.end(gone, "FAILURE", 5)
    assert [task.result for task in client.get_tasks(gone)] == ["error"]


def test_tags_and_a_run_again(dagster, client):
    """Tags of users are attributes, Dagster's own are details; a run again has a link to the run before."""
    tags = {"team": "geo", "dagster/partition": "2026-11-29", ".dagster/repository": "hidden"}
    first = dagster.add_run("SUCCESS")
    again = dagster.add_run(parentRunId=first, tags=[{"key": key, "value": tags[key]} for key in tags])
    status = client.get_status(again)
    assert status.attributes == {"team": "geo"}
    assert status.details == {"dagster.partition": "2026-11-29"}
    assert status.parent is not None
    assert status.parent.split("-")[1] == trace_id(dagster.url, first)


def test_late_and_equal_events_are_read_once(dagster, monkeypatch):
    """An event that becomes visible behind the cursor is read, and equal ones of one moment are as many as they are."""
    clock = [START_S + 9]
    monkeypatch.setattr("tailspan.services.dagster.service.time.time", lambda: clock[0])
    rng, job_id, service = random.Random(4), dagster.add_run(), service_of(dagster)
    hidden: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    cursor, total = None, 0
    for batch in range(40):
        for event in hidden:
            event["hidden"] = False
        hidden.clear()
        for number in range(rng.randint(1, 30)):
            late = rng.random() < 0.2
            event = dagster.event(job_id, None, batch, message=f"line {number // 3}", stepKey="one", hidden=late)
            hidden += [event] * late
            total += 1
        # A reader that is killed goes on after its last page, and another one has nothing in memory.
        service = service if rng.random() < 0.8 else service_of(dagster)
        # A page has more than the events of two batches, so that none is later than by a page.
        dagster.page = rng.choice([70, 1000])
        for page in pages_of(service, job_id, cursor):
            seen.update(page.uids())
            cursor = page.cursor
        clock[0] += rng.random() * 3
    for event in hidden:
        event["hidden"] = False
    for page in pages_of(service, job_id, cursor):
        seen.update(page.uids())
    assert len(seen) == total
    assert set(seen.values()) == {1}
    assert {uid for page in pages_of(service_of(dagster), job_id) for uid in page.uids()} == set(seen)
    assert len(cursor) < 4000


def test_output_is_cut_at_lines_whatever_its_bytes(dagster, monkeypatch):
    """Pieces end anywhere: in a character, in bytes that are not UTF-8, in a line longer than a piece."""
    monkeypatch.setattr("tailspan.services.dagster.service._PIECE_BYTES", 64)
    rng, job_id = random.Random(3), dagster.add_run("SUCCESS")
    parts = [
        b"a\n",
        b"\n",
        "\u00e4\U0001f600".encode() * 9 + b"\n",
        b"\xff\xfe\xc3\n",
        b"x" * 300 + b"\n",
        b"\xf0\x9f\n",
    ]
    written = b"".join(rng.choice(parts) for _ in range(120)) + b"the end \xff"
    dagster.capture(job_id, "key", 1, "one")
    dagster.write(job_id, "key", written, written[::-1].replace(b" - ", b""))
    dagster.end(job_id, "SUCCESS", 5)
    pages = pages_of(service_of(dagster), job_id)
    lines = [line for page in pages for line in page.messages() if line.get("stream") == "stdout"]
    assert [line["message"] for line in lines] == written.decode("utf-8", "replace").split("\n")
    assert len({uid for page in pages for uid in page.uids()}) == sum(page.line_count for page in pages)
    cuts = [texts_of(pages_of(service_of(dagster), job_id, page.cursor)) for page in pages[:3]]
    whole = texts_of(pages)
    assert [whole[-len(rest) :] if rest else [] for rest in cuts] == cuts


RECORD = "2026-11-29 10:00:{second:02} +0000 - dagster - {level} - nightly - {run_id} - {rest}\n"


def record(run_id: str, rest: str, *, second: int = 0, level: str = "DEBUG") -> bytes:
    """One of Dagster's own records on stderr."""
    return RECORD.format(run_id=run_id, rest=rest, second=second, level=level).encode()


def test_dagsters_own_records_are_not_read_twice(dagster, client):
    """On stderr Dagster repeats the events, also those of several lines; what the step prints there is kept."""
    job_id = dagster.add_run("SUCCESS")
    stack = ['  File "jobs.py", line 6, in one\n    raise ValueError\n']
    failure = error("Wrapper", "in op one:", error("ValueError", "no\nsecond", stack=stack), stack=stack)
    dagster.capture(job_id, "key", 1, "one")
    dagster.log(job_id, "two\nlines - with a dash", 2, step="one")
    dagster.log(job_id, "last", 3, step="one")
    dagster.event(job_id, "STEP_FAILURE", 4, message="Step failed.", stepKey="one", error=failure)
    dagster.end(job_id, "FAILURE", 5)
    dagster.write(
        job_id,
        "key",
        b"",
        record(job_id, "one - two", level="INFO")
        + b"lines - with a dash\nmine\nlines - with a dash\n"
        + record(job_id, "one - last")
        + b"Traceback (most recent call last):\nmine, too\n"
        + record(job_id, "7 - one - STEP_FAILURE - Step failed.", level="ERROR")
        + b"\nWrapper: in op one::\n\nValueError: no\nsecond\n\nStack Trace:\n"
        + "".join(stack).encode()
        + b"\n\x1b[32m"
        + record("another-run", "one - last").replace(b" - dagster", b"\x1b[0m - dagster")
        + b"\x1b[32m"
        + record(job_id, "one - last").replace(b" - dagster", b"\x1b[0m - dagster"),
    )
    stderr = [one["message"] for one in client.get_logs(job_id) if one.get("stream") == "stderr"]
    assert stderr[:4] == ["mine", "lines - with a dash", "Traceback (most recent call last):", "mine, too"]
    assert len(stderr) == 5
    assert "another-run" in stderr[4]


def test_a_record_waits_for_its_event(dagster, monkeypatch):
    """A record is printed before its event can be read: its lines are not taken for the step's own."""
    clock = [START_S + 10.5]
    monkeypatch.setattr("tailspan.services.dagster.service.time.time", lambda: clock[0])
    job_id, service = dagster.add_run(), service_of(dagster)
    dagster.capture(job_id, "key", 1, "one")
    date = time.strftime("%Y-%m-%d %H:%M:%S +0000", time.gmtime(START_S + 10))
    text = f"before\n{date} - dagster - INFO - nightly - {job_id} - one - two\nlines\nafter\n"
    dagster.write(job_id, "key", b"", text.encode())
    first = pages_of(service, job_id)
    assert texts_of(first)[-1] == "before"
    dagster.log(job_id, "two\nlines", 10, step="one")
    clock[0] += 2
    assert texts_of(pages_of(service, job_id, first[-1].cursor)) == ["two", "lines", "after"]


def test_output_has_the_time_of_reading_within_its_step(dagster, monkeypatch):
    """Output has no times: when it was read, and at the latest when its step ended; of several steps, no task."""
    clock = [START_S + 30]
    monkeypatch.setattr("tailspan.services.dagster.service.time.time", lambda: clock[0])
    job_id, service = dagster.add_run(), service_of(dagster)
    dagster.capture(job_id, "one", 10, "one")
    dagster.write(job_id, "one", b"live\nnot yet")
    dagster.capture(job_id, "all", 11, "two", "three")
    dagster.write(job_id, "all", b"of both\n")
    first = pages_of(service, job_id)
    lines = [line for page in first for line in page.messages() if "stream" in line]
    at_ms = int((START_S + 30) * 1000)
    assert [(one["message"], one["timestamp"], one.get("task")) for one in lines] == [
        ("live", at_ms, "one"),
        ("of both", at_ms, None),
    ]
    dagster.write(job_id, "one", b", but now")
    dagster.event(job_id, "STEP_SUCCESS", 32, stepKey="one")
    clock[0] += 4
    second = pages_of(service, job_id, first[-1].cursor)
    assert texts_of(second) == ["STEP_SUCCESS"]
    # The file has the end of the output a moment after the event.
    clock[0] += 4
    third = pages_of(service, job_id, second[-1].cursor)
    assert [(one["message"], one["timestamp"]) for page in third for one in page.messages()] == [
        ("not yet, but now", int((START_S + 32) * 1000) - 1)
    ]
    clock[0] += 100
    dagster.event(job_id, "ENGINE_EVENT", 130, message="later")
    dagster.write(job_id, "one", b"uploaded\n")
    last = pages_of(service, job_id, third[-1].cursor)
    assert texts_of(last) == ["uploaded", "later"]
    # A minute after its end, a process is not asked for any more.
    dagster.write(job_id, "one", b"too late\n")
    assert not pages_of(service_of(dagster), job_id, last[-1].cursor)


def test_a_server_that_keeps_no_output(dagster):
    """With `NoOpComputeLogManager`, the Helm chart's default, there are events only."""
    dagster.keeps_output = False
    pages = pages_of(service_of(dagster), add_flaky(dagster))
    assert not [line for page in pages for line in page.messages() if "stream" in line]
    assert texts_of(pages)[-1] == "second line"


def test_polls_are_cheap(dagster):
    """A poll is two requests: status with steps, and events with the output of all processes."""
    job_id, service = dagster.add_run(plan={"one": []}), service_of(dagster)
    for number in range(12):
        dagster.capture(job_id, f"key{number}", 1, f"step{number}")
    cursor = pages_of(service, job_id)[-1].cursor
    dagster.documents.clear()

    async def poll() -> None:
        await service.get_job(job_id)
        await service.list_tasks(job_id)
        async for _ in service.read_logs(job_id, cursor):
            pass
        await service.aclose()

    anyio.run(poll)
    assert dagster.documents == ["Run", "Log"]
    dagster.documents.clear()
    assert not pages_of(service_of(dagster, compute_logs=False), job_id, cursor)
    assert dagster.documents == ["Log"]


def test_runs_in_pages(dagster, client):
    """More runs than a page, newest first, each once."""
    ids = [dagster.add_run(at_s=number) for number in range(230)]
    assert [row.job_id for row in client.list_jobs(limit=1000)] == ids[::-1]
    assert dagster.documents.count("Runs") == 3


def test_cancel(dagster, client):
    """A run is asked to terminate; an ended one stays as it is, and one that cannot says why."""
    job_id = dagster.add_run()
    assert client.cancel(job_id).job_status == "CANCELING"
    with pytest.raises(RequestRejectedError, match="having status CANCELING"):
        client.cancel(job_id)
    dagster.end(job_id, "CANCELED", 9)
    assert client.cancel(job_id).state is JobState.CANCELED
    with pytest.raises(JobNotFoundError):
        client.cancel("nope")


def test_submit(dagster, client):
    """A job is found in its code location; config is nested by dots, and attributes become tags."""
    command = ["nightly", "ops.load.config.rows=5", "ops.load.config.name=a b"]
    status = client.submit(command, attributes={"team": "geo"}, timeout=90.5)
    assert (status.state, status.attributes) == (JobState.PENDING, {"team": "geo"})
    assert dagster.launched[-1]["runConfigData"] == {"ops": {"load": {"config": {"rows": 5, "name": "a b"}}}}
    assert status.details == {"dagster.max_runtime": "90"}
    with pytest.raises(RequestRejectedError, match="unexpected config entry"):
        client.submit(["nightly", "wrong=1"])
    with pytest.raises(JobNotFoundError):
        client.submit(["defs.py/other"])
    dagster.jobs.append(("other.py", "__repository__", "nightly"))
    with pytest.raises(ConfigError, match=r"__repository__@defs.py/nightly, __repository__@other.py/nightly"):
        client.submit(["nightly"])
    client.submit(["other.py/nightly"])
    assert dagster.launched[-1]["selector"]["repositoryLocationName"] == "other.py"
    client.submit(["__repository__@other.py/nightly"])
    for wrong in (["nightly", "rows"], ["nightly", "a..b=1"], ["nightly", "a=1", "a.b=1"]):
        with pytest.raises(ConfigError):
            client.submit(wrong)
    with pytest.raises(ConfigError, match="neither name nor cwd nor env"):
        client.submit(["nightly"], env={"A": "b"})


def test_a_busy_server_is_asked_again(dagster, client):
    """429 with Retry-After and 503: the same request again, for documents that only read."""
    job_id = dagster.add_run()
    dagster.refusals = [(429, {"retry-after": "0"}), (503, {})]
    assert client.get_status(job_id).job_id == job_id
    dagster.busy = ["Run", "Launch"]
    assert client.get_status(job_id).job_id == job_id
    with pytest.raises(ServiceUnavailableError):
        client.submit(["nightly"])
    assert not dagster.launched


def test_errors_name_the_cause(dagster, client):
    """An unknown run, a cursor of another service or of another server."""
    with pytest.raises(JobNotFoundError):
        client.get_status("nope")
    with pytest.raises(JobNotFoundError):
        client.get_logs("nope")
    job_id = dagster.add_run()
    client.get_status(job_id)
    # A version of Dagster without a field that is requested.
    dagster.unknown_fields[dagster.documents[-1]] = "stepStats"
    with pytest.raises(RequestRejectedError, match=r"400.*Cannot query field 'stepStats'"):
        client.get_status(job_id)
    dagster.unknown_fields.clear()
    for cursor in (b"x", b"12", b"\x81\xa1d\x01", b"\x81\xa1e\x91\x91\x01"):
        with pytest.raises(ConfigError, match="not a cursor"):
            pages_of(service_of(dagster), job_id, cursor)
    wrong = service_of(dagster, base_url=f"{dagster.url}/other")

    async def read() -> None:
        with pytest.raises(ProtocolError, match=r"not Dagster's API; check services\.dagster\.base_url"):
            await wrong.get_job(job_id)
        await wrong.aclose()

    anyio.run(read)


def test_credentials(dagster, tmp_path: Path):
    """A token file may change: one refusal reads it again. Without one, the error says that none was sent."""
    dagster.token, file = "new-token-1", tmp_path / "token"
    file.write_text("old-token-1")
    job_id = dagster.add_run()

    async def renewed() -> None:
        service = service_of(dagster, token_file=str(file))
        with pytest.raises(AuthError) as caught:
            await service.get_job(job_id)
        assert "old-token-1" not in str(caught.value)
        file.write_text("new-token-1")
        assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()
        anonymous = service_of(dagster)
        with pytest.raises(AuthError, match="none was sent"):
            await anonymous.get_job(job_id)
        await anonymous.aclose()

    anyio.run(renewed)


def test_the_token_of_dagster_plus_has_a_header_of_its_own():
    """Dagster+ takes its token in another header, from the environment as well; it goes nowhere else."""
    options = DagsterOptions(base_url="https://acme.dagster.cloud/prod/graphql")
    environ = {"DAGSTER_CLOUD_API_TOKEN": "agent:acme:1234"}
    service = DagsterService("plus", options, environ=environ)
    sent = anyio.run(service.make_credentials(environ).authorization)
    assert (sent.header, sent.value) == ("Dagster-Cloud-Api-Token", "agent:acme:1234")
    assert service.identity == "https://acme.dagster.cloud/prod"
    other = DagsterService("own", DagsterOptions(base_url="https://dagster.example"), environ=environ)
    assert anyio.run(other.make_credentials(environ).authorization).value == ""


def test_the_section(tmp_path: Path):
    """Keys are checked, and the URL of the GraphQL API means the same as that of the server."""
    config = tmp_path / "config.toml"
    config.write_text('[services.d]\ntype = "dagster"\nbase_url = "http://dagster.example"\ntoken = "t"\nuser = "u"\n')
    with pytest.raises(ConfigError, match="token and user are both set"):
        open_service("d", load_settings(config))
    config.write_text('[services.d]\ntype = "dagster"\nbase_url = "http://dagster.example/graphql/"\n')
    assert open_service("d", load_settings(config)).identity == "http://dagster.example"
