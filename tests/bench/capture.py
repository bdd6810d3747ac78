"""W6 and W13: a job that prints, through ``tailspan run`` and without: how fast, how late, and at what cost."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import statistics
import subprocess
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

__all__ = ["capture", "interactive"]

_STARTS = 15
_PRINTED = 1_000
# Pauses of 0 to 10 ms between lines, so that a line comes alone or soon after another.
_SPEAKER = """
import os, random, time
pauses = random.Random(1)
for _ in range({lines}):
    time.sleep(pauses.random() / 100)
    os.write(1, b"at=%d and the text of a line\\n" % time.monotonic_ns())
"""
_AT = re.compile(rb"at=(\d+) ")


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


def interactive(scale: Scale, directory: Path) -> Iterator[Row]:
    """W13: yield how long a line takes from the job to the terminal, through ``tailspan run`` and without."""
    lines = scale.of(_PRINTED, least=100)
    job = [sys.executable, "-S", "-E", "-c", _SPEAKER.format(lines=lines)]
    env = {**os.environ, "TAILSPAN_STATE_DIR": str(directory)}
    late: dict[str, list[list[float]]] = {"terminal": [], "run": []}
    for _ in range(scale.times):
        late["terminal"].append(_lateness_ms(job, env, lines))
        late["run"].append(_lateness_ms(tailspan("run", "--", *job), env, lines))
    for percent, goal in ((50, None), (99, Goal(5.0))):
        straight, through = (statistics.median(_percentile(ms, percent) for ms in late[way]) for way in late)
        yield Row(case=f"W13 line on a terminal, p{percent}", figure=straight, unit="ms")
        yield Row(case=f"W13 line through tailspan run, p{percent}", figure=through, unit="ms")
        yield Row(case=f"W13 added by tailspan run, p{percent}", figure=through - straight, unit="ms", goal=goal)


def _lateness_ms(command: list[str], env: dict[str, str], lines: int) -> list[float]:
    """Run a command at a terminal of its own; return for each line how long it took from its printing, in ms."""
    terminal_fd, job_fd = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=job_fd, stdout=job_fd, stderr=job_fd, start_new_session=True)
    os.close(job_fd)
    found, rest = [], b""
    while True:
        try:
            text = os.read(terminal_fd, 1 << 16)
        except OSError:
            break  # all processes have closed the terminal
        now_ns = time.monotonic_ns()
        *whole, rest = (rest + text).split(b"\n")
        found += [(now_ns - int(at[1])) / 1e6 for line in whole if (at := _AT.search(line))]
    os.close(terminal_fd)
    if process.wait() or len(found) != lines:
        raise RuntimeError(f"W13: {len(found)} of {lines} lines came, exit code {process.returncode}")
    return found


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


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
