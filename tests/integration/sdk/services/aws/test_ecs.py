"""Tasks of Amazon ECS as jobs, with the log reader of AWS Batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan import Client, load_settings
from tailspan.errors import JobNotFoundError
from tailspan.models import JobState
from tailspan.services.aws.ecs import EcsOptions, EcsService
from tailspan.testing import ServiceConformance
from tests.fakes.aws import REGION, FakeAws, use_credentials

_ARN = f"arn:aws:ecs:{REGION}:123456789012:"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeAws]:
    """An account with a task definition that has two containers, one of them with a log."""
    use_credentials(monkeypatch, tmp_path)
    with FakeAws() as fake:
        options = {"awslogs-group": "/ecs/etl", "awslogs-stream-prefix": "ecs"}
        containers = [
            {"name": "main", "logConfiguration": {"logDriver": "awslogs", "options": options}},
            {"name": "proxy"},
        ]
        fake.definitions[f"{_ARN}task-definition/etl:7"] = {"containerDefinitions": containers}
        yield fake


@pytest.fixture
def client(aws: FakeAws, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that account."""
    config = tmp_path / "client.toml"
    keys = f'endpoint_url = "{aws.url}"\nregion = "{REGION}"\nrequests_per_second = 10000'
    config.write_text(f'default_service = "ecs"\n[services.ecs]\ntype = "aws_ecs"\n{keys}\n')
    with Client(load_settings(config)) as client:
        yield client


def add_task(aws: FakeAws, task: str, status: str, *codes: int | None, group: str = "family:etl", **more: Any) -> str:
    """Add a task in the cluster `batch` and return its job id."""
    names = ("main", "proxy")
    aws.ecs_tasks[f"{_ARN}task/batch/{task}"] = {
        "taskArn": f"{_ARN}task/batch/{task}",
        "clusterArn": f"{_ARN}cluster/batch",
        "taskDefinitionArn": f"{_ARN}task-definition/etl:7",
        "group": group,
        "lastStatus": status,
        "createdAt": time.time() - 30,
        "startedAt": time.time() - 20,
        "containers": [
            {"name": name} | ({} if code is None else {"exitCode": code})
            for name, code in zip(names, codes or (None, None), strict=False)
        ],
        **({"stoppedAt": time.time()} if status == "STOPPED" else {}),
        **more,
    }
    return f"batch/{task}"


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def task(self, aws: FakeAws) -> None:
        """A stopped task with two pages of lines."""
        self.aws, self.job_id, aws.page_events = aws, add_task(aws, "abc", "STOPPED", 0, 0), 20
        for number in range(40):
            aws.log("ecs/main/abc", f"line {number}", aws.start_ms + number // 3, group="/ecs/etl")

    def make_service(self) -> EcsService:
        """A new service."""
        options = EcsOptions(endpoint_url=self.aws.url, requests_per_second=10_000)
        return EcsService("ecs", options, region=REGION, environ={})


@pytest.mark.parametrize(
    ("status", "codes", "stop", "expected", "result"),
    [
        ("PROVISIONING", (None, None), "", JobState.PENDING, None),
        ("RUNNING", (None, None), "", JobState.RUNNING, None),
        ("STOPPING", (None, None), "", JobState.RUNNING, None),
        ("STOPPED", (0, 0), "EssentialContainerExited", JobState.SUCCEEDED, "success"),
        ("STOPPED", (1, 0), "EssentialContainerExited", JobState.FAILED, "failure"),
        ("STOPPED", (None, None), "TaskFailedToStart", JobState.FAILED, "failure"),
        ("STOPPED", (143, 0), "UserInitiated", JobState.CANCELED, "cancellation"),
        ("STOPPED", (137, 137), "SpotInterruption", JobState.LOST, "error"),
        ("NEW", (None, None), "", JobState.UNKNOWN, None),
    ],
)
def test_states(aws, client, status, codes, stop, expected, result):
    """Every state has ours, in the status and in the list; containers have a result of their own."""
    job_id = add_task(aws, "abc", status, *codes, stopCode=stop, stoppedReason="the reason")
    add_task(aws, "web", "RUNNING", group="service:web")
    found = client.get_status(job_id)
    assert (found.state, found.job_name) == (expected, "etl")
    assert (found.finished_at is not None) is expected.is_terminal
    assert [(row.job_id, row.state) for row in client.list_jobs()] == [(job_id, expected)]
    assert client.get_tasks(job_id)[0].result == result
    if expected in (JobState.FAILED, JobState.CANCELED, JobState.LOST):
        assert found.error == "the reason"


def test_lines_cancel_and_unknown_tasks(aws, client):
    """Lines are in the stream PREFIX/CONTAINER/TASK of the definition's group; StopTask cancels."""
    job_id = add_task(aws, "abc", "RUNNING")
    aws.log("ecs/main/abc", "hello", aws.start_ms, group="/ecs/etl")
    assert [(one["message"], one["task"]) for one in client.get_logs(job_id)] == [("hello", "main")]
    assert client.cancel(job_id).state is JobState.CANCELED
    assert (client.get_status(job_id).url or "").endswith(f"/clusters/batch/tasks/abc?region={REGION}")
    with pytest.raises(JobNotFoundError):
        client.get_status("batch/none")


def test_the_check_says_whether_lines_can_be_read(aws):
    """Without the right to read the group of the newest task, and where its log driver has no stream that is known."""
    service = EcsService("ecs", EcsOptions(endpoint_url=aws.url, requests_per_second=10_000), region=REGION, environ={})

    async def run() -> list[tuple[str, bool]]:
        add_task(aws, "abc", "RUNNING")
        found = [*await service.find_problems()]
        aws.denied = {"FilterLogEvents"}
        found += await service.find_problems()
        aws.definitions["other:1"] = {"containerDefinitions": [{"name": "main"}]}
        add_task(aws, "new", "RUNNING", taskDefinitionArn="other:1", createdAt=2e9)
        found += await service.find_problems()
        await service.aclose()
        return [(one.text, one.is_fatal) for one in found]

    (denied, is_fatal), (unknown, _) = anyio.run(run)
    assert (is_fatal, denied.startswith("log group /ecs/etl: "), "logs:FilterLogEvents" in denied) == (True, True, True)
    assert unknown.startswith("the lines of batch/new are not in CloudWatch: it needs the log driver awslogs")
