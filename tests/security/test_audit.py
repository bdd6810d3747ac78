"""The audit lists known vulnerabilities of the dependencies, and reports when no source could be reached."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.audit import LOCK, NOT_AUDITED, PROJECT, USED, audit, lower_bounds, main, pins

BAD = {"name": "left", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
GOOD = {"name": "right", "version": "1", "vulns": []}
SKIPPED = {"name": "unlisted", "skip_reason": "not on the index"}
ANSWERS = {
    "unreachable": None,
    "clean": [GOOD],
    "known": [GOOD, BAD],
    "skipped": [SKIPPED],
    "one skipped": [GOOD, SKIPPED],
}


@pytest.mark.parametrize(
    ("first", "second", "code", "says"),
    [
        ("clean", "known", 0, "1 packages checked by pypi, 0 vulnerabilities known"),
        ("known", "clean", 1, "left 1: CVE-1, fixed in 2"),
        ("unreachable", "known", 1, "left 1: CVE-1, fixed in 2"),
        ("unreachable", "clean", 0, "checked by osv"),
        ("unreachable", "unreachable", NOT_AUDITED, "NOT AUDITED: no source answered"),
        ("skipped", "clean", 0, "checked by osv"),
        ("skipped", "unreachable", NOT_AUDITED, "the source pypi knows none of the packages: not on the index"),
        ("one skipped", "clean", 0, "unlisted: not checked"),
    ],
)
def test_audit_reports_the_first_source_that_answers(
    first: str, second: str, code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two sources the first that answers counts; silence of both is an exit code of its own."""
    program = tmp_path / "pip-audit"
    answers = {"pypi": ANSWERS[first], "osv": ANSWERS[second]}
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"answers = json.loads({json.dumps(json.dumps(answers))})\n"
        "found = answers[sys.argv[sys.argv.index('--vulnerability-service') + 1]]\n"
        "sys.exit('no such host') if found is None else print(json.dumps({'dependencies': found}))\n"
    )
    program.chmod(0o700)
    assert audit(str(program)) == code
    captured = capsys.readouterr()
    assert says in captured.out + captured.err


@pytest.mark.parametrize(("options", "code"), [((), NOT_AUDITED), (("--optional",), 0)])
def test_ci_passes_where_no_source_answers(options: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """One request for each list is enough to find that out, and no other source gets any."""
    calls = tmp_path / "calls"
    program = tmp_path / "pip-audit"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    program.chmod(0o700)
    assert main([str(program), "--source", "pypi", *options]) == code
    assert calls.read_text().count("--vulnerability-service pypi") == calls.read_text().count("\n") == 2


LOCKS = {
    "development": LOCK,
    "image": LOCK.with_name("deploy") / "requirements.lock",
    "builds": LOCK.with_name("build.lock"),
}
HASHED = re.compile(r"([a-z0-9-]+)==([0-9.a-z!]+)[^\n]*((?:\n    --hash=sha256:[0-9a-f]{64}[^\n]*)+)\n")


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_all_that_is_installed_has_a_version_and_hashes(lock: Path) -> None:
    """Each package of a lock has the version of the others and hashes; no file names a place to download from."""
    text = "".join(line for line in lock.read_text().splitlines(keepends=True) if not line.startswith("#"))
    assert HASHED.sub("", text) == ""
    assert {name: version for name, version in pins(lock).items() if pins().get(name, version) != version} == {}
    assert not re.search(r"://|(?m:^-)", lock.read_text())


def test_all_that_is_needed_is_locked() -> None:
    """The dependencies of each extra, and what builds Tailspan, in the version that `pyproject.toml` names."""
    table = tomllib.loads(PROJECT.read_text())
    project = table["project"]
    needed = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[^a-z0-9-]", each)[0] for each in needed} - {"tailspan"}
    assert names - pins().keys() == set()
    builds = dict(each.split("==") for each in table["build-system"]["requires"])
    assert builds.items() <= pins(LOCKS["builds"]).items()


@pytest.mark.parametrize("file", ["Makefile", "deploy/Dockerfile"])
def test_locked_files_are_what_is_installed(file: str) -> None:
    """Installations check hashes, and builds use what is locked rather than what an index has today."""
    text = (LOCK.parent / file).read_text()
    assert "--require-hashes" in text
    assert "--no-build-isolation" in text
    assert "--constraint requirements.lock -e" not in text


# The oldest versions without a known weakness that matters here, each with the last weakness below it.
WITHOUT_WEAKNESS = {
    "certifi": (2024, 7, 4),  # CVE-2024-39689
    "grpcio": (1, 66, 2),  # CVE-2024-11407
    "h11": (0, 16),  # CVE-2025-43859
    "idna": (3, 7),  # CVE-2024-3651
    "jinja2": (3, 1, 6),  # CVE-2025-27516
    "protobuf": (6, 33, 5),  # CVE-2026-0994
    "starlette": (0, 49, 1),  # CVE-2025-62727
}


def test_every_dependency_has_a_lower_bound_and_none_has_a_known_weakness() -> None:
    """What users install is at least this new, whatever their resolver chooses."""
    table = tomllib.loads(PROJECT.read_text())["project"]
    needed = [*table["dependencies"], *(each for extra in USED for each in table["optional-dependencies"][extra])]
    bounds = dict(bound.split("==") for bound in lower_bounds())
    assert len(bounds) == len([each for each in needed if not each.startswith("tailspan[")])
    for name, least in WITHOUT_WEAKNESS.items():
        assert tuple(map(int, bounds[name].split("."))) >= least, name


def test_the_build_needs_exact_versions() -> None:
    """A build of the same commit uses the same tools."""
    requires = tomllib.loads(PROJECT.read_text())["build-system"]["requires"]
    assert [each for each in requires if not re.fullmatch(r"[a-z]+==[0-9.]+", each)] == []
