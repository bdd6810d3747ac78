"""A real Jaeger: span trees, lines on spans, searches, running jobs, and a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tailspan_agent.commands.check import check
from tests.fakes.agents import Bench, looped
from tests.stores.jobs import LINES, STATES, add_jobs
from tests.stores.programs import Jaeger, wait_for

pytestmark = pytest.mark.services


@pytest.fixture
def jaeger(tmp_path: Path) -> Iterator[Jaeger]:
    """A Jaeger that runs for the test."""
    with Jaeger(tmp_path / "jaeger") as running:
        yield running


def otlp(jaeger: Jaeger) -> dict[str, Any]:
    """Return the settings for a Jaeger."""
    return {"endpoint": jaeger.otlp_url, "signals": ["traces"]}


def values(fields: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Jaeger's tags or fields by key."""
    return {field["key"]: field["value"] for field in fields}


def spans(trace: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a trace's spans by name."""
    return {span["operationName"]: span for span in trace["spans"]}


def parents(trace: dict[str, Any]) -> dict[str, str]:
    """Return the name of each span's parent; empty for a root, the parent's id if it is not there."""
    names = {span["spanID"]: span["operationName"] for span in trace["spans"]}
    found = {span["operationName"]: [one["spanID"] for one in span["references"]] for span in trace["spans"]}
    return {name: names.get(one[0], one[0]) if one else "" for name, one in found.items()}


def test_jobs_of_all_kinds(bench: Bench, jaeger: Jaeger) -> None:
    """Each job is one tree without a warning, found by name, run id and result; its lines are on the span."""
    add_jobs(bench)
    assert bench.once(otlp=otlp(jaeger), timeout_s=60).delivered
    wait_for(lambda: set(LINES) <= set(json.loads(jaeger.get("services"))["data"] or ()), "all services are there")
    for name, lines in LINES.items():
        (trace,) = jaeger.traces(name, tags=json.dumps({"cicd.pipeline.run.id": name}))
        found, run = spans(trace), f"RUN {name}"
        assert parents(trace) == {run: "", "submitted": run, "queued": run, "executing": run}
        assert [span["warnings"] for span in trace["spans"] if span.get("warnings")] == []
        events = [values(log["fields"]) for log in found["executing"]["logs"]]
        kept = [event["message"] for event in events]
        if name == "texts":
            assert kept[:-1] == lines[:-1]
            assert kept[-1].startswith("xxx")
            assert len(kept[-1]) == 2000
        else:
            assert kept == lines[-100:]
        assert values(found["executing"]["tags"])["tailspan.lines.left_out"] == len(lines) - len(kept)
        times = [log["timestamp"] for log in found["executing"]["logs"]]
        assert times == sorted(times)
        failed = name in STATES
        assert (values(found[run]["tags"]).get("error") is True) == failed
    severities = [values(log["fields"]).get("severity") for log in _executing(jaeger, "levels")["logs"]]
    assert severities == ["INFO", "WARNING", None, "ERROR", "DEBUG", "CRITICAL"]
    failures = jaeger.traces("failed", tags=json.dumps({"cicd.pipeline.result": "failure"}))
    assert len(failures) == 1
    assert jaeger.traces("plain", tags=json.dumps({"cicd.pipeline.result": "failure"})) == []


def _executing(jaeger: Jaeger, name: str) -> dict[str, Any]:
    (trace,) = jaeger.traces(name)
    return spans(trace)["executing"]


@looped
async def test_a_running_job_is_found(bench: Bench, jaeger: Jaeger) -> None:
    """By name and by run id; its spans have the run span as parent, which follows at the end of the run."""
    bench.fake.add_job("run-7", job_name="etl")
    bench.fake.add_lines("run-7", "a line")

    def found() -> list[dict[str, Any]]:
        return jaeger.traces("etl", tags=json.dumps({"cicd.pipeline.run.id": "run-7"}))

    async with bench.running(otlp=otlp(jaeger)):
        await asyncio.to_thread(wait_for, lambda: found() and len(spans(found()[0])) == 2, "the running job is there")
        (trace,) = found()
        assert set(spans(trace)) == {"submitted", "queued"}
        (parent,) = set(parents(trace).values())
        assert jaeger.traces("etl", operation="queued")
        bench.fake.set_state("run-7", "SUCCEEDED")
        await asyncio.to_thread(wait_for, lambda: len(spans(found()[0])) == 4, "the ended job is there")
    (trace,) = found()
    run = spans(trace)["RUN etl"]
    assert run["spanID"] == parent
    assert not any(span.get("warnings") for span in trace["spans"])


def test_check_names_the_setting(bench: Bench, jaeger: Jaeger) -> None:
    """Jaeger answers 404 for logs and metrics."""

    async def found() -> dict[str, str]:
        return {one.subject: one.text async for one in check(settings, bench.open)}

    settings = bench.settings(otlp={"endpoint": jaeger.otlp_url})
    texts = asyncio.run(found())
    for signal in ("logs", "metrics"):
        assert texts[f"otlp {signal}"].endswith('set otlp.signals = ["traces"] (Jaeger takes traces only)')
    assert texts["otlp traces"].endswith("accepts them")


@looped
async def test_spans_wait_for_a_jaeger_that_is_down(bench: Bench, jaeger: Jaeger) -> None:
    """A Jaeger that is killed and started again gets all that ended meanwhile."""
    async with bench.running(otlp=otlp(jaeger)):
        jaeger.kill()
        add_jobs(bench, {"late": ["one", "two"]})
        await asyncio.sleep(2)
        await asyncio.to_thread(jaeger.start)
        await asyncio.to_thread(
            wait_for, lambda: [len(spans(trace)) for trace in jaeger.traces("late")] == [4], "all spans are there"
        )
