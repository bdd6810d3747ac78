"""What a release uploads: complete, installable in each of its forms, and usable from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.audit import pins
from tests.deploy.configured import DEPLOY

ROOT = DEPLOY.parent
pytestmark = pytest.mark.services


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive and the wheels, as `make dist` makes them."""
    made = tmp_path_factory.mktemp("dist")
    run("make", "-s", "dist", f"DIST={made}", cwd=ROOT)
    return made


def only(dist: Path, pattern: str) -> Path:
    (found,) = dist.glob(pattern)
    return found


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """The programs of an empty virtual environment."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    return tmp_path / "venv" / "bin"


def install(programs: Path, what: str) -> None:
    """Install with the locked versions; without their hashes, because what is tested has none."""
    constraints = programs / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins().items()))
    run(
        *(programs / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"),
        *("--constraint", constraints, what),
    )


@pytest.mark.parametrize(
    ("wheel", "compiled"),
    [
        ("*-py3-none-any.whl", set()),
        ("*-cp311-abi3-*manylinux_2_17_*.whl", {"tailspan/_compiled.abi3.so"}),
    ],
)
def test_a_wheel_holds_all_of_the_packages_and_nothing_else(dist: Path, wheel: str, compiled: set[str]) -> None:
    """Every tracked file of both, so that no data file is forgotten; the licence; the command."""
    tracked = run("git", "ls-files", "sdk/tailspan", "agent/tailspan_agent", cwd=ROOT).split()
    with zipfile.ZipFile(only(dist, wheel)) as archive:
        # auditwheel enters directories, too.
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert names == {name.partition("/")[2] for name in tracked} | compiled
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "tailspan = tailspan.cli.start:main" in archive.read(entries).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_source_archive_can_be_tested_and_deployed(dist: Path) -> None:
    """The source archive has the tests, the examples and what the Dockerfile copies."""
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    assert {name for name in tracked if not name.startswith((".ci/", ".git"))} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


@pytest.mark.parametrize(
    ("kind", "framing"), [("*.tar.gz", "in C"), ("*manylinux_2_17_*.whl", "in C"), ("*-none-any.whl", "in Python")]
)
def test_the_full_installation_works(dist: Path, venv: Path, tmp_path: Path, kind: str, framing: str) -> None:
    """In each of its forms, into an empty environment: version, demo and doctor."""
    install(venv, f"{only(dist, kind)}[agent]")
    assert run(venv / "tailspan", "--version").startswith("tailspan ")
    said = run(venv / "tailspan", "demo", "--dir", tmp_path / "demo", "--timeout", "120", cwd=tmp_path)
    assert "weather-etl" in said
    report = json.loads(run(venv / "tailspan", "doctor", "--json", env={"XDG_STATE_HOME": str(tmp_path / "state")}))
    assert report["problems"] == []
    assert report["versions"]["zstandard"] == "not installed"
    assert report["versions"]["framing"].startswith(framing)


def test_the_light_installation_works(dist: Path, venv: Path, tmp_path: Path) -> None:
    """Without the agent's packages: jobs run, and what needs the agent says so, `doctor` within its report."""
    install(venv, str(only(dist, "*-none-any.whl")))
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    assert run(venv / "tailspan", "run", "--", "echo", "hi", env=env) == "hi\n"
    report = json.loads(run(venv / "tailspan", "doctor", "--json", env=env))
    assert report["versions"]["opentelemetry-proto"] == "not installed"
    assert "pip install 'tailspan[agent]'" in report["reach"]
    assert report["store"]["checkpoints"] == "none yet"


@pytest.mark.parametrize("what", ["*manylinux_2_17_*.whl", "*-none-any.whl", "the clone"])
@pytest.mark.parametrize("tool", ["pipx", "uv"])
def test_tools_install_the_command(dist: Path, tools: Path, tmp_path: Path, tool: str, what: str) -> None:
    """With the agent, into an environment that pipx or uv manages: the lines of README and docs/start.md."""
    found = "." if what == "the clone" else str(only(dist, what))
    env = {"PIPX_HOME": str(tmp_path / "home"), "PIPX_BIN_DIR": str(tmp_path / "bin"), "UV_PYTHON": sys.executable}
    env |= {"UV_TOOL_DIR": str(tmp_path / "home"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin")}
    words = {"pipx": ("pipx", "install"), "uv": ("uv", "tool", "install")}[tool]
    run(tools / words[0], *words[1:], "--quiet", f"{found}[agent]", env=env, cwd=ROOT)
    assert "agent run" in run(tmp_path / "bin" / "tailspan", "agent", "run", "--help")


def test_the_bill_of_materials_is_of_a_full_installation(tmp_path: Path) -> None:
    """`make sbom`: the packages by name, version and licence; no path of the machine that made it."""
    run("make", "-s", "sbom", f"DIST={tmp_path}", cwd=ROOT)
    text = only(tmp_path, "*.cdx.json").read_text()
    bom = json.loads(text)
    versions = {part["name"].lower().replace("_", "-"): part["version"] for part in bom["components"]}
    locked = pins()
    assert bom["metadata"]["component"]["name"] == "tailspan"
    assert {"grpcio", "msgspec", "opentelemetry-proto", "starlette", "zstandard"} <= set(versions)
    assert "pytest" not in versions
    assert {name: version for name, version in versions.items() if locked[name] != version} == {}
    assert str(tmp_path) not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("shell", "asks"),
    [
        (
            "bash",
            'eval "$(tailspan completion bash)"; COMP_WORDS=(tailspan agent re); COMP_CWORD=2;'
            ' _tailspan_completion tailspan re agent; printf "%s\\n" "${COMPREPLY[@]}"',
        ),
        ("fish", 'tailspan completion fish | source; complete -C "tailspan agent re"'),
        (
            "zsh",
            'autoload -U compinit; compinit -u -D; eval "$(tailspan completion zsh)"; '
            " _describe() { print -l ${${(P)3}%%:*}; }; words=(tailspan agent re); CURRENT=3; _tailspan_completion",
        ),
    ],
)
def test_shells_complete(shell: str, asks: str) -> None:
    """The real shells read the scripts, and complete a command of a group."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = run(shell, "-c", asks, env=env)
    assert [line.split()[0] for line in said.splitlines()] == ["reload", "replay"]
