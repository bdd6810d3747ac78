"""Airflow's DAG runs as jobs, against a fake with what was measured of the real server, and its recorded replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan import Client
from tailspan.errors import AuthError, ConfigError, JobNotFoundError
from tailspan.logs.page import LogPage
from tailspan.models import JobState
from tailspan.services._http_options import LoginOptions
from tailspan.services.airflow import AirflowService
from tailspan.testing import ServiceConformance
from tests.fakes.airflow import START, FakeAirflow
from tests.fakes.json_api import FakeJsonApi, client_of

RECORDED = json.loads(Path(__file__).parents[4].joinpath("data", "airflow_exchanges.json").read_text(encoding="utf-8"))
FAILED = '{"state": "failed", "method": "PATCH"}'


@pytest.fixture
def airflow() -> Iterator[FakeAirflow]:
    """A server without runs."""
    with FakeAirflow() as fake:
        yield fake


def service_of(airflow: FakeJsonApi, environ: dict[str, str] | None = None, **options: object) -> AirflowService:
    """The service of that server; it sends as many requests as it likes."""
    keys = {"base_url": airflow.address, "requests_per_second": 10_000, **options}
    return AirflowService("airflow", LoginOptions.model_validate(keys), environ=environ or {})


@pytest.fixture
def client(airflow: FakeAirflow, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that server."""
    with client_of("airflow", airflow.url, tmp_path) as client:
        yield client


def pages_of(service: AirflowService, job_id: str, cursor: bytes | None = None, *, most: int = 10_000) -> list[LogPage]:
    """Read pages after a cursor, in a loop of their own."""

    async def read() -> list[LogPage]:
        found: list[LogPage] = []
        async with aclosing(service), aclosing(service.read_logs(job_id, cursor)) as pages:
            await service.get_job(job_id)
            async for page in pages:
                found.append(page)
                if len(found) == most:
                    break
        return found

    return anyio.run(read)


class Reader:
    """Reads what is new at each call, with a new service each time, as after a restart of the agent."""

    def __init__(self, airflow: FakeAirflow, job_id: str) -> None:
        self._airflow = airflow
        self._job_id = job_id
        self._cursor: bytes | None = None
        self.uids: list[str] = []

    def read(self) -> list[str]:
        """Return the new lines."""
        pages = pages_of(service_of(self._airflow), self._job_id, self._cursor)
        for page in pages:
            self._cursor = page.cursor
            self.uids += page.uids()
        return [line.decode() for page in pages for line in page.lines]


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, airflow: FakeAirflow) -> None:
        """An ended run of three tasks at one time, with two pages of lines, and runs before and after it."""
        airflow.add_run(run="before", start=-60)
        self.airflow, self.job_id = airflow, airflow.add_run()
        airflow.add_run(run="after", start=60)
        for name, index in (("extract", -1), ("load.one", 0), ("load.one", 1)):
            task = airflow.add_task(self.job_id, name, index)
            task.start(1)
            for number in range(2000):
                task.log(f"line {number}\nand more" if number % 50 == 0 else f"line {number}", 2 + number // 3 * 0.01)
            task.end(90)
        airflow.set_state(self.job_id, "success", 99)

    def make_service(self) -> AirflowService:
        """A new service."""
        return service_of(self.airflow)


def test_attempts(airflow, client):
    """Retries, mapped, skipped, cleared and waiting tasks: an attempt for each try, and for the one that waits."""
    job_id = airflow.add_run()
    airflow.dags["nightly"] = {"flaky": ["load"], "gone": ["load"], "load": []}
    flaky, first, second = (airflow.add_task(job_id, "flaky"), *(airflow.add_task(job_id, "load", n) for n in (0, 1)))
    flaky.start(1)
    flaky.log("first", 1.5)
    flaky.end(2, "up_for_retry")

    def shown() -> list[tuple[Any, ...]]:
        client.get_status(job_id)  # requests the tasks
        tasks = client.get_tasks(job_id)
        return [(one.task_id, one.name, one.attempt, one.result, one.started_at is not None) for one in tasks]

    waiting = [("load[0]", "load", 1, None, False), ("load[1]", "load", 1, None, False)]
    assert shown() == [("flaky", "flaky", 1, "failure", True), ("flaky", "flaky", 2, None, False), *waiting]
    assert client.get_status(job_id).finished_tasks == 0
    flaky.start(5)
    flaky.log("second", 5.5)
    flaky.end(6)
    first.start(7)
    first.log("of the first", 7.5, level="warning")
    first.end(8, "failed")
    second.skip(9, "upstream_failed")
    airflow.set_state(job_id, "failed", 10)
    ended = [("flaky", "flaky", 1, "failure", True), ("flaky", "flaky", 2, "success", True)]
    assert shown() == [*ended, ("load[0]", "load", 1, "failure", True), ("load[1]", "load", 1, "skip", False)]
    tasks = client.get_tasks(job_id)
    assert [task.after for task in tasks] == [(), (), ("flaky",), ("flaky",)]
    assert tasks[3].error == "a task before it failed"
    url = f"{airflow.url}/dags/nightly/runs/manual__1%2B00%3A00"
    assert [task.url for task in tasks[1:3]] == [
        f"{url}/tasks/flaky?try_number=2",
        f"{url}/tasks/load/mapped/0?try_number=1",
    ]
    status = client.get_status(job_id)
    assert (status.state, status.job_name, status.error) == (JobState.FAILED, "nightly", "failed: load[0]")
    assert (status.total_tasks, status.finished_tasks, status.url) == (3, 3, url)
    assert [(one["message"], one["task"], one["attempt"], one["level"]) for one in client.get_logs(job_id)] == [
        ("first", "flaky", 1, "INFO"),
        ("second", "flaky", 2, "INFO"),
        ("of the first", "load", 1, "WARN"),
    ]
    assert [one["message"] for one in client.get_logs(job_id, task="flaky")] == ["first", "second"]
    first.clear()
    assert sorted(one[2:4] for one in shown() if one[0] == "load[0]") == [(1, "failure"), (2, None)]


def test_a_retry_that_is_canceled_while_it_waits(airflow, client):
    """The try before it stays a failure; the next one is skipped."""
    job_id = airflow.add_run()
    task = airflow.add_task(job_id, "flaky")
    task.start(1)
    task.end(2, "up_for_retry")
    assert client.cancel(job_id).state is JobState.CANCELED
    assert [(one.attempt, one.result) for one in client.get_tasks(job_id)] == [(1, "failure"), (2, "skip")]


def test_lines_come_once_though_the_token_counts(airflow):
    """Late lines, the end of the log, a new secret: each line comes once, as in a whole read."""
    job_id = airflow.add_run()
    task = airflow.add_task(job_id, "extract")
    task.start(1)
    reader = Reader(airflow, job_id)
    for number in range(4):
        task.log(f"line {number}", number + 2)
    assert reader.read() == ["line 0", "line 1", "line 2", "line 3"]
    task.log("late", 3.5)
    assert reader.read() == ["late"]
    task.log("line 4", 6)
    assert reader.read() == ["line 4"]
    airflow.secret = b"another"
    task.log("line 5", 7)
    assert reader.read() == ["line 5"]
    task.end(8)
    task.log("after the end", 9)
    assert reader.read() == ["after the end"]
    assert reader.read() == []
    assert len(set(reader.uids)) == 8
    whole = pages_of(service_of(airflow), job_id)
    assert len(whole[0].lines) == 8
    assert set(whole[0].uids()) == set(reader.uids)


def test_a_log_that_was_read_to_its_end_is_not_requested_again(airflow):
    """Not while the run goes on, with the cursor or without a page since; a fresh try is."""
    job_id = airflow.add_run()
    first, second = airflow.add_task(job_id, "first"), airflow.add_task(job_id, "second")
    first.start(1)
    first.log("one", 2)
    second.start(1)
    service = service_of(airflow)
    (page,) = pages_of(service, job_id)
    first.end(3)
    for _ in range(3):
        assert pages_of(service, job_id, page.cursor) == []
    logs = [one.rpartition("/taskInstances/")[2] for one in airflow.requests if "/logs/" in one]
    assert logs == ["first/logs/1", "second/logs/1"] * 2 + ["second/logs/1"] * 2
    second.log("two", 4)
    (page,) = pages_of(service, job_id, page.cursor)
    airflow.requests.clear()
    assert pages_of(service_of(airflow), job_id, page.cursor) == []
    assert not any("first/logs" in one for one in airflow.requests)
    first.clear()
    first.start(5)
    first.log("three", 6)
    (page,) = pages_of(service, job_id, page.cursor)
    assert (page.lines, page.tasks[0].attempt) == ([b"three"], 2)


def test_lines_that_are_late_at_the_end_of_a_try(airflow):
    """A try that ended a moment ago is read again: its last lines come after its end."""
    job_id = airflow.add_run()
    task = airflow.add_task(job_id, "extract")
    now = datetime.now(UTC)
    task.start(now)
    task.log("one", now)
    reader = Reader(airflow, job_id)
    task.end(now + timedelta(seconds=1), "failed")
    assert reader.read() == ["one"]
    task.log("Task killed!", now + timedelta(seconds=2))
    assert reader.read() == ["Task killed!"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("queued", JobState.PENDING),
        ("running", JobState.RUNNING),
        ("success", JobState.SUCCEEDED),
        ("failed", JobState.FAILED),
        ("new", JobState.UNKNOWN),
    ],
)
def test_states(airflow, client, state, expected):
    """Every state has ours, in the status and in the list."""
    job_id = airflow.add_run()
    airflow.set_state(job_id, state, 9)
    status = client.get_status(job_id)
    assert status.state is expected
    assert (status.finished_at is not None) is expected.is_terminal
    assert [row.state for row in client.list_jobs()] == [expected]


@pytest.mark.parametrize(
    ("at_s", "changes", "expected"),
    [
        (8.0, {}, JobState.CANCELED),
        (-5.0, {}, JobState.FAILED),  # before the run was cleared and ran again
        (60.0, {}, JobState.FAILED),  # it had failed by itself
        (8.0, {"extra": '{"note": "x", "method": "PATCH"}'}, JobState.FAILED),
        (8.0, {"extra": '{"state": "success"}'}, JobState.FAILED),
        (8.0, {"extra": "no JSON"}, JobState.FAILED),
        (8.0, {"event": "patch_task_instance"}, JobState.FAILED),
        (8.0, {"job_id": "nightly/other"}, JobState.FAILED),
    ],
)
def test_canceled_is_in_the_event_log(airflow, client, at_s, changes, expected):
    """Airflow has no canceled state: a run that a user set to failed while it ran is one."""
    job_id = airflow.add_run()
    airflow.set_state(job_id, "failed", 8.3)
    airflow.add_event(**{"job_id": job_id, "at": at_s, "extra": FAILED, **changes})
    assert [row.state for row in client.list_jobs()] == [expected]
    assert client.get_status(job_id).state is expected


def test_without_access_to_the_event_log(airflow, client):
    """The run is failed; the refused request is not sent for each job."""
    jobs = [airflow.add_run(run=f"r{number}") for number in range(3)]
    airflow.may_read_events = False
    for job_id in jobs:
        airflow.set_state(job_id, "failed", 9)
        assert client.get_status(job_id).state is JobState.FAILED
    assert sum("eventLogs" in one for one in airflow.requests) == 1


def test_cancel(airflow, client):
    """A running run is set to failed; an ended one stays as it is."""
    job_id = airflow.add_run()
    assert client.cancel(job_id).state is JobState.CANCELED
    airflow.requests.clear()
    assert client.cancel(job_id).state is JobState.CANCELED
    assert not any(one.startswith("PATCH") for one in airflow.requests)


def test_submit(airflow, client):
    """The DAG with its parameters, the id and the note of the run; what a DAG run cannot have is an error."""
    airflow.dags["nightly"] = {}
    job = client.submit(
        ["nightly", "n=5", "day=2024-01-01", "x=[1]"], name="mine", attributes={"team": "geo", "a": "b"}
    )
    assert (job.job_id, job.state) == ("nightly/mine", JobState.PENDING)
    run = airflow.runs["nightly", "mine"]
    assert (run["conf"], run["note"]) == ({"n": 5, "day": "2024-01-01", "x": [1]}, "team=geo, a=b")
    with pytest.raises(JobNotFoundError):
        client.submit(["unknown"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        client.submit(["nightly", "five"])
    with pytest.raises(ConfigError, match="timeout"):
        client.submit(["nightly"], timeout=5)


def test_a_list_of_many_pages(airflow, client):
    """The server's own limit is smaller than ours, and runs are added meanwhile: each comes once, newest first."""
    airflow.most = 7
    ids = [airflow.add_run(run=f"r{number}", start=number) for number in range(30)]
    airflow.runs["nightly", "r3"]["queued_at"] = "2024-11-30T10:00:00Z"  # cleared later
    rows = client.list_jobs()
    assert [row.job_id for row in rows] == ids[::-1]
    times = [row.created_at for row in rows]
    assert times == sorted(times, reverse=True)
    tasks = [airflow.add_task(ids[0], "load", number) for number in range(30)]
    assert len(client.get_tasks(ids[0])) == len(tasks)

    async def listed() -> list[str]:
        service, found = service_of(airflow), []
        async with aclosing(service.list_jobs()) as pages:
            async for page in pages:
                found += [row.job_id for row in page]
                if len(found) < 10:
                    airflow.add_run(run="new")
        await service.aclose()
        return found

    found = anyio.run(listed)
    assert found[:2] == ids[:-3:-1]
    assert sorted(found) == sorted(ids)


def test_a_login_is_renewed(airflow, tmp_path: Path):
    """One for all requests; again after 401 and after 403 (the server's secret has changed); a refused one is named."""
    airflow.password, file = "p4ssw0rd-of-admin", tmp_path / "password"
    file.write_text("p4ssw0rd-of-admin\n")
    job_id = airflow.add_run()

    async def logins() -> None:
        service = service_of(airflow, user="admin", password_file=str(file))
        for _ in range(2):
            await service.get_job(job_id)
        assert airflow.requests.count("POST /auth/token") == 1
        airflow.expire_logins()
        await service.get_job(job_id)
        airflow.refusals = [(401, {})]
        await service.get_job(job_id)
        assert airflow.requests.count("POST /auth/token") == 3
        file.write_text("wrong-password")
        airflow.expire_logins()
        with pytest.raises(AuthError, match=r"services\.airflow\.user: Airflow refuses user 'admin'") as caught:
            await service.get_job(job_id)
        assert "wrong-password" not in str(caught.value)
        await service.aclose()

    anyio.run(logins)


def test_tokens(airflow, tmp_path: Path):
    """A token file may change; the environment's token is not sent in clear text to another machine."""
    airflow.token, file = "new-token-1", tmp_path / "token"
    file.write_text("old-token-1")
    job_id = airflow.add_run()

    async def renewed() -> None:
        service = service_of(airflow, token_file=str(file))
        with pytest.raises(AuthError, match="Invalid JWT token") as caught:
            await service.get_job(job_id)
        assert "old-token-1" not in str(caught.value)
        file.write_text("new-token-1")
        assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()
        service = service_of(airflow, {"AIRFLOW_CLI_TOKEN": "new-token-1"})
        assert (await service.get_job(job_id)).job_id == job_id
        await service.aclose()
        service = service_of(airflow)
        with pytest.raises(AuthError, match="none was sent"):
            await service.get_job(job_id)
        await service.aclose()
        options = LoginOptions(base_url="http://airflow.example")
        elsewhere = AirflowService("a", options, environ={"AIRFLOW_CLI_TOKEN": "secret"})
        assert (await elsewhere.make_credentials({"AIRFLOW_CLI_TOKEN": "secret"}).authorization()).value == ""

    anyio.run(renewed)


def test_a_busy_server_is_asked_again(airflow, client):
    """429 with Retry-After and 503: the same request again, also that of a log."""
    job_id = airflow.add_run()
    task = airflow.add_task(job_id, "extract")
    task.start(1)
    task.log("one", 2)
    airflow.refusals = [(429, {"retry-after": "0"}), (503, {})]
    assert client.get_status(job_id).job_id == job_id
    service = service_of(airflow)
    service.tries = 3

    async def read() -> list[bytes]:
        found: list[bytes] = []
        await service.list_tasks(job_id)
        airflow.refusals = [(429, {"retry-after": "0"}), (503, {})]
        async with aclosing(service.read_logs(job_id, service_cursor)) as pages:
            async for page in pages:
                found += page.lines
        await service.aclose()
        return found

    service_cursor = b"\x80"
    assert anyio.run(read) == [b"one"]


def test_errors_name_the_cause(airflow, client):
    """An unknown run, an id of another form, cursors of other services, an ended DAG."""
    for job_id in ("nightly/unknown", "nightly", "/x", "x/", "~/~", "~/x", "nightly/~"):
        with pytest.raises(JobNotFoundError):
            client.get_status(job_id)
    job_id = airflow.add_run()
    airflow.add_task(job_id, "extract").start(1)
    for cursor in (b"x", b"12", b"\x81\xa1n\xc0x", b"\x81\xa9extract\x001\xa1x", b"\x81\xa9extract\x001\x91\x01"):
        with pytest.raises(ConfigError, match="cursor"):
            pages_of(service_of(airflow), job_id, cursor)


def test_odd_run_ids(airflow, client):
    """Airflow's run ids have colons and plus signs; slashes belong to the id as well."""
    job_id = airflow.add_run(run="manual__2026-11-29T00:18:31.430651+00:00")
    assert client.get_status(job_id).job_id == job_id
    assert client.list_jobs()[0].job_id == job_id


class Replay(FakeJsonApi):
    """Answers with the replies that a real Airflow 3.3.2 gave."""

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the recorded reply to this path; a query distinguishes only tokens."""
        for one in RECORDED:
            if one["path"].partition("?")[0] == path and ("token=" in one["path"]) == ("token" in query):
                return one["status"], one["reply"]
        return 404, {"detail": "not recorded"}


def test_recorded_replies():
    """Status, attempts, lines and the cancellation of runs of a real server."""
    nightly, canceled = "nightly_etl/manual__2026-11-29T00:18:31.430651+00:00", "nightly_etl/tailspan-1"

    async def read() -> None:
        with Replay() as server:
            service = service_of(server)
            status = await service.get_job(nightly)
            assert (status.state, status.job_name, status.total_tasks) == (JobState.SUCCEEDED, "nightly_etl", 3)
            tasks = [(one.task_id, one.attempt, one.result) for one in await service.list_tasks(nightly)]
            assert tasks[:2] == [("flaky", 1, "failure"), ("flaky", 2, "success")]
            found: list[tuple[str, str, int, str]] = []
            async with aclosing(service.read_messages(nightly)) as pages:
                async for page in pages:
                    found += [(one["task"], one["message"], one["attempt"], one["level"]) for one in page]
            assert ("flaky", "DAG bundles loaded: dags-folder", 1, "INFO") in found
            assert {(task, attempt) for task, _, attempt, _ in found} == {("flaky", 1), ("flaky", 2)}
            assert not any("Log message source" in text or "attempt=1.log" in text for _, text, _, _ in found)
            assert (await service.get_job(canceled)).state is JobState.CANCELED
            with pytest.raises(JobNotFoundError, match="was not found"):
                await service.get_job("nightly_etl/nope")
            await service.aclose()

    anyio.run(read)


def test_times(airflow, client):
    """A run is submitted when it is queued; a line has the time of its entry."""
    job_id = airflow.add_run()
    task = airflow.add_task(job_id, "extract")
    task.start(1)
    task.log("one", 2.5)
    status = client.get_status(job_id)
    assert (status.submitted_at, status.started_at) == (START, START)
    assert client.get_logs(job_id)[0]["timestamp"] == round(START.timestamp() * 1000) + 2500


def test_a_read_since_a_time_requests_only_logs_that_may_have_lines(airflow):
    """A task that ended long before has none; the failure digest of a run with many tasks reads so."""
    job_id = airflow.add_run()
    for number, name in enumerate(("first", "second")):
        task = airflow.add_task(job_id, name)
        task.start(100 * number)
        task.log(f"of {name}", 100 * number + 1)
        task.end(100 * number + 2)

    async def read() -> list[bytes]:
        found: list[bytes] = []
        since_ms = round(START.timestamp() * 1000) + 100_000
        service = service_of(airflow)
        async with aclosing(service), aclosing(service.read_logs(job_id, since_ms=since_ms)) as pages:
            async for page in pages:
                found += page.lines
        return found

    assert anyio.run(read) == [b"of second"]
    assert [one for one in airflow.requests if "/first/logs/" in one] == []
