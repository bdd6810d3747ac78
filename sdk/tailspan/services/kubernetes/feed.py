"""`JobFeed`: watches the jobs and pods of a service, follows the logs of new pods, and reports what has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Protocol

from tailspan.errors import ServiceUnavailableError
from tailspan.services._http_service import drop_oldest
from tailspan.services._noticed_changes import NoticedChanges
from tailspan.services.kubernetes.objects import Job, JobList, Pod, PodList
from tailspan.services.kubernetes.record import Instance, JobRecord
from tailspan.services.kubernetes.requests import KubernetesRequests
from tailspan.services.kubernetes.streams import FollowedLogs
from tailspan.services.kubernetes.watch import Reflector

__all__ = ["JobFeed"]

JOBS_OF_PODS = "batch.kubernetes.io/job-name"
# Lines are gathered for a moment: a read costs more than a line.
_LINES_EVERY_S = 0.5
_POLL_S = 3.0
_FIRST_LIST_S = 120.0
_SWEEP_S = 30.0
# How long a log is followed for a job that the agent does not follow: it lists new jobs every few seconds.
_UNWANTED_S, _UNWANTED_ENDED_S = 60.0, 600.0
_MAX_STRAYS = 10_000

_log = logging.getLogger(__name__)


class Watched(Protocol):
    """What a feed keeps: a service."""

    name: str
    records: dict[str, JobRecord]

    @property
    def http(self) -> KubernetesRequests: ...

    @property
    def long_http(self) -> KubernetesRequests: ...

    @property
    def streams(self) -> FollowedLogs: ...

    @property
    def job_query(self) -> dict[str, str]: ...

    def collection(self, kind: str) -> str: ...

    def follow_log(self, record: JobRecord, instance: Instance) -> bool: ...

    def forget_feed(self, feed: JobFeed) -> None: ...


class JobFeed:
    """The change feed of one service; its watches are tasks of the running event loop."""

    def __init__(self, service: Watched) -> None:
        """Start the watches.

        Args:
            service: The service; the feed keeps its records.
        """
        self._service = service
        self._followed: set[str] = set()
        self._unwanted: set[str] = set()
        self._changes = NoticedChanges()
        self._with_lines: set[str] = set()
        # By uid of the job: pods that came before it.
        self._strays: dict[str, dict[str, Pod]] = {}
        self._pods_listed = False
        self._jobs_listed = asyncio.Event()
        self._lines_timer: asyncio.TimerHandle | None = None
        self._others = 0
        self._said_full = False
        http, streams = service.http, service.long_http
        self._jobs = Reflector(
            http,
            streams,
            service.collection("jobs"),
            (Job, JobList),
            service.job_query,
            on_list=self._on_jobs,
            on_event=self._on_job,
        )
        self._pods = Reflector(
            http,
            streams,
            service.collection("pods"),
            (Pod, PodList),
            {"labelSelector": JOBS_OF_PODS},
            on_list=self._on_pods,
            on_event=self._on_pod,
        )
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(one) for one in (self._jobs.run(), self._run_pods(), self._keep())]
        for task in self._tasks:
            task.add_done_callback(self._on_end)

    @property
    def is_current(self) -> bool:
        """Whether the records are those of the present, give or take some seconds."""
        return self._pods_listed and self._jobs.is_current and self._pods.is_current and self._changes.failure is None

    async def listed(self) -> None:
        """Wait until jobs and pods were listed for the first time, or could not be: then requests say why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LIST_S):
                await self._jobs.tried.wait()
                if self._jobs.is_current:
                    await self._pods.tried.wait()

    def follow(self, job_id: str) -> bool:
        """Report changes of a job from now on."""
        uid = job_id.rpartition(":")[2]
        self._followed.add(uid)
        record = self._service.records.get(uid)
        if record is not None:
            self._unwanted.discard(record.job.pipeline)
        # A job that is named without its uid is polled.
        return ":" in job_id and self._changes.failure is None

    def leave(self, job_id: str) -> None:
        """Stop following the logs of a job."""
        uid = job_id.rpartition(":")[2]
        self._followed.discard(uid)
        record = self._service.records.get(uid)
        if record is None:
            return
        for instance in record.instances():
            if (stream := self._service.streams.get(instance)) is not None:
                self._service.streams.close(stream)
        if record.deleted_at is not None:
            del self._service.records[uid]

    async def wait(self) -> Collection[str] | None:
        """Wait for changes; see `tailspan.services.ChangeFeed`."""
        return await self._changes.take()

    def make_room(self, record: JobRecord) -> bool:
        """Stop following the log of a job that the agent does not follow, for one that it does; return whether so."""
        if record.job.metadata.uid not in self._followed:
            return False
        for stream in self._service.streams:
            if not stream.is_over and stream.job.job.metadata.uid not in self._followed:
                self._service.streams.close(stream)
                return True
        return False

    def close(self) -> None:
        """Stop watching; logs that are followed stay so."""
        for task in self._tasks:
            task.cancel()
        if self._lines_timer is not None:
            self._lines_timer.cancel()
        self._service.forget_feed(self)

    def on_lines(self, record: JobRecord) -> None:
        """Report soon that lines of a job have arrived."""
        self._with_lines.add(record.job_id)
        if self._lines_timer is None:
            self._lines_timer = asyncio.get_running_loop().call_later(_LINES_EVERY_S, self._report_lines)

    def _report_lines(self) -> None:
        self._lines_timer = None
        self._changes.add(self._with_lines)
        self._with_lines.clear()

    def _on_change(self, record: JobRecord) -> None:
        self._changes.add({record.job_id})

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        found = self._jobs.failure or self._pods.failure
        if error is not None:
            _log.error("service %s: unexpected error in a watch", self._service.name, exc_info=error)
        self._changes.fail(found or ServiceUnavailableError(f"a watch ended: {error!r}", service=self._service.name))

    async def _run_pods(self) -> None:
        # A pod is known by its job.
        await self._jobs_listed.wait()
        await self._pods.run()

    async def _keep(self) -> None:
        """Poll the logs that cannot be followed, and stop following those that nothing reads."""
        swept_s = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_S)
            if self._others or not self._service.streams.has_room:
                self._poll_others()
            if time.monotonic() - swept_s > _SWEEP_S:
                swept_s = time.monotonic()
                self._sweep()

    def _poll_others(self) -> None:
        streams, found = self._service.streams, 0
        for uid in self._followed:
            record = self._service.records.get(uid)
            if record is None:
                continue
            for instance in record.instances():
                if instance.terminated is None and not instance.pod.is_over and streams.get(instance) is None:
                    found += 1
                    self._changes.add({record.job_id})
        # Those that wait get a stream with their next read, once there is room.
        self._others = found
        if found and not self._said_full and not streams.has_room:
            self._said_full = True
            name = self._service.name
            text = (
                "service %s: %d logs are followed, which is the limit; those of %d further containers are read "
                "every %g s and can lose lines when they are rotated or their pods deleted: raise "
                "services.%s.max_streams"
            )
            _log.warning(text, name, streams.most, found, _POLL_S, name)

    def _sweep(self) -> None:
        now_s, now = time.monotonic(), datetime.now(UTC)
        for stream in list(self._service.streams):
            if stream.job.job.metadata.uid not in self._followed:
                limit_s = _UNWANTED_ENDED_S if stream.job.state(now).is_terminal else _UNWANTED_S
                if now_s - stream.opened_s > limit_s:
                    self._unwanted.add(stream.job.job.pipeline)
                    self._service.streams.close(stream)
        for uid, record in list(self._service.records.items()):
            deleted = record.deleted_at
            is_unwanted = deleted is not None and uid not in self._followed
            if deleted is not None and is_unwanted and (now - deleted).total_seconds() > _UNWANTED_ENDED_S:
                del self._service.records[uid]

    def _on_jobs(self, jobs: Sequence[Job]) -> None:
        found = {job.metadata.uid for job in jobs}
        for job in jobs:
            self._apply_job(job)
        now = datetime.now(UTC)
        for uid, record in self._service.records.items():
            if record.is_watched and uid not in found and record.deleted_at is None:
                record.delete(now, was_missed=record.may_have_ended)
        if self._jobs_listed.is_set():
            self._changes.add_all()
        self._jobs_listed.set()

    def _on_job(self, kind: str, job: Job) -> None:
        record = self._apply_job(job)
        if kind == "DELETED":
            record.delete(datetime.now(UTC))
        self._on_change(record)

    def _apply_job(self, job: Job) -> JobRecord:
        uid = job.metadata.uid
        record = self._service.records.get(uid)
        if record is None:
            self._service.records[uid] = record = JobRecord(job)
            for pod in self._strays.pop(uid, {}).values():
                self._apply_pod(record, pod)
        record.is_watched = True
        if record.job.metadata.resource_version != job.metadata.resource_version:
            record.update(job)
        return record

    def _on_pods(self, pods: Sequence[Pod]) -> None:
        first = not self._pods_listed
        self._pods_listed = True
        by_job: dict[str, list[Pod]] = {}
        for pod in pods:
            if (uid := pod.job_uid) is not None:
                by_job.setdefault(uid, []).append(pod)
        for uid, group in by_job.items():
            record = self._service.records.get(uid)
            if record is None:
                self._strays.setdefault(uid, {}).update({pod.metadata.uid: pod for pod in group})
                continue
            record.add_pods(group)
            for pod in group:
                known = record.pods[pod.metadata.uid]
                if first:
                    # A cursor may have come some way in their logs: reads will follow them from there.
                    known.seen.update((one.container, one.number) for one in known.instances())
                self._follow_pod(record, pod.metadata.uid)
        drop_oldest(self._strays, _MAX_STRAYS)
        now, found = datetime.now(UTC), {pod.metadata.uid for pod in pods}
        for record in self._service.records.values():
            for uid, known in record.pods.items():
                if uid not in found and known.gone_at is None:
                    record.lose_pod(uid, now)
                    self._follow_pod(record, uid)
        # What has begun since the agent's own list, or while nothing was watched.
        self._changes.add_all()

    def _on_pod(self, kind: str, pod: Pod) -> None:
        job_uid = pod.job_uid
        if job_uid is None:
            return
        record = self._service.records.get(job_uid)
        if record is None:
            if kind != "DELETED":
                self._strays.setdefault(job_uid, {})[pod.metadata.uid] = pod
                drop_oldest(self._strays, _MAX_STRAYS)
            else:
                self._strays.get(job_uid, {}).pop(pod.metadata.uid, None)
            return
        self._apply_pod(record, pod, is_gone=kind == "DELETED")
        self._on_change(record)

    def _apply_pod(self, record: JobRecord, pod: Pod, *, is_gone: bool = False) -> None:
        record.add_pods([pod])
        if is_gone:
            record.lose_pod(pod.metadata.uid, datetime.now(UTC))
        self._follow_pod(record, pod.metadata.uid)

    def _follow_pod(self, record: JobRecord, uid: str) -> None:
        """Follow the logs of runs of containers that have just begun, from their start."""
        known, service = record.pods[uid], self._service
        job = record.job
        is_wanted = job.metadata.uid in self._followed or job.pipeline not in self._unwanted
        for instance in known.instances():
            stream = service.streams.get(instance)
            if stream is not None:
                stream.on_change()
            elif (instance.container, instance.number) not in known.seen:
                known.seen.add((instance.container, instance.number))
                if is_wanted:
                    service.follow_log(record, instance)
