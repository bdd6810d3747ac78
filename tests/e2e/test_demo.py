"""`tailspan demo`: its printed counts are what the endpoint received; interrupted, it leaves no job running."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector
from tests.fakes.local_jobs import until
from tests.fakes.otlp_rows import LogRow

RESULTS = {
    "RUN weather-etl": "success",
    "RUN invoice-import": "failure",
    "RUN tile-render": "success",
    "RUN backfill-year": "cancellation",
}


def results(collector: Collector) -> dict[str, object]:
    runs = [span for span in collector.spans() if span.name.startswith("RUN ")]
    return {span.name: span.attributes["cicd.pipeline.result"] for span in runs}


def lines(collector: Collector, name: str, stream: str) -> list[LogRow]:
    """Return the lines of a pipeline's stream in the order of arrival."""
    rows = [row for row in collector.log_records() if row.resource["service.name"] == name]
    return [row for row in rows if not row.event_name and row.attributes["log.iostream"] == stream]


def states(home: Path) -> list[str]:
    """Return the states of all jobs of a demo that have begun."""
    return [json.loads(path.read_text())["state"] for path in home.glob("jobs/jobs/*/state.json")]


def test_the_demo_without_a_collector_and_the_commands_that_it_prints(machine: Machine, collector: Collector) -> None:
    """Four pipelines end as printed, all goes to files, and the printed replay command delivers exactly that."""
    home = machine.home / "demo"
    shown = machine.tailspan("demo", "--dir", str(home)).stdout
    assert sorted(states(home)) == ["CANCELED", "FAILED", "SUCCEEDED", "SUCCEEDED"]
    assert "InvoiceError" in shown
    count = {
        name: int(found.replace(",", "")) for found, name in re.findall(r"([\d,]+) (log records|spans) +to /", shown)
    }
    files = sorted(map(str, home.glob("agent/otlp/*.jsonl")))
    machine.invoke("agent", "replay", *files, "--endpoint", collector.http_url)
    assert results(collector) == RESULTS
    assert count == {"log records": len(collector.log_records()), "spans": len(collector.spans())}


def test_the_demo_sends_to_the_endpoint_of_the_environment(machine: Machine, collector: Collector) -> None:
    """Logs, spans and metrics are received when it prints their counts."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_url}
    shown = machine.tailspan("demo", "--dir", str(machine.home / "demo"), env=endpoint).stdout
    assert results(collector) == RESULTS
    assert f"{len(collector.log_records()):,} log records" in shown
    assert "cicd.pipeline.run.duration" in {metric.name for metric in collector.metrics()}
    for name in RESULTS:
        for stream in ("stdout", "stderr"):
            times = [row.time_unix_nano for row in lines(collector, name.removeprefix("RUN "), stream)]
            assert times == sorted(set(times)), f"{name}: lines of {stream} did not arrive in their order"


def test_a_demo_that_is_stopped_leaves_no_job_running(machine: Machine) -> None:
    """Its long pipeline would go on for an hour."""
    home = machine.home / "demo"
    demo = machine.start("demo", "--dir", str(home))
    until(lambda: len(states(home)) == 4)
    demo.send_signal(signal.SIGINT)
    _, stderr = demo.communicate(timeout=60)
    assert (demo.returncode, "Traceback" in stderr) == (130, False)
    until(lambda: "RUNNING" not in states(home))
