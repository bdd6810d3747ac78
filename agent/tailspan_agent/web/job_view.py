"""`JobView`: everything on a job's page above its log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tailspan.errors import JobNotFoundError, ServiceError, ServiceUnavailableError
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan.services import JobService, TaskService
from tailspan_agent.analysis.assessment import Assessment, JobSnapshot, assess
from tailspan_agent.analysis.baseline import PastRun, PipelineHistory
from tailspan_agent.analysis.failure import exit_reason
from tailspan_agent.checkpoint.rows import Checkpoint
from tailspan_agent.job.bounds import bounded_tasks
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import failure_text
from tailspan_agent.job.task_spans import with_tasks
from tailspan_agent.job.times import JobTimes, run_duration_s, unix_nano
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.fleet_members import follower_of, page_of
from tailspan_agent.web.job_rows import display_name, job_path
from tailspan_agent.web.shared_jobs import stored_snapshot, stored_status
from tailspan_agent.web.task_chart import TaskChart, task_chart

if TYPE_CHECKING:
    from tailspan_agent.fleet.leases import FleetAgent

__all__ = ["RESULT_KINDS", "JobView", "PipelineRun", "load_job_view"]

RESULT_KINDS = {"success": "succeeded", "cancellation": "canceled", "skip": "skipped"}
"""The class of a run by its ``cicd.pipeline.result``; all others failed."""

_SHOWN_RUNS = 10


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """A past run of the job's pipeline.

    Attributes:
        path: The path of its page; empty if its service is not watched.
        kind: ``succeeded``, ``failed``, ``canceled`` or ``skipped``.
        run: The run.
    """

    path: str
    kind: str
    run: PastRun


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """The current data of a job.

    Attributes:
        service: Its service.
        status: Its status, without secrets.
        ledger: The agent's record of it; None for a job that the agent never followed.
        assessment: Progress, time left and anomalies.
        history: The last runs of its pipeline.
        took_s: Duration so far or in total, in seconds.
        times: Submission, start and end; None for a job that the agent never followed.
        why: Why it failed; empty otherwise.
        reason: What ended it (a signal's name, out of memory, ...), if known.
        complete: True if all its lines are delivered.
        problem: Why its service did not answer; empty otherwise.
        followed: Whether the agent, or another one of its fleet, follows it now.
        links: Links to other tools: (label, URL).
        tasks: Every attempt of its tasks, without secrets; empty if they are not known.
        agent: The other agent of the fleet that follows it; None without one.
        runs: The last runs of its pipeline, newest first.
    """

    service: JobService
    status: JobStatus
    ledger: JobLedger | None
    assessment: Assessment
    history: PipelineHistory
    took_s: float | None
    times: JobTimes | None
    why: str
    reason: str
    complete: bool
    problem: str = ""
    followed: bool = False
    links: Sequence[tuple[str, str]] = field(default_factory=tuple)
    tasks: Sequence[TaskRun] = ()
    agent: FleetAgent | None = None
    runs: Sequence[PipelineRun] = ()

    @property
    def failed(self) -> bool:
        """Whether it ended and did not do its work; a canceled job did what its user wanted."""
        return self.status.state in (JobState.FAILED, JobState.TIMED_OUT, JobState.LOST)

    @property
    def name(self) -> str:
        """The name to display."""
        return display_name(self.status.job_name, self.status.job_id)

    @property
    def submitted_ns(self) -> int | None:
        """Submission in ns since the epoch; for a job that the agent never followed, by its service."""
        return self.times.submitted_ns if self.times else unix_nano(self.status.submitted_at)

    @property
    def started_ns(self) -> int | None:
        """Start in ns since the epoch, by the same rule."""
        return self.times.started_ns if self.times else unix_nano(self.status.started_at)

    @property
    def finished_ns(self) -> int | None:
        """End, or the last sign of life, in ns since the epoch, by the same rule."""
        return self.times.finished_ns if self.times else unix_nano(self.status.finished_at)

    @property
    def agent_path(self) -> str:
        """The URL of the job on the page of the other agent that follows it; empty if it is not known."""
        page = page_of(self.agent) if self.agent is not None else ""
        return page + job_path(self.service.name, self.status.job_id) if page else ""

    def task_chart(self, selected: str = "") -> TaskChart | None:
        """Return the chart of its trace; None for a job without tasks whose times are not known.

        Args:
            selected: The id or name of the task whose lines are shown.
        """
        times = with_tasks(self.times, self.tasks) if self.times is not None else None
        if not self.tasks and times is None:
            return None
        ended = self.status.state.is_terminal
        end_ns = (times.finished_ns if times else self.finished_ns) if ended else None
        return task_chart(
            self.tasks,
            started_ns=times.started_ns if times else self.started_ns,
            end_ns=time.time_ns() if end_ns is None else end_ns,
            ended=ended,
            selected=selected,
            submitted_ns=times.submitted_ns if times else None,
            state=self.status.state.value.lower() if ended else "running",
        )

    @property
    def ended(self) -> bool:
        """Whether its state and log are final."""
        return self.status.state.is_terminal and not self.followed


async def load_job_view(
    view: AgentView, service: JobService, job_id: str, *, timeout_s: float, requests_tasks: bool = False
) -> JobView:
    """Load a job: its snapshot if it is followed, or else from its service, or else from the store.

    Args:
        view: The agent.
        service: The job's service.
        job_id: The job.
        timeout_s: Time limit for each answer of the service, in seconds.
        requests_tasks: Whether to request the tasks of a job that the agent does not follow.

    Raises:
        JobNotFoundError: Neither the service nor the store has this job.
        ServiceError: The service does not answer, and the store does not have the job.
    """
    followed = next((job for job in view.followed if job.status.job_id == job_id and job.service == service.name), None)
    stored, number = await view.find_job(service.identity, job_id)
    agent = None
    if view.fleet is not None and stored is not None and not (stored.ended and stored.logs_complete):
        await view.fleet.refresh()
        agent = follower_of(view.fleet, number) if number != view.fleet.agent else None
    ledger = _ledger_of(stored)
    known_status = (
        stored_status(service.name, service.identity, job_id, stored.name, ledger, stale=True)
        if stored is not None and ledger is not None
        else None
    )
    status, problem = (
        (followed.status, "") if followed else await _request_status(service, job_id, known_status, timeout_s)
    )
    tasks = followed.tasks if followed else ()
    if requests_tasks and not tasks and not problem:
        tasks = await _request_tasks(view, service, job_id, timeout_s)
    status, history = view.redact_job(status), view.history(status.job_name)
    now_ns = time.time_ns()
    snapshot = followed or JobSnapshot(service=service.name, status=status)
    if agent is not None and ledger is not None:
        snapshot = stored_snapshot(status, ledger)
    assessment = assess(snapshot, history, now_ns)
    if followed is None and agent is None:
        assessment = assessment._replace(silent=False)  # its lines are not read, so silence means nothing
    times = JobTimes.of(status, ledger) if ledger is not None else None
    ended = status.state.is_terminal
    took_s = assessment.running_s
    if ended:
        took_s = run_duration_s(status, ledger) if ledger is not None else _duration_s(status)
    failed = ended and status.state is not JobState.SUCCEEDED
    return JobView(
        service=service,
        status=status,
        ledger=ledger,
        assessment=assessment,
        history=history,
        took_s=took_s,
        times=times,
        why=failure_text(status, ledger.failure if ledger else None) if failed else "",
        reason=(exit_reason(status, ledger.failure if ledger else None) or "") if failed else "",
        complete=stored is not None and stored.logs_complete,
        problem=problem,
        followed=followed is not None or agent is not None,
        links=_links(view, status),
        tasks=tasks,
        agent=agent,
        runs=_pipeline_runs(view, history),
    )


def _ledger_of(stored: Checkpoint | None) -> JobLedger | None:
    try:
        return JobLedger.from_json(stored.ledger) if stored is not None else None
    except ValueError:
        return None


async def _request_status(
    service: JobService, job_id: str, stored_status: JobStatus | None, timeout_s: float
) -> tuple[JobStatus, str]:
    """Return the service's answer and an empty text; without an answer the stored status and the error."""
    try:
        async with asyncio.timeout(timeout_s):
            return await service.get_job(job_id), ""
    except JobNotFoundError as error:
        if stored_status is None:
            raise
        return stored_status, str(error)
    except (ServiceError, TimeoutError) as error:
        text = str(error) or f"it did not answer within {timeout_s:g} s"
        if stored_status is None:
            raise ServiceUnavailableError(text, service=service.name, job_id=job_id) from error
        return stored_status, text


async def _request_tasks(view: AgentView, service: JobService, job_id: str, timeout_s: float) -> Sequence[TaskRun]:
    """Return the job's tasks; none if its service has no tasks or does not answer."""
    if not isinstance(service, TaskService):
        return ()
    with contextlib.suppress(ServiceError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            tasks = bounded_tasks(await service.list_tasks(job_id), now=datetime.now(UTC))
            return [view.redact_task(task) for task in tasks]
    return ()


def _links(view: AgentView, status: JobStatus) -> list[tuple[str, str]]:
    urls = {**view.settings().links.of(status), "at its service": status.url}
    # A URL from outside must not be a script (javascript:).
    return [(label.capitalize(), url) for label, url in urls.items() if url and url.startswith(("http://", "https://"))]


def _pipeline_runs(view: AgentView, history: PipelineHistory) -> list[PipelineRun]:
    names = {service.identity: name for name, service in view.services.items()}
    return [
        PipelineRun(
            job_path(names[run.identity], run.job_id) if run.identity in names else "",
            RESULT_KINDS.get(run.result, "failed"),
            run,
        )
        for run in reversed(history.runs[-_SHOWN_RUNS:])
    ]


def _duration_s(status: JobStatus) -> float | None:
    return status.duration.total_seconds() if status.duration is not None else None
