"""Sums of uids per second: find the lines of an ended job that were never relayed. Pure.

A service that has only times can make a line visible after any window of re-reads. So after a job's end its log is
read once more, and for each second of source time compared with the number of relayed lines and the sum of their
uids; missing lines are relayed late.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from itertools import groupby, islice

from tailspan._native import compiled
from tailspan.logs.page import DIGEST_BYTES, LineRun, LogPage
from tailspan_agent.otlp.wire import UINT64_MAX

__all__ = [
    "Seconds",
    "add_seconds",
    "missing_lines",
    "page_seconds",
    "page_uids",
    "page_uids_by_second",
    "select_lines",
    "sum_digests",
    "sum_digests_in_python",
]

_NANOS = 1_000_000_000

Seconds = dict[int, tuple[int, int]]
"""Second of source time to (number of lines, sum of their uids mod 2^64)."""


def _uids(digests: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(digests) // DIGEST_BYTES}Q", digests)


def sum_digests_in_python(digests: bytes, /) -> int:
    """Return the sum of uids mod 2^64.

    Args:
        digests: The uids, 8 bytes each.
    """
    return sum(_uids(digests)) & UINT64_MAX


sum_digests = compiled("sum_digests", sum_digests_in_python)


def page_uids(page: LogPage) -> tuple[int, ...]:
    """Return the uid of each line as a number; empty if the service has offsets."""
    return _uids(page.digests)


def page_seconds(page: LogPage) -> Seconds:
    """Return the sums of a page; empty if the service has offsets."""
    seconds: Seconds = {}
    start = 0
    for second, runs in groupby(page.runs if page.digests else (), _second):
        lines = sum([run.lines for run in runs])
        end = start + lines
        known_lines, known_sum = seconds.get(second, (0, 0))
        uid_sum = known_sum + sum_digests(page.digests[DIGEST_BYTES * start : DIGEST_BYTES * end])
        seconds[second] = known_lines + lines, uid_sum & UINT64_MAX
        start = end
    return seconds


def _second(run: LineRun) -> int:
    return run.time_unix_nano // _NANOS


def page_uids_by_second(page: LogPage) -> Iterator[tuple[int, int]]:
    """Yield the second of source time and the uid of each line."""
    uids = iter(page_uids(page))
    for run in page.runs:
        for uid in islice(uids, run.lines):
            yield run.time_unix_nano // _NANOS, uid


def add_seconds(total: Seconds, more: Mapping[int, tuple[int, int]], sign: int = 1) -> None:
    """Add sums to a total, in place; with a `sign` of -1, subtract them."""
    for second, (lines, uid_sum) in more.items():
        known_lines, known_sum = total.get(second, (0, 0))
        total[second] = (known_lines + sign * lines, known_sum + sign * uid_sum & UINT64_MAX)
        if total[second] == (0, 0):
            del total[second]


def missing_lines(uids: list[int], relayed_lines: int, relayed_sum: int) -> list[int]:
    """Return the indexes of the lines of one second that were not relayed.

    One or two missing lines are found exactly. If the sums do not identify the missing lines, all lines of the second
    are returned: a repeated line has the same uid, so a store can drop it; a lost line cannot be restored.

    Args:
        uids: The uids of all lines of that second that the service has now, in its order.
        relayed_lines: Number of relayed lines of that second.
        relayed_sum: The sum of their uids mod 2^64.
    """
    missing = len(uids) - relayed_lines
    rest = sum(uids) - relayed_sum & UINT64_MAX
    if missing == 0 and rest == 0:
        return []
    if missing == 1 and rest in uids:
        return [uids.index(rest)]
    if missing == 2:
        positions = {uid: index for index, uid in enumerate(uids)}
        for index, uid in enumerate(uids):
            other = positions.get(rest - uid & UINT64_MAX, index)
            if other != index:
                return sorted((index, other))
    return list(range(len(uids)))


def select_lines(page: LogPage, keep: set[int]) -> LogPage | None:
    """Return the page with only the lines that have one of these uids; None if there are none.

    Args:
        page: A page of a service that has only times.
        keep: The uids.

    Returns:
        A page whose lines keep their times, streams, tasks and uids; its cursor is the page's.
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
    return LogPage(lines, runs, page.cursor, b"".join(digests), tasks=page.tasks) if lines else None
