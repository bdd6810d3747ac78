"""Replay of files to an endpoint: in order, every problem reported, stopped if the endpoint fails."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tailspan.config.signals import SIGNALS
from tailspan.testing import FakeClock
from tailspan_agent.commands.replay import ReplayResult, replay
from tailspan_agent.errors import ExportRejectedError
from tailspan_agent.exporter.dead_letter import DeadLetter
from tailspan_agent.exporter.file import FileExporter
from tailspan_agent.exporter.protocol import Exporter
from tailspan_agent.otlp.json_lines import encode_line
from tests.fakes.collector import Collector, Reply
from tests.fakes.otlp_samples import exporter_to, logs_payload, metrics_payload, payload_of, traces_payload


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver that accepts everything unless scripted otherwise."""
    with Collector() as collector:
        yield collector


def run(collector: Collector, *paths: Path, signals: tuple[str, ...] = SIGNALS, **keys: Any) -> ReplayResult:
    """Replay files as ``tailspan agent replay`` does."""

    async def replay_all() -> ReplayResult:
        exporters: dict[str, Exporter] = {name: exporter_to(collector.http_url, signal=name) for name in signals}
        try:
            return await replay(paths, exporters, clock=FakeClock(), **keys)
        finally:
            for exporter in exporters.values():
                await exporter.aclose()

    return asyncio.run(replay_all())


def write(path: Path, *lines: bytes) -> Path:
    """Write lines to a file."""
    path.write_bytes(b"".join(lines))
    return path


def bodies(collector: Collector) -> list[str]:
    """Return the bodies of all received log records."""
    return [row.body for row in collector.log_records()]


def test_files_of_files_mode_arrive(collector: Collector, tmp_path: Path) -> None:
    """The promise of files mode: write files now, send them to a backend later."""
    for signal in SIGNALS:
        exporter = FileExporter(signal, tmp_path, max_size=1 << 20, keep=3)
        asyncio.run(exporter.export(payload_of(signal), 1))
        asyncio.run(exporter.aclose())
    result = run(collector, *sorted(tmp_path.glob("*.jsonl")))
    assert (result.files, result.lines, result.delivered, result.ok) == (3, 3, 5, True)
    assert {request.signal: request.payload for request in collector.requests} == {s: payload_of(s) for s in SIGNALS}


def test_files_of_the_dead_letter_arrive(collector: Collector, tmp_path: Path) -> None:
    """The reject reason in the file is not sent."""
    letter = DeadLetter(tmp_path, max_bytes=1 << 20)
    asyncio.run(letter.add("logs", logs_payload(3), kind="invalid", reason="HTTP 400", rejected=3, count=3))
    letter.close()
    result = run(collector, tmp_path / "logs.jsonl")
    assert (result.delivered, result.ok) == (3, True)
    assert collector.requests[0].payload == logs_payload(3)


def test_order_of_files_and_lines_is_kept(collector: Collector, tmp_path: Path) -> None:
    """One request at a time, also with retries in between."""
    first = write(tmp_path / "b", *(encode_line("logs", logs_payload(2, job=f"b{n}")) for n in range(3)))
    second = write(tmp_path / "a", encode_line("logs", logs_payload(1, job="a")))
    collector.script("logs", Reply(), Reply(503), Reply(503))
    seen: list[int] = []
    result = run(collector, first, second, progress=lambda result: seen.append(result.delivered))
    assert bodies(collector) == ["b0 0", "b0 1", "b1 0", "b1 1", "b2 0", "b2 1", "a 0"]
    assert seen == [2, 4, 6, 7]
    assert result.delivered == 7


def test_compressed_files(collector: Collector, tmp_path: Path) -> None:
    """Rotated files are often gzipped."""
    path = tmp_path / "logs.jsonl.gz"
    path.write_bytes(gzip.compress(encode_line("logs", logs_payload(2)) * 2))
    assert run(collector, path).delivered == 4


def test_bad_lines_are_reported_and_skipped(collector: Collector, tmp_path: Path) -> None:
    """An incomplete last line, garbage and invalid bytes do not affect other lines."""
    line = encode_line("logs", logs_payload(1))
    deep = b'{"arrayValue":{"values":[' * 60 + b'{"intValue":"1"}' + b"]}}" * 60
    nested = b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":' + deep + b"}]}]}]}\n"
    path = write(
        tmp_path / "f", line, b"garbage\n", b"\n", line, b"\xff\x00\n", nested, b"{}\n", line[: len(line) // 2]
    )
    result = run(collector, path)
    assert (result.delivered, result.bad_lines, result.ok) == (2, 5, False)
    numbers = [problem.removeprefix(f"{path}:").split(":")[0] for problem in result.problems]
    assert numbers == ["2", "5", "6", "7", "8"]


def test_files_that_cannot_be_read_are_reported(collector: Collector, tmp_path: Path) -> None:
    """The other files are still sent."""
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(encode_line("logs", logs_payload(1)) * 300)[:-20])
    no_gzip = write(tmp_path / "no.gz", b"plain text")
    good = write(tmp_path / "good", encode_line("logs", logs_payload(1, job="good")))
    result = run(collector, tmp_path / "missing", tmp_path, cut, no_gzip, good)
    assert result.bad_lines == 4
    assert f"{tmp_path / 'missing'}:1: cannot be read: No such file or directory" in result.problems
    assert bodies(collector)[-1] == "good 0"


def test_rejected_lines_are_reported_and_skipped(collector: Collector, tmp_path: Path) -> None:
    """They stay in the replayed file; the replay continues."""
    path = write(tmp_path / "f", *(encode_line("logs", logs_payload(n, job=f"j{n}")) for n in (3, 1, 2)))
    collector.script("logs", Reply(), Reply(400, message="bad"), Reply(rejected=1, message="old"))
    result = run(collector, path)
    assert (result.delivered, result.rejected, result.ok) == (4, 2, False)
    assert result.problems == [
        f"{path}:2: 1 of 1 record rejected: HTTP 400: bad",
        f"{path}:3: 1 of 2 records rejected: old",
    ]


def test_endpoint_fault_stops(collector: Collector, tmp_path: Path) -> None:
    """The message has file and line, so that the user can resume there."""
    path = write(tmp_path / "f", *(encode_line("logs", logs_payload(2)) for _ in range(3)))
    collector.script("logs", Reply(), Reply(401, message="no token"))
    with pytest.raises(ExportRejectedError, match=rf"stopped at {path}:2 after 2 records: .*HTTP 401: no token"):
        run(collector, path)
    assert len(collector.requests) == 2


def test_endpoint_that_does_not_answer_stops(collector: Collector, tmp_path: Path) -> None:
    """A command does not retry without end."""
    path = write(tmp_path / "f", encode_line("logs", logs_payload(2)))
    collector.always("logs", Reply(503))
    with pytest.raises(ExportRejectedError, match="HTTP 503"):
        run(collector, path)
    assert len(collector.requests) > 3


def test_signals_without_an_exporter_are_skipped(collector: Collector, tmp_path: Path) -> None:
    """For example, Jaeger accepts traces only."""
    path = write(
        tmp_path / "f",
        encode_line("logs", logs_payload(2)),
        encode_line("traces", traces_payload("a")),
        encode_line("metrics", metrics_payload()),
    )
    result = run(collector, path, signals=("traces",))
    assert (result.delivered, result.skipped, result.ok) == (1, 3, True)
    assert [request.signal for request in collector.requests] == ["traces"]


def test_long_lines_of_other_writers_are_split(collector: Collector, tmp_path: Path) -> None:
    """One line of a collector's file may hold more than a receiver accepts in one request."""
    path = write(tmp_path / "f", encode_line("logs", logs_payload(8, padding="x" * 1_000_000)))
    assert run(collector, path).delivered == 8
    assert [body.split("x")[0] for body in bodies(collector)] == [f"job {index}" for index in range(8)]
    assert max(len(request.payload) for request in collector.requests) <= 3 << 20
