"""``python -m tests.prove`` runs the whole proof, or some of its rows, and prints the table: ``make prove``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.prove.docs_table import write
from tests.prove.rows import run, scenarios
from tests.prove.scenarios import select
from tests.prove.table import Row, render

_TOGETHER = 6


def main() -> int:
    """Run, print, and return 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description="Prove the delivery guarantee.")
    parser.add_argument("--seed", type=int, default=0, help="repeats a run's choices; 0 takes a new one")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs at least")
    parser.add_argument("--only", default="", help="globs on rows, with | between them")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--docs", action="store_true", help="write the rows that ran into docs/proof.md")
    given = parser.parse_args()
    seed = given.seed or int(time.time())
    chosen = list(select(scenarios(given.kills), given.only))
    print(f"seed {seed}, {len(chosen)} rows, Python {platform.python_version()}", file=sys.stderr)
    rows = {}
    with ProcessPoolExecutor(_TOGETHER) as pool:
        together = [scenario.name for scenario in chosen if not scenario.alone]
        waiting = {name: pool.submit(run, name, given.kills, seed) for name in together}
        for name, future in waiting.items():
            rows[name] = future.result()
            _say(rows[name])
    for scenario in chosen:
        if scenario.alone:
            rows[scenario.name] = run(scenario.name, given.kills, seed)
            _say(rows[scenario.name])
    table = [rows[scenario.name] for scenario in chosen]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    print(f"\n{when}, seed {seed}\n\n{render(table)}")
    if given.docs:
        write({**row.to_json(), "verdict": row.cells()[-1], "date": when, "seed": str(seed)} for row in table)
    if given.json is not None:
        given.json.write_text(json.dumps({"time": when, "seed": seed, "rows": [row.to_json() for row in table]}))
    return 0 if table and all(row.ok for row in table) else 1


def _say(row: Row) -> None:
    print(f"{'ok    ' if row.ok else 'FAILED'} {row.seconds:5.0f} s  {row.fault}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
