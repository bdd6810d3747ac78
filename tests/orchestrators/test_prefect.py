"""Flow runs of a real Prefect server, relayed by a real agent: equal to what the server's own API says at the end."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tailspan import Client, load_settings
from tailspan.models import JobState
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import SpanRow
from tests.orchestrators.harness import (
    ListedLine,
    Orchestrator,
    Proxy,
    Relay,
    by_task,
    results,
)
from tests.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

FLOWS = """
import sys, time
from prefect import flow, get_run_logger, task

@task(retries=2, retry_delay_seconds=1)
def extract(n):
    for i in range(n): get_run_logger().info("extract line %d", i); time.sleep(0.01)
    print("plain print from task")
    return n

@task(retries=1, retry_delay_seconds=1)
def flaky():
    get_run_logger().warning("about to fail, maybe")
    import prefect.runtime.task_run as run
    if run.run_count < 2: raise ValueError("first attempt fails\\nsecond line of the error")

@task
def slow(seconds, rows):
    for i in range(seconds * 5): get_run_logger().info("tick %d", i); time.sleep(0.2)

@flow(log_prints=True)
def child(n):
    extract(n); print("in child")

@flow(log_prints=True)
def nightly(n, seconds, fail):
    get_run_logger().info("start"); rows = extract.submit(n); flaky(); child(3); slow(seconds, rows)
    if fail: raise RuntimeError("boom")

@flow
def hanging(): slow(600, 0)

if __name__ == "__main__":
    if sys.argv[1] == "serve": hanging.serve(name="served")
    else: nightly(int(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3)
"""
SEVERITIES = {10: 5, 20: 9, 30: 13, 40: 17, 50: 21}
RESULTS = {"COMPLETED": "success", "FAILED": "failure", "CANCELLED": "cancellation", "CRASHED": "error"}


class Prefect(Orchestrator):
    """A real Prefect server."""

    def __init__(self, directory: Path) -> None:
        self.port = str(free_port())
        self.url = f"http://127.0.0.1:{self.port}/api"
        env = {"PREFECT_HOME": str(directory / "prefect"), "PREFECT_API_URL": self.url}
        super().__init__(
            "prefect", directory, {**env, "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        )

    def run(self) -> None:
        """Start the server, and wait until it answers."""
        self.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", self.port)
        self.wait_until(lambda: httpx.get(f"{self.url}/health", timeout=5).is_success, "the server")

    def post(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return all pages of a filter."""
        found: list[dict[str, Any]] = []
        while True:
            reply = httpx.post(self.url + path, json={**body, "limit": 200, "offset": len(found)}, timeout=60)
            reply.raise_for_status()
            found += reply.json()
            if len(reply.json()) < 200:
                return found

    def attempt_times(self, row: dict[str, Any], attempt: int) -> tuple[float, float]:
        """Return start and end of an attempt in us, by the history of its states."""
        reply = httpx.get(f"{self.url}/task_run_states/", params={"task_run_id": row["id"]}, timeout=60)
        states = sorted(reply.raise_for_status().json(), key=lambda state: state["timestamp"])
        times = [datetime.fromisoformat(state["timestamp"]).timestamp() * 1e6 for state in states]
        begun = [place for place, state in enumerate(states) if state["type"] == "RUNNING"]
        place = begun[attempt - 1]
        return times[place], times[place + 1]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server for all tests of this module."""
    with Prefect(tmp_path_factory.mktemp("prefect")) as server:
        server.run()
        yield server


def expected_lines(prefect: Prefect) -> Counter[ListedLine]:
    """Time in us, text, severity and task of each line, as the server's API has them."""
    names = {row["id"]: row["task_key"].rpartition("-")[0] for row in prefect.post("/task_runs/filter", {})}
    calls = {row["id"]: row["parent_task_run_id"] for row in prefect.post("/flow_runs/filter", {})}
    lines: Counter[ListedLine] = Counter()
    for entry in prefect.post("/logs/filter", {"sort": "TIMESTAMP_ASC"}):
        if entry["flow_run_id"] is None:  # of the process that serves
            continue
        task = names.get(entry["task_run_id"] or calls[entry["flow_run_id"]], "")
        time_us = round(datetime.fromisoformat(entry["timestamp"]).timestamp() * 1e6)
        for text in entry["message"].split("\n"):
            lines[time_us, text.rstrip(), SEVERITIES[entry["level"]], task] += 1
    return lines


def test_runs_arrive_whole_through_stops_of_the_agent(prefect: Prefect, collector: Collector, tmp_path: Path) -> None:
    """Runs that succeed, fail and are canceled: no line is missing or extra, and an attempt is a span.

    Meanwhile the agent is killed and stopped, tokens expire, and the server is busy at times.
    """
    flows, own, token = prefect.directory / "flows.py", tmp_path / "client.toml", tmp_path / "token"
    flows.write_text(FLOWS)
    own.write_text(f'[services.prefect]\nbase_url = "{prefect.url}"\ntimeout = "60s"\n')
    prefect.start("python", str(flows), "serve")
    with Client(load_settings(own), service="prefect") as client, ExitStack() as stack:
        proxy = stack.enter_context(
            Proxy(prefect.url.removesuffix("/api"), busy_each=10, expire_each=40, token_file=token)
        )
        keys = f'base_url = "{proxy.url}/api"\ntoken_file = "{token}"\nui_url = "{prefect.url}"\ntimeout = "60s"'
        relay = stack.enter_context(Relay("prefect", keys, collector, tmp_path))
        deployment = {"deployments": {"name": {"any_": ["served"]}}}
        prefect.wait_until(lambda: prefect.post("/deployments/filter", deployment), "the deployment")
        canceled = client.submit(["hanging/served"], attributes={"by": "test"}).job_id
        runs = [prefect.start("python", str(flows), "150", "8"), prefect.start("python", str(flows), "20", "4", "fail")]
        relay.interrupt(signal.SIGKILL)
        relay.interrupt(signal.SIGTERM)
        agent = relay.start()

        def ticks() -> bool:
            tails = [row for row in collector.log_records() if row.resource["cicd.pipeline.run.id"] == canceled]
            return any("tick 9" in row.body for row in tails)

        collector.wait_until(ticks, timeout_s=300)
        assert client.cancel(canceled).job_status == "Cancelling"
        prefect.wait_until(lambda: client.get_status(canceled).state is JobState.CANCELED, "the canceled run")
        assert [run.wait(300) for run in runs] == [0, 1]
        agent.kill()
        agent.wait()
        time.sleep(3)  # lines become visible up to 2 s late
        relay.finish()
        relay.wait_for(expected_lines(prefect))
        spans = relay.spans(runs=3, attempts=13)
        assert proxy.refused[429]
        assert proxy.refused[401]
        assert proxy.tunnels

    top = {row["id"]: row for row in prefect.post("/flow_runs/filter", {}) if row["parent_task_run_id"] is None}
    assert results(spans) == {run_id: RESULTS[row["state_type"]] for run_id, row in top.items()}
    assert results(spans)[canceled] == "cancellation"
    check_tasks(prefect, collector, spans)


def check_tasks(prefect: Prefect, collector: Collector, spans: Mapping[str, SpanRow]) -> None:
    """Compare the spans of attempts with the task runs of the API and the histories of their states."""
    tasks = by_task(spans).values()
    shown = Counter((s.name, s.attributes["tailspan.task.attempt"]) for s in tasks)
    assert shown == {("extract", 1): 4, ("flaky", 1): 2, ("flaky", 2): 2, ("child", 1): 2, ("slow", 1): 3}
    rows = {row["id"]: row for row in prefect.post("/task_runs/filter", {})}
    assert rows.keys() == {span.attributes["tailspan.task.id"] for span in tasks}
    line_times: dict[str, list[float]] = {}
    for line in collector.log_records():
        line_times.setdefault(line.span_id, []).append(line.time_unix_nano / 1000)
    for span in tasks:
        row, attempt = rows[span.attributes["tailspan.task.id"]], span.attributes["tailspan.task.attempt"]
        result = RESULTS[row["state_type"]] if attempt == row["run_count"] else "failure"
        assert span.attributes["cicd.pipeline.task.run.result"] == result
        assert span.status == ("ERROR" if result in ("failure", "error") else "UNSET")
        assert span.attributes["cicd.pipeline.task.run.url.full"].endswith(f"/runs/task-run/{row['id']}")
        start, end = prefect.attempt_times(row, attempt)
        times = line_times.get(span.span_id, [])
        assert min([start, *times]) - 2 < span.start_unix_nano / 1000 < start + 2
        assert end - 2 < span.end_unix_nano / 1000 < max([end, *times]) + 2
        parent = spans[span.parent_span_id]
        assert parent.name in ("executing", "child")
        assert parent.start_unix_nano <= span.start_unix_nano <= span.end_unix_nano <= parent.end_unix_nano or (
            parent.name == "child"
        )
        linked = {spans[link].name for _, link in span.links}
        of_nightly = span.attributes["cicd.pipeline.name"] == "nightly"
        assert linked == ({"extract"} if span.name == "slow" and of_nightly else {span.name} if attempt > 1 else set())
