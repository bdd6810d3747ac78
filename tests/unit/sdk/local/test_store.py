"""The directory of local jobs: ids, listing, pruning, who may read it, and what damage does to it."""

from __future__ import annotations

import grp
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from tailspan.config import Settings
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from tailspan.local.index import HEADER
from tailspan.local.state import iso_time
from tailspan.local.store import JobStore, new_job_id, submitted_at_of
from tailspan.models import JobState
from tailspan.services.local import LocalService
from tailspan.services.registry import open_service
from tests.fakes.local_jobs import LocalJobs, until

DAY_S = 86400


@pytest.fixture
def local(tmp_path):
    """Return local jobs in a directory of their own."""
    with LocalJobs(tmp_path / "state") as jobs:
        yield jobs


def put(local: LocalJobs, ended_days_ago: float, *, name: str = "old", end: bool = True) -> str:
    """Put the files of a job there that ended some days ago; without ``end`` its supervisor was killed."""
    ended_ns = time.time_ns() - int(ended_days_ago * DAY_S * 1e9)
    job_id = new_job_id(ended_ns - 10**9)
    path = local.directory(job_id)
    path.mkdir(parents=True)
    (path / "job.json").write_text(json.dumps({"name": name}))
    (path / "log").touch()
    (path / "log.idx").write_bytes(HEADER)
    (path / "lock").touch()
    os.utime(path / "lock", ns=(ended_ns, ended_ns))
    state = {
        "state": "SUCCEEDED",
        "name": name,
        "finished_at": iso_time(ended_ns),
        "lines": 7,
        "end": iso_time(ended_ns),
    }
    if end:
        (path / "state.json").write_text(json.dumps(state))
    return job_id


def listed(local: LocalJobs) -> list[list[str]]:
    """Return the ids of each page of the list."""

    async def read() -> list[list[str]]:
        return [[row.job_id for row in rows] async for rows in local.service.list_jobs()]

    return anyio.run(read)


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        ".",
        "..",
        "../identity",
        "20260101-000000000-aaaaaa/../../identity",
        "20260101-000000000-aaaaaa\n",
        "/etc/passwd",
        "20260101-000000000-aaaaa\0",
        "２０２６０１０１-000000000-aaaaaa",
        "20260101-000000000-aaaaaa",
        ".new-20260101-000000000-aaaaaa",
        "x" * 1000,
    ],
)
def test_ids_that_are_not_a_job(local, job_id):
    """Unknown ids and ids that would leave the directory are no job, for every method, and touch nothing."""
    local.run("true")

    async def read() -> None:
        async for _page in local.service.read_logs(job_id):
            pass

    for ask in (
        lambda: local.service.get_job(job_id),
        lambda: local.service.cancel(job_id),
        lambda: local.service.log_times_ms(job_id),
        read,
    ):
        with pytest.raises(JobNotFoundError) as caught:
            anyio.run(ask)
        assert (caught.value.job_id, caught.value.service) == (job_id, "local")


def test_ids_sort_by_time():
    """An id begins with the moment of its submit."""
    moments = [10**18, 10**18 + 10**6, 10**18 + 10**9]
    ids = [new_job_id(moment) for moment in moments]
    assert ids == sorted(ids)
    assert submitted_at_of(ids[1]) == datetime(2001, 9, 9, 1, 46, 40, 1000, UTC)
    assert submitted_at_of("20269999-000000000-aaaaaa") is None


def test_the_list_is_newest_first_and_paged(local):
    """Each job once, newest first, pages of 200; closing early reads no further."""
    ids = sorted((put(local, days) for days in range(450)), reverse=True)
    pages = listed(local)
    assert [len(page) for page in pages] == [200, 200, 50]
    assert [job_id for page in pages for job_id in page] == ids
    assert [job_id for page in listed(local) for job_id in page] == ids


def test_a_row_tells_what_the_agent_needs(local):
    """Name, state, count of lines and times come with the list, while the job runs, too."""
    job_id = local.start("sh", "-c", "echo one; echo two; read x", name="etl", stdin_fd=None)
    local.complete(job_id)
    running = local.start("sh", "-c", "echo one; exec sleep 600", name="long")
    until(lambda: local.lines(running))
    rows = anyio.run(lambda: anext(local.service.list_jobs()))
    assert [(row.job_name, row.state, row.lines) for row in rows] == [
        ("long", JobState.RUNNING, 1),
        ("etl", JobState.FAILED, 2),
    ]
    assert all(abs(row.created_at - datetime.now(UTC)) < timedelta(minutes=5) for row in rows)
    assert rows[1].state_since == local.service.status(job_id).finished_at


def test_no_directory_is_an_empty_list(tmp_path):
    """Before the first job there is nothing, and asking makes nothing."""
    with LocalJobs(tmp_path / "state") as local:
        assert listed(local) == []
        assert not (tmp_path / "state").exists()


def test_prune_deletes_what_ended_before(local):
    """Ended and lost jobs that are old enough go; younger ones and running ones stay."""
    local.service = LocalService(state_dir=local.state_dir, keep_finished_s=100 * DAY_S)
    old, lost, young = put(local, 40), put(local, 35, end=False), put(local, 5)
    running = local.start("sleep", "600")
    os.utime(local.directory(running) / "lock", (0, 0))
    abandoned = local.state_dir / "jobs" / f".new-{new_job_id(0)}"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    assert local.service.prune(30 * DAY_S) == [old, lost]
    assert listed(local) == [[running, young]]
    assert not abandoned.exists()
    assert local.service.prune(0) == [young]
    assert local.service.status(running).state is JobState.RUNNING


def pruned_at(local: LocalJobs, when_s: float, since: str = "") -> None:
    """Leave the mark of an earlier call; see `LocalService.prune_sometimes`."""
    mark = local.state_dir / "pruned"
    mark.write_text(since)
    os.utime(mark, (when_s, when_s))


def test_old_jobs_go_by_themselves(tmp_path):
    """A submit prunes what is older than `keep_finished`, at most once an hour."""
    with LocalJobs(tmp_path / "state", keep_finished_s=10 * DAY_S) as local:
        old, young = put(local, 11), put(local, 9)
        pruned_at(local, time.time() - 2 * 3600)
        job_id = local.start("true")
        assert listed(local) == [[job_id, young]]
        old = put(local, 11)
        later = local.start("true")
        assert listed(local) == [[later, job_id, young, old]]
        pruned_at(local, time.time() - 5 * DAY_S)
        assert old not in (local.start("true"), *listed(local)[0])


def test_a_clock_that_is_wrong_once_deletes_no_job(tmp_path, monkeypatch):
    """In 2099 every job is old. Nothing goes then, nor in the first day of the right time; a mark of 2099 is no bar."""
    now_s = time.time()
    with LocalJobs(tmp_path / "state", keep_finished_s=10 * DAY_S) as local:
        old, young = put(local, 11), put(local, 5)

        def prune_at(when_s: float) -> list[list[str]]:
            monkeypatch.setattr("tailspan.services.local.time.time", lambda: when_s)
            local.service.prune_sometimes()
            os.utime(local.state_dir / "pruned", (when_s, when_s))
            return listed(local)

        pruned_at(local, now_s - 2 * 3600)
        in_2099 = now_s + 73 * 365 * DAY_S
        for when_s in (in_2099, in_2099 + 2 * 3600, now_s, now_s + 23 * 3600):
            assert prune_at(when_s) == [[young, old]]
        assert prune_at(now_s + 25 * 3600) == [[young]]


def test_an_end_in_the_future_is_none(tmp_path):
    """A job that says it ended in 9999 goes when its other times are old."""
    with LocalJobs(tmp_path / "state") as local:
        job_id = put(local, 40)
        path = local.directory(job_id) / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "finished_at": "9999-12-31T23:59:59Z"}))
        os.utime(local.directory(job_id) / "lock", (0, 0))
        assert local.service.prune(30 * DAY_S) == [job_id]


def test_a_job_can_be_read_while_it_is_pruned(local):
    """Whoever has opened a log reads it to its end."""
    job = local.run("seq", "20000")

    async def read() -> int:
        count = 0
        async for page in local.service.read_logs(job.job_id):
            shutil.rmtree(local.directory(job.job_id), ignore_errors=True)
            count += len(page.lines)
        return count

    assert anyio.run(read) == 20_000


def test_the_identity_is_made_once(tmp_path):
    """Many services that start at once agree on one UUID, and it stays."""
    found: list[str] = []
    services = [LocalService(state_dir=tmp_path / "state") for _ in range(8)]
    threads = [threading.Thread(target=lambda s=service: found.append(s.identity)) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert str(uuid.UUID(found[0])) == found[0]
    assert LocalService(state_dir=tmp_path / "state").identity == found[0]
    assert [path.name for path in (tmp_path / "state").glob("identity*")] == ["identity"]
    (tmp_path / "state" / "identity").write_text("not a uuid")
    with pytest.raises(ProtocolError, match="does not have a UUID"):
        _ = LocalService(state_dir=tmp_path / "state").identity


def test_only_this_user_may_read(local):
    """Directories are 0700 and files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        job = local.run("echo", "hi")
    finally:
        os.umask(before)
    for path in (local.state_dir, *local.state_dir.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {path.name for path in local.directory(job.job_id).iterdir()} == {
        "job.json",
        "state.json",
        "log",
        "log.idx",
        "lock",
    }


def test_a_group_may_read(tmp_path):
    """With `group`, its members can read all of a job's files and change none."""
    name = grp.getgrgid(os.getgid()).gr_name
    before = os.umask(0o077)
    try:
        with LocalJobs(tmp_path / "state", group=name) as local:
            local.run("echo", "hi")
            for path in (local.state_dir, *local.state_dir.rglob("*")):
                if not path.name.startswith("pruned"):
                    mode, group = stat.S_IMODE(path.stat().st_mode), path.stat().st_gid
                    shared = path in (local.state_dir, local.state_dir / "jobs")
                    of_directory = 0o3770 if shared else 0o2750
                    assert (mode, group) == (of_directory if path.is_dir() else 0o640, os.getgid()), path
    finally:
        os.umask(before)


def test_no_such_group_is_a_configuration_error(tmp_path):
    """The key is named."""
    with pytest.raises(ConfigError, match="no group 'nobody-here'") as caught:
        JobStore(tmp_path, group="nobody-here")
    assert caught.value.key == "services.local.group"


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_another_user_is_told_what_to_do(local):
    """A reader without rights gets an error that names the option, not a traceback."""
    job = local.run("echo", "hi")
    for path in (local.state_dir, *local.state_dir.parents):
        if path.name.startswith(("pytest-", "popen-")) or path == local.state_dir.parent:
            path.chmod(0o755)
    program = (
        "import os, sys, anyio; from pathlib import Path; from tailspan.services.local import LocalService\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "service = LocalService(state_dir=Path(sys.argv[1]))\n"
        "try:\n    service.status(sys.argv[2])\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(local.state_dir), job.job_id], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(AuthError.__name__)
    assert "set services.local.group" in done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_a_job_of_another_user_hides_no_other(local):
    """What was once run by sudo in this user's directory is listed as unknown; the user's own jobs go on as ever."""
    mine, theirs = put(local, 40), put(local, 40)
    local.directory(theirs).chmod(0o700)
    for path in (local.state_dir, *local.state_dir.parents):
        if path.name.startswith(("pytest-", "popen-")) or path == local.state_dir.parent:
            path.chmod(0o755)
    for path in (local.state_dir, *local.state_dir.rglob("*")):
        if theirs not in path.parts:
            os.chown(path, 65534, 65534)
    program = (
        "import asyncio, fcntl, os, shutil, sys\n"
        "from pathlib import Path; from tailspan.services.local import LocalService\n"
        "asyncio.run(asyncio.to_thread(int))\n"  # imports what this user may not
        "os.setgid(65534); os.setuid(65534)\n"
        "service = LocalService(state_dir=Path(sys.argv[1]))\n"
        "async def look():\n"
        "    print(sorted([(row.job_id, row.state.value) async for page in service.list_jobs() for row in page]))\n"
        "asyncio.run(look())\n"
        "print(service.prune(0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(local.state_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(sorted([(mine, "SUCCEEDED"), (theirs, "UNKNOWN")])), str([mine])]


def test_files_that_a_power_failure_has_emptied(local):
    """An empty job.json or state.json does not break the list; the job is LOST, with ids that can be computed."""
    job_id = put(local, 1)
    before = local.service.status(job_id)
    (local.directory(job_id) / "state.json").write_bytes(b"")
    (local.directory(job_id) / "job.json").write_bytes(b"\0\0\0")
    local.service = LocalService(state_dir=local.state_dir)
    after = local.service.status(job_id)
    assert (after.state, after.trace_id) == (JobState.LOST, before.trace_id)
    assert listed(local) == [[job_id]]


def test_a_state_dir_that_is_a_file(tmp_path):
    """What the file system says is told as an error of the service."""
    (tmp_path / "file").touch()
    service = LocalService(state_dir=tmp_path / "file")
    with pytest.raises(ServiceUnavailableError, match="cannot be used now"):
        anyio.run(lambda: service.submit(["true"]))


def test_a_process_that_is_not_the_supervisor_is_not_signalled(local):
    """On a shared directory a process id means something else on each machine: an error, and no stranger is killed."""
    job_id = local.start("sleep", "600")
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        state = local.state(job_id)
        path = local.directory(job_id) / "state.json"
        path.write_text(json.dumps({**state, "supervisor_pid": stranger.pid}))
        with pytest.raises(RequestRejectedError, match="in another machine or container: cancel it there"):
            local.cancel(job_id)
        assert stranger.poll() is None
        assert local.service.status(job_id).state is JobState.RUNNING
        path.write_text(json.dumps(state))
        assert local.cancel(job_id).state is JobState.CANCELED
    finally:
        stranger.kill()
        stranger.wait()


def test_options_come_from_the_configuration(tmp_path):
    """`from_options` takes the three keys, and names those that it does not know."""
    settings = Settings(services={"mine": {"type": "local", "state_dir": str(tmp_path), "keep_finished": "1h"}})
    service = open_service("mine", settings)
    assert isinstance(service, LocalService)
    assert (service.name, service.state_dir) == ("mine", tmp_path)
    with pytest.raises(ConfigError, match=r"services\.local\.kept") as caught:
        LocalService.from_options("local", {"type": "local", "kept": 1}, settings)
    assert caught.value.key == "services.local.kept"
    with pytest.raises(ConfigError):
        LocalService.from_options("local", {"keep_finished": "soon"}, settings)
    with pytest.raises(ConfigError, match="use at least 1h"):
        LocalService.from_options("local", {"keep_finished": "59m"}, settings)


def test_the_default_directory_is_the_platforms(monkeypatch, tmp_path):
    """Without `state_dir`, jobs are where this platform keeps state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    service = LocalService.from_options("local", {}, Settings())
    assert service.state_dir == tmp_path / "tailspan"


def test_windows_is_told_clearly(monkeypatch, tmp_path):
    """The local service does not pretend to work there."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="local jobs need Linux or macOS"):
        LocalService(state_dir=tmp_path)


def test_a_running_job_is_listed_as_it_is_now(local, tmp_path):
    """Rows of running jobs are kept between two lists; a new line and the end are seen all the same."""
    wait = "while [ ! -e {0} ]; do sleep 0.01; done; "
    script = "echo one; " + wait.format(tmp_path / "go") + "echo two; " + wait.format(tmp_path / "stop")
    local.start("sh", "-c", script)

    def row():
        async def read():
            return [(row.state, row.lines) async for rows in local.service.list_jobs() for row in rows]

        return anyio.run(read)[0]

    until(lambda: row() == (JobState.RUNNING, 1))
    (tmp_path / "go").touch()
    until(lambda: row() == (JobState.RUNNING, 2))
    (tmp_path / "stop").touch()
    until(lambda: row() == (JobState.SUCCEEDED, 2))


def test_a_store_that_is_moved_away_has_not_lost_its_jobs(local):
    """An unmounted volume is a service that cannot be reached; a job that was deleted is one that is gone."""
    job_id = local.run("true").job_id
    jobs = local.state_dir / "jobs"
    jobs.rename(local.state_dir / "elsewhere")

    async def rows():
        return [row async for page in local.service.list_jobs() for row in page]

    for ask in (lambda: local.service.status(job_id), lambda: anyio.run(rows), lambda: local.lines(job_id)):
        with pytest.raises(ServiceUnavailableError, match="moved away"):
            ask()
    (local.state_dir / "elsewhere").rename(jobs)
    assert local.service.status(job_id).state is JobState.SUCCEEDED
    (jobs / job_id).rename(local.state_dir / "gone")
    with pytest.raises(JobNotFoundError):
        local.service.status(job_id)
