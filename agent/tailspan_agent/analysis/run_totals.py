"""Totals of ended runs: counts and durations by pipeline, result and error type. Pure.

The checkpoint store has one row for each `RunTotals` and replaces it in the transaction that writes the run span. So
the totals survive restarts, include runs that ended while the agent was down, and count each run once.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

__all__ = ["BOUNDS_S", "COLUMNS", "RunExemplar", "RunTotals"]

BOUNDS_S: tuple[float, ...] = tuple(float(2**power) for power in range(15))
"""Upper bounds of the duration buckets in seconds, 1 to 16384; one more bucket is above the last."""

COLUMNS = ("pipeline", "result", "error_type", "sum_s", "buckets", "exemplars")
"""The columns of `RunTotals.to_row`; the first three are the key."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunExemplar:
    """A run as the example of its bucket.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: The run span, 16 hexadecimal digits.
        duration_s: How long it ran, in seconds.
        time_unix_nano: When it ended, in ns since the epoch.
    """

    trace_id: str
    span_id: str
    duration_s: float
    time_unix_nano: int


@dataclasses.dataclass(frozen=True, slots=True)
class RunTotals:
    """All ended runs of one pipeline with one result and error type, since the store was created.

    Attributes:
        pipeline: The label of the pipeline, from `PipelineNames.label`.
        result: The ``cicd.pipeline.result``.
        error_type: The ``error.type``; None for runs without one.
        sum_s: The sum of all durations in seconds.
        buckets: Number of runs in each bucket of `BOUNDS_S`; the last bucket is above all bounds.
        exemplars: The newest run with a trace in each bucket.
    """

    pipeline: str
    result: str
    error_type: str | None = None
    sum_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    exemplars: tuple[RunExemplar | None, ...] = (None,) * (len(BOUNDS_S) + 1)

    @property
    def key(self) -> tuple[str, str, str]:
        """The row's key: pipeline, result, error type (empty for none)."""
        return self.pipeline, self.result, self.error_type or ""

    @property
    def count(self) -> int:
        """Number of runs."""
        return sum(self.buckets)

    def add(self, duration_s: float, *, trace_id: str = "", span_id: str = "", time_unix_nano: int = 0) -> RunTotals:
        """Return the totals with one more run.

        Args:
            duration_s: How long it ran, in seconds. A negative value (the clock was set back) counts as 0.
            trace_id: 32 hexadecimal digits; without both ids, the run is no exemplar.
            span_id: The run span, 16 hexadecimal digits.
            time_unix_nano: When it ended, in ns since the epoch.
        """
        duration_s = max(0.0, duration_s)
        bucket = bisect_left(BOUNDS_S, duration_s)
        buckets = tuple(count + (index == bucket) for index, count in enumerate(self.buckets))
        exemplars = list(self.exemplars)
        if trace_id and span_id:
            exemplars[bucket] = _newer(exemplars[bucket], RunExemplar(trace_id, span_id, duration_s, time_unix_nano))
        return dataclasses.replace(self, sum_s=self.sum_s + duration_s, buckets=buckets, exemplars=tuple(exemplars))

    def merge(self, other: RunTotals) -> RunTotals:
        """Return the sum of both totals, with the key of this one."""
        return dataclasses.replace(
            self,
            sum_s=self.sum_s + other.sum_s,
            buckets=tuple(map(operator.add, self.buckets, other.buckets)),
            exemplars=tuple(map(_newer, self.exemplars, other.exemplars)),
        )

    def to_row(self) -> tuple[str, str, str, float, str, str]:
        """Return the values of `COLUMNS`: text and numbers, buckets and exemplars as JSON."""
        exemplars = [exemplar and dataclasses.astuple(exemplar) for exemplar in self.exemplars]
        return *self.key, self.sum_s, json.dumps(self.buckets), json.dumps(exemplars)

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> RunTotals:
        """Return the totals of a row with the values of `COLUMNS`.

        Raises:
            ValueError: The row does not come from `to_row`.
        """
        try:
            pipeline, result, error_type, sum_s, buckets, exemplars = row
            counts = tuple(int(count) for count in json.loads(buckets))
            found = tuple(values and RunExemplar(*values) for values in json.loads(exemplars))
            seconds = float(sum_s)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a row of run totals: {error}") from error
        if not len(counts) == len(found) == len(BOUNDS_S) + 1:
            raise ValueError(f"not a row of run totals: {len(counts)} buckets instead of {len(BOUNDS_S) + 1}")
        return cls(pipeline, result, error_type or None, seconds, counts, found)


def _newer(one: RunExemplar | None, other: RunExemplar | None) -> RunExemplar | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda exemplar: exemplar.time_unix_nano)
