"""What a real API server answered, and what the fake answers: the service reads the same from both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tailspan.errors import AuthError, JobNotFoundError
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan.services.kubernetes import KubernetesService
from tailspan.services.kubernetes.options import KubernetesOptions
from tests.fakes.json_api import FakeJsonApi
from tests.fakes.kubernetes import FakeKubernetes

EXCHANGES = json.loads((Path(__file__).parents[4] / "data" / "kubernetes" / "exchanges.json").read_text())


class Recorded(FakeJsonApi):
    """Replays the recorded exchanges: a list of pods has the recorded pods of the job."""

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the recorded reply."""
        if path.endswith("/pods"):
            found = [one for each in EXCHANGES if "/pods" in each["path"] for one in _objects(each["reply"])]
            uid = query["labelSelector"].partition("=")[2]
            items = [one for one in found if one["metadata"]["ownerReferences"][0]["uid"] == uid]
            return 200, {"metadata": {"resourceVersion": "1"}, "items": items}
        if path.endswith("/events"):
            return 200, {"items": []}
        for each in EXCHANGES:
            recorded, _, asked = each["path"].partition("?")
            if recorded == path and all(f"{key}={query.get(key)}" in asked for key in ("container",) if key in query):
                text = each["reply"]
                return each["status"], text.encode() if isinstance(text, str) else text
        return 404, {"kind": "Status", "message": "not found", "code": 404}


def _objects(reply: Any) -> list[dict[str, Any]]:
    if isinstance(reply, dict):
        return [reply] if reply.get("kind") == "Pod" else reply.get("items", [])
    return []


@contextmanager
def recorded_cluster() -> Iterator[str]:
    """The address of a server that replays what was recorded."""
    with Recorded() as server:
        yield server.address


@contextmanager
def fake_cluster() -> Iterator[str]:
    """The address of a fake with jobs that went as the recorded ones."""
    with FakeKubernetes() as fake:
        fake.token = "recorded-token"
        fake.offset_s = -60
        deadline = fake.add_job("etl-deadline")
        text = "Job was active longer than specified deadline"
        deadline.condition("FailureTarget", "DeadlineExceeded", text)
        deadline.condition("Failed", "DeadlineExceeded", text)
        in_place = fake.add_job("etl-onfailure")
        in_place.condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        ok = fake.add_job("etl-ok", labels={"team": "geo"})
        pod = ok.add_pod("main", "second", init=("prep",))
        pod.init["prep"].start().write("init line")
        pod.init["prep"].end()
        pod.main.write(*(f"line {number}" for number in range(60)), "to-stderr")
        pod.main.write("no-newline", newline=False)
        pod.containers["second"].write("second container")
        ok.finish()
        retries = fake.add_job("etl-retries")
        for _ in range(3):
            pod = retries.add_pod()
            pod.main.end(3)
            pod.end("Failed")
        suspended = fake.add_job("etl-nopull")
        suspended.condition("Suspended", "JobSuspended", "Job suspended")
        yield fake.url


@pytest.fixture(scope="module", params=[recorded_cluster, fake_cluster], ids=["recorded", "fake"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server."""
    with request.param() as found:
        yield found


@pytest.fixture
def service(address: str, tmp_path: Path) -> KubernetesService:
    """The service of that server."""
    return service_of(address, tmp_path, "recorded-token")


def service_of(address: str, directory: Path, token: str) -> KubernetesService:
    """Return a service with a token."""
    path = directory / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": address}}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return KubernetesService("k8s", KubernetesOptions(kubeconfig=path, requests_per_second=1000), environ={})


def read(service: KubernetesService, name: str) -> tuple[JobStatus, list[TaskRun], list[tuple[str, str]]]:
    """Return a job's status, tasks, and lines with their tasks."""

    async def run() -> tuple[JobStatus, list[TaskRun], list[tuple[str, str]]]:
        job_id = f"default/{name}"
        async with aclosing(service):
            lines = []
            async for messages in service.read_messages(job_id):
                lines += [(one["task"], one["message"]) for one in messages]
            return await service.get_job(job_id), list(await service.list_tasks(job_id)), lines

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "state", "error"),
    [
        ("etl-ok", JobState.SUCCEEDED, None),
        ("etl-deadline", JobState.TIMED_OUT, "DeadlineExceeded: Job was active longer than specified deadline"),
        ("etl-onfailure", JobState.FAILED, "BackoffLimitExceeded: Job has reached the specified backoff limit"),
        ("etl-nopull", JobState.PENDING, "Job suspended"),
    ],
)
def test_states(service: KubernetesService, name: str, state: JobState, error: str | None) -> None:
    """State, error, and an end exactly if there is one."""
    status, _, _ = read(service, name)
    assert (status.state, status.error) == (state, error)
    assert (status.finished_at is not None) is state.is_terminal
    assert status.submitted_at is not None


def test_tasks_and_lines(service: KubernetesService) -> None:
    """Containers, what they waited for, and the lines of each."""
    status, tasks, lines = read(service, "etl-ok")
    assert {(task.task_id, task.attempt, task.result, task.after) for task in tasks} == {
        ("prep", 1, "success", ()),
        ("main", 1, "success", ("prep",)),
        ("second", 1, "success", ("prep",)),
    }
    assert status.details["k8s.job.label.team"] == "geo"
    assert lines[0] == ("prep", "init line")
    main = [text for task, text in lines if task == "main"]
    assert main[:10] == [f"line {number}" for number in range(10)]


def test_retries(service: KubernetesService, address: str) -> None:
    """Each pod of a job that does not restart in place is an attempt."""
    # The recording has the pods, but not the job itself.
    service_tasks = [task for task in asyncio.run(pods_of_retries(service)) if task.name == "main"]
    assert [(task.attempt, task.exit_code, task.result) for task in service_tasks] == [
        (attempt, 3, "failure") for attempt in range(1, len(service_tasks) + 1)
    ]
    assert len(service_tasks) >= 2


async def pods_of_retries(service: KubernetesService) -> list[TaskRun]:
    """Return the tasks of the pods of the job with retries."""
    from tailspan.services.kubernetes.objects import Job, JobMeta, PodList
    from tailspan.services.kubernetes.record import JobRecord

    async with aclosing(service):
        recorded = next(each for each in EXCHANGES if each["label"] == "pods-of-job")
        uid = recorded["reply"]["items"][0]["metadata"]["ownerReferences"][0]["uid"]
        try:
            job_id = (await service.get_job("default/etl-retries")).details["k8s.job.uid"]
        except JobNotFoundError:
            job_id = uid
        selector = f"batch.kubernetes.io/controller-uid={job_id}"
        pods = await service.http.decoded("/api/v1/namespaces/default/pods", PodList, {"labelSelector": selector})
    record = JobRecord(Job(JobMeta("etl-retries", uid=job_id)))
    record.add_pods(pods.items)
    return record.tasks()


def test_errors(service: KubernetesService, address: str, tmp_path: Path) -> None:
    """A job that is gone, and a token that is refused."""
    with pytest.raises(JobNotFoundError):
        read(service, "etl-ttl")
    refused = next(each for each in EXCHANGES if each["label"] == "bad-token")

    class Refusing(FakeJsonApi):
        def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
            return refused["status"], refused["reply"]

    with Refusing() as server, pytest.raises(AuthError, match="Unauthorized"):
        read(service_of(server.address, tmp_path, "another-token"), "etl-ok")


@pytest.mark.parametrize("label", ["log-no-container", "log-previous", "log-of-nopull", "log-missing-pod"])
def test_the_fake_refuses_logs_as_the_real_one(label: str, tmp_path: Path) -> None:
    """Status, reason and sentence of each refusal, but for the names."""
    recorded = next(each for each in EXCHANGES if each["label"] == label)
    with FakeKubernetes() as fake:
        job = fake.add_job()
        job.add_pod("main", "second", name="etl-ok-vnx9m", init=("prep",))
        waiting = job.add_pod(name="etl-nopull-zskm7", start=False)
        waiting.main.status["state"] = {"waiting": {"reason": "ErrImageNeverPull"}}
        path, _, query = recorded["path"].partition("?")
        status, reply = fake._reply("GET", path, dict(one.split("=") for one in query.split("&") if one), {})
    found = {key: recorded["reply"][key] for key in ("message", "reason", "code", "kind")}
    assert (status, {key: reply[key] for key in found}) == (recorded["status"], found)
