"""Section 6: what the frequent commands import, which is most of their cost. W9 of `make bench` measures the time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.local_jobs import LocalJobs, until

SLOW = {"pydantic", "anyio", "asyncio", "ssl", "email", "logging", "httpcore"}
SLOW_BEFORE_A_JOB = SLOW | {"click", "typing", "dataclasses", "inspect", "datetime", "pathlib", "json", "subprocess"}
# Mistakes that are none of the business of `tailspan run`.
CONFIG = """
[services.local]
state_dir = "{state}"
keep_finished = "1h"

[otlp]
endpoint = "http://127.0.0.1:4318"
timeout = "soon"

[agent]
no_such_key = 1
"""


def run(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command as its program does; return it, and the names of the packages that it imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_"))}
    env["TAILSPAN_STATE_DIR"] = str(tmp_path / "state")
    program = "from tailspan.cli.start import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done, {
        name.partition(".")[0] for name in re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE)
    }


def mark_pruned(tmp_path: Path) -> None:
    """Let the next run not be the one of an hour that prunes."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "pruned").touch()


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return the path of a configuration file."""
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(state=tmp_path / "state"))
    return str(path)


@pytest.mark.parametrize("options", [[], ["--detach"], ["--name", "etl", "--attr=team=geo", "--timeout", "60"]])
def test_run_imports_little(tmp_path: Path, options: list[str]) -> None:
    """Without a configuration file nothing but small modules of the standard library."""
    mark_pruned(tmp_path)
    done, imported = run(tmp_path, "run", *options, "--", "true")
    assert done.returncode == 0
    assert imported & SLOW_BEFORE_A_JOB == set()


@pytest.mark.parametrize("options", [[], ["--detach"], ["--detach", "--json"]])
def test_run_with_a_configuration_file_imports_no_class_of_it(tmp_path: Path, config: str, options: list[str]) -> None:
    """Also in the run that prunes, and whatever is wrong in the agent's tables."""
    done, imported = run(tmp_path, "run", "--config", config, *options, "--", "true")
    assert done.returncode == 0
    assert imported & SLOW == set()
    if "--json" in options:
        assert json.loads(done.stdout)["job_name"] == "true"


def test_the_first_run_of_an_hour_prunes(tmp_path: Path, config: str) -> None:
    """`keep_finished` of the file counts, as for the agent."""
    with LocalJobs(tmp_path / "state") as jobs:
        old = jobs.run("true").job_id
        state = jobs.directory(old) / "state.json"
        two_hours_ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7200))
        state.write_text(json.dumps({**json.loads(state.read_text()), "finished_at": two_hours_ago}))
        moved = jobs.directory(f"20200101{old[8:]}")
        os.rename(jobs.directory(old), moved)
        mark = tmp_path / "state" / "pruned"
        mark.write_text("")
        os.utime(mark, (time.time() - 7200,) * 2)
        done, _ = run(tmp_path, "run", "--config", config, "--", "true")
        assert done.returncode == 0
        until(lambda: not moved.exists())


@pytest.mark.parametrize("command", ["status", "logs", "tasks", "exec-time", "jobs"])
def test_reading_commands_import_no_event_loop(tmp_path: Path, command: str) -> None:
    """Nor the configuration's classes, where nothing is configured."""
    with LocalJobs(tmp_path / "state") as jobs:
        job_id = jobs.run("echo", "hello").job_id
    done, imported = run(tmp_path, command, *([] if command == "jobs" else [job_id]))
    assert done.returncode == 0
    shown = {"logs": "hello", "tasks": "", "exec-time": "0 ms"}
    assert shown.get(command, job_id) in done.stdout
    assert imported & SLOW == set()
