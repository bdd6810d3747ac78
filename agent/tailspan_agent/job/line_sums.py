"""What a job's log holds at its end that was never relayed. Pure.

A service that knows only times can let a line become visible later than any window looks back. So after a job's end
its log is read once more and compared, per second of source time, with the count and the sum of uids of the lines
that were relayed; what is missing is relayed late.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from itertools import islice

from tailspan.logs.page import DIGEST_BYTES, LogPage

__all__ = [
    "Seconds",
    "add_seconds",
    "missing_lines",
    "page_seconds",
    "page_uids",
    "page_uids_by_second",
    "select_lines",
]

_NANOS = 1_000_000_000
_MASK = (1 << 64) - 1

Seconds = dict[int, tuple[int, int]]
"""Second of source time to (count, sum of uids mod 2^64)."""


def page_uids(page: LogPage) -> tuple[int, ...]:
    """Return the uid of each line as a number; empty for pages of services with offsets."""
    return struct.unpack(f">{len(page.digests) // DIGEST_BYTES}Q", page.digests)


def page_seconds(page: LogPage) -> Seconds:
    """Return the sums of a page; empty for pages of services with offsets."""
    seconds: Seconds = {}
    uids = page_uids(page)
    position = 0
    for run in page.runs if uids else ():
        end = position + run.lines
        lines, uid_sum = seconds.get(run.time_unix_nano // _NANOS, (0, 0))
        seconds[run.time_unix_nano // _NANOS] = (lines + run.lines, uid_sum + sum(uids[position:end]) & _MASK)
        position = end
    return seconds


def page_uids_by_second(page: LogPage) -> Iterator[tuple[int, int]]:
    """Yield second of source time and uid of each line."""
    uids = iter(page_uids(page))
    for run in page.runs:
        for uid in islice(uids, run.lines):
            yield run.time_unix_nano // _NANOS, uid


def add_seconds(total: Seconds, more: Mapping[int, tuple[int, int]], sign: int = 1) -> None:
    """Add sums to a total, in place; with ``sign`` -1 take them away."""
    for second, (lines, uid_sum) in more.items():
        known_lines, known_sum = total.get(second, (0, 0))
        total[second] = (known_lines + sign * lines, known_sum + sign * uid_sum & _MASK)
        if total[second] == (0, 0):
            del total[second]


def missing_lines(uids: list[int], relayed_lines: int, relayed_sum: int) -> list[int]:
    """Return the indexes of the lines of one second that were not relayed.

    One or two missing lines are found exactly. Where the sums cannot tell which lines are missing, all lines of the
    second are returned: repeats carry the same uid, a lost line carries nothing.

    Args:
        uids: The uids of all lines of that second that the service has now, in its order.
        relayed_lines: How many lines of that second were relayed.
        relayed_sum: The sum of their uids mod 2^64.
    """
    missing = len(uids) - relayed_lines
    rest = sum(uids) - relayed_sum & _MASK
    if missing == 0 and rest == 0:
        return []
    if missing == 1 and rest in uids:
        return [uids.index(rest)]
    if missing == 2:
        positions = {uid: index for index, uid in enumerate(uids)}
        for index, uid in enumerate(uids):
            other = positions.get(rest - uid & _MASK, index)
            if other != index:
                return sorted((index, other))
    return list(range(len(uids)))


def select_lines(page: LogPage, keep: set[int]) -> LogPage | None:
    """Return the page with only the lines whose uid is kept, or None where there is none.

    Args:
        page: A page of a service that knows only times.
        keep: Uids of the lines to keep.

    Returns:
        A page whose lines have the same times, streams and uids as before; its cursor is the page's.
    """
    lines: list[bytes] = []
    digests: list[bytes] = []
    runs = []
    uids = page_uids(page)
    position = 0
    for run in page.runs:
        for index in range(run.lines):
            if uids[position] in keep:
                lines.append(page.lines[position])
                digests.append(page.digests[DIGEST_BYTES * position : DIGEST_BYTES * (position + 1)])
                runs.append(run._replace(lines=1, time_unix_nano=run.time_unix_nano + index))
            position += 1
    return LogPage(lines, runs, page.cursor, b"".join(digests)) if lines else None
