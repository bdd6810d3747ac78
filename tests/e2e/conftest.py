"""A machine for each test: state directories, a configuration, and the real command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tailspan.cli import main
from tests.fakes.collector import Collector

TAILSPAN = str(Path(sys.executable).with_name("tailspan"))
_OURS = ("TAILSPAN_", "OTEL_", "FUSED_", "TRACEPARENT")


class Machine:
    """Runs the real ``tailspan`` on its own state, and ends every process that it started with the test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "config.toml"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        self.env |= {"TAILSPAN_CONFIG": str(self.config), "HOME": str(home), "PYTHONUNBUFFERED": "1"}
        self._processes: list[subprocess.Popen[str]] = []

    def configure(self, text: str = "") -> None:
        """Write the configuration: local jobs of this machine, an agent without a page, and `text`."""
        self.config.write_text(
            f'[services.local]\ntype = "local"\nstate_dir = "{self.home}/jobs"\n'
            f'[agent]\nstate_dir = "{self.home}/agent"\nlisten = ""\n{text}'
        )

    def tailspan(
        self, *arguments: str, exit_code: int | None = 0, stdin: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own and check its exit code."""
        done = subprocess.run(
            [TAILSPAN, *arguments],
            env={**self.env, **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            cwd=self.home,
        )
        if exit_code is not None:
            assert done.returncode == exit_code, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback (most recent call last)" not in done.stderr or "run" in arguments
        return done

    def invoke(self, *arguments: str, exit_code: int | None = 0, env: Mapping[str, str] | None = None) -> Result:
        """Run a command in this process, which saves the start of one, and check its exit code."""
        with contextlib.chdir(self.home):
            done = CliRunner().invoke(main, arguments, env={**self.env, **(env or {})}, catch_exceptions=False)
        if exit_code is not None:
            assert done.exit_code == exit_code, f"exit {done.exit_code}\n{done.output[-4000:]}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command that runs until the test ends."""
        process = subprocess.Popen(
            [TAILSPAN, *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
        )
        self._processes.append(process)
        return process

    def status(self, job_id: str, *options: str) -> dict[str, Any]:
        """Return the JSON of ``tailspan status``."""
        answer: dict[str, Any] = json.loads(self.invoke("status", job_id, "--json", *options).stdout)
        return answer

    def detach(self, *command: str, options: tuple[str, ...] = ()) -> str:
        """Start a detached job and return its id."""
        return self.tailspan("run", "--detach", *options, "--", *command).stdout.strip()

    def close(self) -> None:
        """End every process that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for file in self.home.glob("jobs/jobs/*/state.json"):
            with contextlib.suppress(ValueError):  # some tests damage their files
                if not json.loads(file.read_text()).get("end"):
                    command = [TAILSPAN, "cancel", file.parent.name]
                    subprocess.run(command, env=self.env, capture_output=True, timeout=60, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine for this test."""
    made = Machine(tmp_path)
    made.configure()
    yield made
    made.close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """The OTLP receiver at the end of the path."""
    with Collector() as receiver:
        yield receiver


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function that turns the text of a Python program into a command."""

    def command(text: str) -> list[str]:
        path = tmp_path / f"job{len(list(tmp_path.glob('job*.py')))}.py"
        path.write_text(text)
        return [sys.executable, str(path)]

    return command
