"""A clock that leaps: nothing is deleted as old, no line is lost or repeated, and the agent works on.

The agent and the command line get their wall clock from a library (`clock.c`) that the test sets. Jobs, the job service
and the endpoint have the right time, so each line has a known one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.prove.attacks import run_tailspan
from tests.prove.configuration import speak
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import World

_SOURCE = Path(__file__).with_name("clock.c")
_OLD_JOBS = 3
_PASS_S = 1.5
_SHORT = "short"
"""The name of the jobs that are started while the clock is wrong."""


class LeapingClock:
    """The clock of the processes that this process starts inside of `applied`.

    Args:
        directory: Where its library and its file are made.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise LookupError("no C compiler: the library of the clock cannot be made")
        self._file, self._library = directory / "clock", directory / "clock.so"
        self.set_right()
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", self._library, _SOURCE], check=True)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let processes that start now have this clock."""
        os.environ |= {"LD_PRELOAD": str(self._library), "PROVE_CLOCK": str(self._file)}
        try:
            yield
        finally:
            for name in ("LD_PRELOAD", "PROVE_CLOCK"):
                del os.environ[name]

    def leap(self, moment: datetime) -> None:
        """Set the clock to a moment, from which it runs on."""
        self._set(int((moment.timestamp() - time.time()) * 1e9))

    def set_right(self) -> None:
        """Set the clock to the present."""
        self._set(0)

    def _set(self, ahead_ns: int) -> None:
        # In place: the processes have mapped the file.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", ahead_ns))


@dataclass(frozen=True)
class Leap:
    """A row.

    Attributes:
        name: The row's name.
        moments: The times that the clock leaps to, one after the other, and back to the present after each.
    """

    name: str
    moments: tuple[datetime, ...]

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        row = Row(self.name)
        with World(seed) as world:
            clock = LeapingClock(world.home)
            world.configure()
            _relay_old_jobs(world, clock)
            known = _stored(world)
            world.fused_job("fused-0")
            world.local_job("local-0", burst=20, pause_s=0.01)
            _progress(world)
            for moment in self.moments:
                clock.leap(moment)
                _use(world, clock)
                clock.set_right()
                _use(world, clock)
            found = world.finish()
            row.found = [found]
            found.wrong_runs = [wrong for wrong in found.wrong_runs if not wrong.startswith(_SHORT)]
            for what, kept in _stored(world).items():
                if gone := known[what] - kept:
                    row.problems.append(f"{what}: {len(gone)} of {len(known[what])} were deleted")
        return row


def _relay_old_jobs(world: World, clock: LeapingClock) -> None:
    """Run jobs to their end, and relay them."""
    for number in range(_OLD_JOBS):
        world.local_job(f"old-{number}", burst=5, pause_s=0.02)
        world.fused_job(f"done-{number}")
    speak(world)
    with clock.applied():
        world.start()
    world.until(lambda: all(world.acked(job) for job in world.jobs), "the first lines")
    for job in world.jobs:
        job.end()
    world.until(world.all_done, "the end of the old jobs")


def _use(world: World, clock: LeapingClock) -> None:
    """Let the running agent relay, run a command as a job, which may prune, and restart the agent."""
    _progress(world)
    with clock.applied():
        done = run_tailspan(world, "run", "--name", _SHORT, "--", "true")
    if done.returncode:
        raise AssertionError(f"tailspan run: exit code {done.returncode}: {done.stderr[-500:]}")
    world.terminate()
    if code := world.ended():
        raise AssertionError(f"the agent ended with {code}: {world.log[-500:]}")
    with clock.applied():
        world.start()
    _progress(world)


def _progress(world: World) -> None:
    """Wait until further lines of each running job are acknowledged."""
    speak(world)
    time.sleep(_PASS_S)
    speak(world)
    running = {job: world.acked(job) for job in world.jobs if not job.ended}
    speak(world)
    world.until(lambda: all(world.acked(job) > lines for job, lines in running.items()), "further lines")


def _stored(world: World) -> dict[str, set[str]]:
    """Return the ids of the jobs that are on disk and in the checkpoint store."""
    return {
        "directories of jobs": {path.name for path in (world.home / "jobs" / "jobs").iterdir()},
        "checkpoints": {job.job_id for job in world.jobs if world.checkpoint(job) is not None},
    }


FAULTS = (
    Leap("clock: 2099 once, then right again", (datetime(2099, 1, 1, tzinfo=UTC),)),
    Leap("clock: 1970 until the time is known", (datetime(1970, 1, 1, 0, 1, tzinfo=UTC),)),
    Leap(
        "clock: 2099, 1970, and 2262, while jobs run",
        (
            datetime(2099, 1, 1, tzinfo=UTC),
            datetime(1970, 1, 1, 0, 1, tzinfo=UTC),
            datetime(2262, 4, 12, tzinfo=UTC),
        ),
    ),
)
