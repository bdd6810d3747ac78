"""The SIGKILL sweep: the agent is killed again and again, at every step of its way, and started again.

The kills come from outside: each is aimed by what the receiver and the job service see, by the agent's public /metrics,
by the time stamp of its store, or by chance. Where one hit is decided afterwards, by evidence (`evidence.steps_of`).
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.fakes.collector import Reply, Request
from tests.fakes.otlp_rows import log_rows
from tests.prove.evidence import STEPS, Evidence, Step, WriteAhead, steps_of
from tests.prove.jobs import NumberedJob
from tests.prove.mutant import Mutant
from tests.prove.slow_motion import spin
from tests.prove.table import Row
from tests.prove.tally import LINE
from tests.prove.world import Found, Settings, World, copy_store

ROOT = Path(__file__).parents[2]
KILLS_A_WORLD = 20
_LIFE_S = 6.0
_POLL_S = 0.02
_ENCODED = re.compile(r"^tailspan_agent_records_read(?:_total)?\{[^}]*\} (\d+)", re.MULTILINE)


@dataclass
class Life:
    """What is seen of one agent, from its start to its end; see `Evidence`."""

    log_bytes: int
    open_requests: int = 0
    begun: int = 0
    arrived: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    encoded: int = 0
    evidence: Evidence | None = None
    over: threading.Event = field(default_factory=threading.Event)


class Killer:
    """Kills the agent of a world once in each life, as it was aimed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._life = Life(0)
        self._guard = threading.Lock()
        self._counting = threading.Lock()
        self._slow_motion: subprocess.Popen[bytes] | None = None
        world.collector.on_begin = self._begin
        world.collector.always("logs", self._answer)
        self.disarm()

    def disarm(self) -> None:
        """Kill no more."""
        self._on_begin = self._on_request = self._on_answer = _nothing
        self._delay_s = 0.0
        for job in self._fused_jobs():
            job.after_reply = _nothing

    def run(self, aim: Step) -> Step:
        """Let one agent live and be killed; return the step at which it was hit."""
        world = self.world
        life = self._life = Life(log_bytes=len(world.log))
        self._aim(aim)
        before = WriteAhead.read(world.database)
        world.start(strict=True)
        if aim is Step.WRITING:
            self._slow_motion = self._prepare_slow_motion()
        patience = world.patience(_LIFE_S)
        while not life.over.wait(_POLL_S):
            if patience.is_over():
                self._kill()
        self.disarm()
        killed = world.ended() == -signal.SIGKILL
        if self._slow_motion is not None:
            self._slow_motion.communicate()
            self._slow_motion = None
        world.settle_receiver()
        assert life.evidence is not None
        torn = WriteAhead.read(world.database).torn_since(before)
        store = copy_store(world.state_dir, world.home)
        acked = {job.name: world.acked(job, store) for job in world.jobs}
        if not killed:
            return Step.ELSEWHERE
        steps = steps_of(replace(life.evidence, acked=acked, torn_write=torn))
        return aim if aim in steps else steps[0]

    def _aim(self, aim: Step) -> None:
        chance = self.world.random
        match aim:
            case Step.READ if (jobs := self._fused_jobs()) and chance.random() < 0.5:
                chance.choice(jobs).cut_next_reply(self._kill)
            case Step.READ:
                pause_s = chance.uniform(0, 0.002)
                for job in self._fused_jobs():
                    job.after_reply = lambda: self._kill(lambda: spin(pause_s))
            case Step.ENCODED:
                self._in_background(self._watch_metrics)
            case Step.SENDING if chance.random() < 0.5:
                self._on_begin = self._at_one_of_the_first(self._kill_and_take_nothing)
            case Step.SENDING:
                self._on_request = self._at_one_of_the_first(self._kill)
            case Step.ANSWERED:
                pause_s = chance.uniform(0, 0.0003)
                self._on_answer = self._at_one_of_the_first(lambda: self._kill(lambda: spin(pause_s)))
            case Step.WRITING:
                self._on_answer = self._at_one_of_the_first(
                    lambda: self._kill(lambda: self._slow_motion and self._slow_motion.communicate(b"go\n"))
                )
            case Step.DRAINING:
                self._delay_s = 0.3
                pause_s = chance.uniform(0.0, 0.4)
                self._on_begin = self._at_one_of_the_first(
                    lambda: self._in_background(lambda: self._drain_then_kill(pause_s))
                )
            case Step.ELSEWHERE:
                pause_s = chance.uniform(0.05, 2.0)
                self._in_background(lambda: self._life.over.wait(pause_s) or self._kill())

    def _fused_jobs(self) -> list[NumberedJob]:
        return [job for job in self.world.jobs if isinstance(job, NumberedJob) and not job.ended]

    def _at_one_of_the_first(self, action: Callable[[], object]) -> Callable[[], object]:
        countdown = itertools.chain([False] * self.world.random.choice((0, 0, 1, 3)), [True], itertools.repeat(False))
        return lambda: next(countdown) and action()

    def _in_background(self, action: Callable[[], object]) -> None:
        threading.Thread(target=action).start()

    def _kill(self, wait: Callable[[], object] = lambda: None, *, draining: bool = False) -> None:
        """Kill, after a short wait. What is known is put down before it: nothing lies between it and the kill."""
        with self._guard:
            life = self._life
            if life.over.is_set():
                return
            life.evidence = Evidence(
                handed={job.name: job.handed for job in self.world.jobs},
                encoded=life.encoded,
                begun=life.begun,
                arrived=dict(life.arrived),
                open_requests=life.open_requests,
                answered=dict(life.answered),
                draining=draining,
            )
            wait()
            self.world.kill()
            life.over.set()

    def _kill_and_take_nothing(self) -> None:
        self._kill()
        raise ConnectionAbortedError  # else the receiver would take what is in the socket's buffer

    def _begin(self, signal_: str) -> None:
        if signal_ == "logs":
            with self._counting:
                self._life.open_requests += 1
            self._on_begin()

    def _answer(self, request: Request) -> Reply:
        life = self._life
        last: dict[str, int] = {}
        for row in log_rows(request.message):
            match = None if row.event_name else LINE.match(row.body)
            if match is not None:
                last[match["job"]] = int(match["number"]) + 1
        with self._counting:
            life.begun += request.count
            life.arrived |= last
        self._on_request()

        def sent() -> None:
            with self._counting:
                life.open_requests -= 1
                life.answered |= last
            self._on_answer()

        return Reply(delay_s=self._delay_s, sent=sent)

    def _prepare_slow_motion(self) -> subprocess.Popen[bytes]:
        """Start the process that kills when the store changes; it waits for a line."""
        agent = self.world.agent
        assert agent is not None
        return subprocess.Popen(
            [sys.executable, "-S", "-m", "tests.prove.slow_motion", str(agent.pid), str(self.world.database)],
            stdin=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip

    def _drain_then_kill(self, pause_s: float) -> None:
        self.world.terminate()
        said = self.world.log[self._life.log_bytes :]
        patience = self.world.patience(1.0)
        while "stopping:" not in said and not patience.is_over():
            time.sleep(0.001)
            said = self.world.log[self._life.log_bytes :]
        self._life.over.wait(pause_s)
        self._kill(draining="stopping:" in said)

    def _watch_metrics(self) -> None:
        life = self._life
        while not life.over.is_set():
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{self.world.page_url}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
                life.encoded = sum(map(int, _ENCODED.findall(text)))
                if life.encoded > life.begun:
                    self._kill()
            life.over.wait(0.002)


def _nothing() -> None:
    """Not aimed."""


def sweep_world(
    seed: str, kills: int, hits: Counter[Step], *, path: Path | None = None, aims: Sequence[Step] = tuple(Step)
) -> Found:
    """Kill the agent of one world a number of times, then let it finish, and count.

    Args:
        seed: Reproduces the world's choices.
        kills: How many.
        hits: How often each step was hit so far, to be added to; rare ones are aimed at more.
        path: A directory with another ``tailspan_agent``.
        aims: What to aim at.
    """
    with World(seed, Settings(page=True, path=path)) as world:
        chance = world.random
        for number in range(4):
            world.fused_job(f"fused-{number}")
        world.local_job("local-0")
        world.local_job("local-1", burst=40, pause_s=0.1)
        world.configure()
        killer = Killer(world)
        for kill in range(kills):
            running = [job for job in world.jobs if isinstance(job, NumberedJob) and not job.ended]
            if kill % 5 == 4:
                chance.choice(running).end()
                running.append(world.fused_job(f"fused-{kill + 4}"))
            for job in running:
                job.write(chance.choice((1, 20, 150, 700)), chance)
            rarest = min(aims, key=lambda step: (hits[step], chance.random()))
            hits[killer.run(rarest if chance.random() < 0.7 else chance.choice(aims))] += 1
        killer.disarm()
        return world.finish()


def sweep(seed: str, kills: int, *, least_hits: int, path: Path | None = None) -> Row:
    """Kill the agent a number of times, in several worlds, and more often while a step has fewer than `least_hits`."""
    row, hits = Row("SIGKILL"), Counter[Step]()
    while hits.total() < kills or (hits.total() < 1.5 * kills and min(hits[step] for step in STEPS) < least_hits):
        count = min(KILLS_A_WORLD, max(kills - hits.total(), len(STEPS)))
        row.found.append(sweep_world(f"{seed}/{len(row.found)}", count, hits, path=path))
    row.notes.append(f"{hits.total()} kills: " + ", ".join(f"{hits[step]} {step}" for step in Step))
    row.problems += [
        f"only {hits[step]} kills {step}, and {least_hits} are wanted" for step in STEPS if hits[step] < least_hits
    ]
    return row


def sweep_of_mutant(seed: str, mutant: Mutant, kills: int) -> Row:
    """Sweep a wrong build: the row is ok when the sweep finds lines missing."""
    with tempfile.TemporaryDirectory(prefix="prove-mutant-") as directory:
        row = sweep(seed, kills, least_hits=0, path=mutant.build(Path(directory, "agent")))
    missing = Found.total(row.found).lines.missing
    caught = Row("", notes=[f"the sweep finds {missing} lines missing, as it must"])
    return caught if missing else Row("", problems=[f"the sweep does not notice that {mutant.name}"])
