"""Makes the rows of the job table. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from tailspan.models import JobState
from tailspan_agent.analysis.assessment import JobSnapshot, assess
from tailspan_agent.analysis.baseline import PastRun, PipelineHistory
from tailspan_agent.analysis.pipeline_names import utf8_name
from tailspan_agent.job.times import unix_nano
from tailspan_agent.web.ended_jobs import EndedJob
from tailspan_agent.web.job_filter import STATE_GROUPS, JobEntry

__all__ = ["JobRow", "display_name", "ended_entry", "followed_entry", "job_path", "job_row"]

_MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job in the table.

    Attributes:
        key: Identifies the row.
        path: The path of the job's page.
        service: The configured name of its service.
        job_id: The job.
        name: Its pipeline.
        state: Its state.
        started_ns: Start, in ns since the epoch.
        ended_ns: End, in ns since the epoch.
        took_s: Duration so far or in total, in seconds.
        usual_s: Usual duration of its pipeline, in seconds.
        progress: Reported progress, 0 to 1.
        share: Elapsed share of its usual duration, 0 to 1; None with reported progress or without a usual duration.
        eta_s: Estimated time left, in seconds.
        progress_text: The line or the counts that report the progress.
        lines: Number of lines.
        last_line: The newest line.
        lag_s: Age of its newest delivered line while others are waiting, in seconds; None if all are delivered.
        alerts: The kinds of its anomalies.
        stale: True if its service does not answer.
        failed: Whether it ended and did not do its work.
        reason: Why; empty if it is not known.
        exit_code: Its exit code; None if it is not known.
        agent: The host of the agent of the fleet that follows it; empty without one.
        agent_path: The URL of the job on that agent's page; empty if it is not known, or if it is this page.
    """

    key: str
    path: str
    service: str
    job_id: str
    name: str
    state: JobState
    started_ns: int | None
    ended_ns: int | None
    took_s: float | None
    usual_s: float | None
    progress: float | None
    share: float | None
    eta_s: float | None
    progress_text: str
    lines: int
    last_line: str
    lag_s: float | None
    alerts: tuple[str, ...]
    stale: bool
    failed: bool
    reason: str
    exit_code: int | None
    agent: str = ""
    agent_path: str = ""


def job_path(service: str, job_id: str, **query: object) -> str:
    """Return the path of a job's page."""
    return "/job?" + urlencode({"service": service, "id": job_id, **query}, errors="replace")


def display_name(job_name: str, job_id: str) -> str:
    """Return the name of a job, or its id if the name is blank, because a blank link cannot be clicked."""
    return job_name if job_name.strip() else job_id


def followed_entry(job: JobSnapshot, agent: int | None = None) -> JobEntry:
    """Return the entry of a followed job.

    Args:
        job: The job.
        agent: The number of the agent of the fleet that follows it; None without a fleet.
    """
    status = job.status
    when = unix_nano(status.finished_at) or job.started_unix_nano or unix_nano(status.submitted_at) or 0
    # The form of the name in the store, and in the query that a browser sends to search for it.
    return JobEntry(job.service, status.job_id, utf8_name(status.job_name), status.state, when, job, agent)


def ended_entry(job: EndedJob, service: str) -> JobEntry:
    """Return the entry of an ended job."""
    return JobEntry(service, job.job_id, job.name, job.state, job.ended_ns, job)


def job_row(entry: JobEntry, history: PipelineHistory, now_unix_nano: int) -> JobRow:
    """Return the table row of a job.

    Args:
        entry: The job.
        history: The last runs of its pipeline.
        now_unix_nano: The current time, in ns since the epoch.
    """
    job = entry.job
    return (
        _followed_row(entry, job, history, now_unix_nano)
        if isinstance(job, JobSnapshot)
        else _ended_row(entry, job, history)
    )


def _followed_row(entry: JobEntry, job: JobSnapshot, history: PipelineHistory, now_ns: int) -> JobRow:
    assessment, status = assess(job, history, now_ns), job.status
    took_s = assessment.running_s
    if status.state.is_terminal and status.duration is not None:
        took_s = status.duration.total_seconds()
    running = took_s is not None and not status.state.is_terminal
    share = None
    if running and assessment.progress is None and assessment.usual_s and took_s is not None:
        share = min(1.0, took_s / assessment.usual_s)
    return JobRow(
        **_common_fields(entry, job.identity),
        started_ns=job.started_unix_nano,
        ended_ns=unix_nano(status.finished_at) if status.state.is_terminal else None,
        took_s=took_s,
        usual_s=assessment.usual_s,
        progress=assessment.progress,
        share=share,
        eta_s=assessment.eta_s,
        progress_text=assessment.progress_text,
        lines=job.lines,
        last_line=job.last_line,
        lag_s=max(0.0, (now_ns - job.behind_unix_nano) / 1e9) if job.behind_unix_nano is not None else None,
        alerts=tuple(kind for kind, holds in (("silent", assessment.silent), ("slow", assessment.slow)) if holds),
        stale=status.stale,
        reason=status.error or "" if entry.state in STATE_GROUPS["failed"] else "",
        exit_code=status.exit_code,
    )


def _ended_row(entry: JobEntry, job: EndedJob, history: PipelineHistory) -> JobRow:
    run = _past_run(job, history)
    started_ns = run.started_unix_nano if run is not None else job.started_ns
    ended_ns = run.ended_unix_nano if run is not None else job.ended_ns
    took_s = (ended_ns - started_ns) / 1e9 if started_ns is not None else None
    return JobRow(
        **_common_fields(entry, job.identity),
        started_ns=started_ns,
        ended_ns=ended_ns,
        took_s=run.duration_s if run is not None else took_s,
        usual_s=history.p50_s,
        progress=None,
        share=None,
        eta_s=None,
        progress_text="",
        lines=job.lines,
        last_line=job.last_line,
        lag_s=None,
        alerts=tuple(kind for kind in job.alerts if kind == "too_fast"),
        stale=False,
        reason=job.reason,
        exit_code=job.exit_code,
    )


def _common_fields(entry: JobEntry, identity: str) -> dict[str, Any]:
    return {
        "key": f"{identity}\0{entry.job_id}",
        "path": job_path(entry.service, entry.job_id),
        "service": entry.service,
        "job_id": entry.job_id,
        "name": display_name(entry.name, entry.job_id)[:_MAX_NAME_CHARS],
        "state": entry.state,
        "failed": entry.state in STATE_GROUPS["failed"],
    }


def _past_run(job: EndedJob, history: PipelineHistory) -> PastRun | None:
    return next((run for run in history.runs if run.job_id == job.job_id and run.identity == job.identity), None)
