"""What the checkpoint store takes and returns: rows as plain values, and a reader of all ledgers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

__all__ = ["Ack", "Checkpoint", "LedgerReader", "LedgerRow", "OutboxSpan"]


class Checkpoint(msgspec.Struct, frozen=True):
    """The stored state of one job.

    Attributes:
        key: The store's number for the job.
        name: The job's name.
        stream: The log stream of its pipeline that its lines go to: 0 for the main one; column ``backfill``.
        cursor: The end of the acknowledged lines; None if there are none.
        ledger: The JSON of the job's `JobLedger` as of that cursor.
        logs_complete: Whether all lines of the ended job are acknowledged.
        late: Whether lines may still become visible, so that the job is polled for some time.
        ended: Whether the run span was written and the run counted.
    """

    key: int
    name: str
    stream: int
    cursor: bytes | None
    ledger: str
    logs_complete: bool
    late: bool
    ended: bool


class Ack(msgspec.Struct, frozen=True):
    """Lines of one job that are delivered, or in the dead letter.

    Attributes:
        key: The store's number for the job.
        cursor: The end of these lines; None leaves the cursor unchanged (lines found after the job's end).
        ledger: The JSON of the job's `JobLedger` as of that cursor.
        seconds: Second of source time to (number of lines, sum of uids), to be added; empty for services with offsets.
        completes: Not None for the last record of an ended job: all of its lines are acknowledged. True if more may
            still become visible; see `CheckpointStore.complete_logs`.
    """

    key: int
    cursor: bytes | None
    ledger: str
    seconds: Mapping[int, tuple[int, int]] = msgspec.field(default_factory=dict)
    completes: bool | None = None


class OutboxSpan(msgspec.Struct, frozen=True):
    """A span as it was first written. Each attempt to send it sends these bytes.

    Attributes:
        job: The store's number for its job.
        span_id: 16 hexadecimal digits.
        resource: The encoded resource.
        span: The encoded span.
    """

    job: int
    span_id: str
    resource: bytes
    span: bytes

    @property
    def size(self) -> int:
        """The number of its bytes, with its resource."""
        return len(self.span) + len(self.resource)


class LedgerRow(NamedTuple):
    """The stored ledger of one job.

    Attributes:
        key: The store's number for the job; later jobs have larger numbers.
        identity: The identity of its service.
        job_id: The job's id.
        name: The job's name.
        ledger: The JSON of its `JobLedger`.
        ended: Whether its run was counted.
    """

    key: int
    identity: str
    job_id: str
    name: str
    ledger: str
    ended: bool


_LEDGERS = "SELECT key, identity, job_id, name, facts, ended FROM jobs"


class LedgerReader:
    """The ledgers of all jobs in an open store.

    Args:
        select: Runs a query with its values and returns the rows.
    """

    def __init__(self, select: Callable[..., list[Any]]) -> None:
        self._select = select

    async def newest_key(self) -> int:
        """Return the largest number of a job; 0 without jobs."""
        newest: int | None = self._select("SELECT max(key) FROM jobs")[0][0]
        return newest or 0

    async def after(self, key: int, limit: int) -> list[LedgerRow]:
        """Return at most `limit` jobs with larger numbers, smallest first."""
        return [LedgerRow(*row) for row in self._select(f"{_LEDGERS} WHERE key > ? ORDER BY key LIMIT ?", key, limit)]

    async def by_key(self, keys: Sequence[int]) -> list[LedgerRow]:
        """Return the jobs with these numbers; those that were deleted are missing."""
        marks = ", ".join("?" * len(keys))
        return [LedgerRow(*row) for row in self._select(f"{_LEDGERS} WHERE key IN ({marks})", *keys)]
