"""What a job's files say of it, as status and as row of a listing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from tailspan._identity import is_trace_id, trace_id
from tailspan._times import time_of
from tailspan.errors import CursorExpiredError, ProtocolError
from tailspan.local.reader import LogReader, Totals
from tailspan.local.store import StoredJob, submitted_at_of
from tailspan.models import JobState, JobStatus, ListedJob

__all__ = ["quick_totals", "row_of", "status_of", "totals_of"]


class Owner(Protocol):
    """The service that a job belongs to."""

    name: str

    @property
    def identity(self) -> str:
        """The identity of the state directory; read from disk at first use."""
        ...


def status_of(job: StoredJob, service: Owner) -> JobStatus:
    """Return the status that a job's files record.

    Args:
        job: What its files say.
        service: The service that has it.
    """
    spec, recorded, state = job.spec, job.recorded, job.state
    finished, error = time_of(recorded.get("finished_at")), recorded.get("error")
    alive = job.last_sign_of_life
    if state is JobState.LOST:
        finished, error = _lost(job, alive)
    # Interned is what thousands of jobs have in common.
    identity, host = sys.intern(spec.get("identity") or service.identity), spec.get("host")
    stored_trace = spec.get("trace_id", "")
    attempt = spec.get("attempt", 1)
    return JobStatus.from_state(
        state,
        job_id=job.job_id,
        job_name=sys.intern(job.name),
        instance_id=host and sys.intern(host),
        last_heartbeat=alive,
        submitted_at=time_of(spec.get("submitted_at")) or submitted_at_of(job.job_id),
        started_at=time_of(recorded.get("started_at")),
        finished_at=finished,
        exit_code=recorded.get("exit_code"),
        error=error,
        attributes={key: value for key, value in spec.get("attributes", {}).items() if isinstance(value, str)},
        details=_details(spec),
        parent=spec.get("parent"),
        service=service.name,
        identity=identity,
        attempt=attempt,
        retry_of=spec.get("retry_of"),
        trace_id=stored_trace if is_trace_id(stored_trace) else trace_id(identity, job.job_id, attempt),
        logs_complete=job.logs_complete,
    )


def row_of(job: StoredJob, service: Owner) -> ListedJob:
    """Return the row of a listing from a job's files; see `status_of`."""
    return ListedJob(
        job_id=job.job_id,
        job_name=sys.intern(job.name),
        state=job.state,
        created_at=submitted_at_of(job.job_id),
        state_since=time_of(job.recorded.get("finished_at") or job.recorded.get("started_at")),
        service=service.name,
        lines=_lines(job),
    )


def totals_of(job: StoredJob) -> Totals:
    """Return count and times of a job's lines, from its index."""
    with LogReader(job.place, job.job_id, ended=job.logs_complete) as reader:
        return reader.totals()


def _lines(job: StoredJob) -> int | None:
    """Return how many lines a job has; None when that cannot be read, which must not hide the other jobs."""
    # What a supervisor wrote down at the end of the log is cheaper than the index.
    if {"end", "lines"} <= job.recorded.keys():
        return int(job.recorded["lines"])
    totals = quick_totals(job)
    return totals and totals.lines


def quick_totals(job: StoredJob) -> Totals | None:
    """Return count and times of a job's lines; None if they cannot be read, or not within a millisecond."""
    try:
        with LogReader(job.place, job.job_id, ended=job.logs_complete) as reader:
            return reader.totals() if reader.is_plain else None
    except (CursorExpiredError, ProtocolError, PermissionError):
        return None


def _lost(job: StoredJob, alive: datetime | None) -> tuple[datetime | None, str]:
    """Return when a lost job was last seen alive, and what is known of its end."""
    totals = quick_totals(job)
    last_ns = totals.last_unix_nano if totals else 0
    last_line = datetime.fromtimestamp(last_ns / 1e9, UTC) if last_ns else None
    seen = max((moment for moment in (alive, last_line) if moment), default=None)
    if (job.directory / "supervisor.err").exists():
        return seen, f"its supervisor failed; see {job.directory / 'supervisor.err'}"
    return seen, "its supervisor was killed, or the machine went down: how the command ended is not known"


def _details(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return facts for the run span.

    Source: OpenTelemetry semantic conventions 1.44.0, process and host attributes.
    """
    command = [str(argument) for argument in spec.get("command", [])]
    details = {
        "process.command": command[0] if command else "",
        "process.command_line": shlex.join(command),
        "process.working_directory": spec.get("cwd") or "",
        "process.owner": spec.get("user") or "",
        "host.name": spec.get("host") or "",
    }
    return {key: sys.intern(value) for key, value in details.items() if value}
