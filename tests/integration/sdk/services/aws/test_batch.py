"""Jobs of AWS Batch with their lines in CloudWatch Logs, against a fake that has what the models describe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan import Client, load_settings
from tailspan._identity import trace_id
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceUnavailableError
from tailspan.models import JobState
from tailspan.services.aws.batch import BatchOptions, BatchService
from tailspan.services.registry import open_service
from tailspan.testing import ServiceConformance
from tests.fakes.aws import REGION, FakeAws, use_credentials, write_credentials
from tests.fakes.json_api import pages_of

RECORDED = json.loads((Path(__file__).parents[4] / "data" / "aws_exchanges.json").read_text())


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeAws]:
    """An account without jobs, and its credentials in a file."""
    use_credentials(monkeypatch, tmp_path)
    with FakeAws() as fake:
        yield fake


def service_of(aws: FakeAws, **options: Any) -> BatchService:
    """The service of that account; it sends as many requests as it likes."""
    keys = {"endpoint_url": aws.url, "requests_per_second": 10_000, **options}
    return BatchService("batch", BatchOptions.model_validate(keys), region=REGION, environ={})


@pytest.fixture
def client(aws: FakeAws, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that account."""
    config = tmp_path / "client.toml"
    keys = f'endpoint_url = "{aws.url}"\nregion = "{REGION}"\nrequests_per_second = 10000'
    config.write_text(f'default_service = "aws_batch"\n[services.aws_batch]\n{keys}\n')
    with Client(load_settings(config)) as client:
        yield client


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, aws: FakeAws) -> None:
        """An ended job with three pages of lines."""
        self.aws, self.job_id, aws.page_events = aws, aws.add_job(), 150
        for number in range(400):
            aws.log(aws.stream_of(self.job_id), f"line {number}", aws.start_ms + number // 3)
        aws.end(self.job_id, at_ms=aws.start_ms + 9_000)

    def make_service(self) -> BatchService:
        """A new service."""
        return service_of(self.aws)


def test_late_events_are_read_once(aws):
    """Events become visible out of order, and readers stop at any page: each event is read once, with one uid."""
    job_id, service = aws.add_job(), service_of(aws)
    aws.page_events = 70
    seen: Counter[str] = Counter()
    cursor, written = None, 0
    for batch in range(6):
        for number in range(40):
            late_ms = 4_000 if number % 10 == 0 and batch > 2 else 0
            at_ms = aws.start_ms + batch * 2_000 + (number % 3) * 500 - late_ms
            aws.log(aws.stream_of(job_id), f"{batch}.{number}", at_ms, late_ms=late_ms)
            written += 1
        for page in pages_of(service, job_id, cursor, most=1 + batch % 3):
            seen.update(page.uids())
            cursor = page.cursor
    while found := pages_of(service, job_id, cursor):
        for page in found:
            seen.update(page.uids())
            cursor = page.cursor
    whole = {uid for page in pages_of(service, job_id) for uid in page.uids()}
    assert len(whole) == written
    assert set(seen.values()) == {1}
    assert set(seen) == whole


def test_more_events_of_one_time_than_a_cursor_holds(aws, monkeypatch):
    """Many events of one millisecond, read in pages with stops: none is missing, and none comes twice."""
    monkeypatch.setattr("tailspan.services.aws.logs._MOST_IDS", 50)
    job_id, service = aws.add_job(), service_of(aws)
    aws.page_events = 60
    for number in range(200):
        aws.log(aws.stream_of(job_id), str(number), aws.start_ms)
    pages = pages_of(service, job_id)
    assert [len(page.lines) for page in pages] == [60, 60, 60, 20]
    again = {uid for page in pages_of(service, job_id, pages[0].cursor) for uid in page.uids()}
    assert again >= {uid for page in pages[1:] for uid in page.uids()}


def test_a_time_ahead_hides_no_line(aws):
    """A program gives an event a time of the next hour: what comes after it is read."""
    job_id, service = aws.add_job(), service_of(aws)
    stream = aws.stream_of(job_id)
    aws.log(stream, "ahead", aws.start_ms + 3_600_000, late_ms=-3_600_000)
    cursor = pages_of(service, job_id)[-1].cursor
    aws.log(stream, "now", aws.start_ms + 1)
    assert [page.lines for page in pages_of(service, job_id, cursor)] == [[b"now"]]


def test_attempts_are_tasks_with_their_streams(aws, client):
    """Each attempt has its stream; a message of several lines is several lines."""
    job_id = aws.add_job(tags={"team": "geo"})
    first = aws.stream_of(job_id)
    aws.log(first, "first try\nTraceback\n", aws.start_ms + 1_500)
    aws.end_attempt(job_id, 1, at_ms=aws.start_ms + 2_000)
    assert client.get_status(job_id).state is JobState.PENDING
    assert [task.result for task in client.get_tasks(job_id)] == ["failure"]
    aws.start_attempt(job_id, at_ms=aws.start_ms + 5_000)
    aws.log(aws.stream_of(job_id), "second try", aws.start_ms + 5_500)
    assert client.get_status(job_id).state is JobState.RUNNING
    tasks = client.get_tasks(job_id)
    assert [(task.name, task.attempt, task.result) for task in tasks] == [
        ("default", 1, "failure"),
        ("default", 2, None),
    ]
    aws.end(job_id, at_ms=aws.start_ms + 9_000)
    status = client.get_status(job_id)
    assert (status.state, status.exit_code, status.total_tasks, status.finished_tasks) == (JobState.SUCCEEDED, 0, 1, 1)
    assert status.started_at is not None
    assert status.started_at.timestamp() * 1000 == aws.start_ms + 1_000  # of the first attempt
    assert (status.attributes, status.job_name) == ({"team": "geo"}, "nightly")
    assert status.details["cloud.account.id"] == "123456789012"
    assert (status.url or "").startswith(f"https://{REGION}.console.aws.amazon.com/batch/home?region={REGION}#jobs/")
    tasks = client.get_tasks(job_id)
    assert [(task.attempt, task.result, task.exit_code) for task in tasks] == [(1, "failure", 1), (2, "success", 0)]
    assert "log-group/$252Faws$252Fbatch$252Fjob/log-events/nightly$252Fdefault$252F" in (tasks[0].url or "")
    lines = [(one["message"], one["attempt"]) for one in client.get_logs(job_id)]
    assert lines == [("first try", 1), ("Traceback", 1), ("second try", 2)]


@pytest.mark.parametrize(
    ("status", "reason", "more", "expected", "result"),
    [
        ("SUBMITTED", "", {}, JobState.PENDING, None),
        ("RUNNABLE", "MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT", {}, JobState.PENDING, None),
        ("STARTING", "", {}, JobState.PENDING, None),
        ("RUNNING", "", {}, JobState.RUNNING, None),
        ("SUCCEEDED", "", {}, JobState.SUCCEEDED, "success"),
        ("FAILED", "Essential container in task exited", {}, JobState.FAILED, "failure"),
        ("FAILED", "stop it", {"isTerminated": True}, JobState.CANCELED, "cancellation"),
        ("FAILED", "no longer needed", {"isCancelled": True}, JobState.CANCELED, "cancellation"),
        ("FAILED", "Job attempt duration exceeded timeout", {"isTerminated": True}, JobState.TIMED_OUT, "timeout"),
        ("FAILED", "Host EC2 (instance i-0a1b2c) terminated.", {}, JobState.LOST, "error"),
        ("NEW", "", {}, JobState.UNKNOWN, None),
    ],
)
def test_states(aws, client, status, reason, more, expected, result):
    """Every state has ours, in the status and in the list; the last attempt has the result of the job."""
    job_id = aws.add_job("RUNNING" if expected.is_terminal or status == "RUNNING" else status)
    if expected.is_terminal:
        aws.end(job_id, status, 0 if status == "SUCCEEDED" else 1, reason, at_ms=aws.start_ms + 9_000, **more)
    else:
        aws.jobs[job_id]["statusReason"] = reason
    found = client.get_status(job_id)
    assert found.state is expected
    assert (found.finished_at is not None) is expected.is_terminal
    assert [row.state for row in client.list_jobs()] == [expected]
    assert [task.result for task in client.get_tasks(job_id)] == ([result] if expected.is_terminal else [None])[
        : int(expected is not JobState.PENDING and expected is not JobState.UNKNOWN)
    ]
    if reason and expected is not JobState.SUCCEEDED:
        assert reason in (found.error or "")


def test_recorded_replies(aws, client):
    """Replies that moto's server gave: a job with its attempt and times, its row, and events."""
    (job,) = RECORDED["describe"]["jobs"]
    aws.jobs[job["jobId"]] = job
    status = client.get_status(job["jobId"])
    assert (status.state, status.job_name) == (JobState.SUCCEEDED, "nightly")
    assert status.submitted_at is not None
    assert status.submitted_at.timestamp() * 1000 == job["createdAt"]
    assert [(task.name, task.attempt, task.result) for task in client.get_tasks(job["jobId"])] == [
        ("default", 1, "success")
    ]
    (row,) = RECORDED["list"]["jobSummaryList"]
    assert [one.job_id for one in client.list_jobs()] == [row["jobId"]]
    for event in RECORDED["filter"]["events"]:
        aws.log("etl/default/" + job["jobId"], event["message"], event["timestamp"])
    lines = client.get_logs(job["jobId"])
    assert [(one["timestamp"], one["message"]) for one in lines] == [
        (event["timestamp"], event["message"]) for event in RECORDED["filter"]["events"]
    ]


def test_an_array_and_its_children(aws, client):
    """The array counts its children; each child is a job, linked to it, and listed whatever its state."""
    array = aws.add_job("PENDING", arrayProperties={"size": 3, "statusSummary": {"RUNNING": 1, "FAILED": 2}})
    children = []
    for index, status in enumerate(("RUNNING", "FAILED", "FAILED")):
        child = aws.add_job(job_id=f"{array}:{index}", arrayProperties={"index": index})
        aws.log(aws.stream_of(child), f"of child {index}", aws.start_ms + 1_000)
        if status == "FAILED":
            aws.end(child, status, 1, at_ms=aws.start_ms + 2_000)
        children.append(child)
    status = client.get_status(array)
    assert (status.state, status.total_tasks, status.finished_tasks) == (JobState.RUNNING, 3, 2)
    assert client.get_logs(array) == []
    rows = client.list_jobs()
    assert rows[0].job_id == array
    assert {row.job_id: row.state for row in rows} == {
        array: JobState.RUNNING,
        children[0]: JobState.RUNNING,
        children[1]: JobState.FAILED,
        children[2]: JobState.FAILED,
    }
    assert [one["message"] for one in client.get_logs(children[1])] == ["of child 1"]
    parent = client.get_status(children[0]).parent
    assert parent is not None
    assert parent.split("-")[1] == trace_id(f"aws-batch:{REGION}", array)
    assert {body.get("jobStatus") for name, body in aws.calls if name == "listjobs"} == {None, "RUNNING", "FAILED"}
    aws.calls.clear()
    assert client.list_jobs() == rows
    assert [body.get("arrayJobId") for name, body in aws.calls if name == "listjobs"] == [None]


def test_nodes_and_containers_are_tasks(aws, client):
    """A multi-node job has the attempts of its nodes; a job with several containers those of each container."""
    nodes = aws.add_job(nodeProperties={"numNodes": 2, "mainNode": 0}, container={})
    for index in range(2):
        node = aws.add_job(job_id=f"{nodes}#{index}", nodeDetails={"nodeIndex": index})
        aws.log(aws.stream_of(node), f"of node {index}", aws.start_ms + index)
    assert [(task.task_id, task.name) for task in client.get_tasks(nodes)] == [
        ("node 0/default", "default"),
        ("node 1/default", "default"),
    ]
    assert [(one["message"], one["task_id"]) for one in client.get_logs(nodes)] == [
        ("of node 0", "node 0/default"),
        ("of node 1", "node 1/default"),
    ]
    settings = {"logDriver": "awslogs", "options": {"awslogs-group": "/own/group"}}
    containers = [
        {"name": "main", "logStreamName": "p/main/1", "logConfiguration": settings},
        {"name": "side", "logStreamName": "p/side/1", "logConfiguration": {"logDriver": "splunk"}},
    ]
    job_id = aws.add_job(container={}, ecsProperties={"taskProperties": [{"containers": containers}]})
    aws.log("p/main/1", "of main", aws.start_ms, group="/own/group")
    assert [(one["message"], one["task"]) for one in client.get_logs(job_id)] == [("of main", "main")]
    assert [task.name for task in client.get_tasks(job_id)] == ["main", "side"]


def test_queues_are_listed_together(aws, client):
    """The jobs of several queues with several pages each come newest first, each once, without naming the queues."""
    for number in range(250):
        job_id = aws.add_job(queue="a" if number % 3 else "b", at_ms=aws.start_ms + number * 10)
        aws.end(job_id, at_ms=aws.start_ms + 9_000)
    rows = client.list_jobs(None)
    times = [row.created_at for row in rows]
    assert len({row.job_id for row in rows}) == 250
    assert times == sorted(times, reverse=True)


def test_many_jobs_share_requests(aws):
    """A hundred and ten jobs are described and read with a few requests; missing streams hide no others."""
    now_ms = int(time.time() * 1000)
    jobs = [aws.add_job(at_ms=now_ms) for _ in range(110)]
    for number, job_id in enumerate(jobs):
        if number % 50 == 7:
            aws.missing.add(aws.stream_of(job_id))
    service = service_of(aws)
    found: dict[str, list[bytes]] = {}

    async def read(job_id: str) -> None:
        await service.get_job(job_id)
        found[job_id] = [line async for page in service.read_logs(job_id) for line in page.lines]

    async def read_all() -> None:
        async with anyio.create_task_group() as group:
            for job_id in jobs:
                group.start_soon(read, job_id)

    async def run() -> None:
        await read_all()
        for job_id in jobs:
            aws.log(aws.stream_of(job_id), f"of {job_id}", now_ms + 100)
        aws.calls.clear()
        await read_all()
        await service.aclose()

    anyio.run(run)
    assert found == {job: [] if aws.stream_of(job) in aws.missing else [f"of {job}".encode()] for job in jobs}
    assert Counter(name for name, _ in aws.calls)["describejobs"] <= 4
    assert Counter(name for name, _ in aws.calls)["FilterLogEvents"] <= 8


def test_a_silent_job_is_read_from_its_last_read_on(aws):
    """Reads of a job without lines do not search its whole log again and again."""
    job_id, service = aws.add_job(at_ms=int(time.time() * 1000)), service_of(aws)

    async def run() -> None:
        for _ in range(2):
            assert [page async for page in service.read_logs(job_id)] == []
        await service.aclose()

    anyio.run(run)
    starts = [body["startTime"] for name, body in aws.calls if name == "FilterLogEvents"]
    assert starts[0] > 0  # a day before the attempt: from 1970 on, AWS returns many empty pages
    assert time.time() * 1000 - starts[0] > 86_000_000
    assert time.time() * 1000 - starts[1] < 60_000


def test_throttled_requests_are_sent_again(aws, monkeypatch):
    """Throttled requests of parallel reads are sent again, although `tries` is 1: reads bring everything."""
    monkeypatch.setattr("tailspan.services._requests._RETRY_FOR_S", math.inf)  # a slow machine has no 5 s
    jobs = [aws.add_job() for _ in range(4)]
    for job_id in jobs:
        aws.log(aws.stream_of(job_id), "line", aws.start_ms)
    aws.throttle_next = {"batch": 1, "logs": 2}
    service, found = service_of(aws), []
    service.tries = 1

    async def read(job_id: str) -> None:
        found.extend([line async for page in service.read_logs(job_id) for line in page.lines])

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for job_id in jobs * 2:
                group.start_soon(read, job_id)
        await service.aclose()

    anyio.run(run)
    assert found == [b"line"] * 8
    assert aws.throttled == 3


def test_throttling_is_no_refusal(aws):
    """An account that is throttled for long is a service that cannot be reached now."""
    aws.refusals = [(429, {"retry-after": "30"})]
    service = service_of(aws)

    async def run() -> None:
        with pytest.raises(ServiceUnavailableError, match="DescribeJobs") as caught:
            await service.get_job("any")
        assert caught.value.retry_after_s == 30
        await service.aclose()

    anyio.run(run)


def test_expired_credentials_are_found_again(aws, tmp_path):
    """A token expires and the file has a new one: the request is sent again; without a new one, the error says so."""
    job_id, service = aws.add_job(), service_of(aws)

    async def run() -> None:
        await service.get_job(job_id)
        aws.session_token = "token-2"
        with pytest.raises(AuthError, match="expired") as caught:
            await service.get_job(job_id)
        assert "secret-key-1" not in str(caught.value)
        write_credentials(tmp_path / "credentials", "token-2")
        assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()

    anyio.run(run)


def test_credentials_of_a_program_are_refreshed(aws, monkeypatch, tmp_path):
    """Credentials with an end are renewed by their own source before it (here `credential_process`)."""
    program, count = tmp_path / "credentials.py", tmp_path / "count"
    program.write_text(
        "import json, pathlib, datetime\n"
        f"count = pathlib.Path({str(count)!r}); count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': 'AKID', 'SecretAccessKey': 'secret-key-1',"
        " 'SessionToken': 'token-1', 'Expiration': end.isoformat()}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile batch]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    job_id, service = aws.add_job(), service_of(aws, profile="batch")

    async def run() -> None:
        for _ in range(2):
            assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()

    anyio.run(run)
    assert len(count.read_text()) >= 2


def test_the_check_names_missing_rights(aws):
    """A policy without the rights to describe jobs or to read their log group."""
    service = service_of(aws)

    async def run() -> None:
        assert await service.find_problems() == []
        aws.denied = {"describejobs", "FilterLogEvents"}
        first, second = await service.find_problems()
        assert (first.is_fatal, "batch:DescribeJobs" in first.text) == (True, True)
        assert (second.is_fatal, "logs:FilterLogEvents" in second.text) == (False, True)
        await service.aclose()

    anyio.run(run)


def test_no_credentials(aws, tmp_path):
    """The error names what can be set; nothing is sent."""
    (tmp_path / "credentials").write_text("")
    service = service_of(aws)

    async def run() -> None:
        with pytest.raises(AuthError, match=r"no AWS credentials.*services\.batch\.profile"):
            await service.get_job("any")
        await service.aclose()

    anyio.run(run)
    assert not aws.requests


def test_cancel_and_submit(aws, client):
    """A definition in a queue with a command, and its end by TerminateJob; an ended job stays as it is."""
    aws.end(aws.add_job(), at_ms=aws.start_ms)
    command = ["queue/etl:4", "python", "run.py"]
    job = client.submit(command, attributes={"team": "geo"}, timeout=120, env={"N": "1"})
    assert (job.state, job.job_name, job.attributes) == (JobState.PENDING, "etl", {"team": "geo"})
    submitted = dict(aws.calls)["submitjob"]
    assert submitted["containerOverrides"] == {
        "command": ["python", "run.py"],
        "environment": [{"name": "N", "value": "1"}],
    }
    assert submitted["timeout"] == {"attemptDurationSeconds": 120}
    assert client.cancel(job.job_id).state is JobState.CANCELED
    before = len(aws.calls)
    assert client.cancel(job.job_id).state is JobState.CANCELED
    assert "terminatejob" not in {name for name, _ in aws.calls[before:]}
    with pytest.raises(ConfigError, match="no cwd"):
        client.submit(["etl"], cwd="/tmp")


def test_errors_name_the_cause(aws, client, monkeypatch, tmp_path):
    """An unknown job, a cursor of another service, a section without a region, and botocore that is not installed."""
    with pytest.raises(JobNotFoundError):
        client.get_status("00000000-0000-0000-0000-000000000000")
    job_id = aws.add_job()
    for cursor in (b"x", b"12", b"\x81\xa1n\xc0", b"\x81\xa1i\xc4\x08abcdefgh"):
        with pytest.raises(ConfigError, match="not a cursor"):
            pages_of(service_of(aws), job_id, cursor)
    config = tmp_path / "config.toml"
    config.write_text('[services.b]\ntype = "aws_batch"\n')
    with pytest.raises(ConfigError, match=r"services\.b\.region: is missing"):
        open_service("b", load_settings(config))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tailspan\[aws\]'"):
        open_service("b", load_settings(config))


def test_the_sdk_starts_without_botocore():
    """A service of AWS costs other users nothing: botocore takes half a second to import."""
    program = "import sys, tailspan, tailspan.services.aws; assert 'botocore' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
