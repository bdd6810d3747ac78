"""Each line arrives once, whenever the agent is started, stopped and started again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector

# Prints a numbered line, and waits after each until the test lets it go on.
STEPS = """
import pathlib, sys, time
gate = pathlib.Path({gate!r})
for number in range({lines}):
    print("line", number, flush=True)
    while number + 1 >= len(gate.read_bytes()):
        time.sleep(0.01)
"""


class SteppedJob:
    """A real job that prints a line for each step that the test allows."""

    def __init__(self, machine: Machine, script: Callable[[str], list[str]], path: Path, lines: int) -> None:
        self._gate = path / "gate"
        self._gate.write_bytes(b"")
        self.expected = [f"line {number}" for number in range(lines)]
        self.id = machine.detach(*script(STEPS.format(gate=str(self._gate), lines=lines)), options=("--name", "steps"))

    def go(self, lines: int) -> None:
        """Let it print up to a number of lines in all; one more than its last ends it."""
        self._gate.write_bytes(b"." * lines)


def bodies(collector: Collector) -> list[object]:
    """The text of all lines, in order of arrival."""
    return [row.body for row in collector.log_records() if not row.event_name]


def stop(agent: subprocess.Popen[str]) -> None:
    """Stop the agent with SIGTERM."""
    agent.send_signal(signal.SIGTERM)
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 0, errors


@pytest.fixture
def job(machine: Machine, script: Callable[[str], list[str]], tmp_path: Path, collector: Collector) -> SteppedJob:
    """A job that waits for the test at its first line."""
    machine.configure(f'[otlp]\nendpoint = "{collector.http_url}"\n')
    return SteppedJob(machine, script, tmp_path, 6)


def test_agent_that_started_before_the_job(machine: Machine, collector: Collector, job: SteppedJob) -> None:
    """It discovers the job, and relays its lines while it runs and its end."""
    agent = machine.start("agent", "run")
    collector.wait_until(lambda: bodies(collector) == job.expected[:1])
    collector.wait_until(lambda: "submitted" in {span.name for span in collector.spans()})
    job.go(3)
    collector.wait_until(lambda: bodies(collector) == job.expected[:3])
    assert machine.status(job.id)["state"] == "RUNNING"
    job.go(9)
    collector.wait_until(lambda: "RUN steps" in {span.name for span in collector.spans()})
    stop(agent)
    assert bodies(collector) == job.expected
    parents = {span.parent_span_id for span in collector.spans()} - {""}
    assert parents == {span.span_id for span in collector.spans() if span.name == "RUN steps"}


def test_agent_that_is_stopped_and_started_in_the_middle(
    machine: Machine, collector: Collector, job: SteppedJob
) -> None:
    """Lines that were written while it was stopped are relayed after its start; no line is sent twice."""
    agent = machine.start("agent", "run")
    collector.wait_until(lambda: bodies(collector) == job.expected[:1])
    job.go(2)
    collector.wait_until(lambda: bodies(collector) == job.expected[:2])
    stop(agent)
    job.go(4)
    machine.start("agent", "run")
    collector.wait_until(lambda: bodies(collector) == job.expected[:4])
    job.go(9)
    collector.wait_until(lambda: "RUN steps" in {span.name for span in collector.spans()})
    assert bodies(collector) == job.expected
    spans = [span.span_id for span in collector.spans()]
    assert len(spans) == len(set(spans)) == 4


def test_agent_that_starts_after_the_job(machine: Machine, collector: Collector, job: SteppedJob) -> None:
    """An ended job is backfilled completely."""
    job.go(9)
    machine.invoke("wait", job.id)
    agent = machine.start("agent", "run")
    collector.wait_until(lambda: "RUN steps" in {span.name for span in collector.spans()})
    stop(agent)
    assert bodies(collector) == job.expected


def test_two_passes_relay_each_line_once(machine: Machine, collector: Collector, job: SteppedJob) -> None:
    """A pass takes a running job to its present end, the next goes on there, and one more finds nothing."""
    job.go(2)
    while len(machine.invoke("logs", job.id).stdout.splitlines()) < 2:
        time.sleep(0.02)
    machine.invoke("agent", "run", "--once")
    assert bodies(collector) == job.expected[:2]
    job.go(9)
    machine.invoke("wait", job.id)
    machine.invoke("agent", "run", "--once")
    assert bodies(collector) == job.expected
    spans = len(collector.spans())
    machine.invoke("agent", "run", "--once")
    assert bodies(collector) == job.expected
    assert len(collector.spans()) == spans == 4


def test_without_an_endpoint_the_files_are_replayed_later(
    machine: Machine, collector: Collector, job: SteppedJob
) -> None:
    """Telemetry waits in OTLP JSON lines files; a replay delivers each line once, and every span."""
    machine.configure()
    job.go(9)
    machine.invoke("wait", job.id)
    machine.invoke("agent", "run", "--once")
    files = sorted(str(path) for path in (machine.home / "agent" / "otlp").glob("*.jsonl"))
    assert [Path(name).stem for name in files] == ["logs", "metrics", "traces"]
    machine.invoke("agent", "replay", *files, "--endpoint", collector.http_url)
    assert bodies(collector) == job.expected
    assert {span.name for span in collector.spans()} == {"submitted", "queued", "executing", "RUN steps"}
    assert collector.metrics()
