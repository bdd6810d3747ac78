"""Live updates of a job's page: its newest lines and its head."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from tailspan.errors import CursorExpiredError, TailspanError
from tailspan.models import TaskRun
from tailspan_agent.web.event_stream import KEEP_ALIVE, REFRESH_S, format_event
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.job_view import JobView
from tailspan_agent.web.log_window import LogLine, LogWindow, LogWindowReader

__all__ = ["job_events", "job_paths", "read_tail"]

# The chart is up to 200 rows; all of its bars change with the time.
_CHART_S = 5.0

T = TypeVar("T")


def job_paths(job: JobView, task: str) -> Callable[..., str]:
    """Return what makes the paths of a job's page, which keep the task whose lines are shown."""
    return partial(job_path, job.service.name, job.status.job_id, **({"task": task} if task else {}))


async def read_tail(logs: LogWindowReader, job: JobView, task: str = "") -> LogWindow:
    """Return the end of a job's log, or all of a short log; of one task, if its id or name is given."""
    ledger = job.ledger
    return await logs.tail(
        job.service,
        job.status.job_id,
        known_lines=ledger.lines if ledger else 0,
        last_line_ns=ledger.last_line_ns if ledger else None,
        task=task,
    )


async def job_events(
    logs: LogWindowReader,
    job: JobView,
    reload: Callable[[], Awaitable[JobView]],
    render: Callable[..., str],
    *,
    banner: Callable[[], str],
    timeout_s: float,
    task: str = "",
) -> AsyncGenerator[str, None]:
    """Yield the changes of a job as events, until it has ended.

    If its service does not answer, or has lost the log, the next round tries again; other changes are still sent.

    Args:
        logs: Reads its log.
        job: Its last known data.
        reload: Loads its current data.
        render: Renders a template with values.
        banner: Renders the problems of the agent.
        timeout_s: Time limit for each answer of its service, in seconds.
        task: The id or name of the task whose lines are sent; empty: all lines.
    """
    path = job_paths(job, task)
    charts = _TaskCharts(render, task)
    window: LogWindow | None = None
    head = side = shown_banner = ""
    shown_open: list[LogLine] = []
    while True:
        job = await _within(timeout_s, reload()) or job
        is_reset, new = await _within(timeout_s, _new_lines(logs, job, window, task)) or (False, None)
        window = new or window
        new_head = render("_job_head.html", job=job)
        new_side = render("_job_side.html", job=job)
        if new is not None and (is_reset or new.lines):
            html = render("_lines.html", lines=new.lines, left_out=new.left_out, path=path)
            yield format_event("reset" if is_reset else "lines", {"html": html})
        # A line without its end has no task yet.
        open_lines = [] if task else await _within(timeout_s, logs.open_line(job.service, job.status.job_id)) or []
        if open_lines != shown_open:
            yield format_event("open_line", {"html": render("_lines.html", lines=open_lines, left_out=0, path=path)})
            shown_open = open_lines
        if chart := charts.changed(job):
            yield format_event("tasks", {"html": chart})
        if (new_banner := banner()) != shown_banner:
            yield format_event("banner", {"html": new_banner})
            shown_banner = new_banner
        if new_side != side:
            yield format_event("side", {"html": new_side})
            side = new_side
        if new_head != head:
            yield format_event("head", {"html": new_head, "ended": job.status.state.is_terminal})
            head = new_head
        elif new is None or not new.lines:
            yield KEEP_ALIVE
        if job.ended and (new is None or not new.lines):
            yield format_event("end", {})
            return
        await asyncio.sleep(REFRESH_S)


class _TaskCharts:
    """Renders a job's tasks when they have changed, and every few seconds while some are running."""

    def __init__(self, render: Callable[..., str], task: str) -> None:
        self._render = render
        self._task = task
        self._tasks: Sequence[TaskRun] = ()
        self._ended = False
        self._due_s = 0.0

    def changed(self, job: JobView) -> str:
        """Return the chart as HTML; empty if it is as it was."""
        ended = job.status.state.is_terminal
        is_same = job.tasks == self._tasks and ended == self._ended
        if (not job.tasks and job.times is None) or (is_same and (ended or time.monotonic() < self._due_s)):
            return ""
        self._tasks, self._ended, self._due_s = job.tasks, ended, time.monotonic() + _CHART_S
        return self._render("_tasks.html", chart=job.task_chart(self._task), task=self._task, job=job)


async def _new_lines(logs: LogWindowReader, job: JobView, seen: LogWindow | None, task: str) -> tuple[bool, LogWindow]:
    """Return the lines after a window; without one, or if the log was replaced, its end, and True for a reset."""
    if seen is not None and seen.cursor is not None:
        with contextlib.suppress(CursorExpiredError):
            return False, await logs.after(job.service, job.status.job_id, seen, task=task)
    tail = await read_tail(logs, job, task)
    return seen is None or bool(tail.lines), tail


async def _within(timeout_s: float, step: Awaitable[T]) -> T | None:
    """Return the result of a step; None if its service fails or does not answer in time."""
    with contextlib.suppress(TailspanError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await step
    return None
