"""Jobs of Ray, by their log files and by WebSockets, against a fake that has what was measured of the real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan import Client
from tailspan.errors import (
    AuthError,
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    ServiceUnavailableError,
)
from tailspan.logs.page import LogPage
from tailspan.models import JobState
from tailspan.services.ray import RayOptions, RayService
from tailspan.testing import ServiceConformance
from tests.fakes.json_api import client_of, pages_of
from tests.fakes.ray import FakeRay

RECORDED = json.loads((Path(__file__).parents[4] / "data" / "ray_exchanges.json").read_text())


@pytest.fixture(params=["file", "socket"])
def ray(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeRay]:
    """A cluster without jobs, whose log files are on this machine, or elsewhere."""
    with FakeRay(tmp_path if request.param == "file" else None) as fake:
        yield fake


@pytest.fixture
def remote() -> Iterator[FakeRay]:
    """A cluster on another machine."""
    with FakeRay() as fake:
        yield fake


def service_of(ray: FakeRay, tmp_path: Path, **options: Any) -> RayService:
    """The service of that cluster; it sends as many requests as it likes."""
    keys = {"base_url": ray.url, "requests_per_second": 10_000, "temp_dir": str(tmp_path), **options}
    return RayService("ray", RayOptions.model_validate(keys), environ={})


@pytest.fixture
def client(remote: FakeRay, tmp_path: Path) -> Iterator[Client]:
    """A client whose default service is that cluster."""
    with client_of("ray", remote.url, tmp_path) as client:
        yield client


class TestConformance(ServiceConformance):
    """The promises of every service, with files and with WebSockets."""

    @pytest.fixture(autouse=True)
    def job(self, ray: FakeRay, tmp_path: Path) -> None:
        """An ended job with two pages of lines, the last one without a newline."""
        self.ray, self.tmp_path = ray, tmp_path
        ray.add_job("a-1")
        ray.write("a-1", "\n".join(f"{number} {'x' * 40_000}" for number in range(40)))
        ray.end("a-1")

    def make_service(self) -> RayService:
        """A new service."""
        return service_of(self.ray, self.tmp_path)


def _text(pages: list[LogPage]) -> list[bytes]:
    return [line for page in pages for line in page.lines]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_running_job_is_followed(ray, tmp_path, restarts):
    """Reads go on where the last one stopped, also in a new process; the end is read, too; one uid for both ways."""
    job_id = ray.add_job("a-1")
    found: list[LogPage] = []

    async def run() -> None:
        service, cursor = service_of(ray, tmp_path), None
        for turn in range(6):
            ray.write(job_id, f"{turn} one\r\n" if ray.temp_dir is None else f"{turn} one\n")
            ray.write(job_id, f"{turn} two\n\n{turn} beginn")
            if turn == 5:
                ray.end(job_id, "FAILED", 1)
            while not found or b"two" not in b"".join(_text(found[turn * 2 :])):
                async for page in service.read_logs(job_id, cursor):
                    found.append(page)
                    cursor = page.cursor
                if found and f"{turn} two".encode() in _text(found):
                    break
            if turn < 5:
                ray.write(job_id, "ing\n")
            if restarts:
                await service.aclose()
                service = service_of(ray, tmp_path)
            await service.get_job(job_id)
        found.extend([page async for page in service.read_logs(job_id, cursor)])
        await service.aclose()

    anyio.run(run)
    text = bytes(ray.logs[job_id]).replace(b"\r\n", b"\n")
    assert _text(found) == text.split(b"\n")
    times = [time for page in found for time in page.times_unix_nano()]
    assert times == sorted(set(times))
    whole = pages_of(service_of(ray, tmp_path), job_id)
    assert [uid for page in found for uid in page.uids()] == [uid for page in whole for uid in page.uids()]


def test_both_ways_give_the_same_uids(tmp_path):
    """A log that is read from its file first, and through the API after that, has no line twice."""
    with FakeRay(tmp_path) as ray:
        job_id = ray.add_job("a-1")
        ray.write(job_id, "".join(f"line {number}\n" for number in range(30)))
        ray.end(job_id)
        pages = pages_of(service_of(ray, tmp_path), job_id)
        through_api = service_of(ray, tmp_path, temp_dir=str(tmp_path / "other"))
        assert [page.digests for page in pages_of(through_api, job_id)] == [page.digests for page in pages]
        assert pages_of(through_api, job_id, pages[-1].cursor) == []


def test_the_connection_stays_open(remote, tmp_path):
    """Reads of a silent job open one connection; one that breaks meanwhile is opened again up to the cursor."""
    job_id, service = remote.add_job("a-1"), service_of(remote, tmp_path)
    remote.write(job_id, "first\n")

    async def run() -> None:
        pages = [page async for page in service.read_logs(job_id)]
        assert _text(pages) == [b"first"]
        for _ in range(3):
            assert [page async for page in service.read_logs(job_id, pages[-1].cursor)] == []
        assert sum(one.startswith("SOCKET") for one in remote.requests) == 1
        remote.write(job_id, "half a line")
        while await service.open_line(job_id) is None:
            assert [page async for page in service.read_logs(job_id, pages[-1].cursor)] == []
        line = await service.open_line(job_id)
        assert line is not None
        assert line.message == "half a line"
        await service.aclose()

    anyio.run(run)


def test_a_connection_that_breaks(remote, tmp_path):
    """A first connection that breaks is an error to retry; what came before it is not lost."""
    job_id, service = remote.add_job("a-1"), service_of(remote, tmp_path)
    remote.write(job_id, "".join(f"line {number}\n" for number in range(35)))
    remote.end(job_id)
    remote.break_after = [2]

    async def run() -> None:
        with pytest.raises(ServiceUnavailableError, match="broke off"):
            _ = [page async for page in service.read_logs(job_id)]
        assert len(_text([page async for page in service.read_logs(job_id)])) == 35
        await service.aclose()

    anyio.run(run)


def test_a_log_that_was_replaced(ray, tmp_path):
    """A cursor behind another text: the reader is told, and goes on at the start of the new log."""
    job_id = ray.add_job("a-1")
    ray.write(job_id, "the old log\n")
    ray.end(job_id)
    cursor = pages_of(service_of(ray, tmp_path), job_id)[-1].cursor
    ray.logs[job_id][:] = b"another log\nof another job\n"
    for file in tmp_path.glob("*/logs/*"):
        file.write_bytes(ray.logs[job_id])
    with pytest.raises(CursorExpiredError) as caught:
        pages_of(service_of(ray, tmp_path), job_id, cursor)
    rest = pages_of(service_of(ray, tmp_path), job_id, caught.value.resume_cursor)
    assert _text(rest) == [b"another log", b"of another job"]


def test_a_job_that_ray_deletes_is_read_to_its_end(tmp_path):
    """The file of a job that had ended stays when its entry is deleted."""
    with FakeRay(tmp_path) as ray:
        ray.write(ray.add_job("a-1"), "first\nlast\n")
        ray.end("a-1")
        service = service_of(ray, tmp_path)

        async def run() -> None:
            assert (await service.get_job("a-1")).state is JobState.SUCCEEDED
            del ray.jobs["a-1"]
            assert _text([page async for page in service.read_logs("a-1")]) == [b"first", b"last"]
            with pytest.raises(JobNotFoundError):
                await service.get_job("a-1")
            await service.aclose()

        anyio.run(run)


def test_bytes_that_are_not_utf8(ray, tmp_path):
    """The file is read as it is; through the API, which breaks off there, the error says why."""
    job_id = ray.add_job("a-1")
    ray.write(job_id, b"good\n\xff\xfe bad\n")
    ray.end(job_id)
    if ray.temp_dir is not None:
        assert _text(pages_of(service_of(ray, tmp_path), job_id)) == [b"good", b"\xff\xfe bad"]
        return
    with pytest.raises(ServiceUnavailableError, match="not UTF-8"):
        pages_of(service_of(ray, tmp_path), job_id)


def test_an_id_never_leads_to_another_file(tmp_path):
    """Ids with slashes, and links out of the directory, are not followed to other files."""
    (tmp_path / "secret").write_text("secret\n")
    with FakeRay(tmp_path) as ray:
        logs = next(tmp_path.glob("*/logs"))
        (logs / "job-driver-link.log").symlink_to(tmp_path / "secret")
        ray.add_job("link", "SUCCEEDED", end_time=ray.start_ms)
        assert pages_of(service_of(ray, tmp_path), "link") == []
        with pytest.raises(JobNotFoundError):
            pages_of(service_of(ray, tmp_path), "../../secret")


@pytest.mark.parametrize(
    ("status", "more", "expected"),
    [
        ("PENDING", {}, JobState.PENDING),
        ("RUNNING", {}, JobState.RUNNING),
        ("SUCCEEDED", {"driver_exit_code": 0}, JobState.SUCCEEDED),
        ("FAILED", {"error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}, JobState.FAILED),
        ("FAILED", {"error_type": "RUNTIME_ENV_SETUP_FAILURE"}, JobState.FAILED),
        ("FAILED", {"error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, JobState.LOST),
        ("STOPPED", {}, JobState.CANCELED),
        ("NEW", {}, JobState.UNKNOWN),
    ],
)
def test_states(remote, client, status, more, expected):
    """Every state has ours, in the status and in the list."""
    remote.add_job("a-1", status, end_time=remote.start_ms + 1 if expected.is_terminal else None, **more)
    found = client.get_status("a-1")
    assert (found.state, found.job_name) == (expected, "train")
    assert (found.finished_at is not None) is expected.is_terminal
    assert [row.state for row in client.list_jobs()] == [expected]


def test_recorded_jobs(remote, client):
    """What the real server returned: times, names, exit codes, errors without the log, and its traceparent."""
    for label in ("running", "succeeded", "stopped", "failed"):
        job = RECORDED[label]["reply"]
        remote.jobs[job["submission_id"]] = job
        remote.logs[job["submission_id"]] = bytearray()
    done = client.get_status("etl-nightly-1")
    assert (done.job_name, done.exit_code, done.attributes) == ("etl-nightly", 0, {"team": "geo"})
    assert done.submitted_at is not None
    assert done.submitted_at.timestamp() == 1795912622.342
    assert (done.parent or "").startswith("00-0af7651916cd43dd8448eb211c80319c-")
    failed = client.get_status("etl-fails-1")
    assert (failed.state, failed.exit_code) == (JobState.FAILED, 1)
    assert failed.error == "Job entrypoint command failed with exit code 1"
    assert client.get_status("etl-stop-1").state is JobState.CANCELED
    assert client.cancel("etl-stop-1").state is JobState.CANCELED
    rows = RECORDED["list"]["reply"]
    remote.jobs = {str(number): row for number, row in enumerate(rows)}
    listed = client.list_jobs()
    assert {row.job_id for row in listed} == {row["submission_id"] for row in rows if row["type"] == "SUBMISSION"}
    assert [row.created_at for row in listed] == sorted((row.created_at for row in listed), reverse=True)


def test_recorded_frames(remote, client):
    """The text of the recorded WebSocket is read as it was printed."""
    job_id = remote.add_job("ws-1")
    text = "".join(one["data"] for one in RECORDED["tail"] if "data" in one)
    remote.write(job_id, text)
    remote.end(job_id)
    assert [one["message"] for one in client.get_logs(job_id)] == text.removesuffix("\n").split("\n")


def test_the_start_is_when_it_was_seen_to_run(remote, client):
    """Ray's start time is that of the submission; a job that was seen to wait has started later."""
    remote.add_job("a-1", "PENDING", start_time=remote.start_ms - 60_000)
    assert client.get_status("a-1").started_at is None
    remote.jobs["a-1"]["status"] = "RUNNING"
    started = client.get_status("a-1").started_at
    assert started is not None
    assert started.timestamp() * 1000 > remote.start_ms - 30_000
    remote.end("a-1")
    assert client.get_status("a-1").started_at == started


def test_submit_and_cancel(remote, client):
    """A command with a name, attributes and environment; the reply may be lost, and the job is found."""
    job = client.submit(["python", "run it.py"], name="etl", attributes={"team": "geo"}, env={"N": "1"})
    made = remote.jobs[job.job_id]
    assert made["entrypoint"] == "python 'run it.py'"
    assert made["metadata"] == {"team": "geo", "job_name": "etl"}
    assert made["runtime_env"] == {"env_vars": {"N": "1"}}
    assert (job.job_name, job.state) == ("etl", JobState.PENDING)
    assert client.cancel(job.job_id).state is JobState.CANCELED
    with pytest.raises(ConfigError, match="neither timeout nor cwd"):
        client.submit(["true"], timeout=60)
    with pytest.raises(ConfigError, match="not valid Unicode"):
        client.submit(["cat", "\udce4.txt"])  # the name of a file that is not UTF-8
    with pytest.raises(JobNotFoundError):
        client.cancel("none")


def test_drivers_and_unknown_jobs(remote, client, tmp_path):
    """A driver that was not submitted has neither id nor log here; cursors of others are refused."""
    remote.add_job("02000000", type="DRIVER", submission_id=None)
    assert client.list_jobs() == []
    for job_id in ("02000000", "none"):
        with pytest.raises(JobNotFoundError):
            client.get_status(job_id)
    remote.add_job("a-1")
    for cursor in (b"x", b"12", b"\x81\xa1p\xc0", b"\x81\xa1p\x95\x01\x02\x03\x04\x05"):
        with pytest.raises(ConfigError, match="not a cursor"):
            pages_of(service_of(remote, tmp_path), "a-1", cursor)


def test_credentials(remote, tmp_path):
    """The token is sent with requests and with the WebSocket; a file that has a new one is read again."""
    remote.token, file = "new-token-1", tmp_path / "token"
    file.write_text("old-token-1")
    remote.add_job("a-1")
    remote.write("a-1", "line\n")

    async def run() -> None:
        service = service_of(remote, tmp_path, token_file=str(file))
        with pytest.raises(AuthError) as caught:
            await service.get_job("a-1")
        assert "old-token-1" not in str(caught.value)
        file.write_text("new-token-1")
        assert _text([page async for page in service.read_logs("a-1")]) == [b"line"]
        remote.token = "newer-token"
        service._drop_tails(0)
        file.write_text("newer-token")
        assert _text([page async for page in service.read_logs("a-1")]) == [b"line"]
        await service.aclose()

    anyio.run(run)


def test_the_check_says_where_lines_come_from(tmp_path):
    """A configured directory without this cluster's session."""
    with FakeRay(tmp_path) as ray:

        async def problems(**options: Any) -> list[str]:
            service = service_of(ray, tmp_path, **options)
            found = [problem.text for problem in await service.find_problems()]
            await service.aclose()
            return found

        assert anyio.run(problems) == []
        other: Callable[[], Any] = lambda: problems(temp_dir=str(tmp_path / "other"))  # noqa: E731
        (found,) = anyio.run(other)
        assert "through its API" in found


def test_ten_thousand_rows_are_decoded_once(remote, tmp_path, monkeypatch):
    """A list of ended jobs with long messages is larger than any other reply, and only changed rows cost anything."""
    for number in range(300):
        remote.add_job(f"job-{number}", "FAILED", message="x" * 40_000, end_time=1, start_time=remote.start_ms + number)
    service = service_of(remote, tmp_path)

    async def run() -> None:
        first = [row async for rows in service.list_jobs() for row in rows]
        assert [row.job_id for row in first] == [f"job-{number}" for number in reversed(range(300))]
        remote.jobs["job-7"]["status"] = "SUCCEEDED"
        second = [row async for rows in service.list_jobs() for row in rows]
        assert sum(one is not two for one, two in zip(first, second, strict=True)) == 1
        await service.aclose()

    anyio.run(run)
