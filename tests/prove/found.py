"""What the oracle found in a world, and what of it breaks the guarantee."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.prove.tally import JobCount, SpanCount

_SHOWN = 4


@dataclass
class Found:
    """What the oracle found in a world.

    Attributes:
        jobs: How many there were.
        lines: All jobs' lines together.
        spans: All jobs' spans.
        dead_lettered: Log records that are in the dead letter.
        wrong_runs: Pipelines whose count of runs in the last metrics is not what it must be, and other faults.
        exit_code: Of the last agent, told to stop.
        peak_rss: Bytes of memory, at most, of any agent of this world.
    """

    jobs: int = 0
    lines: JobCount = field(default_factory=JobCount)
    spans: SpanCount = field(default_factory=SpanCount)
    dead_lettered: int = 0
    wrong_runs: list[str] = field(default_factory=list)
    exit_code: int | None = None
    peak_rss: int = 0

    def complaints(self) -> list[str]:
        """Return in words what breaks the guarantee."""
        counts = {**vars(self.lines), **{f"spans {name}": count for name, count in vars(self.spans).items()}}
        harmless = {"expected", "records", "repeated", "spans repeated"}
        wrong = [
            f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name not in harmless
        ]
        wrong += self.wrong_runs[:_SHOWN]
        if len(self.wrong_runs) > _SHOWN:
            wrong.append(f"and {len(self.wrong_runs) - _SHOWN} more")
        return wrong if self.exit_code == 0 else [*wrong, f"the agent's exit code is {self.exit_code}"]

    @classmethod
    def total(cls, all_found: Iterable[Found]) -> Found:
        """Return the counts of several worlds together."""
        total = cls(exit_code=0)
        for found in all_found:
            total.jobs += found.jobs
            total.lines += found.lines
            total.spans += found.spans
            total.dead_lettered += found.dead_lettered
            total.peak_rss = max(total.peak_rss, found.peak_rss)
        return total
