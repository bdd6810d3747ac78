"""What the checkpoint store knows of jobs, to be looked at: nothing here writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["StoredJob", "StoredJobs"]

_COLUMNS = "SELECT key, identity, job_id, name, facts, ended FROM jobs"


class StoredJob(NamedTuple):
    """One job as stored.

    Attributes:
        key: The store's own number for it; later jobs have larger ones.
        identity: The identity of its service.
        job_id: The job.
        name: Its name.
        ledger: JSON of its `JobLedger`.
        ended: Whether its run was counted.
    """

    key: int
    identity: str
    job_id: str
    name: str
    ledger: str
    ended: bool


class StoredJobs:
    """The jobs of an open store.

    Args:
        select: Runs a query with its values and returns the rows.
    """

    def __init__(self, select: Callable[..., list[Any]]) -> None:
        self._select = select

    def newest_key(self) -> int:
        """Return the largest number of a job; 0 without jobs."""
        newest: int | None = self._select("SELECT max(key) FROM jobs")[0][0]
        return newest or 0

    def after(self, key: int, limit: int) -> list[StoredJob]:
        """Return the jobs with larger numbers, smallest first, at most `limit`."""
        return [StoredJob(*row) for row in self._select(f"{_COLUMNS} WHERE key > ? ORDER BY key LIMIT ?", key, limit)]

    def by_key(self, keys: Sequence[int]) -> list[StoredJob]:
        """Return the jobs with these numbers, as far as they are there."""
        marks = ", ".join("?" * len(keys))
        return [StoredJob(*row) for row in self._select(f"{_COLUMNS} WHERE key IN ({marks})", *keys)]
