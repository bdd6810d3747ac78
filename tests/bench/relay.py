"""W1, W2, W7: what it costs to relay the lines of ended jobs, locally and over the job API."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tailspan._plural import plural
from tests.bench.agents import Plan, relay_once
from tests.bench.folders import add_real, make_store, text_bytes
from tests.bench.job_server import SERVING, base_url
from tests.bench.measure import Usage, alternate, cpu_of, run, started
from tests.bench.receiver import Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row

__all__ = ["growth", "local", "over_http"]

_LINES = 10_000
_USUAL_SHARE = 20
_KINDS = ("none", "gzip", "zstd", "gRPC")
_SLOPE_GOAL = {"none": Goal(1.1), "gzip": Goal(2.5)}
_WHOLE_GOAL = {"none": Goal(1.6), "gzip": Goal(3.0)}
_OVER_HTTP_GOAL = {"W2 none": Goal(3), "W2 gzip": Goal(5), "W2 plain, none": Goal(2), "W2 plain, gzip": Goal(5)}
_AGAINST_NONE_GOAL = {"zstd": Goal(1.1), "gRPC": Goal(1.1)}


class _Counted:
    """Runs whose records are counted: a run that lost or repeated lines is no measurement."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.requests: dict[str, tuple[int, int]] = {}

    def relay(self, plan: Plan, lines: int, case: str) -> Usage:
        """Relay once."""
        usage = relay_once(plan)
        self.check(lines, case)
        return usage

    def usual(self, files: list[Path], lines: int, compression: str, case: str) -> Usage:
        """Send the lines of files in the usual way."""
        command = [sys.executable, "-m", "tests.bench.usual_way", self._receiver.http_url, compression]
        usage = run([*command, *map(str, files)])
        self.check(lines, case)
        return usage

    def check(self, lines: int, case: str) -> None:
        """Take what was received, and compare."""
        counts = self._receiver.counts()
        self.requests[case] = counts["requests"], counts["bytes"]
        if counts["records"] != lines:
            raise RuntimeError(f"{case}: {counts['records']} records came of {lines} lines")


def local(scale: Scale, directory: Path) -> Iterator[Row]:
    """W1: 100 ended local jobs x 10,000 lines, once and four times; the usual Python way in the same run."""
    jobs, lines = scale.of(100), _LINES
    one, four = make_store(directory / "one", jobs, lines), make_store(directory / "four", 4 * jobs, lines)
    each = make_store(directory / "each", jobs, lines // 10, how="each")
    usual_files = sorted(one.glob("jobs/*/log"))[: max(1, jobs // _USUAL_SHARE)]
    with receiving(directory) as receiver:
        counted = _Counted(receiver)
        cases: dict[str, Callable[[], Usage]] = {}
        for kind in _KINDS:
            keys = {
                "protocol": "grpc" if kind == "gRPC" else "http/protobuf",
                "compression": "none" if kind == "gRPC" else kind,
                "endpoint": receiver.grpc_url if kind == "gRPC" else receiver.http_url,
            }
            name, name4 = f"W1 {kind}", f"W1 {kind}, four times"
            small = Plan(directory=directory / f"{kind}-1", store=one, **keys)
            large = Plan(directory=directory / f"{kind}-4", store=four, **keys)
            cases[name] = partial(counted.relay, small, jobs * lines, name)
            cases[name4] = partial(counted.relay, large, 4 * jobs * lines, name4)
            if kind == "none":
                pure = dataclasses.replace(small, directory=directory / f"{kind}-python", in_python=True)
                in_python = f"{name}, framed in Python"
                cases[in_python] = partial(counted.relay, pure, jobs * lines, in_python)
            if kind in ("none", "gzip"):
                usual = f"{name}, usual Python way"
                cases[usual] = partial(counted.usual, usual_files, len(usual_files) * lines, kind, usual)
                cases[f"{usual}, no lines"] = partial(counted.usual, [], 0, kind, "start")
        plan = Plan(directory=directory / "each-agent", store=each, endpoint=receiver.http_url)
        by_line = "W1 none, jobs wrote line by line"
        cases[by_line] = partial(counted.relay, plan, jobs * (lines // 10), by_line)
        found = alternate(cases, scale.times)
        for kind in _KINDS:
            yield from _relayed(kind, found, counted, jobs * lines, len(usual_files) * lines)
        yield _cost(by_line, jobs * (lines // 10), found[by_line], counted)
    yield from _on_disk(scale, directory, {"whole": one, "each": each})
    shutil.rmtree(four)


def _relayed(kind: str, found: dict[str, Usage], counted: _Counted, lines: int, usual_lines: int) -> Iterator[Row]:
    """Yield the rows of one way to send.

    Args:
        kind: ``gRPC``, or the compression over HTTP.
        found: What each case used up.
        counted: The requests of each case.
        lines: Number of lines that the agent relayed once.
        usual_lines: Number of lines that were sent in the usual Python way.
    """
    name = f"W1 {kind}"
    name4, in_python, usual = f"{name}, four times", f"{name}, framed in Python", f"{name}, usual Python way"
    whole = found[name].cpu_s / lines * 1e6
    slope = (found[name4].cpu_s - found[name].cpu_s) / (3 * lines) * 1e6
    yield _cost(name, lines, found[name], counted, whole, _WHOLE_GOAL.get(kind))
    yield _cost(name4, 4 * lines, found[name4], counted)
    yield Row(case=f"{name}, slope", figure=slope, unit="us", goal=_SLOPE_GOAL.get(kind))
    peak = max(found[name].rss, found[name4].rss) / MIB
    yield Row(case=f"{name}, peak memory", figure=peak, unit="MiB", goal=Goal(120))
    if kind != "none":
        against = found[name].cpu_s / found["W1 none"].cpu_s
        yield Row(case=f"{name}, against none", figure=against, unit="x", goal=_AGAINST_NONE_GOAL.get(kind))
    if in_python in found:
        yield _cost(in_python, lines, found[in_python], counted)
    if usual in found:
        # It sends fewer lines, so that the run does not last for hours: its start is measured separately.
        begun_s = found[f"{usual}, no lines"].cpu_s
        per_line = (found[usual].cpu_s - begun_s) / usual_lines * 1e6
        yield _cost(usual, usual_lines, found[usual], counted)
        cheaper = f"{name}, a further line: times cheaper"
        yield Row(case=cheaper, figure=per_line / slope, unit="x", goal=Goal(60, at_least=True))
        as_many = per_line + begun_s / lines * 1e6
        yield Row(case=f"{name}, with the start: times cheaper", figure=as_many / whole, unit="x")


def _on_disk(scale: Scale, directory: Path, stores: dict[str, Path]) -> Iterator[Row]:
    """Yield the size of stored logs, and the supervisor's CPU time a line, by how the jobs write."""
    for how, store in stores.items():
        text, files = text_bytes(store)
        yield Row(case=f"W1 disk, written {how}", figure=files / text, unit="x", goal=Goal(1.3))
        noted = []
        count = scale.of(1_000_000)
        for number in range(scale.times):
            note = directory / f"{how}-{number}.json"
            options = how, "--warm", str(directory / "scratch"), "--supervisor", str(note)
            add_real(directory / "supervised", count, *options)
            shutil.rmtree(directory / "supervised", ignore_errors=True)
            noted.append(json.loads(note.read_text())["cpu_ns"] / count / 1000)
        noted.sort()
        yield Row(case=f"W1 supervisor, written {how}", figure=noted[len(noted) // 2], unit="us", goal=Goal(0.3))


def over_http(scale: Scale, directory: Path) -> Iterator[Row]:
    """W2: the same jobs over the job API (`tailspan serve`) and the Fused service; plain: as of any other server."""
    jobs, lines = scale.of(100), _LINES
    store = make_store(directory / "jobs", jobs, lines)
    server = [sys.executable, "-m", "tests.bench.job_server", str(store)]
    with (
        receiving(directory) as receiver,
        started(server, log=directory / "server.log", says=SERVING) as own,
        started([*server, "--plain"], log=directory / "plain.log", says=SERVING) as plain,
    ):
        counted = _Counted(receiver)
        server_s: dict[str, list[float]] = {}

        def relay(plan: Plan, case: str, server: int) -> Usage:
            before = cpu_of(server)
            usage = counted.relay(plan, jobs * lines, case)
            server_s.setdefault(case, []).append(cpu_of(server) - before)
            return usage

        beside = Plan(directory=directory / "local", store=store, endpoint=receiver.http_url)
        cases = {"W2 beside it: local, none": lambda: counted.relay(beside, jobs * lines, "W2 beside it: local, none")}
        for case, kind, (pid, said) in (
            ("W2 none", "none", own),
            ("W2 gzip", "gzip", own),
            ("W2 plain, none", "none", plain),
            ("W2 plain, gzip", "gzip", plain),
        ):
            plan = Plan(
                directory=directory / case,
                base_url=base_url(said),
                endpoint=receiver.http_url,
                compression=kind,
                requests_per_second=1000,
            )
            cases[case] = lambda p=plan, c=case, s=pid: relay(p, c, s)
        found = alternate(cases, scale.times)
        for case, usage in found.items():
            per_line = usage.cpu_s / (jobs * lines) * 1e6
            goal = _OVER_HTTP_GOAL.get(case)
            yield _cost(case, jobs * lines, usage, counted, per_line, goal)
        for case, spent_s in (("W2", server_s["W2 none"]), ("W2 plain", server_s["W2 plain, none"])):
            share = statistics.median(spent_s) / (jobs * lines) * 1e6
            yield Row(case=f"{case}, server's share", figure=share, unit="us", goal=Goal(0.5))
        ratio = found["W2 none"].cpu_s / found["W2 beside it: local, none"].cpu_s
        yield Row(case="W2 none, against local", figure=ratio, unit="x")


def growth(scale: Scale, directory: Path) -> Iterator[Row]:
    """W7: more jobs, and more lines in each: the cost of a further line and the memory should stay."""
    more_lines = ((0, 1), (3, 4), (5, 6))
    ten_times_the_jobs = ((1, 2), (2, 3), (3, 5), (4, 6))
    shapes = [(1, 10_000), (1, 1_000_000), (10, 100_000), (100, 10_000), (100, 100_000), (1000, 1_000), (1000, 10_000)]
    with receiving(directory) as receiver:
        counted = _Counted(receiver)
        found: dict[int, Usage] = {}
        slopes, peaks = [], []
        for number, (jobs, full) in enumerate(shapes):
            lines = scale.of(full)
            store = make_store(directory / f"jobs-{number}", jobs, lines)
            plan = Plan(directory=directory / f"agent-{number}", store=store, endpoint=receiver.http_url)
            case = f"W7 {jobs:,} x {lines:,}"
            found[number] = alternate(
                {case: lambda p=plan, n=jobs * lines, c=case: counted.relay(p, n, c)}, scale.times
            )[case]
            shutil.rmtree(store)
            yield _cost(case, jobs * lines, found[number], counted)
            peaks.append(found[number].rss / MIB)
        for small, large in more_lines:
            more = shapes[large][0] * scale.of(shapes[large][1]) - shapes[small][0] * scale.of(shapes[small][1])
            slopes.append((found[large].cpu_s - found[small].cpu_s) / more * 1e6)
            yield Row(
                case=f"W7 slope, {shapes[small][0]:,} {plural(shapes[small][0], 'job')}", figure=slopes[-1], unit="us"
            )
        yield Row(case="W7 slopes, largest to smallest", figure=max(slopes) / min(slopes), unit="x", goal=Goal(1.2))
        for what, pairs in (("more lines", more_lines), ("ten times the jobs", ten_times_the_jobs)):
            most = max(peaks[large] / peaks[small] for small, large in pairs)
            yield Row(case=f"W7 memory, {what}", figure=most, unit="x", goal=Goal(1.2))
        yield Row(case="W7 memory, largest to smallest", figure=max(peaks) / min(peaks), unit="x")


def _cost(
    case: str, lines: int, usage: Usage, counted: _Counted, figure: float | None = None, goal: Goal | None = None
) -> Row:
    requests, sent = counted.requests[case]
    unit = "us" if figure is not None else ""
    return Row(case=case, lines=lines, usage=usage, requests=requests, sent=sent, figure=figure, unit=unit, goal=goal)
