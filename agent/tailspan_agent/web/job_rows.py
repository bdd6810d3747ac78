"""What the page says of a job: a row of the table, or the head of its own page. Pure."""

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
from tailspan_agent.web.job_filter import Entry

__all__ = ["Row", "entry_of_ended", "entry_of_followed", "job_path", "row_of", "shown_name"]

_SHOWN_NAME_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job in the table.

    Attributes:
        key: Names the row among all others.
        path: The job's own page.
        service: The configured name of its service.
        job_id: The job.
        name: Its pipeline.
        state: Its state.
        started_ns: When it started, in ns since the epoch.
        ended_ns: When it ended.
        took_s: How long it ran, or has been running, in seconds.
        usual_s: How long its pipeline usually takes, in seconds.
        progress: How far it is, 0 to 1, by its own words.
        share: Of its usual duration that is over, 0 to 1; None where progress is known or nothing is usual.
        eta_s: How long it will still take, in seconds.
        progress_text: The line or the counts that say how far it is.
        lines: How many lines it has.
        last_line: The newest of them.
        lag_s: How far its acked lines are behind now, in seconds; None when all is acked.
        alerts: What is odd about it.
        stale: Whether its service cannot be asked now.
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


def job_path(service: str, job_id: str, **query: object) -> str:
    """Return the path of a job's page."""
    return "/job?" + urlencode({"service": service, "id": job_id, **query}, errors="replace")


def shown_name(job_name: str, job_id: str) -> str:
    """Return what a job is called: its name; its id where that is empty, which nobody could read or click."""
    return job_name if job_name.strip() else job_id


def entry_of_followed(job: JobSnapshot) -> Entry:
    """Return the entry of a job that is followed."""
    status = job.status
    when = unix_nano(status.finished_at) or job.started_unix_nano or unix_nano(status.submitted_at) or 0
    # As it is in the store, and in what a browser sends back to search for it.
    return Entry(job.service, status.job_id, utf8_name(status.job_name), status.state, when, job)


def entry_of_ended(job: EndedJob, service: str) -> Entry:
    """Return the entry of a job that has ended."""
    return Entry(service, job.job_id, job.name, job.state, job.ended_ns, job)


def row_of(entry: Entry, history: PipelineHistory, now_unix_nano: int) -> Row:
    """Return all that the table says of a job.

    Args:
        entry: The job.
        history: The past of its pipeline.
        now_unix_nano: The moment, in ns since the epoch.
    """
    job = entry.job
    return (
        _followed(entry, job, history, now_unix_nano) if isinstance(job, JobSnapshot) else _ended(entry, job, history)
    )


def _followed(entry: Entry, job: JobSnapshot, history: PipelineHistory, now_ns: int) -> Row:
    assessment, status = assess(job, history, now_ns), job.status
    took_s = assessment.running_s
    if status.state.is_terminal and status.duration is not None:
        took_s = status.duration.total_seconds()
    running = took_s is not None and not status.state.is_terminal
    share = None
    if running and assessment.progress is None and assessment.usual_s and took_s is not None:
        share = min(1.0, took_s / assessment.usual_s)
    return Row(
        **_names(entry, job.identity),
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
    )


def _ended(entry: Entry, job: EndedJob, history: PipelineHistory) -> Row:
    run = _past(job, history)
    started_ns = run.started_unix_nano if run is not None else job.started_ns
    ended_ns = run.ended_unix_nano if run is not None else job.ended_ns
    took_s = (ended_ns - started_ns) / 1e9 if started_ns is not None else None
    return Row(
        **_names(entry, job.identity),
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
    )


def _names(entry: Entry, identity: str) -> dict[str, Any]:
    return {
        "key": f"{identity}\0{entry.job_id}",
        "path": job_path(entry.service, entry.job_id),
        "service": entry.service,
        "job_id": entry.job_id,
        "name": shown_name(entry.name, entry.job_id)[:_SHOWN_NAME_CHARS],
        "state": entry.state,
    }


def _past(job: EndedJob, history: PipelineHistory) -> PastRun | None:
    return next((run for run in history.runs if run.job_id == job.job_id and run.identity == job.identity), None)
