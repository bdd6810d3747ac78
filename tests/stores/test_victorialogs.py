"""A real VictoriaLogs with the settings of docs/stores.md: every line, in order, once, and a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agents import Bench, looped
from tests.stores.jobs import LINES, add_jobs
from tests.stores.programs import VictoriaLogs, wait_for

pytestmark = pytest.mark.services


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VictoriaLogs]:
    """A VictoriaLogs that runs for the test."""
    with VictoriaLogs(tmp_path / "victoria-logs") as running:
        yield running


def settings(store: VictoriaLogs) -> str:
    """Return the table of docs/stores.md."""
    return f"""
[otlp.logs]
endpoint = "{store.logs_url}"
headers = {{ VL-Stream-Fields = "service.name,service.namespace" }}
"""


OTLP = {"endpoint": None, "signals": ["logs"]}


def rows(store: VictoriaLogs, name: str) -> list[dict[str, str]]:
    """Return the lines of a job as the store shows them by time: without receipt and failure."""
    found = store.query(f'_time:1h "service.name":="{name}" | sort by (_time)')
    return [
        row for row in found if ".receipt." not in row["log.record.uid"] and ".failure." not in row["log.record.uid"]
    ]


def test_jobs_of_all_kinds(bench: Bench, store: VictoriaLogs) -> None:
    """Text, order, severity and stream of each line are as written; all runs of a name are one stream."""
    add_jobs(bench)
    result = bench.once(otlp=OTLP, more=settings(store), timeout_s=60)
    assert (result.delivered, result.rejected) == (True, 0)
    total = sum(map(len, LINES.values()))
    wait_for(lambda: sum(len(rows(store, name)) for name in LINES) == total, "all lines are there")
    for name, lines in LINES.items():
        found = rows(store, name)
        assert [row["_msg"] for row in found] == lines
        assert {row["cicd.pipeline.run.id"] for row in found} <= {name}
        assert len({row["log.record.uid"] for row in found}) == len(lines)
        assert len({row["_stream"] for row in found}) <= 1
    assert [row.get("severity_text") for row in rows(store, "levels")][1::2] == ["WARNING", "ERROR", "CRITICAL"]


@looped
async def test_a_store_that_is_killed_and_started_again(bench: Bench, store: VictoriaLogs) -> None:
    """Lines from before, during and after the outage are there, in order."""
    lines = [f"line {number}" for number in range(6_000)]
    bench.fake.add_job("long", job_name="long")
    bench.fake.add_lines("long", *lines[:2000])
    async with bench.running(otlp=OTLP, more=settings(store)):
        await asyncio.to_thread(wait_for, lambda: len(rows(store, "long")) == 2000, "the first lines are there")
        # VictoriaLogs acknowledges lines before they are on its disk: by default 5 s, here 1 s.
        await asyncio.sleep(5)
        store.kill()
        bench.fake.add_lines("long", *lines[2000:4000])
        await asyncio.sleep(1)
        await asyncio.to_thread(store.start)
        bench.fake.add_lines("long", *lines[4000:])
        bench.fake.set_state("long", "SUCCEEDED")
        await asyncio.to_thread(wait_for, lambda: len(rows(store, "long")) >= len(lines), "all lines are there")
    assert [row["_msg"] for row in rows(store, "long")] == lines
