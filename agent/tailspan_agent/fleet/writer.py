"""`BatchWriter`: writes what the store of a fleet gathers, in order, one transaction at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.errors import CheckpointError
from tailspan_agent.fleet.batch import Batch, DivergedError, EndedRun, Written, write_batch
from tailspan_agent.fleet.database import Connection, DatabaseThread, Tables

__all__ = ["BatchWriter"]

_RETRY_S = 0.5
_WRITE_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)
T = TypeVar("T")


class BatchWriter:
    """The writes of one agent that are not in the database yet, and the connection that writes them.

    Args:
        dsn: The connection string.
        tables: The tables of the fleet.
        gather_s: How long writes are gathered for one transaction, in seconds.
        on_written: Called with each batch that was written, and what became of it.

    Attributes:
        agent: The number of this agent; 0 before it has joined.
        writes: The number of this agent's transactions that are known to be committed.
        failed: Whether the last write failed.
        written_at_s: When a batch was written last, in seconds since the epoch.
        diverged: Why the database does not have what this agent has written; None if it does.
        on_trouble: Called when a shard is lost, or the database has diverged.
    """

    def __init__(
        self, dsn: str, tables: Tables, *, gather_s: float, on_written: Callable[[Batch, Written], object]
    ) -> None:
        self.agent = 0
        self.writes = 0
        self.failed = False
        self.written_at_s = time.time()
        self.diverged: str | None = None
        self.on_trouble: Callable[[], object] = lambda: None
        self._gather_s = gather_s
        self._on_written = on_written
        self._tables = tables
        self._database = DatabaseThread(dsn, f"{tables.fleet} writer")
        self._pending = Batch()
        self._writing: Batch | None = None
        self._batches = self._batches_written = 0
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()
        self._lost: set[int] = set()

    def batch_of(self, shard: int, epoch: int) -> Batch:
        """Return the pending batch, to be changed with writes of a shard."""
        self._pending.epochs[shard] = epoch
        self._changed.set()
        return self._pending

    def unwritten_runs(self) -> list[EndedRun]:
        """Return the runs to be counted that are not written yet."""
        return [*(self._writing.ended if self._writing is not None else ()), *self._pending.ended]

    def drop(self, shards: set[int]) -> None:
        """Void what is not written of some shards."""
        if not shards.isdisjoint(self._pending.epochs):
            self._pending = self._pending.of_shards(self._pending.epochs.keys() - shards)
            self._progress.set()

    def join(self, agent: int, writes: int) -> None:
        """Write as this agent from now on; what is not written is void.

        Args:
            agent: The number of the agent.
            writes: The number of its transactions so far.
        """
        self.agent, self.writes = agent, writes
        self._pending, self._writing, self.diverged = Batch(), None, None
        self._lost.clear()

    def take_lost(self) -> set[int]:
        """Return the shards whose last writes had no effect, because another agent has taken them; only once each."""
        lost, self._lost = self._lost, set()
        return lost

    async def run(self) -> None:
        """Write what is gathered, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._gather_s)
            self._changed.clear()
            if self._writing is None and not self._pending.is_empty:
                self._writing, self._pending = self._pending, Batch()
                self._batches += 1
            if self._writing is not None and not await self._write(self._writing):
                self._changed.set()
                await asyncio.sleep(_RETRY_S)
                continue
            if not self._pending.is_empty:
                self._changed.set()

    async def _write(self, batch: Batch) -> bool:
        """Write one batch; return whether it is done with."""
        try:
            written = await self._write_or_split(batch)
        except (DivergedError, CheckpointError) as error:
            if batch is not self._writing:
                return True
            batch.attempted = True
            self._on_failure(str(error))
            if isinstance(error, DivergedError):
                self.diverged = str(error)
                self.on_trouble()
            return False
        if batch is not self._writing:
            return True  # the agent has joined again meanwhile
        if self.failed:
            _log.info("the fleet's database works again")
        self.failed = False
        self.written_at_s = time.time()
        self.writes = written.writes
        self._writing = None
        self._on_written(batch, written)
        if written.lost:
            self._lost |= written.lost
            self.on_trouble()
        self._on_progress()
        return True

    def _on_progress(self) -> None:
        self._batches_written = self._batches - (self._writing is not None)
        self._progress.set()

    def _on_failure(self, text: str) -> None:
        if not self.failed:
            _log.error("%s; lines are relayed until the leases end, and no line is lost", text)
        self.failed = True

    async def _write_or_split(self, batch: Batch) -> Written:
        agent, writes = self.agent, self.writes
        try:
            return await self._database.run(
                lambda connection: write_batch(connection, self._tables, agent, writes, batch),
                timeout_s=_WRITE_TIMEOUT_S,
            )
        except CheckpointError as error:
            if self._database.connection is None:
                raise
            refused = error
        # The connection works, so the database refuses a value: then only the part that has it is lost.
        lost: frozenset[int] = frozenset()
        totals: list[RunTotals] = []
        runs: list[int] = []
        for part in batch.parts():
            try:
                written = await self._database.run(
                    lambda connection, part=part, writes=writes: write_batch(  # type: ignore[misc]
                        connection, self._tables, agent, writes, part
                    ),
                    timeout_s=_WRITE_TIMEOUT_S,
                )
            except CheckpointError as error:
                if self._database.connection is None:
                    # Which parts were committed is not known any more: read the shards again.
                    raise DivergedError(str(error)) from error
                _log.error("writes of shard %s are lost: %s", ", ".join(map(str, part.epochs)), error)
                continue
            writes, lost = written.writes, lost | written.lost
            totals += written.totals
            runs += written.runs
        _log.debug("a batch was written in parts: %s", refused)
        return Written(writes, lost, totals, runs)

    async def written(self) -> None:
        """Wait until all earlier writes are committed, or void because their shard is lost."""
        wanted = self._batches + (not self._pending.is_empty)
        while self._batches_written < wanted and not (self._pending.is_empty and self._writing is None):
            self._progress.clear()
            await self._progress.wait()

    async def leave(self) -> None:
        """Void what is not written: the agent has no lease any more."""
        self._pending, self._writing = Batch(), None
        self._batches_written = self._batches
        self._on_progress()

    async def use(self, work: Callable[[Connection], T]) -> T:
        """Do other work with the connection of the writes, in order with them.

        Raises:
            CheckpointError: The database cannot be reached or refuses.
        """
        return await self._database.run(work, timeout_s=_WRITE_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
