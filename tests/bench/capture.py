"""W6: a job that prints as fast as it can, through ``tailspan run`` and without; and what a supervisor costs."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tailspan.local.launch import Request
from tailspan.services.local import LocalService
from tests.bench.folders import PRINTER, add_real
from tests.bench.measure import Usage, alternate, run, tailspan
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row

__all__ = ["capture"]

_STARTS = 15


def capture(scale: Scale, directory: Path) -> Iterator[Row]:
    """Measure; the wall time is that of printing alone, as the job itself sees it."""
    lines = scale.of(1_000_000)
    walls: dict[str, list[float]] = {"file": [], "tee": [], "run": []}
    note, plain, copy, scratch = (str(directory / name) for name in ("wall", "plain", "copy", "scratch"))
    printer = shlex.join([sys.executable, "-S", "-E", PRINTER, str(lines), "whole", "--warm", scratch])

    def shell(name: str, command: str) -> Usage:
        usage = run(["sh", "-c", command])
        walls[name].append(float(Path(note).read_text()))
        return usage

    def job() -> Usage:
        noted = directory / "job.json"
        shutil.rmtree(directory / "jobs", ignore_errors=True)
        begun = time.perf_counter()
        add_real(directory / "jobs", lines, "--warm", scratch, "--supervisor", str(noted))
        walls["run"].append(json.loads(noted.read_text())["wall_s"])
        return Usage(0, time.perf_counter() - begun, json.loads(noted.read_text())["rss_kib"] * 1024)

    found = alternate(
        {
            "file": lambda: shell("file", f"{printer} 2> {note} > {plain}"),
            "tee": lambda: shell("tee", f"{printer} 2> {note} | tee {copy} > /dev/null"),
            "run": job,
        },
        3 * scale.times,  # a tenth of a second each, in which it is a matter of luck who else has the machine
    )
    wall = {name: statistics.median(seen) for name, seen in walls.items()}
    speed = Goal(300_000, at_least=True)
    yield Row(case="W6 into a file", lines=lines, figure=lines / wall["file"], unit="lines/s")
    yield Row(case="W6 through tee", lines=lines, figure=lines / wall["tee"], unit="lines/s")
    yield Row(case="W6 through tailspan run", lines=lines, figure=lines / wall["run"], unit="lines/s", goal=speed)
    yield Row(case="W6 run, against tee", figure=wall["run"] / wall["tee"], unit="x", goal=Goal(1.0))
    yield Row(case="W6 supervisor, memory", figure=found["run"].rss / MIB, unit="MiB", goal=Goal(15))
    yield Row(case="W6 supervisor, started", figure=_start_ms(directory / "starts"), unit="ms", goal=Goal(80))
    bare = {"W6 true": lambda: run(["true"]), "W6 tailspan run -- true": lambda: _run_true(directory / "true")}
    for case, usage in alternate(bare, scale.times).items():
        yield Row(case=case, usage=usage, figure=usage.wall_s * 1000, unit="ms")


def _start_ms(state_dir: Path) -> float:
    """Return how long a start takes until the command runs, in ms, from a program that has Tailspan loaded."""
    service = LocalService(state_dir=state_dir)
    found = []
    for _ in range(_STARTS):
        begun = time.perf_counter()
        service.start(Request(command=["true"])).close()
        found.append((time.perf_counter() - begun) * 1000)
    return statistics.median(found)


def _run_true(state_dir: Path) -> Usage:
    return run(tailspan("run", "--", "true"), env={"TAILSPAN_STATE_DIR": str(state_dir)})
