"""Jobs whose lines are in files: rotation under load, requeues, and a Slurm controller that is away."""

from __future__ import annotations

import os
import random
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tailspan._identity import trace_id
from tailspan.config import validate_options
from tailspan.services.files import FilesOptions, FilesService
from tests.fakes.slurm import FakeSlurm
from tests.prove.orchestrators import TaskJob
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import World

_LINES = 60
# The time of a file is that of the kernel's last tick.
_TICK_NS = 20_000_000
_AWAY_S = 60.0
_REQUEUED_S = 5.0


class LogFileJob(TaskJob):
    """A job that appends to a log. A line that comes again after a kill may have the time of a later write.

    Attributes:
        log: The file.
    """

    log: Path

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.tally.has_stable_times = False

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return self.tally.records > 0

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        with self.log.open("a") as file:
            file.write(f"{text}\n")

    @abstractmethod
    def disturb(self, turn: int) -> None:
        """Do to the log what the row is about; called each second."""

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        found = super()._find(number, text)
        return None if found is None else (found[0] - _TICK_NS, time.time_ns())


class RotatedJob(LogFileJob):
    """A job whose log is rotated each second, in one of the ways of logrotate."""

    def __init__(self, root: Path, name: str, *, copies: bool) -> None:
        super().__init__(name)
        options = validate_options(FilesOptions, "services.files", {"root": str(root), "host": "prove"})
        self.identity = FilesService("files", options, state_dir=root).identity
        self.log = root / f"{name}.log"
        self.job_id = self.log.name
        self._copies = copies

    def disturb(self, turn: int) -> None:
        """Rotate; eight old files are kept."""
        for number in range(8, 0, -1):
            old = self.log.with_name(f"{self.log.name}.{number}")
            if old.exists():
                old.rename(self.log.with_name(f"{self.log.name}.{number + 1}"))
        first = self.log.with_name(f"{self.log.name}.1")
        if self._copies:
            shutil.copyfile(self.log, first)
            os.truncate(self.log, 0)
        else:
            self.log.rename(first)
            self.log.touch()

    def end(self) -> None:
        """See `TaskJob`."""
        self.log.with_suffix(".exit").write_text("0\n")
        self.ended = True


class SlurmJobOfProof(LogFileJob):
    """A job of a Slurm whose programs are doubles."""

    def __init__(self, slurm: FakeSlurm, name: str, number: int, *, requeues: bool) -> None:
        super().__init__(name)
        self.identity = "slurm:prove"
        self.job_id = str(number)
        self._slurm = slurm
        self._requeues = requeues
        self._row = slurm.add_job(self.job_id, name)
        self.log = Path(self._row["stdout"])

    @property
    def trace_id(self) -> str:
        """The trace of the last attempt."""
        return trace_id(self.identity, self.job_id, self._row["restarts"] + 1)

    def disturb(self, turn: int) -> None:
        """Requeue the job once: it waits, and then truncates its file."""
        if self._requeues and turn == 1:
            self._slurm.requeue(self._row)
            time.sleep(_REQUEUED_S)
            self.log.write_bytes(b"")
            self._slurm.start(self._row)

    def end(self) -> None:
        """See `TaskJob`."""
        self._slurm.end(self._row)
        self.ended = True


@dataclass(frozen=True)
class LogFileFault:
    """What happens to the logs while the agent is killed and started again.

    Attributes:
        name: The row's name.
        make_jobs: Adds the service and its jobs to the world; returns also what is away for a minute, if anything is.
    """

    name: str
    make_jobs: Callable[[World], tuple[Sequence[LogFileJob], FakeSlurm | None]]

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed) as world:
            jobs, away = self.make_jobs(world)
            world.jobs += jobs
            world.configure()
            _write(world.random, jobs)
            world.start()
            world.until(lambda: (world.fold(), all(job.handed for job in jobs))[1], "the first lines")
            for turn in range(6):
                _write(world.random, jobs)
                for job in jobs:
                    job.disturb(turn)
                _write(world.random, jobs)
                time.sleep(1.0)
                if turn == 3:
                    world.kill()
                    world.ended()
                    world.start()
            if away is not None:
                away.controller = False
                away.save()
                time.sleep(_AWAY_S)
                _write(world.random, jobs)
                away.controller = True
                away.save()
            time.sleep(2.0)
            return Row(self.name, [world.finish()])


def _write(random_: random.Random, jobs: Sequence[LogFileJob]) -> None:
    for job in jobs:
        for _ in range(random_.randint(1, _LINES)):
            job.line(datetime.now(UTC))


def _rotated(world: World) -> tuple[Sequence[LogFileJob], None]:
    root = world.home / "logs"
    root.mkdir()
    world.follow("files", f'root = "{root}"\nhost = "prove"\nexit_file = "{{stem}}.exit"\nname = "(?P<name>.*)[.]log$"')
    return [RotatedJob(root, f"log-{number}", copies=number % 2 == 0) for number in range(4)], None


def _slurm(world: World) -> FakeSlurm:
    slurm = FakeSlurm(world.home / "slurm")
    world.follow("slurm", f'cluster = "prove"\nbin_dir = "{slurm.programs}"\nrefresh = "1s"')
    return slurm


def _requeued(world: World) -> tuple[Sequence[LogFileJob], None]:
    slurm = _slurm(world)
    jobs = [SlurmJobOfProof(slurm, f"slurm-{number}", number, requeues=number > 1) for number in range(1, 4)]
    slurm.save()
    return jobs, None


def _away(world: World) -> tuple[Sequence[LogFileJob], FakeSlurm]:
    slurm = _slurm(world)
    jobs = [SlurmJobOfProof(slurm, f"slurm-{number}", number, requeues=False) for number in range(1, 4)]
    slurm.save()
    return jobs, slurm


FAULTS = (
    LogFileFault("log files: rotated under load, by renaming and by copying, SIGKILL", _rotated),
    LogFileFault("Slurm: requeued jobs, SIGKILL", _requeued),
    LogFileFault("Slurm: the controller is away for a minute, SIGKILL", _away),
)
