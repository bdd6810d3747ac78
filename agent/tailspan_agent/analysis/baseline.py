"""The last ended runs of each pipeline, and the limits that they set for its next run. Pure.

The checkpoint store keeps the newest `KEPT_RUNS` runs of each pipeline; `Histories` is the same in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import msgspec

from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES

__all__ = ["ENOUGH_RUNS", "KEPT_RUNS", "Histories", "PastRun", "PipelineHistory"]

KEPT_RUNS = 100
"""Maximum number of runs in a pipeline's history."""

ENOUGH_RUNS = 10
"""Minimum number of succeeded runs for a limit: before, no run is silent, slow or too fast."""

_SUCCESS = "success"
_UNDECIDED = ("cancellation", "skip")
# A silent job is polled only once a minute, so that a pause is seen up to a minute late.
_LEAST_SILENCE_S = 60.0
_SILENCE_FACTOR = 2.0
_SLOW_FACTOR, _SLOW_S = 1.1, 1.0
_FAST_PART, _FAST_FACTOR, _FAST_S = 0.05, 0.5, 1.0


class PastRun(msgspec.Struct, frozen=True, kw_only=True):
    """One ended run, as it is stored.

    Attributes:
        pipeline: The label of the pipeline, from `PipelineNames.label`.
        job_id: The job's id.
        identity: The identity of its service.
        trace_id: 32 hexadecimal digits.
        result: The ``cicd.pipeline.result``.
        started_unix_nano: When it started, in ns since the epoch; None for a job that never did.
        ended_unix_nano: When it ended, in ns since the epoch.
        duration_s: How long it ran, in seconds.
        lines: Number of lines it wrote.
        quiet_s: Its longest time without a line, in seconds.
        heartbeat_gap_s: The longest observed time between two of its heartbeats, in seconds.
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
        """Return the run that `to_json` made this text of.

        Raises:
            ValueError: The text is not such JSON.
        """
        return msgspec.json.decode(text, type=cls)

    def to_json(self) -> str:
        """Return the run as JSON, to be stored."""
        return msgspec.json.encode(self).decode()


class PipelineHistory(msgspec.Struct, frozen=True, dict=True):
    """The last ended runs of one pipeline, and the limits that they set for the next.

    Only succeeded runs count: a run that failed at once or hung until it was killed is not usual. A limit is None
    before there are `ENOUGH_RUNS` of them.

    Attributes:
        runs: Oldest end first, at most `KEPT_RUNS`.
    """

    runs: tuple[PastRun, ...] = ()

    def with_run(self, run: PastRun) -> PipelineHistory:
        """Return the history with one more run; the oldest run is dropped at the limit."""
        runs = (*self.runs, run)
        if self.runs and run.ended_unix_nano < self.runs[-1].ended_unix_nano:
            runs = tuple(sorted(runs, key=lambda one: one.ended_unix_nano))
        return PipelineHistory(runs[-KEPT_RUNS:])

    @cached_property
    def succeeded(self) -> tuple[PastRun, ...]:
        """The runs that succeeded and were not too fast, oldest end first."""
        return tuple([run for run in self.runs if run.result == _SUCCESS and not run.too_fast])

    @cached_property
    def is_enough(self) -> bool:
        """Whether there are enough succeeded runs for limits."""
        return len(self.succeeded) >= ENOUGH_RUNS

    @cached_property
    def success_rate(self) -> float | None:
        """The share of runs that succeeded, 0 to 1, of those neither canceled nor skipped; None without such runs."""
        decided = [run.result == _SUCCESS for run in self.runs if run.result not in _UNDECIDED]
        return sum(decided) / len(decided) if decided else None

    @cached_property
    def durations_s(self) -> tuple[float, ...]:
        """The durations of the succeeded runs in seconds, shortest first."""
        return tuple(sorted([run.duration_s for run in self.succeeded]))

    @cached_property
    def p50_s(self) -> float | None:
        """The median duration in seconds; None without a succeeded run."""
        return _quantile(self.durations_s, 0.5)

    @cached_property
    def p95_s(self) -> float | None:
        """The 95th percentile of the duration in seconds; None without a succeeded run."""
        return _quantile(self.durations_s, 0.95)

    @cached_property
    def slow_after_s(self) -> float | None:
        """A run that takes more seconds is slow: p95 plus a tenth and a second."""
        return self.p95_s * _SLOW_FACTOR + _SLOW_S if self.is_enough and self.p95_s is not None else None

    @cached_property
    def fast_below_s(self) -> float | None:
        """A run that succeeds in fewer seconds is suspiciously fast: at most half of the 5th percentile."""
        least_s = _quantile(self.durations_s, _FAST_PART)
        return _fast_below_s(least_s) if self.is_enough and least_s is not None else None

    @cached_property
    def silent_after_s(self) -> float | None:
        """A run without a line for more seconds is silent: twice the longest usual pause, at least a minute."""
        return self._pause_limit_s([run.quiet_s for run in self.succeeded])

    @cached_property
    def heartbeat_after_s(self) -> float | None:
        """A run without a heartbeat for more seconds is silent; None for pipelines without heartbeats."""
        return self._pause_limit_s([run.heartbeat_gap_s for run in self.succeeded])

    @cached_property
    def last_start_unix_nano(self) -> int | None:
        """When the newest run started, in ns since the epoch; None if no run started."""
        return max((run.started_unix_nano for run in self.runs if run.started_unix_nano is not None), default=None)

    def is_too_fast(self, result: str, duration_s: float) -> bool:
        """Return whether a run succeeded suspiciously fast.

        Args:
            result: Its ``cicd.pipeline.result``.
            duration_s: How long it ran, in seconds.
        """
        if result != _SUCCESS:
            return False
        # As many runs that set no limit above this one as there may be below the percentile: no need to sort all.
        left = math.ceil(_FAST_PART * len(self.runs))
        for run in reversed(self.runs):
            if run.result == _SUCCESS and not run.too_fast and _fast_below_s(run.duration_s) <= duration_s:
                left -= 1
                if not left:
                    return False
        return self.fast_below_s is not None and duration_s < self.fast_below_s

    def _pause_limit_s(self, pauses_s: Sequence[float]) -> float | None:
        usual_s = _quantile(sorted(pauses_s), 0.95)
        if not self.is_enough or usual_s is None:
            return None
        return max(_LEAST_SILENCE_S, _SILENCE_FACTOR * usual_s)


def _fast_below_s(least_s: float) -> float:
    return min(least_s * _FAST_FACTOR, least_s - _FAST_S)


def _quantile(ordered: Sequence[float], part: float) -> float | None:
    """Return the nearest-rank quantile of sorted values: always one of the values."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


class Histories:
    """The histories of all pipelines with metrics of their own."""

    def __init__(self, runs: Iterable[PastRun] = ()) -> None:
        """Create the histories of stored runs, in any order."""
        self._histories: dict[str, PipelineHistory] = {}
        by_pipeline: dict[str, list[PastRun]] = {}
        for run in runs:
            by_pipeline.setdefault(run.pipeline, []).append(run)
        for pipeline, past in by_pipeline.items():
            past.sort(key=lambda one: one.ended_unix_nano)
            self._histories[pipeline] = PipelineHistory(tuple(past[-KEPT_RUNS:]))

    def add(self, run: PastRun) -> None:
        """Add a run that has ended; one of `OTHER_PIPELINES` is dropped."""
        if run.pipeline != OTHER_PIPELINES:
            self._histories[run.pipeline] = self.of(run.pipeline).with_run(run)

    def of(self, pipeline: str) -> PipelineHistory:
        """Return the history of a pipeline by its label; empty for one without an ended run."""
        return self._histories.get(pipeline, _NONE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._histories)


_NONE = PipelineHistory()
