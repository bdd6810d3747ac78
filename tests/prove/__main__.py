"""``python -m tests.prove`` runs the whole proof, or some of its rows, and prints the table: ``make prove``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.docs_tables import ROOT
from tests.prove.docs_table import write
from tests.prove.rows import run, scenarios
from tests.prove.scenarios import Scenario, select
from tests.prove.table import Row, render

_TOGETHER = 6
_PROVED = ("agent", "sdk", "tests")


def main() -> int:
    """Run the rows, print the table, and return 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description="Prove the delivery guarantee.")
    parser.add_argument("--seed", type=int, default=0, help="repeats a run's choices; 0 takes a new one")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs at least")
    parser.add_argument("--only", default="", help="globs on rows, with | between them")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--docs", action="store_true", help="write the rows that ran into docs/proof.md")
    given = parser.parse_args()
    if given.docs and os.environ.get("PROVE_TAILSPAN"):
        parser.error("the page has rows of this tree only: unset PROVE_TAILSPAN")
    seed = given.seed or int(time.time())
    commit = _commit()
    chosen = list(select(scenarios(given.kills), given.only))
    print(f"seed {seed}, {len(chosen)} rows, Python {platform.python_version()}", file=sys.stderr)
    rows = {}
    for row in _run(chosen, given.kills, seed):
        rows[row.fault] = row
        print(f"{'ok    ' if row.ok else 'FAILED'} {row.seconds:5.0f} s  {row.fault}", file=sys.stderr, flush=True)
        if not row.ok:
            print(f"  {row.verdict}", file=sys.stderr, flush=True)
        if given.docs:
            # Each row at once: a run that is interrupted keeps what it has proved.
            known = {"date": _now(), "seed": str(seed), "commit": commit}
            write([{**row.to_json(), "verdict": row.cells()[-1], **known}])
    table = [rows[scenario.name] for scenario in chosen]
    when = _now()
    print(f"\n{when}, seed {seed}, commit {commit}\n\n{render(table)}")
    if given.json is not None:
        given.json.write_text(
            json.dumps({"time": when, "seed": seed, "commit": commit, "rows": [row.to_json() for row in table]})
        )
    return 0 if table and all(row.ok for row in table) else 1


def _run(chosen: Sequence[Scenario], kills: int, seed: int) -> Iterator[Row]:
    """Run the rows, several at the same time where they allow it, and yield each when it is done."""
    with ProcessPoolExecutor(_TOGETHER) as pool:
        together = [pool.submit(run, scenario.name, kills, seed) for scenario in chosen if not scenario.alone]
        for done in as_completed(together):
            yield done.result()
    for scenario in chosen:
        if scenario.alone:
            yield run(scenario.name, kills, seed)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _commit() -> str:
    """Return the commit that is proved, with a `+` if code was changed since; empty outside a git checkout."""
    found = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", *_PROVED], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout else "")


if __name__ == "__main__":
    sys.exit(main())
