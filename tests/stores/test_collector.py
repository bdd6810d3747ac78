"""A real OpenTelemetry Collector with deploy/collector/gateway.yaml: valid, and without loss through six SIGKILLs."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes import collector as fakes
from tests.fakes.agents import Bench, looped
from tests.stores.jobs import add_jobs
from tests.stores.programs import ROOT, Collector, program

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

LINES = int(os.environ.get("STORES_LINES", "240000"))
JOBS = 6
KILLS = 6


@pytest.mark.parametrize("path", ["deploy/collector/gateway.yaml", "deploy/stores/collector.yaml"])
def test_the_configurations_are_valid(path: str, tmp_path: Path) -> None:
    """The collector's own check accepts them without a warning of old names."""
    environ = {"BACKEND_ENDPOINT": "http://localhost:1", "BACKEND_AUTHORIZATION": "x", "QUEUE_DIRECTORY": str(tmp_path)}
    command = [program("collector"), "validate", "--config", str(ROOT / path)]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@looped
async def test_nothing_is_lost_through_kills(bench: Bench, tmp_path: Path, collector: fakes.Collector) -> None:
    """Every line of a burst arrives; what arrives twice has the same uid."""
    names = [f"job{number}" for number in range(JOBS)]
    with Collector(tmp_path / "gateway", collector.http_url) as gateway:
        add_jobs(bench, {name: [f"line {number}" for number in range(LINES // JOBS)] for name in names})
        sending = asyncio.create_task(bench.agent(otlp={"endpoint": gateway.otlp_url}).run_once(500))
        for _ in range(KILLS):
            await asyncio.sleep(0.7)
            await asyncio.to_thread(gateway.restart)
        result = await sending
        assert (result.delivered, result.rejected) == (True, 0)
        uids: Counter[str] = Counter()

        def all_there() -> bool:
            uids.clear()
            uids.update(row.attributes["log.record.uid"] for row in bench.lines())
            return len(uids) == LINES // JOBS * JOBS

        while not await asyncio.to_thread(all_there):
            await asyncio.sleep(2)
    assert max(uids.values()) <= KILLS
    for name in names[:2]:
        texts = list(dict.fromkeys(bench.bodies(name)))
        assert set(texts) == {f"line {number}" for number in range(LINES // JOBS)}
