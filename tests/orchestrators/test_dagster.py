"""Runs of a real Dagster, relayed by a real agent through a strict proxy: equal to what the server itself says."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tailspan import Client, load_settings
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import SpanRow
from tests.orchestrators.harness import Orchestrator, Proxy, Relay, by_task, results
from tests.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]

PROGRAM = "from tailspan.cli import main; main()"
# What a step prints to stderr begins with "err", to tell it from Dagster's own records.
JOBS = r"""
import logging, os, sys, time
from dagster import DynamicOut, DynamicOutput, In, Nothing, RetryPolicy, Definitions, in_process_executor, job, op

@op(retry_policy=RetryPolicy(max_retries=2, delay=1))
def flaky(context):
    print("plain print", context.retry_number); context.log.warning("attempt %d" % context.retry_number)
    print("err before", file=sys.stderr)
    if context.retry_number < 1: raise ValueError("first attempt fails\nsecond line of the error")
    print("err after", file=sys.stderr)

@op(ins={"start": In(Nothing)}, config_schema={"rows": int})
def extract(context) -> int:
    for i in range(context.op_config["rows"]): context.log.info(f"extract line {i}")
    context.log.error("two\nlines"); context.log.critical("the same"); context.log.critical("the same")
    logging.getLogger("lib").warning("err of a library")
    return 1

@op(ins={"start": In(Nothing)})
def slow(context) -> int:
    for i in range(60): print("tick", i, "\u00e4\U0001f600" * (i % 9), flush=True); time.sleep(0.2)
    os.write(1, b"not \xff\xfe UTF-8\n\n"); os.write(2, b"err raw \xff\n"); print("x" * 40_000)
    sys.stdout.write("no newline at the end")
    return 1

@op
def load(context, one: int, other: int): context.log.info("loaded")

@job(tags={"team": "geo"})
def nightly():
    start = flaky(); load(extract(start), slow(start))

@op
def boom(): print("about to fail"); raise RuntimeError("boom")

@op(ins={"start": In(Nothing)})
def never(): pass

@job
def broken(): never(boom())

@op
def hang(context): print("hanging", flush=True); context.log.info("hangs"); time.sleep(600)

@job
def hanging(): never(hang())

@op(out=DynamicOut())
def fan():
    for key in "abc": yield DynamicOutput(key, mapping_key=key)

@op
def work(context, one): print("work", one); context.log.info(f"working on {one}"); return one

@op
def gather(context, found): context.log.info("gathered"); print("err gathered", file=sys.stderr)

@job(executor_def=in_process_executor)
def mapped(): gather(fan().map(work).collect())

defs = Definitions(jobs=[nightly, broken, hanging, mapped])
"""
EVENTS = """query($id: ID!, $after: String){logsForRun(runId: $id, afterCursor: $after){... on EventConnection{
  cursor hasMore events{... on MessageEvent{message timestamp level stepKey eventType}
  ... on LogsCapturedEvent{fileKey stepKeys}
  ... on ErrorEvent{error{message stack errorChain{error{message stack}}}}}}}}"""
STEPS = "query($id: ID!){runOrError(runId: $id){... on Run{stepStats{stepKey status attempts{startTime endTime}}}}}"
RUNS = "{runsOrError{... on Runs{results{runId jobName status}}}}"
SEVERITIES = {"DEBUG": 5, "INFO": 9, "WARNING": 13, "ERROR": 17, "CRITICAL": 21}
RESULTS = {"SUCCESS": "success", "FAILURE": "failure", "CANCELED": "cancellation"}
AFTER = {"extract": ["flaky"], "slow": ["flaky"], "load": ["extract", "slow"], "never": ["boom"]}

Line = tuple[int, str, int, str, str, str]


class Dagster(Orchestrator):
    """A real Dagster."""

    def __init__(self, directory: Path) -> None:
        self.port = str(free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.home = directory / "home"
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        (directory / "jobs.py").write_text(JOBS)
        super().__init__("dagster", directory, {"DAGSTER_HOME": str(self.home)})

    def run(self) -> None:
        """Start the server, and wait until it answers."""
        self.start("dagster", "dev", "-f", "jobs.py", "-h", "127.0.0.1", "-p", self.port)
        self.wait_until(lambda: self.query("{version}"), "the server")

    def query(self, document: str, **variables: object) -> Any:
        """Return the only field of a reply."""
        body = {"query": document, "variables": variables}
        reply = httpx.post(f"{self.url}/graphql", json=body, timeout=60).raise_for_status().json()
        return next(iter(reply["data"].values()))

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the runs by id."""
        return {run["runId"]: run for run in self.query(RUNS)["results"]}

    def wait_for(self, run_id: str, *states: str) -> None:
        """Wait until a run has one of these states."""
        self.wait_until(lambda: self.runs()[run_id]["status"] in states, f"a run that is {' or '.join(states)}")


@pytest.fixture(scope="module")
def dagster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dagster]:
    """A server for all tests of this module."""
    with Dagster(tmp_path_factory.mktemp("dagster")) as server:
        server.run()
        yield server


def expected_lines(dagster: Dagster) -> Counter[Line]:
    """Time in ms, text, severity, stream, task and its attempt's id of each line; output has no time."""
    return sum((run_lines(dagster, run_id) for run_id in dagster.runs()), Counter[Line]())


def run_lines(dagster: Dagster, run_id: str) -> Counter[Line]:
    """The lines of one run: events from the API, output from the files on disk."""
    lines: Counter[Line] = Counter()
    retries: Counter[str] = Counter()
    events = dagster.query(EVENTS, id=run_id)["events"]
    # One process executes all steps of that job, and names the first one: it says nothing of what it prints.
    in_process = any(event["message"].startswith("Executing steps in process") for event in events)
    for event in events:
        steps = event.get("stepKeys") or []
        step = event["stepKey"] or (steps[0] if len(steps) == 1 and not in_process else "")
        attempt = f"{step}.{retries[step] + 1}" if retries[step] else step
        name = step.partition("[")[0]
        for text in [*(event["message"] or event["eventType"]).split("\n"), *traceback_of(event.get("error"))]:
            lines[int(event["timestamp"]), text, SEVERITIES[event["level"]], "", name, attempt] += 1
        retries[step] += event["eventType"] == "STEP_UP_FOR_RETRY"
        for stream, end in (("stdout", "out"), ("stderr", "err")):
            for text in printed(dagster, run_id, event.get("fileKey"), end):
                if stream == "stdout" or text.startswith("err"):
                    lines[0, text, 0, stream, name, attempt] += 1
    return lines


def printed(dagster: Dagster, run_id: str, key: str | None, end: str) -> list[str]:
    """Return the lines in the file of a stream."""
    if key is None:
        return []
    text = (dagster.home / "storage" / run_id / "compute_logs" / f"{key}.{end}").read_bytes().decode("utf-8", "replace")
    return text.removesuffix("\n").split("\n") if text else []


def traceback_of(error: Mapping[str, Any] | None) -> list[str]:
    """Return the lines of an error, as Python prints them."""
    lines: list[str] = []
    for one in [error, *(link["error"] for link in error["errorChain"])] if error else []:
        if lines:
            lines.append("The above exception was caused by the following exception:")
        if one["stack"]:
            lines += ["Traceback (most recent call last):", *"".join(one["stack"]).removesuffix("\n").split("\n")]
        lines += one["message"].removesuffix("\n").split("\n")
    return lines


def relayed_lines(collector: Collector) -> Counter[Line]:
    """The same of the lines that arrived, each uid once."""
    rows = {row.attributes["log.record.uid"]: row for row in collector.log_records() if not row.event_name}
    return Counter(
        (
            0 if row.attributes.get("log.iostream") else row.time_unix_nano // 1_000_000,
            row.body,
            0 if row.attributes.get("log.iostream") else row.severity_number,
            row.attributes.get("log.iostream", ""),
            row.attributes.get("cicd.pipeline.task.name", ""),
            row.attributes.get("cicd.pipeline.task.run.id", ""),
        )
        for row in rows.values()
    )


def test_runs_arrive_whole_through_stops_of_the_agent(dagster: Dagster, collector: Collector, tmp_path: Path) -> None:
    """Runs that retry, fail, fan out and are canceled: no line is missing or extra, and an attempt is a span.

    Meanwhile the agent is killed and stopped, tokens expire, and the server is busy at times.
    """
    own, token = tmp_path / "client.toml", tmp_path / "token"
    own.write_text(f'[services.dagster]\nbase_url = "{dagster.url}/graphql"\ntimeout = "60s"\n')
    with Client(load_settings(own), service="dagster") as client, ExitStack() as stack:
        proxy = stack.enter_context(Proxy(dagster.url, busy_each=17, expire_each=60, token_file=token))
        keys = f'base_url = "{proxy.url}"\ntoken_file = "{token}"\nui_url = "{dagster.url}"\ntimeout = "60s"'
        relay = stack.enter_context(Relay("dagster", keys, collector, tmp_path))
        commands = [["hanging"], ["broken"], ["nightly", "ops.extract.config.rows=80"], ["mapped"]]
        hanging, *others = [client.submit(command, attributes={"by": "test"}).job_id for command in commands]
        relay.interrupt(signal.SIGKILL, after_lines=30)
        relay.interrupt(signal.SIGTERM, after_lines=30)
        agent = relay.start()
        collector.wait_until(lambda: any(row.body == "hanging" for row in collector.log_records()), timeout_s=300)
        client.cancel(hanging)
        for run_id in (hanging, *others):
            dagster.wait_for(run_id, "SUCCESS", "FAILURE", "CANCELED")
        agent.kill()
        agent.wait()
        time.sleep(6)  # the last output of a run is read up to 5 s late
        relay.finish()
        assert proxy.refused[401]
        assert proxy.refused[429]
        expected = expected_lines(dagster)
        with suppress(TimeoutError):
            collector.wait_until(lambda: relayed_lines(collector) == expected, 60)
        assert relayed_lines(collector) == expected
        for run_id in dagster.runs():
            assert client.get_tasks(run_id)
            verify = ["agent", "verify", "--service", "dagster", "--config", str(relay.config), run_id]
            assert subprocess.run([sys.executable, "-c", PROGRAM, *verify], check=False, timeout=120).returncode == 0
        steps = [step for run_id in dagster.runs() for step in dagster.query(STEPS, id=run_id)["stepStats"]]
        # Two steps did not start.
        attempts = sum(len(step["attempts"]) for step in steps) + 2
        check_spans(dagster, collector, relay.spans(runs=len(commands), attempts=attempts), hanging)


def check_spans(dagster: Dagster, collector: Collector, spans: Mapping[str, SpanRow], canceled: str) -> None:
    """Compare spans with the runs and steps of the API."""
    runs = dagster.runs()
    assert results(spans) == {run_id: RESULTS[run["status"]] for run_id, run in runs.items()}
    times: dict[str, list[int]] = {}
    for row in collector.log_records():
        times.setdefault(row.span_id, []).append(row.time_unix_nano)
    found = by_task(spans)
    for run_id in runs:
        for step in dagster.query(STEPS, id=run_id)["stepStats"]:
            for number, attempt in enumerate(step["attempts"], 1):
                span = found.pop((run_id, step["stepKey"], number))
                result = RESULTS[step["status"]] if number == len(step["attempts"]) else "failure"
                if run_id == canceled:
                    result = "cancellation"
                assert span.attributes["cicd.pipeline.task.run.result"] == result
                assert span.status == ("ERROR" if result == "failure" else "UNSET")
                start, end = (round(attempt[one] * 1e9) for one in ("startTime", "endTime"))
                lines = times.get(span.span_id, [])
                # A step's process is launched before the step starts, and its span has the lines of one agent.
                assert min([start, *lines]) - 2000 <= span.start_unix_nano <= start + 2000
                assert end - 2000 <= span.end_unix_nano <= max([end, *lines]) + 2000
                assert spans[span.parent_span_id].name == "executing"
                assert f"/runs/{run_id}?selection=" in span.attributes["cicd.pipeline.task.run.url.full"]
                linked = {spans[link].name for _, link in span.links}
                assert linked.issuperset({span.name} if number > 1 else set(AFTER.get(span.name, ())))
    # What did not start has a span, too.
    assert {(runs[run_id]["jobName"], step) for run_id, step, _ in found} == {("broken", "never"), ("hanging", "never")}
    assert all(span.attributes["cicd.pipeline.task.run.result"] == "skip" for span in found.values())
    failed = next(span for span in spans.values() if span.name == "boom")
    assert failed.status_message == "RuntimeError: boom"
    failures = [row for row in collector.log_records() if row.event_name == "exception"]
    assert {(row.attributes["exception.type"], row.span_id) for row in failures} == {("RuntimeError", failed.span_id)}
