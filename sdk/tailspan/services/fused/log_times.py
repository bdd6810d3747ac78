"""The times of a log's first and last line, from a service that only returns the lines since a time.

Pure: the caller makes the requests. A log of any length takes about ten probes of a few thousand lines, instead of
the whole log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

__all__ = ["Probe", "find_times"]

_FIRST_STEP_MS = 2_000
_STEP_GROWTH = 8


class Probe(NamedTuple):
    """The result of reading some of the lines at or after a time.

    Attributes:
        first_ms: Time of the oldest of these lines; -1 without lines.
        last_ms: Time of the newest of these lines; -1 without lines.
        whole: Whether these are all lines at or after that time.
    """

    first_ms: int
    last_ms: int
    whole: bool


async def find_times(
    probe: Callable[[int | None], Awaitable[Probe]],
    read_newest_ms: Callable[[int], Awaitable[int]],
    *,
    end_ms: int,
    now_ms: int,
) -> tuple[int, int] | None:
    """Return the times of the first and the last line in ms, or None without lines.

    The result does not depend on the clocks; wrong clocks only cost more requests. In a long log that is out of order,
    the oldest line may be older than the first.

    Args:
        probe: Reads the first lines at or after a time (None: from the start).
        read_newest_ms: Reads all lines at or after a time and returns the time of the newest; -1 without lines.
        end_ms: When the job ended, as far as known; the last line should be near.
        now_ms: The present moment; lines after it are unlikely.
    """
    begin = await probe(None)
    if begin.whole:
        return None if begin.last_ms < 0 else (begin.first_ms, begin.last_ms)
    # There is a line at `low_ms`; no line is known at or after `high_ms`.
    low_ms, high_ms = begin.last_ms, max(now_ms, end_ms)
    step_ms = _FIRST_STEP_MS
    while high_ms - low_ms > 1:
        since_ms = (low_ms + high_ms) // 2
        if step_ms and end_ms - step_ms > low_ms:
            since_ms = end_ms - step_ms
        found = await probe(since_ms)
        if found.last_ms < 0:
            high_ms = since_ms
            step_ms *= _STEP_GROWTH
        elif found.whole:
            return begin.first_ms, max(low_ms, found.last_ms)
        else:
            low_ms = max(low_ms, found.last_ms)
            step_ms = 0
    return begin.first_ms, max(low_ms, await read_newest_ms(low_ms))
