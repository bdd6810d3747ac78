"""The audit lists known vulnerabilities of the dependencies, and reports when no source could be reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.audit import LOCK, NOT_AUDITED, audit

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
        ("unreachable", "unreachable", NOT_AUDITED, "NOT AUDITED: no source could be asked"),
        ("skipped", "clean", 0, "checked by osv"),
        ("skipped", "unreachable", NOT_AUDITED, "the source pypi knows none of the packages: not on the index"),
        ("one skipped", "clean", 0, "unlisted: not checked"),
    ],
)
def test_what_the_audit_says(
    first: str, second: str, code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two sources the first that answers counts; silence of both is no good news."""
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


def test_all_that_is_installed_is_pinned_exactly() -> None:
    """The audit checks versions: each line of the lock names one."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all(line.count("==") == 1 for line in lines)
