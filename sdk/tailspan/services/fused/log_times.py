"""When a log begins and ends, of a service that can only be asked for the lines since a time. Pure but for the asking.

A log of any length costs some ten looks at a few thousand lines each, instead of the whole log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

__all__ = ["Look", "find_times"]

_FIRST_STEP_MS = 2_000
_STEP_GROWTH = 8


class Look(NamedTuple):
    """What some of the lines at or after a time tell.

    Attributes:
        first_ms: Time of the oldest of them; -1 without lines.
        last_ms: Time of the newest of them; -1 without lines.
        whole: Whether these are all.
    """

    first_ms: int
    last_ms: int
    whole: bool


async def find_times(
    look: Callable[[int | None], Awaitable[Look]],
    read_newest_ms: Callable[[int], Awaitable[int]],
    *,
    end_ms: int,
    now_ms: int,
) -> tuple[int, int] | None:
    """Return the times of the first and the last line in ms, or None without lines.

    Whatever the clocks say, the answer is right; how wrong they are decides how much is read. Only of a long log that
    is out of order, the oldest line may be older than the first.

    Args:
        look: Looks at the first lines at or after a time (None: of all).
        read_newest_ms: Reads all lines at or after a time, and returns the time of the newest; -1 without lines.
        end_ms: When the job ended as far as known, which is where the last line should be.
        now_ms: The present moment; lines after it are unlikely.
    """
    begin = await look(None)
    if begin.whole:
        return None if begin.last_ms < 0 else (begin.first_ms, begin.last_ms)
    # There is a line at `low_ms`, and as far as known there is none at or after `high_ms`.
    low_ms, high_ms = begin.last_ms, max(now_ms, end_ms)
    step_ms = _FIRST_STEP_MS
    while high_ms - low_ms > 1:
        since_ms = (low_ms + high_ms) // 2
        if step_ms and end_ms - step_ms > low_ms:
            since_ms = end_ms - step_ms
        found = await look(since_ms)
        if found.last_ms < 0:
            high_ms = since_ms
            step_ms *= _STEP_GROWTH
        elif found.whole:
            return begin.first_ms, max(low_ms, found.last_ms)
        else:
            low_ms = max(low_ms, found.last_ms)
            step_ms = 0
    return begin.first_ms, max(low_ms, await read_newest_ms(low_ms))
