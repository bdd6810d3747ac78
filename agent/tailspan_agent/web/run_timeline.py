"""`RunTimeline`: when the jobs of each pipeline ran, as lanes with bars. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tailspan_agent.web.job_filter import RANGES, STATE_GROUPS, JobEntry
from tailspan_agent.web.job_rows import display_name, job_path

__all__ = ["MAX_LANES", "Lane", "RunBar", "RunTimeline", "run_timeline"]

MAX_LANES = 8
"""Maximum number of pipelines with a lane: the table below has all jobs."""

_DEFAULT_RANGE = "24h"
_WIDTH = 1000
_STEP = 4
"""Bars of one lane that begin in the same step are one bar, of the worst of their states."""
_KINDS = ("failed", "running", "pending", "canceled", "succeeded")
_KIND_OF = {state: group for group, states in STATE_GROUPS.items() for state in states}
_TICKS = 4


@dataclass(frozen=True, slots=True)
class RunBar:
    """One job, or several that lie in the same place.

    Attributes:
        x: The left edge, 0 to 1000.
        width: In units of x.
        kind: The state group of the worst of them.
        jobs: Their number.
        path: The path of the page of the worst of them.
        started_ns: The earliest start of the worst of them, in ns since the epoch.
    """

    x: float
    width: float
    kind: str
    jobs: int
    path: str
    started_ns: int


@dataclass(frozen=True, slots=True)
class Lane:
    """The jobs of one pipeline.

    Attributes:
        name: The pipeline.
        label: The name to display.
        bars: From left to right.
        jobs: Number of jobs.
        failed: Number of jobs that failed.
    """

    name: str
    label: str
    bars: Sequence[RunBar]
    jobs: int
    failed: int


@dataclass(frozen=True, slots=True)
class RunTimeline:
    """The jobs of the last time, by pipeline.

    Attributes:
        label: The time range in words.
        start_ns: The left end, in ns since the epoch.
        end_ns: The right end, in ns since the epoch.
        lanes: Pipelines with failures first, then those that were active last.
        left_out: Number of pipelines without a lane.
    """

    label: str
    start_ns: int
    end_ns: int
    lanes: Sequence[Lane]
    left_out: int

    @property
    def ticks(self) -> list[tuple[float, int]]:
        """Places on the axis and their times, in ns since the epoch."""
        step_ns = (self.end_ns - self.start_ns) // _TICKS
        return [(_WIDTH / _TICKS * number, self.start_ns + step_ns * number) for number in range(_TICKS)]


def run_timeline(entries: Iterable[JobEntry], time_range: str, now_ns: int) -> RunTimeline:
    """Return the timeline of jobs.

    Args:
        entries: The jobs.
        time_range: One of `RANGES`; empty: 24 hours.
        now_ns: The present time, in ns since the epoch.
    """
    label, seconds = RANGES[time_range or _DEFAULT_RANGE]
    start_ns = now_ns - seconds * 1_000_000_000
    jobs: dict[str, list[JobEntry]] = {}
    for entry in entries:
        if not entry.state.is_terminal or entry.when_ns >= start_ns:
            jobs.setdefault(entry.name, []).append(entry)
    ranked = sorted(jobs, key=lambda name: _rank(jobs[name], now_ns))
    lanes = [_lane(name, jobs[name], start_ns, now_ns) for name in ranked[:MAX_LANES]]
    return RunTimeline(label, start_ns, now_ns, lanes, max(0, len(ranked) - MAX_LANES))


def _rank(entries: Sequence[JobEntry], now_ns: int) -> tuple[bool, int]:
    """Return what sorts pipelines: those with a failure first, then by their last sign of life."""
    has_failed = any(_KIND_OF[entry.state] == "failed" for entry in entries)
    return not has_failed, -max(entry.when_ns if entry.state.is_terminal else now_ns for entry in entries)


def _lane(name: str, entries: Sequence[JobEntry], start_ns: int, end_ns: int) -> Lane:
    places: dict[int, list[tuple[JobEntry, int, int]]] = {}
    for entry in entries:
        begin_ns, finish_ns = _extent(entry, end_ns)
        place = _WIDTH * max(0, begin_ns - start_ns) // max(1, end_ns - start_ns) // _STEP
        places.setdefault(place, []).append((entry, begin_ns, finish_ns))
    bars = [_bar(place, places[place], start_ns, end_ns) for place in sorted(places)]
    failed = sum(_KIND_OF[entry.state] == "failed" for entry in entries)
    return Lane(name, display_name(name, "without a name"), bars, len(entries), failed)


def _extent(entry: JobEntry, now_ns: int) -> tuple[int, int]:
    finish_ns = min(entry.when_ns, now_ns) if entry.state.is_terminal else now_ns
    begin_ns = entry.started_ns if entry.started_ns is not None else entry.when_ns
    return min(begin_ns, finish_ns), finish_ns


def _bar(place: int, jobs: Sequence[tuple[JobEntry, int, int]], start_ns: int, end_ns: int) -> RunBar:
    worst, begin_ns, _ = min(jobs, key=lambda job: (_KINDS.index(_KIND_OF[job[0].state]), job[1]))
    x = place * _STEP
    finish_x = _WIDTH * (max(finish for _, _, finish in jobs) - start_ns) / max(1, end_ns - start_ns)
    width = min(max(_STEP - 1.0, finish_x - x), _WIDTH - x)
    path = job_path(worst.service, worst.job_id)
    return RunBar(x, round(width, 1), _KIND_OF[worst.state], len(jobs), path, begin_ns)
