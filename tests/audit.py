"""``python -m tests.audit PIP_AUDIT`` lists known vulnerabilities of the dependencies: ``make audit``.

It checks the pinned versions, and the lower bounds of what users install, which must have none either.

The exit code is 0 if no vulnerability is known, 1 if one is, and 3 if no source answered (with ``--optional`` 0).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements.lock"
PROJECT = LOCK.with_name("pyproject.toml")
USED = ("serve", "agent", "zstd")
BOUND = re.compile(r"([a-z0-9-]+)>=([0-9.]+)")
PIN = re.compile(r"(?m)^([a-z0-9-]+)==([^ ;]+)")
SOURCES = ("pypi", "osv")
NOT_AUDITED = 3


def pins(lock: Path = LOCK) -> dict[str, str]:
    """Return the version of each package of a lock, by its name."""
    return dict(PIN.findall(lock.read_text()))


def audit(program: str, lock: Path = LOCK, sources: Sequence[str] = SOURCES) -> int:
    """Request known vulnerabilities from one source after the other, until one answers; return the exit code."""
    for source in sources:
        # One package first: a source that does not answer is not asked for all of them.
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as one:
            one.write("==".join(next(iter(pins(lock).items()))))
            one.flush()
            if _packages(program, source, Path(one.name)) is None:
                continue
        packages = _packages(program, source, lock)
        if packages is not None:
            return _report(packages, source)
    print("NOT AUDITED: no source answered. Run it where pypi.org or api.osv.dev is reachable.", file=sys.stderr)
    return NOT_AUDITED


def _packages(program: str, source: str, lock: Path) -> list[dict[str, Any]] | None:
    """Return what a source knows of the packages; None, with a message, if it knows none of them."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "15", "--format", "json"]
    command = [program, "--requirement", str(lock), "--vulnerability-service", source, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        print(f"the source {source} does not answer: {why}", file=sys.stderr)
        return None
    if all(package.get("skip_reason") for package in packages):
        print(f"the source {source} knows none of the packages: {packages[0]['skip_reason']}", file=sys.stderr)
        return None
    return packages


def lower_bounds(project: Path = PROJECT) -> list[str]:
    """Return the oldest versions that users may install, as ``NAME==VERSION``."""
    table = tomllib.loads(project.read_text())["project"]
    needed = [*table["dependencies"], *(each for extra in USED for each in table["optional-dependencies"][extra])]
    found = (BOUND.match(each) for each in needed)
    return [f"{match[1]}=={match[2]}" for match in found if match]


def audit_all(program: str, sources: Sequence[str] = SOURCES) -> int:
    """Audit the pinned versions and the lower bounds; return the worse exit code."""
    with tempfile.TemporaryDirectory() as directory:
        bounds = Path(directory) / "lower-bounds.txt"
        bounds.write_text("\n".join(lower_bounds()))
        return max(audit(program, LOCK, sources), audit(program, bounds, sources))


def main(arguments: Sequence[str]) -> int:
    """Audit, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description="List known vulnerabilities.")
    parser.add_argument("program", metavar="PIP_AUDIT", help="the command of pip-audit")
    parser.add_argument("--source", action="append", choices=SOURCES, help="ask this source only; may be repeated")
    parser.add_argument("--optional", action="store_true", help="exit with 0 if no source answers")
    given = parser.parse_args(arguments)
    code = audit_all(given.program, given.source or SOURCES)
    return 0 if code == NOT_AUDITED and given.optional else code


def _report(packages: list[dict[str, Any]], source: str) -> int:
    known, skipped = 0, 0
    for package in packages:
        for weakness in package.get("vulns") or ():
            known += 1
            fixed = ", ".join(weakness["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {weakness['id']}, fixed in {fixed}")
        if reason := package.get("skip_reason"):
            skipped += 1
            print(f"{package['name']}: not checked: {reason}")
    print(f"{len(packages) - skipped} packages checked by {source}, {known} vulnerabilities known")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
