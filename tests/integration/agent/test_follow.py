"""`agent run`: jobs are followed while they run, through restarts, outages and drains."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import count, islice, takewhile
from zlib import crc32

import httpx
import pytest

from tailspan._identity import span_id, trace_id
from tailspan.errors import CursorExpiredError, JobNotFoundError, ServiceUnavailableError
from tailspan.models import ListedJob
from tailspan_agent import agent as agent_module
from tailspan_agent.commands.check import check
from tailspan_agent.commands.doctor import command as doctor_command
from tailspan_agent.commands.doctor.command import DiagnosticsReport
from tailspan_agent.exporter.outcome import Delivered
from tailspan_agent.records.redact import Redactor
from tests.fakes.agents import PATIENCE_S, Bench, OddService, looped, until
from tests.fakes.collector import Collector, Reply, Request
from tests.fakes.otlp_rows import log_rows
from tests.ports import free_port


@looped
async def test_a_job_is_followed_from_its_start_to_its_end(bench: Bench) -> None:
    """Discovery finds the job while the agent runs; lines are relayed as they are written, spans as they end."""
    async with bench.running():
        bench.fake.add_job("j1", job_name="etl")
        bench.fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
        bench.fake.add_lines("j1", "b", "c")
        await bench.received(lambda: bench.bodies() == ["a", "b", "c"])
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    spans = bench.collector.spans()
    assert sorted(span.name for span in spans) == ["RUN etl", "executing", "queued", "submitted"]
    root = bench.spans()["run"]
    assert all(span.parent_span_id in ("", root.span_id) for span in spans)
    assert root.start_unix_nano <= bench.lines()[0].time_unix_nano
    assert root.end_unix_nano >= bench.lines()[-1].time_unix_nano


@looped
async def test_a_running_job_is_visible_at_once(bench: Bench) -> None:
    """A running job without lines has a trace."""
    bench.fake.add_job("j1")
    async with bench.running() as agent:
        await bench.received(lambda: {"submitted", "queued"} <= set(bench.spans()))
        assert [tailer.job_id for tailer in agent.tailers] == ["j1"]
        assert "run" not in bench.spans()
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())


@looped
async def test_a_running_job_is_in_its_trace_within_three_seconds(bench: Bench) -> None:
    """The first span, with the job's own ids, is sent when the agent sees the job; at the end no span is an orphan."""
    late_s = 0.0

    async def measure_lateness() -> None:
        # How much later than in 50 ms the loop runs again: on a loaded machine these are the seconds of others.
        nonlocal late_s
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(0.05)
            late_s += time.monotonic() - start_s - 0.05

    seen_s: list[float] = []
    async with bench.running():
        measuring = asyncio.create_task(measure_lateness())
        bench.fake.before_next("get_job", lambda: seen_s.append(time.monotonic() - late_s))
        job = bench.fake.add_job("j1", state="PENDING", started_at=None)
        await bench.received(lambda: "submitted" in bench.spans())
        assert time.monotonic() - late_s - seen_s[0] < 3
        measuring.cancel()
        anchor = bench.spans()["submitted"]
        assert (anchor.trace_id, anchor.parent_span_id) == (job.trace_id, span_id("fake", "j1", "run"))
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    ids = {span.span_id for span in bench.collector.spans()}
    assert all(span.parent_span_id in ids for span in bench.collector.spans() if span.parent_span_id)


@looped
async def test_a_job_starts_when_its_service_says_although_its_lines_come_first(bench: Bench) -> None:
    """The job starts between the status and the read: its spans do not overlap."""
    started = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

    bench.fake.add_job("j1", state="PENDING", submitted_at=started - timedelta(seconds=1), started_at=None)
    bench.fake.add_lines("j1", "a", timestamp_ms=round(started.timestamp() * 1000) + 70)
    bench.fake.before_next("read_logs", lambda: bench.fake.set_state("j1", "RUNNING", started_at=started))
    async with bench.running():
        await bench.received(lambda: "queued" in bench.spans())
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    spans = bench.spans()
    assert spans["queued"].end_unix_nano == spans["executing"].start_unix_nano == round(started.timestamp()) * 10**9


@looped
async def test_the_list_saves_status_requests(bench: Bench) -> None:
    """A silent job with a line count in the list costs one status and no read; its end is found at once."""
    bench.fake.add_job("j1")
    async with bench.running():
        await until(lambda: bench.fake.calls.count(("list_jobs", "")) > 2)
        assert bench.fake.calls.count(("get_job", "j1")) == 1
        assert bench.fake.calls.count(("read_logs", "j1")) == 0
        bench.fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())


@looped
async def test_stopped_and_started_in_the_middle(bench: Bench) -> None:
    """The next agent continues after the last acknowledged line: no duplicate, no loss, one trace."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a", "b")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 2)
    bench.fake.add_lines("j1", "c")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 3)
        bench.fake.add_lines("j1", "d")
        bench.fake.set_state("j1", "FAILED")
        await bench.received(lambda: "run" in bench.spans())
    assert bench.bodies() == ["a", "b", "c", "d"]
    assert len(bench.collector.spans()) == 4
    assert len({row.trace_id for row in bench.lines()}) == 1


@looped
async def test_the_drain_acks_what_was_read(bench: Bench) -> None:
    """A stopping agent waits for what is in flight and does not send it again."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a", "b")
    bench.collector.script("logs", Reply(503, retry_after_s=0.3))
    async with bench.running():
        await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
    assert bench.bodies() == ["a", "b"]
    assert (await bench.agent().run_once(PATIENCE_S)).acked == 0


@looped
async def test_the_drain_has_an_end(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A hanging endpoint does not hold the agent beyond its drain timeout; the lines are sent later."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.collector.always("logs", Reply(503))
    async with bench.running(drain_timeout=0.1):
        await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
    assert "stopped before everything was acknowledged" in caplog.text
    bench.collector.always("logs", Reply())
    assert (await bench.agent().run_once(PATIENCE_S)).acked == 1
    assert bench.bodies() == ["a"]


@looped
async def test_a_second_stop_skips_the_drain(bench: Bench) -> None:
    """A second stop skips the drain."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.collector.always("logs", Reply(hang=True))
    agent = bench.agent(drain_timeout=1000)
    draining = asyncio.Event()
    task = asyncio.create_task(agent.run(on_stop=draining.set))
    await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
    agent.stop()
    await draining.wait()
    agent.stop()
    await task
    with closing(bench.agent().store) as store:
        assert store.job("fake", "j1") is not None


@looped
async def test_an_end_that_is_taken_back_is_none(bench: Bench) -> None:
    """A status that becomes terminal and running again ends nothing: only the last end counts."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 1)
        bench.fake.set_state("j1", "FAILED", logs_complete=None)
        bench.fake.before_next("get_job", lambda: None, lambda: bench.fake.set_state("j1", "RUNNING", finished_at=None))
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: len(bench.bodies()) == 2)
        reads = bench.fake.calls.count(("read_logs", "j1"))
        await until(lambda: bench.fake.calls.count(("read_logs", "j1")) > reads + 10)
        assert "run" not in bench.spans()
        bench.fake.add_lines("j1", "c")
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    assert bench.bodies() == ["a", "b", "c"]
    assert bench.spans()["run"].attributes["cicd.pipeline.result"] == "success"
    assert bench.metric("cicd.pipeline.run.duration").count == 1


@looped
async def test_a_status_that_is_ahead_of_the_lines(bench: Bench) -> None:
    """The end is seen before the last lines: they are relayed, and lie within the run span."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running({"discover": True, "settle": 1.5}):
        await bench.received(lambda: len(bench.bodies()) == 1)
        bench.fake.set_state("j1", "SUCCEEDED", logs_complete=None)
        reads = bench.fake.calls.count(("read_logs", "j1"))
        await until(lambda: bench.fake.calls.count(("read_logs", "j1")) > reads + 1)
        bench.fake.add_lines("j1", "last")
        await bench.received(lambda: "run" in bench.spans())
    assert bench.bodies() == ["a", "last"]
    assert bench.spans()["run"].end_unix_nano >= bench.lines()[-1].time_unix_nano


@looped
async def test_a_log_that_stays_open_is_followed_on(bench: Bench) -> None:
    """The job has its trace and its receipt; lines of a background process, even hours later, amend the receipt."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=datetime.now(UTC) - timedelta(hours=2), logs_complete=False)
    async with bench.running():
        await bench.received(lambda: _receipt_lines(bench) == [1] and "run" in bench.spans())
        assert bench.spans()["run"].attributes["tailspan.logs.complete"] is False
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: _receipt_lines(bench) == [1, 2])
        bench.fake.add_lines("j1", "c")
        bench.fake.set_state("j1", "SUCCEEDED", logs_complete=True)
        await bench.received(lambda: _receipt_lines(bench) == [1, 2, 3])
    assert bench.bodies() == ["a", "b", "c"]
    assert len(bench.collector.spans()) == 4
    receipts = [row for row in bench.collector.log_records() if row.event_name == "tailspan.receipt"]
    assert [row.attributes["tailspan.logs.complete"] for row in receipts] == [False, False, True]
    assert {row.severity_text for row in receipts} == {"INFO"}


@looped
async def test_an_open_log_is_followed_by_the_next_agent(bench: Bench) -> None:
    """What it has relayed is not relayed again; what an unfinished receipt lacked is in the next one."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=datetime.now(UTC) - timedelta(seconds=1), logs_complete=False)
    async with bench.running():
        await bench.received(lambda: _receipt_lines(bench) == [1])
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: _receipt_lines(bench) == [1, 2])
        # This one comes too soon after the receipt.
        bench.fake.add_lines("j1", "c")
        await bench.received(lambda: bench.bodies() == ["a", "b", "c"])
    bench.fake.set_state("j1", "SUCCEEDED", logs_complete=True)
    async with bench.running() as agent:
        await until(lambda: _receipt_lines(bench)[-1] == 3 and not agent.tailers)
    assert bench.bodies() == ["a", "b", "c"]
    assert _receipt_lines(bench) == [1, 2, 3]
    assert len(bench.collector.spans()) == 4


def _receipt_lines(bench: Bench) -> list[int]:
    receipts = [row for row in bench.collector.log_records() if row.event_name == "tailspan.receipt"]
    return [row.attributes["tailspan.lines.read"] for row in receipts]


@looped
async def test_a_job_deleted_while_it_is_followed(bench: Bench) -> None:
    """The trace gets its root, the relayed lines stay valid; a single failed request is no deletion."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running() as agent:
        await bench.received(lambda: len(bench.bodies()) == 1)
        bench.fake.fail_next("get_job", JobNotFoundError("hiccup"))
        bench.fake.fail_next("read_logs", JobNotFoundError("hiccup"))
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: len(bench.bodies()) == 2)
        assert "run" not in bench.spans()
        bench.fake.fail_next("get_job", *[JobNotFoundError("gone")] * 9)
        bench.fake.fail_next("read_logs", *[JobNotFoundError("gone")] * 9)
        await bench.received(lambda: "run" in bench.spans())
        await until(lambda: not agent.tailers)
    root = bench.spans()["run"]
    assert bench.fake.calls.count(("get_job", "j1")) < 12
    assert (root.attributes["cicd.pipeline.result"], root.attributes["tailspan.logs.complete"]) == ("error", False)


@looped
async def test_a_service_that_is_away_for_a_while(bench: Bench) -> None:
    """The job keeps its state and is not LOST, readiness names the cause, and its lines are relayed later."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running() as agent:
        await bench.received(lambda: len(bench.bodies()) == 1)
        away = ServiceUnavailableError("away", retry_after_s=0.2)
        bench.fake.fail_next("read_logs", away)
        await until(lambda: agent.problems() == ["service_fake_unreachable"])
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: len(bench.bodies()) == 2)
        await until(lambda: agent.problems() == [])
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    root = bench.spans()["run"]
    states = [event.attributes["tailspan.job.state"] for event in root.events]
    assert states == ["RUNNING", "SUCCEEDED"]


@looped
async def test_an_endpoint_that_heals(bench: Bench) -> None:
    """Reading continues while the endpoint is down; when it answers again, each line arrives once, in order."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *[f"line {number}" for number in range(20)])
    bench.collector.script("logs", Reply(503), Reply(cut="request"), Reply(429, retry_after_s=0.1))
    async with bench.running():
        bench.fake.add_lines("j1", "more")
        await bench.received(lambda: len(bench.bodies()) == 21)
    assert bench.bodies() == [f"line {number}" for number in range(20)] + ["more"]


@looped
async def test_a_hanging_endpoint_pauses_the_reads_of_its_queue(bench: Bench) -> None:
    """Reading stops when the bounded queue is full, and continues when the endpoint answers."""
    bench.services["fake"] = service = OddService("fake", page_lines=500)
    service.add_job("j1")
    service.add_lines("j1", *["x" * 1000] * 10_000)
    service.set_state("j1", "SUCCEEDED")
    bench.collector.always("logs", Reply(503, retry_after_s=0.3))
    async with bench.running():
        await bench.received(bench.refused)
        await until(lambda: service.pages > 3)
        await asyncio.sleep(0.2)
        assert service.pages < 16
        bench.collector.always("logs", Reply())
        await bench.received(lambda: "run" in bench.spans())
    assert len(bench.bodies()) == 10_000
    assert service.open_reads == 0


@looped
async def test_expired_lines_are_counted_and_the_job_goes_on(bench: Bench) -> None:
    """A gap is counted and does not end the job."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 1)
        bench.fake.fail_next("read_logs", CursorExpiredError("gone", resume_cursor=b"2"))
        bench.fake.add_lines("j1", "lost", "c")
        await bench.received(lambda: len(bench.bodies()) >= 2)
    assert bench.bodies() in (["a", "c"], ["a", "lost", "c"])
    assert bench.metric("tailspan.agent.gaps", service="fake") == 1


@looped
async def test_the_oldest_job_of_a_pipeline_goes_first(bench: Bench) -> None:
    """A new job of the same pipeline waits for one with an old backlog; jobs of other pipelines do not wait."""
    for hours, name in ((3, "etl"), (1, "etl"), (0, "etl"), (0, "other")):
        began = datetime.now(UTC) - timedelta(hours=hours)
        job_id = f"{name} {hours}"
        bench.fake.add_job(job_id, job_name=name, submitted_at=began, started_at=began)
        bench.fake.add_lines(job_id, job_id, timestamp_ms=int(began.timestamp() * 1000))
        bench.fake.set_state(job_id, "SUCCEEDED", finished_at=began, job_status_date=began)
    bench.collector.script("logs", Reply(503), Reply(503))
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 4)
    assert [body for body in bench.bodies() if body != "other 0"] == ["etl 3", "etl 1", "etl 0"]


@looped
async def test_a_job_that_cannot_be_read_keeps_no_sibling_waiting(bench: Bench) -> None:
    """The other jobs of its pipeline are relayed."""
    bench.services["fake"] = service = OddService("fake")
    hours_ago = datetime.now(UTC) - timedelta(hours=3)
    for job_id, ended in (("broken", hours_ago - timedelta(hours=2)), ("fine", hours_ago)):
        service.add_job(job_id, job_name="etl")
        service.add_lines(job_id, f"of {job_id}")
        service.set_state(job_id, "SUCCEEDED", finished_at=ended, job_status_date=ended)
    service.cut = ("broken", 0, ServiceUnavailableError("cannot read this one"))
    async with bench.running():
        await bench.received(lambda: bench.bodies() == ["of fine"])


@looped
async def test_health_and_metrics_are_served_while_it_runs(bench: Bench) -> None:
    """Probes and Prometheus reach the agent, and the text has the run."""
    bench.fake.add_job("j1", job_name="etl")
    bench.fake.set_state("j1", "SUCCEEDED")
    async with bench.running(listen="127.0.0.1:0") as agent:
        await bench.received(lambda: "run" in bench.spans())
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, verify=False) as client:
            assert (await client.get("/readyz")).status_code == 200
            text = (await client.get("/metrics")).text
    assert 'cicd_pipeline_run_duration_seconds_count{cicd_pipeline_name="etl"' in text


@looped
async def test_an_endpoint_that_is_wrong_for_metrics_is_a_problem(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """No line is lost, but no metric arrives either: readiness and the log report it."""
    bench.collector.always("metrics", Reply(404))
    async with bench.running() as agent:
        await until(lambda: agent.problems() == ["endpoint_metrics_paused"])
    assert any(record.levelname == "ERROR" and "metrics" in record.message for record in caplog.records)


@looped
async def test_a_queue_that_fails_ends_the_agent(bench: Bench) -> None:
    """A batch that was not delivered is not skipped: the agent ends, and the next process sends the lines."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    agent = bench.agent()

    class Broken:
        endpoint = "nowhere"

        async def export(self, payload: bytes, count: int) -> Delivered:
            raise ZeroDivisionError("bug")

        async def aclose(self) -> None:
            """There is nothing to close."""

    logs = agent.endpoints.get("logs")
    assert logs is not None
    logs.exporter.exporter = Broken()
    with pytest.raises(ZeroDivisionError):
        await agent.run()
    assert (await bench.agent().run_once(PATIENCE_S)).acked == 1


@looped
async def test_a_job_that_is_named_before_it_exists_is_polled_rarely(bench: Bench) -> None:
    """A missing job costs two requests, not one per turn."""
    async with bench.running({"jobs": ["soon"]}) as agent:
        await until(lambda: bench.fake.calls.count(("get_job", "soon")) == 2)
        await until(lambda: not agent.tailers)
        await asyncio.sleep(0.7)
        assert bench.fake.calls.count(("get_job", "soon")) == 2


@looped
async def test_one_dead_endpoint_does_not_keep_the_other_signal(bench: Bench) -> None:
    """Traces are sent while the logs endpoint is down, and the other way round."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    with Collector() as second:
        bench.collector.always("logs", Reply(503))
        second.always("traces", Reply(503))
        more = f'[otlp.traces]\nendpoint = "{second.http_url}/v1/traces"'
        async with bench.running(more=more, drain_timeout=0):
            bench.fake.set_state("j1", "SUCCEEDED")
            await asyncio.to_thread(second.wait_until, lambda: any(r.signal == "traces" for r in second.requests))
            second.always("traces", Reply())
            await asyncio.to_thread(second.wait_until, lambda: any(span.name == "RUN j1" for span in second.spans()))
            assert bench.bodies() == []
            bench.collector.always("logs", Reply())
            await bench.received(lambda: bench.bodies() == ["a"])


@looped
async def test_lines_come_in_the_order_of_the_service(bench: Bench) -> None:
    """Many jobs and a slow endpoint that rejects now and then: order holds within each job."""
    answered = iter(range(10**6))

    def unsteady(request: Request) -> Reply:
        return Reply(503) if next(answered) % 5 == 2 else Reply()

    bench.collector.always("logs", unsteady)
    names = [f"j{number}" for number in range(12)]
    for name in names:
        bench.fake.add_job(name)
    async with bench.running():
        for turn in range(5):
            for name in names:
                bench.fake.add_lines(name, *[f"{name} {turn} {number}" for number in range(10)])
            await asyncio.sleep(0.02)
        for name in names:
            bench.fake.set_state(name, "SUCCEEDED")
        await bench.received(lambda: len(bench.bodies()) >= 600)
    for name in names:
        assert bench.bodies(name) == [f"{name} {turn} {number}" for turn in range(5) for number in range(10)]


@looped
async def test_a_job_that_runs_again_is_followed_again(bench: Bench) -> None:
    """A job that runs again after its end: its lines are relayed, its receipt is amended, its run counts once."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=datetime.now(UTC), logs_complete=None)
    async with bench.running():
        await bench.received(lambda: bool(bench.receipts()))
        bench.fake.set_state("j1", "RUNNING")
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: bench.bodies() == ["a", "b"])
        bench.fake.add_lines("j1", "c")
        bench.fake.set_state("j1", "SUCCEEDED", finished_at=datetime.now(UTC), logs_complete=None)
        await bench.received(lambda: bench.receipts()["j1"].attributes["tailspan.lines.read"] == 3)
    assert bench.bodies() == ["a", "b", "c"]
    assert bench.metric("cicd.pipeline.run.duration").count == 1


@looped
async def test_a_job_that_is_deleted_after_its_receipt_is_done(bench: Bench) -> None:
    """All of it was relayed: no amended receipt, no gap."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=datetime.now(UTC), logs_complete=None)
    async with bench.running() as agent:
        await bench.received(lambda: bool(bench.receipts()))
        (tailer,) = agent.tailers
        bench.fake.add_lines("j1", "b")  # has it polled soon
        del bench.fake._jobs["j1"]
        await until(lambda: tailer.finished)
    assert bench.bodies() == ["a"]
    assert len([row for row in bench.collector.log_records() if row.event_name == "tailspan.receipt"]) == 1


@looped
async def test_a_retry_is_a_new_trace_linked_to_the_one_before(bench: Bench) -> None:
    """Each attempt has a complete trace and its own lines; the second links to the first."""
    first, second = (trace_id("fake", "j1", attempt) for attempt in (1, 2))
    bench.fake.add_job("j1", job_name="etl", trace_id=first)
    async with bench.running():
        bench.fake.add_lines("j1", "a")
        await bench.received(lambda: bench.bodies() == ["a"])
        bench.fake.set_state("j1", "PENDING", attempt=2, trace_id=second)
        await bench.received(lambda: any(span.name == "RUN etl" for span in bench.collector.spans()))
        bench.fake.add_lines("j1", "b")
        await bench.received(lambda: bench.bodies() == ["a", "b"])
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: len([span for span in bench.collector.spans() if span.name == "RUN etl"]) == 2)
    runs = {span.trace_id: span for span in bench.collector.spans() if span.name == "RUN etl"}
    assert set(runs) == {first, second}
    assert [row.trace_id for row in bench.lines()] == [first, second]
    assert (runs[first].attributes["cicd.pipeline.result"], runs[first].links) == ("failure", [])
    assert runs[second].attributes["cicd.pipeline.result"] == "success"
    assert runs[second].links == [(first, runs[first].span_id)]
    for span in bench.collector.spans():
        assert span.parent_span_id in ("", runs[span.trace_id].span_id)


@looped
@pytest.mark.parametrize("runs_between", [False, True])
async def test_a_retry_while_no_agent_runs_ends_the_attempt_before(bench: Bench, runs_between: bool) -> None:
    """The attempt that an earlier process followed gets its spans, and its lines do not count for the next one."""
    first, second = (trace_id("fake", "j1", attempt) for attempt in (1, 2))
    bench.fake.add_job("j1", job_name="etl", trace_id=first)
    async with bench.running():
        bench.fake.add_lines("j1", "a", timestamp_ms=1_000_000)
        await bench.received(lambda: bench.bodies() == ["a"])
    bench.fake.set_state("j1", "RUNNING", attempt=2, trace_id=second)
    if runs_between:
        async with bench.running():
            await bench.received(lambda: any(span.name == "RUN etl" for span in bench.collector.spans()))
    bench.fake.add_lines("j1", "b", timestamp_ms=2_000_000)
    bench.fake.set_state("j1", "SUCCEEDED")
    async with bench.running():
        await bench.received(lambda: len([span for span in bench.collector.spans() if span.name == "RUN etl"]) == 2)
    runs = {span.trace_id: span for span in bench.collector.spans() if span.name == "RUN etl"}
    results = [runs[one].attributes["cicd.pipeline.result"] for one in (first, second)]
    assert results == ["failure", "success"]
    executing = {span.trace_id: span for span in bench.collector.spans() if span.name == "executing"}
    assert executing[first].start_unix_nano == 1_000_000 * 10**6
    assert executing[second].start_unix_nano >= 2_000_000 * 10**6
    assert [row.trace_id for row in bench.lines()] == [first, second]


class _EndlessList(OddService):
    """A service whose list never yields a second page."""

    async def list_jobs(self) -> AsyncGenerator[list[ListedJob], None]:
        """Yield the first page, then wait for ever."""
        async for rows in super().list_jobs():
            yield rows
        await asyncio.Event().wait()


@looped
async def test_a_stop_in_the_middle_of_a_list_begins_nothing_new(bench: Bench) -> None:
    """A stopping agent starts no tailers for jobs just found: their lines would be relayed twice."""
    bench.services["fake"] = service = _EndlessList("fake")
    service.add_job("j1")
    service.add_lines("j1", "a", "b")
    async with bench.running() as agent:
        await until(lambda: service.list_pages == 1)
        agent.stop()
    assert ("read_logs", "j1") not in service.calls
    assert not agent.tailers


@looped
async def test_long_logs_do_not_keep_others_waiting(bench: Bench) -> None:
    """A long backlog is read in turns with new lines, also within one queue."""
    bench.services["fake"] = service = OddService("fake", page_lines=20)
    in_one_lane = (job_id for job_id in map(str, count()) if crc32(f"fake\0{job_id}".encode()) % 4 == 0)
    *long, short = islice(in_one_lane, 7)
    for job_id in long:
        service.add_job(job_id)
        service.add_lines(job_id, *["x"] * 4000)
    service.add_job(short)
    service.add_lines(short, "now")
    async with bench.running():
        await bench.received(lambda: len(bench.bodies()) == 6 * 4000 + 1)
    # A request has its lines by job, so it is the requests before that count.
    sent = [request for request in bench.collector.requests if request.signal == "logs"]
    before = takewhile(lambda request: all(row.body != "now" for row in log_rows(request.message)), sent)
    assert sum(request.count for request in before) < 2000
    assert all(bench.bodies(job_id) == ["x"] * 4000 for job_id in long)


@looped
async def test_a_queue_that_is_stuck_does_not_block_the_reads_of_others(bench: Bench) -> None:
    """However many jobs wait for room in one queue, a batch that is rejected for ever does not block other queues."""

    def of_lane(number: int) -> Iterator[str]:
        return (job_id for job_id in map(str, count()) if crc32(f"fake\0{job_id}".encode()) % 4 == number)

    bench.services["fake"] = service = OddService("fake", page_lines=1000)
    for job_id in islice(of_lane(0), 8):
        service.add_job(job_id)
        service.add_lines(job_id, *["x" * 1000] * 5000)
    bench.collector.always("logs", lambda request: Reply(503 if request.count > 1 else 200))
    async with bench.running():
        await until(lambda: service.pages >= 4)
        other = next(of_lane(1))
        service.add_job(other)
        service.add_lines(other, "a")
        await bench.received(lambda: bench.bodies(other) == ["a"])
        bench.collector.always("logs", Reply())


@looped
async def test_an_endpoint_that_keeps_failing_makes_the_agent_unready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first failure, but for as long as it lasts; /readyz and the page say since when and why."""
    monkeypatch.setattr(agent_module, "SHORT_OUTAGE_S", 0.0)
    bench.collector.always("logs", Reply(503, message="busy"))
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running() as agent:
        await until(lambda: any("logs_retrying" in problem for problem in agent.problems()))
        (problem,) = agent.problems()
        assert problem.startswith("endpoint_logs_retrying since 20")
        assert problem.endswith(": HTTP 503")
        bench.collector.always("logs", Reply())
        await bench.received(lambda: bench.bodies() == ["a"])
        await until(lambda: not agent.problems())


@looped
async def test_readyz_page_and_check_report_an_outage_alike(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each signal, metrics included: since when, how many tries, and why; until the endpoint answers."""
    monkeypatch.setattr(agent_module, "SHORT_OUTAGE_S", 0.0)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    for signal in ("logs", "traces", "metrics"):
        bench.collector.always(signal, Reply(503, message="private words"))
    codes = {f"endpoint_{signal}_retrying" for signal in ("logs", "traces", "metrics")}
    async with bench.running(listen=f"127.0.0.1:{free_port()}") as agent:
        await until(lambda: {problem.partition(" ")[0] for problem in agent.problems()} == codes)
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            ready, page = await client.get("/readyz"), await client.get("/agent")
            others = [await client.get(path) for path in ("/", "/pipelines", "/job?service=fake&id=j1")]
        found = [one.text async for one in check(agent.settings, bench.open) if one.subject == "running agent"]
        for signal in ("logs", "traces", "metrics"):
            assert re.search(rf"endpoint_{signal}_retrying since 20\S+Z, \d+ (try|tries): HTTP 503\n", ready.text)
            for other in others:
                assert re.search(
                    rf"{signal.title()}</strong>: retrying since <time .*?</time>, \d+ tr\w+: HTTP 503", other.text
                )
            assert re.search(rf">{signal}</td><td.*retrying since .*?, \d+ (try|tries): HTTP 503", page.text)
            assert any(re.match(rf"endpoint {signal} retrying since 20\S+Z, \d+ .*: HTTP 503$", text) for text in found)
        assert "private" not in ready.text
        report = DiagnosticsReport(Redactor())
        await doctor_command._reach(agent.settings, report)
        for signal in ("logs", "traces", "metrics"):
            problem = rf"running agent: endpoint {signal} retrying since 20\S+Z, \d+ tr\w+: HTTP 503"
            assert any(re.match(problem, text) for text in report.sections["problems"])
        for signal in ("logs", "traces", "metrics"):
            bench.collector.always(signal, Reply())
        await until(lambda: not agent.problems())
        found = [one.text async for one in check(agent.settings, bench.open) if one.subject == "running agent"]
        assert found == ["ready"]
    assert not [one async for one in check(agent.settings, bench.open) if one.subject == "running agent"]
