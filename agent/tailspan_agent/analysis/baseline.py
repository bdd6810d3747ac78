"""What is remembered of a pipeline's last ended runs, and what its own past says is usual. Pure.

The checkpoint store keeps the newest `KEPT_RUNS` runs of each pipeline; `Histories` is the same in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES

__all__ = ["ENOUGH_RUNS", "KEPT_RUNS", "Histories", "PastRun", "PipelineHistory"]

KEPT_RUNS = 100
"""How many runs of one pipeline are remembered."""

ENOUGH_RUNS = 10
"""How many succeeded runs it takes before anything is called silent, slow or too fast."""

_SUCCESS = "success"
# A pause is seen late by up to a minute (how rarely a silent job is read), and some spread is no news.
_LEAST_SILENCE_S = 60.0
_SILENCE_FACTOR = 2.0
_SLOW_FACTOR, _SLOW_S = 1.1, 1.0
_FAST_FACTOR, _FAST_S = 0.5, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """One ended run, as it is stored.

    Attributes:
        pipeline: The pipeline's name, as `PipelineNames.label` gives it.
        job_id: The job.
        identity: The identity of its service.
        trace_id: Its trace, 32 hexadecimal digits.
        result: The ``cicd.pipeline.result``.
        started_unix_nano: When it started, in ns since the epoch; None for a job that never did.
        ended_unix_nano: When it ended.
        duration_s: How long it ran, in seconds.
        lines: How many lines it wrote.
        quiet_s: Its longest time without a line, in seconds.
        heartbeat_gap_s: The longest time between two of its heartbeats, as far as they were seen, in seconds.
        too_fast: Whether it succeeded suspiciously fast.
    """

    pipeline: str
    job_id: str
    identity: str
    trace_id: str
    result: str
    started_unix_nano: int | None
    ended_unix_nano: int
    duration_s: float
    lines: int = 0
    quiet_s: float = 0.0
    heartbeat_gap_s: float = 0.0
    too_fast: bool = False

    @classmethod
    def from_json(cls, text: str) -> PastRun:
        """Make the run back from `to_json`.

        Raises:
            ValueError: The text is not such JSON.
        """
        return msgspec.json.decode(text, type=cls)

    def to_json(self) -> str:
        """Return the run as JSON."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True)
class PipelineHistory:
    """The last ended runs of one pipeline, and the limits that they set for the next.

    Durations and pauses are those of succeeded runs: a run that failed at once or hung until it was killed does not
    say what is usual. A limit is None before there are `ENOUGH_RUNS` of them ("not enough history").

    Attributes:
        runs: Oldest end first, at most `KEPT_RUNS`.
    """

    runs: tuple[PastRun, ...] = ()

    def with_run(self, run: PastRun) -> PipelineHistory:
        """Return the history with one more run, and without the oldest beyond the limit."""
        runs = sorted((*self.runs, run), key=lambda one: one.ended_unix_nano)
        return PipelineHistory(tuple(runs[-KEPT_RUNS:]))

    @cached_property
    def succeeded(self) -> tuple[PastRun, ...]:
        """The runs that succeeded and were not too fast, oldest end first."""
        return tuple(run for run in self.runs if run.result == _SUCCESS and not run.too_fast)

    @cached_property
    def is_enough(self) -> bool:
        """Whether there are enough succeeded runs to judge others by."""
        return len(self.succeeded) >= ENOUGH_RUNS

    @cached_property
    def success_rate(self) -> float | None:
        """The part of all remembered runs that succeeded, 0 to 1; None without runs."""
        return sum(run.result == _SUCCESS for run in self.runs) / len(self.runs) if self.runs else None

    @cached_property
    def durations_s(self) -> tuple[float, ...]:
        """How long the succeeded runs ran, in seconds, shortest first."""
        return tuple(sorted(run.duration_s for run in self.succeeded))

    @cached_property
    def p50_s(self) -> float | None:
        """The usual duration in seconds; None without a succeeded run."""
        return _quantile(self.durations_s, 0.5)

    @cached_property
    def p95_s(self) -> float | None:
        """The duration that 95 of 100 succeeded runs did not exceed, in seconds; None without one."""
        return _quantile(self.durations_s, 0.95)

    @cached_property
    def slow_after_s(self) -> float | None:
        """Running for longer than this many seconds is slow: past p95, with a tenth and a second to spare."""
        return self.p95_s * _SLOW_FACTOR + _SLOW_S if self.is_enough and self.p95_s is not None else None

    @cached_property
    def fast_below_s(self) -> float | None:
        """Succeeding in fewer seconds is suspiciously fast: half of what the fastest twentieth took, or less."""
        least_s = _quantile(self.durations_s, 0.05)
        return min(least_s * _FAST_FACTOR, least_s - _FAST_S) if self.is_enough and least_s is not None else None

    @cached_property
    def silent_after_s(self) -> float | None:
        """No line for longer than this many seconds is silence: twice the longest usual pause, at least a minute."""
        return self._pause_limit_s([run.quiet_s for run in self.succeeded])

    @cached_property
    def heartbeat_after_s(self) -> float | None:
        """No heartbeat for longer than this many seconds is silence; only for jobs that have heartbeats."""
        return self._pause_limit_s([run.heartbeat_gap_s for run in self.succeeded])

    @cached_property
    def last_start_unix_nano(self) -> int | None:
        """When the newest of the runs started, in ns since the epoch."""
        return max((run.started_unix_nano for run in self.runs if run.started_unix_nano is not None), default=None)

    def is_too_fast(self, result: str, duration_s: float) -> bool:
        """Return whether a run that ended now succeeded suspiciously fast.

        Args:
            result: Its ``cicd.pipeline.result``.
            duration_s: How long it ran, in seconds.
        """
        return result == _SUCCESS and self.fast_below_s is not None and duration_s < self.fast_below_s

    def _pause_limit_s(self, pauses_s: Sequence[float]) -> float | None:
        usual_s = _quantile(sorted(pauses_s), 0.95)
        if not self.is_enough or usual_s is None:
            return None
        return max(_LEAST_SILENCE_S, _SILENCE_FACTOR * usual_s)


def _quantile(ordered: Sequence[float], part: float) -> float | None:
    """Return the nearest-rank quantile of values in order: always one that was there."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


class Histories:
    """The histories of all pipelines that have metrics of their own; the rest share a name that says nothing."""

    def __init__(self, runs: Iterable[PastRun] = ()) -> None:
        """Start with stored runs, in any order."""
        self._histories: dict[str, PipelineHistory] = {}
        by_pipeline: dict[str, list[PastRun]] = {}
        for run in runs:
            by_pipeline.setdefault(run.pipeline, []).append(run)
        for pipeline, past in by_pipeline.items():
            past.sort(key=lambda one: one.ended_unix_nano)
            self._histories[pipeline] = PipelineHistory(tuple(past[-KEPT_RUNS:]))

    def add(self, run: PastRun) -> None:
        """Take in a run that has ended."""
        if run.pipeline != OTHER_PIPELINES:
            self._histories[run.pipeline] = self.of(run.pipeline).with_run(run)

    def of(self, pipeline: str) -> PipelineHistory:
        """Return the history of a pipeline by its label; empty for one that never ended a run."""
        return self._histories.get(pipeline, _NONE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._histories)


_NONE = PipelineHistory()
