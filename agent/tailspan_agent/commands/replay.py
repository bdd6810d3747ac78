"""Replay: send files of OTLP JSON lines (files mode, dead letter, a collector's) to an endpoint.

Lines are sent in order, one request at a time, so that a job's lines keep their order. Unreadable and rejected lines
are reported with file and line, and the replay continues. It stops if the endpoint fails permanently or does not
answer in time. The files are not changed, so that a stopped replay can simply run again: a backend recognises repeated
records by their ``log.record.uid``.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from tailspan._clock import Clock
from tailspan._plural import plural
from tailspan.config.signals import Signal
from tailspan_agent.errors import ExportRejectedError
from tailspan_agent.exporter.protocol import Exporter
from tailspan_agent.exporter.retry import RetryingExporter
from tailspan_agent.otlp.json_lines import UnreadableLineError, decode_line
from tailspan_agent.otlp.messages import DecodeError, count_records, parse_request, split_request

__all__ = ["ReplayResult", "replay"]

_MAX_LINE_BYTES: Final = 256 << 20
_MAX_REQUEST_BYTES: Final = 3 << 20
_MAX_PROBLEMS: Final = 100


@dataclass(slots=True)
class ReplayResult:
    """The result of a replay, or its progress so far.

    Attributes:
        files: Files read.
        lines: Lines read, without empty ones.
        delivered: Records delivered.
        rejected: Records that the endpoint rejected.
        skipped: Records of signals that are not sent to the endpoint.
        bad_lines: Unreadable lines and files.
        problems: ``file:line: problem`` of the first hundred unreadable or rejected lines.
    """

    files: int = 0
    lines: int = 0
    delivered: int = 0
    rejected: int = 0
    skipped: int = 0
    bad_lines: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every line was read and every record was delivered or skipped (exit code 0, otherwise 1)."""
        return not self.bad_lines and not self.rejected

    def add_bad_line(self, path: Path, line: int, problem: str) -> None:
        """Count and record an unreadable line."""
        self.bad_lines += 1
        self.add_problem(path, line, problem)

    def add_problem(self, path: Path, line: int, problem: str) -> None:
        """Record a problem of a line, up to the limit."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(f"{path}:{line}: {problem}")


async def replay(
    paths: Sequence[Path],
    exporters: Mapping[Signal, Exporter],
    *,
    progress: Callable[[ReplayResult], None] = lambda result: None,
    patience_s: float = 60.0,
    retry_server_errors: int = 10,
    clock: Clock | None = None,
) -> ReplayResult:
    """Send files of OTLP JSON lines, plain or ``.gz``, in the given order.

    Args:
        paths: The files.
        exporters: One per signal; lines of other signals are skipped and counted.
        progress: Called after each line with the result so far, which it must not change.
        patience_s: How long to retry while the endpoint does not answer, in seconds.
        retry_server_errors: See `tailspan_agent.exporter.retry.RetryingExporter`.
        clock: None means the real one.

    Returns:
        Counts and problems.

    Raises:
        ExportRejectedError: The endpoint fails permanently, or did not answer in time. The message names file and line.
    """
    result = ReplayResult()
    retrying = {
        signal: RetryingExporter(
            signal,
            exporter,
            _NotKept(),
            retry_server_errors=retry_server_errors,
            patience_s=patience_s,
            clock=clock,
        )
        for signal, exporter in exporters.items()
    }
    for path in paths:
        result.files += 1
        number = 0
        try:
            with _open(path) as file:
                while line := await asyncio.to_thread(_read_line, file):
                    number += 1
                    if line := line.strip():
                        await _replay_line(line, retrying, result, path, number)
                        progress(result)
        except (OSError, EOFError, zlib.error) as error:
            result.add_bad_line(path, number + 1, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return result


async def _replay_line(
    line: bytes, exporters: Mapping[Signal, RetryingExporter], result: ReplayResult, path: Path, number: int
) -> None:
    result.lines += 1
    try:
        signal, payload, count = await asyncio.to_thread(_decode, line)
    except UnreadableLineError as error:
        result.add_bad_line(path, number, str(error))
        return
    if signal not in exporters:
        result.skipped += count
        return
    parts = [(payload, count)]
    while parts:
        part, part_count = parts.pop(0)
        if len(part) > _MAX_REQUEST_BYTES and part_count > 1:
            parts[:0] = split_request(signal, part)
            continue
        try:
            sent = await exporters[signal].deliver(part, part_count)
        except ExportRejectedError as error:
            raise ExportRejectedError(
                f"stopped at {path}:{number} after {result.delivered} {plural(result.delivered, 'record')}: {error}"
            ) from error
        result.delivered += sent.delivered
        result.rejected += sent.rejected
        if sent.reason is not None:
            records = f"{sent.rejected} of {part_count} {plural(part_count, 'record')}"
            result.add_problem(path, number, f"{records} rejected: {sent.reason}")


def _decode(line: bytes) -> tuple[Signal, bytes, int]:
    signal, payload = decode_line(line)
    try:
        return signal, payload, count_records(signal, parse_request(signal, payload))
    except DecodeError as error:
        # nested deeper than any protobuf parser allows
        raise UnreadableLineError(f"not a valid OTLP request: {error}") from error


def _read_line(file: IO[bytes]) -> bytes:
    """Return the next line with its newline, empty at the end; of a line beyond the limit, its start."""
    line = file.readline(_MAX_LINE_BYTES)
    rest = line
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(1 << 20)
    return line


def _open(path: Path) -> IO[bytes]:
    # Both are binary readers; typeshed has no common type for them.
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


class _NotKept:
    """A dead letter that keeps nothing: rejected batches stay in the file that is replayed."""

    async def add(self, signal: Signal, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Keep nothing; `RetryingExporter` returns the reason, which is reported with its file and line."""
