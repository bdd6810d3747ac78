"""`tailspan agent` as a user types it: words, files and exit codes."""

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
    """The command sets up the logging of its process, which here is the test's."""
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
    """A configuration for it that names the job."""
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
    """Run the agent in a process of its own, from when it says that it follows."""
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


def test_once_relays_and_says_how_much(bench: Bench, config: Path) -> None:
    """0 when all is acked; nothing but its summary on stderr, and no request of the HTTP client in it."""
    result = once(config)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == f"1 jobs: 3 log records acked, 0 rejected ({', '.join(targets(bench))})\n"
    assert bench.bodies() == ["first", "second"]
    assert once(config).exit_code == 0
    assert bench.bodies() == ["first", "second"]


def targets(bench: Bench) -> list[str]:
    return [f"{bench.collector.http_url}/v1/{signal}" for signal in ("logs", "traces", "metrics")]


def test_once_with_rejected_records(bench: Bench, config: Path) -> None:
    """1: the dead letter shows them by reason and says how to send them again, and replay sends them."""
    bench.collector.script("logs", Reply(rejected=1, message="too old"))
    result = once(config)
    assert (result.exit_code, "2 log records acked, 1 rejected" in result.stderr) == (1, True)
    shown = agent("dead-letter", "--config", config)
    assert shown.exit_code == 0
    assert "logs: 1 of 2 records in 1 batches" in shown.output
    assert "too old" in shown.output
    (group,) = json.loads(agent("dead-letter", "--config", config, "--json").output)
    assert (group["signal"], group["kind"], group["rejected"], group["records"]) == ("logs", "partial", 1, 2)
    bench.collector.clear()
    files = sorted((bench.state_dir / "dead-letter").glob("*.jsonl"))
    replayed = agent("replay", *files, "--endpoint", bench.collector.http_url)
    assert replayed.exit_code == 0
    assert "2 records delivered" in replayed.output
    told = json.loads(agent("replay", *files, "--endpoint", bench.collector.http_url, "--json").output)
    assert (told["delivered"], told["rejected"], told["problems"]) == (2, 0, [])
    assert bench.bodies() == ["first", "second"] * 2


def test_once_with_an_endpoint_that_is_away(bench: Bench, config: Path) -> None:
    """3 when the time is up; the next run sends what is missing."""
    bench.collector.always("logs", Reply(503))
    result = once(config, "--timeout", "0.5")
    assert (result.exit_code, "not everything was acked within 0.5 s" in result.stderr) == (3, True)
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
    """One line that says what happened, the exit code of its kind, no traceback and no token."""
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
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, command: list[str], text: str) -> None:
    """Exit code 2 for every command."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    result = agent(*command, "--config", path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith("tailspan: ")


def test_the_sdk_switched_off(config: Path) -> None:
    """2: an agent that may not send is not started."""
    result = CliRunner().invoke(
        main, ["agent", "run", "--once", "--config", str(config)], env={"OTEL_SDK_DISABLED": "true"}
    )
    assert (result.exit_code, "OTEL_SDK_DISABLED" in result.output) == (2, True)


def test_a_second_agent_and_a_newer_store(bench: Bench, config: Path) -> None:
    """2 for both; the message says who holds the directory, or that the file is from a newer version and untouched."""
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
    """A process of its own: it follows, takes SIGHUP by `agent reload`, refuses a twin, and ends 0 on SIGTERM."""
    with running(config) as process:
        bench.collector.wait_until(lambda: bench.bodies() == ["first", "second"])
        config.write_text(config.read_text().replace("settle = 0", "settle = 1"))
        result = agent("reload", "--config", config)
        assert (result.exit_code, str(process.pid) in result.output) == (0, True)
        assert process.stderr is not None
        assert any("the configuration was reloaded" in line for line in process.stderr)
        assert agent("run", "--config", config).exit_code == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    assert once(config).exit_code == 0
    assert bench.bodies() == ["first", "second"]


def test_reload_without_an_agent(config: Path) -> None:
    """2, and how to start one."""
    result = agent("reload", "--config", config)
    assert (result.exit_code, "no agent runs on" in result.output) == (2, True)


def test_check_finds_all_well(bench: Bench, config: Path) -> None:
    """0: the service, the job and each signal are reached; the JSON has a line per finding."""
    result = agent("check", "--config", config)
    assert result.exit_code == 0, result.output
    assert "ok      services.fused: answers" in result.output
    assert "ok      job j1: etl: SUCCEEDED" in result.output
    assert "ok      otlp logs" in result.output
    findings = [json.loads(line) for line in agent("check", "--config", config, "--json").output.splitlines()]
    assert {"services.fused", "job j1", "otlp logs", "otlp traces", "otlp metrics"} <= {f["subject"] for f in findings}
    assert bench.collector.log_records() == []


def test_check_says_what_is_wrong(bench: Bench, api: FakeJobApi) -> None:
    """The worst of it decides: an endpoint that is not there is 3, a job that does not exist 4."""
    result = agent("check", "--config", write(bench, api, jobs='["typo"]'))
    assert (result.exit_code, "problem job typo" in result.output) == (4, True)
    result = agent("check", "--config", write(bench, api, jobs='["j1"]', endpoint="http://127.0.0.1:9"))
    assert (result.exit_code, "problem otlp logs" in result.output) == (3, True)


def test_dead_letter_of_nothing(config: Path) -> None:
    """An empty dead letter is no error."""
    result = agent("dead-letter", "--config", config)
    assert (result.exit_code, "nothing was refused" in result.output) == (0, True)


def test_replay_needs_an_endpoint_that_answers(bench: Bench, config: Path, tmp_path: Path) -> None:
    """2 without an endpoint, 1 for lines that are none, 3 for one that faults."""
    path = tmp_path / "logs.jsonl"
    path.write_text("no json\n")
    assert agent("replay", path).exit_code == 2
    result = agent("replay", path, "--endpoint", bench.collector.http_url)
    assert (result.exit_code, f"{path}:1: " in result.output) == (1, True)
    path.write_text('{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"stringValue": "x"}}]}]}]}\n')
    bench.collector.always("logs", Reply(404))
    assert agent("replay", path, "--endpoint", bench.collector.http_url).exit_code == 3


def test_verify_says_whether_all_was_relayed(bench: Bench, config: Path, api: FakeJobApi) -> None:
    """0 when each line that the job has was acked; 1 before that, and when the source changed; 4 for no job."""
    assert agent("verify", "j1", "--config", config).exit_code == 1
    assert once(config).exit_code == 0
    result = agent("verify", "j1", "--config", config)
    assert (result.exit_code, result.output) == (0, "verified: all 2 lines of the log were acked, unchanged\n")
    shown = json.loads(agent("verify", "j1", "--config", config, "--json").output)
    assert (shown["verdict"], shown["lines_relayed"]) == ("verified", 2)
    api.jobs["j1"].line("more", 1_767_225_502_000)
    result = agent("verify", "j1", "--config", config)
    assert (result.exit_code, result.output.startswith("different: ")) == (1, True)
    assert agent("verify", "typo", "--config", config).exit_code == 4
