"""Totals of ended runs: counts and durations by pipeline, result and error type. Pure.

The checkpoint store has one row for each `RunTotals` and replaces it in the transaction that writes the run span. So
the totals survive restarts, include runs that ended while the agent was down, and count each run once.

Durations are counted in fine exponential buckets, eight for each power of two. The bounds of the explicit buckets are
powers of two, so both kinds of histogram come from the same counts, and neither loses a run when the other is chosen.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from math import frexp, isfinite
from typing import Any

import msgspec
from msgspec.structs import astuple, replace

__all__ = [
    "BOUNDS_S",
    "COLUMNS",
    "LOWEST_INDEX",
    "MAX_ERROR_TYPES",
    "OTHER_ERRORS",
    "SCALE",
    "RunExemplar",
    "RunTotals",
    "bounded_error_type",
    "bucket_index",
    "explicit_bucket",
    "with_bounded_error_types",
]

BOUNDS_S: tuple[float, ...] = tuple(2.0**power for power in range(-4, 20))
"""Upper bounds of the explicit buckets in seconds, 1/16 to 524288 (6 days); one more bucket is above the last."""

SCALE = 3
"""Scale of the exponential buckets: bucket `i` has the durations in (2**(i / 2**SCALE), 2**((i + 1) / 2**SCALE)]."""

_HEX_32, _HEX_16 = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{16}")
_PER_OCTAVE = 1 << SCALE
_FRACTIONS = tuple(2.0 ** (step / _PER_OCTAVE - 1) for step in range(1, _PER_OCTAVE + 1))
LOWEST_INDEX = -10 * _PER_OCTAVE - 1
"""The bucket that ends at 1/1024 s; it also has all shorter durations."""
_HIGHEST_INDEX = 25 * _PER_OCTAVE - 1  # ends after 388 days; has all longer durations

MAX_ERROR_TYPES = 20
"""How many error types of a pipeline are counted apart: they come from logs, and each is a series of its own."""

OTHER_ERRORS = "_OTHER"
"""The ``error.type`` of all further ones. Source: OpenTelemetry semantic conventions, error attributes."""

COLUMNS = ("pipeline", "result", "error_type", "sum_s", "buckets", "exemplars")
"""The columns of `RunTotals.to_row`; the first three are the key."""

_FIRST_BOUNDS_S = tuple(2.0**power for power in range(15))
"""The bounds of rows that an agent before exponential buckets wrote, 1 to 16384 s."""


class RunExemplar(msgspec.Struct, frozen=True):
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


def bucket_index(duration_s: float) -> int:
    """Return the exponential bucket of a duration. Exact at powers of two, where a logarithm would round."""
    if duration_s <= 0:
        return LOWEST_INDEX
    fraction, exponent = frexp(duration_s)
    if fraction == 0.5:  # a power of two belongs to the bucket below it
        fraction, exponent = 1.0, exponent - 1
    index = (exponent - 1) * _PER_OCTAVE + bisect_left(_FRACTIONS, fraction)
    return min(max(index, LOWEST_INDEX), _HIGHEST_INDEX)


def explicit_bucket(index: int) -> int:
    """Return the bucket of `BOUNDS_S` that contains an exponential bucket."""
    return bisect_left(BOUNDS_S, 2.0 ** (index // _PER_OCTAVE + 1))


class RunTotals(msgspec.Struct, frozen=True):
    """All ended runs of one pipeline with one result and error type, since the store was created.

    Attributes:
        pipeline: The label of the pipeline, from `PipelineNames.label`.
        result: The ``cicd.pipeline.result``.
        error_type: The ``error.type``; None for runs without one.
        sum_s: The sum of all durations in seconds.
        counts: Number of runs by exponential bucket, see `bucket_index`.
        exemplars: The newest run with a trace in each bucket of `BOUNDS_S`; the last bucket is above all bounds.
        task: The name of the task whose attempts are counted in place of runs; empty for runs.
    """

    pipeline: str
    result: str
    error_type: str | None = None
    sum_s: float = 0.0
    counts: Mapping[int, int] = msgspec.field(default_factory=dict)
    exemplars: tuple[RunExemplar | None, ...] = (None,) * (len(BOUNDS_S) + 1)
    task: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The row's key: pipeline, result, error type (empty for none)."""
        return self.pipeline, self.result, self.error_type or ""

    @property
    def count(self) -> int:
        """Number of runs."""
        return sum(self.counts.values())

    @property
    def buckets(self) -> tuple[int, ...]:
        """Number of runs in each bucket of `BOUNDS_S`; the last bucket is above all bounds."""
        buckets = [0] * (len(BOUNDS_S) + 1)
        for index, count in self.counts.items():
            buckets[explicit_bucket(index)] += count
        return tuple(buckets)

    def add(self, duration_s: float, *, trace_id: str = "", span_id: str = "", time_unix_nano: int = 0) -> RunTotals:
        """Return the totals with one more run.

        Args:
            duration_s: How long it ran, in seconds. A negative value (the clock was set back) counts as 0.
            trace_id: 32 hexadecimal digits; without both ids, the run is no exemplar.
            span_id: The run span, 16 hexadecimal digits.
            time_unix_nano: When it ended, in ns since the epoch.
        """
        duration_s = max(0.0, duration_s)
        index = bucket_index(duration_s)
        exemplars = self.exemplars
        if trace_id and span_id:
            exemplars = _with_newest(exemplars, [RunExemplar(trace_id, span_id, duration_s, time_unix_nano)])
        counts = {**self.counts, index: self.counts.get(index, 0) + 1}
        return replace(self, sum_s=self.sum_s + duration_s, counts=counts, exemplars=exemplars)

    def without_exemplars_after(self, latest_unix_nano: int) -> RunTotals:
        """Return the totals without exemplars of a later time, in ns since the epoch: no newer run replaces them."""
        kept = tuple(
            run if run is not None and run.time_unix_nano <= latest_unix_nano else None for run in self.exemplars
        )
        return self if kept == self.exemplars else replace(self, exemplars=kept)

    def merge(self, other: RunTotals) -> RunTotals:
        """Return the sum of both totals, with the key of this one."""
        counts = dict(self.counts)
        for index, count in other.counts.items():
            counts[index] = counts.get(index, 0) + count
        exemplars = list(self.exemplars)
        for bucket, run in enumerate(other.exemplars):
            if run is not None:
                exemplars[bucket] = _newer(exemplars[bucket], run)
        return replace(self, sum_s=self.sum_s + other.sum_s, counts=counts, exemplars=tuple(exemplars))

    def to_row(self) -> tuple[str, str, str, float, str, str]:
        """Return the values of `COLUMNS`: text and numbers, buckets and exemplars as JSON."""
        exemplars = [astuple(exemplar) for exemplar in self.exemplars if exemplar]
        buckets = {"scale": SCALE, "counts": {str(index): self.counts[index] for index in sorted(self.counts)}}
        return *self.key, self.sum_s, json.dumps(buckets), json.dumps(exemplars)

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> RunTotals:
        """Return the totals of a row with the values of `COLUMNS`, also of a row of an earlier agent.

        Raises:
            ValueError: The row does not come from `to_row`.
        """
        try:
            pipeline, result, error_type, sum_s, buckets, exemplars = row
            found = [values and RunExemplar(*values) for values in json.loads(exemplars)]
            counts = _counts(json.loads(buckets), found)
            newest = _newest(run for run in found if run is not None and _is_possible(run))
            seconds = float(sum_s)
            if not isfinite(seconds):
                raise ValueError(f"the sum of durations is {seconds}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a row of run totals: {error}") from error
        return cls(pipeline, result, error_type or None, seconds, counts, newest)


def bounded_error_type(kind: str, pipeline: str, totals: Iterable[RunTotals]) -> str:
    """Return the error type under which a run is counted: its own, or `OTHER_ERRORS` once the pipeline has enough.

    Args:
        kind: The ``error.type`` of the run.
        pipeline: The label of its pipeline.
        totals: What was counted so far.
    """
    known = {total.error_type for total in totals if total.pipeline == pipeline} - {None, OTHER_ERRORS}
    return kind if kind in known or len(known) < MAX_ERROR_TYPES else OTHER_ERRORS


def with_bounded_error_types(totals: Iterable[RunTotals]) -> list[RunTotals]:
    """Return totals with at most `MAX_ERROR_TYPES` error types for each pipeline, and `OTHER_ERRORS`.

    An earlier agent may have stored more, and several pipelines may share a label. The first by name stay, so that a
    restart keeps the same ones.

    Args:
        totals: All totals; those with equal keys are added up.
    """
    totals = list(totals)
    known: dict[str, set[str]] = {}
    for total in totals:
        if total.error_type is not None and total.error_type != OTHER_ERRORS:
            known.setdefault(total.pipeline, set()).add(total.error_type)
    kept = {pipeline: set(sorted(kinds)[:MAX_ERROR_TYPES]) for pipeline, kinds in known.items()}
    merged: dict[tuple[str, str, str], RunTotals] = {}
    for total in totals:
        if total.error_type is not None and total.error_type not in kept.get(total.pipeline, ()):
            total = replace(total, error_type=OTHER_ERRORS)
        found = merged.get(total.key)
        merged[total.key] = found.merge(total) if found else total
    return list(merged.values())


def _is_possible(run: RunExemplar) -> bool:
    """Return whether OTLP can encode an exemplar: one that it cannot must not stop the metrics of all pipelines."""
    return (
        _HEX_32.fullmatch(run.trace_id) is not None
        and _HEX_16.fullmatch(run.span_id) is not None
        and isfinite(run.duration_s)
        and isinstance(run.time_unix_nano, int)
        and 0 <= run.time_unix_nano < 1 << 63
    )


def _counts(stored: Any, exemplars: Sequence[RunExemplar | None]) -> dict[int, int]:
    """Return the counts by exponential bucket of a row.

    Raises:
        ValueError: One of the columns is damaged.
    """
    if isinstance(stored, list):
        return _counts_of_first_bounds([int(count) for count in stored], exemplars)
    if None in exemplars:
        raise ValueError("an exemplar is missing")
    if stored["scale"] != SCALE:
        raise ValueError(f"scale {stored['scale']} instead of {SCALE}")
    counts = {int(index): int(count) for index, count in stored["counts"].items()}
    if any(not 0 <= count < 1 << 53 or not LOWEST_INDEX <= index <= _HIGHEST_INDEX for index, count in counts.items()):
        raise ValueError("a bucket or a count is out of range")
    return counts


def _counts_of_first_bounds(stored: Sequence[int], exemplars: Sequence[RunExemplar | None]) -> dict[int, int]:
    """Return the counts of a row with the bounds 1, 2, 4 ... 16384 s.

    Within its bucket, the newest run stands for the others. So no run leaves its bucket: a cumulative count up to one
    of these bounds is the same before and after the change.
    """
    if not len(stored) == len(exemplars) == len(_FIRST_BOUNDS_S) + 1:
        raise ValueError(f"{len(stored)} buckets instead of {len(_FIRST_BOUNDS_S) + 1}")
    counts: dict[int, int] = {}
    for bucket, (count, exemplar) in enumerate(zip(stored, exemplars, strict=True)):
        if count:
            index = (bucket - 1) * _PER_OCTAVE + _PER_OCTAVE // 2
            if exemplar and bisect_left(_FIRST_BOUNDS_S, exemplar.duration_s) == bucket:
                index = bucket_index(exemplar.duration_s)
            counts[index] = counts.get(index, 0) + count
    return counts


def _newest(runs: Iterable[RunExemplar | None]) -> tuple[RunExemplar | None, ...]:
    """Return the newest run in each bucket of `BOUNDS_S`; None for a bucket without one."""
    return _with_newest((None,) * (len(BOUNDS_S) + 1), runs)


def _with_newest(
    known_runs: Iterable[RunExemplar | None], runs: Iterable[RunExemplar | None]
) -> tuple[RunExemplar | None, ...]:
    """Return the newest run in each bucket, of those that are known by bucket and others in any order."""
    newest = list(known_runs)
    for run in runs:
        if run is not None:
            bucket = explicit_bucket(bucket_index(run.duration_s))
            newest[bucket] = _newer(newest[bucket], run)
    return tuple(newest)


def _newer(known: RunExemplar | None, run: RunExemplar) -> RunExemplar:
    return run if known is None or run.time_unix_nano > known.time_unix_nano else known
