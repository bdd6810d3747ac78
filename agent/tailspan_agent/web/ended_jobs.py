"""The ended jobs on the page: the newest ones, read from the checkpoint store only on request."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field

from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.failure import Failure
from tailspan_agent.checkpoint.protocol import StoredLedgers
from tailspan_agent.checkpoint.rows import LedgerRow
from tailspan_agent.job.ledger import Ending, JobLedger
from tailspan_agent.job.mapping import failure_text

__all__ = ["MAX_ENDED_JOBS", "EndedJob", "EndedJobs", "ended_job"]

MAX_ENDED_JOBS = 10_000
"""Maximum number of listed ended jobs; the pages of older ones still exist."""

_CHUNK_ROWS = 500
_REASON_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """An ended job, as the agent saw it.

    Attributes:
        identity: The identity of its service.
        job_id: The job.
        name: Its pipeline.
        state: Its final state.
        started_ns: The start as far as the agent saw it, in ns since the epoch.
        ended_ns: The end as far as the agent saw it, in ns since the epoch.
        lines: Number of lines.
        last_line: Its last line, without secrets.
        alerts: The kinds of its anomalies.
        exit_code: The exit code of its main process; None if it is not known.
        reason: Why it did not succeed; empty otherwise.
        attributes: Its attributes, without secrets.
    """

    identity: str
    job_id: str
    name: str
    state: JobState
    started_ns: int | None
    ended_ns: int
    lines: int
    last_line: str
    alerts: tuple[str, ...]
    exit_code: int | None = None
    reason: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


def ended_job(stored: LedgerRow) -> EndedJob | None:
    """Return an ended job from its record in the store; None if the record is damaged."""
    try:
        ledger = JobLedger.from_json(stored.ledger)
    except ValueError:
        return None
    ended = next(((ns, state) for ns, state in ledger.states if state.is_terminal), None)
    running_ns = next((ns for ns, state in ledger.states if state is JobState.RUNNING), None)
    if ended is None:
        ended = ledger.last_line_ns or ledger.first_seen_ns, JobState.UNKNOWN
    ending = ledger.ending or Ending()
    return EndedJob(
        identity=stored.identity,
        job_id=stored.job_id,
        name=stored.name,
        state=ended[1],
        started_ns=ending.started_ns or ledger.first_line_ns or running_ns,
        ended_ns=ending.finished_ns or ledger.last_line_ns if ledger.last_line_ns and running_ns is None else ended[0],
        lines=ledger.lines,
        last_line=ledger.last_line,
        alerts=tuple(dict.fromkeys(kind for _, kind in ledger.alerts)),
        exit_code=ending.exit_code,
        reason=_reason(ended[1], ending, ledger.failure),
        attributes=ending.attributes,
    )


def _reason(state: JobState, ending: Ending, failure: Failure | None) -> str:
    if state in (JobState.SUCCEEDED, JobState.CANCELED, JobState.UNKNOWN) or not (ending.error or failure):
        return ""
    status = JobStatus.from_state(state, job_id="", job_name="", identity="", trace_id="", error=ending.error or None)
    return failure_text(status, failure).split("\n")[0][:_REASON_CHARS]


class EndedJobs:
    """The newest ended jobs, in the order of the store's keys.

    Args:
        stored: The jobs of the checkpoint store.
        late_keys: How far behind the newest key one may become visible: several agents write into one database.
    """

    def __init__(self, stored: StoredLedgers, *, late_keys: int = 0) -> None:
        self._stored = stored
        self._late_keys = late_keys
        self._jobs: dict[int, EndedJob] = {}
        self._open: dict[int, tuple[str, str]] = {}
        self._newest: int | None = None

    @property
    def newest(self) -> Collection[EndedJob]:
        """The newest ended jobs at the last `refresh`, unordered."""
        return self._jobs.values()

    async def refresh(self, followed: Set[tuple[str, str]]) -> None:
        """Read the jobs that have ended since the last call.

        Args:
            followed: Identity and id of the followed jobs, which have not ended.

        Raises:
            CheckpointError: The store cannot be read now.
        """
        if self._newest is None:
            self._newest = await self._stored.newest_key() - MAX_ENDED_JOBS
        after = self._newest - self._late_keys
        while rows := await self._stored.after(after, _CHUNK_ROWS):
            after = self._newest = rows[-1].key
            self._take([row for row in rows if row.key not in self._jobs and row.key not in self._open])
            if len(rows) < _CHUNK_ROWS:
                break
            await asyncio.sleep(0)  # let the relay work between two chunks
        gone = [key for key, job in self._open.items() if job not in followed]
        for start in range(0, len(gone), _CHUNK_ROWS):
            self._take(await self._stored.by_key(gone[start : start + _CHUNK_ROWS]))
            await asyncio.sleep(0)
        for key in sorted(self._jobs)[: max(0, len(self._jobs) - MAX_ENDED_JOBS)]:
            del self._jobs[key]

    def _take(self, rows: list[LedgerRow]) -> None:
        for stored in rows:
            if not stored.ended:
                self._open[stored.key] = stored.identity, stored.job_id
                continue
            self._open.pop(stored.key, None)
            job = ended_job(stored)
            if job is not None:
                self._jobs[stored.key] = job
