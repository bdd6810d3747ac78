"""W5: the verbs against plain HTTP and json, and how light Tailspan is to load."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.folders import add_real
from tests.bench.job_server import SERVING
from tests.bench.measure import Usage, alternate, run, started, tailspan
from tests.bench.scale import Scale
from tests.bench.table import Goal, Row

__all__ = ["verbs"]

_LINES = 100_000
_LOADS = 11


def verbs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Measure each in new processes; what a process costs that only loads the same is taken off."""
    lines = scale.of(_LINES)
    job = add_real(directory / "jobs", lines)
    server = [sys.executable, "-m", "tests.bench.job_server", str(directory / "jobs")]
    plain = "requests" if importlib.util.find_spec("requests") else "http"
    ways = ("tailspan", plain) if plain == "http" else ("tailspan", plain, "http")
    with started(server, log=directory / "server.log", says=SERVING) as (_, said):
        base_url = f"{said.removeprefix(SERVING)}/server/v1"

        def ask(what: str, output: Path) -> Usage:
            return run([sys.executable, "-m", "tests.bench.sdk_program", what, base_url, job], output=output)

        status: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(scale.times):
            for way in ways:
                ask(f"status-{way}", directory / "out")
                status[way].append(float((directory / "out").read_text()))
        for way in ways:
            goal = Goal(1.5) if way == "tailspan" else None
            yield Row(case=f"W5 status, {way}", figure=statistics.median(status[way]), unit="ms", goal=goal)
        cases = {f"{what}-{way}": what for way in ways for what in ("status", "logs")}
        found = alternate({name: lambda n=name: ask(n, directory / "out") for name in cases}, scale.times)
        for way in ways:
            yield Row(case=f"W5 {lines:,} lines, {way}", lines=lines, usage=found[f"logs-{way}"])
        ours, theirs = found["logs-tailspan"], found[f"logs-{plain}"]
        yield Row(
            case=f"W5 logs, whole process: {plain} to tailspan, wall", figure=theirs.wall_s / ours.wall_s, unit="x"
        )
        yield Row(
            case=f"W5 logs, peak memory: tailspan to {plain}", figure=ours.rss / theirs.rss, unit="x", goal=Goal(0.7)
        )
        yield from _calls(base_url, job, ways, scale)
    yield from _loading()


def _calls(base_url: str, job: str, ways: Sequence[str], scale: Scale) -> Iterator[Row]:
    """The verb alone, in a process that has everything loaded: in turns, in one process."""
    from tests.bench.sdk_program import WAYS

    asks = {way: WAYS[way](base_url, job, "logs") for way in ways}
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cpus: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(scale.times + 1):
        for way, ask in asks.items():
            begun, used = time.perf_counter(), time.process_time()
            ask()
            walls[way].append(time.perf_counter() - begun)
            cpus[way].append(time.process_time() - used)
    wall = {way: statistics.median(seen[1:]) for way, seen in walls.items()}
    for way in ways:
        yield Row(case=f"W5 logs, the call: {way}", figure=wall[way] * 1000, unit="ms")
    cpu = {way: statistics.median(seen[1:]) for way, seen in cpus.items()}
    for way in ways:
        yield Row(case=f"W5 logs, the call's CPU, without the server's: {way}", figure=cpu[way] * 1000, unit="ms")
    cheaper = cpu[ways[1]] / cpu["tailspan"]
    yield Row(case=f"W5 logs, the call's CPU: times cheaper than {ways[1]}", figure=cheaper, unit="x")
    faster = wall[ways[1]] / wall["tailspan"]
    yield Row(
        case=f"W5 logs, the call: times faster than {ways[1]}", figure=faster, unit="x", goal=Goal(1.5, at_least=True)
    )


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
