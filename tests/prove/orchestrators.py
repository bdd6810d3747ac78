"""Jobs of orchestrators: what the order and the position of their logs do to lines that are written late."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tailspan._identity import trace_id
from tests.fakes.airflow import FakeAirflow
from tests.fakes.aws import REGION, FakeAws, write_credentials
from tests.fakes.kubernetes import FakeKubernetes
from tests.fakes.prefect import START, FakePrefect
from tests.fakes.ray import FakeRay
from tests.prove.jobs import SPANS
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.tally import JobTally, line_text
from tests.prove.world import PATIENCE_S, World

_LINES = 60
_NANOS_PER_US = 1_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TaskJob(ABC):
    """A job with one task that writes numbered lines.

    Attributes:
        unit_us: How exact its service has the times of lines, in us.
        name: Its name, and what its lines begin with.
        job_id: Its id.
        identity: The identity of its service.
        tally: What arrived of it.
        written: How many lines it wrote.
        spans: The spans that it must have once it has ended, apart from that of its task.
    """

    spans = SPANS
    unit_us = 1
    job_id: str
    identity: str

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False
        self._times_us = array("Q")
        self._late: set[int] = set()
        self.tally = JobTally(name, self._find, late=self._late)

    @property
    def written(self) -> int:
        """How many lines it wrote."""
        return len(self._times_us)

    @property
    def trace_id(self) -> str:
        """The trace that it must have."""
        return trace_id(self.identity, self.job_id)

    @property
    @abstractmethod
    def handed(self) -> bool:
        """Whether the service has handed out lines of it."""

    @abstractmethod
    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """Write a line, which becomes visible after some seconds."""

    @abstractmethod
    def end(self) -> None:
        """End now."""

    def line(self, at: datetime, *, after_s: float = 0.0, in_order: bool = True) -> None:
        """Write the next line with this time, visible after some seconds."""
        number = self.written
        self._times_us.append((at - _EPOCH) // timedelta(microseconds=1))
        if after_s or not in_order:
            self._late.add(number)
        self.write_line(line_text(self.name, number, ""), at, after_s)

    def restarted(self, acked: int, *, strict: bool) -> None:
        """Note that the agent is restarted; with late lines, the acked ones are not those with the lowest numbers."""
        self.tally.restarted(0, strict=strict)

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        if number >= self.written or text != line_text(self.name, number, ""):
            return None
        unit_nanos = self.unit_us * _NANOS_PER_US
        earliest = self._times_us[number] * _NANOS_PER_US // unit_nanos * unit_nanos
        return earliest, earliest + unit_nanos - 1


class AirflowJob(TaskJob):
    """A DAG run of the fake Airflow."""

    def __init__(self, api: FakeAirflow, name: str) -> None:
        super().__init__(name)
        self.identity = api.url
        self._api = api
        now = datetime.now(UTC)
        self.job_id = api.add_run(name, "run", start=now)
        self._task = api.add_task(self.job_id, "work")
        self._task.start(now)

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return any(f"/{self.name}/" in one and "/logs/" in one for one in self._api.requests)

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            self._task.log(text, at, visible_after_s=after_s)

    def end(self) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            now = datetime.now(UTC)
            self._task.end(now)
            self._api.set_state(self.job_id, "success", now)
        self.ended = True


class PrefectJob(TaskJob):
    """A flow run of the fake Prefect."""

    def __init__(self, api: FakePrefect, name: str) -> None:
        super().__init__(name)
        self.identity = api.url
        self._api = api
        self.job_id = api.add_flow_run(start_s=_seconds(datetime.now(UTC)), flow=name)

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return any("/logs/" in one for one in self._api.requests)

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            self._api.log(self.job_id, text, _seconds(at), visible_after_s=after_s)

    def end(self) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            self._api.set_state(self.job_id, "COMPLETED", _seconds(datetime.now(UTC)))
        self.ended = True


class BatchJob(TaskJob):
    """A job of the fake AWS Batch."""

    unit_us = 1_000

    def __init__(self, api: FakeAws, name: str) -> None:
        super().__init__(name)
        self.identity = f"aws-batch:{REGION}"
        self._api = api
        self.job_id = api.add_job(name=name, at_ms=_ms(datetime.now(UTC)))

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return any(operation == "FilterLogEvents" for operation, _ in self._api.calls)

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            self._api.log(self._api.stream_of(self.job_id), text, _ms(at), visible_after_s=after_s)

    def end(self) -> None:
        """See `TaskJob`."""
        with self._api.lock:
            self._api.end(self.job_id, at_ms=_ms(datetime.now(UTC)))
        self.ended = True


class RayJob(TaskJob):
    """A job of the fake Ray, whose lines have the time at which they were read."""

    def __init__(self, api: FakeRay, name: str) -> None:
        super().__init__(name)
        self.identity = api.url
        self._api = api
        self.job_id = api.add_job(name, start_time=_ms(datetime.now(UTC)), metadata={"job_name": name})

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return any(one.startswith("SOCKET") and f"/{self.job_id}/" in one for one in self._api.requests)

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        self._api.write(self.job_id, f"{text}\n")

    def end(self) -> None:
        """See `TaskJob`."""
        self._api.end(self.job_id)
        self.ended = True

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        found = super()._find(number, text)
        return None if found is None else (found[0], time.time_ns())


class KubernetesJob(TaskJob):
    """A Job of the fake Kubernetes, which may be deleted in place of its end."""

    def __init__(self, api: FakeKubernetes, name: str, *, is_deleted: bool = False) -> None:
        super().__init__(name)
        self.identity = f"kubernetes:{api.url}"
        self._api = api
        self._is_deleted = is_deleted
        self._job = api.add_job(name)
        self._pod = self._job.add_pod()
        self.job_id = self._job.job_id

    @property
    def handed(self) -> bool:
        """See `TaskJob`."""
        return self._pod.main.is_followed

    def write_line(self, text: str, at: datetime, after_s: float) -> None:
        """See `TaskJob`."""
        self._pod.main.write(text, time_ns=(at - _EPOCH) // timedelta(microseconds=1) * _NANOS_PER_US)

    def rotate(self) -> None:
        """Rotate the log, if something follows it: else its lines are lost to every reader."""
        if self._pod.main.is_followed:
            self._pod.main.rotate()

    def end(self) -> None:
        """See `TaskJob`."""
        self.ended = True
        if not self._is_deleted:
            self._job.finish()
            return
        # What is deleted while no agent runs is lost.
        deadline_s = time.monotonic() + PATIENCE_S
        while not self._pod.main.is_followed and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self._job.delete()
        self._pod.delete()
        for _ in range(_LINES):
            self.line(datetime.now(UTC))
        self._pod.main.end(143)
        self._pod.vanish()


def _ms(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)


def _seconds(at: datetime) -> float:
    return (at - START).total_seconds()


def _late(random_: random.Random, jobs: Sequence[TaskJob]) -> None:
    """Write lines of which a tenth becomes visible up to 5 s late."""
    for job in jobs:
        now = datetime.now(UTC)
        for number in range(_LINES):
            after_s = random_.uniform(0.1, 5.0) if random_.random() < 0.1 else 0.0
            job.line(now + timedelta(milliseconds=number), after_s=after_s)


def _late_and_tied(random_: random.Random, jobs: Sequence[TaskJob]) -> None:
    """Write lines of few times, which have no order among each other, and some of them late."""
    for job in jobs:
        now = datetime.now(UTC)
        for number in range(_LINES):
            after_s = random_.uniform(0.1, 2.0) if random_.random() < 0.1 else 0.0
            job.line(now + timedelta(milliseconds=number // 20), after_s=after_s, in_order=False)


@dataclass(frozen=True)
class OrchestratorFault:
    """A property of an orchestrator's log, while the agent is killed and started again.

    Attributes:
        name: The row's name.
        make_jobs: Adds the service and its jobs to the world.
        write: Lets the jobs write.
        away_s: How long the service is down meanwhile, in seconds.
    """

    name: str
    make_jobs: Callable[[World], Sequence[TaskJob]]
    write: Callable[[random.Random, Sequence[TaskJob]], None]
    away_s: float = 0.0

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed) as world:
            jobs = self.make_jobs(world)
            world.jobs += jobs
            world.configure()
            self.write(world.random, jobs)
            world.start()
            world.until(lambda: all(job.handed for job in jobs), "the first lines")
            for turn in range(6):
                self.write(world.random, jobs)
                time.sleep(1.0)
                if turn == 1:
                    self._outage(world)
                if turn == 3:
                    world.kill()
                    world.ended()
                    world.start()
            time.sleep(5.0)
            return Row(self.name, [world.finish()])

    def _outage(self, world: World) -> None:
        if not self.away_s:
            return
        for api in world.services:
            api.away = True
        time.sleep(self.away_s)
        for api in world.services:
            api.away = False


def _airflow(world: World) -> list[TaskJob]:
    api = world.add_service("airflow", FakeAirflow())
    return [AirflowJob(api, f"dag-{number}") for number in range(3)]


def _prefect(world: World) -> list[TaskJob]:
    api = world.add_service("prefect", FakePrefect())
    return [PrefectJob(api, f"flow-{number}") for number in range(3)]


def _batch(world: World) -> list[TaskJob]:
    api = world.add_service("aws_batch", FakeAws())
    (world.home / ".aws").mkdir()
    write_credentials(world.home / ".aws" / "credentials", api.session_token)
    api.quota = 4
    return [BatchJob(api, f"batch-{number}") for number in range(3)]


def _ray(world: World) -> list[TaskJob]:
    api = world.add_service("ray", FakeRay())
    return [RayJob(api, f"ray-{number}") for number in range(3)]


def _kubernetes(world: World) -> list[TaskJob]:
    api = world.add_service("kubernetes", FakeKubernetes())
    return [KubernetesJob(api, f"pod-{number}") for number in range(3)]


def _kubernetes_deleted(world: World) -> list[TaskJob]:
    api = world.add_service("kubernetes", FakeKubernetes())
    return [KubernetesJob(api, f"pod-{number}", is_deleted=True) for number in range(3)]


def _rotated(random_: random.Random, jobs: Sequence[TaskJob]) -> None:
    """Write lines that are rotated away at once: a read has only the last of them."""
    for _ in range(_LINES // 5):
        for job in jobs:
            for _ in range(5):
                job.line(datetime.now(UTC))
            assert isinstance(job, KubernetesJob)
            job.rotate()


def _in_order(random_: random.Random, jobs: Sequence[TaskJob]) -> None:
    """Write lines that are visible at once."""
    for job in jobs:
        for _ in range(_LINES):
            job.line(datetime.now(UTC))


FAULTS = (
    OrchestratorFault("Kubernetes: logs rotated every five lines, SIGKILL", _kubernetes, _rotated),
    OrchestratorFault(
        "Kubernetes: jobs deleted while their logs are followed, SIGKILL", _kubernetes_deleted, _in_order
    ),
    OrchestratorFault("Kubernetes: the API server is away for a minute, SIGKILL", _kubernetes, _in_order, away_s=60.0),
    OrchestratorFault("AWS Batch: late events, a quota of 4 requests a second, SIGKILL", _batch, _late),
    OrchestratorFault("Ray: the server is down for a minute, SIGKILL", _ray, _in_order, away_s=60.0),
    OrchestratorFault("Airflow: late lines, a token that counts, SIGKILL", _airflow, _late),
    OrchestratorFault("Prefect: late lines, ties without order, SIGKILL", _prefect, _late_and_tied),
)
