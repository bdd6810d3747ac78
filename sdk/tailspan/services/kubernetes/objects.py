"""The objects of the Kubernetes API, as far as jobs need them; all other fields are dropped while they are decoded.

Source: the API reference of Kubernetes 1.36 (batch/v1 Job, v1 Pod, v1 ClusterEvent).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

__all__ = [
    "ATTRIBUTES",
    "ClusterEvent",
    "ClusterEvents",
    "ContainerStatus",
    "CronJob",
    "Job",
    "JobList",
    "Pod",
    "PodList",
    "Review",
    "Terminated",
    "Version",
    "WatchEvent",
    "WatchObject",
]

ATTRIBUTES = "tailspan.io/attributes"
"""The annotation with the attributes of a submitted job, as JSON."""


class Condition(msgspec.Struct, rename="camel"):
    """A condition of a job or a pod."""

    type: str
    status: str = ""
    reason: str | None = None
    message: str | None = None
    last_transition_time: datetime | None = None

    @property
    def holds(self) -> bool:
        """Whether it is true."""
        return self.status == "True"


class OwnerReference(msgspec.Struct):
    """What an object belongs to."""

    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None


class ListMeta(msgspec.Struct, rename={"continue_": "continue", "resource_version": "resourceVersion"}):
    """The metadata of a list."""

    resource_version: str = ""
    continue_: str | None = None


class JobAnnotations(
    msgspec.Struct,
    rename={"scheduled_at": "batch.kubernetes.io/cronjob-scheduled-timestamp", "attributes": ATTRIBUTES},
):
    """The annotations of a job that mean something here."""

    scheduled_at: str | None = None
    attributes: str | None = None


class JobMeta(msgspec.Struct, rename="camel"):
    """The metadata of a job."""

    name: str
    namespace: str = "default"
    uid: str = ""
    resource_version: str = ""
    generate_name: str | None = None
    creation_timestamp: datetime | None = None
    labels: dict[str, str] | None = None
    annotations: JobAnnotations | None = None
    owner_references: list[OwnerReference] | None = None


class JobSpec(msgspec.Struct, rename="camel"):
    """What a job is made of."""

    parallelism: int | None = None
    completions: int | None = None
    ttl_seconds_after_finished: int | None = None


class JobCounts(msgspec.Struct, rename="camel"):
    """The status of a job."""

    conditions: list[Condition] | None = None
    start_time: datetime | None = None
    completion_time: datetime | None = None
    active: int | None = None
    ready: int | None = None
    succeeded: int | None = None
    failed: int | None = None


class Job(msgspec.Struct):
    """A Job."""

    metadata: JobMeta
    spec: JobSpec = msgspec.field(default_factory=JobSpec)
    status: JobCounts = msgspec.field(default_factory=JobCounts)

    @property
    def job_id(self) -> str:
        """The id of the job: ``NAMESPACE/NAME:UID``, because the next run may have the same name."""
        return f"{self.metadata.namespace}/{self.metadata.name}:{self.metadata.uid}"

    @property
    def cron_job(self) -> str | None:
        """The CronJob that made it."""
        return next((one.name for one in self.metadata.owner_references or () if one.kind == "CronJob"), None)

    @property
    def pipeline(self) -> str:
        """What its runs have in common: the CronJob's name, the beginning of a generated name, or its own."""
        return self.cron_job or (self.metadata.generate_name or "").rstrip("-") or self.metadata.name

    def condition(self, kind: str) -> Condition | None:
        """Return a condition that is true."""
        return next((one for one in self.status.conditions or () if one.type == kind and one.holds), None)

    @property
    def is_over(self) -> bool:
        """Whether it has ended. ``SuccessCriteriaMet`` and ``FailureTarget`` come before the end."""
        return self.condition("Complete") is not None or self.condition("Failed") is not None


class JobList(msgspec.Struct):
    """A page of jobs."""

    metadata: ListMeta
    items: list[Job] = []


class CronJobMeta(msgspec.Struct):
    """The metadata of a CronJob."""

    name: str


class CronJobSpec(msgspec.Struct, rename="camel"):
    """What a CronJob makes."""

    job_template: dict[str, Any]


class CronJob(msgspec.Struct):
    """A CronJob, as far as a run of it is made of it."""

    metadata: CronJobMeta
    spec: CronJobSpec


class WaitingState(msgspec.Struct):
    """Why a container has not started."""

    reason: str | None = None
    message: str | None = None


class RunningState(msgspec.Struct, rename="camel"):
    """Since when a container runs."""

    started_at: datetime | None = None


class Terminated(msgspec.Struct, rename="camel"):
    """How a container ended. Its times are whole seconds."""

    exit_code: int = 0
    signal: int | None = None
    reason: str | None = None
    message: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


class ContainerState(msgspec.Struct):
    """One of three."""

    waiting: WaitingState | None = None
    running: RunningState | None = None
    terminated: Terminated | None = None


class ContainerStatus(msgspec.Struct, rename="camel"):
    """The status of a container of a pod."""

    name: str
    state: ContainerState = msgspec.field(default_factory=ContainerState)
    last_state: ContainerState = msgspec.field(default_factory=ContainerState)
    restart_count: int = 0
    container_id: str | None = msgspec.field(default=None, name="containerID")

    @property
    def begun(self) -> bool:
        """Whether it has run at all."""
        state = self.state
        return state.running is not None or state.terminated is not None or self.last_state.terminated is not None

    @property
    def instances(self) -> list[tuple[int, datetime | None, Terminated | None]]:
        """Its runs that are known, at most two: number from 0, start, and end if it has ended.

        While it waits for its next run, the last one is that of ``lastState``.
        """
        state, last, number = self.state, self.last_state.terminated, self.restart_count
        if state.running is None and state.terminated is None:
            return [(number, last.started_at, last)] if last is not None else []
        found: list[tuple[int, datetime | None, Terminated | None]] = []
        if last is not None and number > 0:
            found.append((number - 1, last.started_at, last))
        if state.running is not None:
            found.append((number, state.running.started_at, None))
        elif state.terminated is not None:
            found.append((number, state.terminated.started_at, state.terminated))
        return found


class PodLabels(
    msgspec.Struct,
    rename={
        "index": "batch.kubernetes.io/job-completion-index",
        "job_uid": "batch.kubernetes.io/controller-uid",
    },
):
    """The labels of a pod that mean something here."""

    index: str | None = None
    job_uid: str | None = None


class PodAnnotations(
    msgspec.Struct,
    rename={
        "index": "batch.kubernetes.io/job-completion-index",
        "failures": "batch.kubernetes.io/job-index-failure-count",
    },
):
    """The annotations of a pod that mean something here."""

    index: str | None = None
    failures: str | None = None


class PodMeta(msgspec.Struct, rename="camel"):
    """The metadata of a pod."""

    name: str
    namespace: str = "default"
    uid: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: PodLabels | None = None
    annotations: PodAnnotations | None = None
    owner_references: list[OwnerReference] | None = None


class Container(msgspec.Struct, rename="camel"):
    """A container as the pod's specification has it."""

    name: str
    restart_policy: str | None = None


class PodSpec(msgspec.Struct, rename="camel"):
    """What a pod is made of."""

    containers: list[Container] = []
    init_containers: list[Container] | None = None
    node_name: str | None = None
    restart_policy: str | None = None


class PodStatus(msgspec.Struct, rename="camel"):
    """The status of a pod."""

    phase: str | None = None
    reason: str | None = None
    message: str | None = None
    conditions: list[Condition] | None = None
    init_container_statuses: list[ContainerStatus] | None = None
    container_statuses: list[ContainerStatus] | None = None


class Pod(msgspec.Struct):
    """A pod."""

    metadata: PodMeta
    spec: PodSpec = msgspec.field(default_factory=PodSpec)
    status: PodStatus = msgspec.field(default_factory=PodStatus)

    @property
    def job_uid(self) -> str | None:
        """The uid of the job that made it; a job that was deleted without its pods is only in a label of them."""
        owner = next((one.uid for one in self.metadata.owner_references or () if one.kind == "Job"), None)
        return owner or (self.metadata.labels.job_uid if self.metadata.labels else None)

    @property
    def index(self) -> str | None:
        """Its completion index, in an indexed job."""
        labels, annotations = self.metadata.labels, self.metadata.annotations
        return (labels.index if labels else None) or (annotations.index if annotations else None)

    @property
    def is_over(self) -> bool:
        """Whether none of its containers will run again."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def containers(self) -> list[ContainerStatus]:
        """The status of each container, init containers first."""
        return [*(self.status.init_container_statuses or ()), *(self.status.container_statuses or ())]

    def status_of(self, container: str) -> ContainerStatus | None:
        """Return the status of a container."""
        return next((one for one in self.containers if one.name == container), None)


class PodList(msgspec.Struct):
    """A page of pods."""

    metadata: ListMeta
    items: list[Pod] = []


class ClusterEvent(msgspec.Struct, rename="camel"):
    """Something that happened to a job or a pod."""

    type: str | None = None
    reason: str | None = None
    message: str | None = None
    last_timestamp: datetime | None = None
    event_time: datetime | None = None


class ClusterEvents(msgspec.Struct):
    """A list of events."""

    items: list[ClusterEvent] = []


class WatchObject(msgspec.Struct):
    """What any object of a watch has: also a bookmark, and the status that ends a watch."""

    metadata: ListMeta = msgspec.field(default_factory=ListMeta)
    code: int = 0
    message: str = ""


class WatchEvent(msgspec.Struct):
    """A line of a watch."""

    type: str
    object: msgspec.Raw


class ReviewStatus(msgspec.Struct):
    """Whether a right is given."""

    allowed: bool = False
    reason: Any = None


class Review(msgspec.Struct):
    """A SelfSubjectAccessReview."""

    status: ReviewStatus = msgspec.field(default_factory=ReviewStatus)


class Version(msgspec.Struct, rename="camel"):
    """The version of the API server."""

    major: str = ""
    minor: str = ""
    git_version: str = ""

    @property
    def number(self) -> tuple[int, int] | None:
        """Major and minor version, to which some vendors add a plus; None if they are no numbers."""
        major, minor = self.major, self.minor.rstrip("+")
        return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
