"""`JobRecord`: what is known of one job and its pods: state, tasks and attempts. Pure: no request, no clock.

A record outlives its job and its pods at the API server: those that are deleted keep their last known state.

A task is a container. Pods that follow each other (one at a time, or those of one completion index) are attempts of
the same tasks, as are restarts of a container in its pod. Pods that run in parallel have tasks of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import msgspec

from tailspan.logs.page import TaskRef
from tailspan.models import JobState, TaskRun
from tailspan.services.kubernetes.objects import ContainerStatus, Job, Pod, Terminated

__all__ = ["Instance", "JobRecord", "PodRecord", "attributes_of", "pending_reason"]

_FAR = datetime(9999, 1, 1, tzinfo=UTC)
# How long pods of a deleted job may take to end; then they were left alone on purpose (`--cascade=orphan`).
_ORPHANS = timedelta(seconds=90)
_NEXT_RUN_S = 5
_NORMAL_WAITS = ("ContainerCreating", "PodInitializing", None)
_SIGNALLED = (137, 143)


@dataclass(frozen=True, slots=True)
class Instance:
    """One run of a container of a pod.

    Attributes:
        pod: The pod.
        container: The container's name.
        number: How often it was restarted before.
        task: The attempt of a task that it is.
        started_at: When it started.
        terminated: How it ended; None while it runs.
    """

    pod: PodRecord
    container: str
    number: int
    task: TaskRef
    started_at: datetime | None
    terminated: Terminated | None

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it: the pod's uid, the container's name, the number."""
        return self.pod.pod.metadata.uid, self.container, self.number

    @property
    def begins_ns(self) -> int:
        """When the run began, in ns since the epoch, cut to the second; 0 if that is not known."""
        return int(self.started_at.timestamp()) * 1_000_000_000 if self.started_at is not None else 0

    @property
    def until_ns(self) -> int | None:
        """From when on lines are those of the next run, in ns since the epoch; None if there is no next run.

        While the status still shows this run, the kubelet may return the log of the next one. That begins at once only
        after the first run, and 10 s or more after each later one.
        """
        pod = self.pod.pod
        ended = self.terminated
        if ended is None or ended.finished_at is None or pod.spec.restart_policy == "Never" or pod.is_over:
            return None
        return int(ended.finished_at.timestamp() + _NEXT_RUN_S) * 1_000_000_000


@dataclass(slots=True, eq=False)
class PodRecord:
    """A pod of a job.

    Attributes:
        pod: Its last known state.
        group: Pods of one group are attempts of the same tasks.
        attempt: The attempt that its first run is.
        gone_at: When it was seen to be deleted.
        ended: The runs that have ended, by container and number: they do not change any more.
        seen: The runs for which it is decided whether to follow them from their start.
    """

    pod: Pod
    group: str
    attempt: int
    gone_at: datetime | None = None
    ended: dict[tuple[str, int], tuple[datetime | None, Terminated]] = field(default_factory=dict)
    seen: set[tuple[str, int]] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether none of its containers runs or will run."""
        return self.gone_at is not None or self.pod.is_over

    def update(self, pod: Pod) -> None:
        """Take a newer state."""
        self.pod = pod
        for status in pod.containers:
            for number, started_at, terminated in status.instances:
                if terminated is not None:
                    self.ended.setdefault((status.name, number), (started_at, terminated))

    def restart_policy(self, container: str) -> str | None:
        """Return whether a container runs again: ``Never``, ``OnFailure`` or ``Always``."""
        spec = self.pod.spec
        own = next((one.restart_policy for one in spec.init_containers or () if one.name == container), None)
        return own or spec.restart_policy

    def instance(self, container: str, number: int) -> Instance | None:
        """Return a known run of a container."""
        return next((one for one in self.instances() if (one.container, one.number) == (container, number)), None)

    def instances(self) -> Iterator[Instance]:
        """Yield the known runs of its containers, oldest first for each container."""
        for status in self.pod.containers:
            known = {number: one for (name, number), one in self.ended.items() if name == status.name}
            for number, started_at, terminated in status.instances:
                if terminated is None:
                    known.setdefault(number, (started_at, None))  # type: ignore[arg-type]
            for number, (started_at, terminated) in sorted(known.items()):
                yield Instance(self, status.name, number, self.task(status.name, number), started_at, terminated)

    def task(self, container: str, number: int = 0) -> TaskRef:
        """Return the attempt of a task that a run of a container is."""
        task_id = f"{self.group}/{container}" if self.group else container
        return TaskRef(task_id, container, self.attempt + number)

    @property
    def restarts(self) -> int:
        """The most restarts of a container."""
        return max((status.restart_count for status in self.pod.containers), default=0)


class JobRecord:
    """A job and its pods.

    Attributes:
        job: Its last known state.
        pods: Its pods by uid, also those that are gone.
        version: Changes whenever something of it changes.
        deleted_at: When it was seen to be deleted.
        was_missed: Whether it was deleted while nothing watched it: how it ended is not known.
        is_watched: Whether the watch of jobs has shown it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pods: dict[str, PodRecord] = {}
        self.version = 0
        self.deleted_at: datetime | None = None
        self.was_missed = False
        self.is_watched = False
        self._next_attempt: dict[str, int] = {}
        self._ended_tasks: dict[tuple[str, int], TaskRun] = {}

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.job.job_id

    def update(self, job: Job) -> None:
        """Take a newer state of the job."""
        self.job = job
        self.version += 1

    def delete(self, now: datetime, *, was_missed: bool = False) -> None:
        """Note that the job is deleted."""
        if self.deleted_at is None:
            self.deleted_at, self.was_missed = now, was_missed
            self.version += 1

    def add_pods(self, pods: list[Pod]) -> None:
        """Take newer states of pods, and new pods in the order in which they were made."""
        self.version += 1
        new = [pod for pod in pods if pod.metadata.uid not in self.pods]
        for pod in sorted(new, key=lambda one: (one.metadata.creation_timestamp or _FAR, one.metadata.name)):
            group = self._group(pod)
            attempt = self._next_attempt.get(group)
            if attempt is None:
                attempt = 1 + (0 if group else self._lost_pods(len(new)))
            if pod.index is not None and pod.metadata.annotations is not None and pod.metadata.annotations.failures:
                attempt = int(pod.metadata.annotations.failures) + 1
            self.pods[pod.metadata.uid] = PodRecord(pod, group, attempt)
            self._next_attempt[group] = attempt + 1
        for pod in pods:
            record = self.pods[pod.metadata.uid]
            record.update(pod)
            following = record.attempt + record.restarts + 1
            self._next_attempt[record.group] = max(self._next_attempt[record.group], following)

    def lose_pod(self, uid: str, now: datetime) -> None:
        """Note that a pod is deleted."""
        record = self.pods.get(uid)
        if record is not None and record.gone_at is None:
            record.gone_at = now
            self.version += 1

    def _group(self, pod: Pod) -> str:
        spec = self.job.spec
        if pod.index is not None:
            return pod.index
        is_parallel = (spec.parallelism or 1) > 1 or (spec.completions or 1) > 1
        return pod.metadata.name if is_parallel else ""

    def _lost_pods(self, known: int) -> int:
        """Return how many pods of a job that runs one at a time are gone already: their attempts are counted."""
        status = self.job.status
        return max(0, (status.failed or 0) + (status.succeeded or 0) + (status.active or 0) - known)

    def instances(self) -> Iterator[Instance]:
        """Yield the known runs of all containers, by the age of their pods."""
        for record in self.pods.values():
            yield from record.instances()

    def state(self, now: datetime) -> JobState:
        """Return the state of the job.

        A deleted job has ended when its pods have: until then they write their last lines.

        Args:
            now: The present.
        """
        job = self.job
        if job.condition("Complete") is not None:
            return JobState.SUCCEEDED
        if (failed := job.condition("Failed")) is not None:
            return JobState.TIMED_OUT if failed.reason == "DeadlineExceeded" else JobState.FAILED
        begun = any(status.begun for record in self.pods.values() for status in record.pod.containers)
        if self.deleted_at is not None:
            pods_end = all(record.is_over for record in self.pods.values())
            if not pods_end and now - self.deleted_at < _ORPHANS:
                return JobState.RUNNING if begun else JobState.PENDING
            return JobState.LOST if self.was_missed else JobState.CANCELED
        if job.condition("Suspended") is not None:
            return JobState.PENDING
        return JobState.RUNNING if begun or (job.status.ready or 0) > 0 else JobState.PENDING

    def ended_at(self) -> datetime | None:
        """Return when the job ended: failed jobs have no completion time."""
        status = self.job.status
        failed = self.job.condition("Failed") or self.job.condition("Complete")
        if status.completion_time is not None:
            return status.completion_time
        if failed is not None and failed.last_transition_time is not None:
            return failed.last_transition_time
        gone = [record.gone_at for record in self.pods.values() if record.gone_at is not None]
        return max([*gone, self.deleted_at]) if self.deleted_at is not None else None

    @property
    def may_have_ended(self) -> bool:
        """Whether the job, if it is gone, may have ended first: something deletes such jobs after their end."""
        return self.job.spec.ttl_seconds_after_finished is not None or bool(self.job.metadata.owner_references)

    @property
    def killed_as(self) -> str | None:
        """The result of containers that are ended by a signal now: the job is over, though it may not say so yet."""
        if self.deleted_at is not None or self.job.condition("Suspended") is not None:
            return "error" if self.was_missed else "cancellation"
        target = self.job.condition("FailureTarget") or self.job.condition("Failed")
        return "timeout" if target is not None and target.reason == "DeadlineExceeded" else None

    def tasks(self) -> list[TaskRun]:
        """Return every known attempt of every task, oldest first. One that has ended does not change any more."""
        found: list[TaskRun] = []
        is_over = self.job.is_over
        for record in self.pods.values():
            before, sidecars = _init_tasks(record)
            begun: set[str] = set()
            for instance in record.instances():
                begun.add(instance.container)
                after = before.get(instance.container, before[""])
                found.append(
                    _task_run(instance, self.killed_as, is_sidecar=instance.container in sidecars, after=after)
                )
            for status in record.pod.containers:
                if status.name not in begun:
                    after = before.get(status.name, before[""])
                    found.append(_waiting_task(record, status, after, is_over=is_over or record.is_over))
        return [self._ended_tasks.setdefault(task.key, task) if task.ended else task for task in found]


def pending_reason(record: JobRecord) -> str | None:
    """Return why a job that is pending has not started, as its newest pod says it; None without a reason."""
    if (suspended := record.job.condition("Suspended")) is not None:
        return suspended.message or "suspended"
    for pod in reversed(record.pods.values()):
        for condition in pod.pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                return _sentence(condition.reason, condition.message)
        for status in pod.pod.containers:
            waiting = status.state.waiting
            if waiting is not None and waiting.reason not in _NORMAL_WAITS:
                return _sentence(waiting.reason, waiting.message)
    return None


def _sentence(reason: str | None, message: str | None) -> str | None:
    return ": ".join(one for one in (reason, message) if one) or None


def _init_tasks(record: PodRecord) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Return the tasks that each container waits for (an empty name: those that are not named), and the sidecars."""
    sidecars: set[str] = set()
    after: dict[str, tuple[str, ...]] = {}
    last: tuple[str, ...] = ()
    for container in record.pod.spec.init_containers or ():
        after[container.name] = last
        if container.restart_policy == "Always":
            sidecars.add(container.name)
        else:
            last = (record.task(container.name).task_id,)
    after[""] = last
    return after, sidecars


def _task_run(instance: Instance, killed_as: str | None, *, is_sidecar: bool, after: tuple[str, ...]) -> TaskRun:
    pod, ended = instance.pod.pod, instance.terminated
    run = TaskRun(
        task_id=instance.task.task_id,
        name=instance.task.name,
        attempt=instance.task.attempt,
        submitted_at=pod.metadata.creation_timestamp,
        started_at=instance.started_at,
        instance_id=pod.spec.node_name,
        after=after,
    )
    if ended is not None:
        signalled = ended.exit_code in _SIGNALLED and ended.reason != "OOMKilled"
        # A sidecar is ended by a signal once the other containers have ended.
        is_success = ended.exit_code == 0 or (is_sidecar and signalled)
        result = "success" if is_success else killed_as if killed_as and signalled else "failure"
        error = None if is_success else _failure(pod, ended)
        return replace(run, result=result, finished_at=ended.finished_at, exit_code=ended.exit_code, error=error)
    if instance.pod.gone_at is not None:
        # The pod was deleted before the kubelet could report the end.
        error = _pod_reason(pod) or "the pod was deleted"
        return replace(run, result=killed_as or "error", finished_at=instance.pod.gone_at, error=error)
    return run


def _waiting_task(record: PodRecord, status: ContainerStatus, after: tuple[str, ...], *, is_over: bool) -> TaskRun:
    """Return the task of a container that has not started."""
    pod, waiting = record.pod, status.state.waiting
    task = record.task(status.name)
    reason = waiting if waiting is not None and waiting.reason not in _NORMAL_WAITS else None
    return TaskRun(
        task_id=task.task_id,
        name=task.name,
        attempt=task.attempt,
        submitted_at=pod.metadata.creation_timestamp,
        result="skip" if is_over else None,
        error=_sentence(reason.reason, reason.message) if reason is not None else None,
        instance_id=pod.spec.node_name,
        after=after,
    )


def _pod_reason(pod: Pod) -> str | None:
    """Return why a pod was ended from outside: evicted, preempted, its node gone."""
    if pod.status.reason:
        return _sentence(pod.status.reason, pod.status.message)
    conditions = pod.status.conditions or ()
    disrupted = next((one for one in conditions if one.type == "DisruptionTarget" and one.holds), None)
    return _sentence(disrupted.reason, disrupted.message) if disrupted is not None else None


def _failure(pod: Pod, ended: Terminated) -> str:
    """Return why a container failed."""
    if ended.reason == "OOMKilled":
        return f"OOMKilled: exit code {ended.exit_code}"
    if (reason := _pod_reason(pod)) is not None:
        return reason
    text = f"exit code {ended.exit_code}"
    if ended.reason not in (None, "Error", "Completed"):
        text = f"{ended.reason}: {text}"
    message = " ".join((ended.message or "").split())
    return f"{text}: {message[:500]}" if message else text


def attributes_of(job: Job) -> dict[str, str]:
    """Return the attributes that a job was submitted with."""
    text = job.metadata.annotations.attributes if job.metadata.annotations else None
    try:
        return msgspec.json.decode(text, type=dict[str, str]) if text else {}
    except msgspec.DecodeError:
        return {}
