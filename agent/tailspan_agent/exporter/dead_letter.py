"""The dead letter: every batch that an endpoint refused, wholly or in part, kept until a person decides.

One line a batch: OTLP JSON as in the files mode, with the reason in front under a key that OTLP readers ignore, so that
``tailspan agent replay``, the collector's ``otlpjsonfile`` receiver and jq all read it:

    {"tailspan":{"time":"2026-07-26T10:00:00+00:00","kind":"invalid","reason":"HTTP 400: ...","rejected":7,"count":7},
     "resourceLogs":[...]}

``rejected`` of ``count`` records were refused; where they differ, the endpoint did not say which (``partial_success``
tells only how many), so the whole batch is here and a replay repeats the others. Records are redacted already. Files
are rotated by size; nothing is deleted. At the limit the dead letter refuses, and the sender waits for room.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tailspan._clock import Clock
from tailspan_agent.errors import AgentError
from tailspan_agent.exporter.rotating_file import LineFiles, existing_files
from tailspan_agent.otlp.json_lines import encode_line
from tailspan_agent.otlp.signals import SIGNALS, DecodeError

__all__ = ["DeadLetter", "DeadLetterEntry", "DeadLetterGroup", "DeadLetterNote", "read_entries", "summarize"]


class DeadLetterNote(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch is here.

    Attributes:
        time: When it was refused, ISO 8601 in UTC.
        kind: One of a few words: ``invalid``, ``partial``, ``too_large``, ``server_error``.
        reason: What the endpoint said.
        rejected: How many records it refused.
        count: How many records the batch has.
    """

    time: str
    kind: str
    reason: str
    rejected: int
    count: int


@dataclass(frozen=True, slots=True)
class DeadLetterEntry:
    """One refused batch and where it is.

    Attributes:
        signal: ``logs``, ``traces`` or ``metrics``.
        path: Its file.
        line: Its line there, from 1.
        size: Bytes of that line.
        note: Why it is here; None: the line cannot be read.
    """

    signal: str
    path: Path
    line: int
    size: int
    note: DeadLetterNote | None


@dataclass(slots=True)
class DeadLetterGroup:
    """All refused batches of one signal, kind and reason.

    Attributes:
        signal, kind, reason: What they have in common.
        batches: How many.
        rejected: Records refused.
        records: Records in these batches.
        size: Bytes.
        first, last: When the first and the last came, ISO 8601 in UTC.
    """

    signal: str
    kind: str
    reason: str
    batches: int = 0
    rejected: int = 0
    records: int = 0
    size: int = 0
    first: str = ""
    last: str = ""


class DeadLetter:
    """Keeps refused batches under ``directory``, one file series per signal.

    Args:
        directory: ``agent.state_dir / "dead-letter"``; made with the first batch.
        max_bytes: Of all files together; then `add` refuses.
        max_size: Of one file in bytes, then the next is begun.
        clock: Tells the time for the notes; None: the real one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        max_size: int = 100 << 20,
        clock: Clock | None = None,
    ) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._clock = clock or Clock()
        self._files = {signal: LineFiles(directory, signal, max_size=max_size, keep=None) for signal in SIGNALS}
        # One at a time, so that two batches cannot both take the last room.
        self._guard = threading.Lock()

    async def add(self, signal: str, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Keep a refused batch; on return it is on the disk.

        Args:
            signal: ``logs``, ``traces`` or ``metrics``.
            payload: The serialized Export*ServiceRequest.
            kind: See `DeadLetterNote`.
            reason: What the endpoint said.
            rejected: How many records it refused.
            count: How many records the batch has.

        Raises:
            AgentError: There is no room; nothing was written, and the batch must not be acked.
        """
        await asyncio.to_thread(self._add, signal, payload, kind, reason, rejected, count)

    def total_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(files.total_bytes() for files in self._files.values())

    def close(self) -> None:
        """Close the files; `add` opens them again."""
        for files in self._files.values():
            files.close()

    def _add(self, signal: str, payload: bytes, kind: str, reason: str, rejected: int, count: int) -> None:
        time = datetime.fromtimestamp(self._clock.wall_s(), UTC).isoformat(timespec="seconds")
        note = DeadLetterNote(time=time, kind=kind, reason=reason, rejected=rejected, count=count)
        try:
            line = encode_line(signal, payload, note)
        except DecodeError as error:
            raise AgentError(f"the dead letter cannot keep a batch of {signal} that is no OTLP: {error}") from error
        try:
            with self._guard:
                if self.total_bytes() + len(line) > self._max_bytes:
                    raise AgentError(
                        f"the dead letter {self.directory} is full (otlp.dead_letter_max = {self._max_bytes} bytes):"
                        " replay and remove its files, or raise the limit"
                    )
                self._files[signal].append(line)
        except OSError as error:
            raise AgentError(
                f"the dead letter {self.directory} cannot be written: {error.strerror or error}"
            ) from error


class _Line(msgspec.Struct):
    # msgspec skips the rest of the line without making objects of it.
    tailspan: DeadLetterNote


def read_entries(directory: Path) -> Iterator[DeadLetterEntry]:
    """Yield every refused batch, per signal oldest first, without loading the batches.

    Args:
        directory: ``agent.state_dir / "dead-letter"``; may be missing.
    """
    decoder = msgspec.json.Decoder(_Line)
    for signal in SIGNALS:
        for path in existing_files(directory, signal):
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        note = decoder.decode(line).tailspan
                    except (msgspec.DecodeError, UnicodeDecodeError):
                        note = None
                    yield DeadLetterEntry(signal, path, number, len(line), note)


def summarize(directory: Path) -> list[DeadLetterGroup]:
    """Return what is in the dead letter, by signal, kind and reason, for ``tailspan agent dead-letter``."""
    groups: dict[tuple[str, str, str], DeadLetterGroup] = {}
    for entry in read_entries(directory):
        note = entry.note or DeadLetterNote(
            time="", kind="unreadable", reason=os.fspath(entry.path), rejected=0, count=0
        )
        key = (entry.signal, note.kind, note.reason)
        group = groups.setdefault(key, DeadLetterGroup(*key))
        group.batches += 1
        group.rejected += note.rejected
        group.records += note.count
        group.size += entry.size
        times = [time for time in (group.first, group.last, note.time) if time]
        group.first, group.last = (min(times), max(times)) if times else ("", "")
    return list(groups.values())
