"""Jobs of AWS Batch with moto's server, a mock: it shows that requests and replies have AWS's form, and no more.

moto's jobs end at once and write no lines, so the test writes them, as a user of AWS does: with botocore's own client.
What AWS does and moto does not (quotas, late events, tokens that expire) is in `tests/fakes/aws.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.session import Session

from tailspan import Client, load_settings
from tailspan.models import JobState
from tests.fakes.aws import use_credentials
from tests.fakes.collector import Collector
from tests.orchestrators.harness import Orchestrator, Relay, by_task, results
from tests.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

REGION = "eu-west-1"
LINES = 300


class Moto(Orchestrator):
    """An account of moto with a queue and a job definition."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        super().__init__("aws_batch", directory, {}, program="moto_server")
        self.start("moto_server", "-H", "127.0.0.1", "-p", str(port))

    def client(self, api: str) -> Any:
        """Return botocore's client of an API."""
        return Session().create_client(api, region_name=REGION, endpoint_url=self.url)

    def prepare(self) -> None:
        """Wait for the server, and make a queue and a job definition."""
        self.wait_until(lambda: httpx.get(f"{self.url}/moto-api/", timeout=5).is_success, "the server")
        httpx.post(f"{self.url}/moto-api/config", json={"batch": {"use_docker": False}}).raise_for_status()
        role = self.client("iam").create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        batch = self.client("batch")
        environment = batch.create_compute_environment(
            computeEnvironmentName="all", type="UNMANAGED", state="ENABLED", serviceRole=role
        )["computeEnvironmentArn"]
        order = [{"order": 1, "computeEnvironment": environment}]
        batch.create_job_queue(jobQueueName="queue", state="ENABLED", priority=1, computeEnvironmentOrder=order)
        batch.register_job_definition(
            jobDefinitionName="etl",
            type="container",
            containerProperties={"image": "busybox", "vcpus": 1, "memory": 128, "command": ["true"]},
        )


@pytest.fixture
def moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    """An account without jobs, and its credentials."""
    use_credentials(monkeypatch, tmp_path)
    with Moto(tmp_path) as account:
        account.prepare()
        yield account


def test_jobs_and_lines_have_the_form_of_aws(moto: Moto, collector: Collector, tmp_path: Path) -> None:
    """A submitted job, found by the list, with its attempt and its lines, as botocore's client has them."""
    section = f'endpoint_url = "{moto.url}"\nregion = "{REGION}"\nrequests_per_second = 50'
    with Relay("aws_batch", section, collector, tmp_path) as relay, Client(load_settings(relay.config)) as client:
        job = client.submit(
            ["queue/etl", "echo", "hi"], name="nightly", attributes={"team": "geo"}, service="aws_batch"
        )
        moto.wait_until(lambda: client.get_status(job).state is JobState.SUCCEEDED, "the end of the job", 60)
        (described,) = moto.client("batch").describe_jobs(jobs=[job.job_id])["jobs"]
        stream = described["container"]["logStreamName"]
        logs = moto.client("logs")
        logs.create_log_group(logGroupName="/aws/batch/job")
        logs.create_log_stream(logGroupName="/aws/batch/job", logStreamName=stream)
        now_ms = int(time.time() * 1000)
        for start in range(0, LINES, 100):
            events = [{"timestamp": now_ms + one // 7, "message": f"line {one}"} for one in range(start, start + 100)]
            logs.put_log_events(logGroupName="/aws/batch/job", logStreamName=stream, logEvents=events)
        status = client.get_status(job)
        assert status.submitted_at is not None
        assert status.submitted_at.timestamp() * 1000 == described["createdAt"]
        assert (status.job_name, status.attributes) == ("nightly", {"team": "geo"})
        assert [row.job_id for row in client.list_jobs(service="aws_batch")] == [job.job_id]
        assert [(task.name, task.attempt, task.result) for task in client.get_tasks(job)] == [("default", 1, "success")]
        relay.finish()
        collector.wait_until(lambda: len(collector.log_records()) >= LINES, 60)
        spans = relay.spans(runs=1, attempts=1)
    rows = {row.attributes["log.record.uid"]: row for row in collector.log_records() if not row.event_name}
    shown = sorted((row.time_unix_nano // 1_000_000, row.body) for row in rows.values())
    assert shown == sorted((now_ms + one // 7, f"line {one}") for one in range(LINES))
    assert {row.attributes["cicd.pipeline.task.name"] for row in rows.values()} == {"default"}
    assert results(spans) == {job.job_id: "success"}
    assert set(by_task(spans)) == {(job.job_id, "default", 1)}


def test_an_unknown_job_and_no_log(moto: Moto, tmp_path: Path) -> None:
    """A job that AWS does not know, and one whose stream does not exist."""
    config = tmp_path / "config.toml"
    section = f'endpoint_url = "{moto.url}"\nregion = "{REGION}"'
    config.write_text(f'default_service = "aws_batch"\n[services.aws_batch]\n{section}\n')
    with Client(load_settings(config)) as client:
        job = client.submit(["etl"])
        assert client.get_logs(job) == []
        assert client.cancel(job).state in (JobState.SUCCEEDED, JobState.CANCELED)
        with pytest.raises(Exception, match="knows no job"):
            client.get_status("00000000-0000-0000-0000-000000000000")
