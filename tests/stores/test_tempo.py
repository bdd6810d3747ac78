"""A real Tempo with its default size of attributes: searches and stack traces. `TEMPO_BIN` names the program.

For Tempo 2.9 set `TEMPO_CONFIG=tempo.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agents import Bench
from tests.fakes.tempo import ATTRIBUTE_BYTES
from tests.stores.jobs import LINES, add_jobs
from tests.stores.programs import Tempo, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


@pytest.fixture
def tempo(tmp_path: Path) -> Iterator[Tempo]:
    """A Tempo that runs for the test."""
    with Tempo(tmp_path / "tempo") as running:
        yield running


def test_jobs_of_all_kinds(bench: Bench, tempo: Tempo) -> None:
    """Each job is one tree, found by its name and by its run id."""
    add_jobs(bench)
    assert bench.once(otlp={"endpoint": tempo.otlp_url, "signals": ["traces"]}, timeout_s=60).delivered
    for name in LINES:
        query = f'{{ resource.cicd.pipeline.run.id = "{name}" }} with (most_recent=true)'
        wait_for(lambda query=query: tempo.get("search", q=query).get("traces"), f"job {name} is found")
        (trace,) = tempo.get("search", q=query)["traces"]
        assert trace["rootTraceName"] == f"RUN {name}"
        assert set(tempo.spans(trace["traceID"])) == {f"RUN {name}", "submitted", "queued", "executing"}


def test_it_keeps_what_was_raised(bench: Bench, tempo: Tempo) -> None:
    """The end of a long stack trace is on the span."""
    frames = [line for number in range(150) for line in (f'  File "/app/m{number}.py", line 1, in f', "    call()")]
    lines = ["Traceback (most recent call last):", *frames, "ValueError: the last line"]
    add_jobs(bench, {"failed": lines})
    assert bench.once(otlp={"endpoint": tempo.otlp_url, "signals": ["traces"]}, timeout_s=60).delivered
    query = '{ resource.service.name = "failed" }'
    wait_for(lambda: tempo.get("search", q=query).get("traces"), "the job is found")
    (trace,) = tempo.get("search", q=query)["traces"]
    (event,) = (one for one in tempo.spans(trace["traceID"])["RUN failed"]["events"] if one["name"] == "exception")
    values = {one["key"]: one["value"].get("stringValue", "") for one in event["attributes"]}
    assert values["exception.stacktrace"].endswith("ValueError: the last line")
    assert len(values["exception.stacktrace"].encode()) <= ATTRIBUTE_BYTES
