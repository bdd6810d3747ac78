"""`Assessment`: progress, time left and anomalies of a running job: silent, slow.

Pure, and cheap enough to be computed for each followed job at each scrape. The metrics, the log and the page use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from tailspan._plural import plural
from tailspan.config import Expect
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan_agent.analysis.baseline import Histories, PipelineHistory
from tailspan_agent.analysis.progress import Progress

__all__ = [
    "MAX_TASKS",
    "Assessment",
    "JobSnapshot",
    "PipelineStats",
    "assess",
    "is_unassessable",
    "last_starts",
    "missing_pipelines",
]


_FULL_BAR_NS = 10_000_000_000
MAX_TASKS = 1 << 53
"""Largest task count in metrics: a service may report any number, OTLP has 64 bits and a chart has floats."""


# Not frozen: that takes three times as long, and each scrape creates thousands.
@dataclass(slots=True, kw_only=True)
class JobSnapshot:
    """A followed job at one moment.

    Attributes:
        service: The configured name of its service.
        status: Its newest status.
        first_line_unix_nano: The time of its first line, in ns since the epoch; None without lines.
        last_line_unix_nano: The time of its newest line, in ns since the epoch; None without lines.
        progress: The last progress in its log, if any.
        identity: The identity of its service.
        lines: Number of lines read.
        last_line: The newest line, cleaned, redacted and cut off.
        behind_unix_nano: The time of the newest acknowledged line while lines are in flight; None without lines in
            flight.
        tasks: Every attempt of its tasks, without secrets; empty for a job without tasks.
        phase: The ``cicd.pipeline.run.state``: an ended job whose last lines are still read is finalizing.
        started_unix_nano: When it started, in ns since the epoch: by its service, else by its first line.
    """

    service: str
    status: JobStatus
    first_line_unix_nano: int | None = None
    last_line_unix_nano: int | None = None
    progress: Progress | None = None
    identity: str = ""
    lines: int = 0
    last_line: str = ""
    behind_unix_nano: int | None = None
    tasks: Sequence[TaskRun] = ()
    phase: str = field(init=False)
    started_unix_nano: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Compute what each scrape needs several times."""
        state, started_at = self.status.state, self.status.started_at
        self.phase = "finalizing" if state.is_terminal else "pending" if state is JobState.PENDING else "executing"
        self.started_unix_nano = self.first_line_unix_nano if started_at is None else int(started_at.timestamp() * 1e9)


# A frozen dataclass takes three times as long to create.
class Assessment(NamedTuple):
    """The assessment of a followed job at one moment.

    Attributes:
        progress: Its progress, 0 to 1; None if neither service nor log report it.
        eta_s: The estimated time left, in seconds; None without an estimate.
        progress_text: The task counts or the line with the progress.
        running_s: How long it has been running, in seconds; None before it started.
        usual_s: The median duration of succeeded runs of its pipeline, in seconds; None without such a run.
        quiet_s: The time without a line, in seconds; None before it started.
        silent: Whether it has been silent for longer than is usual for its pipeline.
        slow: Whether it has been running for longer than is usual for its pipeline.
        past_runs: Number of succeeded runs in the pipeline's history.
        enough_history: Whether these are enough to call a job silent or slow.
    """

    progress: float | None = None
    eta_s: float | None = None
    progress_text: str = ""
    running_s: float | None = None
    usual_s: float | None = None
    quiet_s: float | None = None
    silent: bool = False
    slow: bool = False
    past_runs: int = 0
    enough_history: bool = False


class PipelineStats(msgspec.Struct, kw_only=True):
    """The history of all pipelines, shared by tailers and metrics.

    Attributes:
        histories: The last ended runs of each pipeline.
        too_fast: Number of suspiciously fast runs since the store was created, by pipeline.
        missing: Whether an expected pipeline did not start in time, by its configured name.
    """

    histories: Histories = msgspec.field(default_factory=Histories)
    too_fast: dict[str, int] = msgspec.field(default_factory=dict)
    missing: dict[str, bool] = msgspec.field(default_factory=dict)


def assess(job: JobSnapshot, history: PipelineHistory, now_unix_nano: int) -> Assessment:
    """Return the assessment of a job.

    Args:
        job: The job.
        history: The history of its pipeline.
        now_unix_nano: The time, in ns since the epoch.
    """
    started_ns = job.started_unix_nano
    running = job.phase == "executing" and started_ns is not None
    past_runs = len(history.succeeded)
    if not running or started_ns is None:
        return Assessment(usual_s=history.p50_s, past_runs=past_runs, enough_history=history.is_enough)
    running_s = _seconds(now_unix_nano - started_ns)
    quiet_s = _seconds(now_unix_nano - max(job.last_line_unix_nano or 0, started_ns))
    heartbeat = job.status.last_heartbeat
    heartbeat_s = _seconds(now_unix_nano - int(heartbeat.timestamp() * 1e9)) if heartbeat is not None else 0.0
    progress = _of_tasks(job.status, running_s, now_unix_nano) or job.progress
    if progress and progress.fraction >= 1 and now_unix_nano - progress.seen_unix_nano > _FULL_BAR_NS:
        progress = None  # the job goes on after a full bar: it was the bar of one step
    # While status or log cannot be read, the job is not known to be silent.
    silent = not job.status.stale and (
        _exceeds(quiet_s, history.silent_after_s) or _exceeds(heartbeat_s, history.heartbeat_after_s)
    )
    return Assessment(
        usual_s=history.p50_s,
        past_runs=past_runs,
        enough_history=history.is_enough,
        progress=progress.fraction if progress else None,
        eta_s=_eta_s(progress, now_unix_nano) if progress else None,
        progress_text=progress.text if progress else "",
        running_s=running_s,
        quiet_s=quiet_s,
        silent=silent,
        slow=_exceeds(running_s, history.slow_after_s),
    )


def is_unassessable(job: JobSnapshot, history: PipelineHistory) -> bool:
    """Return whether there is no progress, and too little history to find an anomaly.

    The assessment of such a job is empty, so thousands of them need not be assessed at each scrape.

    Args:
        job: The job.
        history: The history of its pipeline.
    """
    return job.progress is None and job.status.total_tasks <= 0 and not history.is_enough


def _of_tasks(status: JobStatus, running_s: float, now_unix_nano: int) -> Progress | None:
    if not 0 < status.total_tasks <= MAX_TASKS or status.finished_tasks < 0:
        return None
    finished = min(status.finished_tasks, status.total_tasks)
    fraction = finished / status.total_tasks
    return Progress(
        fraction=fraction,
        eta_s=running_s * (1 - fraction) / fraction if fraction else None,
        seen_unix_nano=now_unix_nano,
        source="tasks",
        text=f"{finished} of {status.total_tasks} {plural(status.total_tasks, 'task')}",
    )


def _eta_s(progress: Progress, now_unix_nano: int) -> float | None:
    """Return the rest of an estimate, at least 0; None once it is overdue, since it was wrong."""
    if progress.eta_s is None:
        return None
    left_s = progress.eta_s - _seconds(now_unix_nano - progress.seen_unix_nano)
    return max(0.0, left_s) if left_s > 0 or progress.fraction >= 1 else None


def _seconds(nanos: int) -> float:
    return max(0.0, nanos / 1e9)


def _exceeds(value_s: float, limit_s: float | None) -> bool:
    return limit_s is not None and value_s > limit_s


def last_starts(histories: Histories, jobs: Sequence[tuple[str, JobSnapshot]]) -> dict[str, int]:
    """Return when each pipeline last started, in ns since the epoch; those never seen to start are missing.

    Args:
        histories: The ended runs.
        jobs: The followed jobs, each with the label of its pipeline.
    """
    starts = {name: start for name in histories if (start := histories.of(name).last_start_unix_nano) is not None}
    for name, job in jobs:
        start = job.started_unix_nano
        if start is not None:
            starts[name] = max(start, starts.get(name, 0))
    return starts


def missing_pipelines(
    expects: Iterable[Expect], starts: Mapping[str, int], since_unix_nano: int, now_unix_nano: int
) -> dict[str, bool]:
    """Return for each expected pipeline whether it did not start in time.

    Args:
        expects: The expected pipelines.
        starts: When each pipeline last started, in ns since the epoch.
        since_unix_nano: The start time of a pipeline that was never seen to start, in ns since the epoch.
        now_unix_nano: The time, in ns since the epoch.
    """
    return {
        expect.name: _seconds(now_unix_nano - starts.get(expect.name, since_unix_nano)) > expect.every + expect.grace
        for expect in expects
    }
