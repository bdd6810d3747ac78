"""`PostgresStore`: the checkpoint store that the agents of a fleet share, a `CheckpointStore`.

Each agent has a copy in memory of the rows of the shards that it owns, so nothing is read on the way of a line. Writes
change the copy at once, and are gathered for up to 100 ms into one transaction, which a thread of its own makes:

    ack -> copy in memory -> Batch --(100 ms)--> BatchWriter: write_batch in its thread -> written

A process that ends before takes the last writes with it, which repeats lines (with the same uid) but never skips one:
the transactions keep the order of the writes. A span is sent only after it is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from uuid import UUID

import msgspec

from tailspan._clock import settled_clock
from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.pipeline_names import utf8_name
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.rows import Ack, Checkpoint, LedgerRow, OutboxSpan
from tailspan_agent.errors import LeaseLostError, ValueRefusedError
from tailspan_agent.fleet.batch import Batch, EndedRun, StoredRow, Written
from tailspan_agent.fleet.counts import FleetCounts, FleetHistory
from tailspan_agent.fleet.database import Connection, DatabaseThread, Tables, migrate
from tailspan_agent.fleet.shard_rows import DELETED_AT_ONCE, ShardRows, delete_old_jobs
from tailspan_agent.fleet.shards import job_uuid
from tailspan_agent.fleet.writer import BatchWriter

__all__ = ["PostgresStore", "open_store"]

_GATHER_S = 0.1
_READ_TIMEOUT_S = 30.0
_PART = 5000
_DAY_S = 86400
_INT_32, _INT_64 = 1 << 31, 1 << 63

_log = logging.getLogger(__name__)


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
        epochs: The epoch of each shard whose rows are in memory.
        reader: The connection for reads.
        writer: Writes what changes.
        counts: What all agents have counted.
        may_send: Returns whether this agent sends the spans of a shard.
    """

    def __init__(self, dsn: str, tables: Tables, instance_id: str, *, gather_s: float = _GATHER_S) -> None:
        self.instance_id = instance_id
        self.recovered: str | None = None
        self.epochs: dict[int, int] = {}
        self.tables = tables
        self.reader = DatabaseThread(dsn, f"{tables.fleet} reader")
        self.writer = BatchWriter(dsn, tables, gather_s=gather_s, on_written=self._on_written)
        self.counts = FleetCounts(self.reader, tables)
        self.may_send: Callable[[int], bool] = lambda _: True
        self._ledgers = _Ledgers(self.reader, tables)
        self._jobs: dict[UUID, _Job] = {}
        self._by_key: dict[int, _Job] = {}
        self._last_key = 0
        self._unsent: dict[tuple[int, str], OutboxSpan] = {}
        self._names: dict[str, dict[str, str]] = {}
        self.fleet_id, self.start_unix_nano = self.reader.run_now(self._read_meta)

    def _read_meta(self, connection: Connection) -> tuple[str, int]:
        meta: dict[str, str] = dict(connection.execute(self.tables.sql("SELECT key, value FROM $meta")).fetchall())
        self.counts.start(connection)
        return meta["instance_id"], int(meta["start_unix_nano"])

    @property
    def agent(self) -> int:
        """The number of this agent; 0 before it has joined."""
        return self.writer.agent

    @property
    def write_failed(self) -> bool:
        """Whether the last write failed."""
        return self.writer.failed

    @property
    def acked_at_s(self) -> float:
        """When the last ack was stored, in seconds since the epoch."""
        return self.writer.written_at_s

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
        unwritten = self.writer.unwritten_runs()
        return self.counts.with_unwritten(unwritten) if unwritten else self.counts.totals

    @property
    def history(self) -> FleetHistory:
        """The history of all agents."""
        return self.counts.history

    @property
    def ledgers(self) -> _Ledgers:
        """The ledgers of all jobs of the fleet."""
        return self._ledgers

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
        self.writer.drop(dropped)

    def _on_written(self, batch: Batch, written: Written) -> None:
        self.counts.on_written(written)
        for uuid, span in batch.spans:
            if uuid.bytes[0] not in written.lost and span.job in self._by_key:
                self._unsent[span.job, span.span_id] = span

    async def run(self) -> None:
        """Write what is gathered, until cancelled."""
        await self.writer.run()

    async def written(self) -> None:
        """Wait until all earlier writes are committed, or void because their shard is lost."""
        await self.writer.written()

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
        return self.writer.batch_of(shard, self.epochs[shard])

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
            if ack.completes is not None:
                self.complete_logs(ack.key, late=ack.completes)

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
        """Write a job's last spans and count its run once in the whole fleet; see `CheckpointStore`."""
        job = self._job(key)
        if job.row.ended:
            return False
        _check(*counted.key, *((run.pipeline,) if run is not None else ()), fingerprint or "")
        self.add_spans(key, spans)
        batch = self._change(job, ended=True)
        batch.ended.append(EndedRun(job.row.id, counted, run, fingerprint))
        if run is not None:
            self.counts.history.add(run, fingerprint)
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
            gone: list[UUID] = await self.writer.use(
                lambda connection, epochs=epochs, before_s=before_s: delete_old_jobs(  # type: ignore[misc]
                    connection, self.tables, self.agent, epochs, before_s, keep, keep_unsent=keep_unsent
                )
            )
            for uuid in gone:
                job = self._jobs.pop(uuid, None)
                if job is not None:
                    del self._by_key[job.key]
                    self._unsent = {key: span for key, span in self._unsent.items() if key[0] != job.key}
                    self._names.get(job.row.identity, {}).pop(job.row.job_id, None)
            count += len(gone)
            if len(gone) < DELETED_AT_ONCE:
                return count


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
