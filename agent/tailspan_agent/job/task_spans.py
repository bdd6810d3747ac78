"""The spans of a job's tasks: one for each attempt that has ended. Pure.

A task's span is a child of `executing`, or of the span of the task that it is part of; retries and tasks that it
waited for are links, since a span has one parent only.

Source: OpenTelemetry semantic conventions 1.44.0, CICD spans and attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from tailspan.logs.page import LogPage
from tailspan.models import TASK_RESULTS, JobState, JobStatus, TaskRun
from tailspan_agent.job.times import SHORTEST_NS, JobTimes, unix_nano
from tailspan_agent.otlp.span import SpanData, SpanEvent, SpanKind, SpanLink, StatusCode
from tailspan_agent.otlp.text import STORED_BYTES, shorten_middle
from tailspan_agent.otlp.wire import AttributeValue
from tailspan_agent.records.encode import span_id_of, task_run_id, task_span_id
from tailspan_agent.records.span_lines import TaskLines

__all__ = ["LineTimes", "TaskScene", "failed_task", "task_spans", "with_tasks"]

_MAX_LINKS = 64
_MAX_TASKS = 4096

_Attempts = Mapping[str, Sequence[TaskRun]]


class LineTimes:
    """The times of the first and the last line of each attempt of a task, as read by this process."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: dict[tuple[str, int], tuple[int, int]] = {}

    def add(self, page: LogPage) -> None:
        """Take in the lines of a page; of too many attempts, the later ones have no times."""
        if not page.tasks:
            return
        for run in page.runs:
            if not run.task:
                continue
            first_ns, last_ns = run.time_unix_nano, run.time_unix_nano + run.lines - 1
            task = page.tasks[run.task - 1].key
            known = self._times.get(task)
            if known is not None:
                self._times[task] = min(known[0], first_ns), max(known[1], last_ns)
            elif len(self._times) < _MAX_TASKS:
                self._times[task] = first_ns, last_ns

    def of(self, task: TaskRun) -> tuple[int, int] | None:
        """Return the times of an attempt's first and last line, in ns since the epoch; None without lines."""
        return self._times.get(task.key)


def with_tasks(times: JobTimes, tasks: Sequence[TaskRun]) -> JobTimes:
    """Return the times of a job, extended so that its spans contain those of its tasks."""
    if not tasks:
        return times
    starts = [ns for task in tasks if (ns := unix_nano(task.started_at)) is not None]
    ends = [ns for task in tasks if task.ended and (ns := unix_nano(task.finished_at)) is not None]
    started_ns = min((ns for ns in (times.started_ns, *starts) if ns is not None), default=None)
    submitted_ns = times.submitted_ns if started_ns is None else min(times.submitted_ns, started_ns)
    return JobTimes(submitted_ns, started_ns, max([times.finished_ns, *ends]))


def failed_task(tasks: Iterable[TaskRun]) -> TaskRun | None:
    """Return the attempt that made the job fail: of the tasks whose last attempt failed, the first to end."""
    last = {task.task_id: task for task in sorted(tasks, key=lambda one: one.attempt)}
    failed = [task for task in last.values() if task.failed]
    # A task that only contains others fails because of one of them.
    containers = {task.parent for task in failed}
    return min(
        (task for task in failed if task.task_id not in containers),
        key=lambda task: unix_nano(task.finished_at) or 0,
        default=None,
    )


class TaskScene(NamedTuple):
    """What the spans of attempts depend on besides the attempts.

    Attributes:
        times: The job's times: for attempts whose service has none.
        line_times: The times of the attempts' lines, which their spans contain.
        lines: Lines that the spans carry; None for none.
        written: Attempts whose spans are left out, by the task's id and number.
        job_ended: Whether the job has ended, and with it the attempts that its service still shows as running: what
            was killed may never report its end, and its lines refer to its span.
    """

    times: JobTimes
    line_times: LineTimes
    lines: TaskLines | None = None
    written: Container[tuple[str, int]] = ()
    job_ended: bool = False


def task_spans(job: JobStatus, tasks: Sequence[TaskRun], scene: TaskScene) -> list[SpanData]:
    """Return the span of each attempt that has ended, in the order of the tasks.

    Args:
        job: The job.
        tasks: Every attempt of its tasks.
        scene: What else the spans depend on.

    Returns:
        Spans; their ids depend on the job's identity, the task's id and the attempt only.
    """
    if scene.job_ended:
        tasks = [_closed(job, task, scene.times) for task in tasks]
    attempts: dict[str, list[TaskRun]] = {}
    for task in tasks:
        attempts.setdefault(task.task_id, []).append(task)
    return [_span(job, task, attempts, scene) for task in tasks if task.ended and task.key not in scene.written]


def _closed(job: JobStatus, task: TaskRun, times: JobTimes) -> TaskRun:
    """Return an attempt that has ended with its job at the latest; one that did not start stays as it is."""
    if task.ended or task.started_at is None:
        return task
    failed = job.state in (JobState.FAILED, JobState.TIMED_OUT, JobState.LOST)
    return dataclasses.replace(
        task,
        result="error" if failed else "cancellation",
        finished_at=max(task.started_at, datetime.fromtimestamp(times.finished_ns / 1e9, UTC)),
        error="did not end before its job" if failed else None,
    )


def _span(job: JobStatus, task: TaskRun, attempts: _Attempts, scene: TaskScene) -> SpanData:
    start_ns, end_ns = _times(task, attempts, scene.times, scene.line_times)
    lines, left_out = scene.lines.of(task.key) if scene.lines is not None else ((), None)
    result = task.result if task.result in TASK_RESULTS else "error"
    attributes: dict[str, AttributeValue | None] = {
        "cicd.pipeline.name": job.job_name or "unnamed",
        "cicd.pipeline.run.id": job.job_id,
        "cicd.pipeline.task.name": task.name,
        "cicd.pipeline.task.run.id": task_run_id(task.task_id, task.attempt),
        "cicd.pipeline.task.run.result": result,
        "cicd.pipeline.task.run.url.full": task.url,
        "error.type": result if task.failed else None,
        "process.exit.code": task.exit_code,
        "host.id": task.instance_id,
        "tailspan.task.id": task.task_id,
        "tailspan.task.attempt": task.attempt,
        "tailspan.task.queued_s": _queued_s(task),
        "tailspan.lines.left_out": left_out,
    }
    return SpanData(
        trace_id=job.trace_id,
        span_id=task_span_id(job, task.task_id, task.attempt),
        parent_span_id=_parent_id(job, task, attempts),
        name=task.name,
        kind=SpanKind.INTERNAL,
        start_unix_nano=start_ns,
        end_unix_nano=max(end_ns, start_ns + SHORTEST_NS),
        attributes={key: value for key, value in attributes.items() if value is not None},
        events=(*(line.event for line in lines), *_events(task, end_ns)),
        links=_links(job, task, attempts),
        status=StatusCode.ERROR if task.failed else StatusCode.UNSET,
        status_message=shorten_middle(task.error or result, STORED_BYTES) if task.failed else "",
    )


def _times(task: TaskRun, attempts: _Attempts, times: JobTimes, lines: LineTimes) -> tuple[int, int]:
    started_ns, finished_ns = unix_nano(task.started_at), unix_nano(task.finished_at)
    if started_ns is None and finished_ns is None:
        # A skipped task often has no times: it was decided on once those before it had ended.
        before = [unix_nano(one.finished_at) for earlier in task.after for one in attempts.get(earlier, ())]
        known = [ns for ns in (*before, unix_nano(task.submitted_at), times.started_ns) if ns is not None]
        started_ns = max(known, default=times.submitted_ns)
    start_ns = started_ns if started_ns is not None else (finished_ns or 0)
    end_ns = finished_ns if finished_ns is not None else start_ns
    first_ns, last_ns = lines.of(task) or (start_ns, end_ns)
    return max(0, min(start_ns, first_ns)), max(end_ns, last_ns)


def _queued_s(task: TaskRun) -> float | None:
    if task.submitted_at is None or task.started_at is None:
        return None
    return max(0.0, (task.started_at - task.submitted_at).total_seconds())


def _parent_id(job: JobStatus, task: TaskRun, attempts: _Attempts) -> str:
    parents = attempts.get(task.parent or "", ())
    if not parents or _is_within_itself(task, attempts):
        return span_id_of(job, "executing")
    start_ns = unix_nano(task.started_at) or unix_nano(task.submitted_at)
    began = [one for one in parents if start_ns is None or (unix_nano(one.started_at) or 0) <= start_ns]
    return task_span_id(job, parents[0].task_id, (began or parents)[-1].attempt)


def _is_within_itself(task: TaskRun, attempts: _Attempts) -> bool:
    """Return whether a task is part of itself: stores show no span of such a circle."""
    met: set[str] = set()
    above = task.parent
    while above and above in attempts and above not in met:
        if above == task.task_id:
            return True
        met.add(above)
        above = attempts[above][0].parent
    return False


def _links(job: JobStatus, task: TaskRun, attempts: _Attempts) -> tuple[SpanLink, ...]:
    """Return links to the attempt before, and to the last attempt of each task that it waited for."""
    linked = [(task.task_id, task.attempt - 1)] if task.attempt > 1 else []
    linked += [(one, attempts[one][-1].attempt) for one in task.after if one in attempts][:_MAX_LINKS]
    return tuple(SpanLink(trace_id=job.trace_id, span_id=task_span_id(job, *one)) for one in linked)


def _events(task: TaskRun, end_ns: int) -> tuple[SpanEvent, ...]:
    if not task.failed:
        return ()
    attributes: dict[str, AttributeValue] = {
        "exception.type": task.result or "error",
        "exception.message": shorten_middle(task.error or task.result or "error", STORED_BYTES),
    }
    return (SpanEvent(time_unix_nano=end_ns, name="exception", attributes=attributes),)
