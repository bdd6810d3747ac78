"""When a job was submitted, started and ended; its run for the history of its pipeline. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import overload

import msgspec

from tailspan.models import JobStatus
from tailspan_agent.analysis.baseline import PastRun, PipelineHistory
from tailspan_agent.job.ledger import JobLedger

__all__ = ["SHORTEST_NS", "JobTimes", "past_run", "run_duration_s", "unix_nano"]

SHORTEST_NS = 1
"""The duration of the shortest span: Jaeger adds a warning to one without a duration."""
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


class JobTimes(msgspec.Struct, frozen=True):
    """The times of a job in ns since the epoch, in order: from the service, else from the ledger.

    The clocks of service, lines and agent differ: the times are extended so that each span contains its children and
    its lines.

    Attributes:
        submitted_ns: When it was submitted to its service.
        started_ns: When it started; None for a job that never started.
        finished_ns: When it ended.
    """

    submitted_ns: int
    started_ns: int | None
    finished_ns: int

    @classmethod
    def of(cls, job: JobStatus, ledger: JobLedger) -> JobTimes:
        """Return the times of a job from its last status and its ledger."""
        started = unix_nano(job.started_at)
        if ledger.first_line_ns is not None:
            started = ledger.first_line_ns if started is None else min(started, ledger.first_line_ns)
        submitted = ledger.first_seen_ns if job.submitted_at is None else unix_nano(job.submitted_at)
        if started is not None:
            submitted = min(submitted, started)
        finished = unix_nano(job.finished_at or job.job_status_date)
        if finished is None:
            finished = ledger.last_line_ns
        if finished is None:
            finished = next((ns for ns, state in ledger.states if state.is_terminal), ledger.first_seen_ns)
        return cls(submitted, started, max(finished, ledger.last_line_ns or 0, started or 0, submitted))


@overload
def unix_nano(time: datetime) -> int: ...
@overload
def unix_nano(time: datetime | None) -> int | None: ...
def unix_nano(time: datetime | None) -> int | None:
    """Return a time in ns since the epoch; None for None."""
    # Not a float: it cannot hold nanoseconds since the epoch.
    return None if time is None else (time - _EPOCH) // _MICROSECOND * 1000


def run_duration_s(job: JobStatus, ledger: JobLedger) -> float:
    """Return how long an ended job ran, in seconds, without the time in a queue.

    Args:
        job: The last status of the job.
        ledger: Its ledger: its lines are used if the service does not report its start and end.

    Returns:
        `JobStatus.duration` if known; 0 for a job that never started.
    """
    if job.duration is not None and job.finished_at is not None:
        return job.duration.total_seconds()
    times = JobTimes.of(job, ledger)
    return 0.0 if times.started_ns is None else (times.finished_ns - times.started_ns) / 1e9


def past_run(
    job: JobStatus, ledger: JobLedger, pipeline: str, history: PipelineHistory, *, now_unix_nano: int
) -> PastRun:
    """Return the run of an ended job for the history of its pipeline.

    A line may have any time; a run of the year 2200 would be the newest of its pipeline until then.

    Args:
        job: The last status of the job.
        ledger: Its ledger.
        pipeline: The label of its pipeline.
        history: The history before this run; it decides whether the run was too fast.
        now_unix_nano: The present, in ns since the epoch: no start or end is later.
    """
    times = JobTimes.of(job, ledger)
    duration_s = run_duration_s(job, ledger)
    result = job.state.result or "error"
    quiet_ns = ledger.quiet_ns
    if times.started_ns is not None:
        first_ns, last_ns = ledger.first_line_ns or times.finished_ns, ledger.last_line_ns or times.started_ns
        quiet_ns = max(quiet_ns, first_ns - times.started_ns, times.finished_ns - last_ns)
    return PastRun(
        pipeline=pipeline,
        job_id=job.job_id,
        identity=job.identity,
        trace_id=job.trace_id,
        result=result,
        started_unix_nano=None if times.started_ns is None else min(times.started_ns, now_unix_nano),
        ended_unix_nano=min(times.finished_ns, now_unix_nano),
        duration_s=duration_s,
        lines=ledger.lines,
        quiet_s=quiet_ns / 1e9,
        heartbeat_gap_s=ledger.heartbeat_gap_s,
        too_fast=history.is_too_fast(result, duration_s),
    )
