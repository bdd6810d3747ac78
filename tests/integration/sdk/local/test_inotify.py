"""Word from the kernel of what happens to local jobs: nothing that happens is missed, and limits are told."""

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

from tailspan.errors import ServiceUnavailableError
from tailspan.local import inotify as local_changes
from tailspan.local.inotify import InotifyChanges
from tailspan.local.store import JobStore, new_job_id
from tailspan.models import JobState
from tests.fakes.local_jobs import LocalJobs

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no inotify: jobs are polled"),
]
PATIENCE_S = 30.0


@pytest.fixture
def anyio_backend() -> str:
    """News are heard in an asyncio loop, as by the agent."""
    return "asyncio"


async def heard(news: InotifyChanges, job_id: str) -> None:
    """Return once there are news of the job."""
    with anyio.fail_after(PATIENCE_S):
        while job_id not in (await news.wait() or ()):
            pass


async def test_a_job_tells_of_its_start_its_lines_and_its_end(tmp_path: Path) -> None:
    """A new job appears; a followed one tells of each line and of its end; one that is left is silent."""
    os.mkfifo(tmp_path / "pipe")
    with LocalJobs(tmp_path) as jobs:
        assert jobs.service.identity
        jobs.run("true")
        news = jobs.service.open_changes()
        assert news is not None
        job_id = jobs.start("cat", str(tmp_path / "pipe"))
        await heard(news, job_id)
        assert news.follow(job_id)
        with (tmp_path / "pipe").open("wb", 0) as pipe:
            for number in range(1, 3):
                pipe.write(b"line\n")
                with anyio.fail_after(PATIENCE_S):
                    while len([line async for page in jobs.service.read_logs(job_id) for line in page.lines]) < number:
                        await heard(news, job_id)
        with anyio.fail_after(PATIENCE_S):
            while not (await jobs.service.get_job(job_id)).logs_complete:
                await heard(news, job_id)
        news.leave(job_id)
        news.leave(job_id)
        jobs.service.prune(0)
        with anyio.move_on_after(0.05) as waiting:
            await news.wait()
        assert waiting.cancelled_caught
        news.close()


async def test_the_death_of_a_supervisor_is_told(tmp_path: Path) -> None:
    """Nobody writes that a job is lost; but its lock is closed."""
    with LocalJobs(tmp_path) as jobs:
        job_id = jobs.start("sleep", "100")
        news = jobs.service.open_changes()
        assert news is not None
        assert news.follow(job_id)
        os.kill(jobs.state(job_id)["supervisor_pid"], signal.SIGKILL)
        with anyio.fail_after(PATIENCE_S):
            while (await jobs.service.get_job(job_id)).state is not JobState.LOST:
                await heard(news, job_id)
        news.close()


class Held:
    """The files of one job that runs, as far as they say, and news of it."""

    def __init__(self, directory: Path) -> None:
        store = JobStore(directory)
        self.job_id = new_job_id(0)
        self._lock_fd = store.create(self.job_id, {})
        self.directory = store.directory(self.job_id)
        found = local_changes.open_local_news(store.jobs)
        assert found is not None
        self.news = found

    def close(self) -> None:
        """Close what is open."""
        os.close(self._lock_fd)
        self.news.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """See `Held`."""
    found = Held(tmp_path)
    yield found
    found.close()


async def test_more_news_than_the_kernel_keeps(held: Held) -> None:
    """Then every job may have news, and says so."""
    assert held.news.follow(held.job_id)
    most = int((local_changes._LIMITS / "max_queued_events").read_text())
    with (held.directory / "log").open("ab", 0) as log, (held.directory / "log.idx").open("ab", 0) as index:
        for _ in range(most):
            log.write(b".")
            index.write(b".")
    found: list[object] = []
    with anyio.fail_after(PATIENCE_S):
        while None not in found:
            found.append(await held.news.wait())
    assert held.news.follow(held.job_id), "and goes on"


async def test_text_without_its_entry_is_no_news(held: Held) -> None:
    """A line counts once the index has it; to look before would find nothing."""
    assert held.news.follow(held.job_id)
    (held.directory / "log").write_bytes(b"text")
    with anyio.move_on_after(0.05) as waiting:
        await held.news.wait()
    assert waiting.cancelled_caught


async def test_a_limit_of_the_kernel_is_told_once(
    held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that cannot be watched is polled, and the log says which limit to raise."""

    def full(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    local_changes._warn.cache_clear()
    monkeypatch.setattr(held.news, "_add", full)
    assert not held.news.follow(held.job_id)
    assert not held.news.follow(held.job_id)
    (record,) = caplog.records
    assert "raise fs.inotify.max_user_watches, which is " in record.getMessage()


async def test_a_job_that_is_gone_cannot_be_followed(held: Held) -> None:
    """It was pruned meanwhile; that is no limit."""
    assert not held.news.follow(new_job_id(1))


async def test_the_directory_is_taken_away(held: Held) -> None:
    """There will be no more news: whoever waits must know."""
    held.directory.parent.rename(held.directory.parent.with_name("elsewhere"))
    with anyio.fail_after(PATIENCE_S), pytest.raises(ServiceUnavailableError, match="moved away"):
        await held.news.wait()


@pytest.mark.parametrize(("kind", "told"), [("ext4", True), ("nfs4", False), ("fuse.sshfs", False)])
async def test_other_machines_changes_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, told: bool
) -> None:
    """On a network's file system the kernel tells only of its own changes: there jobs are polled."""
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /data rw,noatime shared:1 - {kind} server:/ rw\n")
    monkeypatch.setattr(local_changes, "_MOUNTS", mounts)
    news = local_changes.open_local_news(tmp_path)
    assert (news is not None) == told
    if news is not None:
        news.close()


async def test_no_directory_no_news(tmp_path: Path) -> None:
    """Jobs that were never run make none."""
    assert local_changes.open_local_news(tmp_path / "jobs") is None


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
async def test_a_directory_that_cannot_be_looked_at_has_no_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A hanging mount, or one that was closed to us: whoever looks at its jobs says so, and news may come later."""

    def fail(*_: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "is_dir", fail)
    assert local_changes.open_local_news(tmp_path) is None
