"""Compares a job's log with what the agent relayed: reads the job again and compares it with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from tailspan._job_search import find_job
from tailspan._plural import plural
from tailspan.config import Settings
from tailspan.errors import CursorExpiredError
from tailspan.services import JobService
from tailspan.services.registry import open_service
from tailspan_agent.checkpoint.store import read_checkpoint
from tailspan_agent.errors import CheckpointError
from tailspan_agent.job.ledger import JobLedger

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of the comparison.

    Attributes:
        verdict: ``verified``; ``different``; ``incomplete`` (lines are not acknowledged yet); ``source_gone`` (the
            service kept fewer lines than were relayed); ``not_relayed`` (the agent does not know the job).
        text: The verdict with its reason, for people.
        job_id: The job.
        lines_relayed: Lines in the checkpoint: acknowledged, rejected or filtered out.
        lines_now: Lines that the service has now.
    """

    verdict: Literal["verified", "different", "incomplete", "source_gone", "not_relayed"]
    text: str
    job_id: str
    lines_relayed: int = 0
    lines_now: int = 0


async def verify(
    settings: Settings,
    service_name: str,
    job: str | None,
    opener: Callable[[str, Settings], JobService] = open_service,
) -> VerifyReport:
    """Read a job's log again and compare count and hash of its lines with the checkpoint.

    This detects accidents, not forgery.

    Args:
        settings: The agent's configuration.
        service_name: The configured service of the job.
        job: Names the job; see `tailspan._job_search.find_job`.
        opener: Opens the configured service of a name.

    Raises:
        ServiceError: The service cannot be reached, or has no such job.
        CheckpointError: The store cannot be read.
    """
    async with aclosing(opener(service_name, settings)) as service:
        job_id = (await find_job(service, job)).job_id
        checkpoint = read_checkpoint(settings.agent.state_dir, service.identity, job_id)
        if checkpoint is None:
            return VerifyReport(
                "not_relayed", f"job {job_id} of service {service_name} is not in the agent's store", job_id
            )
        try:
            relayed = JobLedger.from_json(checkpoint.ledger)
        except ValueError as error:
            raise CheckpointError(f"the store's record of job {job_id} is damaged: {error}") from error
        now = JobLedger(first_seen_ns=relayed.first_seen_ns)
        try:
            async for page in service.read_logs(job_id):
                now = now.with_page(page)
        except CursorExpiredError as error:
            return VerifyReport("source_gone", str(error), job_id, relayed.lines, now.lines)
    if now.lines < relayed.lines:
        text = f"the service has {_lines(now)}, but the agent relayed {relayed.lines}: it did not keep all of them"
        return VerifyReport("source_gone", text, job_id, relayed.lines, now.lines)
    if not checkpoint.logs_complete:
        text = f"acknowledged: {relayed.lines} of {_lines(now)}; the log is not complete yet"
        return VerifyReport("incomplete", text, job_id, relayed.lines, now.lines)
    if (now.lines, now.stream_hash) != (relayed.lines, relayed.stream_hash):
        text = f"the agent relayed {_lines(relayed)}; the log now has {_lines(now)} and differs"
        return VerifyReport("different", text, job_id, relayed.lines, now.lines)
    return VerifyReport(
        "verified",
        f"the whole log was acknowledged and is unchanged: {_lines(now)}",
        job_id,
        now.lines,
        now.lines,
    )


def _lines(ledger: JobLedger) -> str:
    return f"{ledger.lines} {plural(ledger.lines, 'line')}"
