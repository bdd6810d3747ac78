"""W11, W12: what a short job costs: thousands that have ended, and twenty a second beside a running agent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tailspan.local.store import JobStore
from tests.bench.agents import Plan, relay_once, running
from tests.bench.folders import make_store
from tests.bench.holder import HeldJob
from tests.bench.measure import Usage, alternate, cpu_of, peak_rss
from tests.bench.receiver import Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row

__all__ = ["arriving", "ended"]

_LINES = 5
_JOBS_PER_S = 20
_SPEECH_S = 300.0
_WARM_S = 5.0
_PATIENCE_S = 30.0


def ended(scale: Scale, directory: Path) -> Iterator[Row]:
    """W11: 3,000 ended local jobs of 5 lines, relayed with ``--once``; the start of the agent is part of it."""
    jobs = scale.of(3_000)
    store = make_store(directory / "jobs", jobs, _LINES)
    with receiving(directory) as receiver:
        for kind in ("none", "gzip"):
            plan = Plan(directory=directory / kind, store=store, endpoint=receiver.http_url, compression=kind)
            counts: dict[str, Any] = {}

            def relay(plan: Plan = plan, counts: dict[str, Any] = counts) -> Usage:
                usage = relay_once(plan)
                counts.update(receiver.counts())
                if counts["records"] != jobs * _LINES:
                    raise RuntimeError(f"{counts['records']} records came of {jobs * _LINES} lines")
                return usage

            case = f"W11 {kind}"
            usage = alternate({case: relay}, scale.times)[case]
            sent, is_plain = counts["bytes"], kind == "none"
            yield Row(
                case=case, usage=usage, lines=jobs * _LINES, requests=counts["requests"], sent=sent,
                figure=usage.cpu_s / jobs * 1e3, unit="ms a job", goal=Goal(0.5) if is_plain else None,
            )  # fmt: skip
            yield Row(case=f"{case}, sent", figure=sent / jobs / 1e3, unit="kB a job", goal=Goal(2.0))


def arriving(scale: Scale, directory: Path) -> Iterator[Row]:
    """W12: 20 jobs a second beside a running agent; each starts, writes 5 lines, and ends after a tenth of a second."""
    seconds = _SPEECH_S * min(scale.factor, 1.0)
    with receiving(directory, ends=True) as receiver:
        plan = Plan(directory=directory / "agent", store=directory / "jobs", endpoint=receiver.http_url)
        jobs = _Jobs(JobStore(directory / "jobs"))
        with running(plan) as agent:
            jobs.run(_WARM_S)
            _ends(receiver, jobs.ended)
            jobs.ended, before_s, begun_s = 0, cpu_of(agent.pid), time.perf_counter()
            jobs.run(seconds)
            usage = Usage(cpu_of(agent.pid) - before_s, time.perf_counter() - begun_s, peak_rss(agent.pid))
            counts = _ends(receiver, jobs.ended)
    if counts["records"] != jobs.ended * _LINES:
        raise RuntimeError(f"W12: {counts['records']} records came of {jobs.ended * _LINES} lines")
    yield Row(
        case="W12 20 jobs/s", usage=usage, lines=counts["records"], requests=counts["requests"], sent=counts["bytes"],
        figure=usage.cpu_s / usage.wall_s * 100, unit="% of a core", goal=Goal(5),
    )  # fmt: skip
    yield Row(case="W12 20 jobs/s, peak memory", figure=usage.rss / MIB, unit="MiB")
    for kind in ("run_span", "receipt"):
        ages = sorted(counts[f"{kind}_ages_ms"])
        p99 = ages[min(len(ages) - 1, len(ages) * 99 // 100)]
        yield Row(case=f"W12 {kind.replace('_', ' ')} after the end, p99", figure=p99, unit="ms", goal=Goal(1000))


class _Jobs:
    """Jobs that start, write their lines and end, without their processes.

    Attributes:
        ended: The number of jobs that have ended.
    """

    def __init__(self, store: JobStore) -> None:
        self.ended = 0
        self._store = store
        self._numbers = count()

    def run(self, seconds: float) -> None:
        """Start a job in each twentieth of a second; it writes its lines in the next one, and ends in that after it."""
        started: HeldJob | None = None
        written: HeldJob | None = None
        begun_s = time.monotonic()
        starts = round(seconds * _JOBS_PER_S)
        for tick in range(starts + 2):
            if written is not None:
                written.end()
                self.ended += 1
            if started is not None:
                for _ in range(_LINES):
                    started.say()
            written, started = started, HeldJob(self._store, next(self._numbers)) if tick < starts else None
            time.sleep(max(0.0, begun_s + (tick + 1) / _JOBS_PER_S - time.monotonic()))


def _ends(receiver: Receiver, jobs: int) -> dict[str, Any]:
    """Wait until the run spans and receipts of a number of jobs came; return all counts since the last call."""
    total: dict[str, Any] = {}
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        for name, value in receiver.counts().items():
            total[name] = total[name] + value if name in total else value
        if all(len(total[f"{kind}_ages_ms"]) >= jobs for kind in ("run_span", "receipt")):
            return total
        time.sleep(0.2)
    raise RuntimeError(f"W12: of {jobs} jobs came {len(total['run_span_ages_ms'])} run spans")
