"""What a job is: its states, its status, a row of a listing, and its tasks. Data only."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeAlias

from tailspan._identity import check_job_id
from tailspan.errors import ConfigError

__all__ = [
    "TASK_RESULTS",
    "CoerceableToJobId",
    "JobState",
    "JobStatus",
    "ListedJob",
    "TaskRun",
    "fused_state",
    "job_id_of",
]


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

    # An enum's own hash, of its name, is computed in Python: many times for each job. The names are the values.
    __hash__ = str.__hash__

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

    ``job_status`` and ``finished_job_status`` are about the job and win; ``status`` and ``terminal_status`` are about
    the instance that runs it. The booleans decide about an unknown string.

    Source: wire facts measured on the fused clients 1.1.2 to 2.9.5; other status strings are unknown.
    """
    known = _BY_JOB_STATUS.get((job_status or "").lower())
    if known is not None and (known.is_terminal or not (finished_job_status or terminal_status)):
        return known
    if finished_job_status or terminal_status:
        # Ended with an unknown word, or the instance is gone: only "Done" is known to mean success.
        return JobState.FAILED
    return {"running": JobState.RUNNING, "pending": JobState.PENDING}.get(status.lower(), JobState.UNKNOWN)


# What a repr leaves out: implied by the state, or only of use to the agent.
_NOT_SHOWN = {
    "status",
    "terminal_status",
    "job_status",
    "job_status_date",
    "finished_job_status",
    "details",
    "parent",
    "retry_of",
    "identity",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class JobStatus:
    """The status of one job as a service reports it: the twelve fields of the Fused API, and ours.

    `tailspan.RunResponse` is a status with the verbs as methods. Two statuses are equal if all their fields are; the
    hash is that of the job, so that statuses and their jobs can be members of sets and keys of dicts.

    Attributes:
        job_id: The id of this job at its service.
        job_name: Its name (the pipeline); ``service.name`` of its telemetry.
        instance_id: The machine that runs it, if the service reports it.
        instance_type: The type of that machine.
        status: The status of the *instance*, in the service's own words.
        terminal_status: Whether the instance has ended.
        last_heartbeat: Time of the job's last sign of life (aware UTC).
        job_status: The status of the *job*, in the service's own words.
        job_status_date: When ``job_status`` last changed (aware UTC).
        finished_job_status: Whether the job has ended.
        total_tasks: Number of the job's tasks; 0 when it does not count them.
        finished_tasks: Number of ended tasks.
        state: What all of that means.
        submitted_at: When the service accepted the job (aware UTC).
        started_at: When it began to execute (aware UTC).
        finished_at: When it ended (aware UTC).
        exit_code: The exit code of its main process; 128 + n after signal n.
        error: Why it did not succeed, in one sentence.
        attributes: What the user attached at submit; on the job's logs and spans.
        details: For the run span only, by semantic-convention name (``process.command``, ``host.name``, ...).
        parent: The W3C traceparent in the environment that the job was started from; becomes a span link.
        url: The job's page at its service.
        service: The name of the configured service that answered.
        identity: What the job's ids are hashed from: the identity of the service where the job really runs.
        attempt: 1 unless the service reports retries of one job.
        retry_of: The id of the job of the previous attempt, at a service where each attempt is a job of its own; None:
            all attempts have this job's id.
        trace_id: The trace that the agent gives this job: deterministic, known before the agent ran.
        logs_complete: True when the service marks that no further line will come. False on an ended job when all lines
            of its main process are readable and a background process may print more. None when it reports neither.
        stale: True when the service did not answer and this is its last known answer.
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
    retry_of: str | None = None
    trace_id: str
    logs_complete: bool | None = None
    stale: bool = False
    _origin: object | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), _public_fields(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, JobStatus):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _STATUS_FIELDS)

    def __hash__(self) -> int:
        return hash((self.identity, self.job_id))

    def __repr__(self) -> str:
        return _short_repr(self)

    @classmethod
    def from_state(cls, state: JobState, **fields: Any) -> Self:
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


_STATUS_FIELDS = tuple(one.name for one in dataclasses.fields(JobStatus) if not one.name.startswith("_"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ListedJob:
    """One row of a service's list. What the list does not report is None.

    Attributes:
        job_id: The id of the job at its service.
        job_name: Its name; the Fused list has none.
        state: Its state as far as the row shows it.
        created_at: When the job was made (aware UTC).
        state_since: When its state last changed (aware UTC).
        instance_id: The machine that runs it.
        instance_type: The type of that machine.
        service: The name of the configured service that answered.
        lines: Number of lines in its log, where the list has it: saves a request per silent job.
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
    _origin: object | None = dataclasses.field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), _public_fields(self))

    def __repr__(self) -> str:
        return _short_repr(self)


TASK_RESULTS = ("success", "failure", "error", "timeout", "cancellation", "skip")
"""The results of a task run. Source: OpenTelemetry semantic conventions 1.44.0, ``cicd.pipeline.task.run.result``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """One attempt of one task of a job: what the service starts for a job, as a job is what a user starts.

    Attributes:
        task_id: The task's id, unique within the job, and the same at each request and attempt.
        name: The task's name, which its runs have in common: the name of its span.
        attempt: 1 for the first attempt.
        result: How it ended, one of `TASK_RESULTS`; None before its end.
        submitted_at: When it was queued (aware UTC).
        started_at: When it began to execute (aware UTC).
        finished_at: When it ended (aware UTC).
        exit_code: The exit code of its main process.
        error: Why it did not succeed, in one sentence.
        url: Its page at the service.
        instance_id: The machine that ran it.
        parent: The id of the task that it is part of; None for a task of the job itself.
        after: The ids of the tasks that it waited for.
    """

    task_id: str
    name: str
    attempt: int = 1
    result: str | None = None
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    error: str | None = None
    url: str | None = None
    instance_id: str | None = None
    parent: str | None = None
    after: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the attempt within its job: the task's id, and the attempt."""
        return self.task_id, self.attempt

    @property
    def ended(self) -> bool:
        """Whether this attempt has ended."""
        return self.result is not None

    @property
    def failed(self) -> bool:
        """Whether it ended without success, and was neither canceled nor skipped."""
        return self.result in ("failure", "error", "timeout")

    @property
    def duration(self) -> timedelta | None:
        """Time from start to end; so far, while it runs; None before it started."""
        if self.started_at is None:
            return None
        return max(timedelta(0), (self.finished_at or datetime.now(UTC)) - self.started_at)


def _public_fields(job: JobStatus | ListedJob) -> dict[str, Any]:
    """Return a job's fields for another process: the service holds connections, but its name leads back to it there."""
    return {one.name: getattr(job, one.name) for one in dataclasses.fields(job) if not one.name.startswith("_")}


def _unpickle(kind: type[JobStatus | ListedJob], fields: Mapping[str, Any]) -> JobStatus | ListedJob:
    return kind(**fields)


def _short_repr(job: JobStatus | ListedJob) -> str:
    """Return the fields that are set, in order."""
    shown = []
    for one in dataclasses.fields(job):
        value = getattr(job, one.name)
        if one.name in _NOT_SHOWN or one.name.startswith("_") or value == one.default or value == {}:
            continue
        if isinstance(value, datetime):
            value = value.isoformat()
        shown.append(f"{one.name}={value if isinstance(value, JobState) else repr(value)}")
    return f"{type(job).__name__}({', '.join(shown)})"


CoerceableToJobId: TypeAlias = str | JobStatus | ListedJob
"""What every verb takes as ``job``: a job id, a status, or a row of a listing."""


def job_id_of(job: CoerceableToJobId) -> str:
    """Return the id of the ``job`` argument of a verb.

    Raises:
        ConfigError: It names no job.
    """
    if isinstance(job, JobStatus | ListedJob):
        return job.job_id
    if isinstance(job, str):
        return check_job_id(job)
    # Callers without a type checker do pass other things.
    raise ConfigError(
        f"job is of type {type(job).__name__}: expected a job id, a RunResponse or a row of job_list", key="job"
    )
