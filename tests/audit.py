"""``python -m tests.audit PIP_AUDIT`` asks what is known against the dependencies: ``make audit``.

It checks the pinned versions, and the lower bounds of what users install: a bound with a known weakness is a fault.

The exit code is 0 if no vulnerability is known, 1 if one is, and 3 if no source could be reached.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

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


def audit(program: str, lock: Path = LOCK) -> int:
    """Ask one source of known weaknesses after the other, until one answers; return the exit code."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "15", "--format", "json"]
    for source in SOURCES:
        command = [program, "--requirement", str(lock), "--vulnerability-service", source, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError):
            why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            print(f"the source {source} does not answer: {why}", file=sys.stderr)
            continue
        if all(package.get("skip_reason") for package in packages):
            print(f"the source {source} knows none of the packages: {packages[0]['skip_reason']}", file=sys.stderr)
            continue
        return _report(packages, source)
    print("NOT AUDITED: no source could be asked. Run it where pypi.org or api.osv.dev is reachable.", file=sys.stderr)
    return NOT_AUDITED


def lower_bounds(project: Path = PROJECT) -> list[str]:
    """Return the oldest versions that users may install, as ``NAME==VERSION``."""
    table = tomllib.loads(project.read_text())["project"]
    needed = [*table["dependencies"], *(each for extra in USED for each in table["optional-dependencies"][extra])]
    found = (BOUND.match(each) for each in needed)
    return [f"{match[1]}=={match[2]}" for match in found if match]


def audit_all(program: str) -> int:
    """Audit the pinned versions and the lower bounds; return the worse exit code."""
    with tempfile.TemporaryDirectory() as directory:
        bounds = Path(directory) / "lower-bounds.txt"
        bounds.write_text("\n".join(lower_bounds()))
        return max(audit(program), audit(program, bounds))


def _report(packages: list[dict[str, object]], source: str) -> int:
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
    sys.exit(audit_all(sys.argv[1]))
