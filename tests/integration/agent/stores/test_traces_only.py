"""Set-ups that take traces only, as Jaeger does: lines on spans, advice, and what a Tempo keeps of a traceback."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import pytest

from tailspan.logs.page import TaskRef
from tailspan.models import TaskRun
from tailspan.testing import FakeService, FakeTaskService
from tailspan_agent.commands.check import check
from tailspan_agent.exporter import retry
from tailspan_agent.pipeline import queue
from tests.fakes.agents import Bench, looped
from tests.fakes.collector import Collector, Reply
from tests.fakes.otlp_rows import SpanRow
from tests.fakes.tempo import ATTRIBUTE_BYTES, Tempo

ADVICE = 'set otlp.signals = ["traces"] (Jaeger takes traces only)'


def add_job(bench: Bench, *lines: str, state: str = "SUCCEEDED") -> None:
    """Add an ended job."""
    bench.fake.add_job("j1", job_name="etl")
    bench.fake.add_lines("j1", *lines)
    bench.fake.set_state("j1", state)


def messages(span: SpanRow) -> list[str]:
    """Return the lines on a span."""
    return [event.attributes["message"] for event in span.events if event.name == "log"]


def test_a_jaeger_user_sees_the_lines(bench: Bench) -> None:
    """Without logs among the signals, the span of the execution has the lines with time, severity and stream."""
    add_job(bench, *[f"INFO: {number}" for number in range(300)], "ERROR: no")
    assert bench.once(otlp={"signals": ["traces"]}).delivered
    span = bench.spans("j1")["executing"]
    assert messages(span) == [f"INFO: {number}" for number in range(201, 300)] + ["ERROR: no"]
    assert span.attributes["tailspan.lines.left_out"] == 201
    assert span.events[-1].attributes["severity"] == "ERROR"
    assert all(span.start_unix_nano <= event.time_unix_nano <= span.end_unix_nano for event in span.events)


@pytest.mark.parametrize(
    ("otlp", "expected"),
    [
        ({}, False),
        ({"lines_on_spans": True}, True),
        ({"signals": ["traces"], "lines_on_spans": False}, False),
        ({"endpoint": None}, False),
    ],
    ids=["auto with logs", "on", "off", "auto with all signals in files"],
)
def test_when_spans_carry_lines(bench: Bench, otlp: dict[str, object], expected: bool) -> None:
    """The key overrides what `auto` finds: an endpoint for logs."""
    settings = bench.settings(otlp=otlp)
    assert settings.otlp.puts_lines_on_spans is expected
    if otlp.get("endpoint", ""):
        return
    add_job(bench, "a line")
    assert bench.once(otlp=otlp).delivered
    if spans := bench.spans("j1"):
        assert messages(spans["executing"]) == (["a line"] if expected else [])


def test_an_endpoint_for_traces_alone(bench: Bench) -> None:
    """Lines that go into files are on the span, too: no store shows them."""
    settings = bench.settings(otlp={"endpoint": None}, more=f'[otlp.traces]\nendpoint = "{bench.collector.http_url}"')
    assert settings.otlp.puts_lines_on_spans


@looped
async def test_lines_before_a_restart_are_on_the_span(bench: Bench) -> None:
    """The agent that reports the end has read only the rest of the log; it reads the start again."""
    otlp = {"lines_on_spans": True}
    bench.fake.add_job("j1", job_name="etl")
    bench.fake.add_lines("j1", "WARNING: early", "one")
    async with bench.running(otlp=otlp):
        await bench.received(lambda: len(bench.bodies()) == 2)
    bench.fake.add_lines("j1", "two")
    bench.fake.set_state("j1", "SUCCEEDED")
    async with bench.running(otlp=otlp):
        await bench.received(lambda: "executing" in bench.spans("j1"))
    span = bench.spans("j1")["executing"]
    assert messages(span) == ["WARNING: early", "one", "two"]
    assert span.attributes["tailspan.lines.left_out"] == 0


def test_check_says_which_signals_fit(bench: Bench, collector: Collector) -> None:
    """An endpoint that takes traces and answers 404 to all else gets the one setting that helps."""
    for signal in ("logs", "metrics"):
        collector.always(signal, lambda request: Reply(404))

    async def found() -> dict[str, str]:
        return {one.subject: one.text async for one in check(bench.settings(), bench.open)}

    texts = asyncio.run(found())
    assert texts["otlp logs"] == f"{collector.http_url}/v1/logs: HTTP 404: {ADVICE}"
    assert texts["otlp metrics"].endswith(ADVICE)
    assert texts["otlp traces"].endswith("accepts them")


@looped
async def test_the_agent_says_it_once(
    bench: Bench, collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all signals configured, traces arrive, and one message names the setting."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "300")
    for signal in ("logs", "metrics"):
        collector.always(signal, lambda request: Reply(404))
    add_job(bench, "a line")
    with caplog.at_level(logging.WARNING):
        async with bench.running(drain_timeout=0.1) as agent:
            await bench.received(lambda: "submitted" in bench.spans("j1"))
            await bench.received(lambda: ADVICE in caplog.text)
            assert agent.endpoints.paused()
    assert caplog.text.count("otlp.signals") == 1


@looped
async def test_spans_go_out_while_lines_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lines than fit into the queue delay no run span; once logs are accepted, each line arrives, in order."""
    monkeypatch.setattr(retry, "FAULT_PAUSE_S", (0.05, 0.1))
    monkeypatch.setattr(queue, "_QUEUE_BYTES", 20_000)
    bench.services["fake"] = FakeService("fake", page_lines=100)
    bench.collector.always("logs", lambda request: Reply(404))
    lines = [*(f"line {number}" for number in range(600)), "ERROR: last"]
    jobs = {"j0": "SUCCEEDED", "j1": "FAILED", "j2": "SUCCEEDED", "j3": "CANCELED"}
    for job_id in jobs:
        bench.fake.add_job(job_id, job_name="etl")
        bench.fake.add_lines(job_id, *lines)
    async with bench.running(otlp={"lines_on_spans": True}) as agent:
        for ended in (["j0", "j1"], ["j2", "j3"]):
            for job_id in ended:
                bench.fake.set_state(job_id, jobs[job_id])
            await bench.received(lambda ended=ended: all("run" in bench.spans(job_id) for job_id in ended))
        assert not all(one.idle for one in agent._context.queues)
        for job_id, state in jobs.items():
            found = bench.spans(job_id)
            assert found["run"].attributes["tailspan.lines.read"] == len(lines)
            assert "tailspan.logs.complete" not in found["run"].attributes
            assert ("exception.message" in str(found["run"].events)) == (state == "FAILED")
            assert messages(found["executing"])[-1] == "ERROR: last"
        bench.collector.always("logs", Reply())
        await bench.received(lambda: len(bench.receipts()) == len(jobs))
    for job_id in jobs:
        assert bench.bodies(job_id) == lines
        assert bench.receipts()[job_id].attributes["tailspan.logs.complete"] is True
    assert sum(span.name == "RUN etl" for span in bench.collector.spans()) == len(jobs)


def test_a_running_job_is_found_by_its_id(bench: Bench) -> None:
    """The spans of a running job name it: its run span is sent at the end."""
    bench.fake.add_job("j1", job_name="etl")
    bench.fake.add_lines("j1", "a line")
    bench.once()
    spans = bench.spans("j1")
    assert set(spans) == {"submitted", "queued"}
    for span in spans.values():
        assert span.attributes == {"cicd.pipeline.name": "etl", "cicd.pipeline.run.id": "j1"}


def test_a_tempo_keeps_what_was_raised(bench: Bench, collector: Collector) -> None:
    """The stack trace on the span fits a default Tempo, which cuts the end; the log record has all of it."""
    tempo = Tempo()
    collector.always("traces", tempo)
    frames = [line for number in range(150) for line in (f'  File "/app/m{number}.py", line 1, in f', "    call()")]
    add_job(bench, "Traceback (most recent call last):", *frames, "ValueError: the last line", state="FAILED")
    assert bench.once().delivered
    (run,) = (span for span in tempo.spans() if span.name == "RUN etl")
    (event,) = (event for event in run.events if event.name == "exception")
    stack = event.attributes["exception.stacktrace"]
    assert len(stack.encode()) <= ATTRIBUTE_BYTES
    assert stack.startswith("Traceback")
    assert "m149.py" in stack
    assert stack.endswith("ValueError: the last line")
    (record,) = (row for row in collector.log_records() if row.event_name == "exception")
    assert all(line in record.attributes["exception.stacktrace"] for line in frames)


def test_the_span_of_a_task_has_its_last_lines(bench: Bench) -> None:
    """Without logs among the signals, each attempt of a task shows its own lines, and how many are left out."""
    service = bench.services["fake"] = FakeTaskService("fake")
    start = datetime(2026, 11, 29, 10, tzinfo=UTC)
    service.add_job("j1", job_name="etl", submitted_at=start, started_at=start)
    for number, result in ((1, "failure"), (2, "success")):
        times = {"started_at": start, "finished_at": start + timedelta(seconds=9)}
        service.set_task("j1", TaskRun(task_id="l", name="load", attempt=number, result=result, **times))
        lines = [f"{number}.{line}" for line in range(70)]
        ms = int(start.timestamp() * 1000) + number
        service.add_lines("j1", *lines, timestamp_ms=ms, task=TaskRef("l", "load", number), severity=17)
    service.set_state("j1", "SUCCEEDED", finished_at=start + timedelta(seconds=9))
    assert bench.once(otlp={"signals": ["traces"]}).delivered
    first, second = sorted(
        (span for span in bench.collector.spans() if span.name == "load"),
        key=lambda span: span.attributes["tailspan.task.attempt"],
    )
    assert messages(first) == [f"1.{line}" for line in range(20, 70)]
    assert messages(second) == [f"2.{line}" for line in range(20, 70)]
    assert second.events[0].attributes["severity"] == "ERROR"
    assert first.attributes["tailspan.lines.left_out"] == 20
    assert [event.name for event in first.events][-1] == "exception"
