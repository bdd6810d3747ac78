"""Slurm's jobs, against doubles of its programs and real log files."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from tailspan.config import validate_options
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan.services.slurm import SlurmOptions, SlurmService
from tailspan.testing import ServiceConformance
from tests.fakes.json_api import pages_of
from tests.fakes.slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    """A cluster with accounting and without jobs."""
    return FakeSlurm(tmp_path / "slurm")


def service_of(slurm: FakeSlurm, **keys: object) -> SlurmService:
    """A service that asks only when it is made to; see `ask`."""
    options = {"bin_dir": str(slurm.programs), "cluster": "tail", "refresh": "1h", **keys}
    return SlurmService("slurm", validate_options(SlurmOptions, "services.slurm", options))


def ask(service: SlurmService, job_id: str = "") -> JobStatus | None:
    """Let the service ask now; return the status of a job."""

    async def refresh() -> JobStatus | None:
        await service._book.refresh(now=True)
        return await service.get_job(job_id) if job_id else None

    return anyio.run(refresh)


def lines_of(service: SlurmService, job_id: str, cursor: bytes | None = None) -> tuple[list[str], bytes | None]:
    """The lines after a cursor, and the next cursor."""
    pages = pages_of(service, job_id, cursor)
    return [line.decode() for page in pages for line in page.lines], pages[-1].cursor if pages else cursor


class TestConformance(ServiceConformance):
    """The promises of every service, for a job with two files."""

    @pytest.fixture(autouse=True)
    def _use(self, slurm: FakeSlurm) -> None:
        self._slurm = slurm
        row = slurm.add_job("7", state="COMPLETED", stderr=str(slurm.work / "err"))
        Path(row["stdout"]).write_text("".join(f"line {number}\n" for number in range(6000)))
        Path(row["stderr"]).write_text("err 1\nerr 2")
        slurm.add_job("8")
        slurm.save()

    def make_service(self) -> SlurmService:
        """A new service."""
        return service_of(self._slurm)


def test_one_question_for_all_jobs(slurm: FakeSlurm) -> None:
    """However many jobs are followed, each program runs once, and not again before the configured time."""
    for number in range(30):
        slurm.add_job(str(number), array="0", element=str(number), shown_id=f"0_{number}")
    slurm.add_step("3.batch", "batch")
    slurm.add_step("3.extern", "extern")
    slurm.save()
    service = service_of(slurm)

    async def use() -> list[TaskRun]:
        for number in range(30):
            await service.get_job(str(number))
        assert (await service.get_job("0_7")).job_id == "7"
        return list(await service.list_tasks("3"))

    tasks = anyio.run(use)
    assert [call.partition(" ")[0] for call in slurm.calls()] == ["squeue", "sacct", "scontrol"]
    assert [task.task_id for task in tasks] == ["3.batch"]
    status = ask(service, "3")
    assert status is not None
    assert (status.attributes, status.total_tasks) == ({"slurm.array.job_id": "0", "slurm.array.task_id": "3"}, 1)
    # What is known of all jobs is not asked again.
    assert [call.partition(" ")[0] for call in slurm.calls()] == ["squeue", "sacct"]


@pytest.mark.parametrize("accounting", [True, False])
def test_the_life_of_a_job(slurm: FakeSlurm, accounting: bool) -> None:
    """It waits, runs, ends and is forgotten by the controller: its lines stay readable, by the path in the cursor."""
    slurm.accounting = accounting
    row = slurm.add_job("7", state="PENDING", reason="DependencyNeverSatisfied", comment="team=geo")
    row["stdout"] = row["stderr"] = str(slurm.work / "own name.log")
    slurm.save()
    service = service_of(slurm)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.started_at, status.attributes) == (JobState.PENDING, None, {"team": "geo"})
    assert "waits for ever" in (status.error or "")
    slurm.start(row)
    log = Path(row["stdout"])
    log.write_text("one\nhalf")
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.error, status.job_status) == (JobState.RUNNING, None, "RUNNING")
    lines, cursor = lines_of(service, "7")
    assert lines == ["one"]
    line = anyio.run(service.open_line, "7")
    assert line is not None
    assert line.message == "half"
    log.write_text("one\nhalf a line\nlast")
    slurm.end(row, "FAILED", "0:9", reason="NonZeroExitCode")
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.exit_code, status.error) == (JobState.FAILED, 137, "FAILED, exit code 137")
    row["forgotten"] = True
    slurm.save()
    if accounting:
        service = service_of(slurm)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.exit_code) == (JobState.FAILED, 137)
    assert lines_of(service, "7", cursor)[0] == ["half a line", "last"]
    if not accounting:
        # Nothing else remembers it.
        with pytest.raises(JobNotFoundError):
            ask(service_of(slurm), "7")


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("way", ["truncated", "appended"])
def test_a_requeue_is_another_attempt(slurm: FakeSlurm, way: str, same: bool) -> None:
    """A requeued job truncates its file, or appends to it: no line of the next attempt is missing."""
    row = slurm.add_job("7")
    slurm.save()
    log = Path(row["stdout"])
    first = [f"{0 if same else 'first'} line {number}" for number in range(5)]
    second = [f"{0 if same else 'second'} line {number}" for number in range(9)]
    log.write_text("\n".join([*first, ""]))
    service = service_of(slurm)
    ask(service)
    lines, cursor = lines_of(service, "7")
    assert lines == first
    slurm.requeue(row)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.attempt, status.started_at) == (JobState.PENDING, 1, None)
    assert lines_of(service, "7", cursor) == ([], cursor)
    slurm.start(row)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.attempt) == (JobState.RUNNING, 2)
    # Slurm has not opened the file yet.
    assert lines_of(service, "7", cursor)[0] == []
    before = [] if way == "truncated" else first
    log.write_text("\n".join([*before, *second[:7], ""]))
    lines, cursor = lines_of(service, "7", cursor)
    if way == "appended" and not same:
        # Slurm does not say whether the file is appended to: a short one is read again rather than not at all.
        assert lines == [*first, *second[:7]]
    else:
        assert lines == second[:7]
    with log.open("a") as file:
        file.write("\n".join([*second[7:], ""]))
    slurm.end(row)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.attempt) == (JobState.SUCCEEDED, 2)
    assert lines_of(service, "7", cursor)[0] == second[7:]


@pytest.mark.parametrize("requeued", [True, False])
def test_a_file_that_is_ahead_of_the_list(slurm: FakeSlurm, requeued: bool) -> None:
    """A truncated file may be the next attempt's: its lines wait until Slurm was asked again, and come once."""
    row = slurm.add_job("7")
    slurm.save()
    log = Path(row["stdout"])
    log.write_text("first 1\nfirst 2\n")
    service = service_of(slurm)
    ask(service)
    _, cursor = lines_of(service, "7")
    log.write_text("next 1\n")
    if requeued:
        slurm.requeue(row)
        slurm.start(row)
    assert lines_of(service, "7", cursor) == ([], cursor)
    status = ask(service, "7")
    assert status is not None
    assert status.attempt == 1 + requeued
    lines, cursor = lines_of(service, "7", cursor)
    assert lines == ["next 1"]
    with log.open("a") as file:
        file.write("next 2\n")
    ask(service)
    assert lines_of(service, "7", cursor)[0] == ["next 2"]


def test_the_controller_is_away(slurm: FakeSlurm) -> None:
    """Without the controller, jobs have their last state, and their logs are read; ends are seen later."""
    row = slurm.add_job("7")
    slurm.save()
    Path(row["stdout"]).write_text("one\n")
    service = service_of(slurm)
    ask(service)
    _, cursor = lines_of(service, "7")
    slurm.controller = False
    slurm.save()
    Path(row["stdout"]).write_text("one\ntwo\n")
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.stale) == (JobState.RUNNING, True)
    assert lines_of(service, "7", cursor)[0] == ["two"]
    with pytest.raises(ServiceUnavailableError, match="Unable to contact slurm controller"):
        anyio.run(rows_of, service)
    with pytest.raises(ServiceUnavailableError, match="Unable to contact slurm controller"):
        ask(service, "8")
    with pytest.raises(ServiceUnavailableError):
        ask(service_of(slurm), "7")
    slurm.controller = True
    slurm.end(row, "TIMEOUT", "0:0")
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.stale, status.exit_code) == (JobState.TIMED_OUT, False, None)


async def rows_of(service: SlurmService) -> list[str]:
    """The ids of the listed jobs."""
    return [row.job_id async for page in service.list_jobs() for row in page]


def test_accounting_is_away(slurm: FakeSlurm) -> None:
    """Without its database, the controller's list is enough; steps come later."""
    slurm.accounting = "sacct: error: Problem talking to the database: Connection refused"
    slurm.add_job("7", state="FAILED", exit="3:0")
    slurm.save()
    service = service_of(slurm)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, status.exit_code, status.total_tasks) == (JobState.FAILED, 3, 0)
    problems = anyio.run(service.find_problems)
    assert any("without accounting" in problem.text for problem in problems)


def test_a_job_that_nothing_remembers_is_lost(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running job that the controller forgets, and whose end accounting never gets, is lost after some minutes."""
    row = slurm.add_job("7")
    slurm.save()
    service = service_of(slurm)
    ask(service)
    row["forgotten"] = True
    slurm.save()
    status = ask(service, "7")
    assert status is not None
    assert status.state is JobState.RUNNING
    monkeypatch.setattr("tailspan.services.slurm.book._FORGOTTEN_S", 0.0)
    status = ask(service, "7")
    assert status is not None
    assert (status.state, "forgot" in (status.error or "")) == (JobState.LOST, True)


def test_only_files_of_the_jobs_user_are_read(slurm: FakeSlurm) -> None:
    """A user names the file of a job: another user's file, a link or a device is not read; the state is relayed."""
    secret = slurm.work / "secret"
    secret.write_text("secret\n")
    (slurm.work / "link").symlink_to(secret)
    os.mkfifo(slurm.work / "fifo")
    for number, path in enumerate(
        [secret, slurm.work / "link", slurm.work / "fifo", Path("/dev/zero"), Path("/dev/null")]
    ):
        row = slurm.add_job(str(number), state="COMPLETED", stdout=str(path))
        row["uid"] = os.getuid() + (path == secret)
    slurm.save()
    service = service_of(slurm)
    for number in range(5):
        assert lines_of(service, str(number))[0] == []
    slurm.add_job("9", stdout=str(secret), uid=os.getuid() + 1)
    slurm.save()
    problems = anyio.run(service.find_problems)
    assert [problem.text for problem in problems if problem.is_fatal] == [
        f"the logs of 1 of 1 running jobs, for example {secret} is missing, or is not the job's own:"
        " mount their file system here, and let this user read them"
    ]


def test_cancel(slurm: FakeSlurm) -> None:
    """A job is canceled by the id that Slurm shows; one of another user is refused."""
    slurm.add_job("8", array="3", element="1", shown_id="3_1")
    slurm.add_job("9", user="other")
    slurm.save()
    service = service_of(slurm)
    assert anyio.run(service.cancel, "8").state is JobState.CANCELED
    assert any(call == "scancel 3_1" for call in slurm.calls())
    with pytest.raises(AuthError, match="permission denied"):
        anyio.run(service.cancel, "9")
    with pytest.raises(JobNotFoundError):
        anyio.run(service.cancel, "10")
    row = slurm.add_job("11")
    slurm.save()
    ask(service)
    slurm.end(row)
    assert anyio.run(service.cancel, "11").state is JobState.SUCCEEDED  # it ended since Slurm was asked


def test_submit(slurm: FakeSlurm) -> None:
    """A command becomes a script; attributes become the comment, a timeout whole minutes."""
    slurm.add_job("77", "etl", state="PENDING")
    slurm.save()
    service = service_of(slurm)

    async def submit(*command: str, **options: object) -> JobStatus:
        return await service.submit(command, **options)  # type: ignore[arg-type]

    options = {"name": "etl", "attributes": {"team": "geo"}, "timeout_s": 61.0, "cwd": "/w"}
    status = anyio.run(lambda: submit("python", "a b.py", "$x", **options))
    assert (status.job_id, status.state) == ("77", JobState.PENDING)
    assert (slurm.programs / "script").read_text() == "#!/bin/sh\nexec python 'a b.py' '$x'\n"
    sent = next(call for call in slurm.calls() if call.startswith("sbatch"))
    assert sent == "sbatch --parsable --job-name etl --comment team=geo --time 2 --chdir /w"
    # The controller goes away behind the submission, or the section has jobs of another partition only.
    slurm.jobs.clear()
    for slurm.controller in (True, False):
        slurm.save()
        service = service_of(slurm)
        status = anyio.run(lambda: submit("python"))
        assert (status.job_id, status.state, status.job_name) == ("77", JobState.PENDING, "python")
    with pytest.raises(RequestRejectedError, match="Invalid account"):
        anyio.run(lambda: submit("fail"))
    for hostile in (("true", "a\0b"), ("true", "\ud800"), ("a\0b",)):
        with pytest.raises(ConfigError, match="cannot be passed to sbatch"):
            anyio.run(submit, *hostile)
    with pytest.raises(ConfigError, match="words without commas"):
        anyio.run(lambda: submit("true", attributes={"a": "b,c"}))


def test_what_is_missing(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs, the cluster's name and options that are missing or wrong are named."""
    service = service_of(slurm, bin_dir=str(tmp_path / "none"))
    with pytest.raises(ServiceUnavailableError, match=r"squeue is not in .*none: install Slurm's client programs"):
        ask(service)
    (slurm.programs / "sbatch").unlink()
    problems = anyio.run(service_of(slurm).find_problems)
    assert [problem.text for problem in problems] == ["sbatch is not installed: jobs cannot be submitted"]
    conf = tmp_path / "slurm.conf"
    conf.write_text("# ClusterName=no\nclustername = Tail \n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    assert service_of(slurm, cluster=None).identity == "slurm:tail"
    conf.unlink()
    with pytest.raises(ConfigError, match=r"services\.slurm\.cluster: is missing"):
        _ = service_of(slurm, cluster=None).identity
    with pytest.raises(ConfigError):
        service_of(slurm, accounting="maybe")


def test_strange_cursors(slurm: FakeSlurm) -> None:
    """What is not a cursor is an error that says so."""
    slurm.add_job("7")
    slurm.save()
    service = service_of(slurm)
    for cursor in (b"", b"12", b"\x80", b"\x81\xa1f\x91\x91\xa1x", b"\x81\xa1f\x05"):
        with pytest.raises(ConfigError, match="is not a cursor"):
            pages_of(service, "7", cursor)


def test_accounting_is_asked_by_its_own_clock(slurm: FakeSlurm) -> None:
    """Since the last change that it has, in UTC: the clock and the summer time of this machine move nothing."""
    slurm.start_s = 1_795_000_000  # 2026-11-18T11:06:40 UTC
    slurm.add_job("7", state="COMPLETED")
    slurm.save()
    service = service_of(slurm, history="10000d")
    ask(service)
    slurm.calls()
    ask(service)
    (call,) = [call for call in slurm.calls() if call.startswith("sacct")]
    assert "-S 2026-11-18T10:57:20 " in call  # ten minutes before the end
    wrapper = slurm.programs / "squeue"
    wrapper.write_text(wrapper.read_text().replace("#!/bin/sh\n", "#!/bin/sh\necho cached at $(date +%Z)\n"))
    slurm.add_job("8")
    slurm.save()
    status = ask(service, "8")
    assert status is not None
    assert status.state is JobState.RUNNING
