"""A job's live updates: its newest lines and its head, for as long as somebody looks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from tailspan.errors import CursorExpiredError, TailspanError
from tailspan_agent.web.event_stream import ALIVE, REFRESH_S, event
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.job_view import JobView
from tailspan_agent.web.log_window import LogReader, Window

__all__ = ["follow_job", "tail_of"]

T = TypeVar("T")


async def tail_of(logs: LogReader, view: JobView) -> Window:
    """Return the end of a job's log, or all of a short one."""
    ledger = view.ledger
    return await logs.tail(
        view.service,
        view.status.job_id,
        known_lines=ledger.lines if ledger else 0,
        last_line_ns=ledger.last_line_ns if ledger else None,
    )


async def follow_job(
    logs: LogReader,
    view: JobView,
    look: Callable[[], Awaitable[JobView]],
    render: Callable[..., str],
    *,
    timeout_s: float,
) -> AsyncGenerator[str, None]:
    """Yield what happens to a job as events, until it has ended.

    A service that does not answer, or has lost the log, is asked again: what can be told without it is told.

    Args:
        logs: Reads its log.
        view: How it was.
        look: Looks at it again.
        render: Renders a template with values.
        timeout_s: How long its service has for each answer, in seconds.
    """
    path = partial(job_path, view.service.name, view.status.job_id)
    window: Window | None = None
    head = ""
    while True:
        view = await _within(timeout_s, look()) or view
        is_new, found = await _within(timeout_s, _news(logs, view, window)) or (False, None)
        window = found or window
        new_head = render("_job_head.html", view=view)
        if found is not None and (is_new or found.lines):
            html = render("_lines.html", lines=found.lines, left_out=found.left_out, path=path)
            yield event("reset" if is_new else "lines", {"html": html})
        if new_head != head:
            yield event("head", {"html": new_head, "ended": view.status.state.is_terminal})
            head = new_head
        elif found is None or not found.lines:
            yield ALIVE
        if view.ended and (found is None or not found.lines):
            yield event("end", {})
            return
        await asyncio.sleep(REFRESH_S)


async def _news(logs: LogReader, view: JobView, seen: Window | None) -> tuple[bool, Window]:
    """Return what came after what was seen, or the end of a log of which nothing was: then it is new."""
    if seen is not None and seen.cursor is not None:
        with contextlib.suppress(CursorExpiredError):
            return False, await logs.after(view.service, view.status.job_id, seen)
    found = await tail_of(logs, view)
    return seen is None or bool(found.lines), found


async def _within(timeout_s: float, step: Awaitable[T]) -> T | None:
    """Return what a step gives; None where its service cannot give it now."""
    with contextlib.suppress(TailspanError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await step
    return None
