"""W5: the verbs against plain HTTP and json, and how light Tailspan is to load."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.folders import add_real
from tests.bench.job_server import SERVING
from tests.bench.measure import Usage, alternate, run, started, tailspan
from tests.bench.scale import Scale
from tests.bench.table import Goal, Row

__all__ = ["verbs"]

_LINES = 100_000
_LOADS = 11
_STATUS_CALLS = 50
_LOGS_CALLS = 6
_ASKED = (("status", _STATUS_CALLS), ("logs", 1), ("logs", _LOGS_CALLS))
_TAILED = 600
_SPEAKER = f"import time\nfor n in range({_TAILED}): print('said', n, flush=True); time.sleep(0.005)"


def verbs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Measure each in new processes; what a process costs that only loads the same is taken off."""
    lines = scale.of(_LINES)
    job = add_real(directory / "jobs", lines)
    server = [sys.executable, "-m", "tests.bench.job_server", str(directory / "jobs")]
    pythons = _pythons()
    plain = "requests" if "requests" in pythons else "http"
    output = directory / "out"
    with started(server, log=directory / "server.log", says=SERVING) as (_, said):
        base_url = f"{said.removeprefix(SERVING)}/server/v1"

        def program(verb: str, way: str, calls: int, job: str) -> Usage:
            command = [pythons[way], "-m", "tests.bench.sdk_program", verb, way, str(calls), base_url, job]
            return run(command, output=output, env={"HOME": str(directory)})

        def ask(verb: str, way: str, calls: int) -> Usage:
            usage = program(verb, way, calls, job)
            seen[verb, way, calls].append([float(number) for number in output.read_text().split()[-2:]])
            return usage

        def tail(way: str) -> Usage:
            usage = program("tail", way, 1, _start_speaker(directory / "jobs"))
            shown[way].append(len({line for line in output.read_text().splitlines() if "said " in line}))
            return usage

        cases = [(verb, way, calls) for way in pythons for verb, calls in _ASKED]
        seen: dict[tuple[str, str, int], list[list[float]]] = {case: [] for case in cases}
        shown: dict[str, list[int]] = {way: [] for way in pythons}
        found = alternate({str(case): lambda case=case: ask(*case) for case in cases}, scale.times)
        tails = alternate({way: lambda way=way: tail(way) for way in pythons}, scale.times)
    wall, cpu = ({case: statistics.median(pair[which] for pair in seen[case]) for case in cases} for which in (0, 1))
    ways = list(pythons)
    for way in ways:
        goal = Goal(1.5) if way == "tailspan" else None
        yield Row(case=f"W5 status, {way}", figure=wall["status", way, _STATUS_CALLS], unit="ms", goal=goal)
    once = {way: found[str(("logs", way, 1))] for way in ways}
    for way in ways:
        yield Row(case=f"W5 {lines:,} lines, {way}", lines=lines, usage=once[way])
    ours, theirs = once["tailspan"], once[plain]
    faster = theirs.wall_s / ours.wall_s
    yield Row(case=f"W5 logs, whole process: {plain} to tailspan, wall", figure=faster, unit="x")
    less = ours.rss / theirs.rss
    yield Row(case=f"W5 logs, peak memory: tailspan to {plain}", figure=less, unit="x", goal=Goal(0.7))
    for way in ways:
        yield Row(case=f"W5 logs, the call: {way}", figure=wall["logs", way, _LOGS_CALLS], unit="ms")
    for way in ways:
        case = f"W5 logs, the call's CPU, without the server's: {way}"
        yield Row(case=case, figure=cpu["logs", way, _LOGS_CALLS], unit="ms")
    cheaper, faster = (each["logs", plain, _LOGS_CALLS] / each["logs", "tailspan", _LOGS_CALLS] for each in (cpu, wall))
    yield Row(case=f"W5 logs, the call's CPU: times cheaper than {plain}", figure=cheaper, unit="x")
    goal = Goal(1.5, at_least=True)
    yield Row(case=f"W5 logs, the call: times faster than {plain}", figure=faster, unit="x", goal=goal)
    for way in ways:
        share = 100 * min(shown[way]) / _TAILED
        case = f"W5 tail of a running job, {way}"
        yield Row(case=case, lines=_TAILED, usage=tails[way], figure=share, unit="% of its lines")
    yield from _loading()


def _pythons() -> dict[str, str]:
    """Return the interpreter of each way that can be taken here."""
    pythons = {"tailspan": sys.executable, "requests": sys.executable, "http": sys.executable}
    if importlib.util.find_spec("requests") is None:
        del pythons["requests"]
    # `make test-fused-client` makes these environments.
    fused = os.environ.get("BENCH_FUSED_PYTHON") or ".venv-fused/2.9.5/bin/python"
    if os.path.exists(fused):
        pythons["fused"] = fused
    return pythons


def _start_speaker(state_dir: Path) -> str:
    """Start a job that says a line 200 times a second for some seconds; return its id."""
    command = tailspan("run", "--detach", "--", sys.executable, "-c", _SPEAKER)
    environ = {**os.environ, "TAILSPAN_STATE_DIR": str(state_dir)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()


def _loading() -> Iterator[Row]:
    python = [sys.executable, "-c"]
    found = alternate(
        {
            "python": lambda: run([*python, "pass"]),
            "import": lambda: run([*python, "import tailspan"]),
            "--help": lambda: run(tailspan("--help")),
        },
        _LOADS,
    )
    bare_s = found["python"].wall_s
    yield Row(case="W5 python, nothing else", usage=found["python"], figure=bare_s * 1000, unit="ms")
    loading = (found["import"].wall_s - bare_s) * 1000
    yield Row(case="W5 import tailspan, beyond that", usage=found["import"], figure=loading, unit="ms", goal=Goal(60))
    shown = found["--help"].wall_s * 1000
    yield Row(case="W5 tailspan --help, whole", usage=found["--help"], figure=shown, unit="ms", goal=Goal(200))
