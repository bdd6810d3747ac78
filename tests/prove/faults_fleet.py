"""Faults of a fleet: agents killed, stopped, cut off, joining and leaving; a database that goes and comes back."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tailspan_agent.fleet.database import SCHEMA_VERSION
from tests.prove.fleet_world import LEASE_S, FleetWorld
from tests.prove.jobs import NumberedJob
from tests.prove.mutant import Mutant
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Settings

_KILL_EVERY_S = 3.0
CLOCK_SET_BACK = "clock-set-back"
_JOBS = 40


def speak(world: FleetWorld, share: float = 0.5) -> None:
    """Let some of the running jobs write."""
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        if not job.ended and world.random.random() < share:
            job.write(world.random.choice((1, 5, 20)), world.random)


def speak_for(world: FleetWorld, seconds: float, each_time: Callable[[], object] = lambda: None) -> None:
    """Let jobs write for some seconds, and a few of them end."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        speak(world, 0.2)
        running = [job for job in world.jobs if not job.ended]
        if len(running) > len(world.jobs) // 2 and world.random.random() < 0.3:
            world.random.choice(running).end()
        each_time()
        time.sleep(0.2)


def killed(world: FleetWorld, seconds: float = 120.0) -> list[str]:
    """One of three agents is killed every 3 s and started again."""
    kills, next_s = 0, time.monotonic() + _KILL_EVERY_S

    def kill() -> None:
        nonlocal kills, next_s
        if time.monotonic() < next_s:
            return
        for agent in world.agents:
            if agent.process is None:
                world.start_agent(agent)
        world.kill_agent(world.random.choice(world.agents))
        kills, next_s = kills + 1, time.monotonic() + _KILL_EVERY_S

    speak_for(world, seconds, kill)
    for agent in world.agents:
        if agent.process is None:
            world.start_agent(agent)
    return [] if kills >= seconds / _KILL_EVERY_S / 2 else [f"only {kills} kills"]


def stopped(world: FleetWorld) -> list[str]:
    """One agent is stopped for three leases; the others have its shards within two; then it goes on."""
    agent = world.agents[0]
    speak_for(world, 1.0)
    with world.checkpoints_held():
        speak_for(world, 1.5)
        world.signal_agent(agent, signal.SIGSTOP)
    begun_s = time.monotonic()
    while sum(world.shares().values()) < 256 or len(world.shares()) > 2:
        speak(world, 0.1)
        time.sleep(0.1)
        if time.monotonic() - begun_s > 10 * world.lease_s:
            return ["the shards of the stopped agent were not taken over"]
    taken_s = time.monotonic() - begun_s
    speak_for(world, max(0.0, 3 * world.lease_s - taken_s))
    world.note_acked()
    world.until(lambda: repeated(world) >= 0, "the count")
    before = world.all_acked()
    world.signal_agent(agent, signal.SIGCONT)
    lost = 0
    until_s = time.monotonic() + world.lease_s
    while time.monotonic() < until_s:
        now = world.all_acked()
        lost += sum(now[job] < acked for job, acked in before.items())
        before = now
    speak_for(world, world.lease_s)
    problems = [f"{lost} checkpoints went back"] if lost else []
    # Half a lease for a machine that is busy.
    return problems if taken_s <= 2.5 * world.lease_s else [*problems, f"the takeover took {taken_s:.1f} s"]


def cut_off(world: FleetWorld) -> list[str]:
    """The network between one agent and the database is cut; its endpoint is still there: it stops in time."""
    agent = world.agents[0]
    assert agent.proxy is not None
    agent.proxy.cut()
    (world.home / CLOCK_SET_BACK).touch()  # for the build that reads a clock that can be set
    seen = threading.Event()
    speak_for(world, 3 * world.lease_s, lambda: "reading stops" in world.log_of(agent) and seen.set())
    agent.proxy.heal()
    world.until(world.is_balanced, "a fair share after the cut")
    speak_for(world, 2.0)
    problems = [] if seen.is_set() else ["the agent that was cut off did not stop reading"]
    return problems + readers_at_one_time(world)


def readers_at_one_time(world: FleetWorld) -> list[str]:
    """Return jobs of which two agents sent new lines in turns: each job changes its agent, and never back and forth."""
    found = []
    for name, agents in world.senders.items():
        turns = [agent for agent, before in zip(agents, [None, *agents], strict=False) if agent != before]
        if len(turns) > _MOST_TURNS:
            found.append(f"{name} was sent by {len(turns)} agents in turns")
    return found[:3]


_MOST_TURNS = 6


def database_away(world: FleetWorld) -> list[str]:
    """The server is restarted; later it is away for longer than the leases last."""
    world.postgres.stop(signal.SIGINT)
    world.postgres.start()
    speak_for(world, 3.0)
    world.postgres.stop()
    speak_for(world, 4 * world.lease_s)
    stopped_reading = all("reading stops" in world.log_of(agent) for agent in world.agents)
    world.postgres.start()
    world.until(world.is_balanced, "a fair share after the database is back")
    speak_for(world, 2.0)
    return [] if stopped_reading else ["an agent read on without a lease"]


_OUTAGE_S = 300.0
_SUSPENDED_S = 20.0
_MOST_GROWTH = 16 << 20


def database_away_for_long(world: FleetWorld) -> list[str]:
    """The server is away for five minutes: the agents stop, need no more memory for it, and continue."""
    speak_for(world, 3.0)
    world.postgres.stop()
    world.until(lambda: all("reading stops" in world.log_of(agent) for agent in world.agents), "the stop of reading")
    speak_for(world, _SUSPENDED_S)
    before = world.memory()
    requests = len(world.collector.requests)
    speak_for(world, _OUTAGE_S - _SUSPENDED_S)
    after = world.memory()
    sent = sum(request.signal == "logs" for request in world.collector.requests[requests:])
    world.postgres.start()
    world.until(world.is_balanced, "a fair share after the database is back")
    speak_for(world, 2.0)
    problems = [f"{sent} requests with lines were sent without a lease"] if sent else []
    grown = {name: size - before[name] for name, size in after.items() if size - before[name] > _MOST_GROWTH}
    return [*problems, *(f"{name} took {size >> 20} MiB more while it waited" for name, size in grown.items())]


def copy_that_lags(world: FleetWorld) -> list[str]:
    """The server fails over to a copy that lacks the last second."""
    world.until(world.is_balanced, "a fair share")
    world.postgres.execute("CHECKPOINT")
    speak_for(world, 2.0)
    world.postgres.go_back(lambda: speak_for(world, 1.0))
    for job in world.jobs:
        job.restarted(0, strict=False)  # what the lost second had acknowledged comes again
    world.until(world.is_balanced, "a fair share after the failover")
    speak_for(world, 3.0)
    return []


def join_and_leave(world: FleetWorld) -> list[str]:
    """One agent, then four, then two, under load: hand-overs without repeats."""
    for agent in world.agents[1:]:
        world.stop_agent(agent)
    world.until(world.is_balanced, "one agent")
    before = repeated(world)
    with world.checkpoints_held():
        for agent in world.agents[1:]:
            world.start_agent(agent)
        speak_for(world, 5.0)
    speak_for(world, 5.0)
    world.until(world.is_balanced, "four agents")
    for agent in world.agents[2:]:
        world.stop_agent(agent)
    speak_for(world, 5.0)
    world.until(world.is_balanced, "two agents")
    again = repeated(world) - before
    return [f"{again} lines were repeated by hand-overs"] if again else []


def repeated(world: FleetWorld) -> int:
    """Return how many lines came more than once so far."""
    world.settle_receiver()
    world.fold()
    return sum(job.tally.count(job.written).repeated for job in world.jobs)


def newer_schema(world: FleetWorld) -> list[str]:
    """An agent of an older version is started beside newer tables: it refuses, and says which one to upgrade."""
    world.stop_agent(world.agents[0])
    world.query("UPDATE $meta SET value = '99' WHERE key = 'schema_version' RETURNING 1")
    world.start_agent(world.agents[0])
    process = world.agents[0].process
    assert process is not None
    code = process.wait(60)
    world.agents[0].process = None
    said = "upgrade this agent" in world.log_of(world.agents[0])
    world.query("UPDATE $meta SET value = %s WHERE key = 'schema_version' RETURNING 1", str(SCHEMA_VERSION))
    for agent in world.agents[1:]:
        world.stop_agent(agent)
    world.start_all()
    return [] if code == 2 and said else [f"the older agent ended with {code}: {world.log_of(world.agents[0])[-300:]}"]


@dataclass(frozen=True)
class FleetFault:
    """A row.

    Attributes:
        name: The row's name.
        act: Does it, and returns what is wrong besides the counts.
        agents: How many agents there are.
        jobs: How many jobs.
        cut: Whether the first agent reaches the database through a proxy.
        durable: Whether a killed server keeps what it has committed.
        timeout_s: How long it may take to relay what is left.
        lease_s: ``fleet.lease``; longer than any wait for a processor where no lease may end.
        path: A directory with another ``tailspan_agent``.
    """

    name: str
    act: Callable[[FleetWorld], list[str]]
    agents: int = 3
    jobs: int = _JOBS
    cut: bool = False
    durable: bool = False
    timeout_s: float = 240.0
    lease_s: float = LEASE_S
    path: Path | None = None

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run, alone=True)

    def _run(self, seed: str) -> Row:
        settings = Settings(path=self.path)
        with FleetWorld(seed, self.agents, settings, lease_s=self.lease_s, durable=self.durable) as world:
            if self.cut:
                world.put_proxy_before(world.agents[0])
            for number in range(self.jobs):
                world.fused_job(f"job-{number}").write(5, world.random)
            world.start_all()
            problems = self.act(world)
            found = world.finish(self.timeout_s)
            return Row(self.name, [found], problems)


FAULTS = (
    FleetFault("fleet: an agent killed every 3 s for 2 minutes", killed, jobs=300),
    FleetFault("fleet: an agent stopped for 3 leases", stopped),
    FleetFault("fleet: an agent cut off from the database", cut_off, cut=True),
    FleetFault("fleet: database restarted, then away", database_away, durable=True),
    FleetFault("fleet: database away for 5 minutes", database_away_for_long, durable=True, lease_s=10.0),
    FleetFault("fleet: failover to a copy that lags", copy_that_lags, durable=True),
    FleetFault("fleet: 1, 4, 2 agents under load", join_and_leave, agents=4, lease_s=20.0),
    FleetFault("fleet: an older agent beside newer tables", newer_schema),
)

_UNDER = {fault.name: fault for fault in FAULTS}


@dataclass(frozen=True)
class WrongFleet:
    """A row: it is ok when the fault finds the wrong build.

    Attributes:
        mutant: What is wrong.
        fault: The name of the fault that shows it.
        found_by: Words of the verdict, one of which must be there.
    """

    mutant: Mutant
    fault: str
    found_by: tuple[str, ...]

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(f"wrong build: {self.mutant.name}", self._run, alone=True)

    def _run(self, seed: str) -> Row:
        fault = _UNDER[self.fault]
        with tempfile.TemporaryDirectory(prefix="prove-mutant-") as directory:
            path = self.mutant.build(Path(directory, "build"))
            wrong = replace(fault, timeout_s=30.0, path=path)
            row = wrong.scenario().row_of(seed)
        if any(words in row.verdict for words in self.found_by):
            return Row("", notes=[f"found by {self.fault!r}: {row.verdict[:120]}"])
        return Row("", problems=[f"{self.fault!r} does not find {self.found_by}, but: {row.verdict}"])


BUILDS = (
    WrongFleet(
        Mutant(
            "acks without the epoch",
            "tailspan_agent/fleet/batch.py",
            "    return {shard for (shard,) in rows}\n",
            "    return set(epochs) if rows is not None else set()\n",
        ),
        "fleet: an agent stopped for 3 leases",
        ("checkpoints went back", "missing", "needless"),
    ),
    WrongFleet(
        Mutant(
            "judges its lease by the wall clock",
            "tailspan_agent/fleet/member.py",
            '    if hasattr(time, "CLOCK_BOOTTIME"):\n',
            "    import os\n\n"
            f"    back_s = 3600.0 if os.path.exists(os.environ['HOME'] + '/{CLOCK_SET_BACK}') else 0.0\n"
            "    return time.time() - back_s\n"
            '    if hasattr(time, "CLOCK_BOOTTIME"):\n',
        ),
        "fleet: an agent cut off from the database",
        ("did not stop reading",),
    ),
    WrongFleet(
        Mutant(
            "releases a shard before the last ack",
            "tailspan_agent/fleet/member.py",
            "                    await self._reader.flush(self._handing_over)\n",
            "                    self._store.written = lambda: asyncio.sleep(0)\n",
        ),
        "fleet: 1, 4, 2 agents under load",
        ("were repeated by hand-overs",),
    ),
)
