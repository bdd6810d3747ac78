"""The final read: a job's whole log is read once more, and what was never relayed of it is relayed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from tailspan.page import LogPage
from tailspan_agent.final_read import (
    Seconds,
    add_seconds,
    missing_lines,
    page_seconds,
    page_uids_by_second,
    select_lines,
)
from tailspan_agent.job_relay import JobRelay

__all__ = ["relay_missing"]


async def relay_missing(read: Callable[[], AsyncGenerator[LogPage, None]], sent: JobRelay) -> int:
    """Compare the whole log with what was relayed, and relay what became visible too late for any window.

    Args:
        read: Reads the log from its start.
        sent: The job.

    Returns:
        How many lines were relayed.
    """
    relayed = sent.relayed_seconds()
    found: Seconds = {}
    async with aclosing(read()) as pages:
        async for page in pages:
            add_seconds(found, page_seconds(page))
    differing = {second for second, sums in found.items() if sums != relayed.get(second, (0, 0))}
    if not differing:
        return 0
    uids: dict[int, list[int]] = {second: [] for second in differing}
    async with aclosing(read()) as pages:
        async for page in pages:
            for second, uid in page_uids_by_second(page):
                if second in uids:
                    uids[second].append(uid)
    late: set[int] = set()
    repeated: Seconds = {}
    for second, found_uids in uids.items():
        missing = missing_lines(found_uids, *relayed.get(second, (0, 0)))
        late.update(found_uids[index] for index in missing)
        if len(missing) == len(found_uids) and second in relayed:
            repeated[second] = relayed[second]
    async with aclosing(read()) as pages:
        async for page in pages:
            selected = select_lines(page, late)
            if selected is not None:
                await sent.send_page(selected, late=True)
    if repeated:
        await sent.take_back(repeated)
    return len(late)
