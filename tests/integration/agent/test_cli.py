"""`tailspan agent` as a user calls it: output, files and exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tailspan.cli import main
from tailspan_agent.agent import Agent
from tests.fakes.agents import Bench
from tests.fakes.collector import Reply
from tests.fakes.job_api import HTML, FakeJobApi, status_fault

TOKEN = "a-token-of-the-test"


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Restore logging: the command sets it up for its process, which here is the test's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def api() -> Iterator[FakeJobApi]:
    """A Fused job API with one ended job of two lines."""
    with FakeJobApi() as api:
        job = api.add_job("j1", name="etl", job_status="Done", job_status_date="2026-01-01T00:00:00+00:00")
        job.line("first", 1_767_225_500_000)
        job.line("second", 1_767_225_501_000)
        yield api


@pytest.fixture
def config(bench: Bench, api: FakeJobApi) -> Path:
    """A configuration that names the job."""
    return write(bench, api, jobs='["j1"]')


def write(bench: Bench, api: FakeJobApi, *, jobs: str = "[]", endpoint: str = "", more: str = "") -> Path:
    path = bench.directory / "config.toml"
    path.write_text(
        f'default_service = "fused"\n'
        f'[services.fused]\ntype = "fused"\nbase_url = "{api.base_url}"\ntoken = "{TOKEN}"\n'
        f'[agent]\nstate_dir = "{bench.state_dir}"\nlisten = "127.0.0.1:0"\n'
        f'[[agent.watch]]\nservice = "fused"\njobs = {jobs}\ndiscover = {str(jobs == "[]").lower()}\nsettle = 0\n'
        f'[otlp]\nendpoint = "{endpoint or bench.collector.http_url}"\n{more}\n'
    )
    return path


def agent(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["agent", *map(str, arguments)])


def once(config: Path, *arguments: str) -> Result:
    return agent("run", "--config", config, "--once", *arguments)


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the agent as a process; start the block once it follows jobs."""
    command = [sys.executable, "-c", "from tailspan.cli import main; main()", "agent", "run", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "the agent follows" in line:
                    break
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_once_relays_and_prints_a_summary(bench: Bench, config: Path) -> None:
    """0 once everything is acknowledged; stderr has only the summary, without requests of the HTTP client."""
    result = once(config)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == f"1 job: 3 log records acknowledged, 0 rejected ({', '.join(targets(bench))})\n"
    assert bench.bodies() == ["first", "second"]
    assert once(config).exit_code == 0
    assert bench.bodies() == ["first", "second"]


def targets(bench: Bench) -> list[str]:
    return [f"{bench.collector.http_url}/v1/{signal}" for signal in ("logs", "traces", "metrics")]


def test_once_with_rejected_records(bench: Bench, config: Path) -> None:
    """1; the dead letter shows them by reason with the command that sends them again, and replay sends them."""
    bench.collector.script("logs", Reply(rejected=1, message="too old"))
    result = once(config)
    assert (result.exit_code, "2 log records acknowledged, 1 rejected" in result.stderr) == (1, True)
    listed = agent("dead-letter", "--config", config)
    assert listed.exit_code == 0
    assert "logs: 1 of 2 records in 1 batch" in listed.output
    assert "too old" in listed.output
    (group,) = json.loads(agent("dead-letter", "--config", config, "--json").output)
    assert (group["signal"], group["kind"], group["rejected"], group["records"]) == ("logs", "partial", 1, 2)
    bench.collector.clear()
    files = sorted((bench.state_dir / "dead-letter").glob("*.jsonl"))
    replayed = agent("replay", *files, "--endpoint", bench.collector.http_url)
    assert replayed.exit_code == 0
    assert "2 records delivered" in replayed.output
    result_json = json.loads(agent("replay", *files, "--endpoint", bench.collector.http_url, "--json").output)
    assert (result_json["delivered"], result_json["rejected"], result_json["problems"]) == (2, 0, [])
    assert bench.bodies() == ["first", "second"] * 2


def test_once_with_an_endpoint_that_is_down(bench: Bench, config: Path) -> None:
    """3 when the time is up; the next run sends the rest."""
    bench.collector.always("logs", Reply(503))
    result = once(config, "--timeout", "0.5")
    assert (result.exit_code, "not everything was acknowledged within 500 ms" in result.stderr) == (3, True)
    bench.collector.always("logs", Reply())
    assert once(config).exit_code == 0


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        (status_fault(400, "no such thing"), 3, "no such thing"),
        (status_fault(401, "who are you"), 2, "who are you"),
        (HTML, 3, "fused"),
    ],
)
def test_once_with_a_service_that_does_not_answer(
    config: Path, api: FakeJobApi, fault: object, exit_code: int, words: str
) -> None:
    """One line with the error, the exit code of its class, no traceback and no token."""
    api.fault(fault, times=None)
    result = once(config)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.output


def test_once_with_a_job_that_does_not_exist(bench: Bench, api: FakeJobApi) -> None:
    """4, and the other jobs are relayed."""
    result = once(write(bench, api, jobs='["typo", "j1"]'))
    assert (result.exit_code, "typo" in result.stderr) == (4, True)
    assert bench.bodies() == ["first", "second"]


@pytest.mark.parametrize(
    "text", ["what = ", "[agent]\nunknown_key = 1\n", '[[agent.watch]]\nservice = "nowhere"\ndiscover = true\n']
)
@pytest.mark.parametrize(
    "command", [["run"], ["run", "--once"], ["check"], ["reload"], ["dead-letter"], ["verify", "x"]]
)
def test_an_invalid_file_is_reported_in_one_line(tmp_path: Path, command: list[str], text: str) -> None:
    """Exit code 2 for every command."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    result = agent(*command, "--config", path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith("tailspan: ")


def test_the_sdk_switched_off(config: Path) -> None:
    """2: an agent that must not send does not start."""
    result = CliRunner().invoke(
        main, ["agent", "run", "--once", "--config", str(config)], env={"OTEL_SDK_DISABLED": "true"}
    )
    assert (result.exit_code, "OTEL_SDK_DISABLED" in result.output) == (2, True)


def test_a_second_agent_and_a_newer_store(bench: Bench, config: Path) -> None:
    """2 for both; the message names the process with the lock, or the newer version; the file is not changed."""
    first = Agent(bench.settings(), bench.open)
    result = once(config)
    assert (result.exit_code, f"agent pid {os.getpid()}" in result.stderr) == (2, True)
    first.store.close()
    database = bench.state_dir / "checkpoints.db"
    newer = bytearray(database.read_bytes())
    newer[60:64] = (99).to_bytes(4, "big")
    database.write_bytes(newer)
    result = once(config)
    assert (result.exit_code, "newer" in result.stderr) == (2, True)
    assert database.read_bytes() == newer


def test_the_agent_runs_reloads_and_drains(bench: Bench, config: Path) -> None:
    """As a process: it follows jobs, reloads by `agent reload`, locks out a second agent, and exits 0 on SIGTERM."""
    good_config = config.with_name("same.toml")
    good_config.write_text(config.read_text())
    with running(config) as process:
        bench.collector.wait_until(lambda: bench.bodies() == ["first", "second"])
        config.write_text(config.read_text().replace("settle = 0", "settle = 1"))
        result = agent("reload", "--config", config)
        assert (result.exit_code, str(process.pid) in result.output) == (0, True)
        assert result.stdout.endswith("changed: agent.watch\n")
        good = config.read_text()
        config.write_text(good + "what = 1\n")
        failed = agent("reload", "--config", good_config)
        assert (failed.exit_code, "did not reload; the old configuration stays in force" in failed.stderr) == (2, True)
        assert "what" in failed.stderr
        config.write_text(good)
        again = json.loads(agent("reload", "--config", config, "--json").stdout)
        assert (again["changed"], again["needs_restart"], again["problems"]) == ([], [], [])
        assert process.stderr is not None
        assert any("the configuration was reloaded" in line for line in process.stderr)
        assert agent("run", "--config", config).exit_code == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    assert once(config).exit_code == 0
    assert bench.bodies() == ["first", "second"]


def test_reload_without_an_agent(config: Path) -> None:
    """2, with the command that starts one."""
    result = agent("reload", "--config", config)
    assert (result.exit_code, "no agent runs on" in result.output) == (2, True)


def test_check_without_problems(bench: Bench, config: Path) -> None:
    """0: service, job and signals are reachable; the JSON has one line per finding."""
    result = agent("check", "--config", config)
    assert result.exit_code == 0, result.output
    assert "ok      services.fused: reachable" in result.output
    assert "ok      job j1: etl: SUCCEEDED" in result.output
    assert "ok      otlp logs" in result.output
    findings = [json.loads(line) for line in agent("check", "--config", config, "--json").output.splitlines()]
    assert {"services.fused", "job j1", "otlp logs", "otlp traces", "otlp metrics"} <= {f["subject"] for f in findings}
    assert bench.collector.log_records() == []


def test_check_reports_problems(bench: Bench, api: FakeJobApi) -> None:
    """The first problem decides: an unreachable endpoint is 3, a job that does not exist 4."""
    result = agent("check", "--config", write(bench, api, jobs='["typo"]'))
    assert (result.exit_code, "problem job typo" in result.output) == (4, True)
    result = agent("check", "--config", write(bench, api, jobs='["j1"]', endpoint="http://127.0.0.1:9"))
    assert (result.exit_code, "problem otlp logs" in result.output) == (3, True)


def test_an_empty_dead_letter(config: Path) -> None:
    """It is not an error."""
    result = agent("dead-letter", "--config", config)
    assert (result.exit_code, "nothing was rejected" in result.output) == (0, True)


def test_replay_needs_an_endpoint_that_answers(bench: Bench, config: Path, tmp_path: Path) -> None:
    """2 without an endpoint, 1 for unreadable lines, 3 for an endpoint that fails."""
    path = tmp_path / "logs.jsonl"
    path.write_text("no json\n")
    assert agent("replay", path).exit_code == 2
    result = agent("replay", path, "--endpoint", bench.collector.http_url)
    assert (result.exit_code, f"{path}:1: " in result.output) == (1, True)
    path.write_text('{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"stringValue": "x"}}]}]}]}\n')
    bench.collector.always("logs", Reply(404))
    assert agent("replay", path, "--endpoint", bench.collector.http_url).exit_code == 3


def test_verify_compares_the_log_with_what_was_relayed(bench: Bench, config: Path, api: FakeJobApi) -> None:
    """0 if every line was acknowledged; 1 before that and after a change of the source; 4 without the job."""
    assert agent("verify", "j1", "--config", config).exit_code == 1
    assert once(config).exit_code == 0
    result = agent("verify", "j1", "--config", config)
    assert (result.exit_code, result.output) == (
        0,
        "verified: the whole log was acknowledged and is unchanged: 2 lines\n",
    )
    report = json.loads(agent("verify", "j1", "--config", config, "--json").output)
    assert (report["verdict"], report["lines_relayed"]) == ("verified", 2)
    api.jobs["j1"].line("more", 1_767_225_502_000)
    result = agent("verify", "j1", "--config", config)
    assert (result.exit_code, result.output.startswith("different: ")) == (1, True)
    assert agent("verify", "typo", "--config", config).exit_code == 4
