"""The dead letter: every batch that an endpoint rejected, fully or in part, kept until an operator decides.

Each line is a batch: OTLP JSON as in files mode, with the reason in front under a key that OTLP readers ignore, so that
``tailspan agent replay``, the collector's ``otlpjsonfile`` receiver and jq can read it:

    {"tailspan":{"time":"2026-07-26T10:00:00+00:00","kind":"invalid","reason":"HTTP 400: ...","rejected":7,"count":7},
     "resourceLogs":[...]}

``rejected`` of ``count`` records were rejected. If the two differ, the endpoint did not report which records
(``partial_success`` has only a count): the line has the whole batch, and a replay sends the accepted records again.
A batch that is not valid OTLP (a bug of the agent) is kept as base64 under the key ``undecodable``; a replay skips it.
Records are already redacted. Files are rotated by size and never deleted. At the size limit `add` fails, and the
exporter waits until there is room.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tailspan._clock import Clock
from tailspan.config.signals import SIGNALS, Signal
from tailspan_agent.errors import AgentError
from tailspan_agent.exporter.rotating_file import RotatingFile, existing_files

__all__ = ["DeadLetter", "DeadLetterEntry", "DeadLetterGroup", "DeadLetterNote", "read_entries", "summarize"]


class DeadLetterNote(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch was rejected.

    Attributes:
        time: When, ISO 8601 in UTC.
        kind: ``invalid``, ``partial``, ``too_large`` or ``server_error``.
        reason: The endpoint's message.
        rejected: Number of rejected records.
        count: Number of records in the batch.
    """

    time: str
    kind: str
    reason: str
    rejected: int
    count: int


class DeadLetterEntry(msgspec.Struct, frozen=True):
    """One rejected batch and its location.

    Attributes:
        signal: The signal.
        path: The file.
        line: The line number in the file, from 1.
        size: Size of the line in bytes.
        note: Why the batch was rejected; None if the line cannot be decoded.
    """

    signal: Signal
    path: Path
    line: int
    size: int
    note: DeadLetterNote | None


class DeadLetterGroup(msgspec.Struct):
    """All rejected batches of one signal, kind and reason.

    Attributes:
        signal, kind, reason: Shared by all batches.
        batches: Number of batches.
        rejected: Number of rejected records.
        records: Number of records in these batches.
        size: Total size in bytes.
        first, last: When the first and the last batch was rejected, ISO 8601 in UTC.
    """

    signal: Signal
    kind: str
    reason: str
    batches: int = 0
    rejected: int = 0
    records: int = 0
    size: int = 0
    first: str = ""
    last: str = ""


class DeadLetter:
    """Store rejected batches in ``directory``, one series of files per signal.

    Args:
        directory: ``agent.state_dir / "dead-letter"``; created with the first batch.
        max_bytes: Maximum size of all files together; `add` fails beyond it.
        max_size: Maximum size of one file in bytes.
        clock: For the time of the notes; None is the real clock.
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
        self._files = {signal: RotatingFile(directory, signal, max_size=max_size, keep=None) for signal in SIGNALS}
        # One batch at a time: two batches must not take the same last room.
        self._lock = threading.Lock()

    async def add(self, signal: Signal, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Store a rejected batch; on return it is on disk.

        Args:
            signal: The signal.
            payload: The serialized Export*ServiceRequest.
            kind: See `DeadLetterNote`.
            reason: The endpoint's message.
            rejected: Number of rejected records.
            count: Number of records in the batch.

        Raises:
            AgentError: There is no room, or the disk fails. Nothing was written: do not acknowledge the batch.
        """
        await asyncio.to_thread(self._add, signal, payload, kind, reason, rejected, count)

    def total_bytes(self) -> int:
        """Return the total size of all files in bytes."""
        return sum(files.total_bytes() for files in self._files.values())

    def close(self) -> None:
        """Close the files; the next `add` opens them again."""
        for files in self._files.values():
            files.close()

    def _add(self, signal: Signal, payload: bytes, kind: str, reason: str, rejected: int, count: int) -> None:
        from tailspan_agent.otlp.json_lines import encode_line, encode_undecodable
        from tailspan_agent.otlp.messages import DecodeError

        time = datetime.fromtimestamp(self._clock.wall_s(), UTC).isoformat(timespec="seconds")
        note = DeadLetterNote(time=time, kind=kind, reason=reason, rejected=rejected, count=count)
        try:
            line = encode_line(signal, payload, note)
        except DecodeError:
            # A bug of the agent, and no reason to stop the lines of other jobs.
            line = encode_undecodable(signal, payload, note)
        try:
            with self._lock:
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
    # msgspec skips the rest of the line without creating objects.
    tailspan: DeadLetterNote


def read_entries(directory: Path) -> Iterator[DeadLetterEntry]:
    """Yield every rejected batch, for each signal the oldest first, without loading the batches.

    Args:
        directory: ``agent.state_dir / "dead-letter"``; may not exist.
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
    """Return the content of the dead letter by signal, kind and reason, for ``tailspan agent dead-letter``."""
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
