"""Which step of its way a killed agent was at, by what the outside knows. Pure, but for reading two files."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

_LOG_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_INDEX_BYTES = 48
_INDEX_FRAMES = 16


class Step(StrEnum):
    """The steps of the path, as the table names them."""

    READ = "after read"
    ENCODED = "after encode"
    SENDING = "while sending"
    ANSWERED = "after the answer, before the checkpoint"
    WRITING = "during the checkpoint's write"
    DRAINING = "during drain"
    ELSEWHERE = "elsewhere (start-up, between polls)"


STEPS = tuple(step for step in Step if step is not Step.ELSEWHERE)


@dataclass(frozen=True)
class Evidence:
    """What is known of an agent that was killed.

    Attributes:
        handed: Lines by job that the job service had handed out, in whole replies.
        encoded: Log records that the agent's /metrics had reported as made of lines, since its start.
        begun: Log records of the requests that had come to the receiver since its start.
        arrived: Lines by job that had come to the receiver.
        open_requests: Requests whose head had come to the receiver and whose answer was not written.
        answered: Lines by job, up to the last one for which the receiver had written a success.
        acked: Lines by job that the checkpoint store has as acked.
        torn_write: Whether the store ends in a transaction that was begun and not finished.
        draining: Whether the agent had said that it stops.
    """

    handed: Mapping[str, int] = field(default_factory=dict)
    encoded: int = 0
    begun: int = 0
    arrived: Mapping[str, int] = field(default_factory=dict)
    open_requests: int = 0
    answered: Mapping[str, int] = field(default_factory=dict)
    acked: Mapping[str, int] = field(default_factory=dict)
    torn_write: bool = False
    draining: bool = False


def steps_of(found: Evidence) -> list[Step]:
    """Return the steps that there is evidence of, the furthest first: the jobs' lines are at several at once.

    A drain with nothing left to send does not count: a kill there proves nothing.
    """
    answered = _ahead(found.answered, found.acked)
    if found.draining:
        return [Step.DRAINING] if found.open_requests or answered or found.torn_write else [Step.ELSEWHERE]
    behind = {job: max(found.arrived.get(job, 0), found.acked.get(job, 0)) for job in found.handed}
    evidence = {
        Step.WRITING: found.torn_write,
        Step.ANSWERED: answered,
        Step.SENDING: found.open_requests > 0,
        Step.ENCODED: found.encoded > found.begun,
        Step.READ: _ahead(found.handed, behind),
    }
    return [step for step, holds in evidence.items() if holds] or [Step.ELSEWHERE]


def _ahead(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return any(lines > other.get(job, 0) for job, lines in one.items())


@dataclass(frozen=True)
class WriteAhead:
    """The write-ahead log of a SQLite file at one moment, and how many of its frames were committed."""

    log: bytes
    committed: int

    @classmethod
    def read(cls, database: Path) -> WriteAhead:
        """Read it; one that is not there is empty."""
        log, index = (Path(f"{database}-{suffix}") for suffix in ("wal", "shm"))
        header = index.read_bytes()[:_INDEX_BYTES] if index.exists() else b""
        committed = struct.unpack_from("=I", header, _INDEX_FRAMES)[0] if len(header) == _INDEX_BYTES else 0
        return cls(log.read_bytes() if log.exists() else b"", committed)

    def torn_since(self, before: WriteAhead) -> bool:
        """Return whether a process that was killed since then was in the middle of writing a transaction.

        What is behind the last committed frame, carries the log's present salts, and was not there before, was written
        by that process, which did not come to commit it.

        Source: SQLite, "WAL-mode File Format", sections 1 and 2.1.
        """
        if len(self.log) < _LOG_HEADER_BYTES:
            return False
        page_size: int = struct.unpack_from(">I", self.log, 8)[0]
        salts = self.log[16:24]
        place = _LOG_HEADER_BYTES + self.committed * (_FRAME_HEADER_BYTES + page_size)
        frame = self.log[place : place + _FRAME_HEADER_BYTES + page_size]
        return frame[8:16] == salts and self.log[place:] != before.log[place:]
