"""Reconciliation after the end of a job: which lines of the whole log were never relayed, and the last lines.

The last lines go into the failure digest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from tailspan.errors import CursorExpiredError
from tailspan.logs.clean import clean
from tailspan.logs.page import NANOS_PER_MS, LogPage
from tailspan.models import TaskRun
from tailspan_agent.analysis.failure import MAX_LINE_CHARS
from tailspan_agent.job.line_sums import (
    Seconds,
    add_seconds,
    missing_lines,
    page_seconds,
    page_uids_by_second,
    select_lines,
)
from tailspan_agent.job.task_spans import failed_task
from tailspan_agent.job.times import unix_nano
from tailspan_agent.pipeline.job_pipeline import JobPipeline

__all__ = ["last_lines", "relay_missing"]

_DIGEST_LINES = 400
_DIGEST_MS = 5000
_LINE_BYTES = 1 << 20


async def relay_missing(read: Callable[[], AsyncGenerator[LogPage, None]], pipeline: JobPipeline) -> int:
    """Compare the whole log with what was relayed, and relay lines that became visible after the late window.

    Args:
        read: Reads the log from its start.
        pipeline: The pipeline of the job.

    Returns:
        The number of lines relayed.
    """
    # Subtract while reading: a job may have lines in millions of seconds.
    rest = await pipeline.relayed_seconds()
    first_s = float("inf")
    async with aclosing(read()) as pages:
        async for page in pages:
            found = page_seconds(page)
            add_seconds(rest, found, -1)
            first_s = min((first_s, *found))
    # The service has deleted what is older than the first line that is left.
    uids: dict[int, list[int]] = {second: [] for second in rest if second >= first_s}
    if not uids:
        return 0
    async with aclosing(read()) as pages:
        async for page in pages:
            for second, uid in page_uids_by_second(page):
                if second in uids:
                    uids[second].append(uid)
    late: set[int] = set()
    repeated: Seconds = {}
    for second, found_uids in uids.items():
        relayed = {second: (len(found_uids), sum(found_uids))}
        add_seconds(relayed, {second: rest[second]})
        missing = missing_lines(found_uids, *relayed.get(second, (0, 0)))
        late.update(found_uids[index] for index in missing)
        if missing and len(missing) == len(found_uids) and second in relayed:
            repeated[second] = relayed[second]
    if not late:
        return 0
    async with aclosing(read()) as pages:
        async for page in pages:
            selected = select_lines(page, late)
            if selected is not None:
                await pipeline.send_page(selected, late=True)
    if repeated:
        await pipeline.discount_repeats(repeated)
    return len(late)


async def last_lines(read: Callable[..., AsyncGenerator[LogPage, None]], pipeline: JobPipeline) -> list[str]:
    """Return the job's last lines, for the failure digest: those of the task that failed, if there is one.

    Args:
        read: Reads the log from ``since_ms`` on.
        pipeline: The pipeline of the job.
    """
    lines: deque[str] = deque(maxlen=_DIGEST_LINES)
    task = failed_task(pipeline.job.tasks)
    newest_ns = pipeline.ledger.last_line_ns
    if task is not None:
        # An earlier process may have read its lines: then they are not long before its end.
        known, ended_ns = pipeline.job.task_lines.of(task), unix_nano(task.finished_at)
        newest_ns = known[1] if known is not None else newest_ns if ended_ns is None else ended_ns
    if newest_ns is not None:
        since_ms = newest_ns // NANOS_PER_MS - _DIGEST_MS
        # Relayed lines may be gone by now; the end of the job is reported all the same.
        with suppress(CursorExpiredError):
            async with aclosing(read(since_ms=since_ms)) as pages:
                async for page in pages:
                    kept = _lines_of(page, task)[-_DIGEST_LINES:]
                    lines.extend(_shown(line, pipeline.redact) for line in kept)
    return list(lines)


def _lines_of(page: LogPage, task: TaskRun | None) -> list[bytes]:
    """Return the lines of an attempt of a task, all lines for None; an empty one after each record of several lines.

    A service that knows the severity has records: the message of an exception ends with its record.
    """
    if task is None and not any(run.severity for run in page.runs):
        return page.lines
    kept: list[bytes] = []
    start = 0
    for run in page.runs:
        if task is None or (run.task and page.tasks[run.task - 1].key == task.key):
            kept += page.lines[start : start + run.lines]
            if run.severity and run.lines > 1:
                kept.append(b"")
        start += run.lines
    return kept


def _shown(line: bytes, redact: Callable[[str], str]) -> str:
    """Return a line cleaned, redacted and cut: hundreds of lines may have a megabyte each, and a character four bytes.

    It is cut after its redaction, so that no part of a secret is left. Of a line that is cut before, too, only what the
    first cut cannot have touched is kept.
    """
    text = redact(clean(line[:_LINE_BYTES]))
    return text[:MAX_LINE_CHARS] if len(line) <= _LINE_BYTES or len(text) > 2 * MAX_LINE_CHARS else ""
