"""Load: backpressure reaches the reader, and memory stays bounded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fakes.collector import Answer, Reply
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Settings, World

MAX_RSS = 256 << 20
_BURSTS_A_SECOND = 100


@dataclass(frozen=True)
class Load:
    """A row.

    Attributes:
        name: The row's name.
        fused_jobs: How many jobs of the job service, with 50 lines each.
        local_jobs: How many real jobs.
        lines_per_second: What the real jobs write together.
        seconds: For how long.
        answer: Answers to logs and traces while the jobs write.
        settings: Of the world.
        timeout_s: How long it may take to relay what is left when the jobs have ended.
    """

    name: str
    fused_jobs: int = 0
    local_jobs: int = 0
    lines_per_second: int = 0
    seconds: float = 0.0
    answer: Answer = field(default_factory=Reply)
    settings: Settings = field(default_factory=Settings)
    timeout_s: float = 240.0

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run, alone=True)

    def _run(self, seed: str) -> Row:
        with World(seed, self.settings) as world:
            for number in range(self.fused_jobs):
                world.fused_job(f"fused-{number}").write(50, world.random)
            for signal in ("logs", "traces"):
                world.collector.always(signal, self.answer)
            world.configure()
            world.start()
            burst = self.lines_per_second // _BURSTS_A_SECOND // max(1, self.local_jobs)
            for number in range(self.local_jobs):
                world.local_job(f"local-{number}", burst=burst, pause_s=1 / _BURSTS_A_SECOND, paced=True)
            started_s = time.monotonic()
            _fold_until(world, lambda: time.monotonic() - started_s > self.seconds)
            behind = sum(job.tally.records for job in world.jobs)
            for job in world.jobs:
                job.end()
            for signal in ("logs", "traces"):
                world.collector.always(signal, Reply() if self.answer == Reply(503) else self.answer)
            written = sum(job.written for job in world.jobs)
            ended_s, patience = time.monotonic(), world.patience(self.timeout_s)
            _fold_until(world, lambda: world.all_done() or patience.is_over())
            caught_up_s = time.monotonic() - ended_s
            row = Row(self.name, [world.finish()])
        left = max(0, written - behind)
        if self.local_jobs:
            row.notes.append(f"{written} lines, {written / self.seconds:.0f} a second")
        row.notes.append(f"when the jobs ended {left} of them were left to relay, which took {caught_up_s:.0f} s")
        if row.found[0].peak_rss >= MAX_RSS:
            row.problems.append(f"the agent took {row.found[0].peak_rss >> 20} MiB")
        return row


def _fold_until(world: World, holds: Callable[[], bool]) -> None:
    """Take in what arrives, so that the oracle's own memory stays small."""
    while not holds():
        time.sleep(0.2)
        world.fold()


FAULTS = (
    Load("load: 1,000 jobs at once", fused_jobs=1000, seconds=5),
    Load("load: 50,000 lines a second for a minute", local_jobs=4, lines_per_second=50_000, seconds=60),
    Load(
        "load: 20,000 lines a second, an endpoint that answers in 1 s",
        local_jobs=4,
        lines_per_second=20_000,
        seconds=20,
        answer=Reply(delay_s=1.0),
    ),
    Load(
        "load: 30,000 lines a second into an outage of a minute",
        local_jobs=4,
        lines_per_second=30_000,
        seconds=60,
        answer=Reply(503),
    ),
)
