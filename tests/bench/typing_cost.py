"""W9: what it costs to type a command: wall time, and CPU of all processes together, also of those left behind."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import tailspan
from tests.bench.scale import Scale
from tests.bench.table import Goal, Row

__all__ = ["costs"]

_TIMES = 20
_PR_SET_CHILD_SUBREAPER = 36


def costs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Measure each command in a process of its own, which adopts and waits for what the command leaves behind."""
    env = {**os.environ, "TAILSPAN_STATE_DIR": str(directory / "state")}
    job = subprocess.run(tailspan("run", "--detach", "--", "true"), env=env, capture_output=True, text=True, check=True)
    job_id = job.stdout.strip()
    in_python = f"import tailspan; tailspan.job_get_status({job_id!r})"
    goals = {
        "true": (["true"], None, None),
        "run -- true": (tailspan("run", "--", "true"), 70, 60),
        "run --detach": (tailspan("run", "--detach", "--", "true"), 80, None),
        "status": (tailspan("status", job_id), 120, None),
        "logs": (tailspan("logs", job_id), 120, None),
        "jobs": (tailspan("jobs"), 120, None),
        "job_get_status": ([sys.executable, "-c", in_python], 90, None),
    }
    for name, (command, wall_ms, cpu_ms) in goals.items():
        wall, cpu = _measured(command, env)
        yield Row(case=f"W9 {name}", figure=wall, unit="ms", goal=wall_ms and Goal(wall_ms))
        yield Row(case=f"W9 {name}, CPU", figure=cpu, unit="ms", goal=cpu_ms and Goal(cpu_ms))
    count = scale.of(1000)
    begun = time.perf_counter()
    many = f"seq {count} | xargs -P 4 -I% {shlex.join(tailspan('run', '--', 'true'))}"
    subprocess.run(["sh", "-c", many], env=env, check=True)
    rate = count / (time.perf_counter() - begun)
    yield Row(case="W9 run -- true by xargs -P 4", figure=rate, unit="jobs/s", goal=Goal(30, at_least=True))


def _measured(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Return the medians of wall time until the command has ended, and of the CPU time of all, in ms."""
    arguments = [sys.executable, "-m", "tests.bench.typing_cost", *command]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    wall, cpu = json.loads(done.stdout)
    return wall, cpu


def _main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    walls, cpus = [], []
    for _ in range(_TIMES):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        process.wait()
        walls.append((time.perf_counter() - begun) * 1000)
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)
    print(json.dumps([statistics.median(walls), statistics.median(cpus)]))


if __name__ == "__main__":
    _main()
