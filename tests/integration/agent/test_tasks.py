"""Jobs with tasks: a span for each attempt while the job runs, and lines under the span of their attempt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from tailspan._identity import span_id
from tailspan.logs.page import TaskRef
from tailspan.models import TaskRun
from tailspan.testing import FakeTaskService
from tests.fakes.agents import Bench, looped
from tests.fakes.otlp_rows import LogRow

START = datetime(2026, 11, 29, 10, tzinfo=UTC)
EXTRACT, LOAD_1, LOAD_2 = TaskRef("e", "extract"), TaskRef("l", "load"), TaskRef("l", "load", 2)


class ListingService(FakeTaskService):
    """A service that lists what the test wants, of every job."""

    listed: Sequence[TaskRun] = ()

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return what the test has set."""
        return self.listed


@pytest.fixture
def service(bench: Bench) -> FakeTaskService:
    """A service with tasks in place of the one without."""
    service = FakeTaskService("fake")
    bench.services["fake"] = service
    return service


def at(seconds: float) -> datetime:
    """A time after the start."""
    return START + timedelta(seconds=seconds)


def attempt(ref: TaskRef, result: str | None, start: float, end: float, **fields: object) -> TaskRun:
    """An attempt of a task."""
    return TaskRun(
        task_id=ref.task_id,
        name=ref.name,
        attempt=ref.attempt,
        result=result,
        started_at=at(start),
        finished_at=at(end) if result else None,
        **fields,  # type: ignore[arg-type]
    )


def task_span_id(ref: TaskRef) -> str:
    """The id of an attempt's span."""
    return span_id("fake", "j1", f"task\0{ref.task_id}\0{ref.attempt}")


def failures(bench: Bench) -> list[LogRow]:
    """The records that say why a job failed."""
    return [row for row in bench.collector.log_records() if row.event_name == "exception"]


@looped
async def test_attempts_are_spans_as_soon_as_they_have_ended(bench: Bench, service: FakeTaskService) -> None:
    """Under `executing`, with result, links to the attempt before and to tasks before; lines have their span."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    service.set_task("j1", attempt(EXTRACT, None, 0, 0))
    ms = int(START.timestamp() * 1000)
    service.add_lines("j1", "reading", timestamp_ms=ms + 500, task=EXTRACT, severity=9)
    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["reading"])
        service.set_task("j1", attempt(EXTRACT, "success", 0, 2))
        await bench.received(lambda: any(span.name == "extract" for span in bench.collector.spans()))
        assert "run" not in bench.spans()
        after = {"after": ("e",), "submitted_at": at(2)}
        service.set_task("j1", attempt(LOAD_1, "failure", 3, 4, error="disk full", **after))
        service.add_lines("j1", "loading", "boom", timestamp_ms=ms + 3500, task=LOAD_1, stream="stderr")
        service.set_task("j1", attempt(LOAD_2, "success", 5, 6, **after))
        service.add_lines("j1", "ERROR but only a word", timestamp_ms=ms + 5500, task=LOAD_2, severity=13)
        skipped = TaskRun(task_id="n", name="notify", result="skip", after=("l",))
        service.set_task("j1", skipped)
        service.set_state("j1", "SUCCEEDED", finished_at=at(7))
        await bench.received(lambda: "run" in bench.spans() and len(bench.bodies()) == 4)

    spans = {span.span_id: span for span in bench.collector.spans()}
    executing = span_id("fake", "j1", "executing")
    extract, first, second = (spans[task_span_id(ref)] for ref in (EXTRACT, LOAD_1, LOAD_2))
    notify = spans[task_span_id(TaskRef("n", "notify"))]
    assert {span.parent_span_id for span in (extract, first, second, notify)} == {executing}
    assert [span.name for span in (extract, first, second, notify)] == ["extract", "load", "load", "notify"]
    assert {span.kind for span in (extract, first, second)} == {"INTERNAL"}
    results = [span.attributes["cicd.pipeline.task.run.result"] for span in (extract, first, second, notify)]
    assert results == ["success", "failure", "success", "skip"]
    assert [span.status for span in (extract, first, second)] == ["UNSET", "ERROR", "UNSET"]
    assert first.attributes["error.type"] == "failure"
    assert first.attributes["tailspan.task.queued_s"] == 1.0
    assert {span for _, span in second.links} == {first.span_id, extract.span_id}
    assert (extract.start_unix_nano, extract.end_unix_nano) == (ms * 10**6, (ms + 2000) * 10**6)
    assert spans[executing].start_unix_nano <= extract.start_unix_nano
    assert spans[executing].end_unix_nano >= second.end_unix_nano
    assert bench.spans()["run"].attributes["tailspan.job.tasks.total"] == 3

    lines = {row.body: row for row in bench.lines()}
    assert {body: row.span_id for body, row in lines.items()} == {
        "reading": extract.span_id,
        "loading": first.span_id,
        "boom": first.span_id,
        "ERROR but only a word": second.span_id,
    }
    assert lines["reading"].severity_text == "INFO"
    assert lines["ERROR but only a word"].severity_text == "WARN"
    assert lines["boom"].attributes["cicd.pipeline.task.name"] == "load"
    assert lines["boom"].attributes["cicd.pipeline.task.run.id"] == "l"
    assert lines["ERROR but only a word"].attributes["cicd.pipeline.task.run.id"] == "l.2"
    assert attempts_counted(bench) == {
        ("etl", "extract", "success"): (1, 2.0),
        ("etl", "load", "failure"): (1, 1.0),
        ("etl", "load", "success"): (1, 1.0),
        ("etl", "notify", "skip"): (1, pytest.approx(0, abs=0.01)),
    }


def attempts_counted(bench: Bench) -> dict[tuple[str, ...], tuple[int, float]]:
    """Return count and sum of the newest value of each series of `tailspan.task.duration`."""
    keys = ("cicd.pipeline.name", "cicd.pipeline.task.name", "cicd.pipeline.task.run.result")
    rows = [row for row in bench.collector.metrics() if row.name == "tailspan.task.duration"]
    assert all(row.unit == "s" and set(row.attributes) == set(keys) for row in rows)
    return {tuple(row.attributes[key] for key in keys): (row.value.count, row.value.sum) for row in rows}


@looped
async def test_names_of_tasks_on_metrics_are_limited(bench: Bench, service: FakeTaskService) -> None:
    """Tasks with an id in their names would make a series each; those above the limit share one for each pipeline."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    for number in range(5):
        service.set_task("j1", attempt(TaskRef(f"t{number}", f"part {number}"), "success", number, number + 2))
    service.set_state("j1", "SUCCEEDED", finished_at=at(7))
    async with bench.running(max_task_names=2):
        await bench.received(lambda: "run" in bench.spans())
    assert attempts_counted(bench) == {
        ("etl", "part 0", "success"): (1, 2.0),
        ("etl", "part 1", "success"): (1, 2.0),
        ("etl", "#other#", "success"): (3, 6.0),
    }


@looped
async def test_the_failure_belongs_to_the_task_that_failed(bench: Bench, service: FakeTaskService) -> None:
    """Its record is under the task's span, and its text is of that task's lines, whatever others write later."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    ms = int(START.timestamp() * 1000)
    service.set_task("j1", attempt(LOAD_1, "failure", 0, 1))
    service.set_task("j1", attempt(EXTRACT, "success", 0, 9))
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "KeyError: 'region'"]
    service.add_lines("j1", *trace, timestamp_ms=ms + 900, task=LOAD_1, severity=17)
    service.add_lines("j1", "Finished in state Failed", timestamp_ms=ms + 950, task=LOAD_1, severity=17)
    service.add_lines("j1", *map(str, range(50)), timestamp_ms=ms + 8900, task=EXTRACT)
    service.set_state("j1", "FAILED", finished_at=at(10))
    async with bench.running():
        await bench.received(lambda: "run" in bench.spans() and bool(failures(bench)))
    (record,) = failures(bench)
    assert record.span_id == task_span_id(LOAD_1)
    assert record.attributes["exception.type"] == "KeyError"
    assert record.attributes["exception.message"] == "'region'"  # without the record after it
    assert record.attributes["cicd.pipeline.task.name"] == "load"


@looped
async def test_the_failure_is_found_in_lines_that_an_earlier_agent_read(bench: Bench, service: FakeTaskService) -> None:
    """The lines of the task that failed are long before the last one of the job; its end says where they are."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    ms = int(START.timestamp() * 1000)
    service.set_task("j1", attempt(LOAD_1, "failure", 0, 1))
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "KeyError: 'region'"]
    service.add_lines("j1", *trace, timestamp_ms=ms + 900, task=LOAD_1)
    service.add_lines("j1", "of the job", timestamp_ms=ms + 8900)
    async with bench.running():
        await bench.received(lambda: any(row.body == "of the job" for row in bench.collector.log_records()))
    service.set_state("j1", "FAILED", finished_at=at(10))
    async with bench.running():
        await bench.received(lambda: "run" in bench.spans() and bool(failures(bench)))
    assert [record.attributes["exception.type"] for record in failures(bench)] == ["KeyError"]


@looped
async def test_spans_of_tasks_are_sent_once_over_a_restart(bench: Bench, service: FakeTaskService) -> None:
    """A second agent lists the same attempts again; the span that was sent first stays."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    service.set_task("j1", attempt(EXTRACT, "success", 0, 2))
    async with bench.running():
        await bench.received(lambda: any(span.name == "extract" for span in bench.collector.spans()))
    service.set_state("j1", "SUCCEEDED", finished_at=at(7))
    async with bench.running():
        await bench.received(lambda: "run" in bench.spans())
    assert [span.name for span in bench.collector.spans()].count("extract") == 1
    assert attempts_counted(bench) == {("etl", "extract", "success"): (1, 2.0)}


@pytest.mark.parametrize(
    ("state", "result", "status"), [("CANCELED", "cancellation", "UNSET"), ("LOST", "error", "ERROR")]
)
def test_attempts_end_with_their_job(
    bench: Bench, service: FakeTaskService, state: str, result: str, status: str
) -> None:
    """A task that was killed may be running for ever at its service: its lines have a span all the same."""
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    service.set_task("j1", attempt(EXTRACT, None, 1, 0))
    service.set_task("j1", TaskRun(task_id="n", name="never started"))
    service.add_lines("j1", "reading", timestamp_ms=int(START.timestamp() * 1000) + 1500, task=EXTRACT)
    service.set_state("j1", state, finished_at=at(7))
    bench.once()
    spans = bench.spans()
    assert "never started" not in spans
    assert spans["extract"].attributes["cicd.pipeline.task.run.result"] == result
    assert spans["extract"].status == status
    assert spans["extract"].span_id == bench.lines()[0].span_id
    assert spans["extract"].end_unix_nano == spans["executing"].end_unix_nano


def test_tasks_of_every_size_and_form(bench: Bench) -> None:
    """Thousands of tasks, attempts, indexes, long names, every character: each has its span, and memory is bounded."""
    service = bench.services["fake"] = ListingService("fake")
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    long_name, ends = "n" * 10_240, {"after": tuple(f"{number} {'a' * 2000}" for number in range(200))}
    tasks = [TaskRun(task_id=f"t{n}", name=long_name, result="success", finished_at=at(n), **ends) for n in range(300)]
    tasks += [attempt(TaskRef("again", "again", n), "failure", n, n + 1, error="e" * 9000) for n in range(1, 201)]
    tasks += [attempt(TaskRef(f"mapped[{n}]", "mapped"), "success", 0, n + 1) for n in range(300)]
    tasks += [attempt(TaskRef(chr(n), chr(n)), "success", 0, 1) for n in (*range(1, 300), 0x1F600, 0xFFFF)]
    tasks += [attempt(TaskRef(f"{'i' * 10_240}{n}", "long id"), "success", 0, 1) for n in range(3)]
    circle = [("one", "two"), ("two", "three"), ("three", "one"), ("self", "self"), ("below", "one")]
    tasks += [attempt(TaskRef(one, one), "success", 0, 1, parent=parent) for one, parent in circle]
    service.listed = tasks
    ms = int(START.timestamp() * 1000)
    for task in tasks[:50] + tasks[-30:]:
        service.add_lines("j1", "line", timestamp_ms=ms, task=TaskRef(task.task_id, task.name, task.attempt))
    service.set_state("j1", "SUCCEEDED", finished_at=at(3000))
    assert bench.once(otlp={"lines_on_spans": True}).delivered
    spans = {span.span_id: span for span in bench.collector.spans() if "tailspan.task.id" in span.attributes}
    assert len(spans) == len(tasks)
    assert {line.span_id for line in bench.lines()} <= spans.keys()
    assert max(len(span.name.encode()) for span in spans.values()) <= 1024
    assert sum(len(span.links) for span in spans.values()) < 10_000
    executing = bench.spans()["executing"].span_id
    parents = {span.attributes["tailspan.task.id"]: span.parent_span_id for span in spans.values()}
    assert {parents[one] for one in ("one", "two", "three", "self")} == {executing}
    assert spans[parents["below"]].name == "one"


@looped
async def test_a_task_that_vanishes_keeps_its_span(bench: Bench) -> None:
    """A service may forget a running attempt: its lines have a span all the same."""
    service = bench.services["fake"] = ListingService("fake")
    service.add_job("j1", job_name="etl", submitted_at=START, started_at=START)
    service.listed = [attempt(EXTRACT, None, 1, 0)]
    service.add_lines("j1", "reading", timestamp_ms=int(START.timestamp() * 1000) + 1500, task=EXTRACT)
    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["reading"])
        service.listed = []
        service.set_state("j1", "SUCCEEDED", finished_at=at(7))
        await bench.received(lambda: "run" in bench.spans() and "extract" in bench.spans())
    assert bench.spans()["extract"].span_id == bench.lines()[0].span_id
