"""What a job is: its states, its status as `RunResponse`, and a row of a listing."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from tailspan._identity import check_job_id
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.logs.page import Message
    from tailspan.services import JobService

__all__ = ["CoerceableToJobId", "JobState", "ListedJob", "RunResponse", "fused_state", "job_id_of"]


class JobState(enum.StrEnum):
    """The state of a job, whatever its service calls it."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    TIMED_OUT = "TIMED_OUT"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"

    @property
    def is_terminal(self) -> bool:
        """Whether this state cannot change any more."""
        return self in _RESULTS

    @property
    def result(self) -> str | None:
        """The ``cicd.pipeline.result`` of this state; None while the job has not ended.

        Source: OpenTelemetry semantic conventions 1.44.0, CICD attributes.
        """
        return _RESULTS.get(self)


_RESULTS: Mapping[JobState, str] = {
    JobState.SUCCEEDED: "success",
    JobState.FAILED: "failure",
    JobState.CANCELED: "cancellation",
    JobState.TIMED_OUT: "timeout",
    JobState.LOST: "error",
}

# status, terminal_status, job_status, finished_job_status as the Fused clients know them.
_FUSED_FIELDS: Mapping[JobState, tuple[str, bool, str | None, bool | None]] = {
    JobState.PENDING: ("pending", False, "Pending", False),
    JobState.RUNNING: ("running", False, "Running", False),
    JobState.SUCCEEDED: ("terminated", True, "Done", True),
    JobState.FAILED: ("terminated", True, "Failed", True),
    JobState.CANCELED: ("terminated", True, "Canceled", True),
    JobState.TIMED_OUT: ("terminated", True, "Failed", True),
    JobState.LOST: ("terminated", True, "Failed", True),
    JobState.UNKNOWN: ("unknown", False, None, None),
}

_BY_JOB_STATUS: Mapping[str, JobState] = {
    "done": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "canceled": JobState.CANCELED,
    "cancelled": JobState.CANCELED,
    "pending": JobState.PENDING,
    "running": JobState.RUNNING,
}


def fused_state(
    status: str, terminal_status: bool, job_status: str | None, finished_job_status: bool | None
) -> JobState:
    """Return the state that the four status fields of the Fused API mean.

    ``job_status`` and ``finished_job_status`` speak of the job and win; ``status`` and ``terminal_status`` speak of
    the instance that runs it. A string that nobody knows is decided by the booleans.

    Source: shared wire facts measured on the fused clients 1.1.2 to 2.9.5; other status strings are unknown.
    """
    known = _BY_JOB_STATUS.get((job_status or "").lower())
    if known is not None and (known.is_terminal or not (finished_job_status or terminal_status)):
        return known
    if finished_job_status or terminal_status:
        # Ended by a word that we do not know, or the instance is gone: only "Done" is known to be success.
        return JobState.FAILED
    return {"running": JobState.RUNNING, "pending": JobState.PENDING}.get(status.lower(), JobState.UNKNOWN)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunResponse:
    """The status of one job: the twelve fields of the Fused API, and ours.

    Attributes:
        job_id: The id of this job at its service.
        job_name: Its name (the pipeline); ``service.name`` of its telemetry.
        instance_id: The machine that runs it, if the service says so.
        instance_type: The type of that machine.
        status: The status of the *instance*, in the service's own words.
        terminal_status: Whether the instance has ended.
        last_heartbeat: When the job last said that it lives (aware UTC).
        job_status: The status of the *job*, in the service's own words.
        job_status_date: When ``job_status`` last changed (aware UTC).
        finished_job_status: Whether the job has ended.
        total_tasks: How many tasks the job has; 0 when it does not count them.
        finished_tasks: How many of them have ended.
        state: What all of that means.
        submitted_at: When the job was handed to its service (aware UTC).
        started_at: When it began to execute (aware UTC).
        finished_at: When it ended (aware UTC).
        exit_code: The exit code of its main process; 128 + n after signal n.
        error: Why it did not succeed, in one sentence.
        attributes: What the user attached at submit; on the job's logs and spans.
        details: Facts for the run span only, by semantic-convention name (``process.command``, ``host.name``, ...).
        parent: The W3C traceparent that the job was itself started with; becomes a span link.
        url: The job's page at its service.
        service: The name of the configured service that answered.
        identity: What the job's ids are hashed from: the identity of the service where the job really runs.
        attempt: 1 unless the service reports retries of one job.
        trace_id: The trace that the agent gives this job: deterministic, known before the agent ran.
        logs_complete: True when the service marks that no further line will come, False when it says that lines
            may still come, None when it does not say.
        stale: True when the service could not be reached and this is its last known answer.
    """

    job_id: str
    job_name: str
    instance_id: str | None = None
    instance_type: str | None = None
    status: str
    terminal_status: bool
    last_heartbeat: datetime | None = None
    job_status: str | None = None
    job_status_date: datetime | None = None
    finished_job_status: bool | None = None
    total_tasks: int = 0
    finished_tasks: int = 0
    state: JobState
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    error: str | None = None
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parent: str | None = None
    url: str | None = None
    service: str | None = None
    identity: str
    attempt: int = 1
    trace_id: str
    logs_complete: bool | None = None
    stale: bool = False
    origin: JobService | None = dataclasses.field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_origin(self)

    @classmethod
    def from_state(cls, state: JobState, **fields: Any) -> RunResponse:
        """Build a status from our state, filling the Fused status fields to match it.

        Args:
            state: The job's state.
            **fields: Any other field by name; ``job_id``, ``job_name``, ``identity`` and ``trace_id`` are required.

        Returns:
            A status whose twelve Fused fields any published ``fused`` client reads the same way.
        """
        status, terminal_status, job_status, finished = _FUSED_FIELDS[state]
        wire = {
            "status": status,
            "terminal_status": terminal_status,
            "job_status": job_status,
            "job_status_date": fields.get("finished_at") or fields.get("started_at") or fields.get("submitted_at"),
            "finished_job_status": finished,
        }
        return cls(state=state, **{**wire, **fields})

    @property
    def duration(self) -> timedelta | None:
        """Time from start to end; so far, while the job runs; None before it started."""
        if self.started_at is None:
            return None
        return max(timedelta(0), (self.finished_at or datetime.now(UTC)) - self.started_at)

    def get_status(self) -> RunResponse:
        """Fetch this job's status anew; see `tailspan.job_get_status`."""
        from tailspan import jobs

        return jobs.job_get_status(self)

    def get_logs(self, since_ms: int | None = None) -> list[Message]:
        """Fetch this job's lines; see `tailspan.job_get_logs`."""
        from tailspan import jobs

        return jobs.job_get_logs(self, since_ms)

    def print_logs(self, since_ms: int | None = None, file: IO[str] | None = None) -> None:
        """Print this job's lines; see `tailspan.job_print_logs`."""
        from tailspan import jobs

        jobs.job_print_logs(self, since_ms, file)

    def tail_logs(self, refresh_seconds: float = 1, sample_logs: bool = True, timeout: float | None = None) -> None:
        """Print this job's lines as they come; see `tailspan.job_tail_logs`."""
        from tailspan import jobs

        jobs.job_tail_logs(self, refresh_seconds, sample_logs, timeout)

    def get_exec_time(self) -> timedelta:
        """Return the time from first to last line; see `tailspan.job_get_exec_time`."""
        from tailspan import jobs

        return jobs.job_get_exec_time(self)

    def wait_for_job(self, poll_interval_seconds: float = 5, timeout: float | None = None) -> RunResponse:
        """Wait until this job has ended; see `tailspan.job_wait_for_job`."""
        from tailspan import jobs

        return jobs.job_wait_for_job(self, poll_interval_seconds, timeout)

    def cancel(self) -> RunResponse:
        """Cancel this job; see `tailspan.job_cancel`."""
        from tailspan import jobs

        return jobs.job_cancel(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListedJob:
    """One row of a service's list. What the service's list does not say is None.

    Attributes:
        job_id: The id of the job at its service.
        job_name: Its name; the Fused list has none.
        state: Its state as far as the row tells.
        created_at: When the job was made (aware UTC).
        state_since: When its state last changed (aware UTC).
        instance_id: The machine that runs it.
        instance_type: The type of that machine.
        service: The name of the configured service that answered.
        lines: How many lines its log has, where the list says so: saves a request per silent job.
    """

    job_id: str
    job_name: str | None = None
    state: JobState = JobState.UNKNOWN
    created_at: datetime | None = None
    state_since: datetime | None = None
    instance_id: str | None = None
    instance_type: str | None = None
    service: str | None = None
    lines: int | None = None
    origin: JobService | None = dataclasses.field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_origin(self)


def _without_origin(job: RunResponse | ListedJob) -> tuple[Any, ...]:
    """Pickle a job for another process: the service holds connections, but its name leads back to it there."""
    fields = {one.name: getattr(job, one.name) for one in dataclasses.fields(job) if one.name != "origin"}
    return _unpickle, (type(job), fields)


def _unpickle(kind: type[RunResponse | ListedJob], fields: Mapping[str, Any]) -> RunResponse | ListedJob:
    return kind(**fields)


CoerceableToJobId: TypeAlias = str | RunResponse | ListedJob
"""What every verb takes as ``job``: a job id, a status, or a row of a listing."""


def job_id_of(job: CoerceableToJobId) -> str:
    """Return the id of what a verb was given.

    Raises:
        ConfigError: It is none of the things that name a job.
    """
    if isinstance(job, RunResponse | ListedJob):
        return job.job_id
    if isinstance(job, str):
        return check_job_id(job)
    # Callers without a type checker do pass other things.
    raise ConfigError(f"a job is an id or a RunResponse, not {type(job).__name__}")
