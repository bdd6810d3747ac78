"""Units and containers: a journal that is vacuumed, containers that are removed while they are followed, bursts."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.fakes.docker import FakeEngine
from tests.fakes.journal import FakeJournal
from tests.prove.orchestrators import TaskJob
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import World

__all__ = ["FAULTS"]

_KEPT = 200
_LINES = 60
_BURST = 5_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class MachineJob(TaskJob):
    """A job that something happens to."""

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return self.tally.records > 0

    @property
    def has_arrived(self) -> bool:
        """Whether all of its lines have arrived."""
        return self.tally.count(self.written).missing == 0

    @property
    @abstractmethod
    def follows(self) -> int:
        """How often its log was followed."""

    def disturb(self, turn: int) -> None:
        """Write more lines at once than the agent keeps; called each second."""
        if turn == 2:
            for _ in range(_BURST):
                self.line(datetime.now(UTC))


class UnitJob(MachineJob):
    """A unit of a fake journal."""

    def __init__(self, journal: FakeJournal, name: str, *, vacuums: bool) -> None:
        super().__init__(f"{name}.service")
        self.identity = f"systemd:{FakeJournal.machine_id}"
        self._journal = journal
        self._unit = f"{name}.service"
        self._vacuums = vacuums
        self.job_id = journal.start(self._unit)

    @property
    def follows(self) -> int:
        """See `MachineJob`."""
        return sum("--follow" in call for call in self._journal.calls("journalctl"))

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        self._journal.now_us = (at - _EPOCH) // timedelta(microseconds=1)
        self._journal.line(self._unit, self.job_id, text)

    def disturb(self, turn: int) -> None:
        """Vacuum the journal, or see `MachineJob`."""
        if self._vacuums:
            self._journal.vacuum(keep=_KEPT)
        else:
            super().disturb(turn)

    def end(self) -> None:
        """See `TaskJob`."""
        self._journal.now_us = None
        self._journal.finish(self._unit, self.job_id)
        self.ended = True


class ContainerJob(MachineJob):
    """A container of a fake engine, which is removed at its end."""

    def __init__(self, engine: FakeEngine, name: str) -> None:
        super().__init__(name)
        self.identity = f"docker:{engine.url}"
        self._engine = engine
        self.job_id = engine.run(name, auto_remove=True)

    @property
    def follows(self) -> int:
        """See `MachineJob`."""
        return self._engine.requests.count(f"GET /containers/{self.job_id}/logs")

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        self._engine.write(self.job_id, f"{text}\n", 1, (at - _EPOCH) // timedelta(microseconds=1) * 1000)

    def end(self) -> None:
        """End it with lines just before its removal."""
        for _ in range(100):
            self.line(datetime.now(UTC))
        self._engine.end(self.job_id)
        self.ended = True


def _units(world: World, *, vacuums: bool) -> Sequence[UnitJob]:
    journal = FakeJournal(world.home / "journal")
    world.follow("systemd", f"command_prefix = {json.dumps(journal.prefix)}")
    return [UnitJob(journal, f"unit-{number}", vacuums=vacuums) for number in range(3)]


def _containers(world: World) -> Sequence[ContainerJob]:
    engine = world.enter(FakeEngine())
    world.follow("docker", f'host = "{engine.url}"')
    return [ContainerJob(engine, f"box-{number}") for number in range(3)]


@dataclass(frozen=True)
class MachineFault:
    """What happens to jobs of a machine while the agent is killed and started again.

    Attributes:
        name: The row's name.
        make_jobs: Adds the service and its jobs to the world.
    """

    name: str
    make_jobs: Callable[[World], Sequence[MachineJob]]

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed) as world:
            jobs = self.make_jobs(world)
            world.jobs += jobs
            world.configure()
            _write(jobs)
            world.start()
            world.until(lambda: (world.fold(), all(job.handed for job in jobs))[1], "the first lines")
            for turn in range(5):
                # What is vacuumed before it was read is lost: only what has arrived may be.
                world.until(lambda: (world.fold(), all(job.has_arrived for job in jobs))[1], "all lines")
                _write(jobs)
                for job in jobs:
                    job.disturb(turn)
                time.sleep(1.0)
                if turn in (1, 3):
                    before = [job.follows for job in jobs]
                    world.kill()
                    world.ended()
                    world.start()
                    # What is removed while no agent runs is lost: the row is about what is followed.
                    world.until(
                        lambda: all(job.follows > old for job, old in zip(jobs, before, strict=True)),  # noqa: B023
                        "the logs to be followed again",
                    )
            return Row(self.name, [world.finish()])


def _write(jobs: Sequence[MachineJob]) -> None:
    for job in jobs:
        for _ in range(_LINES):
            job.line(datetime.now(UTC))


FAULTS = (
    MachineFault("systemd: the journal is vacuumed, SIGKILL", lambda world: _units(world, vacuums=True)),
    MachineFault("systemd: a burst of 5,000 lines a job, SIGKILL", lambda world: _units(world, vacuums=False)),
    MachineFault("containers: removed in mid-follow, a burst, SIGKILL", _containers),
)
