"""The chart of a job's tasks: which attempts have rows, their words and bars, and what a large job costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.models import TASK_RESULTS, TaskRun
from tailspan_agent.job.times import unix_nano
from tailspan_agent.web.task_chart import MAX_TASK_ROWS, Extent, TaskChart, TaskRow, task_chart

START = datetime(2026, 11, 29, 10, tzinfo=UTC)
S = 1_000_000_000


def at(seconds: float | None) -> datetime | None:
    """Return a time after the start."""
    return None if seconds is None else START + timedelta(seconds=seconds)


def run(task_id: str, result: str | None, queued: float | None, start: float | None, end: float | None, **fields):
    """Return an attempt with times in seconds."""
    times = {"submitted_at": at(queued), "started_at": at(start), "finished_at": at(end)}
    return TaskRun(task_id=task_id, name=fields.pop("name", task_id), result=result, **times, **fields)


def chart(*tasks: TaskRun, end: float = 100, ended: bool = False, **fields) -> TaskChart:
    """Return the chart of a job that has run for a time, in seconds."""
    start_ns = unix_nano(START)
    assert start_ns is not None
    return task_chart(tasks, started_ns=start_ns, end_ns=start_ns + round(end * S), ended=ended, **fields)


def only(found: TaskChart) -> TaskRow:
    """Return the row of a chart with one row."""
    (row,) = found.rows
    return row


@pytest.mark.parametrize(
    ("task", "ended", "state", "queued", "executing", "seconds"),
    [
        (run("a", "success", 0, 10, 60), False, "succeeded", Extent(0, 100), Extent(100, 500), (10, 50)),
        (run("a", "failure", 0, 10, 60), True, "failed", Extent(0, 100), Extent(100, 500), (10, 50)),
        (run("a", "error", None, 10, 60), True, "failed", None, Extent(100, 500), (None, 50)),
        (run("a", "timeout", None, 10, 60), True, "timed out", None, Extent(100, 500), (None, 50)),
        (run("a", "cancellation", None, 10, 60), True, "canceled", None, Extent(100, 500), (None, 50)),
        (run("a", "a new word", None, 10, 60), True, "failed", None, Extent(100, 500), (None, 50)),
        (run("a", "skip", None, None, None), False, "skipped", None, None, (None, None)),
        (run("a", "skip", 5, None, 10), False, "skipped", None, None, (None, None)),
        (run("a", None, 20, 40, None), False, "running", Extent(200, 200), Extent(400, 600), (20, 60)),
        (run("a", None, 20, 40, None), True, "not ended", Extent(200, 200), Extent(400, 600), (20, 60)),
        (run("a", None, 20, None, None), False, "queued", Extent(200, 800), None, (80, None)),
        (run("a", None, None, None, None), False, "waiting", None, None, (None, None)),
        (run("a", None, None, None, None), True, "not run", None, None, (None, None)),
        # shorter than a pixel, at the end: visible, and within the chart
        (run("a", "success", None, 100, 100), True, "succeeded", None, Extent(997, 3), (None, 0)),
        # a service with wrong times
        (run("a", "success", None, 60, 10), True, "succeeded", None, Extent(600, 3), (None, 0)),
    ],
)
def test_an_attempt_has_a_state_and_bars(task, ended, state, queued, executing, seconds) -> None:
    """A bar without an end goes to the present; an unknown time has no bar."""
    row = only(chart(task, ended=ended))
    assert (row.state, row.queued, row.executing, (row.queued_s, row.took_s)) == (state, queued, executing, seconds)


def test_attempts_are_in_the_order_of_their_start_and_say_that_they_were_retried() -> None:
    """A failed attempt with a later one is not what failed; those on the critical path are marked."""
    found = chart(
        run("load", "success", 50, 60, 90, attempt=2, after=("extract",)),
        run("extract", "success", 0, 1, 20),
        run("load", "failure", 20, 30, 50, after=("extract",), error="disk full"),
        run("other", None, 2, 3, None),
    )
    assert [(row.task_id, row.attempt, row.state, row.critical) for row in found.rows] == [
        ("extract", 1, "succeeded", True),
        ("other", 1, "running", False),
        ("load", 1, "failed, retried", True),
        ("load", 2, "succeeded", True),
    ]
    assert [row.error for row in found.rows] == ["", "", "disk full", ""]
    assert (found.tasks, found.attempts, found.left_out, found.is_live) == (3, 4, 0, True)
    assert found.path.busy_s == 19 + 20 + 30


def test_a_task_has_a_short_name_and_its_id_where_the_name_is_not_its_own() -> None:
    """Mapped tasks share a name; a blank one cannot be clicked, and a URL that is a script is not a link."""
    found = chart(
        run("m[0]", "success", 0, 1, 2, name="m", url="https://example.test/1"),
        run("m[1]", "success", 1, 2, 3, name="m", url="javascript:alert(1)"),
        run("blank", "success", 2, 3, 4, name=" "),
        run("long", "success", 3, 4, 5, name="x" * 1000, error="y" * 1000),
    )
    assert [(row.name, row.shown_id, row.url) for row in found.rows[:3]] == [
        ("m", "m[0]", "https://example.test/1"),
        ("m", "m[1]", ""),
        ("blank", "", ""),
    ]
    assert found.rows[3].name.endswith("x…")
    assert len(found.rows[3].name) < 200
    assert len(found.rows[3].error) <= 200


def test_failed_critical_and_selected_attempts_have_rows_in_a_large_job() -> None:
    """Of thousands of attempts, those that a user looks for are shown, and the rest is counted."""
    tasks = [run(f"t{number}", "success", 0, number / 100, number / 100 + 1) for number in range(5000)]
    tasks[4000] = run("bad", "failure", 0, 40, 41)
    tasks[4001] = run("busy", None, 0, 40.01, None)
    tasks[4999] = run("last", "success", 0, 60, 90, after=("t4500",))
    found = chart(*tasks, selected="t3000")
    assert len(found.rows) == MAX_TASK_ROWS
    assert found.left_out == 5000 - MAX_TASK_ROWS
    ids = [row.task_id for row in found.rows]
    assert {"bad", "busy", "last", "t4500", "t3000"} <= set(ids)
    assert ids[0] == "t0"
    assert ids[-1] == "last"


def calls(work: Callable[[], object]) -> int:
    """Return how many functions a call calls: its cost, whatever the machine."""
    count = 0

    def counting(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "shape",
    [
        lambda number: {"after": (f"t{number - 1}",)},
        lambda number: {"after": tuple(f"t{earlier}" for earlier in range(max(0, number - 50), number))},
        lambda number: {"parent": f"t{number - 1}"},
        lambda _: {"parent": "t0", "after": ("t0",)},
        lambda number: {"after": (f"t{number + 1}",)},
    ],
    ids=["chain", "many edges", "nested", "one container", "backwards"],
)
def test_a_chart_costs_as_much_for_each_attempt_of_a_large_job(shape) -> None:
    """Twice as many attempts cost about twice as much, whatever their graph."""

    def tasks(count: int) -> list[TaskRun]:
        return [run(f"t{n}", "success", n, n + 1, n + 2, **shape(n)) for n in range(count)]

    small, large = tasks(300), tasks(600)
    assert calls(lambda: chart(*large)) < 2.6 * calls(lambda: chart(*small))


TIMES = st.one_of(st.none(), st.floats(0, 200))
ATTEMPTS = st.builds(
    run, st.sampled_from("abc"), st.sampled_from((None, *TASK_RESULTS)), TIMES, TIMES, TIMES, attempt=st.integers(1, 3)
)


@given(tasks=st.lists(ATTEMPTS, min_size=1, max_size=10, unique_by=lambda task: task.key), ended=st.booleans())
def test_no_bar_leaves_the_chart(tasks: list[TaskRun], ended: bool) -> None:
    """Whatever times a service has, bars are visible and within the axis, and each attempt has its row."""
    found = chart(*tasks, ended=ended)
    bars = [bar for row in found.rows for bar in (row.queued, row.executing) if bar is not None]
    assert all(bar.x >= 0 and bar.width >= 3 and bar.x + bar.width <= 1000.11 for bar in bars)
    assert {(row.task_id, row.attempt) for row in found.rows} == {task.key for task in tasks}
    starts = [row.started_ns for row in found.rows if row.started_ns is not None]
    assert starts == sorted(starts)


def test_the_spans_of_the_job_are_above_its_tasks() -> None:
    """A waterfall: the run, its time in the queue and its execution, to the present while it runs."""
    start_ns = unix_nano(START)
    assert start_ns is not None
    times = {"started_ns": start_ns + 20 * S, "end_ns": start_ns + 100 * S, "submitted_ns": start_ns}
    found = task_chart([run("a", "success", 30, 40, 60)], ended=False, **times)
    assert [(row.name, row.kind, row.extent, row.took_s, row.level) for row in found.spans] == [
        ("run", "running", Extent(0, 1000), 100, 0),
        ("queued", "queued", Extent(0, 200), 20, 1),
        ("executing", "running", Extent(200, 800), 80, 1),
    ]
    assert only(found).executing == Extent(400, 200)
    waiting = task_chart([], ended=False, **{**times, "started_ns": None})
    assert [(row.name, row.took_s) for row in waiting.spans] == [("run", 100), ("queued", 100)]


def test_a_task_lies_below_the_one_that_it_is_part_of() -> None:
    """Below the attempt that ran then; a circle of tasks, or a parent that is not known, loses no row."""
    found = chart(
        run("flow", "failure", None, 1, 20),
        run("flow", "success", None, 30, 90, attempt=2),
        run("inner", "failure", None, 2, 10, parent="flow"),
        run("inner", "success", None, 35, 40, attempt=2, parent="flow"),
        run("leaf", "success", None, 36, 37, parent="inner"),
        run("other", "success", None, 3, 5, parent="gone"),
        run("x", "success", None, 4, 5, parent="y"),
        run("y", "success", None, 4, 5, parent="x"),
        run("self", "success", None, 95, 96, parent="self"),
    )
    assert [(row.task_id, row.attempt, row.level) for row in found.rows] == [
        ("flow", 1, 0),
        ("inner", 1, 1),
        ("other", 1, 0),
        ("flow", 2, 0),
        ("inner", 2, 1),
        ("leaf", 1, 2),
        ("self", 1, 0),
        ("x", 1, 0),
        ("y", 1, 1),
    ]
