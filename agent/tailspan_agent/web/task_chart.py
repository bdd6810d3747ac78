"""`TaskChart`: a job's trace as rows with bars: its own spans, and below them the attempts of its tasks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tailspan.models import TaskRun
from tailspan_agent.analysis.critical_path import CriticalPath, critical_path
from tailspan_agent.job.times import unix_nano

__all__ = ["MAX_TASK_ROWS", "Extent", "SpanRow", "TaskChart", "TaskRow", "task_chart"]

MAX_TASK_ROWS = 200
"""Maximum number of rows: a browser shows no more in one table that it updates."""

_WIDTH = 1000
_THINNEST = 3.0
_MAX_NAME_CHARS = 120
_MAX_ERROR_CHARS = 200
_MAX_LEVEL = 6
_STATES = {
    "success": ("succeeded", "succeeded"),
    "timeout": ("timed out", "timed_out"),
    "cancellation": ("canceled", "canceled"),
    "skip": ("skipped", "skipped"),
}


@dataclass(frozen=True, slots=True)
class Extent:
    """A bar's place on the time axis.

    Attributes:
        x: The left edge, 0 to 1000.
        width: In units of x.
    """

    x: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One attempt of a task.

    Attributes:
        task_id: The task.
        name: Its name, cut if it is very long; its id if the name is blank.
        shown_id: Its id where several tasks have this name, cut if it is very long; empty otherwise.
        attempt: From 1.
        state: How it is now, in words.
        kind: The class of its bar.
        queued: Its time in the queue on the axis, if known.
        executing: Its execution on the axis; None before it started.
        queued_s: Its time in the queue, in seconds.
        took_s: Its duration so far or in total, in seconds.
        started_ns: Start, in ns since the epoch.
        ended_ns: End, in ns since the epoch.
        critical: Whether it is on the critical path.
        error: Why it did not succeed, cut if it is long.
        url: Its page at the service; empty without one that a browser may open.
        level: How deep it lies within other tasks: 0 for a task of the job itself.
    """

    task_id: str
    name: str
    shown_id: str
    attempt: int
    state: str
    kind: str
    queued: Extent | None
    executing: Extent | None
    queued_s: float | None
    took_s: float | None
    started_ns: int | None
    ended_ns: int | None
    critical: bool
    error: str
    url: str
    level: int = 0


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A span of the job itself.

    Attributes:
        name: ``run``, ``queued`` or ``executing``.
        kind: The class of its bar.
        extent: Its place on the axis.
        took_s: Its duration so far or in total, in seconds.
        level: How deep it lies within other spans.
    """

    name: str
    kind: str
    extent: Extent
    took_s: float
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChart:
    """The attempts of a job's tasks.

    Attributes:
        spans: The spans of the job itself.
        rows: Each task below the one that it is part of, otherwise in the order of their start.
        attempts: Number of attempts, with those without a row.
        tasks: Number of tasks.
        start_ns: The left end of the axis, in ns since the epoch.
        end_ns: The right end of the axis, in ns since the epoch.
        path: The critical path.
        is_live: Whether an attempt has not ended, so that the chart changes with time.
    """

    spans: Sequence[SpanRow]
    rows: Sequence[TaskRow]
    attempts: int
    tasks: int
    start_ns: int
    end_ns: int
    path: CriticalPath
    is_live: bool

    @property
    def left_out(self) -> int:
        """Number of attempts without a row."""
        return self.attempts - len(self.rows)


def task_chart(
    tasks: Sequence[TaskRun],
    *,
    started_ns: int | None,
    end_ns: int,
    ended: bool,
    selected: str = "",
    submitted_ns: int | None = None,
    state: str = "running",
) -> TaskChart:
    """Return the chart of a job and its tasks.

    Args:
        tasks: Every attempt of the job's tasks.
        started_ns: The start of the job, in ns since the epoch.
        end_ns: The end of the job, or the present, in ns since the epoch.
        ended: Whether the job has ended, so that no attempt is running.
        selected: The id or name of a task whose attempts have rows in any case.
        submitted_ns: The submission of the job, in ns since the epoch; None shows no spans of the job itself.
        state: The class of the job's bars.
    """
    path = critical_path(tasks)
    scene = _Scene.of(tasks, path, selected, ended=ended)
    times = (time for task in tasks for time in (task.submitted_at, task.started_at, task.finished_at))
    known = [ns for time in times if (ns := unix_nano(time)) is not None]
    axis = _Axis(
        min((*known, *(ns for ns in (submitted_ns, started_ns) if ns is not None)), default=end_ns),
        max((*known, end_ns)),
        end_ns if ended else max((*known, end_ns)),
    )
    by_start = sorted(tasks, key=lambda task: _start_ns(task) or axis.end_ns)
    kept = {task.key for task in sorted(by_start, key=scene.rank)[:MAX_TASK_ROWS]}
    nested = _nested([task for task in by_start if task.key in kept][:MAX_TASK_ROWS])
    return TaskChart(
        spans=[] if submitted_ns is None else _span_rows(submitted_ns, started_ns, axis, state),
        rows=[_row(task, axis, scene, level) for task, level in nested],
        attempts=len(tasks),
        tasks=len(scene.last_attempts),
        start_ns=axis.start_ns,
        end_ns=axis.end_ns,
        path=path,
        is_live=not ended and any(not task.ended for task in tasks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """What the row of an attempt depends on besides itself: the other attempts, the job and the shown task."""

    critical: Collection[tuple[str, int]]
    last_attempts: Mapping[str, int]
    ids: Mapping[str, int]
    selected: str
    ended: bool

    @classmethod
    def of(cls, tasks: Sequence[TaskRun], path: CriticalPath, selected: str, *, ended: bool) -> _Scene:
        """Return the scene of all attempts."""
        last: dict[str, int] = {}
        for task in tasks:
            last[task.task_id] = max(task.attempt, last.get(task.task_id, 0))
        ids = Counter(name for _, name in {(task.task_id, task.name) for task in tasks})
        return cls(
            critical={task.key for task in path.attempts}, last_attempts=last, ids=ids, selected=selected, ended=ended
        )

    def is_last(self, task: TaskRun) -> bool:
        """Return whether the task has no later attempt."""
        return task.attempt == self.last_attempts[task.task_id]

    def rank(self, task: TaskRun) -> int:
        """Return how soon an attempt gets one of the rows: 0 first."""
        if self.selected and self.selected in (task.task_id, task.name):
            return 0
        if task.failed and self.is_last(task):
            return 1
        if task.key in self.critical:
            return 2
        if not task.ended and task.started_at is not None:
            return 3
        return 4 if task.failed else 5


@dataclass(frozen=True, slots=True)
class _Axis:
    """The time axis: its ends, and where bars without an end stop, in ns since the epoch."""

    start_ns: int
    end_ns: int
    open_ns: int

    def extent(self, start_ns: int, end_ns: int) -> Extent:
        """Return the place of a bar; a short one is still visible and does not leave the chart."""
        whole = max(1, self.end_ns - self.start_ns)
        width = min(_WIDTH, max(_THINNEST, _WIDTH * (end_ns - start_ns) / whole))
        x = min(_WIDTH * (start_ns - self.start_ns) / whole, _WIDTH - width)
        return Extent(round(max(0.0, x), 1), round(width, 1))


def _start_ns(task: TaskRun) -> int | None:
    return unix_nano(task.started_at or task.submitted_at or task.finished_at)


def _span_rows(submitted_ns: int, started_ns: int | None, axis: _Axis, state: str) -> list[SpanRow]:
    parts = [("run", state, submitted_ns, axis.open_ns, 0)]
    queued_until_ns = axis.open_ns if started_ns is None else started_ns
    if queued_until_ns > submitted_ns:
        parts.append(("queued", "queued", submitted_ns, queued_until_ns, 1))
    if started_ns is not None:
        parts.append(("executing", state, started_ns, axis.open_ns, 1))
    return [
        SpanRow(name, kind, axis.extent(start_ns, end_ns), max(0.0, (end_ns - start_ns) / 1e9), level)
        for name, kind, start_ns, end_ns, level in parts
    ]


def _nested(tasks: Sequence[TaskRun]) -> list[tuple[TaskRun, int]]:
    """Return attempts below the one that they are part of, each with its level."""
    attempts: dict[str, list[TaskRun]] = {}
    for task in tasks:
        attempts.setdefault(task.task_id, []).append(task)
    children: dict[tuple[str, int], list[TaskRun]] = {}
    waiting: list[tuple[TaskRun, int]] = []
    for task in tasks:
        parents = attempts.get(task.parent or "", ())
        begun = [one for one in parents if (_start_ns(one) or 0) <= (_start_ns(task) or 0)]
        if parents and task.parent != task.task_id:
            children.setdefault((begun or parents)[-1].key, []).append(task)
        else:
            waiting.append((task, 0))
    waiting.reverse()
    found, seen = [], set()
    # A circle of tasks has no start: its tasks come last, as if each were of the job itself.
    circle = list(reversed(tasks))
    while waiting or circle:
        task, level = waiting.pop() if waiting else (circle.pop(), 0)
        if task.key not in seen:
            seen.add(task.key)
            found.append((task, min(level, _MAX_LEVEL)))
            waiting += [(child, level + 1) for child in reversed(children.get(task.key, ()))]
    return found


def _row(task: TaskRun, axis: _Axis, scene: _Scene, level: int = 0) -> TaskRow:
    submitted_ns, started_ns = unix_nano(task.submitted_at), unix_nano(task.started_at)
    ended_ns = unix_nano(task.finished_at) if task.ended else None
    state, kind = _state(task, ended=scene.ended, is_last=scene.is_last(task))
    queued = executing = queued_s = took_s = None
    if submitted_ns is not None and (started_ns or not task.ended):
        until_ns = max(submitted_ns, axis.open_ns if started_ns is None else started_ns)
        queued, queued_s = axis.extent(submitted_ns, until_ns), (until_ns - submitted_ns) / 1e9
    if started_ns is not None:
        until_ns = max(started_ns, axis.open_ns if ended_ns is None else ended_ns)
        executing, took_s = axis.extent(started_ns, until_ns), (until_ns - started_ns) / 1e9
    return TaskRow(
        task_id=task.task_id,
        name=_cut(task.name if task.name.strip() else task.task_id, _MAX_NAME_CHARS),
        shown_id=_cut(task.task_id, _MAX_NAME_CHARS) if scene.ids[task.name] > 1 else "",
        attempt=task.attempt,
        state=state,
        kind=kind,
        queued=queued,
        executing=executing,
        queued_s=queued_s,
        took_s=took_s,
        started_ns=started_ns,
        ended_ns=ended_ns,
        critical=task.key in scene.critical,
        error=_cut(task.error or "", _MAX_ERROR_CHARS),
        # A URL from outside must not be a script (javascript:).
        level=level,
        url=task.url if task.url and task.url.startswith(("http://", "https://")) else "",
    )


def _state(task: TaskRun, *, ended: bool, is_last: bool) -> tuple[str, str]:
    """Return the state of an attempt in words, and the class of its bar."""
    if task.result is not None:
        state, kind = _STATES.get(task.result, ("failed", "failed"))
        return (state, kind) if is_last or not task.failed else (f"{state}, retried", "retried")
    if task.started_at is not None:
        return ("not ended", "canceled") if ended else ("running", "running")
    if ended:
        return "not run", "skipped"
    return "queued" if task.submitted_at is not None else "waiting", "pending"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
