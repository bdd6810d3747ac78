"""Faults of jobs on this machine. Steps of the clock are not among them: tests may not set this machine's clock.

Each fault is a generator with three halts, and goes on when its world has come so far:

    1  its jobs run, and the agent is not started yet
    2  the agent follows them, and has them relayed up to here
    3  the agent was killed

So each of them happens also across a restart. Several faults can share a world, and do in the short form.
"""

from __future__ import annotations

import os
import re
import resource
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tailspan.local.index import ENTRY_BYTES, HEADER_BYTES
from tailspan.models import JobState
from tests.fakes.local_jobs import until
from tests.prove.scenarios import Scenario
from tests.prove.steered_jobs import SteeredJob, steered_job
from tests.prove.table import Row
from tests.prove.world import Settings, World

Fault = Callable[[World, Row], Iterator[None]]

FEW, MANY = 120, 6_000


def supervisor_killed(world: World, row: Row) -> Iterator[None]:
    """One supervisor is killed under the agent's eyes, one while the agent is dead: what they captured is relayed."""
    one, other = steered_job(world, "bereft"), steered_job(world, "bereft-unseen")
    one.put(FEW)
    other.put(FEW)
    yield
    _relayed(world, one)
    one.send(f"write({MANY})")
    until(lambda: len(one.captured) > FEW)
    one.kill()
    yield
    other.send(f"write({MANY})")
    until(lambda: len(other.captured) > FEW)
    other.kill()
    yield
    _expect(row, [job.status.state for job in (one, other)] == [JobState.LOST] * 2, "a job without supervisor is LOST")


def rebooted(world: World, row: Row) -> Iterator[None]:
    """The agent was killed, then all processes of jobs; of one job the index lacks its last bytes: power went."""
    jobs = [steered_job(world, f"rebooted-{number}") for number in range(3)]
    for job in jobs:
        job.put(FEW)
    yield
    for job in jobs:
        job.put(FEW)
        _relayed(world, job)
        job.send(f"write({MANY})")
    yield
    for job in jobs:
        job.kill(command_too=True)
    index = jobs[0].directory / "log.idx"
    os.truncate(index, index.stat().st_size - 7)
    # The lines of its last entry have the time of the log now, another one than if they had come before.
    jobs[0].tally.has_stable_times = False
    jobs.append(steered_job(world, "after-reboot"))
    jobs[-1].put(FEW)
    yield
    _expect(row, [job.status.state for job in jobs[:3]] == [JobState.LOST] * 3, "a job of before the reboot is LOST")


def log_truncated(world: World, row: Row) -> Iterator[None]:
    """The log of a running job is emptied: first what was relayed, then also lines that were not read yet."""
    job = steered_job(world, "emptied")
    job.put(FEW)
    yield
    _relayed(world, job)
    os.truncate(job.directory / "log", 0)
    job.put(FEW)
    _relayed(world, job)
    yield
    first = job.written
    job.put(FEW)
    os.truncate(job.directory / "log", 0)
    job.destroyed(first, job.written)
    job.put(FEW)
    yield
    _relayed(world, job)
    _expect(row, _reported_gaps(world, job) == 1, f"one gap is reported, not {_reported_gaps(world, job)}")
    _expect(row, gaps(world) >= 1, "the gap is counted")
    job.put(FEW)


def log_removed(world: World, row: Row) -> Iterator[None]:
    """The log of a running job is removed: lines that were not read by then are a gap, and the job's end is relayed."""
    job = steered_job(world, "removed")
    job.put(FEW)
    yield
    _relayed(world, job)
    (job.directory / "log").unlink()
    first = job.written
    job.do(f"write({FEW})")
    yield
    job.destroyed(first, job.written)
    yield
    world.until(lambda: gaps(world), "the gap in the metrics")


def index_damaged(world: World, row: Row) -> Iterator[None]:
    """The index of one running job is emptied, of another an entry is damaged: lines come, at the end if not before."""
    emptied, damaged = steered_job(world, "index-emptied"), steered_job(world, "index-damaged")
    for job in (emptied, damaged):
        job.put(FEW)
    yield
    for job in (emptied, damaged):
        _relayed(world, job)
    os.truncate(emptied.directory / "log.idx", 0)
    emptied.put(FEW)
    yield
    last = (damaged.directory / "log.idx").stat().st_size
    damaged.put(FEW)
    _damage(damaged, (last - HEADER_BYTES) // ENTRY_BYTES)
    damaged.put(FEW)
    yield
    emptied.put(FEW)
    damaged.put(FEW)


def full_speed(world: World, row: Row, lines: int = 5_000) -> Iterator[None]:
    """Two jobs write as fast as they can, and the agent is killed meanwhile."""
    jobs = [steered_job(world, f"fast-{number}") for number in range(2)]
    yield
    for job in jobs:
        job.send(f"write({lines})")
    until(lambda: all(world.acked(job) for job in jobs))
    yield
    for job in jobs:
        job.send(f"write({lines})")
    yield


def children_go_on(world: World, row: Row) -> Iterator[None]:
    """A job's main process ends, its children write on: the state is the main process's, and their lines come."""
    job = steered_job(world, "parent")
    job.put(FEW)
    yield
    job.put(FEW)
    job.do("if os.fork(): os._exit(0)")
    until(lambda: job.status.state.is_terminal)
    _expect(row, job.status.state is JobState.SUCCEEDED, f"the job is {job.status.state}")
    job.put(FEW)
    _relayed(world, job)
    job.do("if os.fork(): os._exit(1)")
    yield
    job.put(FEW)
    _expect(row, not job.status.logs_complete, "the log is not complete while a child writes")
    yield
    job.put(FEW)
    _relayed(world, job)


def stdout_closed(world: World, row: Row) -> Iterator[None]:
    """A job closes its stdout, later its stderr, too, and goes on."""
    job = steered_job(world, "silenced")
    job.put(FEW)
    yield
    job.do("os.close(1)")
    job.put(FEW, out=2)
    _relayed(world, job)
    yield
    job.put(FEW, out=2)
    job.do("os.close(2)")
    yield
    _relayed(world, job)
    _expect(row, job.status.state is JobState.RUNNING, f"a silent job is {job.status.state}")


def cancelled(world: World, row: Row) -> Iterator[None]:
    """Two jobs are cancelled while they write, one of them while the agent is dead."""
    one, other = steered_job(world, "cancelled"), steered_job(world, "cancelled-unseen")
    for job in (one, other):
        job.put(FEW)
    yield
    for job in (one, other):
        job.send("while True: write(50); time.sleep(0.001)")
    until(lambda: world.acked(one) > FEW)
    one.cancel()
    yield
    other.cancel()
    yield
    _expect(row, {one.status.state, other.status.state} == {JobState.CANCELED}, "a cancelled job is CANCELED")


def supervisors_disk_full(world: World, row: Row) -> Iterator[None]:
    """No byte more fits into a job's log for a while: the job does not wait, and what it wrote meanwhile is one gap."""
    job = steered_job(world, "cramped")
    job.put(FEW)
    yield
    _relayed(world, job)
    supervisor: int = world.local.state(job.job_id)["supervisor_pid"]
    _, most = resource.prlimit(supervisor, resource.RLIMIT_FSIZE)
    resource.prlimit(supervisor, resource.RLIMIT_FSIZE, ((job.directory / "log").stat().st_size, most))
    job.send(f"write({MANY})")
    until(lambda: job.written == FEW + MANY)
    _expect(row, len(job.captured) == FEW, f"{len(job.captured)} lines in the log of a full disk")
    yield
    resource.prlimit(supervisor, resource.RLIMIT_FSIZE, (most, most))
    while len(job.captured) == FEW:
        job.do("write(1)")  # after a failed write, the supervisor tries again after a second
        time.sleep(0.05)
    numbers = map(int, re.findall(r"#(\d{7}) \d{19}$", "\n".join(job.captured), re.MULTILINE))
    job.destroyed(FEW, min(number for number in numbers if number >= FEW))
    job.put(FEW)
    yield
    _relayed(world, job)
    gaps = _reported_gaps(world, job)
    _expect(row, gaps == 1, f"one gap is reported, not {gaps}")


_FAST = "two jobs at full speed"
FAULTS: dict[str, Fault] = {
    "supervisor killed": supervisor_killed,
    "machine rebooted, index torn": rebooted,
    "log truncated by another process": log_truncated,
    "log removed by another process": log_removed,
    "index emptied, and damaged": index_damaged,
    _FAST: partial(full_speed, lines=400_000),
    "children write on after the end": children_go_on,
    "job closes its stdout": stdout_closed,
    "job cancelled while it writes": cancelled,
    "disk full under a job's log": supervisors_disk_full,
}


def run(seed: str, faults: Sequence[Fault], *, served: bool = False) -> Row:
    """Let these faults happen in one world, and count; where served, the agent reads the jobs by the job API."""
    row = Row("")
    with World(seed, Settings(page=True, served=served)) as world:
        halts = [fault(world, row) for fault in faults]
        _go_on(halts)
        world.configure()
        world.start(strict=True)
        _go_on(halts)
        world.kill()
        world.ended()
        _go_on(halts)
        world.start(strict=True)
        _go_on(halts)
        row.found.append(world.finish())
        row.problems += [line for line in world.log.splitlines() if "unexpected error" in line]
    return row


def run_together(seed: str, *, served: bool = False) -> Row:
    """Let all faults happen in one world, fewer lines to each."""
    return run(seed, [*(fault for name, fault in FAULTS.items() if name != _FAST), full_speed], served=served)


def scenarios() -> list[Scenario]:
    """Return the rows."""
    return [
        *(Scenario(f"local: {name}", partial(run, faults=[fault])) for name, fault in FAULTS.items()),
        Scenario("local: all of these, read by the job API", partial(run_together, served=True)),
    ]


def gaps(world: World) -> int:
    """Return how many gaps the running agent has counted."""
    try:
        with urllib.request.urlopen(f"{world.page_url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0  # the agent has only just been started
    found = [line for line in lines if line.startswith("tailspan_agent_gaps") and 'service="local"' in line]
    return int(float(found[0].split()[-1])) if found else 0


def _go_on(halts: Sequence[Iterator[None]]) -> None:
    # At the same time: each waits for the agent, which polls a served job only every few seconds.
    with ThreadPoolExecutor(len(halts)) as pool:
        list(pool.map(lambda fault: next(fault, None), halts))


def _relayed(world: World, job: SteeredJob) -> None:
    world.until(lambda: world.acked(job) >= job.relayable, f"{job.relayable} lines of {job.name}")


def _reported_gaps(world: World, job: SteeredJob) -> int:
    return world.log.count(f"job {job.job_id} of service local: lines are lost")


def _damage(job: SteeredJob, number: int) -> None:
    with (job.directory / "log.idx").open("r+b") as file:
        file.seek(HEADER_BYTES + number * ENTRY_BYTES + 3)
        file.write(b"\xff")


def _expect(row: Row, holds: bool, what: str) -> None:
    if not holds:
        row.problems.append(f"not so: {what}")
