"""Kubernetes' Jobs as jobs, against a fake that has what was measured of the real API server."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import resource
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceUnavailableError
from tailspan.logs.page import LogPage
from tailspan.models import JobState, TaskRun
from tailspan.services import ChangeFeed
from tailspan.services.kubernetes import KubernetesService, streams
from tailspan.services.kubernetes.kubeconfig import find_cluster
from tailspan.services.kubernetes.options import KubernetesOptions
from tailspan.services.registry import open_service
from tailspan.testing import ServiceConformance
from tests.fakes.json_api import pages_of
from tests.fakes.kubernetes import FakeKubernetes


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    """A cluster without jobs."""
    with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
def service(cluster: FakeKubernetes, tmp_path: Path) -> KubernetesService:
    """The service of that cluster."""
    return service_of(cluster, tmp_path)


def service_of(fake: FakeKubernetes, directory: Path, **options: Any) -> KubernetesService:
    """Return a service; it sends as many requests as it likes."""
    keys = {"kubeconfig": fake.kubeconfig(directory), "requests_per_second": 10_000, **options}
    return KubernetesService("k8s", KubernetesOptions.model_validate(keys), environ={})


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, cluster: FakeKubernetes, tmp_path: Path) -> None:
        """An ended job with lines of two containers, many of one time."""
        self.path = cluster.kubeconfig(tmp_path)
        job = cluster.add_job()
        pod = job.add_pod("main", "second", init=("prep",))
        pod.init["prep"].start().write("prepared")
        now_ns = cluster.tick()
        for number in range(300):
            pod.main.write(f"line {number}", time_ns=now_ns + number // 7 * 300_000_000)
            pod.containers["second"].write(f"second {number}")
        job.finish()
        self.job_id = job.job_id

    def make_service(self) -> KubernetesService:
        """A new service."""
        keys = {"kubeconfig": self.path, "requests_per_second": 10_000}
        return KubernetesService("k8s", KubernetesOptions.model_validate(keys), environ={})


class Reading:
    """What an agent has read of a job, by its cursor.

    Attributes:
        pages: The pages so far.
        cursor: Where the next read begins.
    """

    def __init__(self, service: KubernetesService, job_id: str, cursor: bytes | None = None) -> None:
        self.pages: list[LogPage] = []
        self.cursor = cursor
        self._service = service
        self._job_id = job_id

    @property
    def lines(self) -> list[str]:
        """The lines so far."""
        return [line.decode("utf-8", "replace") for page in self.pages for line in page.lines]

    @property
    def uids(self) -> list[str]:
        """Their uids."""
        return [uid for page in self.pages for uid in page.uids()]

    async def read(self) -> None:
        """Read what is readable now."""
        async with aclosing(self._service.read_logs(self._job_id, self.cursor)) as pages:
            async for page in pages:
                self.pages.append(page)
                self.cursor = page.cursor

    async def until(self, count: int) -> None:
        """Read until there are this many lines."""

        async def enough() -> bool:
            await self.read()
            return len(self.lines) >= count

        await eventually(enough)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def following(service: KubernetesService, *job_ids: str) -> AsyncIterator[ChangeFeed]:
    """Follow jobs as an agent does."""
    async with aclosing(service):
        feed = service.open_changes()
        assert feed is not None
        for job_id in job_ids:
            feed.follow(job_id)
        async with asyncio.timeout(20):
            await feed.wait()
        yield feed


async def is_state(service: KubernetesService, job_id: str, state: JobState) -> bool:
    """Return whether a job has a state and its log is complete."""
    status = await service.get_job(job_id)
    return status.state is state and status.logs_complete is True


def test_rotation_loses_nothing_of_a_followed_log(cluster, service):
    """Each file is rotated away before a poll could have read it: a follower has every line once."""
    job = cluster.add_job()
    pod = job.add_pod()
    pod.main.write("first")

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            await reading.until(1)
            for number in range(200):
                pod.main.write(f"line {number}")
                if number % 5 == 0:
                    pod.main.rotate()
            await reading.until(201)
            job.finish()
            await eventually(lambda: is_state(service, job.job_id, JobState.SUCCEEDED))
            await reading.read()
        assert reading.lines == ["first", *(f"line {number}" for number in range(200))]
        assert len(set(reading.uids)) == 201

    asyncio.run(run())


def test_a_job_that_is_deleted_in_mid_follow(cluster, service):
    """The lines that its pod writes while it is ended are there, then the job is canceled."""
    job = cluster.add_job()
    pod = job.add_pod()
    pod.main.write("working")

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            await reading.until(1)
            job.delete()
            pod.delete()
            pod.main.write("got TERM", "last line")
            await reading.until(2)
            assert (await service.get_job(job.job_id)).state is JobState.RUNNING
            pod.main.write("very last", newline=False)
            pod.main.end(143)
            pod.vanish()
            await eventually(lambda: is_state(service, job.job_id, JobState.CANCELED))
            await reading.read()
            (task,) = await service.list_tasks(job.job_id)
            assert (task.result, task.exit_code) == ("cancellation", 143)
            status = await service.get_job(job.job_id)
            assert status.error == "the job was deleted before its end"
            # A new reader gets what is left in memory, for example for the reason of a failure.
            assert [line for page in await all_pages(service, job.job_id) for line in page.lines][-1] == b"very last"
        assert reading.lines == ["working", "got TERM", "last line", "very last"]

    asyncio.run(run())


def test_a_job_that_is_deleted_without_its_pods(cluster, service):
    """``--cascade=orphan``: the pod goes on, and says by a label only whose it was; its end is that of the job."""
    job = cluster.add_job()
    pod = job.add_pod()
    pod.main.write("working")

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            await reading.until(1)
            job.delete()
            pod.owners = []
            pod.publish()
            pod.main.write("alone")
            await reading.until(2)
            assert (await service.get_job(job.job_id)).state is JobState.RUNNING
            pod.main.end()
            pod.end()
            await eventually(lambda: is_state(service, job.job_id, JobState.CANCELED))
            assert [task.result for task in await service.list_tasks(job.job_id)] == ["success"]

    asyncio.run(run())


async def all_pages(service: KubernetesService, job_id: str) -> list[LogPage]:
    """Return all pages from the start."""
    return [page async for page in service.read_logs(job_id)]


def test_a_short_job_that_is_gone_before_anything_reads_it(cluster, service):
    """A job with a TTL of nothing: started, ended and deleted between two lists of the agent."""

    async def run() -> None:
        async with following(service) as feed:
            job = cluster.add_job("quick", ttlSecondsAfterFinished=0)
            pod = job.add_pod()
            pod.main.write("only line")
            job.finish()
            job_id = job.job_id

            async def is_read() -> bool:
                return job_id in service_records(service) and await is_state(service, job_id, JobState.SUCCEEDED)

            await eventually(is_read)
            pod.vanish()
            job.delete()
            rows = [row async for page in service.list_jobs() for row in page]
            assert [(row.job_id, row.state) for row in rows] == [(job_id, JobState.SUCCEEDED)]
            feed.follow(job_id)
            reading = Reading(service, job_id)
            await reading.read()
            assert reading.lines == ["only line"]
            await eventually(lambda: is_deleted(service))
            feed.leave(job_id)
            with pytest.raises(JobNotFoundError):
                await service.get_job(job_id)

    asyncio.run(run())


async def is_deleted(service: KubernetesService) -> bool:
    """Return whether the only job that the service knows is deleted."""
    (record,) = service.records.values()
    return record.deleted_at is not None


def service_records(service: KubernetesService) -> set[str]:
    """Return the ids of the jobs that the service knows without a request."""
    return {record.job_id for record in service.records.values()}


def test_the_api_server_is_away(cluster, service):
    """Connections are cut in mid-follow, some for a while: each log goes on by time and count, no line comes twice."""
    job = cluster.add_job()
    pod = job.add_pod("main", "second")
    same_ns = cluster.tick()

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            written = 0
            for round_ in range(4):
                # Many lines of one time, cut in the middle.
                pod.main.write(*(f"main {round_}.{number}" for number in range(5)), time_ns=same_ns)
                pod.containers["second"].write(*(f"second {round_}.{number}" for number in range(5)))
                written += 10
                await reading.until(written)
                if round_ == 2:
                    cluster.stop()
                    pod.main.write("while it was away", time_ns=same_ns)
                    written += 1
                    cluster.start()
                else:
                    cluster.cut()
            await reading.until(written)
            job.finish()
            await eventually(lambda: is_state(service, job.job_id, JobState.SUCCEEDED))
            await reading.read()
        assert len(reading.lines) == len(set(reading.uids)) == written
        main = [line for line in reading.lines if not line.startswith("second")]
        assert main[-1] == "main 3.4"

    asyncio.run(run())


def test_another_agent_goes_on_at_the_cursor(cluster, service, tmp_path):
    """An agent that was killed: the next one begins each log where the cursor is, and reads no line twice."""
    cluster.offset_s = -60
    job = cluster.add_job(parallelism=3, completions=3)
    pods = [job.add_pod() for _ in range(3)]
    for pod in pods:
        pod.main.write(*(f"{pod.name} {number}" for number in range(10)))

    async def run() -> None:
        first = Reading(service, job.job_id)
        async with following(service, job.job_id):
            await first.until(30)
        for pod in pods:
            pod.main.write(*(f"{pod.name} {number}" for number in range(10, 20)))
        pods[0].main.end()
        pods[0].end()
        # The first page only: the rest comes again.
        second = Reading(service_of(cluster, tmp_path), job.job_id, first.pages[0].cursor)
        async with following(second._service, job.job_id):
            await second.until(60 - len(first.pages[0].lines))
            job.finish()
            await eventually(lambda: is_state(second._service, job.job_id, JobState.SUCCEEDED))
            await second.read()
        lines = first.pages[0].lines + [line for page in second.pages for line in page.lines]
        assert sorted(lines) == sorted(f"{pod.name} {number}".encode() for pod in pods for number in range(20))

    asyncio.run(run())


def test_restarts_in_place_are_attempts(cluster, service):
    """OnFailure: each run of the container is an attempt with its own lines; the sentence of the kubelet is no line."""
    cluster.offset_s = -60
    job = cluster.add_job()
    pod = job.add_pod()
    cluster.broken_previous = True

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            for attempt in range(3):
                if attempt:
                    cluster.offset_s += 10
                    pod.main.start(publish=False)  # the log of the new run is there before the status says so
                pod.main.write(f"start {attempt}")
                if attempt:
                    pod.publish()
                pod.main.write(f"end {attempt}")
                pod.main.end(4)
                if attempt < 2:
                    pod.main.back_off()
                await reading.until(2 * attempt + 2)
            job.finish(4)
            await eventually(lambda: is_state(service, job.job_id, JobState.FAILED))
            await reading.read()
            tasks = await service.list_tasks(job.job_id)
            status = await service.get_job(job.job_id)
        assert [(task.task_id, task.attempt, task.exit_code) for task in tasks] == [("main", n, 4) for n in (1, 2, 3)]
        assert reading.lines == [f"{word} {attempt}" for attempt in range(3) for word in ("start", "end")]
        found = [ref.attempt for page in reading.pages for ref in page.tasks]
        assert sorted(set(found)) == [1, 2, 3]
        assert (status.exit_code, status.error) == (
            4,
            "BackoffLimitExceeded: Job has reached the specified backoff limit; exit code 4",
        )

    asyncio.run(run())


def test_a_run_that_ended_before_the_status_showed_it(cluster, service):
    """The status jumps from the first run to the second: the log of the first comes by ``previous``."""
    job = cluster.add_job()
    pod = job.add_pod(start=False)

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            pod.main.start(publish=False).write("first run")
            pod.main.end(1, publish=False)
            pod.main.start(publish=False).write("second run")
            pod.publish()
            await reading.until(2)
            job.finish()
            await eventually(lambda: is_state(service, job.job_id, JobState.SUCCEEDED))
        assert sorted(reading.lines) == ["first run", "second run"]

    asyncio.run(run())


def test_a_watch_that_has_expired(cluster, service):
    """410: jobs and pods are listed again. A job that is gone then may have ended first, if something deletes those."""
    jobs = [cluster.add_job("kept"), cluster.add_job("deleted"), cluster.add_job("with-ttl", ttlSecondsAfterFinished=3)]
    pods = [job.add_pod() for job in jobs]

    async def run() -> None:
        readings = [Reading(service, job.job_id) for job in jobs]
        async with following(service, *(job.job_id for job in jobs)):
            for pod, reading in zip(pods, readings, strict=True):
                pod.main.write("before")
                await reading.until(1)
            cluster.stop()
            for job, pod in zip(jobs[1:], pods[1:], strict=True):
                job.delete()
                pod.vanish()
            new = jobs[0].add_pod(name="kept-second")
            new.main.write("of the new pod")
            cluster.compact()
            cluster.start()
            for job, state in zip(jobs[1:], (JobState.CANCELED, JobState.LOST), strict=True):
                await eventually(lambda job=job, state=state: is_state(service, job.job_id, state))
            await readings[0].until(2)
        assert readings[0].lines == ["before", "of the new pod"]

    asyncio.run(run())


def test_more_containers_than_streams(cluster, tmp_path, caplog):
    """Two of four logs are followed; the others are read every few seconds, which a warning says once."""
    service = service_of(cluster, tmp_path, max_streams=2)
    job = cluster.add_job(parallelism=4, completions=4)
    pods = [job.add_pod() for _ in range(4)]

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id) as feed:
            for number in range(2):
                for pod in pods:
                    pod.main.write(f"{pod.name} {number}")
                await reading.until(4 * number + 4)
            assert cluster.open_streams() == 2
            async with asyncio.timeout(20):
                while not caplog.records:
                    assert job.job_id in (await feed.wait() or ())
            # A stream that ends makes room for another.
            pods[0].main.end()
            pods[0].end()
            pods[1].main.end()
            pods[1].end()

            async def others_are_followed() -> bool:
                await reading.read()
                return cluster.open_streams() == 2

            await eventually(others_are_followed)
            job.finish()
            await reading.until(8)
        assert len(set(reading.uids)) == len(reading.lines) == 8
        assert "2 logs are followed, which is the limit; those of 2 further containers" in caplog.text

    asyncio.run(run())


def test_jobs_that_are_followed_come_first(cluster, tmp_path):
    """The logs of new jobs are followed at once; one that the agent follows displaces one that it does not."""
    service = service_of(cluster, tmp_path, max_streams=2)

    async def run() -> None:
        async with following(service) as feed:
            others = [cluster.add_job(f"other-{number}") for number in range(2)]
            for job in others:
                job.add_pod().main.write("of another team")
            await eventually(lambda: are_open(cluster, 2))
            job = cluster.add_job("mine")
            feed.follow(job.job_id)
            job.add_pod().main.write("mine")
            reading = Reading(service, job.job_id)
            await reading.until(1)
            followed = {stream.job.job_id for stream in service.streams}
            assert job.job_id in followed
            assert len(followed) == 2

    asyncio.run(run())


async def are_open(cluster: FakeKubernetes, count: int) -> bool:
    """Return whether this many logs are followed."""
    return cluster.open_streams() == count


def test_a_reader_that_stops_stops_the_server(cluster, service, monkeypatch):
    """A buffer that is full is not filled further, and the socket is not read; nothing is lost of what follows."""
    monkeypatch.setattr(streams, "_MAX_BYTES", 50_000)
    job = cluster.add_job()
    pod = job.add_pod()

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            await reading.read()
            total = 2_000
            for start in range(0, total, 1000):
                pod.main.write(*(f"{number:01000}" for number in range(start, start + 1000)))
            await eventually(lambda: held(service, 50_000))
            await asyncio.sleep(0.2)
            held_bytes, sent = service.streams.held_bytes, cluster.sent_bytes
            assert held_bytes < 500_000
            assert sent < 1_000_000
            await reading.until(total)
        assert reading.lines == [f"{number:01000}" for number in range(total)]

    asyncio.run(run())


async def held(service: KubernetesService, size: int) -> bool:
    """Return whether the buffers hold at least this many bytes."""
    return service.streams.held_bytes >= size


def test_the_limit_of_open_files(monkeypatch, caplog):
    """The soft limit is raised as far as it may be; what does not fit is said."""
    limits = [[1024, 4096]]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits[-1]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, found: limits.append(found))
    assert streams.streams_allowed(1000) == 1000
    assert limits[-1] == (1256, 4096)
    assert not caplog.records
    assert streams.streams_allowed(5000) == 4096 - 256
    assert "allows 3840 followed logs" in caplog.text


def test_hostile_output(cluster, service):
    """Bytes that are no text, carriage returns, empty lines, a line of 1 MiB, one of 9 MiB, no newline at the end."""
    job = cluster.add_job()
    pod = job.add_pod()
    pod.main.write(b"\xff\xfe\x00binary", b"a\rb", b"", b"x" * (1 << 20), b"y" * (9 << 20), b" 2026-11-29T00:00:00Z z")
    pod.main.write(b"no newline", newline=False)
    job.finish()
    lines = [line for page in pages_of(service, job.job_id) for line in page.lines]
    assert lines[:3] == [b"\xff\xfe\x00binary", b"a\rb", b""]
    assert b"".join(lines[4:-2]) == b"y" * (9 << 20)
    assert lines[3] == b"x" * (1 << 20)
    assert lines[-2:] == [b" 2026-11-29T00:00:00Z z", b"no newline"]


def test_states_and_times(cluster, service):
    """Suspended and the targets are not ends; a deadline is a timeout; a failed job ends with its condition."""
    job = cluster.add_job()

    async def status_of() -> Any:
        async with aclosing(service):
            return await service.get_job(job.job_id)

    assert asyncio.run(status_of()).state is JobState.PENDING
    job.condition("Suspended", "JobSuspended", "Job suspended")
    suspended = asyncio.run(status_of())
    assert (suspended.state, suspended.error, suspended.started_at) == (JobState.PENDING, "Job suspended", None)
    job.status["conditions"].clear()
    job.publish()
    pod = job.add_pod()
    assert asyncio.run(status_of()).state is JobState.RUNNING
    job.condition("FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline")
    running = asyncio.run(status_of())
    assert (running.state, running.finished_at) == (JobState.RUNNING, None)
    pod.main.end(137)
    assert asyncio.run(status_of()).state is JobState.RUNNING
    pod.vanish()
    job.condition("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    ended = asyncio.run(status_of())
    assert (ended.state, ended.exit_code) == (JobState.TIMED_OUT, 137)
    assert ended.finished_at is not None
    assert ended.error == "DeadlineExceeded: Job was active longer than specified deadline; exit code 137"


@pytest.mark.parametrize(
    ("waiting", "conditions", "events", "expected"),
    [
        ({"reason": "ErrImagePull", "message": "no such image"}, [], [], "ErrImagePull: no such image"),
        ({"reason": "ContainerCreating"}, [], [], None),
        (
            None,
            [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: cpu"}],
            [],
            "Unschedulable: 0/1 nodes: cpu",
        ),
        (
            {"reason": "ContainerCreating"},
            [],
            [("FailedMount", 'configmap "x" not found')],
            'FailedMount: configmap "x" not found',
        ),
    ],
)
def test_why_a_job_has_not_started(cluster, service, waiting, conditions, events, expected):
    """The pod says it, or after a while its events do."""
    made = "2026-11-29T00:00:00Z" if events else None
    job = cluster.add_job(**({"creationTimestamp": made} if made else {}))
    pod = job.add_pod(start=False)
    pod.main.status["state"] = {"waiting": waiting} if waiting else {}
    pod.extra["conditions"] = conditions
    pod.publish()
    for reason, message in events:
        cluster.add_event(pod.uid, "Pod", reason, message)
    status = asyncio.run(get(service, job.job_id))
    assert (status.state, status.error) == (JobState.PENDING, expected)


async def get(service: KubernetesService, job_id: str) -> Any:
    """Return a status with a service that is closed then."""
    async with aclosing(service):
        return await service.get_job(job_id)


@pytest.mark.parametrize(
    ("reason", "pod_status", "expected"),
    [
        ("OOMKilled", {}, "OOMKilled: exit code 137"),
        (None, {"reason": "Evicted", "message": "low on memory"}, "Evicted: low on memory"),
        (
            None,
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            "PreemptionByScheduler",
        ),
        ("ContainerCannotRun", {}, "ContainerCannotRun: exit code 137"),
    ],
)
def test_why_a_job_failed(cluster, service, reason, pod_status, expected):
    """The reason of the container or its pod follows that of the job."""
    job = cluster.add_job()
    pod = job.add_pod()
    pod.main.end(137, reason)
    pod.extra |= pod_status
    job.finish(137)
    status = asyncio.run(get(service, job.job_id))
    assert status.error == f"BackoffLimitExceeded: Job has reached the specified backoff limit; {expected}"


def tasks_of(service: KubernetesService, job_id: str) -> list[TaskRun]:
    """Return the tasks of a job."""

    async def run() -> list[TaskRun]:
        async with aclosing(service):
            return list(await service.list_tasks(job_id))

    return asyncio.run(run())


def test_pods_that_follow_each_other_are_attempts(cluster, service):
    """Never: each pod is an attempt, also those that are gone; parallel pods have tasks of their own."""
    job = cluster.add_job(name="retries")
    job.status |= {"failed": 2, "active": 1}
    for code in (3, 3):
        job.add_pod().main.end(code)
    job.pods[0].vanish()
    job.add_pod(init=("prep",)).init["prep"].start().end()
    job.publish()
    tasks = tasks_of(service, job.job_id)
    assert [(task.task_id, task.attempt, task.result) for task in tasks] == [
        ("main", 2, "failure"),
        ("prep", 3, "success"),
        ("main", 3, None),
    ]
    assert tasks[-1].after == ("prep",)
    parallel = cluster.add_job(name="wide", parallelism=2, completions=2)
    names = [parallel.add_pod().name for _ in range(2)]
    assert {(task.task_id, task.name) for task in tasks_of(service, parallel.job_id)} == {
        (f"{name}/main", "main") for name in names
    }
    indexed = cluster.add_job(name="indexed", completions=2)
    indexed.add_pod(index=1).main.end(1)
    indexed.add_pod(index=0)
    indexed.add_pod(index=1)
    found = {(task.task_id, task.attempt) for task in tasks_of(service, indexed.job_id)}
    assert found == {("0/main", 1), ("1/main", 1), ("1/main", 2)}


def test_names_and_ids(cluster, service, tmp_path):
    """A run of a CronJob has its name; a name that is used again is another job; others of the label are not listed."""
    cron = cluster.add_job("nightly-29", cron_job="nightly", labels={"team": "geo"})
    cluster.add_job("load-x7f", generateName="load-", labels={"team": "geo"})
    first = cluster.add_job("again", namespace="other", labels={"team": "sea"})
    assert asyncio.run(get(service, cron.job_id)).details["k8s.cronjob.name"] == "nightly"
    selected = service_of(cluster, tmp_path, all_namespaces=True, label_selector="team=geo", cluster="prod")
    assert [row.job_name for row in asyncio.run(rows_of(selected))] == ["nightly", "load"]
    assert selected.identity == "kubernetes:prod"
    first.delete()
    second = cluster.add_job("again", namespace="other")
    assert asyncio.run(get(service, "other/again")).details["k8s.job.uid"] == second.uid
    with pytest.raises(JobNotFoundError):
        asyncio.run(get(service, first.job_id))
    linked = service_of(cluster, tmp_path, job_url="https://console/{namespace}/{name}?uid={uid}")
    assert asyncio.run(get(linked, second.job_id)).url == f"https://console/other/again?uid={second.uid}"


async def rows_of(service: KubernetesService) -> list[Any]:
    """Return all rows of the list."""
    async with aclosing(service):
        return [row async for page in service.list_jobs() for row in page]


def test_a_long_list(cluster, service):
    """Lists come in chunks, newest first; one that expires in the middle begins again."""
    for number in range(600):
        cluster.add_job(f"job-{number:03}", creationTimestamp=f"2026-11-29T00:{number // 60:02}:{number % 60:02}Z")
    rows = asyncio.run(rows_of(service))
    assert [row.job_name for row in rows] == [f"job-{number:03}" for number in reversed(range(600))]
    assert len(cluster.requests) == 3
    # The second chunk is expired, and a job of the first one is gone when the list begins again.
    cluster.refusals[:] = [0, 410]
    cluster.on_refusal = cluster.jobs["default", "job-000"].delete
    assert len(asyncio.run(rows_of(service))) == 599


def test_cancel_and_submit(cluster, service, tmp_path):
    """Canceling deletes this job and no other; a job is submitted from a CronJob or a template."""
    job = cluster.add_job("etl")

    async def cancel(job_id: str) -> JobState:
        async with aclosing(service):
            return (await service.cancel(job_id)).state

    assert asyncio.run(cancel(job.job_id)) is JobState.CANCELED
    assert cluster.jobs == {}
    container = {"name": "main", "image": "busybox:1", "command": ["true"], "env": [{"name": "A", "value": "0"}]}
    template = {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}}
    cluster.cron_jobs["default", "nightly"] = {
        "metadata": {"name": "nightly", "namespace": "default", "uid": "c"},
        "spec": {"schedule": "@daily", "jobTemplate": template},
    }

    async def submit(command: list[str], **options: Any) -> Any:
        async with aclosing(service):
            return await service.submit(command, **options)

    status = asyncio.run(submit(["cronjob/nightly", "A=1"], attributes={"team": "geo"}, timeout_s=60))
    assert (status.job_name, status.attributes) == ("nightly", {"team": "geo"})
    (made,) = cluster.jobs.values()
    assert made.spec["activeDeadlineSeconds"] == 60
    assert made.spec["template"]["spec"]["containers"][0]["env"] == [{"name": "A", "value": "1"}]
    with pytest.raises(ConfigError, match="needs a template"):
        asyncio.run(submit(["echo", "hello"]))
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps({"kind": "Job", "metadata": {"name": "tool"}, **template}))
    service = service_of(cluster, tmp_path, template=manifest)
    status = asyncio.run(submit(["echo", "hello"], name="Say Hello!", cwd="/tmp"))
    assert status.job_name == "say-hello"
    made = cluster.jobs["default", status.job_id.partition("/")[2].partition(":")[0]]
    found = made.spec["template"]["spec"]["containers"][0]
    assert (found["command"], found["workingDir"]) == (["echo", "hello"], "/tmp")


def test_rights_that_are_missing(cluster, service):
    """Each is named with what does not work without it; so is a version that does not label pods."""
    cluster.minor = "26+"
    cluster.denied = {"get pods/log", "watch pods", "delete jobs"}

    async def run() -> list[tuple[str, bool]]:
        async with aclosing(service):
            return [(one.text.partition(";")[0], one.is_fatal) for one in await service.find_problems()]

    assert asyncio.run(run()) == [
        ("may not watch pods in namespace default: lines and tasks are not seen", True),
        ("may not get pods/log in namespace default: lines are not seen", True),
        ("may not delete jobs in namespace default: jobs cannot be canceled", False),
        ("Kubernetes v1.26+.0 does not label the pods of jobs as 1.27 does: lines and tasks are not seen", True),
    ]


def test_a_token_that_is_replaced(cluster, tmp_path):
    """The file of a token is read at each request; a plugin runs again when its token expires or is refused."""
    job = cluster.add_job()
    token = tmp_path / "token"
    token.write_text("old-token-of-the-cluster")
    service = service_of(cluster, tmp_path)
    cluster.kubeconfig(tmp_path, tokenFile=str(token))
    with pytest.raises(AuthError):
        asyncio.run(get(service, job.job_id))
    token.write_text(cluster.token)
    assert asyncio.run(get(service, job.job_id)).job_name == "etl"
    count = tmp_path / "count"
    program = (
        f"import json, pathlib, os; f = pathlib.Path({str(count)!r}); n = len(f.read_text()) if f.exists() else 0;"
        f"f.write_text('x' * (n + 1)); assert 'ExecCredential' in os.environ['KUBERNETES_EXEC_INFO'];"
        f"print(json.dumps({{'status': {{'token': 'expired-token' if n == 0 else {cluster.token!r},"
        f"'expirationTimestamp': '2099-01-01T00:00:00Z'}}}}))"
    )
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": ["-c", program]}
    cluster.kubeconfig(tmp_path, exec=plugin)
    service = KubernetesService("k8s", KubernetesOptions(kubeconfig=tmp_path / "kubeconfig"), environ={})
    assert asyncio.run(get(service, job.job_id)).job_name == "etl"
    assert count.read_text() == "xx"
    failing = {**plugin, "args": ["-c", "import sys; sys.exit('log in first')"], "installHint": "see the wiki"}
    cluster.kubeconfig(tmp_path, exec=failing)
    service = KubernetesService("k8s", KubernetesOptions(kubeconfig=tmp_path / "kubeconfig"), environ={})
    with pytest.raises(AuthError, match=r"failed with exit code 1: log in first; see the wiki"):
        asyncio.run(get(service, job.job_id))


def test_a_token_that_expires_while_logs_are_followed(cluster, tmp_path):
    """Streams that are open go on; new requests use the new token, and nothing is lost."""
    token = tmp_path / "token"
    token.write_text(cluster.token)
    service = service_of(cluster, tmp_path)
    cluster.kubeconfig(tmp_path, tokenFile=str(token))
    job = cluster.add_job()
    pod = job.add_pod()

    async def run() -> None:
        reading = Reading(service, job.job_id)
        async with following(service, job.job_id):
            pod.main.write("before")
            await reading.until(1)
            cluster.token = "another-token-of-the-cluster"
            pod.main.write("after")
            await reading.until(2)
            token.write_text(cluster.token)
            cluster.cut()
            pod.main.write("with the new one")
            await reading.until(3)
            job.finish()
            await eventually(lambda: is_state(service, job.job_id, JobState.SUCCEEDED))
        assert reading.lines == ["before", "after", "with the new one"]

    asyncio.run(run())


def kubeconfig_of(*, server: str = "http://127.0.0.1:1", token: Any = "t") -> str:
    """A kubeconfig as JSON; null stands for a key that is missing."""
    cluster, user = {"server": server, "certificate-authority-data": None}, {"token": token, "exec": None}
    return json.dumps(
        {
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": None}}],
            "current-context": "x",
        }
    )


def test_what_the_configuration_can_get_wrong(cluster, tmp_path, monkeypatch):
    """Each error names the key or the file."""
    for keys, words in [
        ({"namespace": "a", "all_namespaces": True}, "both set"),
        ({"job_url": "https://x/{pod}"}, "job_url"),
    ]:
        with pytest.raises(ConfigError, match=words):
            KubernetesService.from_options("k8s", keys, None)  # type: ignore[arg-type]
    for content, words in [
        ("[1]", "has no mapping"),
        (json.dumps({"current-context": "x"}), "no context 'x'; there is: none"),
        (json.dumps({"clusters": ["c"]}), r"bad: Expected `object`, got `str` - at `\$\.clusters\[0\]`"),
        (kubeconfig_of(server="localhost:6443"), "the server 'localhost:6443' is not a URL"),
        (kubeconfig_of(token=5), r"Expected `str | null`, got `int` - at `\$\.users\[0\]\.user\.token`"),
    ]:
        path = tmp_path / "bad"
        path.write_text(content)
        service = KubernetesService("k8s", KubernetesOptions(kubeconfig=path), environ={})
        with pytest.raises(ConfigError, match=words):
            _ = service.identity
    path.write_text(kubeconfig_of())
    listed = {"KUBECONFIG": os.pathsep.join([str(tmp_path / "missing"), "~nobody-of-this-name/config", str(path)])}
    assert KubernetesService("k8s", KubernetesOptions(), environ=listed).identity == "kubernetes:http://127.0.0.1:1"
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="this is no pod"):
        _ = KubernetesService("k8s", KubernetesOptions(), environ={"KUBECONFIG": ""}).identity
    from tailspan import load_settings

    config = tmp_path / "config.toml"
    config.write_text(f'[services.k8s]\ntype = "kubernetes"\nkubeconfig = "{cluster.kubeconfig(tmp_path)}"\n')
    assert open_service("k8s", load_settings(config)).identity == f"kubernetes:{cluster.url}"


def test_a_node_that_does_not_answer(cluster, service):
    """A log that cannot be read does not hide the others; the error comes after them."""
    job = cluster.add_job(parallelism=2, completions=2)
    for _ in range(2):
        job.add_pod().main.write("a line")
    service.tries = 1
    reading = Reading(service, job.job_id)

    async def run() -> None:
        async with aclosing(service):
            await service.get_job(job.job_id)
            # The job, its pods, then the first of two logs.
            cluster.refusals[:] = [0, 0, 500]
            with pytest.raises(ServiceUnavailableError):
                await reading.read()
            await reading.until(2)

    asyncio.run(run())
    assert reading.lines == ["a line", "a line"]


def in_base64(blob: Any) -> str:
    """Return PEM as a kubeconfig has it inline."""
    return base64.b64encode(blob.bytes()).decode()


@pytest.fixture
def secure() -> Iterator[tuple[FakeKubernetes, trustme.CA]]:
    """A cluster behind TLS, whose certificate has another name than its address, and the authority of both sides."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("kubernetes.default.svc").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    with FakeKubernetes(context) as fake:
        yield fake, authority


def test_tls_and_client_certificates(secure, tmp_path):
    """Certificates inline or in files beside the kubeconfig, a server name; without trust the error says so."""
    fake, authority = secure
    job = fake.add_job()
    job.add_pod().main.write("over TLS")
    client = authority.issue_cert("me@example.com")
    trusted = {"certificate-authority-data": in_base64(authority.cert_pem), "tls-server-name": "kubernetes.default.svc"}
    inline = {
        "client-certificate-data": in_base64(client.cert_chain_pems[0]),
        "client-key-data": in_base64(client.private_key_pem),
    }
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    in_files = {"client-certificate": "client.pem", "client-key": "client.key"}
    printed = {
        "status": {
            "clientCertificateData": client.cert_chain_pems[0].bytes().decode(),
            "clientKeyData": client.private_key_pem.bytes().decode(),
        }
    }
    plugin = {"command": sys.executable, "args": ["-c", f"print({json.dumps(printed)!r})"]}
    for user in (inline, in_files, {"token": fake.token}, {"exec": plugin}):
        path = fake.kubeconfig(tmp_path, cluster=trusted, **user)
        service = KubernetesService("k8s", KubernetesOptions(kubeconfig=path), environ={})

        async def run(service: KubernetesService = service) -> list[str]:
            reading = Reading(service, job.job_id)
            async with following(service, job.job_id):
                await reading.until(1)
            return reading.lines

        assert asyncio.run(run()) == ["over TLS"]
    untrusted = KubernetesService("k8s", KubernetesOptions(kubeconfig=fake.kubeconfig(tmp_path)), environ={})
    untrusted.tries = 1
    with pytest.raises(ServiceUnavailableError, match=r"CERTIFICATE_VERIFY_FAILED.*check the certificates in"):
        asyncio.run(get(untrusted, job.job_id))
    path = fake.kubeconfig(tmp_path, cluster={"insecure-skip-tls-verify": True})
    careless = KubernetesService("k8s", KubernetesOptions(kubeconfig=path), environ={})
    assert asyncio.run(get(careless, job.job_id)).job_name == "etl"
    broken = {**trusted, "certificate-authority-data": base64.b64encode(b"no PEM").decode()}
    path = fake.kubeconfig(tmp_path, cluster=broken)
    with pytest.raises(ConfigError, match="is not usable"):
        asyncio.run(get(KubernetesService("k8s", KubernetesOptions(kubeconfig=path), environ={}), job.job_id))


def test_the_account_of_a_pod(secure, tmp_path, monkeypatch):
    """Without a kubeconfig, a pod finds server, authority, namespace and token; the token is read each time."""
    fake, authority = secure
    monkeypatch.setenv("HOME", str(tmp_path))
    account = tmp_path / "account"
    account.mkdir()
    authority.cert_pem.write_to_path(account / "ca.crt")
    (account / "namespace").write_text("etl\n")
    (account / "token").write_text("expired-token-of-the-pod")
    host, _, port = fake.url.removeprefix("https://").partition(":")
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    found = find_cluster(None, None, environ=environ, account=account)
    assert (found.server, found.namespace) == (fake.url, "etl")
    service = KubernetesService("k8s", KubernetesOptions(), environ=environ)
    # The certificate of the fake has the name of the service, not its address.
    service._known = dataclasses.replace(found, server_name="kubernetes.default.svc")
    service.tries = 1
    job = fake.add_job(namespace="etl")
    with pytest.raises(AuthError):
        asyncio.run(get(service, job.job_id))
    (account / "token").write_text(fake.token)
    assert [row.job_id for row in asyncio.run(rows_of(service))] == [job.job_id]
