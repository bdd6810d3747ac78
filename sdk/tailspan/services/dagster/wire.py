"""The GraphQL documents of the Dagster service, and the replies as far as they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

__all__ = [
    "EVENTS_A_PAGE",
    "JOBS",
    "LAUNCH",
    "NOTES",
    "RUN",
    "RUNS",
    "TERMINATE",
    "Answer",
    "CapturedLogs",
    "ErrorInfo",
    "Event",
    "Events",
    "PieceRequest",
    "Repositories",
    "Run",
    "Runs",
    "StepStats",
    "log_query",
]

EVENTS_A_PAGE = 1000

_STATUS = "runId jobName status creationTime startTime endTime updateTime parentRunId tags{key value}"

RUNS = (
    "query Runs($cursor: String, $limit: Int!){runsOrError(cursor: $cursor, limit: $limit){__typename "
    "... on Runs{results{runId jobName status creationTime updateTime}} ... on Error{message}}}"
)

RUN = (
    "query Run($id: ID!, $plan: Boolean!){runOrError(runId: $id){__typename "
    f"... on Run{{{_STATUS} "
    "stepStats{stepKey status startTime endTime attempts{startTime endTime} markers{startTime endTime}} "
    "executionPlan @include(if: $plan){steps{key inputs{dependsOn{key}}}}} ... on Error{message}}}"
)

_ERROR = "error{message className stack errorChain{error{message className stack}}}"

NOTES = (
    "query Notes($id: ID!, $after: String, $limit: Int!){logsForRun(runId: $id, afterCursor: $after, limit: $limit){"
    "__typename ... on EventConnection{cursor hasMore events{"
    "... on MessageEvent{timestamp stepKey eventType} ... on RunFailureEvent{message} "
    f"... on ExecutionStepFailureEvent{{{_ERROR}}} ... on ExecutionStepUpForRetryEvent{{{_ERROR}}}}}}} "
    "... on Error{message}}}"
)

_EVENTS = (
    "logsForRun(runId: $id, afterCursor: $after, limit: $limit){__typename "
    "... on EventConnection{cursor hasMore events{"
    "... on MessageEvent{timestamp level stepKey eventType message} ... on LogsCapturedEvent{fileKey stepKeys} "
    f"... on ErrorEvent{{{_ERROR}}}}}}} ... on Error{{message}}}}"
)

TERMINATE = (
    "mutation Terminate($id: String!){terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE){__typename "
    "... on TerminateRunFailure{message} ... on Error{message}}}"
)

JOBS = (
    "query Jobs{repositoriesOrError{__typename ... on RepositoryConnection{nodes{"
    "name location{name} jobs{name}}} ... on Error{message}}}"
)

LAUNCH = (
    "mutation Launch($params: ExecutionParams!){launchRun(executionParams: $params){__typename "
    "... on LaunchRunSuccess{run{runId}} ... on RunConfigValidationInvalid{errors{message}} ... on Error{message}}}"
)


class Answer(msgspec.Struct, rename="camel"):
    """What every reply has; errors are replies, with a type of their own."""

    typename: str | None = msgspec.field(default=None, name="__typename")
    message: str | None = None
    errors: list[Answer] = []
    run: _RunId | None = None


class _RunId(msgspec.Struct, rename="camel"):
    run_id: str


class ErrorInfo(msgspec.Struct, rename="camel"):
    """A Python exception."""

    message: str | None = None
    class_name: str | None = None
    stack: list[str] = []
    error_chain: list[_ErrorLink] = []

    @property
    def text(self) -> str:
        """The exception as Python prints it, without its stack."""
        return (self.message or self.class_name or "").rstrip("\n")

    def chain(self) -> Iterator[ErrorInfo]:
        """Yield the exception, then its causes."""
        yield self
        for link in self.error_chain:
            yield link.error


class _ErrorLink(msgspec.Struct):
    error: ErrorInfo


class Event(msgspec.Struct, rename="camel"):
    """An event of a run; `timestamp` is in ms since the epoch."""

    timestamp: int
    level: str | None = None
    step_key: str | None = None
    event_type: str | None = None
    message: str | None = None
    file_key: str | None = None
    step_keys: list[str] = []
    error: ErrorInfo | None = None


class Events(Answer, rename="camel"):
    """A page of events."""

    cursor: str | None = None
    has_more: bool = False
    events: list[Event] = []


class _Times(msgspec.Struct, rename="camel"):
    start_time: float | None = None
    end_time: float | None = None


class StepStats(msgspec.Struct, rename="camel"):
    """What became of a step; `attempts` are those that have ended, `markers` what happened around them."""

    step_key: str
    status: str | None = None
    start_time: float | None = None
    end_time: float | None = None
    attempts: list[_Times] = []
    markers: list[_Times] = []


class _Key(msgspec.Struct):
    key: str


class _Input(msgspec.Struct, rename="camel"):
    depends_on: list[_Key] = []


class _Step(msgspec.Struct):
    key: str
    inputs: list[_Input] = []


class _Plan(msgspec.Struct):
    steps: list[_Step] = []


class _Tag(msgspec.Struct):
    key: str
    value: str


class Run(Answer, rename="camel", kw_only=True):
    """A run; times are in seconds since the epoch."""

    run_id: str
    job_name: str
    status: str
    creation_time: float | None = None
    start_time: float | None = None
    end_time: float | None = None
    update_time: float | None = None
    parent_run_id: str | None = None
    tags: list[_Tag] = []
    step_stats: list[StepStats] = []
    execution_plan: _Plan | None = None


class Runs(Answer):
    """A page of runs."""

    results: list[Run] = []


class _Named(msgspec.Struct):
    name: str


class _Repository(msgspec.Struct):
    name: str
    location: _Named
    jobs: list[_Named] = []


class Repositories(Answer):
    """The repositories of all code locations."""

    nodes: list[_Repository] = []


class CapturedLogs(msgspec.Struct):
    """What a process has printed; the cursor is the end of both streams in bytes, such as ``14:200``."""

    stdout: str | None = None
    stderr: str | None = None
    cursor: str | None = None


class PieceRequest(NamedTuple):
    """A request for what a process has printed.

    Attributes:
        key: The key of its file.
        stdout: From which byte of its stdout on.
        stderr: From which byte of its stderr on.
    """

    key: str
    stdout: int
    stderr: int


def log_query(
    job_id: str, after: str | None, pieces: Sequence[PieceRequest], limit: int, *, events: bool
) -> tuple[str, Mapping[str, Any]]:
    """Return the document and variables of one request for events and for what several processes have printed.

    Args:
        job_id: The run.
        after: The cursor before the events.
        pieces: From where to read what was printed; the reply has them as ``piece0``, ``piece1`` ...
        limit: Bytes of each stream of each process, at most.
        events: Whether to request events.
    """
    variables: dict[str, Any] = {}
    names, fields = [], []
    for place, piece in enumerate(pieces):
        names += [f"$key{place}: [String!]!", f"$from{place}: String!"]
        variables[f"key{place}"] = [job_id, "compute_logs", piece.key]
        variables[f"from{place}"] = f"{piece.stdout}:{piece.stderr}"
        arguments = f"logKey: $key{place}, cursor: $from{place}, limit: $bytes"
        fields.append(f"piece{place}: capturedLogs({arguments}){{stdout stderr cursor}}")
    if pieces:
        names.append("$bytes: Int!")
        variables["bytes"] = limit
    if events:
        names += ["$id: ID!", "$after: String", "$limit: Int!"]
        variables |= {"id": job_id, "after": after, "limit": EVENTS_A_PAGE}
        fields.append(_EVENTS)
    return f"query Log({', '.join(names)}){{{' '.join(fields)}}}", variables
