"""``python -m tests.bench`` measures, prints one table, and says what became worse: ``make bench``.

The workloads and their goals: W1 relay of local jobs, W2 relay over the job API, W3 silence, W4 latency, W5 the SDK,
W6 capture, W7 growth, W8 start, W9 typing, W10 a fleet, W11 short jobs that have ended, W12 short jobs beside a
running agent, W13 capture at a terminal, W14 orchestrators, W15 ended jobs, W16 pods, W17 beside the OpenTelemetry
Collector, W18 log files, W19 units. What is guarded are ratios within one run (``expected.json``), not times.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import tailspan
import tailspan_agent
from tests.bench import (
    capture,
    ended_jobs,
    filelog,
    fleet,
    kubernetes,
    log_files,
    orchestrators,
    relay,
    sdk,
    short_jobs,
    standing,
    typing_cost,
    units,
)
from tests.bench.docs_table import write
from tests.bench.scale import Scale
from tests.bench.table import Row, ratios, render, worse

WORKLOADS: dict[str, Callable[[Scale, Path], Iterator[Row]]] = {
    "W1": relay.local,
    "W2": relay.over_http,
    "W3": standing.silence,
    "W4": standing.latency,
    "W5": sdk.verbs,
    "W6": capture.capture,
    "W7": relay.growth,
    "W8": standing.start,
    "W9": typing_cost.costs,
    "W10": fleet.shared_jobs,
    "W11": short_jobs.ended,
    "W12": short_jobs.arriving,
    "W13": capture.interactive,
    "W14": orchestrators.runs_with_tasks,
    "W15": ended_jobs.ended_jobs,
    "W16": kubernetes.followed_pods,
    "W17": filelog.beside_filelog,
    "W18": log_files.log_files,
    "W19": units.silent_units,
}
EXPECTED = Path(__file__).with_name("expected.json")


def _compile() -> None:
    """Compile what is measured, as an installation does: no start may find it uncompiled, nor the first one pay."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for package in (tailspan, tailspan_agent):
        compileall.compile_dir(Path(str(package.__file__)).parent, quiet=1)


def main() -> int:
    """Measure, print, and return 1 if a ratio is much worse than expected or a workload failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what Tailspan costs.")
    parser.add_argument("--only", default="", help="workloads, with commas between them: W1,W5")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size: 0.1 for a quick look")
    parser.add_argument("--times", type=int, default=3, help="how often each case runs")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--docs", action="store_true", help="also write the rows into docs/benchmarks.md")
    given = parser.parse_args()
    chosen = [name for name in given.only.split(",") if name] or list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"there is no workload {', '.join(sorted(unknown))}")
    _compile()
    scale = Scale(given.scale, given.times)
    rows: list[Row] = []
    failed = []
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as directory:
            try:
                for row in WORKLOADS[name](scale, Path(directory)):
                    print("  ".join(cell for cell in row.cells() if cell), file=sys.stderr, flush=True)
                    rows.append(row)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{name} could not be measured: {error}")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"\n{when}, {where}, scale {given.scale:g}, medians of {given.times}\n\n{render(rows)}")
    if given.json is not None:
        table = {"time": when, "where": where, "scale": given.scale, "rows": [row.to_json() for row in rows]}
        given.json.write_text(json.dumps({**table, "ratios": ratios(rows)}, indent=1))
    if given.docs:
        write(rows, when=when, where=where, scale=given.scale)
    # At a small scale fixed costs count for too much.
    regressions = worse(rows, json.loads(EXPECTED.read_text())) if given.scale >= 1 else []
    for problem in [*failed, *(f"worse: {text}" for text in regressions)]:
        print(problem)
    return 1 if failed or regressions else 0


if __name__ == "__main__":
    sys.exit(main())
