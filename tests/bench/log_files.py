"""W18: an agent beside ten thousand ended and a thousand silent jobs, whose logs are files: `files`, `slurm`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.measure import peak_rss, started, tailspan
from tests.bench.receiver import receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row
from tests.fakes.slurm import FakeSlurm

__all__ = ["cpu_with_children", "log_files"]

_SETTLED_S = 120.0
_WATCHED_S = 120.0
_AGO_S = 50_000.0


def log_files(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield the rows of each service; the programs that it starts count, too."""
    ended, running = scale.of(10_000), scale.of(1_000)
    with receiving(directory) as receiver:
        for kind, make in _KINDS.items():
            home = directory / kind
            home.mkdir()
            section = make(home, ended, running)
            config = home / "config.toml"
            config.write_text(
                f"[services.{kind}]\n{section}\n"
                f'[agent]\nstate_dir = {json.dumps(str(home / "agent"))}\nlisten = ""\n'
                f'[[agent.watch]]\nservice = "{kind}"\ndiscover = true\nlookback = "1h"\n'
                f'[otlp]\nendpoint = "{receiver.http_url}"\n'
            )
            with started(tailspan("agent", "run", "--config", str(config)), log=home / "agent.log") as (pid, _):
                # Until the ended jobs were listed, and the others have become silent.
                time.sleep(_SETTLED_S * max(scale.factor, 0.5))
                begun_s, before_s = time.perf_counter(), cpu_with_children(pid)
                time.sleep(_WATCHED_S * min(scale.factor, 1.0))
                share = (cpu_with_children(pid) - before_s) / (time.perf_counter() - begun_s) * 100
                memory = peak_rss(pid)
            yield Row(case=f"W18 {kind}", figure=share, unit="% of a core", goal=Goal(10))
            yield Row(case=f"W18 {kind}, memory", figure=memory / MIB, unit="MiB")


def cpu_with_children(pid: int) -> float:
    """Return the CPU time in seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _files(home: Path, ended: int, running: int) -> str:
    root = home / "work"
    for number in range(ended + running):
        place = root / f"{number % 100:02}" / f"{number:06}"
        place.mkdir(parents=True)
        (place / ".command.run").write_text(f"#!/bin/bash\n# NEXTFLOW TASK: STEP_{number % 20} ({number})\n")
        (place / ".command.begin").touch()
        (place / ".command.log").write_text("line\n" * 10)
        if number < ended:
            (place / ".exitcode").write_text("0")
        old = time.time() - (_AGO_S if number < ended else 0)
        for path in (*place.iterdir(), place):
            os.utime(path, (old, old))
    return f'root = {json.dumps(str(root))}\npreset = "nextflow"'


def _slurm(home: Path, ended: int, running: int) -> str:
    slurm = FakeSlurm(home / "slurm", start_s=int(time.time() - _AGO_S))
    for number in range(ended):
        slurm.add_job(str(number), f"job-{number % 20}", state="COMPLETED", forgotten=number % 10 > 0)
        slurm.add_step(f"{number}.batch", "batch")
    for number in range(ended, ended + running):
        row = slurm.add_job(str(number), f"job-{number % 20}")
        Path(row["stdout"]).write_text("line\n" * 10)
    slurm.save()
    return f'cluster = "bench"\nbin_dir = {json.dumps(str(slurm.programs))}'


_KINDS: dict[str, Callable[[Path, int, int], str]] = {"files": _files, "slurm": _slurm}
