"""`tailspan.local.inotify`: no change of a local job is missed, and a limit of the kernel is reported."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tailspan._polling import PollPause
from tailspan.client import AsyncJobClient
from tailspan.errors import ServiceUnavailableError
from tailspan.local import inotify as local_changes
from tailspan.local.inotify import InotifyChanges
from tailspan.local.store import JobStore, new_job_id
from tailspan.models import JobState
from tailspan.testing import FakeClock
from tests.fakes.local_jobs import LocalJobs

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no inotify: jobs are polled"),
]
PATIENCE_S = 30.0


@pytest.fixture
def anyio_backend() -> str:
    """The feed runs in an asyncio loop, as in the agent."""
    return "asyncio"


async def reported(feed: InotifyChanges, job_id: str) -> None:
    """Return once the job is reported."""
    with anyio.fail_after(PATIENCE_S):
        while job_id not in (await feed.wait() or ()):
            pass


async def test_start_lines_and_end_of_a_job_are_reported(tmp_path: Path) -> None:
    """A new job is reported, each line and the end of a followed one, and nothing of a job that was left."""
    os.mkfifo(tmp_path / "pipe")
    with LocalJobs(tmp_path) as jobs:
        assert jobs.service.identity
        jobs.run("true")
        feed = jobs.service.open_changes()
        assert feed is not None
        job_id = jobs.start("cat", str(tmp_path / "pipe"))
        await reported(feed, job_id)
        assert feed.follow(job_id)
        with (tmp_path / "pipe").open("wb", 0) as pipe:
            for number in range(1, 3):
                pipe.write(b"line\n")
                with anyio.fail_after(PATIENCE_S):
                    while len([line async for page in jobs.service.read_logs(job_id) for line in page.lines]) < number:
                        await reported(feed, job_id)
        with anyio.fail_after(PATIENCE_S):
            while not (await jobs.service.get_job(job_id)).logs_complete:
                await reported(feed, job_id)
        feed.leave(job_id)
        feed.leave(job_id)
        jobs.service.prune(0)
        with anyio.move_on_after(0.05) as waiting:
            await feed.wait()
        assert waiting.cancelled_caught
        feed.close()


async def test_reported_jobs_have_the_rows_of_the_list(tmp_path: Path) -> None:
    """Running and ended ones, newest first; a name that is no job has none."""
    with LocalJobs(tmp_path) as jobs:
        ids = [jobs.run("true").job_id, jobs.run("false").job_id, jobs.start("sleep", "60")]
        listed = [row async for rows in jobs.service.list_jobs() for row in rows]
        assert await jobs.service.rows([*ids, "../jobs", "no-job", ids[0].upper()]) == listed
        assert await jobs.service.rows(ids[1:2]) == [row for row in listed if row.job_id == ids[1]]


async def test_the_death_of_a_supervisor_is_reported(tmp_path: Path) -> None:
    """No file says that the job is lost, but its lock file is closed."""
    with LocalJobs(tmp_path) as jobs:
        job_id = jobs.start("sleep", "100")
        feed = jobs.service.open_changes()
        assert feed is not None
        assert feed.follow(job_id)
        os.kill(jobs.state(job_id)["supervisor_pid"], signal.SIGKILL)
        with anyio.fail_after(PATIENCE_S):
            while (await jobs.service.get_job(job_id)).state is not JobState.LOST:
                await reported(feed, job_id)
        feed.close()


class Held:
    """The files of one job that runs by its files, and its change feed."""

    def __init__(self, directory: Path) -> None:
        store = JobStore(directory)
        self.job_id = new_job_id(0)
        self._lock_fd = store.create(self.job_id, {})
        self.directory = store.directory(self.job_id)
        found = local_changes.open_local_changes(store.jobs)
        assert found is not None
        self.feed = found

    def close(self) -> None:
        """Close lock and feed."""
        os.close(self._lock_fd)
        self.feed.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """See `Held`."""
    found = Held(tmp_path)
    yield found
    found.close()


async def test_more_events_than_the_kernel_queues(held: Held) -> None:
    """Then the feed reports that every job may have changed."""
    assert held.feed.follow(held.job_id)
    most = int((local_changes._LIMITS / "max_queued_events").read_text())
    with (held.directory / "log").open("ab", 0) as log, (held.directory / "log.idx").open("ab", 0) as index:
        for _ in range(most):
            log.write(b".")
            index.write(b".")
    found: list[object] = []
    with anyio.fail_after(PATIENCE_S):
        while None not in found:
            found.append(await held.feed.wait())
    assert held.feed.follow(held.job_id), "and goes on"


async def test_text_without_its_entry_is_not_reported(held: Held) -> None:
    """A line counts once the index has it; a poll before that would find nothing."""
    assert held.feed.follow(held.job_id)
    (held.directory / "log").write_bytes(b"text")
    with anyio.move_on_after(0.05) as waiting:
        await held.feed.wait()
    assert waiting.cancelled_caught


async def test_a_limit_of_the_kernel_is_logged_once(
    held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that cannot be watched is polled, and the log says which limit to raise."""

    def full(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    local_changes._warn.cache_clear()
    monkeypatch.setattr(held.feed, "_add", full)
    assert not held.feed.follow(held.job_id)
    assert not held.feed.follow(held.job_id)
    (record,) = caplog.records
    assert "raise fs.inotify.max_user_watches (now " in record.getMessage()


async def test_a_job_that_is_gone_cannot_be_followed(held: Held) -> None:
    """It was pruned meanwhile; that is not a limit."""
    assert not held.feed.follow(new_job_id(1))


async def test_the_directory_is_moved_away(held: Held) -> None:
    """There will be no more events: waiting is an error."""
    held.directory.parent.rename(held.directory.parent.with_name("elsewhere"))
    with anyio.fail_after(PATIENCE_S), pytest.raises(ServiceUnavailableError, match="moved away"):
        await held.feed.wait()


@pytest.mark.parametrize(("kind", "has_feed"), [("ext4", True), ("nfs4", False), ("fuse.sshfs", False)])
async def test_a_network_file_system_has_no_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, has_feed: bool
) -> None:
    """There the kernel reports only its own changes: jobs are polled."""
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /data rw,noatime shared:1 - {kind} server:/ rw\n")
    monkeypatch.setattr(local_changes, "_MOUNTS", mounts)
    feed = local_changes.open_local_changes(tmp_path)
    assert (feed is not None) == has_feed
    if feed is not None:
        feed.close()


async def test_no_directory_no_feed(tmp_path: Path) -> None:
    """No job has run yet."""
    assert local_changes.open_local_changes(tmp_path / "jobs") is None


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
async def test_an_unreadable_directory_has_no_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A hanging mount, or missing permission: a poll of the jobs reports it, and a feed may open later."""

    def fail(*_: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "is_dir", fail)
    assert local_changes.open_local_changes(tmp_path) is None


async def test_waiting_for_a_job_ends_with_it(tmp_path: Path) -> None:
    """The kernel reports the end: the poll interval does not matter."""
    os.mkfifo(tmp_path / "pipe")
    with LocalJobs(tmp_path) as jobs:
        job_id = jobs.start("cat", str(tmp_path / "pipe"))
        seen: list[JobState] = []
        async with AsyncJobClient(service=jobs.service) as client, anyio.create_task_group() as group:

            async def end_it() -> None:
                while len(seen) < 2:
                    await anyio.sleep(0.01)
                (tmp_path / "pipe").open("wb").close()

            group.start_soon(end_it)
            with anyio.fail_after(PATIENCE_S):
                status = await client.wait_for_job(job_id, 3600, on_status=lambda one: seen.append(one.state))
        assert status.state is JobState.SUCCEEDED


async def test_waiting_without_reports_polls_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel reports nothing, or a feed breaks, local jobs are polled more often than that."""
    with LocalJobs(tmp_path) as jobs:
        clock = FakeClock()
        for feed in (None, BrokenFeed()):
            job_id = jobs.start("sleep", "60")
            monkeypatch.setattr(jobs.service, "open_changes", lambda feed=feed: feed)
            pause = PollPause(jobs.service, job_id, clock)
            before_s = clock.monotonic_s()
            for _ in range(4):
                await pause.wait(5)
            assert clock.monotonic_s() - before_s <= 6
            await jobs.service.cancel(job_id)


class BrokenFeed:
    """A feed that ends at once."""

    def follow(self, job_id: str) -> bool:
        """Follow."""
        return True

    def leave(self, job_id: str) -> None:
        """Leave."""

    async def wait(self) -> None:
        """Raise."""
        raise ServiceUnavailableError("gone")

    def close(self) -> None:
        """Close."""
