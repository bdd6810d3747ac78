"""Totals of ended runs: buckets, sums, exemplars, rows; and the limit of pipeline names."""

import json
import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, PipelineNames
from tailspan_agent.analysis.run_totals import BOUNDS_S, COLUMNS, RunTotals

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"

durations = st.floats(-10, 1e6) | st.sampled_from(BOUNDS_S)
runs = st.lists(st.tuples(durations, st.sampled_from(["", TRACE, TRACE[::-1]]), st.integers(0, 2**63 - 1)), max_size=20)


def total(values) -> RunTotals:
    """Add runs up one by one."""
    return reduce(
        lambda sofar, run: sofar.add(run[0], trace_id=run[1], span_id=SPAN, time_unix_nano=run[2]),
        values,
        RunTotals("etl", "success"),
    )


@given(durations)
def test_one_run_falls_into_the_bucket_whose_upper_bound_holds_it(duration_s):
    """A bound belongs to the bucket below it, as in OTLP and Prometheus."""
    totals = RunTotals("etl", "success").add(duration_s)
    bucket = totals.buckets.index(1)
    lower = BOUNDS_S[bucket - 1] if bucket else -math.inf
    upper = BOUNDS_S[bucket] if bucket < len(BOUNDS_S) else math.inf
    assert lower < max(0.0, duration_s) <= upper
    assert totals.count == 1


@given(runs)
def test_counts_and_sums_are_those_of_the_runs(values):
    """No run is lost or counted twice; a negative duration counts as 0."""
    totals = total(values)
    assert totals.count == len(values)
    assert totals.sum_s == pytest.approx(sum(max(0.0, run[0]) for run in values))


@given(runs, runs)
def test_merging_is_adding_all(one, other):
    """Merged totals are the totals of all runs."""
    merged, added = total(one).merge(total(other)), total(one + other)
    assert merged.buckets == added.buckets
    assert merged.sum_s == pytest.approx(added.sum_s)
    assert [e and e.time_unix_nano for e in merged.exemplars] == [e and e.time_unix_nano for e in added.exemplars]


@given(runs)
def test_each_bucket_keeps_its_newest_run_with_a_trace(values):
    """An exemplar is in its own bucket, and no later run of that bucket is missed."""
    for bucket, exemplar in enumerate(total(values).exemplars):
        of_bucket = [run for run in values if run[1] and total([run]).buckets[bucket]]
        assert (exemplar is None) == (not of_bucket)
        if exemplar:
            assert exemplar.time_unix_nano == max(run[2] for run in of_bucket)
            assert total([(exemplar.duration_s, "", 0)]).buckets[bucket] == 1


@given(runs, st.text(), st.none() | st.text(min_size=1))
def test_a_row_brings_back_the_same_totals(values, name, error_type):
    """A row has everything, in types that SQLite has."""
    totals = RunTotals(name, "failure", error_type).merge(total(values))
    row = totals.to_row()
    assert RunTotals.from_row(row) == totals
    assert len(row) == len(COLUMNS)
    assert {type(value) for value in row} <= {str, float}
    assert row[:3] == totals.key


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": "[1, 2]"},
        {"buckets": "not json"},
        {"buckets": '{"a": 1}'},
        {"buckets": "3"},
        {"exemplars": "[null]"},
        {"exemplars": json.dumps([[1]] * 16)},
        {"sum_s": "many"},
    ],
)
def test_a_damaged_row_is_an_error(change):
    """A damaged row is an error, not a wrong number."""
    row = {**dict(zip(COLUMNS, total([(3.0, TRACE, 1)]).to_row(), strict=True)), **change}
    with pytest.raises(ValueError, match="run totals"):
        RunTotals.from_row(list(row.values()))


def test_names_above_the_limit_share_one_label():
    """The first names keep their labels; further names share one, also when they come again."""
    names = PipelineNames(2, ["a"])
    assert [names.label(name) for name in ("b", "c", "a", "d", "c", "b")] == [
        "b",
        OTHER_PIPELINES,
        "a",
        OTHER_PIPELINES,
        OTHER_PIPELINES,
        "b",
    ]
    assert names.used == ("a", "b", OTHER_PIPELINES)


def test_find_registers_nothing():
    """`find` returns the label that `label` would, but leaves the place to a pipeline that runs."""
    names = PipelineNames(1)
    assert (names.find("seen"), names.used) == ("seen", ())
    assert names.label("a") == names.find("a") == "a"
    assert (names.find("seen"), names.find("b\ud800"), names.used) == (OTHER_PIPELINES, OTHER_PIPELINES, ("a",))


@given(st.lists(st.text(max_size=3), max_size=50), st.integers(1, 5))
def test_a_label_never_changes(seen, limit):
    """One name always has the same label, or a counter would jump between series."""
    names = PipelineNames(limit)
    first = [names.label(name) for name in seen]
    assert [names.label(name) for name in seen] == first
    assert len(names.used) <= limit + 1


def test_a_name_without_utf8_gets_a_label_that_has_it():
    """A lone surrogate, which JSON can carry, does not reach the encoders."""
    assert PipelineNames(5).label("a\ud800") == "a?"
