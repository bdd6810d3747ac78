"""`StartCounts`: the numbers at the top of the start page, which say what is wrong now. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tailspan_agent.web.job_filter import STATE_GROUPS, JobEntry

__all__ = ["StartCounts", "job_counts"]

_DAY_NS = 86_400_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCounts:
    """What is wrong now, and how much runs.

    Attributes:
        failed: Number of jobs that failed in the last 24 hours.
        running: Number of jobs that run.
        late: Number of jobs that run for longer than is usual.
        missing: Pipelines that did not start in time.
        silent: Number of jobs that have been silent for longer than is usual.
        troubles: Number of problems of the agent.
    """

    failed: int
    running: int
    late: int
    missing: Sequence[str]
    silent: int
    troubles: int


def job_counts(entries: Iterable[JobEntry], *, missing: Sequence[str], troubles: int, now_ns: int) -> StartCounts:
    """Return the counts of all jobs.

    Args:
        entries: All jobs.
        missing: Pipelines that did not start in time.
        troubles: Number of problems of the agent.
        now_ns: The present time, in ns since the epoch.
    """
    since_ns, failed, running, late, silent = now_ns - _DAY_NS, 0, 0, 0, 0
    for entry in entries:
        if entry.state.is_terminal:
            failed += entry.when_ns >= since_ns and entry.state in STATE_GROUPS["failed"]
        else:
            running += entry.state in STATE_GROUPS["running"]
            late += "slow" in entry.alerts
            silent += "silent" in entry.alerts
    return StartCounts(failed=failed, running=running, late=late, missing=missing, silent=silent, troubles=troubles)
