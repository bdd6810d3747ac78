"""`JobView`: what a job's own page says above its log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tailspan._identity import trace_id
from tailspan.errors import JobNotFoundError, ServiceError, ServiceUnavailableError
from tailspan.models import JobState, RunResponse
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import Assessment, JobSnapshot, assess
from tailspan_agent.analysis.baseline import PipelineHistory
from tailspan_agent.analysis.failure import exit_reason
from tailspan_agent.checkpoint.store import Checkpoint
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import failure_text
from tailspan_agent.job.times import JobTimes, run_duration_s, unix_nano
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.job_rows import shown_name

__all__ = ["JobView", "Phase", "view_of"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the timeline.

    Attributes:
        name: ``queued`` or ``executing``.
        x: Where it begins, 0 to 1000.
        width: How wide it is.
        seconds: How long it was.
    """

    name: str
    x: float
    width: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """What is known of a job now.

    Attributes:
        service: Its service.
        status: Its status, without secrets.
        ledger: What the agent saw of it; None for a job that the agent never saw.
        assessment: What can be told of it while it is followed.
        history: The past of its pipeline.
        took_s: How long it ran, or has been running, in seconds.
        times: When it was submitted, started and ended; None for a job that the agent never saw.
        phases: Its timeline.
        why: Why it did not succeed; empty otherwise.
        reason: What ended it (a signal's name, out of memory, ...), where that is known.
        complete: Whether all its lines are acked.
        problem: Why its service could not be asked; empty otherwise.
        followed: Whether the agent follows it now.
        links: Where else to look at it: (label, address).
    """

    service: JobService
    status: RunResponse
    ledger: JobLedger | None
    assessment: Assessment
    history: PipelineHistory
    took_s: float | None
    times: JobTimes | None
    phases: Sequence[Phase]
    why: str
    reason: str
    complete: bool
    problem: str = ""
    followed: bool = False
    links: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """What the job is called."""
        return shown_name(self.status.job_name, self.status.job_id)

    @property
    def submitted_ns(self) -> int | None:
        """When it was submitted; of a job that the agent never saw what its service says, if it does."""
        return self.times.submitted_ns if self.times else unix_nano(self.status.submitted_at)

    @property
    def started_ns(self) -> int | None:
        """When it started, likewise."""
        return self.times.started_ns if self.times else unix_nano(self.status.started_at)

    @property
    def finished_ns(self) -> int | None:
        """When it ended, or was last seen, likewise."""
        return self.times.finished_ns if self.times else unix_nano(self.status.finished_at)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status.state.is_terminal and not self.followed


async def view_of(shown: AgentView, service: JobService, job_id: str, *, timeout_s: float) -> JobView:
    """Look at a job: by what the agent follows, or else by its service, or else by what the store has of it.

    Raises:
        JobNotFoundError: Nobody knows such a job.
        ServiceError: The service cannot be asked, and the store has nothing.
    """
    followed = next(
        (job for job in shown.followed if job.status.job_id == job_id and job.service == service.name), None
    )
    stored = shown.store.job(service.identity, job_id)
    ledger = _facts(stored)
    remembered = (
        _remembered(service, job_id, stored.name, ledger) if stored is not None and ledger is not None else None
    )
    status, problem = (followed.status, "") if followed else await _ask(service, job_id, remembered, timeout_s)
    status, history = shown.redact_job(status), shown.history(status.job_name)
    now_ns = time.time_ns()
    assessment = assess(followed or JobSnapshot(service=service.name, status=status), history, now_ns)
    if followed is None:
        assessment = assessment._replace(silent=False)  # nobody reads its lines, so nobody knows
    times = JobTimes.of(status, ledger) if ledger is not None else None
    ended = status.state.is_terminal
    took_s = assessment.running_s
    if ended:
        took_s = run_duration_s(status, ledger) if ledger is not None else _seconds(status)
    failed = ended and status.state is not JobState.SUCCEEDED
    return JobView(
        service=service,
        status=status,
        ledger=ledger,
        assessment=assessment,
        history=history,
        took_s=took_s,
        times=times,
        phases=_phases(times, now_ns, ended=ended) if times else (),
        why=failure_text(status, ledger.failure if ledger else None) if failed else "",
        reason=(exit_reason(status, ledger.failure if ledger else None) or "") if failed else "",
        complete=stored is not None and stored.logs_complete,
        problem=problem,
        followed=followed is not None,
        links=_links(shown, status),
    )


def _facts(stored: Checkpoint | None) -> JobLedger | None:
    try:
        return JobLedger.from_json(stored.ledger) if stored is not None else None
    except ValueError:
        return None


async def _ask(
    service: JobService, job_id: str, remembered: RunResponse | None, timeout_s: float
) -> tuple[RunResponse, str]:
    """Return the service's answer, or else what is remembered and why there is no answer."""
    try:
        async with asyncio.timeout(timeout_s):
            return await service.get_job(job_id), ""
    except JobNotFoundError as error:
        if remembered is None:
            raise
        return remembered, str(error)
    except (ServiceError, TimeoutError) as error:
        text = str(error) or f"it did not answer within {timeout_s:g} s"
        if remembered is None:
            raise ServiceUnavailableError(text, service=service.name, job_id=job_id) from error
        return remembered, text


def _remembered(service: JobService, job_id: str, name: str, ledger: JobLedger) -> RunResponse:
    return RunResponse.from_state(
        ledger.states[-1][1] if ledger.states else JobState.UNKNOWN,
        job_id=job_id,
        job_name=name,
        service=service.name,
        identity=service.identity,
        trace_id=trace_id(service.identity, job_id),
        stale=True,
    )


def _links(shown: AgentView, status: RunResponse) -> list[tuple[str, str]]:
    found = {**shown.settings().links.of(status), "at its service": status.url}
    # An address from outside must not be a program (javascript:).
    return [
        (label.capitalize(), url) for label, url in found.items() if url and url.startswith(("http://", "https://"))
    ]


def _phases(times: JobTimes, now_ns: int, *, ended: bool) -> list[Phase]:
    end_ns = times.finished_ns if ended else max(now_ns, times.finished_ns)
    whole = max(1, end_ns - times.submitted_ns)
    started_ns = times.started_ns if times.started_ns is not None else end_ns
    found = []
    for name, start, stop in (("queued", times.submitted_ns, started_ns), ("executing", started_ns, end_ns)):
        if stop > start:
            x = 1000 * (start - times.submitted_ns) / whole
            found.append(
                Phase(name, round(x, 1), round(max(2.0, 1000 * (stop - start) / whole), 1), (stop - start) / 1e9)
            )
    return found


def _seconds(status: RunResponse) -> float | None:
    return status.duration.total_seconds() if status.duration is not None else None
