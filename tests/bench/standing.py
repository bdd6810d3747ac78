"""W3, W4, W8: agents that run on: among silent jobs, among speaking ones, and their start with a long history."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import anyio

from tailspan.local.store import JobStore
from tailspan.services.fused import FusedService
from tailspan.services.local import LocalService
from tailspan_agent.checkpoint.store import SqliteStore
from tests.bench.agents import Plan, RunningAgent, running
from tests.bench.holder import ENDED, HOLDING
from tests.bench.job_server import SERVING, base_url
from tests.bench.measure import cpu_of, run, started
from tests.bench.receiver import Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row

__all__ = ["latency", "silence", "start"]

_SPEAKERS = 10
_SETTLE_S = 15.0
_WATCH_S = 45.0
_CHANGE_WITHIN_S = 90.0
_LINES_PER_S = 10
_SPEECH_S = 20.0
_KNOWN = 100_000


def silence(scale: Scale, directory: Path) -> Iterator[Row]:
    """W3: 10,000 running jobs, 10 of them active, local and over the job API; plain: as from any other server."""
    count = scale.of(10_000, least=2 * _SPEAKERS)
    store = directory / "jobs"
    holder = [sys.executable, "-m", "tests.bench.holder", str(store), str(count), str(_SPEAKERS)]
    server = [sys.executable, "-m", "tests.bench.job_server", str(store)]
    with (
        receiving(directory) as receiver,
        started(holder, log=directory / "holder.log", says=HOLDING) as (holder_pid, _),
        started(server, log=directory / "server.log", says=SERVING) as own,
        started([*server, "--plain"], log=directory / "plain.log", says=SERVING) as plain,
    ):
        local = Plan(directory=directory / "local", store=store, endpoint=receiver.http_url)
        yield from _silence("W3 local", local, receiver, holder_pid, directory / "holder.log", scale)
        for case, (pid, said) in (("W3 fused", own), ("W3 plain", plain)):
            url = said.removeprefix(SERVING)
            remote = Plan(directory=directory / case, base_url=base_url(said), endpoint=receiver.http_url)
            served = cpu_of(pid), time.perf_counter()
            _take_requests(url)
            yield from _silence(case, remote, receiver, holder_pid, directory / "holder.log", scale)
            elapsed_s = time.perf_counter() - served[1]
            yield Row(case=f"{case}, requests", figure=_take_requests(url) / elapsed_s, unit="/s", goal=Goal(20))
            share = (cpu_of(pid) - served[0]) / elapsed_s * 100
            yield Row(case=f"{case}, the server's share", figure=share, unit="% of a core")


def _silence(
    case: str, plan: Plan, receiver: Receiver, holder_pid: int, holder_log: Path, scale: Scale
) -> Iterator[Row]:
    with running(plan) as agent:
        # Until every job has its tailer and was polled once.
        _quiet(agent, receiver)
        receiver.counts()
        watched = _WATCH_S if scale.factor >= 1 else _WATCH_S / 3
        usage = agent.watch(watched)
        share = usage.cpu_s / usage.wall_s * 100
        counts = receiver.counts()
        yield Row(
            case=case, usage=usage, lines=counts["records"], requests=counts["requests"], sent=counts["bytes"],
            figure=share, unit="% of a core", goal=Goal(1.5 if plan.store is not None else 2.5),
        )  # fmt: skip
        yield Row(case=f"{case}, peak memory", figure=usage.rss / MIB, unit="MiB", goal=Goal(100))
        seen_s = _seen_after(plan, holder_pid, holder_log)
        yield Row(case=f"{case}, end of a silent job seen", figure=seen_s, unit="s", goal=Goal(60))


def _quiet(agent: RunningAgent, receiver: Receiver) -> None:
    """Wait until the agent does no more than it does when nothing is new: two equal stretches of CPU time."""
    deadline = time.monotonic() + 120
    before = agent.watch(_SETTLE_S).cpu_s
    while time.monotonic() < deadline:
        now = agent.watch(_SETTLE_S).cpu_s
        if abs(now - before) < max(0.2, 0.15 * before):
            return
        before = now


def _seen_after(plan: Plan, holder_pid: int, holder_log: Path) -> float:
    """End a silent job; return how many seconds later the agent's store has its end."""
    said = holder_log.read_text().count(ENDED)
    ended = _ended_in(plan)
    os.kill(holder_pid, signal.SIGUSR1)
    begun = time.time()
    while time.time() - begun < _CHANGE_WITHIN_S:
        if holder_log.read_text().count(ENDED) > said and _ended_in(plan) > ended:
            return time.time() - float(holder_log.read_text().rsplit(ENDED, 1)[1])
        time.sleep(0.1)
    return float("inf")


def _ended_in(plan: Plan) -> int:
    uri = f"{(plan.state_dir / 'checkpoints.db').absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as db:
        count: int = db.execute("SELECT count(*) FROM jobs WHERE ended = 1").fetchone()[0]
        return count


def latency(scale: Scale, directory: Path) -> Iterator[Row]:
    """W4: jobs that write 10 lines a second each; from before the line is written until it is received.

    The jobs are real, each with its supervisor; their command is ``cat``, which passes on what we write into a pipe.
    """
    jobs = scale.of(100)
    store, pipes = directory / "jobs", directory / "pipes"
    pipes.mkdir()
    service = LocalService(state_dir=store)
    server = [sys.executable, "-m", "tests.bench.job_server", str(store)]
    with receiving(directory, latency=True) as receiver, ExitStack() as stack:
        fds = []
        for number in range(jobs):
            pipe = pipes / str(number)
            os.mkfifo(pipe)
            # From here, not by a command: a hundred interpreters take over a minute to start on a busy machine.
            anyio.run(partial(service.submit, ["cat", str(pipe)], name=f"bench-{number % 10}"))
            fds.append(os.open(pipe, os.O_WRONLY))
            stack.callback(os.close, fds[-1])
        plans: dict[str, tuple[Plan, float, Goal | None]] = {
            "W4 local": (Plan(directory=directory / "local", store=store, endpoint=receiver.http_url), 100.0, Goal(20))
        }
        for case, option, requests_per_second in (
            ("W4 fused", [], 20),
            ("W4 plain", ["--plain"], 20),
            ("W4 plain, 1000 requests/s", ["--plain"], 1000),
        ):
            place = directory / str(len(plans))
            place.mkdir()
            _, said = stack.enter_context(started([*server, *option], log=place / "server.log", says=SERVING))
            plan = Plan(
                directory=place,
                base_url=base_url(said),
                endpoint=receiver.http_url,
                requests_per_second=requests_per_second,
            )
            # A plain server cannot be asked for several jobs at once: at the default limit each has its turn each 5 s.
            interval_s = max(FusedService.poll_min_s, jobs / requests_per_second if option else 0.0)
            plans[case] = plan, (interval_s + 0.3) * 1000, None
        for case, (plan, limit_ms, share) in plans.items():
            with running(plan) as agent:
                _speak(fds, 10.0)
                receiver.counts()
                before = cpu_of(agent.pid)
                _speak(fds, _SPEECH_S)
                used = cpu_of(agent.pid) - before
                time.sleep(3)
                ages = sorted(receiver.counts()["ages_ms"]) or [float("inf")]
            yield Row(case=f"{case}, p50", lines=len(ages), figure=statistics.median(ages), unit="ms")
            p99 = ages[min(len(ages) - 1, len(ages) * 99 // 100)]
            yield Row(case=f"{case}, p99", figure=p99, unit="ms", goal=Goal(limit_ms))
            yield Row(case=f"{case}, CPU", figure=used / _SPEECH_S * 100, unit="% of a core", goal=share)


def _speak(fds: list[int], seconds: float) -> None:
    """Write lines, spread evenly over time."""
    begun = time.monotonic()
    pause_s = 1 / _LINES_PER_S / len(fds)
    for number in range(round(seconds * _LINES_PER_S * len(fds))):
        os.write(fds[number % len(fds)], b"a line of a job rec=%d at=%d\n" % (number, time.time_ns()))
        time.sleep(max(0.0, begun + (number + 1) * pause_s - time.monotonic()))


def start(scale: Scale, directory: Path) -> Iterator[Row]:
    """W8: how long an agent takes until it is ready, with 100,000 known jobs in its store and with none.

    Nearly all of it is imports, so the import of the agent alone has a row of its own.
    """
    known = scale.of(_KNOWN)
    store = directory / "jobs"
    identity = JobStore(store).identity
    found: dict[str, float] = {}
    with receiving(directory) as receiver:
        for name, count in (("none", 0), ("many", known)):
            plan = Plan(directory=directory / name, store=store, endpoint=receiver.http_url)
            _fill(plan.state_dir, identity, count)
            times, costs, usages = [], [], []
            for _ in range(scale.times):
                with running(plan) as agent:
                    times.append(agent.ready_s)
                    costs.append(cpu_of(agent.pid) / run([sys.executable, "-c", "pass"]).cpu_s)
                    usages.append(agent.watch(1.0))
            found[name] = statistics.median(times)
            case = f"W8 ready, {count:,} known jobs"
            memory = max(usage.rss for usage in usages) / MIB
            yield Row(case=case, figure=found[name], unit="s", goal=Goal(2.0 if count else 0.2))
            yield Row(case=f"{case}, memory", figure=memory, unit="MiB", goal=None if count else Goal(40))
            if not count:
                # Holds on every machine, also while others use it.
                yield Row(case="W8 ready, CPU against python -c pass", figure=statistics.median(costs), unit="x")
        yield Row(case="W8 start, against no known jobs", figure=found["many"] / found["none"], unit="x")
    imports = [run([sys.executable, "-c", "import tailspan_agent.agent"]).wall_s for _ in range(scale.times)]
    yield Row(case="W8 import tailspan_agent.agent", figure=statistics.median(imports), unit="s", goal=Goal(0.2))


def _fill(state_dir: Path, identity: str, count: int) -> None:
    """Make a checkpoint store with a number of finished jobs, as after a month."""
    store = SqliteStore(state_dir)
    ledger = json.dumps({"lines": 10_000})
    with closing(sqlite3.connect(store.path)) as db, db:
        db.executemany(
            "INSERT INTO jobs (identity, job_id, name, backfill, cursor, facts, logs_complete, ended, updated_s)"
            " VALUES (?, ?, ?, 0, ?, ?, 1, 1, ?)",
            ((identity, f"known-{n:07d}", f"bench-{n % 10}", b"1100000", ledger, time.time()) for n in range(count)),
        )
        db.executemany(
            "INSERT INTO spans VALUES (?, ?, ?, ?, 1)",
            ((n, f"{n:016x}", b"r" * 300, b"s" * 400) for n in range(1, count + 1)),
        )
    store.close()


def _take_requests(url: str) -> int:
    with urllib.request.urlopen(f"{url}/requests", timeout=60) as reply:
        return int(reply.read())
