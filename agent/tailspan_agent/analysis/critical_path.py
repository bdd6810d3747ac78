"""The critical path of a job with tasks: the chain of attempts that decided when the job ended. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from tailspan.models import TaskRun

__all__ = ["CriticalPath", "critical_path"]

# Deeper nesting is not followed: a damaged answer may nest ten thousand levels.
_MAX_LEVELS = 16
# Clocks of two machines differ, and some services have whole seconds only.
_SKEW = timedelta(seconds=1)

_Ends = dict[str, list[tuple[datetime, int]]]


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """A chain of attempts, each the one that the next one waited for last.

    Attributes:
        attempts: Oldest first; the last one ended last of all. Empty until an attempt has ended.
        busy_s: How long at least one of them was executing, in seconds; the rest is waiting between them.
    """

    attempts: Sequence[TaskRun] = ()
    busy_s: float = 0.0


def critical_path(tasks: Sequence[TaskRun]) -> CriticalPath:
    """Return the critical path of a job's attempts, as far as they have ended.

    It goes back from the attempt that ended last. Before an attempt comes, of the attempt before it and the tasks that
    it waited for, the one that ended last. Of a task that contains others, such as a sub flow, these others count; and
    a task without any `after` waited for what the task that contains it waited for.

    Args:
        tasks: Every attempt of the job's tasks, in any order.
    """
    graph = _Graph(tasks)
    chain = []
    step = graph.last()
    seen: set[int] = set()
    while step is not None:
        seen.add(step)
        chain.append(tasks[step])
        step = graph.before(step, seen)
    chain.reverse()
    return CriticalPath(chain, _busy_s(chain))


class _Graph:
    """The attempts by what they waited for. Positions are those in the list of attempts."""

    def __init__(self, tasks: Sequence[TaskRun]) -> None:
        self._tasks = tasks
        timed = [(task.finished_at, n) for n, task in enumerate(tasks) if task.ended and task.finished_at is not None]
        self._parents = {task.task_id: task.parent for task in tasks if task.parent}
        self._after = {task.task_id: task.after for task in tasks if task.after}
        containers = {tasks[n].parent for _, n in timed}
        self._timed = sorted(one for one in timed if tasks[one[1]].task_id not in containers)
        self._places = {tasks[n].key: (end, n) for end, n in self._timed}
        # In the order of their ends, by the id of the task, of each task that contains it, and by name: for what waits
        # for all instances of a mapped task, Airflow has only the name that they share.
        self._ends: _Ends = {}
        by_name: _Ends = {}
        for end, n in self._timed:
            for task_id in (tasks[n].task_id, *self._above(tasks[n].task_id)):
                self._ends.setdefault(task_id, []).append((end, n))
            by_name.setdefault(tasks[n].name, []).append((end, n))
        known = {task.task_id for task in tasks}
        self._ends |= {name: ends for name, ends in by_name.items() if name not in known}

    def last(self) -> int | None:
        """Return the attempt that ended last; None before one has ended."""
        return self._timed[-1][1] if self._timed else None

    def before(self, step: int, seen: set[int]) -> int | None:
        """Return the attempt that an attempt waited for last; None if it waited for none that is not seen."""
        task = self._tasks[step]
        end = self._places[task.key][0]
        previous = self._places.get((task.task_id, task.attempt - 1))
        found = [previous] if previous is not None and previous[0] <= end and previous[1] not in seen else []
        for task_id in (task.task_id, *self._above(task.task_id)):
            after = (task_id == task.task_id and task.after) or self._after.get(task_id, ())
            found += self._upstream(after, task.started_at or end, end, seen)
            if found:
                return max(found)[1]
        return None

    def _upstream(
        self, after: Sequence[str], start: datetime, end: datetime, seen: set[int]
    ) -> Iterator[tuple[datetime, int]]:
        """Yield, of each task that an attempt waited for, the last attempt before its start, else before its end."""
        waiting, met = list(after), set[str]()
        while waiting:
            upstream = waiting.pop()
            if upstream in met:
                continue
            met.add(upstream)
            ends = self._ends.get(upstream, ())
            for limit in (min(end, start + _SKEW), end):
                place = bisect.bisect_right(ends, (limit, len(self._tasks))) - 1
                while place >= 0 and ends[place][1] in seen:
                    place -= 1
                if place >= 0:
                    yield ends[place]
                    break
            if not ends:
                # A skipped task often has no times: what came before it counts.
                waiting += self._after.get(upstream, ())

    def _above(self, task_id: str) -> Iterator[str]:
        """Yield the tasks that contain a task, the innermost first."""
        met = {task_id}
        parent = self._parents.get(task_id)
        while parent is not None and parent not in met and len(met) <= _MAX_LEVELS:
            yield parent
            met.add(parent)
            parent = self._parents.get(parent)


def _busy_s(chain: Iterable[TaskRun]) -> float:
    busy = timedelta()
    covered: datetime | None = None
    for task in chain:
        if task.finished_at is None:
            continue
        start = task.started_at or task.finished_at
        start = start if covered is None else max(start, covered)
        busy += max(timedelta(), task.finished_at - start)
        covered = task.finished_at if covered is None else max(covered, task.finished_at)
    return busy.total_seconds()
