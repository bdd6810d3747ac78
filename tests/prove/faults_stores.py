"""Limits of real stores, on their doubles: a default Loki and Tempo get every line, and nothing stops for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import httpx

from tests.fakes.collector import Reply, Request
from tests.fakes.loki import MIB, Limits, Loki
from tests.fakes.tempo import ATTRIBUTE_BYTES, Tempo
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.tally import line_text
from tests.prove.world import PATIENCE_S, Settings, World

_HOUR_MS = 3_600_000
_LOST_ANSWERS = 4
_NOT_READY = 503
_LINE_BYTES = Limits().line_bytes
_STORED_BYTES = 700
"""The most that a short line takes in the store, with its attributes."""


@dataclass(frozen=True)
class LokiFault:
    """Jobs whose lines go into a Loki.

    Attributes:
        name: The row's name.
        jobs: Adds the jobs and their lines, before the agent starts.
        limits: What the Loki accepts.
        lost_answers: Number of requests that it stores without an answer.
        act: Done after the start.
        rejected: Number of lines that it must reject; all others must be stored.
        dead: Number of records that must be in the dead letter: these lines, and receipts of their times.
        one_name: Whether the jobs have one name, so that the runs cannot be counted by job.
        change: Changes the text of the configuration.
        in_time: Whether the store is the limit: its rate decides how long the row may take, in three times.
        again: Whether a line that is sent again may go to another stream, where the store has it twice.
    """

    name: str
    jobs: Callable[[World], object]
    limits: Limits = field(default_factory=Limits)
    lost_answers: int = 0
    act: Callable[[World], object] = lambda world: None
    rejected: int = 0
    dead: int = 0
    one_name: bool = False
    change: Callable[[str], str] = str
    in_time: bool = False
    again: bool = False

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        loki, lost = Loki(self.limits), 0

        def answer(request: Request) -> Reply:
            nonlocal lost
            reply = loki(request)
            lost += 1
            return Reply(cut="answer") if lost <= self.lost_answers else reply

        with World(seed) as world:
            self.jobs(world)
            world.collector.always("logs", answer)
            world.configure(self.change)
            world.start()
            self.act(world)
            found = world.finish(self._timeout_s(world))
            names = tuple(f"{job.name} " for job in world.jobs)
        own = [line for line in loki.lines() if line.startswith(names)]
        stored = len(set(own)) if self.again else len(own)
        expected = found.lines.expected - self.rejected
        problems = [] if stored == expected else [f"{stored} of {expected} lines in the store: {dict(loki.rejected)}"]
        if found.dead_lettered != self.dead:
            problems.append(f"{found.dead_lettered} records in the dead letter")
        if self.one_name:
            found.wrong_runs = [text for text in found.wrong_runs if " runs instead of " not in text]
        notes = [f"the store's rate allows it in {loki.allowed_s:.0f} s; the store refused {dict(loki.rejected)}"]
        return Row(self.name, [found], problems, notes=notes)

    def _timeout_s(self, world: World) -> float:
        lines = sum(job.written for job in world.jobs)
        return PATIENCE_S + (3 * lines * _STORED_BYTES / self.limits.rate_bytes_s if self.in_time else 0.0)


def _bursts(world: World, *, jobs: int, lines: int, fill: str = "x", pad: int = 0) -> None:
    for number in range(jobs):
        world.fused_job(f"burst-{number}", fill=fill).write(lines, world.random, pad=pad)


def _overlapping(world: World, *, jobs: int, lines: int) -> None:
    """Add runs of two hours, four hours ago."""
    start_ms = int(time.time() * 1000) - 4 * _HOUR_MS
    for number in range(jobs):
        _run_of_etl(world, number, start_ms, lines, 2 * _HOUR_MS)


def _uneven(world: World) -> None:
    """Add overlapping runs of one name, of very different lengths."""
    start_ms = int(time.time() * 1000) - 5 * _HOUR_MS
    for number, lines in enumerate((1, 11_000, 17, 3_000, 1, 500, 11_000)):
        _run_of_etl(world, number, start_ms + world.random.randrange(_HOUR_MS), lines, world.random.randrange(_HOUR_MS))


def _run_of_etl(world: World, number: int, start_ms: int, lines: int, length_ms: int) -> None:
    job = world.fused_job(f"run-{number}", start_ms=start_ms)
    job.fake.becomes("Running", from_status=0)
    job.fake._status()["job_name"] = "etl"
    job.fake.row["job_name"] = "etl"
    for step in range(lines):
        job.line(start_ms + step * length_ms // lines)


def _one_too_old(world: World) -> None:
    week_ago_ms = int(time.time() * 1000) - 8 * 24 * _HOUR_MS
    world.fused_job("old").line(week_ago_ms)
    _bursts(world, jobs=12, lines=100)


def _among_others(world: World) -> None:
    """Add old overlapping runs beside jobs of now: Loki reports only what it rejects of a request's last stream."""
    _overlapping(world, jobs=3, lines=240)
    _bursts(world, jobs=12, lines=100)


def _largest_lines(world: World) -> None:
    job = world.fused_job("largest")
    for size in (_LINE_BYTES - 1024, _LINE_BYTES - 1, _LINE_BYTES, 10, _LINE_BYTES, *[200_000] * 40):
        now_ms = int(time.time() * 1000) - 1000
        job.line(now_ms, pad=max(0, size - len(line_text(job.name, 0, " ")) + 1))


def _wide_attributes(text: str) -> str:
    return f'{text}[otlp.resource]\nteam = "{"x" * 200}"\n'


def _killed(world: World) -> None:
    world.until(lambda: any(request.signal == "logs" for request in world.collector.requests), "a request of logs")
    world.kill()
    world.ended()
    world.start()


LOKI_FAULTS = (
    LokiFault("Loki: 30,000 lines above the size of its messages", partial(_bursts, jobs=1, lines=30_000)),
    LokiFault("Loki: 20 jobs of 20,000 lines", partial(_bursts, jobs=20, lines=20_000), in_time=True),
    LokiFault(
        "Loki: 300,000 lines with 200 bytes of attributes",
        partial(_bursts, jobs=1, lines=300_000),
        change=_wide_attributes,
        in_time=True,
    ),
    LokiFault(
        "Loki: 64 jobs at once, in wide characters",
        partial(_bursts, jobs=64, lines=500, fill="ü語😀", pad=40),
        in_time=True,
    ),
    LokiFault("Loki: lines of its largest size", _largest_lines, in_time=True),
    LokiFault(
        "Loki: batches above its burst",
        partial(_bursts, jobs=2, lines=10_000),
        Limits(rate_bytes_s=2.0 * MIB, burst_bytes=2 * MIB, message_bytes=64 * MIB),
    ),
    LokiFault(
        "Loki: overlapping jobs of one name after hours", partial(_overlapping, jobs=3, lines=240), one_name=True
    ),
    LokiFault("Loki: 12 overlapping jobs of one name", partial(_overlapping, jobs=12, lines=400), one_name=True),
    LokiFault(
        "Loki: overlapping jobs of unequal length, and a kill",
        _uneven,
        one_name=True,
        act=_killed,
        in_time=True,
        again=True,
    ),
    LokiFault("Loki: a line that is too old, among others", _one_too_old, rejected=1, dead=2),
    LokiFault("Loki: lines that it drops without an error", _among_others, one_name=True),
    LokiFault(
        "Loki: lines that were stored are sent again",
        partial(_bursts, jobs=2, lines=3_000),
        lost_answers=_LOST_ANSWERS,
        act=_killed,
    ),
    LokiFault(
        "Loki: more job names than it has streams for",
        partial(_bursts, jobs=40, lines=5),
        Limits(streams=12),
        change=lambda text: text.replace("max_pipeline_names", "max_log_names = 10\nmax_pipeline_names"),
    ),
)


def _ended_job(world: World, lines: Sequence[str], state: str) -> None:
    """Add a job with lines of any text, which the oracle does not count."""
    now_ms = int(time.time() * 1000) - 10_000
    job = world.api.add_job("j1", name="etl")
    job.row["creation_date"] = datetime.now(UTC).isoformat()
    for number, line in enumerate(lines):
        job.line(line, now_ms + number)
    job.becomes(state, from_status=0)


def _stop(world: World) -> list[str]:
    world.terminate()
    code = world.ended()
    return [f"the agent's exit code is {code}"] if code else []


def _long_stack_trace(seed: str) -> Row:
    """Return whether a default Tempo keeps the end of a long stack trace."""
    frames = [line for number in range(150) for line in (f'  File "/app/m{number}.py", line 1, in f', "    call()")]
    lines = ["Traceback (most recent call last):", *frames, "ValueError: the last line"]
    tempo = Tempo()
    with World(seed) as world:
        world.collector.always("traces", tempo)
        _ended_job(world, lines, "Failed")
        world.configure()
        world.start()
        world.until(lambda: any(span.name == "RUN etl" for span in tempo.spans()), "the run span")
        problems = _stop(world)
    stacks = [event.attributes.get("exception.stacktrace", "") for span in tempo.spans() for event in span.events]
    stacks = [stack for stack in stacks if stack]
    good = [stack for stack in stacks if stack.endswith("ValueError: the last line") and "m149.py" in stack]
    if len(good) != 1 or any(len(stack.encode()) > ATTRIBUTE_BYTES for stack in stacks):
        problems.append(f"the store has {stacks}")
    return Row("", [], problems)


def _end_in_an_outage(seed: str) -> Row:
    """Return whether the run span is silent on a delivery that is unknown, and the receipt has it later."""
    with World(seed) as world:
        world.collector.always("logs", Reply(503))
        _ended_job(world, ["a", "b"], "Done")
        world.configure()
        world.start()
        spans = world.until(
            lambda: [span for span in world.collector.spans() if span.name == "RUN etl"], "the run span"
        )
        unknown = ("tailspan.logs.complete", "tailspan.records.acked")
        problems = [f"the run span has {key}" for key in unknown if key in spans[0].attributes]
        world.collector.always("logs", Reply())
        receipts = world.until(
            lambda: [row for row in world.collector.log_records() if row.event_name == "tailspan.receipt"], "a receipt"
        )
        found = receipts[0].attributes
        if not found["tailspan.logs.complete"] or found["tailspan.records.acked"] != len("ab"):
            problems.append(f"the receipt has {found}")
        problems += _stop(world)
    return Row("", [], problems)


def _traces_only(seed: str) -> Row:
    """Return whether spans go out at once while an endpoint does not have logs, and the lines once it has them."""
    name = "endpoint without logs and metrics"
    with World(seed) as world:
        for signal in ("logs", "metrics"):
            world.collector.always(signal, Reply(404))
        for number in range(3):
            job = world.fused_job(f"long-{number}")
            job.write(20_000, world.random)
            job.end()
        world.configure()
        world.start()
        problems = []
        try:
            world.until(lambda: _run_spans(world) == len(world.jobs), "the run span of each job")
        except TimeoutError as error:
            problems.append(str(error))
        for signal in ("logs", "metrics"):
            world.collector.always(signal, Reply())
        found = world.finish(2 * PATIENCE_S)
    return Row(name, [found], problems)


def _run_spans(world: World) -> int:
    return sum(span.name.startswith("RUN ") for span in world.collector.spans())


def _known_outage(seed: str) -> Row:
    """Return whether /readyz reports an outage, with its beginning and its reason, and the end of it."""
    name = "logs endpoint down, as /readyz reports it"

    def ready() -> tuple[int, str]:
        with httpx.Client(trust_env=False) as client:
            answer = client.get(f"{world.page_url}/readyz")
            return answer.status_code, answer.text

    with World(seed, Settings(page=True)) as world:
        world.collector.always("logs", Reply(503))
        world.fused_job("waiting").write(100, world.random)
        world.configure()
        world.start()
        world.until(lambda: bool(world.collector.requests), "a request")
        problems = []
        try:
            world.until(lambda: ready()[0] == _NOT_READY, "503 of /readyz")
            if not re.search(r"endpoint_logs_retrying since \S+Z, \d+ tries: HTTP 503", ready()[1]):
                problems.append(f"/readyz returns {ready()[1]!r}")
        except TimeoutError as error:
            problems.append(str(error))
        world.collector.always("logs", Reply())
        found = world.finish(2 * PATIENCE_S)
    return Row(name, [found], problems)


def scenarios() -> list[Scenario]:
    """Return the rows."""
    return [
        *(fault.scenario() for fault in LOKI_FAULTS),
        Scenario("Tempo: a stack trace above the size of its attributes", _long_stack_trace),
        Scenario("logs endpoint down over the end of a job", _end_in_an_outage),
        Scenario("logs endpoint down, as /readyz reports it", _known_outage),
        Scenario("endpoint without logs and metrics", _traces_only),
    ]
