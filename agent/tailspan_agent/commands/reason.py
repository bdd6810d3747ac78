"""Why a job failed, as the agent on this machine has found it in the job's log."""

from __future__ import annotations

from pathlib import Path

from tailspan.errors import TailspanError
from tailspan.models import JobStatus
from tailspan_agent.checkpoint.store import read_checkpoint
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import failure_text

__all__ = ["known_reason"]


def known_reason(state_dir: Path, job: JobStatus) -> str | None:
    """Return why a job failed; None if the agent has not relayed it, or found no more than the status says.

    Args:
        state_dir: The agent's state directory.
        job: The status of a job that failed.
    """
    try:
        checkpoint = read_checkpoint(state_dir, job.identity, job.job_id)
        ledger = None if checkpoint is None else JobLedger.from_json(checkpoint.ledger)
    except (TailspanError, ValueError):
        return None
    if ledger is None or ledger.failure is None:
        return None
    text = failure_text(job, ledger.failure)
    return None if text == job.error else text
