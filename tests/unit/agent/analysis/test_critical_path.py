"""The critical path: from the attempt that ended last back to the first one that it waited for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.models import TASK_RESULTS, TaskRun
from tailspan_agent.analysis.critical_path import critical_path

START = datetime(2026, 11, 29, 10, tzinfo=UTC)


def run(task_id: str, start: float | None, end: float | None, *after: str, **fields) -> TaskRun:
    """Return an attempt that ran between two times, in seconds."""
    return TaskRun(
        task_id=task_id,
        name=fields.pop("name", task_id),
        result=fields.pop("result", None if end is None and start is not None else "success"),
        started_at=None if start is None else START + timedelta(seconds=start),
        finished_at=None if end is None else START + timedelta(seconds=end),
        after=after,
        **fields,
    )


@pytest.mark.parametrize(
    ("tasks", "path", "busy_s"),
    [
        ([], [], 0),
        ([run("a", 0, None)], [], 0),
        ([run("a", 0, 2), run("b", 0, 5), run("c", 6, 9, "a", "b")], ["b", "c"], 8),
        # nothing waited for the last one
        ([run("a", 0, 2), run("b", 0, 5)], ["b"], 5),
        # a retry waits for the attempt before it
        ([run("a", 0, 1), run("b", 1, 3, "a", result="failure"), run("b", 5, 6, "a", attempt=2)], ["a", "b", "b"], 4),
        # a task that still runs decides nothing yet
        ([run("a", 0, 1), run("b", 1, None, "a")], ["a"], 1),
        # what waited for a skipped task waited for what came before it
        ([run("a", 0, 4), run("b", None, None, "a", result="skip"), run("c", 5, 6, "b")], ["a", "c"], 5),
        # all instances of a mapped task, by its name
        (
            [run("m[0]", 0, 3, name="m"), run("m[1]", 0, 2, name="m"), run("c", 4, 5, "m")],
            ["m[0]", "c"],
            4,
        ),
        # a sub flow counts as its own tasks, which wait for what it waits for
        (
            [run("a", 0, 1), run("sub", 1, 8, "a"), run("x", 2, 7, parent="sub"), run("c", 9, 10, "sub")],
            ["a", "x", "c"],
            7,
        ),
        # an upstream task that was run again later is not what the last one waited for
        ([run("a", 0, 2), run("b", 3, 9, "a"), run("a", 4, 8, attempt=2)], ["a", "b"], 8),
        # the clocks of two machines differ
        ([run("a", 0, 4.5), run("b", 4, 9, "a")], ["a", "b"], 9),
    ],
)
def test_the_path_of_a_job(tasks: Sequence[TaskRun], path: Sequence[str], busy_s: float) -> None:
    """Each example has one path, and the time in which its attempts executed."""
    found = critical_path(tasks)
    assert [task.task_id for task in found.attempts] == path
    assert found.busy_s == busy_s


IDS = st.sampled_from("abcdef")
SECONDS = st.one_of(st.none(), st.integers(0, 30))


@st.composite
def attempts(draw: st.DrawFn) -> TaskRun:
    """Any attempt of a few tasks: also one that waits for itself, or ended before it started."""
    task = run(draw(IDS), draw(SECONDS), draw(SECONDS), *draw(st.lists(IDS, max_size=3)))
    return replace(
        task,
        attempt=draw(st.integers(1, 3)),
        result=draw(st.sampled_from((None, *TASK_RESULTS))),
        parent=draw(st.one_of(st.none(), IDS)),
    )


JOBS = st.lists(attempts(), max_size=12, unique_by=lambda task: task.key)


@given(tasks=JOBS)
def test_a_path_goes_forward_in_time_and_ends_with_the_last_attempt(tasks: list[TaskRun]) -> None:
    """No attempt is on it twice, and none of those on it ended after the next one."""
    path = critical_path(tasks).attempts
    ends = [task.finished_at for task in path]
    assert ends == sorted(ends)
    assert len({task.key for task in path}) == len(path)
    containers = {task.parent for task in tasks if task.ended and task.finished_at is not None}
    leaves = [task for task in tasks if task.ended and task.finished_at and task.task_id not in containers]
    assert max((task.finished_at for task in leaves), default=None) == (ends[-1] if ends else None)


@given(tasks=JOBS)
def test_the_time_on_a_path_is_within_the_time_of_the_job(tasks: list[TaskRun]) -> None:
    """Attempts that overlap count once."""
    path = critical_path(tasks)
    times = [time for task in path.attempts for time in (task.started_at, task.finished_at) if time is not None]
    whole = max(times) - min(times) if times else timedelta()
    assert 0 <= path.busy_s <= whole.total_seconds()


@given(tasks=JOBS, seed=st.randoms())
def test_each_step_is_the_predecessor_that_ended_last(tasks: list[TaskRun], seed) -> None:
    """Without containers: no other attempt that the next one waited for ended later and before its start."""
    tasks = [replace(task, parent=None) for task in tasks]
    seed.shuffle(tasks)
    path = critical_path(tasks).attempts
    for number, (step, following) in enumerate(itertools.pairwise(path)):
        later = path[number + 1 :]
        waited_for = [
            task
            for task in tasks
            if (task.task_id in following.after or task.key == (following.task_id, following.attempt - 1))
            and task.task_id != following.task_id
            and task.ended
            and task.finished_at is not None
            and task.finished_at <= min(following.started_at or following.finished_at, following.finished_at)
            and task not in later
        ]
        assert all(task.finished_at <= step.finished_at for task in waited_for)
