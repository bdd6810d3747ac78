"""Faults of the agent's disk: full, read-only, a damaged store, one of a newer version, one that another agent holds.

A disk is full in two ways: no file of the agent may grow any more (anybody can bring that about), or it is a small file
system of its own, for which a row is run in a mount namespace (see `boxed`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import resource
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from tailspan_agent.checkpoint.store import Checkpoint
from tailspan_agent.errors import CheckpointError
from tests.fakes.collector import Reply
from tests.fakes.local_jobs import until
from tests.prove.jobs import Job, NumberedJob
from tests.prove.scenarios import Scenario
from tests.prove.steered_jobs import steered_job
from tests.prove.table import Row
from tests.prove.world import TAILSPAN, Settings, World

ROOT = Path(__file__).parents[2]
LINES, PAD = 200, 200
_ROOM_BYTES = 16 * 1024
_SMALL_BYTES = 2 << 20
_LONG_S = 120.0
_REFUSES_S = 20.0


class Disk(Protocol):
    """The disk below an agent."""

    def below(self, world: World) -> contextlib.AbstractContextManager[None]:
        """Put it below a world's agent."""

    def fill(self, world: World) -> None:
        """Leave no room to the agent that runs."""

    def free(self, world: World) -> None:
        """Make room."""


class SizeLimit:
    """A disk where no file grows past a few bytes: the log of the agent has room there, its store has not."""

    @contextlib.contextmanager
    def below(self, world: World) -> Iterator[None]:
        """See `Disk`."""
        yield

    def fill(self, world: World) -> None:
        """See `Disk`."""
        self._limit(world, _ROOM_BYTES)

    def free(self, world: World) -> None:
        """See `Disk`."""
        self._limit(world, None)

    def _limit(self, world: World, size: int | None) -> None:
        if world.agent is not None and world.agent.poll() is None:
            _, most = resource.prlimit(world.agent.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(world.agent.pid, resource.RLIMIT_FSIZE, (most if size is None else size, most))


class SmallFilesystem:
    """A file system in memory, which is full when it is full. Only in a mount namespace of one's own."""

    @contextlib.contextmanager
    def below(self, world: World) -> Iterator[None]:
        """See `Disk`."""
        world.state_dir.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={_SMALL_BYTES},mode=700", "none", world.state_dir)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", world.state_dir], check=True)

    def fill(self, world: World) -> None:
        """See `Disk`."""
        with (world.state_dir / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(b"x" * 512)

    def free(self, world: World) -> None:
        """See `Disk`."""
        (world.state_dir / "ballast").unlink()


def full_while_relaying(seed: str, disk: Disk, *, ending: bool = True) -> Row:
    """The disk is full for a while: what was sent is not acked, is not sent again either, and nothing is skipped."""
    row = Row("")
    with World(seed, Settings(page=True)) as world, disk.below(world):
        jobs = [_fused_job(world, f"fused-{number}") for number in range(3)]
        local = steered_job(world, "local")
        _speak(world, jobs)
        local.put(LINES)
        world.configure()
        world.start(strict=True)
        _all_acked(world)
        disk.fill(world)
        _speak(world, jobs)
        local.put(LINES)
        _speak_until_it_is_said(world, jobs)
        world.until(lambda: _ready(world) == 503, "/readyz to fail")
        if ending:
            jobs[0].end()
            local.end()
            late = _fused_job(world, "begun-on-a-full-disk")
            late.write(LINES, world.random)
            world.until(
                lambda: "service fused: cannot write the checkpoint store" in world.log, "a poll of the new job"
            )
        _speak(world, jobs[1:])
        disk.free(world)
        world.until(lambda: _ready(world) == 200, "/readyz to succeed")
        if ending:
            world.until(lambda: world.checkpoint(late), "the new job")
        row.found.append(world.finish(_LONG_S))
    return row


def full_at_start(seed: str, disk: Disk) -> Row:
    """With a full disk the first agent cannot make its store and refuses to start; one that has a store may wait."""
    row = Row("")
    with World(seed) as world, disk.below(world):
        jobs = [_fused_job(world, f"fused-{number}") for number in range(2)]
        _speak(world, jobs)
        world.configure()
        _start_full(world, disk)
        _expect_refusal(row, world, "cannot ")
        disk.free(world)
        world.start(strict=True)
        _all_acked(world)
        disk.fill(world)
        _speak(world, jobs)
        _speak_until_it_is_said(world, jobs)
        world.kill()
        world.ended()
        said = len(world.log)
        _start_full(world, disk)
        agent = world.agent
        assert agent is not None
        until(lambda: agent.poll() is not None or "waiting until the disk is usable" in world.log[said:])
        _speak(world, jobs)
        disk.free(world)
        if agent.poll() is not None:
            _expect_refusal(row, world, "cannot ")
            world.start(strict=True)
        row.found.append(world.finish())
    return row


def dead_letter_full(seed: str, disk: Disk, *, patient: bool = True) -> Row:
    """What the endpoint refuses does not fit into the dead letter: it is not acked, and is there when there is room.

    Args:
        seed: Of the world.
        disk: The disk.
        patient: Whether to wait for the next retry, up to a minute; otherwise the agent is killed.
    """
    row = Row("")
    with World(seed, Settings(page=True)) as world, disk.below(world):
        jobs = [_fused_job(world, f"fused-{number}") for number in range(2)]
        world.collector.always("logs", Reply(400, message="no"))
        _speak(world, jobs, times=4)
        world.configure()
        world.start()
        world.until(lambda: all(map(world.checkpoint, jobs)), "the first checkpoints")
        disk.fill(world)
        _speak(world, jobs, times=4)
        world.until(lambda: "export of logs paused: the dead letter" in world.log, "word of the full disk")
        world.until(lambda: _ready(world) == 503, "/readyz to fail")
        disk.free(world)
        if not patient:
            world.kill()
            world.ended()
            world.start()
        found = world.finish(_LONG_S)
        row.found.append(found)
        least = sum(job.written for job in jobs)
        _expect(row, found.dead_lettered >= least, f"{found.dead_lettered} of {least} refused lines are kept")
    return row


def files_full(seed: str, disk: Disk) -> Row:
    """Without an endpoint the files are on a full disk for a while: what a replay sends of them is complete."""
    row = Row("")
    with World(seed) as world, disk.below(world):
        jobs = [_fused_job(world, f"fused-{number}") for number in range(2)]
        _speak(world, jobs)
        world.configure()
        config = world.home / "config.toml"
        keys = config.read_text().splitlines()
        config.write_text("\n".join(key for key in keys if not key.startswith(("endpoint", "protocol"))))
        world.start(strict=True)
        _all_acked(world)
        disk.fill(world)
        _speak(world, jobs, times=4)
        world.until(lambda: "cannot write" in world.log, "word of the full disk")
        disk.free(world)
        world.finish()
        kept = sorted(path for path in world.state_dir.rglob("*.jsonl") if path.parent.name != "dead-letter")
        command = [TAILSPAN, "agent", "replay", *map(str, kept), "--config", config]
        replay = subprocess.run([*command, "--endpoint", world.collector.http_url], capture_output=True, text=True)
        _expect(row, replay.returncode == 0, f"replay ends with {replay.returncode}: {replay.stdout}{replay.stderr}")
        row.found.append(world.count(exit_code=replay.returncode))
    return row


def held_by_another(seed: str, tries: int = 3) -> Row:
    """A second agent on one directory refuses to start and says who holds it; one that was killed holds nothing.

    Args:
        seed: Of the world.
        tries: How often a second one is started.
    """
    row = Row("")
    with World(seed) as world:
        job = _fused_job(world, "fused")
        _speak(world, [job])
        world.configure()
        world.start(strict=True)
        _all_acked(world)
        assert world.agent is not None
        command = [TAILSPAN, "agent", "run", "--config", str(world.home / "config.toml")]
        for _ in range(tries):
            _speak(world, [job])
            second = subprocess.run(command, capture_output=True, text=True, cwd=world.home)
            _expect(row, second.returncode == 2, f"the second agent ends with {second.returncode}")
            holder = f"in use by agent pid {world.agent.pid} "
            _expect(row, holder in second.stderr, f"it says who holds the directory: {second.stderr}")
        _all_acked(world)
        world.kill()
        world.ended()
        _speak(world, [job])
        world.start(strict=True)
        row.found.append(world.finish())
    return row


def newer_version(seed: str) -> Row:
    """A store of a newer version is refused and left as it is, byte for byte; the right version goes on with it."""
    row = Row("")
    with World(seed) as world:
        job = _fused_job(world, "fused")
        _speak(world, [job])
        world.configure()
        world.start(strict=True)
        _all_acked(world)
        world.kill()
        world.ended()
        version = _set_version(world, lambda version: version + 1)
        before = _contents(world)
        world.start()
        _expect_refusal(row, world, "of a newer Tailspan")
        _expect(row, _contents(world) == before, "the store of a newer version is untouched")
        _set_version(world, lambda _: version)
        _speak(world, [job])
        world.start(strict=True)
        row.found.append(world.finish())
    return row


class DamagedWorld(World):
    """A world whose store is damaged: nothing is known of it, and everything may come again."""

    def checkpoint(self, job: Job, state_dir: Path | None = None) -> Checkpoint | None:
        """Return what the store has of a job, if it can be read."""
        try:
            return super().checkpoint(job, state_dir)
        except CheckpointError:
            return None

    def start(self, *, strict: bool = False) -> None:
        """Start the agent."""
        super().start(strict=strict)
        for job in self.jobs:
            job.restarted(0, strict=False)


def store_truncated(seed: str, cuts: int) -> Row:
    """The agent is killed and its store cut off, again and again: it heals, says so, and reads what was written since.

    Args:
        seed: Of the world.
        cuts: How often: first at the borders of the format, then at any byte.
    """
    row = Row("")
    healed = 0
    with DamagedWorld(seed) as world:
        over, running = _fused_job(world, "over"), _fused_job(world, "running")
        local = steered_job(world, "local")
        _speak(world, [over, running])
        over.end()
        world.configure()
        world.start()
        _all_acked(world)
        for path, size in _cuts(world, cuts):
            world.kill()
            world.ended()
            said = len(world.log)
            running.write(20, world.random)
            local.put(20)
            if path.exists():
                os.truncate(path, min(size, path.stat().st_size))
            world.start()
            _all_acked(world)
            healed += "the checkpoint store was damaged" in world.log[said:]
        found = world.finish()
    # Only the store knew when a job was first seen, and `submitted` begins there if its service does not report it.
    other, found.spans.other_bytes = found.spans.other_bytes, 0
    row.found.append(found)
    row.notes.append(f"{cuts} cuts, {healed} of them reported as damage; {other} spans that were made again differ")
    _expect(row, healed > 0, "damage is reported")
    return row


def read_only(seed: str) -> Row:
    """The agent's directory is read-only at its start, later only its dead letter is; in a namespace of one's own."""
    row = Row("")
    with World(seed) as world:
        jobs = [_fused_job(world, f"fused-{number}") for number in range(2)]
        world.collector.always("logs", Reply(400, message="no"))
        _speak(world, jobs)
        world.configure()
        world.state_dir.mkdir()
        with _read_only(world.state_dir):
            world.start()
            _expect_refusal(row, world, "cannot use agent.state_dir")
        dead_letter = world.state_dir / "dead-letter"
        dead_letter.mkdir(mode=0o700)
        with _read_only(dead_letter):
            world.start()
            world.until(lambda: "export of logs paused: the dead letter" in world.log, "word of the read-only disk")
        found = world.finish(_LONG_S)
        row.found.append(found)
        _expect(row, found.dead_lettered >= 2 * LINES, "the refused lines are kept")
    return row


BOXED: dict[str, Callable[[str], Row]] = {
    "full (small file system)": partial(full_while_relaying, disk=SmallFilesystem()),
    "full at start (small file system)": partial(full_at_start, disk=SmallFilesystem()),
    "dead letter full (small file system)": partial(dead_letter_full, disk=SmallFilesystem()),
    "OTLP files full (small file system)": partial(files_full, disk=SmallFilesystem()),
    "read-only": read_only,
}


def can_mount() -> bool:
    """Whether this machine lets us mount something in a namespace of our own."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def boxed(seed: str, name: str) -> Row:
    """Run one of `BOXED` in a user and mount namespace of its own, which needs no privilege where it is allowed."""
    if not can_mount():
        return Row("", notes=["NOT RUN: this machine does not allow users to mount file systems (unshare -rm)"])
    command = ["unshare", "-rm", sys.executable, "-m", "tests.prove.faults_disk", name, seed]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT)
    if done.returncode:
        return Row("", problems=[f"the row ended with {done.returncode}; see above"])
    row: Row = pickle.loads(done.stdout)
    return row


def scenarios() -> list[Scenario]:
    """Return the rows."""
    limit = SizeLimit()
    rows: dict[str, Callable[[str], Row]] = {
        "full": partial(full_while_relaying, disk=limit),
        "full at start": partial(full_at_start, disk=limit),
        "dead letter full": partial(dead_letter_full, disk=limit),
        "OTLP files full": partial(files_full, disk=limit),
        **{name: partial(boxed, name=name) for name in BOXED},
        "store held by another agent": held_by_another,
        "store of a newer version": newer_version,
        "store cut off at any byte": partial(store_truncated, cuts=60),
    }
    return [Scenario(f"disk: {name}", run) for name, run in rows.items()]


def _fused_job(world: World, name: str) -> NumberedJob:
    """Add a job of now: of old ones that have ended an agent that knows nothing reads nothing (`lookback`)."""
    job = world.fused_job(name)
    job.fake.row["creation_date"] = datetime.now(UTC).isoformat()
    return job


def _start_full(world: World, disk: Disk) -> None:
    # One kind of disk can be filled before, the other only for a process: at once, it has to import its modules first.
    disk.fill(world)
    world.start()
    disk.fill(world)


def _speak(world: World, jobs: Sequence[NumberedJob], times: int = 1) -> None:
    for job in jobs:
        job.write(LINES * times, world.random, pad=PAD)


def _speak_until_it_is_said(world: World, jobs: Sequence[NumberedJob]) -> None:
    """Write lines until the agent says that the disk is full: its store uses the room again that it had before."""
    world.until(lambda: "waiting until the disk is usable" in world.log or _speak(world, jobs), "word of the full disk")


def _all_acked(world: World) -> None:
    for job in world.jobs:
        world.until(lambda job=job: world.acked(job) >= job.written, f"{job.written} lines of {job.name}")


def _ready(world: World) -> int | None:
    try:
        with urllib.request.urlopen(f"{world.page_url}/readyz", timeout=10) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _expect(row: Row, holds: bool, what: str) -> None:
    if not holds:
        row.problems.append(f"not so: {what}")


def _expect_refusal(row: Row, world: World, words: str) -> None:
    assert world.agent is not None
    patience = world.patience(_REFUSES_S)
    while world.agent.poll() is None:
        if patience.is_over():
            world.kill()
        time.sleep(0.02)
    code = world.ended()
    last = world.log.splitlines()[-1:] or [""]
    _expect(row, code == 2, f"the agent refuses to start with exit code 2, not {code}")
    _expect(row, words in last[0], f"its last word is about {words!r}: {last[0]!r}")


def _set_version(world: World, change: Callable[[int], int]) -> int:
    with closing(sqlite3.connect(world.database)) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        db.execute(f"PRAGMA user_version = {change(version)}")
    return version


def _contents(world: World) -> dict[str, str]:
    # The third file is SQLite's index of the second one: even reading a store creates it.
    paths = (world.database, Path(f"{world.database}-wal"))
    return {path.name: hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest() for path in paths}


def _cuts(world: World, count: int) -> Iterator[tuple[Path, int]]:
    """Yield where to cut what: the store's size is taken when it is asked for."""
    log = Path(f"{world.database}-wal")
    borders = [(world.database, size) for size in (0, 4096, 1, 99, 100, 511, 512, 4095, 16, 5000)]
    borders += [(log, size) for size in (32, 0, 31, 56, 32 + 24 + 4096, 5000)]
    for number in range(count):
        if number < len(borders):
            yield borders[number]
        else:
            path = world.random.choice((world.database, log))
            yield path, world.random.randrange(path.stat().st_size) if path.exists() else 0


@contextlib.contextmanager
def _read_only(directory: Path) -> Iterator[None]:
    _mount("--bind", directory, directory)
    _mount("-o", "remount,bind,ro", directory)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    # What the row prints goes elsewhere: standard output is the row itself.
    result, sys.stdout = sys.stdout.buffer, sys.stderr
    result.write(pickle.dumps(BOXED[sys.argv[1]](sys.argv[2])))
