"""`EcsService`: tasks of Amazon ECS that are not part of a service, as jobs, with their containers as tasks.

ECS forgets a stopped task after about an hour. The lines are in the stream ``PREFIX/CONTAINER/TASK``, as the task
definition configures it.

Source: the model of ECS in botocore 1.44.8; ECS developer guide, "awslogs log driver", "stopped task error codes".
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from tailspan._times import time_of_ms
from tailspan.errors import AuthError, JobNotFoundError
from tailspan.logs.page import TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import Problem
from tailspan.services._http_service import drop_oldest
from tailspan.services.aws.logs import LogStream
from tailspan.services.aws.requests import ECS, Api, AwsOptions, account_of, console_of
from tailspan.services.aws.service import AwsService, Described, stream_url

__all__ = ["EcsOptions", "EcsService"]

_ROWS = 100
_CLUSTERS_S = 300.0
_MOST_DEFINITIONS = 10_000

_STATES: Mapping[str, JobState] = {
    "PROVISIONING": JobState.PENDING,
    "PENDING": JobState.PENDING,
    "ACTIVATING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "DEACTIVATING": JobState.RUNNING,
    "STOPPING": JobState.RUNNING,
    "DEPROVISIONING": JobState.RUNNING,
}
_STOPPED: Mapping[str, JobState] = {
    "UserInitiated": JobState.CANCELED,
    "ServiceSchedulerInitiated": JobState.CANCELED,
    "SpotInterruption": JobState.LOST,
    "TerminationNotice": JobState.LOST,
    "TaskFailedToStart": JobState.FAILED,
}
_RESULTS: Mapping[JobState, str] = {JobState.CANCELED: "cancellation", JobState.LOST: "error"}


class EcsOptions(AwsOptions):
    """The table ``services.NAME`` of type ``aws_ecs``.

    Attributes:
        clusters: Names or ARNs of the clusters whose tasks are listed; empty: all clusters of the region.
        services: Whether to list tasks of ECS services, too, which run until they are replaced.
    """

    clusters: tuple[str, ...] = ()
    services: bool = False


class EcsService(AwsService):
    """The tasks of Amazon ECS in one region; see the module. A job's id is ``CLUSTER/TASK``."""

    Options = EcsOptions
    api: ClassVar[Api] = ECS

    def __init__(self, name: str, options: AwsOptions, **further: Any) -> None:
        super().__init__(name, options, **further)
        self._clusters: tuple[float, tuple[str, ...]] = float("-inf"), ()
        # By ARN; a revision never changes.
        self._definitions: dict[str, Mapping[str, Mapping[str, Any]]] = {}

    @property
    def _ecs(self) -> EcsOptions:
        assert isinstance(self.options, EcsOptions)
        return self.options

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the tasks, newest first."""
        with self._reading("a list of tasks"):
            rows = await self._rows()
        # No request has them in an order; ECS has those of the last hour only.
        if rows:
            yield rows

    async def _rows(self) -> list[ListedJob]:
        rows: dict[str, ListedJob] = {}
        for cluster in await self._cluster_names():
            for desired in ("RUNNING", "STOPPED"):
                token: str | None = ""
                while token is not None:
                    more = {"nextToken": token} if token else {}
                    reply = await self._call(
                        "ListTasks", cluster=cluster, desiredStatus=desired, maxResults=_ROWS, **more
                    )
                    token = reply.get("nextToken")
                    for task in await self._tasks(cluster, reply.get("taskArns") or []):
                        if self._ecs.services or not str(task.get("group")).startswith("service:"):
                            rows[_job_id(task)] = self._row(task)
        return sorted(rows.values(), key=lambda row: (row.created_at is not None, row.created_at), reverse=True)

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop a task; one that has stopped stays as it is."""
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        cluster, _, task = job_id.rpartition("/")
        requests = await self._open()
        body = {"cluster": cluster, "task": task, "reason": "canceled by tailspan"}
        await requests.call("StopTask", body, job_id=job_id, reads=False)
        return await self.get_job(job_id)

    async def find_problems(self) -> Sequence[Problem]:
        """Return whether the lines of the newest task can be read: each task has log groups of its own."""
        async with aclosing(self.list_jobs()) as found:
            rows = await anext(found, None)
        if not rows:
            return []
        job_id = rows[0].job_id
        streams = (await self._describe(job_id)).streams
        if not streams:
            text = "it needs the log driver awslogs with awslogs-group and awslogs-stream-prefix"
            return [Problem(f"the lines of {job_id} are not in CloudWatch: {text}", is_fatal=False)]
        body = {"logGroupName": streams[0].group, "logStreamNames": [streams[0].name], "startTime": 0, "limit": 1}
        try:
            await (await self._logs_of(streams[0].region)).call("FilterLogEvents", body)
        except AuthError as error:
            return [Problem(f"log group {streams[0].group}: {error}")]
        except JobNotFoundError:
            pass  # it has no line yet
        return []

    async def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        return (await (await self._open()).call(operation, parameters)).body

    async def _cluster_names(self) -> tuple[str, ...]:
        if self._ecs.clusters:
            return self._ecs.clusters
        at_s, known = self._clusters
        if time.monotonic() - at_s < _CLUSTERS_S:
            return known
        found: list[str] = []
        token: str | None = ""
        while token is not None:
            reply = await self._call("ListClusters", **({"nextToken": token} if token else {}))
            found += reply.get("clusterArns") or []
            token = reply.get("nextToken")
        self._clusters = time.monotonic(), tuple(found)
        return self._clusters[1]

    async def _tasks(self, cluster: str, tasks: Sequence[str]) -> list[dict[str, Any]]:
        if not tasks:
            return []
        reply = await self._call("DescribeTasks", cluster=cluster, tasks=list(tasks), include=["TAGS"])
        found: list[dict[str, Any]] = reply["tasks"]
        return found

    async def _describe_ids(self, job_ids: Sequence[str]) -> Mapping[str, Described]:
        by_cluster: dict[str, list[str]] = {}
        for job_id in job_ids:
            cluster, _, task = job_id.rpartition("/")
            by_cluster.setdefault(cluster or "default", []).append(task)
        found: dict[str, Described] = {}
        for cluster, ids in by_cluster.items():
            try:
                tasks = await self._tasks(cluster, ids)
            except JobNotFoundError:
                continue  # there is no such cluster
            for one in tasks:
                job_id = f"{cluster}/{one['taskArn'].rpartition('/')[2]}"
                found[job_id] = await self._described(job_id, one)
        return found

    async def _described(self, job_id: str, task: Mapping[str, Any]) -> Described:
        definitions = await self._containers(task.get("taskDefinitionArn") or "")
        state = _state(task)
        stopped = task.get("stoppedAt") if state.is_terminal else None
        runs: list[TaskRun] = []
        streams: list[LogStream] = []
        for container in task.get("containers") or []:
            name = container.get("name") or "default"
            ref = TaskRef(name, name)
            stream = self._stream(definitions.get(name, {}), ref, task, stopped)
            streams += [stream] if stream is not None else []
            code = container.get("exitCode")
            result = ("success" if code == 0 else _RESULTS.get(state, "failure")) if state.is_terminal else None
            runs.append(
                TaskRun(
                    task_id=name,
                    name=name,
                    result=result,
                    submitted_at=_time(task.get("createdAt")),
                    started_at=_time(task.get("startedAt")),
                    finished_at=_time(stopped) if result else None,
                    exit_code=code if result else None,
                    error=container.get("reason") if result not in (None, "success") else None,
                    url=stream_url(stream.region, stream.group, stream.name) if stream else None,
                )
            )
        return Described(self._status(job_id, task, state, runs), tuple(runs), tuple(streams))

    async def _containers(self, definition: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the containers of a task definition by name."""
        if definition not in self._definitions:
            reply = await self._call("DescribeTaskDefinition", taskDefinition=definition)
            found = (reply.get("taskDefinition") or {}).get("containerDefinitions") or []
            self._definitions[definition] = {one["name"]: one for one in found}
            drop_oldest(self._definitions, _MOST_DEFINITIONS)
        return self._definitions[definition]

    def _stream(
        self, definition: Mapping[str, Any], ref: TaskRef, task: Mapping[str, Any], stopped_s: float | None
    ) -> LogStream | None:
        settings = definition.get("logConfiguration") or {}
        options = settings.get("options") or {}
        group, prefix = options.get("awslogs-group"), options.get("awslogs-stream-prefix")
        # Without a prefix, the stream is named by the id that Docker gives the container, which ECS does not have.
        if settings.get("logDriver") != "awslogs" or not group or not prefix:
            return None
        name = f"{prefix}/{ref.name}/{task['taskArn'].rpartition('/')[2]}"
        began_ms = int((task.get("createdAt") or 0) * 1000)
        ended_ms = None if stopped_s is None else int(stopped_s * 1000)
        return LogStream(options.get("awslogs-region") or self.region, group, name, ref, began_ms, ended_ms)

    def _row(self, task: Mapping[str, Any]) -> ListedJob:
        return ListedJob(
            job_id=_job_id(task),
            job_name=_family(task),
            state=_state(task),
            created_at=_time(task.get("createdAt")),
            state_since=_time(task.get("stoppedAt") or task.get("startedAt") or task.get("createdAt")),
            service=self.name,
        )

    def _status(self, job_id: str, task: Mapping[str, Any], state: JobState, runs: Sequence[TaskRun]) -> JobStatus:
        cluster, _, task_id = job_id.rpartition("/")
        codes = [run.exit_code for run in runs if run.exit_code]
        reasons = [one for one in (*(run.error for run in runs), task.get("stoppedReason")) if one]
        failed = state not in (JobState.RUNNING, JobState.SUCCEEDED)
        details = {
            "cloud.provider": "aws",
            "cloud.region": self.region,
            "cloud.account.id": account_of(task["taskArn"]),
            "aws.ecs.task.arn": task["taskArn"],
            "aws.ecs.task.family": _family(task),
            "aws.ecs.cluster.arn": task.get("clusterArn"),
            "aws.ecs.launchtype": str(task.get("launchType") or "").lower(),
        }
        return self.make_status(
            job_id,
            state,
            job_name=_family(task),
            submitted_at=_time(task.get("createdAt")),
            started_at=_time(task.get("startedAt")),
            finished_at=_time(task.get("stoppedAt")) if state.is_terminal else None,
            job_status=task.get("lastStatus"),
            exit_code=next(iter(codes), 0 if state is JobState.SUCCEEDED else None),
            error=("; ".join(dict.fromkeys(reasons)) or None) if failed else None,
            attributes={str(tag.get("key")): str(tag.get("value")) for tag in task.get("tags") or []},
            details={key: value for key, value in details.items() if value},
            url=f"{console_of(self.region)}/ecs/v2/clusters/{cluster}/tasks/{task_id}?region={self.region}",
            total_tasks=len(runs),
            finished_tasks=sum(run.ended for run in runs),
        )


def _state(task: Mapping[str, Any]) -> JobState:
    status = task.get("lastStatus") or ""
    if status not in ("STOPPED", "DELETED"):
        return _STATES.get(status, JobState.UNKNOWN)
    codes = [container.get("exitCode") for container in task.get("containers") or []]
    if codes and all(code == 0 for code in codes):
        return JobState.SUCCEEDED
    return _STOPPED.get(task.get("stopCode") or "", JobState.FAILED)


def _job_id(task: Mapping[str, Any]) -> str:
    """Return ``CLUSTER/TASK``; the ARN of a task has the cluster's name, except in very old accounts."""
    cluster = (task.get("clusterArn") or "").rpartition("/")[2] or "default"
    return f"{cluster}/{task['taskArn'].rpartition('/')[2]}"


def _family(task: Mapping[str, Any]) -> str:
    name: str = (task.get("taskDefinitionArn") or "").rpartition("/")[2].partition(":")[0]
    return name or _job_id(task)


def _time(seconds: object) -> Any:
    return time_of_ms(seconds * 1000) if isinstance(seconds, int | float) else None
