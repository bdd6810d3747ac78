"""A reader with more rights than a store's owner is not led out of the store, nor told of a supervisor that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from tailspan.errors import ServiceError, TailspanError
from tailspan.local.state_dir import WRITE_LOCKED, new_job_id
from tailspan.local.store import JobStore
from tailspan.models import JobState
from tailspan.services.local import LocalService

SECRET = "of another user"
OURS = "our line"


def made(store: JobStore, log: str, name: str) -> tuple[str, int]:
    """Make a job with one line; return its id and its lock, which is held."""
    job_id = new_job_id(1_700_000_000_000_000_000)
    lock_fd = store.create(job_id, {"name": name, "command": [name]})
    (store.directory(job_id) / "log").write_text(f"{log}\n")
    (store.directory(job_id) / "state.json").write_text(f'{{"state": "RUNNING", "name": "{name}"}}')
    return job_id, lock_fd


async def said_of(service: LocalService, job_id: str) -> str:
    """Return all that the service says of a job: row, status and lines, or the errors."""
    said = []

    async def lines() -> list[str]:
        async with aclosing(service.read_logs(job_id)) as pages:
            return [str(list(page.messages())) async for page in pages]

    async def rows() -> list[str]:
        async with aclosing(service.list_jobs()) as pages:
            return [str(page) async for page in pages]

    async def status() -> list[str]:
        return [str(await service.get_job(job_id))]

    for ask in (rows, status, lines):
        try:
            said += await ask()
        except TailspanError as error:
            said.append(f"{type(error).__name__}: {error}")
    return "\n".join(said)


def test_no_time_of_a_file_hides_the_jobs(tmp_path: Path) -> None:
    """Its owner can set any: also one after 2262, whose nanoseconds a signed number of 64 bits does not hold."""
    store = JobStore(tmp_path)
    job_id, lock_fd = made(store, OURS, OURS)
    index = store.directory(job_id) / "log.idx"
    index.touch()
    for time_s in (-(1 << 31), 13_569_465_600):
        os.utime(index, (time_s, time_s))
        assert f"job_id='{job_id}'" in asyncio.run(said_of(LocalService("local", state_dir=tmp_path), job_id))
    os.close(lock_fd)


@pytest.fixture
def other(tmp_path: Path) -> tuple[Path, str]:
    """A store of another user, with a job; its directory and the job's id."""
    store = JobStore(tmp_path / "other")
    job_id, lock_fd = made(store, SECRET, SECRET)
    os.close(lock_fd)
    return store.state_dir, job_id


def jobs_as_link(store: Path, other: Path, job_id: str) -> None:
    (store / "jobs").symlink_to(other / "jobs")


def job_as_link(store: Path, other: Path, job_id: str) -> None:
    (store / "jobs").mkdir()
    (store / "jobs" / job_id).symlink_to(other / "jobs" / job_id)


def files_as_links(store: Path, other: Path, job_id: str) -> None:
    (store / "jobs" / job_id).mkdir(parents=True)
    for name in ("job.json", "state.json", "log", "log.idx", "lock"):
        (store / "jobs" / job_id / name).symlink_to(other / "jobs" / job_id / name)


@pytest.mark.parametrize("lead", [jobs_as_link, job_as_link, files_as_links])
def test_no_link_leads_a_reader_elsewhere(
    tmp_path: Path, other: tuple[Path, str], lead: Callable[[Path, Path, str], None]
) -> None:
    """Whatever in a store is a link, nothing behind it is shown, and a cancel writes nothing there."""
    store = tmp_path / "store"
    store.mkdir()
    lead(store, *other)
    service = LocalService("local", state_dir=store)
    assert SECRET not in asyncio.run(said_of(service, other[1]))
    with contextlib.suppress(ServiceError):
        asyncio.run(service.cancel(other[1]))
    assert not (other[0] / "jobs" / other[1] / "cancel").exists()


def test_a_mark_to_cancel_is_not_made_through_a_link(tmp_path: Path) -> None:
    """An owner who has put a link there would let root make a file anywhere."""
    store = JobStore(tmp_path / "store")
    job_id, lock_fd = made(store, OURS, OURS)
    os.close(lock_fd)
    (store.directory(job_id) / "cancel").symlink_to(tmp_path / "made-by-root")
    store.mark_canceled(job_id)
    assert not (tmp_path / "made-by-root").exists()


def test_no_job_is_made_behind_a_link(tmp_path: Path, other: tuple[Path, str]) -> None:
    """A job of root in a store of another user stays in that store."""
    store = tmp_path / "store"
    store.mkdir()
    jobs_as_link(store, *other)
    with pytest.raises(OSError, match="a link instead of a directory"):
        JobStore(store).create("20260101-000000000-aaaaaa", {})
    assert len(list((other[0] / "jobs").iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_a_directory_that_is_swapped_for_a_link_while_it_is_read(tmp_path: Path, other: tuple[Path, str]) -> None:
    """Of reads during which the owner exchanges a job for a link again and again, none shows what is behind it."""
    store = JobStore(tmp_path / "store")
    job_id, lock_fd = made(store, OURS, OURS)
    os.close(lock_fd)
    job, link = store.directory(job_id), store.jobs / ".link"
    link.symlink_to(other[0] / "jobs" / other[1])
    exchange = ctypes.CDLL(None, use_errno=True).renameat2
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            exchange(-100, os.fsencode(job), -100, os.fsencode(link), 2)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        said = [asyncio.run(said_of(LocalService("local", state_dir=store.state_dir), job_id)) for _ in range(100)]
    finally:
        stop.set()
        swapping.join()
    assert not [text for text in said if SECRET in text]
    assert any(OURS in text for text in said)


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_reader_that_locks_does_not_keep_a_lost_job_running(tmp_path: Path, kind: int) -> None:
    """Who may read the lock file can lock it too, but not as a supervisor does."""
    store = JobStore(tmp_path)
    job_id, lock_fd = made(store, OURS, OURS)
    if (store.directory(job_id) / "lock").read_bytes() != WRITE_LOCKED:
        pytest.skip("this system has no locks for writers only")
    assert store.load(job_id).state is JobState.RUNNING
    with store.opened(job_id) as fd:
        assert store.running_mark_at(fd) is not None
    os.close(lock_fd)
    with (store.directory(job_id) / "lock").open("rb") as reader:
        fcntl.flock(reader, kind)
        assert store.load(job_id).state is JobState.LOST
        with store.opened(job_id) as fd:
            assert store.running_mark_at(fd) is None


def test_a_supervisor_of_an_earlier_version_is_still_seen(tmp_path: Path) -> None:
    """Its lock file is empty, and its lock is one of flock."""
    store = JobStore(tmp_path)
    job_id, lock_fd = made(store, OURS, OURS)
    os.close(lock_fd)
    with (store.directory(job_id) / "lock").open("wb") as supervisor:
        fcntl.flock(supervisor, fcntl.LOCK_EX)
        assert store.load(job_id).state is JobState.RUNNING
    assert store.load(job_id).state is JobState.LOST
