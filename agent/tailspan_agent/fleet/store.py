"""`PostgresStore`: the checkpoint store that the agents of a fleet share, a `CheckpointStore`.

Each agent has a copy in memory of the rows of the shards that it owns, so nothing is read on the way of a line. Writes
change the copy at once, and are gathered for up to 100 ms into one transaction, which a thread of its own makes:

    ack -> copy in memory -> Batch --(100 ms)--> write_batch in the writer's thread -> written

A process that ends before takes the last writes with it, which repeats lines (with the same uid) but never skips one:
the transactions keep the order of the writes. A span is sent only after it is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from tailspan._clock import settled_clock
from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES, utf8_name
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.rows import Ack, Checkpoint, LedgerRow, OutboxSpan
from tailspan_agent.errors import CheckpointError, LeaseLostError, ValueRefusedError
from tailspan_agent.fleet.batch import Batch, DivergedError, EndedRun, StoredRow, Written, write_batch
from tailspan_agent.fleet.database import Connection, DatabaseThread, Tables, migrate, transaction
from tailspan_agent.fleet.shards import job_uuid

__all__ = ["PostgresStore", "ShardRows", "open_store", "read_shards"]

_GATHER_S = 0.1
_RETRY_S = 0.5
_WRITE_TIMEOUT_S = 30.0
_READ_TIMEOUT_S = 30.0
_DELETED_AT_ONCE = 500
_PART = 5000
_DAY_S = 86400
_FUTURE_DAYS = 1
_MOST_SEEN_RUNS = 10_000
_INT_32, _INT_64 = 1 << 31, 1 << 63

_log = logging.getLogger(__name__)


class Changes(NamedTuple):
    """What agents have counted, as rows of the database.

    Attributes:
        read_at: When it was read, by the clock of the database.
        runs: Changed rows of ``runs``.
        failures: Changed rows of ``failures``.
        too_fast: All rows of ``too_fast``.
        history: New rows of ``history``.
    """

    read_at: str
    runs: list[Any]
    failures: list[Any]
    too_fast: list[Any]
    history: list[Any]


class _FirstSeen(msgspec.Struct):
    first_seen_ns: int = 0


class _LogStreams(msgspec.Struct):
    log_streams: dict[int, int] = {}


class _Job:
    """The copy of a row, and the ids of the job's spans while it may still get some."""

    __slots__ = ("key", "row", "span_ids", "stored")

    def __init__(self, key: int, row: StoredRow, span_ids: set[str], *, stored: bool) -> None:
        self.key = key
        self.row = row
        self.span_ids = span_ids
        self.stored = stored


class ShardRows:
    """What the database has of some shards, as `read_shards` returns it.

    Attributes:
        jobs: The rows of jobs, oldest first.
        span_ids: The ids of all spans of jobs that are not finished.
        unsent: Spans that are not acknowledged, oldest first.
        names: Cached names by (identity, job id).
    """

    def __init__(self) -> None:
        self.jobs: list[StoredRow] = []
        self.span_ids: dict[UUID, set[str]] = {}
        self.unsent: list[tuple[UUID, str, bytes, bytes]] = []
        self.names: dict[tuple[str, str], str] = {}


def read_shards(connection: Connection, tables: Tables, shards: Sequence[int]) -> ShardRows:
    """Return all that the database has of some shards."""
    found, owned = ShardRows(), (list(shards),)
    found.jobs = [
        StoredRow(*row)
        for row in connection.execute(
            tables.sql(
                "SELECT id, shard, identity, job_id, name, stream, cursor, ledger, logs_complete, late, ended,"
                " updated_s, updated_day FROM $jobs WHERE shard = ANY(%s) ORDER BY number"
            ),
            owned,
        )
    ]
    spans = connection.execute(
        tables.sql(
            "SELECT job, span_id FROM $spans WHERE job IN (SELECT id FROM $jobs WHERE shard = ANY(%s)"
            " AND NOT (ended AND logs_complete AND NOT late))"
        ),
        owned,
    )
    for job, span_id in spans:
        found.span_ids.setdefault(job, set()).add(span_id)
    found.unsent = connection.execute(
        tables.sql(
            "SELECT job, span_id, resource, span FROM $spans WHERE shard = ANY(%s) AND NOT acked ORDER BY number"
        ),
        owned,
    ).fetchall()
    names = connection.execute(tables.sql("SELECT identity, job_id, name FROM $names WHERE shard = ANY(%s)"), owned)
    found.names = {(identity, job_id): name for identity, job_id, name in names}
    return found


class _History:
    """The history of all agents, as read at the start and refreshed; see `tailspan_agent.checkpoint.protocol`."""

    def __init__(self) -> None:
        self.runs: list[PastRun] = []
        self.too_fast_runs: dict[str, int] = {}
        self.failures: dict[tuple[str, str], tuple[int, int | None]] = {}

    def past_runs(self) -> list[PastRun]:
        """Return the last ended runs of all pipelines when the store was opened."""
        return list(self.runs)

    def too_fast(self) -> dict[str, int]:
        """Return the number of suspiciously fast runs since the fleet began, by pipeline."""
        return dict(self.too_fast_runs)

    def earlier_failures(self, pipeline: str, fingerprint: str) -> tuple[int, int | None]:
        """Return the number of earlier runs with a failure, and when the first one failed, in ns since the epoch."""
        return self.failures.get((pipeline, fingerprint), (0, None))

    def add(self, run: PastRun, fingerprint: str | None) -> None:
        """Add a run of this agent."""
        if run.too_fast:
            self.too_fast_runs[run.pipeline] = self.too_fast_runs.get(run.pipeline, 0) + 1
        if fingerprint is not None and run.pipeline != OTHER_PIPELINES:
            runs, first_ns = self.failures.get((run.pipeline, fingerprint), (0, None))
            first_ns = run.ended_unix_nano if first_ns is None else min(first_ns, run.ended_unix_nano)
            self.failures[run.pipeline, fingerprint] = runs + 1, first_ns


class _Ledgers:
    """The ledgers of all jobs of the fleet, read from the database."""

    def __init__(self, reader: DatabaseThread, tables: Tables) -> None:
        self._reader = reader
        self._tables = tables

    async def newest_key(self) -> int:
        """Return the largest number of a job; 0 without jobs."""
        (row,) = await self._rows("SELECT coalesce(max(number), 0) FROM $jobs")
        newest: int = row[0]
        return newest

    async def after(self, key: int, limit: int) -> list[LedgerRow]:
        """Return at most `limit` jobs with larger numbers, smallest first."""
        return await self._ledgers("number > %s ORDER BY number LIMIT %s", key, limit)

    async def by_key(self, keys: Sequence[int]) -> list[LedgerRow]:
        """Return the jobs with these numbers; those that were deleted are missing."""
        return await self._ledgers("number = ANY(%s) ORDER BY number", list(keys))

    async def _ledgers(self, condition: str, *values: object) -> list[LedgerRow]:
        columns = "number, identity, job_id, name, ledger, ended"
        return [LedgerRow(*row) for row in await self._rows(f"SELECT {columns} FROM $jobs WHERE {condition}", *values)]  # noqa: S608

    async def _rows(self, text: str, *values: object) -> list[Any]:
        return await self._reader.run(
            lambda connection: connection.execute(self._tables.sql(text), values).fetchall(), timeout_s=_READ_TIMEOUT_S
        )


def open_store(dsn: str, fleet: str, instance_id: str) -> PostgresStore:
    """Open the store of a fleet; create or migrate its tables if needed.

    Args:
        dsn: The connection string.
        fleet: ``fleet.name``.
        instance_id: The UUID of the agent's state directory.

    Raises:
        ConfigError: The connection string or the name is not possible.
        CheckpointError: The database cannot be reached, or has the tables of a newer version.
    """
    tables = Tables(fleet)
    opening = DatabaseThread(dsn, f"{fleet} migration")
    try:
        opening.run_now(lambda connection: migrate(connection, tables))
    finally:
        opening.close()
    return PostgresStore(dsn, tables, instance_id)


class PostgresStore:
    """The copy of the owned shards, and the writer behind it. See `CheckpointStore`.

    Args:
        dsn: The connection string.
        tables: The tables of the fleet, which exist.
        instance_id: The UUID of the agent's state directory.
        gather_s: How long writes are gathered for one transaction, in seconds.

    Attributes:
        fleet_id: The UUID of the fleet.
        agent: The number of this agent; 0 before it has joined.
        epochs: The epoch of each shard whose rows are in memory.
        counted: The totals of the database, without what is not written yet: they never go back.
        diverged: Why the copy in memory does not fit the database any more; None if it does.
        on_trouble: Called when a shard is lost, or the copy has diverged.
        may_send: Returns whether this agent sends the spans of a shard.
    """

    def __init__(self, dsn: str, tables: Tables, instance_id: str, *, gather_s: float = _GATHER_S) -> None:
        self._gather_s = gather_s
        self.instance_id = instance_id
        self.recovered: str | None = None
        self.write_failed = False
        self.acked_at_s = time.time()
        self.agent = 0
        self.epochs: dict[int, int] = {}
        self.counted: dict[tuple[str, str, str], RunTotals] = {}
        self.tables = tables
        self.reader = DatabaseThread(dsn, f"{tables.fleet} reader")
        self.writer = DatabaseThread(dsn, f"{tables.fleet} writer")
        self._history = _History()
        self._ledgers = _Ledgers(self.reader, tables)
        self._jobs: dict[UUID, _Job] = {}
        self._by_key: dict[int, _Job] = {}
        self._last_key = 0
        self._unsent: dict[tuple[int, str], OutboxSpan] = {}
        self._names: dict[str, dict[str, str]] = {}
        self._pending = Batch()
        self._writing: Batch | None = None
        self._writes = 0
        self._batches = self._batches_written = 0
        self._changed = asyncio.Event()
        self._progress = asyncio.Condition()
        self._lost: set[int] = set()
        self.diverged: str | None = None
        self.on_trouble: Callable[[], object] = lambda: None
        self.may_send: Callable[[int], bool] = lambda _: True
        self._newest_run = 0
        self._seen_runs: dict[int, None] = {}
        self._new_runs: list[PastRun] = []
        self._read_at = ""
        self.fleet_id, self.start_unix_nano = self.reader.run_now(self._read_meta)

    def _read_meta(self, connection: Connection) -> tuple[str, int]:
        meta: dict[str, str] = dict(connection.execute(self.tables.sql("SELECT key, value FROM $meta")).fetchall())
        self.apply_changes(self.read_changes(connection))
        self._history.runs = self.take_new_runs()
        return meta["instance_id"], int(meta["start_unix_nano"])

    # -- what all agents have counted

    def read_changes(self, connection: Connection) -> Changes:
        """Read what agents have counted since the last call; a little more, because transactions end in any order."""
        tables, since = self.tables, self._read_at or "-infinity"
        now = connection.execute("SELECT (clock_timestamp() - interval '30 s')::text").fetchone()
        runs = connection.execute(
            tables.sql(
                "SELECT pipeline, result, error_type, sum_s, buckets, exemplars FROM $runs"
                " WHERE changed_at >= %s::timestamptz"
            ),
            (since,),
        ).fetchall()
        failures = connection.execute(
            tables.sql(
                "SELECT pipeline, fingerprint, runs, first_unix_nano FROM $failures WHERE changed_at >= %s::timestamptz"
            ),
            (since,),
        ).fetchall()
        too_fast = connection.execute(tables.sql("SELECT pipeline, runs FROM $too_fast")).fetchall()
        history = connection.execute(
            tables.sql("SELECT run, facts FROM $history WHERE run > %s ORDER BY run"),
            (self._newest_run - _MOST_SEEN_RUNS // 10,),
        ).fetchall()
        return Changes(now[0] if now else "", runs, failures, too_fast, history)

    def apply_changes(self, changes: Changes) -> None:
        """Add what `read_changes` has read."""
        self._read_at, runs, failures, too_fast, history = changes
        for row in runs:
            try:
                self._count_stored(RunTotals.from_row(row))
            except ValueError as error:
                _log.warning("the fleet's database: skipping damaged run totals: %s", error)
        for pipeline, fingerprint, count, first_ns in failures:
            self._history.failures[pipeline, fingerprint] = count, first_ns
        for pipeline, count in too_fast:
            # A counter: what this agent has added and not written yet must not go away again.
            self._history.too_fast_runs[pipeline] = max(count, self._history.too_fast_runs.get(pipeline, 0))
        for number, facts in history:
            if number in self._seen_runs:
                continue
            self._see_run(number)
            try:
                self._new_runs.append(PastRun.from_json(facts))
            except ValueError as error:
                _log.warning("the fleet's database: skipping a damaged run in the history: %s", error)

    def _see_run(self, number: int) -> None:
        self._seen_runs[number] = None
        self._newest_run = max(self._newest_run, number)
        while len(self._seen_runs) > _MOST_SEEN_RUNS:
            del self._seen_runs[next(iter(self._seen_runs))]

    def _count_stored(self, totals: RunTotals) -> None:
        known = self.counted.get(totals.key)
        if known is None or known.count <= totals.count:
            self.counted[totals.key] = totals

    async def refresh(self) -> None:
        """Read what other agents have counted.

        Raises:
            CheckpointError: The database cannot be reached.
        """
        self.apply_changes(await self.reader.run(self.read_changes, timeout_s=_READ_TIMEOUT_S))

    def take_new_runs(self) -> list[PastRun]:
        """Return the runs of other agents that were read since the last call."""
        new, self._new_runs = self._new_runs, []
        return new

    async def running_starts(self, names: Collection[str]) -> dict[str, int]:
        """Return when the last job of a name that has not ended was first seen, by its name, in ns since the epoch.

        Args:
            names: The names of the jobs.

        Raises:
            CheckpointError: The database cannot be reached.
        """
        rows = await self.reader.run(
            lambda connection: connection.execute(
                self.tables.sql("SELECT name, ledger FROM $jobs WHERE NOT ended AND name = ANY(%s)"), (list(names),)
            ).fetchall(),
            timeout_s=_READ_TIMEOUT_S,
        )
        starts: dict[str, int] = {}
        for name, ledger in rows:
            with suppress(msgspec.DecodeError):
                seen_ns = msgspec.json.decode(ledger, type=_FirstSeen).first_seen_ns
                starts[name] = max(seen_ns, starts.get(name, 0))
        return starts

    @property
    def totals(self) -> dict[tuple[str, str, str], RunTotals]:
        """The totals of all ended runs of the fleet, with those of this agent that are not written yet."""
        unwritten = [*(self._writing.ended if self._writing is not None else ()), *self._pending.ended]
        if not unwritten:
            return self.counted
        totals = dict(self.counted)
        for ended in unwritten:
            known = totals.get(ended.counted.key)
            totals[ended.counted.key] = known.merge(ended.counted) if known is not None else ended.counted
        return totals

    @property
    def history(self) -> _History:
        """The history of all agents."""
        return self._history

    @property
    def ledgers(self) -> _Ledgers:
        """The ledgers of all jobs of the fleet."""
        return self._ledgers

    # -- ownership

    def adopt(self, epochs: Mapping[int, int], rows: ShardRows) -> None:
        """Take over shards with the rows that the database has of them."""
        self.epochs.update(epochs)
        for row in rows.jobs:
            self._last_key += 1
            job = _Job(self._last_key, row, rows.span_ids.get(row.id, set()), stored=True)
            self._jobs[row.id] = self._by_key[job.key] = job
        for uuid, span_id, resource, span in rows.unsent:
            known = self._jobs.get(uuid)
            if known is not None:
                self._unsent[known.key, span_id] = OutboxSpan(known.key, span_id, resource, span)
        for (identity, job_id), name in rows.names.items():
            self._names.setdefault(identity, {})[job_id] = name

    def drop(self, shards: Iterable[int]) -> None:
        """Forget the rows of shards that this agent does not own any more; what is not written of them is void."""
        dropped = set(shards)
        for shard in dropped:
            self.epochs.pop(shard, None)
        gone = [job for job in self._jobs.values() if job.row.shard in dropped]
        for job in gone:
            del self._jobs[job.row.id], self._by_key[job.key]
            self._names.get(job.row.identity, {}).pop(job.row.job_id, None)
        keys = {job.key for job in gone}
        self._unsent = {key: span for key, span in self._unsent.items() if key[0] not in keys}
        if not dropped.isdisjoint(self._pending.epochs):
            self._pending = self._pending.of_shards(self._pending.epochs.keys() - dropped)

    def join(self, agent: int, writes: int) -> None:
        """Write as this agent from now on; what is not written is void.

        Args:
            agent: The number of the agent.
            writes: The number of its transactions so far.
        """
        assert not self.epochs
        self.agent, self._writes = agent, writes
        self._pending, self._writing, self.diverged = Batch(), None, None
        self._lost.clear()

    @property
    def writes(self) -> int:
        """The number of this agent's transactions that are known to be committed."""
        return self._writes

    def take_lost(self) -> set[int]:
        """Return the shards whose last writes had no effect, because another agent has taken them; only once each."""
        lost, self._lost = self._lost, set()
        return lost

    # -- the writer

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
        if self.write_failed:
            _log.info("the fleet's database works again")
        self.write_failed = False
        self.acked_at_s = time.time()
        self._writes = written.writes
        for totals in written.totals:
            self._count_stored(totals)
        for number in written.runs:
            self._see_run(number)
        self._writing = None
        for uuid, span in batch.spans:
            if uuid.bytes[0] not in written.lost and span.job in self._by_key:
                self._unsent[span.job, span.span_id] = span
        if written.lost:
            self._lost |= written.lost
            self.on_trouble()
        await self._on_progress()
        return True

    async def _on_progress(self) -> None:
        self._batches_written = self._batches - (self._writing is not None)
        async with self._progress:
            self._progress.notify_all()

    def _on_failure(self, text: str) -> None:
        if not self.write_failed:
            _log.error("%s; lines are relayed until the leases end, and no line is lost", text)
        self.write_failed = True

    async def _write_or_split(self, batch: Batch) -> Written:
        agent, writes = self.agent, self._writes
        try:
            return await self.writer.run(
                lambda connection: write_batch(connection, self.tables, agent, writes, batch),
                timeout_s=_WRITE_TIMEOUT_S,
            )
        except CheckpointError as error:
            if self.writer.connection is None:
                raise
            refused = error
        # The connection works, so the database refuses a value: then only the part that has it is lost.
        lost: frozenset[int] = frozenset()
        totals: list[RunTotals] = []
        runs: list[int] = []
        for part in batch.parts():
            try:
                written = await self.writer.run(
                    lambda connection, part=part, writes=writes: write_batch(  # type: ignore[misc]
                        connection, self.tables, agent, writes, part
                    ),
                    timeout_s=_WRITE_TIMEOUT_S,
                )
            except CheckpointError as error:
                if self.writer.connection is None:
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
        if self._pending.is_empty and self._writing is None:
            return
        wanted = self._batches + (not self._pending.is_empty)
        async with self._progress:
            await self._progress.wait_for(
                lambda: self._batches_written >= wanted or (self._pending.is_empty and self._writing is None)
            )

    async def leave(self) -> None:
        """Void what is not written: the agent has no lease any more."""
        self._pending, self._writing = Batch(), None
        self._batches_written = self._batches
        await self._on_progress()

    def close(self) -> None:
        """Close the connections."""
        self.writer.close()
        self.reader.close()

    def together(self) -> AbstractContextManager[object]:
        """Return an empty context: what one turn of the event loop writes is in one transaction."""
        return nullcontext()

    def is_writable(self) -> bool:
        """Return whether the last write succeeded; the writer tries again by itself."""
        return not self.write_failed

    def _batch_of(self, shard: int) -> Batch:
        """Return the pending batch, to be changed."""
        self._pending.epochs[shard] = self.epochs[shard]
        self._changed.set()
        return self._pending

    def _change(self, job: _Job, **fields: Any) -> Batch:
        now_s = time.time()
        row = job.row = job.row._replace(updated_s=now_s, updated_day=int(now_s // _DAY_S), **fields)
        batch = self._batch_of(row.shard)
        if job.stored and row.id not in batch.new:
            batch.jobs[row.id] = row
        else:
            batch.new[row.id] = row
            job.stored = True
        return batch

    def _job(self, key: int) -> _Job:
        job = self._by_key.get(key)
        if job is None:
            raise LeaseLostError("another agent has taken the job over")
        return job

    # -- the protocol

    def job(self, identity: str, job_id: str) -> Checkpoint | None:
        """Return the checkpoint of a job of an owned shard; None for all others."""
        job = self._jobs.get(job_uuid(identity, job_id))
        if job is None:
            return None
        row = job.row
        return Checkpoint(job.key, row.name, row.stream, row.cursor, row.ledger, row.logs_complete, row.late, row.ended)

    def add_job(self, identity: str, job_id: str, name: str, *, stream: int, ledger: str) -> Checkpoint:
        """Add a job that is seen for the first time, and return its checkpoint; a known job is unchanged.

        Raises:
            ValueRefusedError: The database cannot hold a value.
            LeaseLostError: The agent does not own the job's shard.
        """
        known = self.job(identity, job_id)
        if known is not None:
            return known
        _check(identity, job_id, ledger, stream=stream)
        uuid = job_uuid(identity, job_id)
        shard = uuid.bytes[0]
        if shard not in self.epochs:
            raise LeaseLostError("another agent owns the job")
        self._last_key += 1
        row = StoredRow(uuid, shard, identity, job_id, _name(name), stream, None, ledger, False, False, False, 0.0, 0)
        job = self._jobs[uuid] = self._by_key[self._last_key] = _Job(self._last_key, row, set(), stored=False)
        self._change(job)
        checkpoint = self.job(identity, job_id)
        assert checkpoint is not None
        return checkpoint

    def finished_jobs(self, identity: str) -> set[str]:
        """Return the ids of all jobs of a service in owned shards that need no more work."""
        return {row.job_id for row in self._rows_of(identity) if _is_finished(row)}

    def unfinished_jobs(self, identity: str) -> Iterator[list[tuple[str, str]]]:
        """Yield id and name of all other known jobs of a service in owned shards, oldest first, in parts."""
        rows = self._rows_of(identity)
        for start in range(0, len(rows), _PART):
            part = rows[start : start + _PART]
            yield [(row.job_id, row.name) for row in part if not _is_finished(row)]

    def _rows_of(self, identity: str) -> list[StoredRow]:
        return [job.row for job in self._jobs.values() if job.row.identity == identity]

    def ack(self, acks: Iterable[Ack]) -> None:
        """Store acknowledgements, all or none; those of jobs that another agent has taken over have no effect."""
        for ack in list(acks):
            job = self._by_key.get(ack.key)
            if job is None:
                continue
            try:
                _check(ack.ledger, seconds=ack.seconds)
            except ValueRefusedError as error:
                _log.error("the fleet's database: an ack of job %s is lost: %s", job.row.job_id, error)
                continue
            cursor = job.row.cursor if ack.cursor is None else ack.cursor
            batch = self._change(job, cursor=cursor, ledger=ack.ledger)
            if ack.seconds:
                batch.add_seconds(job.row.id, ack.seconds)

    async def seconds(self, key: int) -> dict[int, tuple[int, int]]:
        """Return number and uid sum (mod 2^64) of a job's acknowledged lines by second of source time."""
        uuid = self._job(key).row.id
        await self.written()
        rows = await self.reader.run(
            lambda connection: connection.execute(
                self.tables.sql("SELECT second, lines, uid_sum FROM $seconds WHERE job = %s"), (uuid,)
            ).fetchall(),
            timeout_s=_READ_TIMEOUT_S,
        )
        return {second: (lines, int(uid_sum)) for second, lines, uid_sum in rows}

    def update_ledger(self, key: int, ledger: str) -> None:
        """Store a ledger that changed without a line: with a new state."""
        _check(ledger)
        self._change(self._job(key), ledger=ledger)

    def update_stream(self, key: int, stream: int) -> None:
        """Store the log stream that a job's next lines go to."""
        _check(stream=stream)
        self._change(self._job(key), stream=stream)

    def newest_by_stream(self, name: str) -> dict[int, int]:
        """Return the time of the newest line of each further stream of a pipeline, as far as this agent owns it."""
        newest: dict[int, int] = {}
        for job in self._jobs.values():
            row = job.row
            if row.name == name and '"log_streams"' in row.ledger:
                try:
                    streams = msgspec.json.decode(row.ledger, type=_LogStreams).log_streams
                except msgspec.DecodeError:
                    continue
                for stream, newest_ns in streams.items():
                    newest[stream] = max(newest.get(stream, newest_ns), newest_ns)
        return newest

    def complete_logs(self, key: int, *, late: bool = False) -> None:
        """Store that all lines of an ended job are acknowledged.

        Args:
            key: The store's number for the job.
            late: Whether more lines may become visible; if not, the sums by second are deleted.
        """
        job = self._job(key)
        batch = self._change(job, logs_complete=True, late=late)
        if not late:
            batch.clear_seconds(job.row.id)

    def add_spans(self, key: int, spans: Sequence[OutboxSpan]) -> set[str]:
        """Write spans; one that is stored already keeps its first bytes. They are sent once they are committed.

        Returns:
            The ids of the new spans.
        """
        job = self._job(key)
        _check(*(span.span_id for span in spans))
        new = [span for span in spans if span.span_id not in job.span_ids]
        if new:
            # With the job's row: its end decides whether its spans are read at a takeover.
            batch = self._change(job)
            batch.spans += [(job.row.id, span) for span in new]
        added = {span.span_id for span in new}
        job.span_ids |= added
        return added

    def end_job(
        self,
        key: int,
        spans: Sequence[OutboxSpan],
        counted: RunTotals,
        *,
        run: PastRun | None = None,
        fingerprint: str | None = None,
    ) -> bool:
        """Write a job's last spans and count its run, in one transaction, once in the whole fleet.

        Args:
            key: The store's number for the job.
            spans: The spans that end now.
            counted: The totals of this run alone; `totals` includes it from now on.
            run: The run for the history of its pipeline; None stores none.
            fingerprint: The fingerprint of its failure; None without a failure.

        Returns:
            Whether this was the first call for the job; if not, nothing was changed.
        """
        job = self._job(key)
        if job.row.ended:
            return False
        _check(*counted.key, *((run.pipeline,) if run is not None else ()), fingerprint or "")
        self.add_spans(key, spans)
        batch = self._change(job, ended=True)
        batch.ended.append(EndedRun(job.row.id, counted, run, fingerprint))
        if run is not None:
            self._history.add(run, fingerprint)
        return True

    def unsent_spans(self, limit: int, max_bytes: int = 3 << 20) -> list[OutboxSpan]:
        """Return committed spans that are not acknowledged, oldest first.

        Args:
            limit: Maximum number of spans.
            max_bytes: Maximum number of bytes of all spans with their resources; one larger span is returned alone.
        """
        found: list[OutboxSpan] = []
        size = 0
        for span in self._unsent.values():
            if not self.may_send(self._by_key[span.job].row.shard):
                continue
            size += len(span.span) + len(span.resource)
            if len(found) == limit or (found and size > max_bytes):
                break
            found.append(span)
        return found

    def ack_spans(self, spans: Iterable[OutboxSpan]) -> None:
        """Store that spans are acknowledged."""
        for span in spans:
            job = self._by_key.get(span.job)
            if job is not None and self._unsent.pop((span.job, span.span_id), None) is not None:
                self._batch_of(job.row.shard).sent.append((job.row.id, span.span_id))

    def names(self, identity: str) -> dict[str, str]:
        """Return the cached names of a service's jobs in owned shards by id; it changes with the shards."""
        return self._names.setdefault(identity, {})

    def add_name(self, identity: str, job_id: str, name: str) -> None:
        """Cache the name of a listed job."""
        _check(identity, job_id)
        shard = job_uuid(identity, job_id).bytes[0]
        if shard in self.epochs:
            self._names.setdefault(identity, {})[job_id] = _name(name)
            self._batch_of(shard).names[identity, job_id] = shard, _name(name), time.time()

    async def may_forget(self, now_s: float, usual_s: float) -> bool:
        """Return whether the clock has gone right for long enough to forget what is old by it.

        Args:
            now_s: The present, in seconds since the epoch.
            usual_s: A longer time since the last call may be a step of the clock; see `settled_clock`.
        """
        tables, key = self.tables, f"clock {self.instance_id}"

        def settle(connection: Connection) -> bool:
            row = connection.execute(tables.sql("SELECT value FROM $meta WHERE key = %s"), (key,)).fetchone()
            last_s, _, since_s = (row[0] if row else "").partition(" ")
            settled, since = settled_clock(
                float(last_s) if last_s else None, float(since_s) if since_s else None, now_s, usual_s=usual_s
            )
            connection.execute(
                tables.sql("INSERT INTO $meta VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"),
                (key, f"{now_s:.0f} {'' if since is None else f'{since:.0f}'}"),
            )
            return settled

        return await self.reader.run(settle, timeout_s=_READ_TIMEOUT_S)

    async def forget(self, older_than_s: float, *, keep: Collection[str] = (), keep_unsent: bool = True) -> int:
        """Delete jobs of owned shards without a change for a long time, a few at a time, and names as old.

        Args:
            older_than_s: How long, in seconds; at least the largest `lookback`.
            keep: Ids of jobs to keep: those that are followed, however silent, or named by a watch.
            keep_unsent: Whether to keep jobs with unsent spans; if traces are not exported, that would be for ever.

        Returns:
            Number of deleted jobs.
        """
        await self.written()
        count = 0
        while True:
            epochs, before_s = dict(self.epochs), time.time() - older_than_s
            gone: list[UUID] = await self.writer.run(
                lambda connection, epochs=epochs, before_s=before_s: _delete_old(  # type: ignore[misc]
                    connection, self.tables, self.agent, epochs, before_s, keep, keep_unsent=keep_unsent
                ),
                timeout_s=_WRITE_TIMEOUT_S,
            )
            for uuid in gone:
                job = self._jobs.pop(uuid, None)
                if job is not None:
                    del self._by_key[job.key]
                    self._unsent = {key: span for key, span in self._unsent.items() if key[0] != job.key}
                    self._names.get(job.row.identity, {}).pop(job.row.job_id, None)
            count += len(gone)
            if len(gone) < _DELETED_AT_ONCE:
                return count


def _delete_old(
    connection: Connection,
    tables: Tables,
    agent: int,
    epochs: Mapping[int, int],
    before_s: float,
    keep: Collection[str],
    *,
    keep_unsent: bool,
) -> list[UUID]:
    """Delete some old jobs with all that belongs to them, and old names; return the jobs."""
    values = {
        "agent": agent,
        "shards": list(epochs.keys()),
        "epochs": list(epochs.values()),
        "before_s": before_s,
        "before_day": int(before_s // _DAY_S),
        "now_s": time.time(),
        "future_day": int(time.time() // _DAY_S) + _FUTURE_DAYS,
        "keep": list(keep),
        "limit": _DELETED_AT_ONCE,
    }
    unsent = "AND NOT EXISTS (SELECT FROM $spans WHERE job = jobs.id AND NOT acked)" if keep_unsent else ""
    with transaction(connection):
        held = connection.execute(
            tables.sql(
                "SELECT shard FROM $leases WHERE owner = %(agent)s AND (shard, epoch) IN"
                " (SELECT * FROM unnest(%(shards)s::smallint[], %(epochs)s::bigint[])) FOR KEY SHARE"
            ),
            values,
        ).fetchall()
        values["held"] = [shard for (shard,) in held]
        # Written while the clock was wrong: they age from now on.
        connection.execute(
            tables.sql(
                "UPDATE $jobs SET updated_s = %(now_s)s, updated_day = %(future_day)s - 1"
                " WHERE shard = ANY(%(held)s) AND updated_day > %(future_day)s"
            ),
            values,
        )
        gone = [
            job
            for (job,) in connection.execute(
                tables.sql(
                    "SELECT id FROM $jobs AS jobs WHERE shard = ANY(%(held)s) AND updated_day <= %(before_day)s"  # noqa: S608
                    f" AND updated_s < %(before_s)s AND job_id <> ALL(%(keep)s) {unsent} LIMIT %(limit)s"
                ),
                values,
            )
        ]
        for table in ("spans", "seconds"):
            connection.execute(tables.sql(f"DELETE FROM ${table} WHERE job = ANY(%s)"), (gone,))  # noqa: S608
        connection.execute(tables.sql("DELETE FROM $jobs WHERE id = ANY(%s)"), (gone,))
        # If such a job is listed again, its name costs one more request.
        connection.execute(
            tables.sql("DELETE FROM $names WHERE shard = ANY(%(held)s) AND asked_s < %(before_s)s"), values
        )
    return gone


def _is_finished(row: StoredRow) -> bool:
    return row.ended and row.logs_complete and not row.late


def _name(name: str) -> str:
    return utf8_name(name).replace("\0", "?")


def _check(*texts: str, stream: int = 0, seconds: Mapping[int, tuple[int, int]] | None = None) -> None:
    """Raise ValueRefusedError for a value that the database cannot hold."""
    for text in texts:
        if "\0" in text:
            raise ValueRefusedError("the fleet's database cannot hold a text with a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueRefusedError(f"the fleet's database cannot hold a value: {error}") from error
    if not -_INT_32 <= stream < _INT_32:
        raise ValueRefusedError(f"the fleet's database cannot hold the stream {stream}")
    for second, (lines, _) in (seconds or {}).items():
        if not (-_INT_64 <= second < _INT_64 and -_INT_64 <= lines < _INT_64):
            raise ValueRefusedError(f"the fleet's database cannot hold the number of lines of second {second}: {lines}")
