"""The Dockerfile, as far as it can be tried without an engine: its words, and what it makes, run as an engine would."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.configured import DEPLOY, settings_of, understood
from tests.fakes.agents import PATIENCE_S

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(r"(?m)^([A-Z]+) (.*)$", DOCKERFILE.replace("\\\n", ""))


def last(instruction: str) -> str:
    return [text for name, text in INSTRUCTIONS if name == instruction][-1]


def image_environ() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(last("ENV")))


def test_tailspan_understands_the_image() -> None:
    """Its command, its variables, and its version."""
    understood(json.loads(last("CMD")))
    settings = settings_of({name: value for name, value in image_environ().items() if name.startswith("TAILSPAN_")})
    assert settings.agent.state_dir == Path("/var/lib/tailspan/agent")
    assert f'\nversion = "{last("ARG").removeprefix("VERSION=")}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_image_is_built_from_what_the_context_lets_through() -> None:
    """All that is copied is in .dockerignore's list, and all that the wheel is made of is copied."""
    let_through = re.findall(r"(?m)^!(.*)$", (ROOT / ".dockerignore").read_text())
    copied = [word for name, text in INSTRUCTIONS if name == "COPY" and "--from" not in text for word in text.split()]
    assert {word for word in copied if (ROOT / word).exists()} - {"./"} == set(let_through)
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")


def test_the_image_runs_as_nobody_in_particular() -> None:
    """A number, which Kubernetes can hold against runAsNonRoot; and no floating base."""
    assert re.fullmatch(r"[1-9]\d*:\d+", last("USER"))
    assert re.search(r"(?m)^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE)


@pytest.mark.services
def test_hadolint_finds_no_fault(tools: Path) -> None:
    """The linter of Dockerfiles is content."""
    subprocess.run([tools / "hadolint", DEPLOY / "Dockerfile"], check=True, timeout=60)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment, made as the Dockerfile makes it."""
    return make_environment(tmp_path_factory.mktemp("image") / "tailspan")


def make_environment(venv: Path) -> Path:
    """Make the virtual environment of the image at a path, and return the path."""
    (text,) = [text for name, text in INSTRUCTIONS if name == "RUN" and "pip install" in text]
    command = text.replace("/opt/build", str(venv.with_name("build"))).replace("/opt/tailspan", str(venv))
    subprocess.run(
        ["sh", "-ec", command.replace("python -m venv", f"{sys.executable} -m venv")],
        cwd=ROOT,
        check=True,
        timeout=900,
        capture_output=True,
    )
    return venv


@contextmanager
def container(
    venv: Path, home: Path, *command: str, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as the image would; see container.sh. As root under the image's user, else under one's own."""
    (home / "root").mkdir(exist_ok=True)
    (home / "volume").mkdir(exist_ok=True)
    user, alone = ("10001:0", []) if os.geteuid() == 0 else ("0:0", ["--user", "--map-root-user"])
    if not alone:
        os.chown(home / "volume", 10001, 0)
    variables = {**image_environ(), **(environ or {})}
    variables["PATH"] = f"{venv}/bin:/usr/bin:/bin"
    script = ROOT / "tests" / "deploy" / "container.sh"
    namespaces = ["unshare", *alone, "--mount", "--net", "--pid", "--fork", "--kill-child"]
    inner = ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]
    process = subprocess.Popen(
        [*namespaces, script, home / "root", venv, home / "volume", user, *inner],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def inside(process: subprocess.Popen[str]) -> int:
    """The pid, out here, of the container's first process."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


@pytest.mark.services
def test_the_agent_runs_in_it(installed: Path, tmp_path: Path) -> None:
    """Read-only root without /tmp, a user without a name, PID 1: healthy, and SIGTERM ends it in order and in time."""
    with container(installed, tmp_path, *json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))) as agent:
        assert agent.stderr is not None
        said = [next(line for line in agent.stderr if "follows" in line or "tailspan:" in line)]
        assert "the agent follows local" in said[0]
        first = inside(agent)
        assert re.search(r"(?m)^NSpid:\s+\d+\s+1$", Path(f"/proc/{first}/status").read_text())
        probe = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
        entered = ["nsenter", f"--target={first}", "--mount", "--net", "--pid", "--root", "--wd=/"]
        entered += [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        python = [str(installed / "bin" / "python"), *probe[1:]]
        assert subprocess.run([*entered, *python], timeout=PATIENCE_S).returncode == 0
        away = [*entered, "env", "TAILSPAN_AGENT__LISTEN=0.0.0.0:1", *python]
        assert subprocess.run(away, timeout=PATIENCE_S, capture_output=True).returncode == 1
        os.kill(first, signal.SIGTERM)
        assert agent.wait(PATIENCE_S) == 0
    assert (tmp_path / "volume" / "agent" / "checkpoints.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.services
def test_jobs_run_in_it(installed: Path, tmp_path: Path) -> None:
    """The local runner, and `doctor`, also where the user has no name."""
    with container(installed, tmp_path, "tailspan", "run", "--name", "etl", "--", "echo", "hi") as job:
        assert job.communicate(timeout=PATIENCE_S)[0] == "hi\n"
        assert job.returncode == 0
    with container(installed, tmp_path, "tailspan", "doctor") as doctor:
        said, errors = doctor.communicate(timeout=PATIENCE_S)
        assert (doctor.returncode, errors) == (0, "")
        assert "services.local: reachable; its newest job is" in said
