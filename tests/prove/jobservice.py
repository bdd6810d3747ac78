"""Faults of the job service: every line that it returns in the end arrives, as it returned it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.job_api import HANG, HTML, RESET, TRUNCATED, Fault, status_fault
from tests.prove.jobs import Job, NumberedJob
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Found, Settings, World

_LINES = 200
_HOUR_MS = 3_600_000
_SOON = 'timeout = "1s"'
_EMPTY = Fault("reply", 200, b"[]")
_LATE = 'late_window = "2s"'


def _write(world: World, jobs: Sequence[NumberedJob]) -> None:
    for _ in range(4):
        for job in jobs:
            job.write(_LINES, world.random)
        time.sleep(0.7)


@dataclass(frozen=True)
class ServiceFault:
    """A fault of the job service.

    Attributes:
        name: The row's name.
        faults: Each of them spoils a number of requests of every kind.
        times: How many requests each of the faults spoils.
        write: Lets the jobs write: 800 lines each, over some seconds.
        act: Done when they have written, before they end.
        settings: Of the world.
        timeout_s: How long it may take until all is relayed.
        check: Returns what else is wrong, in words.
    """

    name: str
    faults: Sequence[Fault] = ()
    times: int = 6
    write: Callable[[World, Sequence[NumberedJob]], None] = _write
    act: Callable[[World], object] = lambda world: None
    settings: Settings = field(default_factory=Settings)
    timeout_s: float = 120.0
    check: Callable[[World, Found], list[str]] = lambda world, found: []

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed, self.settings) as world:
            jobs = [world.fused_job(f"fused-{number}") for number in range(3)]
            world.configure()
            for job in jobs:
                job.write(_LINES, world.random)
            world.start()
            world.until(lambda: all(job.handed for job in jobs), "the first lines")
            for fault in self.faults:
                for verb in ("logs", "status", "list"):
                    world.api.fault(fault, on=verb, times=self.times)  # type: ignore[arg-type]
            self.write(world, jobs)
            self.act(world)
            found = world.finish(self.timeout_s)
            return Row(self.name, [found], self.check(world, found))


def out_of_order(world: World, jobs: Sequence[NumberedJob]) -> None:
    """Lines whose times go back and forth by up to a second, in the order of writing."""
    world.api._sort = False
    for _ in range(4):
        for job in jobs:
            now_ms = int(time.time() * 1000)
            for _ in range(_LINES):
                job.line(now_ms + world.random.randint(-500, 500))
        time.sleep(0.7)


def one_millisecond(world: World, jobs: Sequence[NumberedJob]) -> None:
    """10,000 lines with one time, of each job, in two portions."""
    now_ms = int(time.time() * 1000)
    for _ in range(2):
        for job in jobs:
            for _ in range(5000):
                job.line(now_ms)
        time.sleep(1.5)


def visible_late(world: World, jobs: Sequence[NumberedJob]) -> None:
    """A tenth of the lines becomes visible up to 5 s after it was written."""
    for _ in range(4):
        for job in jobs:
            now_ms = int(time.time() * 1000)
            for number in range(_LINES):
                late_s = world.random.uniform(0.1, 5.0) if world.random.random() < 0.1 else 0.0
                job.line(now_ms + number, visible_after_s=late_s)
        time.sleep(0.7)
    time.sleep(5.0)


def visible_after_the_window(world: World, jobs: Sequence[NumberedJob]) -> None:
    """Some lines become visible long after any window: the final read finds them."""
    for job in jobs:
        now_ms = int(time.time() * 1000)
        for number in range(_LINES):
            job.line(now_ms + number * 50, visible_after_s=6.0 if number % 20 == 0 else 0.0)
    time.sleep(6.5)


def equal_lines(world: World, jobs: Sequence[NumberedJob]) -> None:
    """Each third line is really two or three, equal in text and time."""
    for _ in range(4):
        for job in jobs:
            now_ms = int(time.time() * 1000)
            for number in range(_LINES):
                job.line(now_ms + number // 7, copies=world.random.choice((1, 1, 2, 3)) if number % 3 == 0 else 1)
        time.sleep(0.7)


def clock_steps(world: World, jobs: Sequence[NumberedJob]) -> None:
    """The clock of one job goes back an hour, that of another on; the third's goes on and back."""
    world.api._sort = False
    for job, steps_ms in zip(jobs, ((0, -_HOUR_MS), (0, _HOUR_MS), (0, _HOUR_MS, 0)), strict=True):
        for step_ms in steps_ms:
            now_ms = int(time.time() * 1000) + step_ms
            for number in range(_LINES):
                job.line(now_ms + number)
            world.until(lambda job=job: job.handed == job.written, "a read of all lines")
    time.sleep(1.5)


def token_renewed(world: World) -> None:
    """The token is not accepted any more; some seconds later its file has a new one."""
    world.api.authorizations = {"Fused-Env-Bearer new"}
    time.sleep(4.0)
    (world.home / "token").write_text("new\n")


def renewed(world: World, found: Found) -> list[str]:
    """Both tokens must have been tried after the old one had expired."""
    used = {request.headers.get("Authorization") for request in world.api.requests}
    wanted = {"Fused-Env-Bearer old", "Fused-Env-Bearer new"}
    return [] if used == wanted else [f"the requests had {used}"]


def deleted(world: World) -> None:
    """A job is deleted in mid-follow, when all its lines were handed out."""
    job = world.jobs[0]
    world.until(lambda: world.acked(job) == job.written, "all lines")
    del world.api.jobs[job.name]
    job.ended = True


def terminal_early(world: World) -> None:
    """The jobs are Done, and 200 lines come after that, in portions."""
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        job.end()
    for _ in range(5):
        for job in world.jobs:
            job.write(40, world.random)
        time.sleep(0.3)


def flaps(world: World) -> None:
    """The state goes to and fro between Running, Done and Failed, while lines go on."""
    for state in ("Done", "Running", "Failed", "Running", "Done", "Running"):
        for job in world.jobs:
            assert isinstance(job, NumberedJob)
            job.becomes(state)
            job.write(20, world.random)
        time.sleep(0.5)


def runs_again(world: World) -> None:
    """The jobs are Done, their spans and receipts are written; then they run again and write on."""
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        job.end()
    world.until(world.all_done, "the first end of all jobs")
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        job.becomes("Running")
        job.write(_LINES, world.random)
    _all_acked(world)
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        job.becomes("Done")
    world.until(lambda: all(_receipts(world, job) == 2 for job in world.jobs), "the second end of all jobs")


def visible_after_the_receipt(world: World) -> None:
    """All is relayed and receipted; lines become visible that the jobs had written at their end."""
    for job in world.jobs:
        assert isinstance(job, NumberedJob)
        job.end()
    world.until(world.all_done, "the end of all jobs")
    for job in world.jobs:
        job.write(_LINES, world.random)
    _all_acked(world)


def _receipts(world: World, job: Job) -> int:
    known = world.checkpoint(job)
    return int(json.loads(known.ledger)["receipts"]) if known is not None else 0


def _all_acked(world: World) -> None:
    world.until(lambda: all(world.acked(job) == job.written for job in world.jobs), "the lines that came later")


def byte_order_marks(world: World, jobs: Sequence[NumberedJob]) -> None:
    """Each reply begins with one."""
    world.api.before_json = b"\xef\xbb\xbf"
    _write(world, jobs)


def odd_lists(world: World) -> None:
    """The list shuffles its rows, shows some twice and others not, while jobs are added."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = [row for row in rows if world.random.random() > 0.2]
        shown += world.random.sample(rows, min(2, len(rows)))
        world.random.shuffle(shown)
        return shown

    world.api.change_rows = change
    for number in range(6):
        world.fused_job(f"added-{number}").write(_LINES, world.random)
        time.sleep(0.5)


def asked_again(fault: str, times: int) -> Callable[[World, Found], list[str]]:
    """The service must have been asked: else the fault was none."""
    return lambda world, found: [] if len(world.api.requests) > times else [f"{fault}: it was not asked often enough"]


def _all_at_once(name: str, *faults: Fault, settings: Settings | None = None, times: int = 6) -> ServiceFault:
    return ServiceFault(name, faults, times, settings=settings or Settings(), check=asked_again(name, times))


FAULTS = (
    _all_at_once("job service: 500, 502, 503", status_fault(500), status_fault(502), status_fault(503), times=4),
    _all_at_once("job service: 429 with Retry-After", status_fault(429, headers={"Retry-After": "1"}), times=4),
    _all_at_once("job service: timeouts", HANG, settings=Settings(fused=_SOON), times=3),
    _all_at_once("job service: resets", RESET, times=8),
    _all_at_once("job service: truncated JSON", TRUNCATED, times=8),
    _all_at_once("job service: HTML", HTML),
    _all_at_once("job service: empty pages", _EMPTY),
    ServiceFault("job service: lines out of order", write=out_of_order),
    ServiceFault("job service: 10,000 lines in one millisecond", write=one_millisecond),
    ServiceFault("job service: lines visible late (to 5 s)", write=visible_late),
    ServiceFault(
        "job service: lines visible after the window", write=visible_after_the_window, settings=Settings(watch=_LATE)
    ),
    ServiceFault(
        "job service: lines visible late (to 5 s), without a final read",
        write=visible_late,
        settings=Settings(watch="final_read = false"),
    ),
    ServiceFault("job service: equal lines that are two", write=equal_lines),
    ServiceFault("job service: clock steps of an hour", write=clock_steps),
    ServiceFault("job service: token expired and renewed", act=token_renewed, check=renewed),
    ServiceFault("job service: job deleted in mid-follow", act=deleted),
    ServiceFault("job service: terminal before the last lines", act=terminal_early),
    ServiceFault("job service: status that flaps", act=flaps),
    ServiceFault("job service: runs again after its end", act=runs_again),
    ServiceFault("job service: lines visible after the receipt", act=visible_after_the_receipt),
    ServiceFault("job service: a byte order mark before each reply", write=byte_order_marks),
    ServiceFault("job service: list that repeats and misses rows", act=odd_lists),
)
