"""What the checkpoint store takes and gives: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Ack", "Checkpoint", "OutboxSpan"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the store knows of one job.

    Attributes:
        key: The store's own number for the job.
        name: The job's name.
        backfill: Whether the job was old when it was first seen: decided once.
        cursor: Where the acked lines end; None when none was acked.
        ledger: JSON of the job's facts as of that cursor.
        logs_complete: Whether all lines of the ended job are acked.
        late: Whether lines may still become visible: the job is looked at for some time more.
        ended: Whether the run span was written and the run counted.
    """

    key: int
    name: str
    backfill: bool
    cursor: bytes | None
    ledger: str
    logs_complete: bool
    late: bool
    ended: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """Lines of one job that need no more work.

    Attributes:
        key: The store's number for the job.
        cursor: Where these lines end; None leaves the cursor as it is (lines found by the final read).
        ledger: JSON of the job's facts as of that cursor.
        seconds: Second of source time to (lines, sum of uids), to be added; empty for services with offsets.
    """

    key: int
    cursor: bytes | None
    ledger: str
    seconds: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutboxSpan:
    """A span as it was first written, and as it is sent however often it is sent."""

    job: int
    span_id: str
    resource: bytes
    span: bytes
