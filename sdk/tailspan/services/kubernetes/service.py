"""`KubernetesService`: Jobs of one or all namespaces of a cluster as jobs, containers of their pods as tasks.

While the agent runs, jobs and pods are watched and the log of each running container is followed: statuses, lists and
reads then cost no request. Without a change feed (commands, ``--once``) each of them is a request.

Source: the API of Kubernetes 1.36, as measured; kubernetes.io, "API Overview".
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

from tailspan.errors import AuthError, JobNotFoundError, ProtocolError, RequestRejectedError, ServiceError
from tailspan.logs.page import NANOS_PER_MS, LogPage
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, ChangeFeed, ChangeFeedService, Problem, SubmitService, TaskService
from tailspan.services._http_service import drop_oldest
from tailspan.services._requests import path_segment
from tailspan.services.kubernetes.feed import JobFeed
from tailspan.services.kubernetes.kubeconfig import Cluster, ClusterCredentials, find_cluster
from tailspan.services.kubernetes.log import START, LinePosition
from tailspan.services.kubernetes.objects import (
    ClusterEvent,
    ClusterEvents,
    CronJob,
    Job,
    JobList,
    PodList,
    Review,
    Version,
)
from tailspan.services.kubernetes.options import KubernetesOptions
from tailspan.services.kubernetes.reader import Cursor, InstanceReader, PageBuilder, key_of, merged
from tailspan.services.kubernetes.record import Instance, JobRecord, attributes_of, pending_reason
from tailspan.services.kubernetes.requests import KubernetesRequests
from tailspan.services.kubernetes.streams import FollowedLogs, streams_allowed
from tailspan.services.kubernetes.submission import job_manifest
from tailspan.services.kubernetes.watch import list_all

__all__ = ["KubernetesService"]

_ROWS = 500
_FRESH_S = 1.0
_MAX_RECORDS = 10_000
_REASON_S = 30.0
_PENDING_S = 10.0
# How long after the end of a container a request brings all that it wrote.
_FINAL = timedelta(seconds=5)
# Group, resource, subresource and verbs; whether jobs or lines need them; what does not work without.
RIGHTS = (
    ("batch", "jobs", "", ("list", "get", "watch"), True, "jobs are not seen"),
    ("", "pods", "", ("list", "watch"), True, "lines and tasks are not seen"),
    ("", "pods", "log", ("get",), True, "lines are not seen"),
    ("", "events", "", ("list",), False, "reasons of failures are less exact"),
    ("batch", "jobs", "", ("delete",), False, "jobs cannot be canceled"),
    ("batch", "jobs", "", ("create",), False, "jobs cannot be submitted"),
)
# The label batch.kubernetes.io/job-name of pods.
_OLDEST = (1, 27)
# They come with pods that run well.
_USUAL_WARNINGS = ("MissingClusterDNS", "DNSConfigForming")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = logging.getLogger(__name__)


class KubernetesService(TaskService, SubmitService, ChangeFeedService):
    """The Jobs of a cluster. A job's id is ``NAMESPACE/NAME:UID``; ``NAMESPACE/NAME`` is the last one."""

    Options = KubernetesOptions

    def __init__(self, name: str, options: KubernetesOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        """Read and open nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
            environ: The environment.
        """
        self.name = name
        self.options = options
        self.records: dict[str, JobRecord] = {}
        self._environ = environ
        self._known: Cluster | None = None
        self._http: KubernetesRequests | None = None
        self._long: KubernetesRequests | None = None
        self._streams: FollowedLogs | None = None
        self._streams_loop: object = None
        self._feed: JobFeed | None = None
        self._tries = 3
        # By uid: when the record was requested, by the monotonic clock.
        self._requested_s: dict[str, float] = {}
        self._statuses: dict[str, tuple[object, JobStatus]] = {}
        # By uid: what was asked for, when, and the reason.
        self._reasons: dict[str, tuple[object, float, str | None]] = {}
        # By key of a run of a container: the end of a log that was read to its end.
        self._whole: dict[bytes, LinePosition] = {}

    @property
    def identity(self) -> str:  # type: ignore[override]  # needs the kubeconfig, which a constructor does not read
        """The cluster: its configured name, or the address of its API server."""
        return f"kubernetes:{self.options.cluster or self.cluster.server}"

    @property
    def cluster(self) -> Cluster:
        """Where the API server is.

        Raises:
            ConfigError: There is no usable kubeconfig.
        """
        if self._known is None:
            self._known = find_cluster(self.options.kubeconfig, self.options.context, environ=self._environ)
        return self._known

    @property
    def http(self) -> KubernetesRequests:
        """Sends requests."""
        if self._http is None:
            options = self.options
            credentials = ClusterCredentials(self.name, self.cluster)
            self._http = KubernetesRequests(
                self.name,
                self.cluster,
                credentials,
                timeout_s=options.timeout,
                requests_per_second=options.requests_per_second,
                tries=self._tries,
            )
            self._long = KubernetesRequests(
                self.name, self.cluster, credentials, timeout_s=options.timeout, pace=self._http.pace, streams=True
            )
        return self._http

    @property
    def long_http(self) -> KubernetesRequests:
        """Opens replies without an end."""
        _ = self.http
        assert self._long is not None
        return self._long

    @property
    def streams(self) -> FollowedLogs:
        """The logs that are followed on this event loop."""
        loop = asyncio.get_running_loop()
        if self._streams is None or self._streams_loop is not loop:
            self._streams = FollowedLogs(self.long_http, streams_allowed(self.options.max_streams), self._on_lines)
            self._streams_loop = loop
        return self._streams

    @property
    def namespace(self) -> str | None:
        """The namespace of the jobs; None for all."""
        return None if self.options.all_namespaces else self.options.namespace or self.cluster.namespace

    @property
    def tries(self) -> int:
        """How often a request that only reads is sent before it raises its error."""
        return self._tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self._tries = tries
        if self._http is not None:
            self._http.tries = tries

    def collection(self, kind: str) -> str:
        """Return the path of all ``jobs`` or ``pods``."""
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        return f"{group}/namespaces/{path_segment(self.namespace)}/{kind}" if self.namespace else f"{group}/{kind}"

    @property
    def job_query(self) -> dict[str, str]:
        """The query of the jobs."""
        return {"labelSelector": self.options.label_selector} if self.options.label_selector else {}

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of a job."""
        record = await self._record(job_id, fresh=True)
        state = record.state(datetime.now(UTC))
        reason = await self._reason(record, state)
        is_complete = state.is_terminal and self._logs_are_complete(record)
        version = record.version, state, reason, is_complete
        known = self._statuses.get(job_id)
        if known is None or known[0] != version:
            known = version, self._status(job_id, record, state, reason, logs_complete=is_complete or None)
            self._statuses.pop(job_id, None)
            self._statuses[job_id] = known
            drop_oldest(self._statuses, _MAX_RECORDS)
        return known[1]

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return each run of each container of the job's pods."""
        return (await self._record(job_id)).tasks()

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of all containers, merged by time."""
        current = Cursor.read(cursor, service=self.name, job_id=job_id)
        record = await self._record(job_id, fresh=cursor is None)
        readers = self._readers(record, current, since_ms, is_resumed=cursor is not None)
        builder = PageBuilder(self.identity, job_id)

        try:
            async with aclosing(merged(readers)) as lines:
                async for reader, entry in lines:
                    if builder.is_full(entry):
                        yield builder.page(current.pack(readers))
                    builder.add(entry, reader.instance.task)
                    reader.passed(entry)
            if builder.has_lines:
                yield builder.page(current.pack(readers))
        finally:
            for reader in readers:
                await reader.aclose()
        self._whole |= {reader.key: reader.position for reader in readers if reader.is_whole}
        drop_oldest(self._whole, 10 * _MAX_RECORDS)
        for reader in readers:
            if reader.failure is not None:
                raise reader.failure

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs, newest first."""
        if await self._is_watching():
            records = list(self.records.values())
        else:
            jobs, _ = await list_all(self.http, self.collection("jobs"), JobList, self.job_query)
            records = [JobRecord(job) for job in jobs]
        records.sort(key=_made_at, reverse=True)
        now = datetime.now(UTC)
        for start in range(0, len(records), _ROWS):
            yield [self._row(record, now) for record in records[start : start + _ROWS]]

    async def cancel(self, job_id: str) -> JobStatus:
        """Delete a job, which ends its pods; an ended one stays as it is."""
        record = await self._record(job_id, fresh=True)
        if not record.state(datetime.now(UTC)).is_terminal:
            job = record.job
            # Not the next job of this name.
            body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": job.metadata.uid}}
            body |= {"propagationPolicy": "Background"}
            await self.http.send_json("DELETE", _path(job.metadata.namespace, job.metadata.name), body, job_id=job_id)
            record.delete(datetime.now(UTC))
            self.records[job.metadata.uid] = record
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
        """Create a job: a run of a CronJob, or a command in the container of the configured template.

        Args:
            command: ``cronjob/NAME``, then ``KEY=VALUE`` for environment variables; or a command.
            name: The name of the job, to which Kubernetes adds a suffix.
            attributes: What the job is about; becomes an annotation.
            timeout_s: Becomes ``activeDeadlineSeconds``.
            cwd: The working directory.
            env: Environment variables of the first container.

        Raises:
            ConfigError: There is no template, or it is not a Job.
            JobNotFoundError: There is no such CronJob.
        """
        namespace = self.namespace or self.cluster.namespace
        base: Any = None
        if command and command[0].startswith("cronjob/"):
            cron_job = command[0].partition("/")[2]
            path = f"/apis/batch/v1/namespaces/{path_segment(namespace)}/cronjobs/{path_segment(cron_job)}"
            base = await self.http.get_json(path, job_id=command[0])
            self.http.converted(base, CronJob, f"GET {path}", job_id=command[0])
        manifest = job_manifest(
            self.options.template,
            base,
            command,
            name=name,
            attributes=attributes,
            timeout_s=timeout_s,
            cwd=cwd,
            env=env,
        )
        namespace = manifest["metadata"].get("namespace") or namespace
        reply = await self.http.send_json("POST", f"/apis/batch/v1/namespaces/{path_segment(namespace)}/jobs", manifest)
        job = self.http.converted(reply, Job, "POST jobs")
        record = JobRecord(job)
        return self._status(job.job_id, record, record.state(datetime.now(UTC)), None, logs_complete=None)

    async def find_problems(self) -> Sequence[Problem]:
        """Return the rights that are missing, and whether the cluster is too old."""
        missing: dict[tuple[str, bool], list[str]] = {}
        for group, resource, part, verbs, is_fatal, effect in RIGHTS:
            for verb in verbs:
                attributes = {"group": group, "resource": resource, "subresource": part, "verb": verb}
                attributes |= {"namespace": self.namespace} if self.namespace else {}
                body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
                path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
                reply = await self.http.send_json(
                    "POST", path, {**body, "spec": {"resourceAttributes": attributes}}, reads=True
                )
                if not self.http.converted(reply, Review, f"POST {path}").status.allowed:
                    named = f"{verb} {resource}{'/' if part else ''}{part}"
                    missing.setdefault((effect, is_fatal), []).append(named)
        where = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        found = [
            Problem(f"may not {', '.join(rights)} {where}: {effect}; see deploy/kubernetes/jobs/rbac.yaml", is_fatal)
            for (effect, is_fatal), rights in missing.items()
        ]
        version = await self._version()
        if version.number is not None and version.number < _OLDEST:
            needed = ".".join(map(str, _OLDEST))
            text = f"Kubernetes {version.git_version} does not label the pods of jobs as {needed} does"
            found.append(Problem(f"{text}: lines and tasks are not seen"))
        if not self.cluster.verifies:
            text = f"{self.cluster.source} turns off the verification of the API server's certificate"
            found.append(Problem(f"{text}: anybody between can read the token", is_fatal=False))
        return found

    async def _version(self) -> Version:
        try:
            return await self.http.decoded("/version", Version)
        except (AuthError, ProtocolError):
            return Version()  # a cluster may keep its version secret

    def open_changes(self) -> ChangeFeed | None:
        """Begin to watch jobs and pods."""
        if self._feed is not None:
            self._feed.close()
        if not self.cluster.verifies:
            text = "service %s: the kubeconfig turns off the verification of the API server's certificate"
            _log.warning(text, self.name)
        self._feed = JobFeed(self)
        return self._feed

    def forget_feed(self, feed: JobFeed) -> None:
        """Note that a feed is closed."""
        if self._feed is feed:
            self._feed = None

    async def aclose(self) -> None:
        """Close streams and connections."""
        if self._feed is not None:
            self._feed.close()
        streams, self._streams = self._streams, None
        if streams is not None and self._streams_loop is asyncio.get_running_loop():
            await streams.aclose()
        for http in (self._http, self._long):
            if http is not None:
                await http.aclose()

    def follow_log(self, record: JobRecord, instance: Instance, after: LinePosition = START) -> bool:
        """Follow the log of a run of a container if it is not followed; return whether it is."""
        streams = self.streams
        if streams.get(instance) is None:
            if not streams.has_room and not (self._feed is not None and self._feed.make_room(record)):
                return False
            streams.open(record, instance, after)
        return True

    def _on_lines(self, record: JobRecord) -> None:
        if self._feed is not None:
            self._feed.on_lines(record)

    def _readers(
        self, record: JobRecord, current: Cursor, since_ms: int | None, *, is_resumed: bool
    ) -> list[InstanceReader]:
        """Return a reader for each run of a container that may have lines left."""
        readers: list[InstanceReader] = []
        for instance in record.instances():
            key = key_of(instance)
            position = current.positions.get(key, START)
            if key in current.whole or (is_resumed and self._whole.get(key) == position):
                current.close(key)
                continue
            if position == START and since_ms:
                position = LinePosition(since_ms * NANOS_PER_MS, 0)
            readers.append(self._reader(record, instance, position, trims=is_resumed))
        return readers

    def _reader(self, record: JobRecord, instance: Instance, position: LinePosition, *, trims: bool) -> InstanceReader:
        is_live = self._feed is not None or trims
        if is_live and instance.terminated is None and not instance.pod.is_over:
            self.follow_log(record, instance, position)
        stream = self._streams.get(instance) if self._streams is not None else None
        ended = instance.terminated
        ended_at = (ended.finished_at if ended is not None else None) or instance.pod.gone_at
        is_over = ended is not None or instance.pod.is_over
        return InstanceReader(
            instance,
            position,
            stream,
            self.http,
            job_id=record.job_id,
            trims=trims,
            is_final=is_over and (ended_at is None or datetime.now(UTC) - ended_at > _FINAL),
        )

    async def _is_watching(self) -> bool:
        """Return whether the records are those of the present; waits for the first lists, which are under way."""
        if self._feed is None:
            return False
        await self._feed.listed()
        return self._feed is not None and self._feed.is_current

    async def _record(self, job_id: str, *, fresh: bool = False) -> JobRecord:
        """Return what is known of a job: watched, or requested if that is older than a second."""
        namespace, name, uid = _split(job_id)
        if not name:
            text = f"{job_id!r} is not a job of Kubernetes: its id is NAMESPACE/NAME:UID"
            raise JobNotFoundError(text, service=self.name, job_id=job_id)
        is_watching = await self._is_watching()
        known = self.records.get(uid)
        if known is not None and (
            known.deleted_at is not None
            or is_watching
            or (not fresh and time.monotonic() - self._requested_s.get(uid, -_FRESH_S) < _FRESH_S)
        ):
            return known
        try:
            job = await self.http.decoded(_path(namespace, name), Job, job_id=job_id)
        except JobNotFoundError:
            job = None
        if job is None or (uid and job.metadata.uid != uid):
            if known is None:
                text = f"service {self.name} knows no job {job_id}"
                raise JobNotFoundError(text, service=self.name, job_id=job_id)
            known.delete(datetime.now(UTC), was_missed=known.may_have_ended)
            return known
        query = {"labelSelector": f"batch.kubernetes.io/controller-uid={job.metadata.uid}"}
        pods, _ = await list_all(self.http, f"/api/v1/namespaces/{path_segment(namespace)}/pods", PodList, query)
        found = {pod.metadata.uid: pod for pod in pods}
        record = self.records.get(job.metadata.uid)
        if record is None:
            self.records[job.metadata.uid] = record = JobRecord(job)
        record.update(job)
        record.add_pods(list(found.values()))
        now = datetime.now(UTC)
        for gone in record.pods.keys() - found.keys():
            record.lose_pod(gone, now)
        self._requested_s[job.metadata.uid] = time.monotonic()
        if self._feed is None:
            drop_oldest(self.records, _MAX_RECORDS)
        drop_oldest(self._requested_s, _MAX_RECORDS)
        return record

    def _logs_are_complete(self, record: JobRecord) -> bool:
        """Return whether no line will come: all streams are over, and what has none ended some seconds ago."""
        final_before = datetime.now(UTC) - _FINAL
        if not all(pod.is_over for pod in record.pods.values()):
            return False
        for instance in record.instances():
            stream = self._streams.get(instance) if self._streams is not None else None
            ended = instance.terminated.finished_at if instance.terminated is not None else instance.pod.gone_at
            if not (stream.is_over if stream is not None else ended is not None and ended <= final_before):
                return False
        return True

    def _status(
        self, job_id: str, record: JobRecord, state: JobState, reason: str | None, *, logs_complete: bool | None
    ) -> JobStatus:
        job = record.job
        meta, counts = job.metadata, job.status
        pods = list(record.pods.values())
        node = pods[-1].pod.spec.node_name if pods else None
        details = {
            "k8s.namespace.name": meta.namespace,
            "k8s.job.name": meta.name,
            "k8s.job.uid": meta.uid,
            "k8s.cronjob.name": job.cron_job,
            "k8s.pod.name": pods[-1].pod.metadata.name if pods else None,
            "k8s.node.name": node,
            "k8s.cronjob.scheduled_at": meta.annotations.scheduled_at if meta.annotations else None,
        }
        details |= {f"k8s.job.label.{key}": value for key, value in (meta.labels or {}).items() if _is_own(key)}
        exit_code = None
        if state.is_terminal:
            codes = [one.terminated.exit_code for one in record.instances() if one.terminated is not None]
            failed = [code for code in codes if code]
            exit_code = 0 if state is JobState.SUCCEEDED else failed[-1] if failed else None
        total = job.spec.completions or job.spec.parallelism or 1
        template = self.options.job_url
        url = template and template.format(namespace=meta.namespace, name=meta.name, uid=meta.uid)
        return self.make_status(
            job_id,
            state,
            job_name=job.pipeline,
            instance_id=node,
            submitted_at=meta.creation_timestamp,
            started_at=counts.start_time if state is not JobState.PENDING else None,
            finished_at=record.ended_at() if state.is_terminal else None,
            exit_code=exit_code,
            error=reason if state is not JobState.SUCCEEDED else None,
            attributes=attributes_of(job),
            details={key: value for key, value in details.items() if value},
            url=url,
            total_tasks=total,
            finished_tasks=min(total, counts.succeeded or 0),
            logs_complete=logs_complete,
        )

    def _row(self, record: JobRecord, now: datetime) -> ListedJob:
        job = record.job
        state = record.state(now)
        return ListedJob(
            job_id=job.job_id,
            job_name=job.pipeline,
            state=state,
            created_at=job.metadata.creation_timestamp,
            state_since=record.ended_at() if state.is_terminal else job.status.start_time,
            service=self.name,
        )

    async def _reason(self, record: JobRecord, state: JobState) -> str | None:
        """Return why a job has not started or not succeeded, with the texts of its events."""
        job = record.job
        if state is JobState.CANCELED:
            return "the job was deleted before its end"
        if state is JobState.LOST:
            return "the job was deleted while it could not be watched"
        failed = job.condition("Failed")
        if failed is None:
            if state is not JobState.PENDING:
                return None
            reason = pending_reason(record)
            age = datetime.now(UTC) - (job.metadata.creation_timestamp or _EPOCH)
            if reason is not None or job.condition("Suspended") or age < timedelta(seconds=_PENDING_S):
                return reason
        uid, asked = job.metadata.uid, state
        known = self._reasons.get(uid)
        if known is None or known[0] != asked or (not job.is_over and time.monotonic() - known[1] > _REASON_S):
            parts = [": ".join(one for one in (failed.reason, failed.message) if one)] if failed is not None else []
            causes = [task.error for task in record.tasks() if task.failed and task.error]
            parts += causes[-1:] or await self._warnings(record)
            known = asked, time.monotonic(), "; ".join(dict.fromkeys(parts)) or None
            self._reasons.pop(uid, None)
            self._reasons[uid] = known
            drop_oldest(self._reasons, _MAX_RECORDS)
        return known[2]

    async def _warnings(self, record: JobRecord) -> list[str]:
        """Return the texts of the newest warnings about a job and its newest pod; none if they cannot be read."""
        meta = record.job.metadata
        about = [(meta.uid, "Job")] if record.job.condition("Failed") is None else []
        if record.pods:
            about.append((next(reversed(record.pods)), "Pod"))
        texts: list[str] = []
        for uid, kind in about:
            query = {
                "fieldSelector": f"involvedObject.uid={uid},involvedObject.kind={kind},type=Warning",
                "limit": "50",
            }
            path = f"/api/v1/namespaces/{path_segment(meta.namespace)}/events"
            try:
                events = (await self.http.decoded(path, ClusterEvents, query)).items
            except (AuthError, JobNotFoundError, ProtocolError, RequestRejectedError):
                continue
            except ServiceError:
                # The status must not fail because of its details.
                continue
            found = [event for event in events if event.reason not in _USUAL_WARNINGS]
            for event in sorted(found, key=_event_time)[-1:]:
                text = " ".join((event.message or "").split())
                texts.append(f"{event.reason}: {text}"[:500])
        return texts


def _split(job_id: str) -> tuple[str, str, str]:
    """Return namespace, name and uid of a job id; without a uid it is empty."""
    namespace, _, rest = job_id.partition("/")
    name, _, uid = rest.partition(":")
    return namespace, name if "/" not in name else "", uid


def _path(namespace: str, name: str) -> str:
    return f"/apis/batch/v1/namespaces/{path_segment(namespace)}/jobs/{path_segment(name)}"


def _made_at(record: JobRecord) -> tuple[datetime, str]:
    return record.job.metadata.creation_timestamp or _EPOCH, record.job_id


def _event_time(event: ClusterEvent) -> datetime:
    return event.last_timestamp or event.event_time or _EPOCH


def _is_own(label: str) -> bool:
    """Return whether a label was set by people: those of the job controller repeat name and uid."""
    return not label.startswith("batch.kubernetes.io/") and label not in ("job-name", "controller-uid")
