"""Live updates of a job's page: its newest lines and its head."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from tailspan.errors import CursorExpiredError, TailspanError
from tailspan_agent.web.event_stream import KEEP_ALIVE, REFRESH_S, format_event
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.job_view import JobView
from tailspan_agent.web.log_window import LogLine, LogWindow, LogWindowReader

__all__ = ["job_events", "read_tail"]

T = TypeVar("T")


async def read_tail(logs: LogWindowReader, job: JobView) -> LogWindow:
    """Return the end of a job's log, or all of a short log."""
    ledger = job.ledger
    return await logs.tail(
        job.service,
        job.status.job_id,
        known_lines=ledger.lines if ledger else 0,
        last_line_ns=ledger.last_line_ns if ledger else None,
    )


async def job_events(
    logs: LogWindowReader,
    job: JobView,
    reload: Callable[[], Awaitable[JobView]],
    render: Callable[..., str],
    *,
    timeout_s: float,
) -> AsyncGenerator[str, None]:
    """Yield the changes of a job as events, until it has ended.

    If its service does not answer, or has lost the log, the next round tries again; other changes are still sent.

    Args:
        logs: Reads its log.
        job: Its last known data.
        reload: Loads its current data.
        render: Renders a template with values.
        timeout_s: Time limit for each answer of its service, in seconds.
    """
    path = partial(job_path, job.service.name, job.status.job_id)
    window: LogWindow | None = None
    head = ""
    shown_open: list[LogLine] = []
    while True:
        job = await _within(timeout_s, reload()) or job
        is_reset, new = await _within(timeout_s, _new_lines(logs, job, window)) or (False, None)
        window = new or window
        new_head = render("_job_head.html", job=job)
        if new is not None and (is_reset or new.lines):
            html = render("_lines.html", lines=new.lines, left_out=new.left_out, path=path)
            yield format_event("reset" if is_reset else "lines", {"html": html})
        open_lines = await _within(timeout_s, logs.open_line(job.service, job.status.job_id)) or []
        if open_lines != shown_open:
            yield format_event("open_line", {"html": render("_lines.html", lines=open_lines, left_out=0, path=path)})
            shown_open = open_lines
        if new_head != head:
            yield format_event("head", {"html": new_head, "ended": job.status.state.is_terminal})
            head = new_head
        elif new is None or not new.lines:
            yield KEEP_ALIVE
        if job.ended and (new is None or not new.lines):
            yield format_event("end", {})
            return
        await asyncio.sleep(REFRESH_S)


async def _new_lines(logs: LogWindowReader, job: JobView, seen: LogWindow | None) -> tuple[bool, LogWindow]:
    """Return the lines after a window; without one, or if the log was replaced, its end, and True for a reset."""
    if seen is not None and seen.cursor is not None:
        with contextlib.suppress(CursorExpiredError):
            return False, await logs.after(job.service, job.status.job_id, seen)
    tail = await read_tail(logs, job)
    return seen is None or bool(tail.lines), tail


async def _within(timeout_s: float, step: Awaitable[T]) -> T | None:
    """Return the result of a step; None if its service fails or does not answer in time."""
    with contextlib.suppress(TailspanError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await step
    return None
