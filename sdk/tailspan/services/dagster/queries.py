"""The GraphQL documents of the Dagster service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["EVENTS_A_PAGE", "JOBS", "LAUNCH", "NOTES", "RUN", "RUNS", "TERMINATE", "PieceRequest", "log_query"]

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
