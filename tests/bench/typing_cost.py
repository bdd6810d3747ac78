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

_ROUNDS = 20
_PR_SET_CHILD_SUBREAPER = 36
_CONFIG = """
[services.local]
state_dir = "{state}"

[otlp]
endpoint = "http://127.0.0.1:4318"

[[agent.watch]]
service = "local"
"""


def costs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Measure all commands alternating, in a process that adopts and waits for what they leave behind."""
    state, config = directory / "state", directory / "config.toml"
    config.write_text(_CONFIG.format(state=state))
    env = {**os.environ, "TAILSPAN_STATE_DIR": str(state)}
    job = subprocess.run(tailspan("run", "--detach", "--", "true"), env=env, capture_output=True, text=True, check=True)
    job_id = job.stdout.strip()
    in_python = f"import tailspan; tailspan.job_get_status({job_id!r})"
    # Each with its goals for wall time and CPU in ms.
    cases: dict[str, tuple[list[str], float | None, float | None]] = {
        "python -c pass": ([sys.executable, "-c", "pass"], None, None),
        "run -- true": (tailspan("run", "--", "true"), 70, 60),
        "run, with a configuration file": (tailspan("run", "--config", str(config), "--", "true"), 120, None),
        "run --detach": (tailspan("run", "--detach", "--", "true"), 80, None),
        "status": (tailspan("status", job_id), 120, None),
        "logs": (tailspan("logs", job_id), 120, None),
        "jobs": (tailspan("jobs"), 120, None),
        "jobs, with a configuration file": (tailspan("jobs", "--config", str(config)), None, None),
        "job_get_status": ([sys.executable, "-c", in_python], 90, None),
    }
    measured = _measured([command for command, _, _ in cases.values()], env)
    _, start_cpu = measured[0]
    for (name, (_, wall_goal, cpu_goal)), (wall, cpu) in zip(cases.items(), measured, strict=True):
        yield Row(case=f"W9 {name}", figure=wall, unit="ms", goal=None if wall_goal is None else Goal(wall_goal))
        yield Row(case=f"W9 {name}, CPU", figure=cpu, unit="ms", goal=None if cpu_goal is None else Goal(cpu_goal))
        if wall_goal is not None:
            # Holds on every machine, also while others use it.
            yield Row(case=f"W9 {name}, CPU against python -c pass", figure=cpu / start_cpu, unit="x")
    count = scale.of(1000)
    begun = time.perf_counter()
    many = f"seq {count} | xargs -P 4 -I% {shlex.join(tailspan('run', '--', 'true'))}"
    subprocess.run(["sh", "-c", many], env=env, check=True)
    rate = count / (time.perf_counter() - begun)
    yield Row(case="W9 run -- true by xargs -P 4", figure=rate, unit="jobs/s", goal=Goal(30, at_least=True))


def _measured(commands: list[list[str]], env: dict[str, str]) -> list[tuple[float, float]]:
    """Return for each command the medians of wall time until it has ended, and of the CPU time of all, in ms."""
    arguments = [sys.executable, "-m", "tests.bench.typing_cost", json.dumps(commands)]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    return [(wall, cpu) for wall, cpu in json.loads(done.stdout)]


def _main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    commands = json.loads(sys.argv[1])
    found: list[list[tuple[float, float]]] = [[] for _ in commands]
    for _ in range(_ROUNDS):
        for command, results in zip(commands, found, strict=True):
            results.append(_cost(command))
    medians = [[statistics.median(values) for values in zip(*results, strict=True)] for results in found]
    print(json.dumps(medians))


def _cost(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time, and the CPU of all its processes, in ms."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.wait()
    wall = time.perf_counter() - begun
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall * 1000, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


if __name__ == "__main__":
    _main()
