"""Prefect's flow runs as jobs, against a fake that has what was measured of the real server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tailspan import Client, load_settings
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, RequestRejectedError
from tailspan.models import JobState
from tailspan.services.prefect import PrefectOptions, PrefectService
from tailspan.services.registry import open_service
from tailspan.testing import ServiceConformance
from tests.fakes.json_api import client_of, pages_of
from tests.fakes.prefect import FakePrefect


@pytest.fixture
def prefect() -> Iterator[FakePrefect]:
    """A server without runs."""
    with FakePrefect() as fake:
        yield fake


def service_of(prefect: FakePrefect, **options: object) -> PrefectService:
    """The service of that server; it sends as many requests as it likes."""
    keys = {"base_url": prefect.url, "requests_per_second": 10_000, **options}
    return PrefectService("prefect", PrefectOptions.model_validate(keys), environ={})


@pytest.fixture
def client(prefect: FakePrefect, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that server."""
    with client_of("prefect", prefect.url, tmp_path) as client:
        yield client


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, prefect: FakePrefect) -> None:
        """An ended run with three pages of lines."""
        self.prefect, self.job_id = prefect, prefect.add_flow_run()
        for number in range(450):
            prefect.log(self.job_id, f"line {number}", 1 + number // 3 * 0.5)
        prefect.set_state(self.job_id, "COMPLETED", 99)

    def make_service(self) -> PrefectService:
        """A new service."""
        return service_of(self.prefect)


def test_ties_and_late_lines_are_read_once(prefect):
    """Lines of one time come in any order, and lines become visible late: each is read once, with one uid."""
    job_id = prefect.add_flow_run()
    service = service_of(prefect)
    seen: Counter[str] = Counter()
    cursor = None
    for batch in range(12):
        for number in range(90):
            # A third of the lines has one of few times; each batch also brings lines up to 4 s older.
            at_s = batch * 2 + (number % 3) * 0.5 - (4 if number % 10 == 0 and batch > 2 else 0)
            prefect.log(job_id, f"{batch}.{number}", at_s)
        # A reader that stops after some pages goes on where it was.
        for page in pages_of(service, job_id, cursor, most=1 + batch % 3):
            seen.update(page.uids())
            cursor = page.cursor
    while found := pages_of(service, job_id, cursor):
        for page in found:
            seen.update(page.uids())
        cursor = found[-1].cursor
    assert len(seen) == len(prefect.logs)
    assert set(seen.values()) == {1}
    whole = {uid for page in pages_of(service, job_id) for uid in page.uids()}
    assert whole == set(seen)


def test_more_lines_of_one_time_than_a_page(prefect):
    """Five hundred lines of one time: none is missing, though each page has them in another order."""
    job_id = prefect.add_flow_run()
    for number in range(500):
        prefect.log(job_id, str(number), 5.0)
    lines = [line for page in pages_of(service_of(prefect), job_id) for line in page.lines]
    assert len(lines) >= 400  # offset pages of shuffled ties overlap; the reads after this one find the rest
    service, cursor, found = service_of(prefect), None, set()
    for _ in range(12):
        for page in pages_of(service, job_id, cursor):
            found.update(page.lines)
            cursor = page.cursor
    assert len(found) == 500


def test_tasks_attempts_and_sub_flows(prefect, client):
    """An attempt for each time that it ran, sub flows below their task run, lines with the attempt of their time."""
    job_id = prefect.add_flow_run()
    flaky = prefect.add_task_run(
        job_id,
        "flaky",
        ("RUNNING", "", 1),
        ("SCHEDULED", "ValueError: no", 2),
        ("RUNNING", "", 3),
        ("COMPLETED", "", 4),
    )
    call = prefect.add_task_run(job_id, "child", ("RUNNING", "", 5), ("COMPLETED", "", 9))
    child = prefect.add_flow_run("COMPLETED", parent=call, start_s=5)
    prefect.task_runs[call]["state"]["state_details"]["child_flow_run_id"] = child
    inner = prefect.add_task_run(child, "extract", ("RUNNING", "", 6), ("FAILED", "boom", 7))
    prefect.log(job_id, "of the flow", 0.5, level=30)
    prefect.log(job_id, "first", 1.5, task=flaky, level=40)
    prefect.log(job_id, "second\nline", 3.5, task=flaky)
    prefect.log(child, "in the child", 5.5)
    prefect.log(child, "deep", 6.5, task=inner)
    prefect.set_state(job_id, "FAILED", 10, message="Flow run encountered an exception: RuntimeError: boom")
    status = client.get_status(job_id)
    assert (status.state, status.job_name) == (JobState.FAILED, "nightly")
    assert status.error == "Flow run encountered an exception: RuntimeError: boom"
    assert (status.total_tasks, status.finished_tasks) == (3, 3)
    assert status.url == prefect.url.replace("/api", f"/runs/flow-run/{job_id}")
    tasks = client.get_tasks(job_id)
    shown = [(task.name, task.attempt, task.result, task.error, task.parent) for task in tasks]
    assert shown == [
        ("flaky", 1, "failure", "ValueError: no", None),
        ("flaky", 2, "success", None, None),
        ("child", 1, "success", None, None),
        ("extract", 1, "failure", "boom", call),
    ]
    assert tasks[0].duration == tasks[1].duration
    lines = client.get_logs(job_id)
    assert [(one["message"], one.get("task"), one.get("attempt"), one["level"]) for one in lines] == [
        ("of the flow", None, None, "WARN"),
        ("first", "flaky", 1, "ERROR"),
        ("second", "flaky", 2, "INFO"),
        ("line", "flaky", 2, "INFO"),
        ("in the child", "child", 1, "INFO"),
        ("deep", "extract", 1, "INFO"),
    ]
    assert [one["message"] for one in client.get_logs(job_id, task="flaky")] == ["first", "second", "line"]


@pytest.mark.parametrize(
    ("state", "name", "expected"),
    [
        ("SCHEDULED", "AwaitingRetry", JobState.PENDING),
        ("PENDING", "", JobState.PENDING),
        ("PAUSED", "", JobState.RUNNING),
        ("CANCELLING", "", JobState.RUNNING),
        ("COMPLETED", "", JobState.SUCCEEDED),
        ("FAILED", "TimedOut", JobState.TIMED_OUT),
        ("CANCELLED", "", JobState.CANCELED),
        ("CRASHED", "", JobState.LOST),
        ("NEW", "", JobState.UNKNOWN),
    ],
)
def test_states(prefect, client, state, name, expected):
    """Every state has ours; a run that waits for its retry is not ended."""
    job_id = prefect.add_flow_run()
    prefect.set_state(job_id, state, 9, name=name)
    status = client.get_status(job_id)
    assert status.state is expected
    assert (status.finished_at is not None) is expected.is_terminal
    assert [row.state for row in client.list_jobs()] == [expected]


def test_a_list_of_many_pages(prefect, client):
    """A limit above 200 is an error of the server: more runs come in pages, newest first, without sub flows."""
    runs = [prefect.add_flow_run("COMPLETED", start_s=number) for number in range(450)]
    prefect.add_flow_run(parent="a task run", start_s=500)
    assert [job.job_id for job in client.list_jobs(1000)] == runs[::-1]
    assert prefect.requests.count("POST /api/flow_runs/filter") == 3


def test_cancel_says_where_nothing_can_cancel(prefect, client):
    """A plain process goes on whatever Prefect says; a run of a deployment is canceled."""
    job_id = prefect.add_flow_run()
    with pytest.raises(RequestRejectedError, match="end its process"):
        client.cancel(job_id)
    prefect.flow_runs[job_id]["deployment_id"] = "d"
    assert client.cancel(job_id).state is JobState.CANCELED


def test_credentials(prefect, tmp_path: Path):
    """A token file may change: one refusal reads it again. Without one, the error says that none was sent."""
    prefect.token, file = "new-token-1", tmp_path / "token"
    file.write_text("old-token-1")
    job_id = prefect.add_flow_run()

    async def renewed() -> None:
        service = service_of(prefect, token_file=str(file))
        with pytest.raises(AuthError) as caught:
            await service.get_job(job_id)
        assert "old-token-1" not in str(caught.value)
        file.write_text("new-token-1")
        assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()
        anonymous = service_of(prefect)
        with pytest.raises(AuthError, match="none was sent"):
            await anonymous.get_job(job_id)
        await anonymous.aclose()

    anyio.run(renewed)


@pytest.mark.parametrize("token", ["", "two\r\nX-Other: lines", "price-in-\u20ac"])
def test_a_token_that_no_header_can_have(prefect, token: str):
    """The error names its place, not the token; nothing is sent."""
    service = service_of(prefect, token=token)

    async def read() -> None:
        with pytest.raises(AuthError, match=r"services\.prefect\.token (is empty|has characters)") as caught:
            await service.get_job("any")
        assert not token or token not in str(caught.value)
        await service.aclose()

    anyio.run(read)
    assert not prefect.requests


def test_a_busy_server_is_asked_again(prefect, client):
    """429 with Retry-After and 503: the same request again, also a filter, which is a POST that only reads."""
    job_id = prefect.add_flow_run()
    prefect.refusals = [(429, {"retry-after": "0"}), (503, {})]
    assert client.get_status(job_id).job_id == job_id


def test_errors_name_the_cause(prefect, client):
    """An unknown run, a cursor of another service, a section with mistakes."""
    with pytest.raises(JobNotFoundError):
        client.get_status("00000000-0000-0000-0000-000000000000")
    for cursor in (b"x", b"12", b"\x81\xa1n\xc0", b"\x81\xa1i\xc4\x08abcdefgh"):
        with pytest.raises(ConfigError, match="not a cursor"):
            pages_of(service_of(prefect), prefect.add_flow_run(), cursor)


def test_the_section(tmp_path: Path):
    """Keys are checked, and the environment's key is not sent in clear text to another machine."""
    config = tmp_path / "config.toml"
    config.write_text(
        '[services.p]\ntype = "prefect"\nbase_url = "http://prefect.example/api"\ntoken = "t"\nuser = "u"\n'
    )
    with pytest.raises(ConfigError, match="token and user are both set"):
        open_service("p", load_settings(config))
    options = PrefectOptions(base_url="http://prefect.example/api")
    service = PrefectService("p", options, environ={"PREFECT_API_KEY": "secret-key"})
    assert anyio.run(service.make_credentials({"PREFECT_API_KEY": "secret-key"}).authorization).value == ""
    assert "secret-key" not in repr(service.http)
