"""The systemd units: what they say to Tailspan, how long they wait for it, and what systemd thinks of them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tailspan_agent.agent import _LAST_PUSH_S
from tailspan_agent.web.app import _STOP_GRACE_S
from tests.deploy.configured import DEPLOY, settings_of, understood

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def lines(unit: Path, *, commented: bool = False) -> dict[str, list[str]]:
    """The values of each key, in order; with the ones that a unit has as commented examples."""
    text = unit.read_text()
    if commented:
        text = re.sub(r"(?m)^#(?=[A-Z]\w+=)", "", text)
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"(?m)^(\w+)=(.*)$", text):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_tailspan_understands_its_unit(unit: Path) -> None:
    """Each command line, and each variable, also of the commented examples."""
    keys = lines(unit, commented=True)
    (start,) = keys["ExecStart"]
    program, *words = shlex.split(start)
    assert program == "/usr/local/bin/tailspan"
    understood(words)
    environ = dict(value.split("=", 1) for value in keys["Environment"])
    settings = settings_of(environ)
    assert all(settings.source_of(*key(name)) == name for name in environ)


def key(variable: str) -> list[str]:
    if variable == "TAILSPAN_STATE_DIR":
        return ["services", "local", "state_dir"]
    return variable.removeprefix("TAILSPAN_").lower().split("__")


def test_stops_leave_time_for_what_is_promised() -> None:
    """The drain, the last metrics and the status server; for a job, what `cancel` grants it before SIGKILL."""
    agent = lines(DEPLOY / "systemd" / "tailspan-agent.service")
    assert float(agent["TimeoutStopSec"][0]) > settings_of({}).agent.drain_timeout + _LAST_PUSH_S + _STOP_GRACE_S
    job = lines(DEPLOY / "systemd" / "tailspan-job@.service")
    assert float(job["TimeoutStopSec"][0]) >= 2 * 10
    assert job["KillMode"] == ["mixed"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with the units installed, this machine's own, and the programs that they start."""
    for unit in (DEPLOY / "systemd").glob("*@.*"):
        shutil.copy(unit, _made(tmp_path / "etc/systemd/system") / unit.name.replace("@.", "@nightly."))
    for unit in [*UNITS, *(DEPLOY / "systemd").glob("*.timer")]:
        shutil.copy(unit, tmp_path / "etc/systemd/system")
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    for program in ("usr/local/bin/tailspan", "bin/kill"):
        shutil.copy("/bin/true", _made((tmp_path / program).parent) / Path(program).name)
    return tmp_path


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def analyze(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", f"--root={root}", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.services
def test_systemd_finds_no_fault(root: Path) -> None:
    """`systemd-analyze verify` is clean for each unit and timer."""
    analyze(root, "verify", *(path.name for path in (root / "etc/systemd/system").iterdir() if "@." not in path.name))


@pytest.mark.services
@pytest.mark.parametrize(("unit", "most"), [("tailspan-agent.service", 1.3), ("tailspan-serve.service", 1.8)])
def test_exposure_stays_low(root: Path, unit: str, most: float) -> None:
    """`systemd-analyze security`: 0 means no exposure, 10 all; the rest is the network, which they need."""
    said = analyze(root, "security", "--offline=true", unit)
    found = re.search(rf"exposure level for {unit}: ([\d.]+)", said)
    assert found is not None
    assert float(found[1]) <= most


@pytest.mark.services
def test_users_are_made(root: Path) -> None:
    """systemd-sysusers reads the file, and the units' users and groups are in it."""
    said = subprocess.run(
        ["systemd-sysusers", "--dry-run", f"--root={root}", str(DEPLOY / "systemd" / "tailspan.conf")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for name in ("user 'tailspan-jobs'", "group 'tailspan'"):
        assert f"Creating {name}" in said.stderr + said.stdout
