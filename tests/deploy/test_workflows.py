"""The workflows of CI and the files for contributors: pinned, with few rights, and made of `make` targets."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
NAMES = [path.stem for path in WORKFLOWS]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What has no target: it needs the files of other jobs or the outputs of steps.
OWN_COMMANDS = {"echo", "rm"}

# The source archive has no such files.
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a clone")


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs of a workflow."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job["steps"]


def targets() -> set[str]:
    """Return what `make` can make by name."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def made(command: str) -> set[str]:
    """Return the targets that a command makes."""
    words = shlex.split(command)
    assert words[0] == "make"
    return {word for word in words[1:] if "=" not in word and not word.startswith("-")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_actions_are_pinned(path: Path) -> None:
    """Each action is a commit, with its version as a comment, and none keeps the token of the checkout."""
    used = re.findall(r"uses: (.*)$", path.read_text(), re.MULTILINE)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line)] == []
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_an_action_has_one_version() -> None:
    """All workflows use the same commit of an action."""
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (.*)$", path.read_text(), re.MULTILINE)}
    names = [line.partition("@")[0] for line in used]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_rights_are_few(path: Path) -> None:
    """No right unless a job names it; rights to write are in jobs that publish; each job has a limit."""
    assert yaml.safe_load(path.read_text())["permissions"] == {}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] > 0
        if "write" in job["permissions"].values():
            assert name in {"publish", "image"}
            assert "pull_request_target" not in path.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_steps_are_make_targets(path: Path) -> None:
    """What CI runs runs here too."""
    for job in jobs(path).values():
        chosen = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                for command in line.split(" && "):
                    if command.split()[0] not in OWN_COMMANDS:
                        for target in chosen:
                            assert made(command.replace("${{ matrix.target }}", target)) <= targets(), command


def test_the_suite_runs_on_each_python_of_the_package() -> None:
    """Linux and macOS, and each version that the package's classifiers name."""
    matrix = jobs(GITHUB / "workflows" / "test.yml")["test"]["strategy"]["matrix"]
    classifiers = PYPROJECT["project"]["classifiers"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", " ".join(classifiers))
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    assert matrix["python"][0] == PYPROJECT["project"]["requires-python"].removeprefix(">=")


def test_hooks_before_a_commit_are_make_targets() -> None:
    """`.pre-commit-config.yaml` runs the programs of the virtual environment, whose versions are locked."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {target for hook in repository["hooks"] for target in made(hook["entry"])} == {"lint", "types"}


def test_templates_of_issues_have_what_github_needs() -> None:
    """Each form has a name, a description and fields with ids."""
    forms = [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"]
        assert form["description"]
        assert all(
            field["type"] == "markdown" or (field["id"] and field["attributes"]["label"]) for field in form["body"]
        )
    assert len(forms) == 2


def test_a_tag_must_name_the_version() -> None:
    """A release with another version stops before anything is built."""
    for tag, status in ((f"v{PYPROJECT['project']['version']}", 0), ("v99.0.0", 2)):
        done = subprocess.run(
            ["make", "-s", "release-version", f"TAG={tag}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr


@pytest.mark.services
def test_actionlint_finds_no_fault() -> None:
    """The linter of workflows: keys, expressions, types of outputs, labels of runners."""
    program = Path(sys.prefix) / "go" / "actionlint"
    if not program.exists():
        pytest.skip(f"{program} is missing: make test-services SERVICES=workflows, which needs Go")
    done = subprocess.run([program, *WORKFLOWS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
