"""`BatchService`: the jobs of AWS Batch, with their containers as tasks.

Each child of an array is a job of its own, linked to the array. Each attempt of a container has its own log stream. The
nodes of a multi-node job are its tasks.

Source: the model of Batch in botocore 1.44.8; the texts of reasons: AWS Batch user guide, "Job timeouts", "Automated
job retries".
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Literal, NamedTuple

from tailspan._identity import span_id, trace_id
from tailspan._times import time_of_ms
from tailspan.errors import AuthError, ConfigError, JobNotFoundError
from tailspan.logs.page import TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import Problem, SubmitService
from tailspan.services._http_service import drop_oldest
from tailspan.services.aws.logs import LogStream
from tailspan.services.aws.requests import BATCH, Api, AwsOptions, account_of, console_of
from tailspan.services.aws.service import AwsService, Described, stream_url

__all__ = ["BatchOptions", "BatchService"]

_GROUP = "/aws/batch/job"
_NO_JOB = "00000000-0000-0000-0000-000000000000"
_ROWS = 100  # the most with a filter
_CHILD_ROWS = 1000
_QUEUES_S = 300.0
_CHILDREN_S = 30.0
_MOST_ARRAYS = 1_000
_MOST_NODES = 1_000

_STATES: Mapping[str, JobState] = {
    "SUBMITTED": JobState.PENDING,
    "PENDING": JobState.PENDING,
    "RUNNABLE": JobState.PENDING,
    "STARTING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
}
_RESULTS: Mapping[JobState, str] = {
    JobState.CANCELED: "cancellation",
    JobState.TIMED_OUT: "timeout",
    JobState.LOST: "error",
}


class BatchOptions(AwsOptions):
    """The table ``services.NAME`` of type ``aws_batch``.

    Attributes:
        job_queues: Names or ARNs of the queues whose jobs are listed; empty: all queues of the region.
        name_by: What a job's name is: the name it was submitted with, or that of its job definition.
    """

    job_queues: tuple[str, ...] = ()
    name_by: Literal["job", "definition"] = "job"


class _Children(NamedTuple):
    """The children of an array.

    Attributes:
        shown: What the row of the array showed of them.
        at_s: When they were listed, by the monotonic clock.
        rows: Their rows.
    """

    shown: str
    at_s: float
    rows: list[ListedJob]


class _BatchAttempt(NamedTuple):
    """An attempt of a container.

    Attributes:
        number: From 1.
        container: Its details in the attempt: ``exitCode``, ``reason``, ``logStreamName``.
        owner: The object that has ``startedAt``, ``stoppedAt`` and ``statusReason``.
        settings: The container's settings, with ``logConfiguration``.
        name: The container's name.
        is_last: Whether there is no later one.
    """

    number: int
    container: Mapping[str, Any]
    owner: Mapping[str, Any]
    settings: Mapping[str, Any]
    name: str
    is_last: bool


class BatchService(AwsService, SubmitService):
    """The jobs of AWS Batch in one region; see the module."""

    Options = BatchOptions
    api: ClassVar[Api] = BATCH

    def __init__(self, name: str, options: AwsOptions, *, region: str, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, region=region, environ=environ)
        self._queues: tuple[float, tuple[str, ...]] = float("-inf"), ()
        self._arrays: dict[str, _Children] = {}

    @property
    def _batch(self) -> BatchOptions:
        assert isinstance(self.options, BatchOptions)
        return self.options

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs of the queues, newest first, each array before its children."""
        with self._reading("a list of jobs"):
            async with aclosing(self._pages()) as pages:
                async for page in pages:
                    yield page

    async def _pages(self) -> AsyncGenerator[list[ListedJob], None]:
        listings = [_QueueListing(self, queue) for queue in await self._job_queues()]
        for listing in listings:
            await listing.fill()
        while open_ones := [listing for listing in listings if listing.rows]:
            # Of several queues, the rows down to the newest row that a further page may precede.
            floor_ms = max((one.rows[-1]["createdAt"] for one in open_ones if one.token), default=0)
            rows = [row for one in open_ones for row in one.take(floor_ms)]
            rows.sort(key=lambda row: row["createdAt"], reverse=True)
            page = [listed for row in rows async for listed in self._with_children(row)]
            if page:
                yield page
            for one in open_ones:
                if not one.rows:
                    await one.fill()

    async def cancel(self, job_id: str) -> JobStatus:
        """Terminate a job, whatever its state; an ended one stays as it is. An array ends with all its children."""
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        requests = await self._open()
        body = {"jobId": job_id, "reason": "canceled by tailspan"}
        await requests.call("TerminateJob", body, job_id=job_id, reads=False)
        return await self.get_job(job_id)

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Submit a job of a job definition.

        Args:
            command: ``DEFINITION`` or ``QUEUE/DEFINITION``, then the command of the container, if it is not that of the
                definition. The queue is needed unless there is only one.
            name: The name of the job; by default that of the definition.
            attributes: Become tags.
            timeout_s: Limit for each attempt, in seconds; at least 60.
            cwd: Not possible: the definition has it.
            env: Environment of the container.

        Raises:
            ConfigError: There are several queues and none is named, or an argument is not possible.
        """
        queue, _, definition = command[0].rpartition("/")
        if cwd is not None:
            raise ConfigError("AWS Batch takes no cwd: set it in the image or the job definition")
        if not queue:
            queues = await self._job_queues()
            if len(queues) != 1:
                raise ConfigError("the command of a job of AWS Batch is QUEUE/DEFINITION, then the container's command")
            queue = queues[0]
        overrides: dict[str, Any] = {"command": list(command[1:])} if command[1:] else {}
        if env:
            overrides["environment"] = [{"name": key, "value": value} for key, value in env.items()]
        body: dict[str, Any] = {
            "jobName": name or _definition_name(definition),
            "jobQueue": queue,
            "jobDefinition": definition,
        }
        body |= {"containerOverrides": overrides} if overrides else {}
        body |= {"tags": dict(attributes)} if attributes else {}
        body |= {"timeout": {"attemptDurationSeconds": round(timeout_s)}} if timeout_s is not None else {}
        reply = await (await self._open()).call("SubmitJob", body, reads=False)
        # The next request may reach a server that does not have the job yet.
        with self._reading("the reply to SubmitJob"):
            job_id = str(reply.body["jobId"])
        return await self.status_after_submit(job_id, job_name=body["jobName"])

    async def find_problems(self) -> Sequence[Problem]:
        """Return the rights that are missing to describe jobs and to read their lines."""
        problems: list[Problem] = []
        try:
            await self._jobs([_NO_JOB])
        except AuthError as error:
            problems.append(Problem(str(error), is_fatal=True))
        try:
            body = {"logGroupName": _GROUP, "logStreamNames": [_NO_JOB], "startTime": 0, "limit": 1}
            await (await self._logs_of(self.region)).call("FilterLogEvents", body)
        except AuthError as error:
            # The jobs may have other log groups.
            problems.append(Problem(f"log group {_GROUP}: {error}", is_fatal=False))
        except JobNotFoundError:
            pass
        return problems

    async def list_rows(self, **parameters: Any) -> tuple[list[dict[str, Any]], str | None]:
        """Return the rows of a page of jobs, and the token of the next page."""
        reply = await (await self._open()).call("ListJobs", parameters)
        rows = [row for row in reply.body.get("jobSummaryList") or [] if isinstance(row.get("jobId"), str)]
        return rows, reply.body.get("nextToken")

    async def _job_queues(self) -> tuple[str, ...]:
        if self._batch.job_queues:
            return self._batch.job_queues
        at_s, known = self._queues
        if time.monotonic() - at_s < _QUEUES_S:
            return known
        found: list[str] = []
        token: str | None = None
        while True:
            body = {"nextToken": token} if token else {}
            reply = (await (await self._open()).call("DescribeJobQueues", body)).body
            with self._reading("the list of job queues"):
                found += [str(queue["jobQueueName"]) for queue in reply.get("jobQueues") or []]
            token = reply.get("nextToken")
            if not token:
                break
        self._queues = time.monotonic(), tuple(found)
        return self._queues[1]

    async def _with_children(self, row: Mapping[str, Any]) -> AsyncGenerator[ListedJob, None]:
        """Yield a row, and those of its children if it is an array."""
        yield self._row(row)
        array = row.get("arrayProperties") or {}
        if not array.get("size"):
            return
        job_id, summary = row["jobId"], array.get("statusSummary")
        shown, now_s = f"{row.get('status')} {summary}", time.monotonic()
        known = self._arrays.get(job_id)
        # A child that ends changes the numbers; without numbers, its array has to be listed again now and then.
        is_counted = summary is not None or row.get("status") in ("SUCCEEDED", "FAILED")
        if known is None or known.shown != shown or (not is_counted and now_s - known.at_s > _CHILDREN_S):
            known = _Children(shown, now_s, await self._children(job_id, summary))
            self._arrays.pop(job_id, None)
            self._arrays[job_id] = known
            drop_oldest(self._arrays, _MOST_ARRAYS)
        for child in known.rows:
            yield child

    async def _children(self, array_id: str, summary: Mapping[str, int] | None) -> list[ListedJob]:
        """Return the rows of the children of an array: one request for each state that some of them have."""
        rows: dict[str, ListedJob] = {}
        for state in _STATES:
            if summary and not summary.get(state):
                continue
            token: str | None = None
            while True:
                more = {"nextToken": token} if token else {}
                found, token = await self.list_rows(
                    arrayJobId=array_id, jobStatus=state, maxResults=_CHILD_ROWS, **more
                )
                # A child that changes its state meanwhile is in two lists; the later state is right.
                rows |= {row["jobId"]: self._row(row) for row in found}
                if not token:
                    break
        return list(rows.values())

    def _row(self, row: Mapping[str, Any]) -> ListedJob:
        since = row.get("stoppedAt") or row.get("startedAt") or row.get("createdAt")
        return ListedJob(
            job_id=row["jobId"],
            job_name=self._name(row),
            state=_state(row),
            created_at=time_of_ms(row.get("createdAt")),
            state_since=time_of_ms(since),
            service=self.name,
        )

    def _name(self, job: Mapping[str, Any]) -> str:
        definition = _definition_name(job.get("jobDefinition") or "")
        return (definition if self._batch.name_by == "definition" else "") or job.get("jobName") or job["jobId"]

    async def _describe_ids(self, job_ids: Sequence[str]) -> Mapping[str, Described]:
        jobs = await self._jobs(job_ids)
        nodes = {
            f"{job['jobId']}#{index}"
            for job in jobs.values()
            for index in range(min(_nodes_of(job), _MOST_NODES))
            if "#" not in job["jobId"]
        }
        details = await self._jobs(sorted(nodes))
        return {job_id: self._described(job, details) for job_id, job in jobs.items()}

    async def _jobs(self, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(job_ids), self._most_described):
            body = {"jobs": list(job_ids[start : start + self._most_described])}
            reply = await (await self._open()).call("DescribeJobs", body)
            with self._reading("the reply to DescribeJobs"):
                found |= {job["jobId"]: job for job in reply.body["jobs"] if isinstance(job.get("jobId"), str)}
        return found

    def _described(self, job: Mapping[str, Any], details: Mapping[str, Mapping[str, Any]]) -> Described:
        tasks: list[TaskRun] = []
        streams: list[LogStream] = []
        parts = [("", job)]
        if nodes := _nodes_of(job):
            named = [(index, details.get(f"{job['jobId']}#{index}")) for index in range(nodes)]
            parts = [(f"node {index}", node) for index, node in named if node is not None]
        for label, part in parts:
            for attempt in _attempts(part):
                task, stream = self._task(part, attempt, label)
                tasks.append(task)
                streams += [stream] if stream is not None else []
        tasks.sort(key=lambda task: (task.started_at is None, task.started_at, task.attempt))
        return Described(self._status(job, tasks), tuple(tasks), tuple(streams))

    def _task(self, job: Mapping[str, Any], attempt: _BatchAttempt, label: str) -> tuple[TaskRun, LogStream | None]:
        owner, container = attempt.owner, attempt.container
        state = _state(job)
        stopped = owner.get("stoppedAt")
        if stopped is None and attempt.is_last and state.is_terminal:
            stopped = job.get("stoppedAt")
        task_id = f"{label}/{attempt.name}" if label else attempt.name
        ref = TaskRef(task_id, attempt.name, attempt.number)
        ended = stopped is not None or (state.is_terminal and attempt.is_last)
        result = _result(attempt, state) if ended else None
        began = owner.get("startedAt") or job.get("createdAt") or 0
        stream = self._stream(attempt, ref, began, stopped if ended else None)
        task = TaskRun(
            task_id=task_id,
            name=attempt.name,
            attempt=attempt.number,
            result=result,
            submitted_at=time_of_ms(job.get("createdAt")) if attempt.number == 1 else None,
            started_at=time_of_ms(owner.get("startedAt")),
            finished_at=time_of_ms(stopped) if result else None,
            exit_code=container.get("exitCode"),
            error=_reason(container, owner) if result not in (None, "success") else None,
            url=stream_url(stream.region, stream.group, stream.name) if stream else None,
            instance_id=_last_part(container.get("containerInstanceArn")),
        )
        return task, stream

    def _stream(self, attempt: _BatchAttempt, task: TaskRef, began_ms: int, ended_ms: int | None) -> LogStream | None:
        name = attempt.container.get("logStreamName")
        settings = attempt.settings.get("logConfiguration") or {}
        if not name or settings.get("logDriver", "awslogs") != "awslogs":
            return None
        options = settings.get("options") or {}
        region, group = options.get("awslogs-region"), options.get("awslogs-group")
        return LogStream(region or self.region, group or _GROUP, name, task, began_ms, ended_ms)

    def _status(self, job: Mapping[str, Any], tasks: Sequence[TaskRun]) -> JobStatus:
        job_id, state, container = job["jobId"], _state(job), job.get("container") or {}
        array = job.get("arrayProperties") or {}
        newest = {task.task_id: task for task in tasks}
        total, finished = len(newest), sum(task.ended for task in newest.values())
        if array.get("size"):
            summary = array.get("statusSummary") or {}
            total, finished = array["size"], summary.get("SUCCEEDED", 0) + summary.get("FAILED", 0)
        started = [task.started_at for task in tasks if task.started_at is not None]
        reason = _reason(container, job)
        return self.make_status(
            job_id,
            state,
            job_name=self._name(job),
            instance_id=_last_part(container.get("containerInstanceArn")),
            submitted_at=time_of_ms(job.get("createdAt")),
            started_at=min(started, default=time_of_ms(job.get("startedAt"))),
            finished_at=time_of_ms(job.get("stoppedAt")) if state.is_terminal else None,
            job_status=job.get("status"),
            exit_code=container.get("exitCode") if state.is_terminal else None,
            error=reason if state not in (JobState.RUNNING, JobState.SUCCEEDED) else None,
            attributes={str(key): str(value) for key, value in (job.get("tags") or {}).items()},
            details=self._details(job),
            parent=self._parent(job),
            url=f"{console_of(self.region)}/batch/home?region={self.region}#jobs/detail/{job_id}",
            total_tasks=total,
            finished_tasks=finished,
        )

    def _details(self, job: Mapping[str, Any]) -> dict[str, str]:
        container, array = job.get("container") or {}, job.get("arrayProperties") or {}
        driver = (container.get("logConfiguration") or {}).get("logDriver", "awslogs")
        found = {
            "cloud.provider": "aws",
            "cloud.region": self.region,
            "cloud.account.id": account_of(job.get("jobArn") or ""),
            "aws.batch.job.queue": _last_part(job.get("jobQueue")),
            "aws.batch.job.definition": _last_part(job.get("jobDefinition")),
            "aws.batch.job.array.index": str(array["index"]) if "index" in array else None,
            "aws.batch.job.log_driver": driver if driver != "awslogs" else None,
            "aws.ecs.task.arn": container.get("taskArn"),
        }
        return {key: value for key, value in found.items() if value}

    def _parent(self, job: Mapping[str, Any]) -> str | None:
        """Return what the run span links to: the span that submitted it, its array, or the job that it waited for."""
        environment = (job.get("container") or {}).get("environment") or []
        given = next((one.get("value") for one in environment if one.get("name") == "TRACEPARENT"), None)
        if given:
            return str(given)
        job_id, array = job["jobId"], job.get("arrayProperties") or {}
        others = [one.get("jobId") for one in job.get("dependsOn") or [] if one.get("jobId")]
        linked = job_id.rpartition(":")[0] if "index" in array else next(iter(others), None)
        if not linked:
            return None
        return f"00-{trace_id(self.identity, linked)}-{span_id(self.identity, linked, 'run')}-01"


class _QueueListing:
    """The list of one queue, read as far as needed.

    Attributes:
        rows: Rows that were read and not taken, newest first.
        token: The token of the next page; None after the last one.
    """

    def __init__(self, service: BatchService, queue: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.token: str | None = ""
        self._service = service
        self._queue = queue

    async def fill(self) -> None:
        """Read pages until there are rows, or no further page."""
        # Only with a filter, the list has jobs of all states, newest first; every job was created after 1970.
        every = [{"name": "AFTER_CREATED_AT", "values": ["0"]}]
        while not self.rows and self.token is not None:
            more = {"nextToken": self.token} if self.token else {}
            self.rows, self.token = await self._service.list_rows(
                jobQueue=self._queue, filters=every, maxResults=_ROWS, **more
            )
            self.rows.sort(key=lambda row: row.setdefault("createdAt", 0), reverse=True)

    def take(self, floor_ms: int) -> list[dict[str, Any]]:
        """Return and drop the rows that were created at a time or later, in ms since the epoch."""
        taken = [row for row in self.rows if row["createdAt"] >= floor_ms]
        self.rows = self.rows[len(taken) :]
        return taken


def _state(job: Mapping[str, Any]) -> JobState:
    """Return the state of a job or of its row."""
    status, reason = job.get("status") or "", job.get("statusReason") or ""
    state = _STATES.get(status, JobState.UNKNOWN)
    if state is JobState.FAILED:
        if "duration exceeded timeout" in reason:
            return JobState.TIMED_OUT
        if job.get("isTerminated") or job.get("isCancelled"):
            return JobState.CANCELED
        if _is_lost(reason):
            return JobState.LOST
    summary = (job.get("arrayProperties") or {}).get("statusSummary") or {}
    # An array stays PENDING while its children run.
    if status == "PENDING" and any(summary.get(one) for one in ("RUNNING", "SUCCEEDED", "FAILED")):
        return JobState.RUNNING
    return state


def _is_lost(reason: str) -> bool:
    return reason.startswith("Host EC2") and reason.rstrip(".").endswith("terminated")


def _nodes_of(job: Mapping[str, Any]) -> int:
    """Return the number of nodes of a multi-node job; 0 for other jobs, and for a single node."""
    count = (job.get("nodeProperties") or {}).get("numNodes") or 0
    return int(count) if "#" not in job["jobId"] else 0


def _attempts(job: Mapping[str, Any]) -> Iterator[_BatchAttempt]:
    """Yield the attempts of a job's containers: the ended ones, and the one that runs."""
    ended = job.get("attempts") or []
    eks = job.get("eksAttempts") or []
    for number, attempt in enumerate(ended, 1):
        for container, settings, name in _containers(attempt, job):
            yield _BatchAttempt(number, container, attempt, settings, name, number == len(ended))
    for number, attempt in enumerate(eks, 1):
        for container in attempt.get("containers") or []:
            name = container.get("name") or "default"
            yield _BatchAttempt(number, container, attempt, {}, name, number == len(eks))
    seen = {container.get("logStreamName") for one in ended for container, _, _ in _containers(one, job)}
    if job.get("status") == "RUNNING" and all("stoppedAt" in one for one in ended):
        for container, settings, name in _containers(job, job):
            # After a failed attempt, the job shows that attempt's stream until the next one runs.
            if container.get("logStreamName") not in seen - {None}:
                yield _BatchAttempt(len(ended) + 1, {**container, "exitCode": None}, job, settings, name, True)


def _containers(
    attempt: Mapping[str, Any], job: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """Yield the containers of an attempt, or of a job that runs, with their settings and names."""
    if container := attempt.get("container"):
        name = container.get("logStreamName") or ""
        # DEFINITION/CONTAINER/TASK
        yield container, job.get("container") or {}, name.split("/")[-2] if name.count("/") >= 2 else "default"
    described = (job.get("ecsProperties") or {}).get("taskProperties") or []
    settings = {one.get("name"): one for task in described for one in task.get("containers") or []}
    tasks = attempt.get("taskProperties") or (described if attempt is job else [])
    for task in tasks:
        for container in task.get("containers") or []:
            name = container.get("name") or "default"
            yield container, settings.get(name, {}), name


def _result(attempt: _BatchAttempt, state: JobState) -> str:
    reason = attempt.owner.get("statusReason") or ""
    if attempt.container.get("exitCode") == 0:
        return "success"
    if "duration exceeded timeout" in reason:
        return "timeout"
    if _is_lost(reason):
        return "error"
    if attempt.is_last and state in _RESULTS:
        return _RESULTS[state]
    if attempt.is_last and state is JobState.SUCCEEDED:
        return "success"
    return "failure"


def _reason(container: Mapping[str, Any], owner: Mapping[str, Any]) -> str | None:
    """Return why a job or an attempt did not succeed: of the container, and of AWS Batch."""
    found = [container.get("reason"), owner.get("statusReason")]
    return "; ".join(dict.fromkeys(one for one in found if one)) or None


def _definition_name(definition: str) -> str:
    """Return the name of a job definition without its revision."""
    name, _, revision = definition.rpartition("/")[2].partition(":")
    return name or revision


def _last_part(arn: str | None) -> str | None:
    return arn.rpartition("/")[2] if arn else None
