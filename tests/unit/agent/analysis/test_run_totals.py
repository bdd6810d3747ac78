"""Totals of ended runs: buckets, sums, exemplars, rows; and the limit of pipeline names."""

import json
import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, PipelineNames
from tailspan_agent.analysis.run_totals import (
    BOUNDS_S,
    COLUMNS,
    LOWEST_INDEX,
    MAX_ERROR_TYPES,
    OTHER_ERRORS,
    SCALE,
    RunTotals,
    bounded_error_type,
    bucket_index,
    with_bounded_error_types,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"

durations = st.floats(-10, 1e6) | st.floats(0, 2) | st.sampled_from(BOUNDS_S)
FIRST_BOUNDS_S = [2.0**power for power in range(15)]
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


@given(st.floats(2**-10, 2**25, exclude_min=True))
def test_an_exponential_bucket_contains_its_durations(duration_s):
    """The bucket is the one that OTLP defines for the scale, up to the rounding of its bounds."""
    base = 2 ** (2**-SCALE)
    index = bucket_index(duration_s)
    assert base**index * (1 - 1e-12) <= duration_s <= base ** (index + 1) * (1 + 1e-12)


def test_exponential_buckets_end_exactly_at_powers_of_two():
    """The explicit buckets are sums of exponential ones, so no rounding may move a run over a bound."""
    for bound_s in BOUNDS_S:
        below, above = bucket_index(bound_s), bucket_index(math.nextafter(bound_s, math.inf))
        assert above == below + 1
    assert bucket_index(0) == bucket_index(2**-10) == LOWEST_INDEX


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
        {"buckets": '{"scale": 2, "counts": {"1": 1}}'},
        {"buckets": '{"scale": 3, "counts": {"1": -1}}'},
        {"buckets": '{"scale": 3, "counts": {"9999": 1}}'},
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


first_buckets = st.lists(st.integers(0, 9), min_size=16, max_size=16)


@given(first_buckets, st.lists(st.booleans(), min_size=16, max_size=16), durations)
def test_a_row_of_an_earlier_agent_counts_on(counts, known, duration_s):
    """A count up to a bound of the earlier buckets is the same after the change, and grows with the next run."""
    lower = [0.0, *FIRST_BOUNDS_S]
    exemplars = [
        [TRACE, SPAN, lower[bucket] * 1.5 + 0.2, 7] if count and is_known else None
        for bucket, (count, is_known) in enumerate(zip(counts, known, strict=True))
    ]
    row = ("etl", "success", "", 3.5, json.dumps(counts), json.dumps(exemplars))
    before = RunTotals.from_row(row)
    assert (before.count, before.sum_s) == (sum(counts), 3.5)
    after = RunTotals.from_row(before.add(duration_s).to_row())
    for bound, upper_s in enumerate(FIRST_BOUNDS_S):
        place = BOUNDS_S.index(upper_s)
        assert sum(before.buckets[: place + 1]) == sum(counts[: bound + 1])
        assert sum(after.buckets[: place + 1]) == sum(counts[: bound + 1]) + (max(0, duration_s) <= upper_s)
    newest = [exemplar.duration_s for exemplar in before.exemplars if exemplar]
    assert newest == sorted(exemplar[2] for exemplar in exemplars if exemplar)


def test_a_short_run_of_an_earlier_agent_keeps_its_duration():
    """The newest run of a bucket says where in it the earlier runs were: 0.2 s is not 1 s."""
    exemplars = [[TRACE, SPAN, 0.2, 7], *[None] * 15]
    totals = RunTotals.from_row(("etl", "success", "", 8.0, json.dumps([40, *[0] * 15]), json.dumps(exemplars)))
    assert totals.buckets[BOUNDS_S.index(0.25)] == 40


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


def test_a_pipeline_has_a_limited_number_of_error_types():
    """The types come from logs; the first ones stay apart, also after the limit, and other pipelines have their own."""
    totals = [RunTotals("etl", "failure", f"E{number}").add(1) for number in range(MAX_ERROR_TYPES)]
    assert bounded_error_type("E3", "etl", totals) == "E3"
    assert bounded_error_type("New", "etl", totals) == OTHER_ERRORS
    assert bounded_error_type("New", "etl", totals[1:]) == "New"
    assert bounded_error_type("New", "other", totals) == "New"
    assert bounded_error_type(OTHER_ERRORS, "etl", totals) == OTHER_ERRORS


@given(st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.integers(0, 60)), max_size=80), st.randoms())
def test_stored_error_types_are_limited_when_they_are_exported(found, random):
    """No run is lost, keys are unique, and the order of the rows does not matter."""
    totals = [RunTotals(name, "failure", None if kind is None else f"E{kind}").add(1) for name, kind in found]
    bounded = with_bounded_error_types(totals)
    kinds = [(total.pipeline, total.error_type) for total in bounded if total.error_type is not None]
    assert len({total.key for total in bounded}) == len(bounded)
    assert all(sum(name == pipeline for name, _ in kinds) <= MAX_ERROR_TYPES + 1 for pipeline in "ab")
    assert sum(total.count for total in bounded) == len(found)
    random.shuffle(totals)
    assert {total.key: total.count for total in with_bounded_error_types(totals)} == {
        total.key: total.count for total in bounded
    }
