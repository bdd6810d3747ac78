"""`Assessment`: what can be told of a running job beyond its state: how far it is, how long it will take, what is odd.

Pure, and cheap enough to be asked for each followed job at each scrape; the metrics, the log and the page all read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tailspan.config import Expect
from tailspan.models import JobState, RunResponse
from tailspan_agent.analysis.baseline import Histories, PipelineHistory
from tailspan_agent.analysis.progress import Progress

__all__ = [
    "Assessment",
    "JobSnapshot",
    "PipelineStats",
    "assess",
    "is_unassessable",
    "last_starts",
    "missing_pipelines",
]


_FULL_BAR_NS = 10_000_000_000
_MAX_TASKS = 1 << 53


# Not frozen, which takes three times as long: each scrape makes thousands of them.
@dataclass(slots=True, kw_only=True)
class JobSnapshot:
    """A job that the agent follows now.

    Attributes:
        service: The configured name of its service.
        status: Its newest status.
        first_line_unix_nano: The time of its first line, if it has lines.
        last_line_unix_nano: The time of its newest line.
        progress: What its log last said of its progress, if it did.
        identity: The identity of its service.
        lines: How many lines were read.
        last_line: The newest line, cleaned, without secrets and cut off.
        behind_unix_nano: The time of the newest acked line while lines are on their way; None when all is acked.
        phase: The ``cicd.pipeline.run.state``: an ended job whose last lines are still read is finalizing.
        started_unix_nano: When it started, by its service or else by its first line, in ns since the epoch.
    """

    service: str
    status: RunResponse
    first_line_unix_nano: int | None = None
    last_line_unix_nano: int | None = None
    progress: Progress | None = None
    identity: str = ""
    lines: int = 0
    last_line: str = ""
    behind_unix_nano: int | None = None
    phase: str = field(init=False)
    started_unix_nano: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Work out what each scrape asks for more than once."""
        state, started_at = self.status.state, self.status.started_at
        self.phase = "finalizing" if state.is_terminal else "pending" if state is JobState.PENDING else "executing"
        self.started_unix_nano = self.first_line_unix_nano if started_at is None else int(started_at.timestamp() * 1e9)


# As a frozen dataclass it would take three times as long.
class Assessment(NamedTuple):
    """What can be told of a followed job at one moment.

    Attributes:
        progress: How far it is, 0 to 1; None when nobody says.
        eta_s: How long it will still take, in seconds; None when that cannot be told.
        progress_text: The counts or the line that say it.
        running_s: How long it has been running, in seconds; None before it started.
        usual_s: How long its pipeline usually takes (median of succeeded runs), in seconds; None without such a run.
        quiet_s: How long there was no line, in seconds; None before it started.
        silent: Whether it is silent for longer than its pipeline's past says.
        slow: Whether it is running for longer than its pipeline's past says.
        past_runs: How many succeeded runs that past has.
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


@dataclass(kw_only=True)
class PipelineStats:
    """What the agent has learned of pipelines; its tailers and metrics share one.

    Attributes:
        histories: The last ended runs by the label of their pipeline.
        too_fast: How many runs of a pipeline succeeded suspiciously fast, since the store was made.
        missing: Which expected pipelines did not start in time, by their configured name.
    """

    histories: Histories = field(default_factory=Histories)
    too_fast: dict[str, int] = field(default_factory=dict)
    missing: dict[str, bool] = field(default_factory=dict)


def assess(job: JobSnapshot, history: PipelineHistory, now_unix_nano: int) -> Assessment:
    """Return what can be told of a job.

    Args:
        job: The job.
        history: The past of its pipeline.
        now_unix_nano: The moment, in ns since the epoch.
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
        progress = None  # a bar that was full a while ago was not that of the whole job
    # A status or a log that cannot be read now says nothing of a silence.
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
    """Return whether nobody says how far the job is, and its pipeline's past does not say what is odd.

    Then its insight has no progress and calls it neither silent nor slow: thousands of jobs need not be looked at.

    Args:
        job: The job.
        history: The past of its pipeline.
    """
    return job.progress is None and job.status.total_tasks <= 0 and not history.is_enough


def _of_tasks(status: RunResponse, running_s: float, now_unix_nano: int) -> Progress | None:
    # A service may say any number.
    if not 0 < status.total_tasks <= _MAX_TASKS or status.finished_tasks < 0:
        return None
    finished = min(status.finished_tasks, status.total_tasks)
    fraction = finished / status.total_tasks
    return Progress(
        fraction=fraction,
        eta_s=running_s * (1 - fraction) / fraction if fraction else None,
        seen_unix_nano=now_unix_nano,
        source="tasks",
        text=f"{finished} of {status.total_tasks} tasks",
    )


def _eta_s(progress: Progress, now_unix_nano: int) -> float | None:
    """Return what is left of an estimate; None once it was overdue: then it was wrong."""
    if progress.eta_s is None:
        return None
    left_s = progress.eta_s - _seconds(now_unix_nano - progress.seen_unix_nano)
    return left_s if left_s > 0 or progress.fraction >= 1 else None


def _seconds(nanos: int) -> float:
    return max(0.0, nanos / 1e9)


def _exceeds(value_s: float, limit_s: float | None) -> bool:
    return limit_s is not None and value_s > limit_s


def last_starts(histories: Histories, jobs: Sequence[tuple[str, JobSnapshot]]) -> dict[str, int]:
    """Return when each pipeline last started, in ns since the epoch, as far as that was seen.

    Args:
        histories: Ended runs.
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
        expects: What is expected.
        starts: When each pipeline last started, in ns since the epoch.
        since_unix_nano: Since when runs are counted: one that never started is late from then on.
        now_unix_nano: The moment.
    """
    return {
        expect.name: _seconds(now_unix_nano - starts.get(expect.name, since_unix_nano)) > expect.every + expect.grace
        for expect in expects
    }
