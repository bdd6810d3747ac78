"""Stores of local jobs for the benchmarks.

Running hundreds of jobs takes long and measures nothing new: some are real jobs of ``tailspan run``, the others are
copies of their folders under ids, traces and names of their own.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from tailspan._identity import trace_id
from tailspan.local.store import JobStore, new_job_id
from tests.bench import printer
from tests.bench.measure import run, tailspan
from tests.fakes.local_jobs import until

__all__ = ["PRINTER", "add_copies", "add_real", "make_store", "text_bytes"]

PRINTER = str(Path(printer.__file__))
_REAL = 4
_PIPELINES = 10


def make_store(directory: Path, jobs: int, lines: int, *, how: str = "whole") -> Path:
    """Make a store of ended jobs with a number of lines each; return its state directory.

    Args:
        directory: Where; it is made.
        jobs: How many.
        lines: How many lines each has.
        how: ``whole`` or ``each``, see `tests.bench.printer`.
    """
    real = [add_real(directory, lines, how) for _ in range(min(jobs, _REAL))]
    add_copies(directory, real, jobs - len(real))
    return directory


def add_real(directory: Path, lines: int, *options: str) -> str:
    """Run a real job to its end, see `tests.bench.printer` for its options; return its id."""
    store = JobStore(directory)
    before = set(store.job_ids())
    command = [sys.executable, "-S", "-E", PRINTER, str(lines), *options]
    run(tailspan("run", "--name", "bench-0", "--", *command), env={"TAILSPAN_STATE_DIR": str(directory)})
    (job_id,) = set(store.job_ids()) - before
    # `tailspan run` exits a moment before the supervisor has written the end.
    until(lambda: json.loads((store.directory(job_id) / "state.json").read_text())["end"])
    return job_id


def add_copies(directory: Path, real: list[str], count: int) -> None:
    """Copy jobs, each under its own id, trace and one of some names."""
    store = JobStore(directory)
    for number in range(count):
        source = store.directory(real[number % len(real)])
        job_id = new_job_id(time.time_ns())
        target = store.directory(job_id)
        shutil.copytree(source, target)
        name = f"bench-{number % _PIPELINES}"
        own = {"id": job_id, "name": name, "trace_id": trace_id(store.identity, job_id)}
        _rewrite(target / "job.json", own)
        _rewrite(target / "state.json", {"name": name})


def text_bytes(directory: Path) -> tuple[int, int]:
    """Return how many bytes of text the jobs of a store wrote, and how many all their files have."""
    jobs = directory / "jobs"
    text = sum(path.stat().st_size for path in jobs.glob("*/log"))
    return text, sum(path.stat().st_size for path in jobs.glob("*/*"))


def _rewrite(path: Path, values: dict[str, str]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
