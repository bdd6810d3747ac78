"""`Batch`: the writes of a moment, gathered by job, and how they go into the fleet's database in one transaction.

Each write has the epoch of its shard. The transaction locks the leases against a takeover; a write whose epoch has
moved on has no effect. A row of the agent counts its transactions, so a commit whose answer was lost is not repeated,
and a server that has lost the last transactions (a failover to a copy that lags) is noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from tailspan._plural import plural
from tailspan_agent.analysis.baseline import KEPT_RUNS, PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.history import KEPT_FAILURES
from tailspan_agent.checkpoint.rows import OutboxSpan
from tailspan_agent.errors import AgentError
from tailspan_agent.fleet.database import Connection, Tables, transaction

__all__ = ["Batch", "DivergedError", "EndedRun", "StoredRow", "Written", "write_batch"]

_MOD = 1 << 64

_log = logging.getLogger(__name__)


class DivergedError(AgentError):
    """The database does not have what this agent has written: it must take its shards again, and read them."""


class StoredRow(NamedTuple):
    """A row of the table ``jobs``, in the order of its columns."""

    id: UUID
    shard: int
    identity: str
    job_id: str
    name: str
    stream: int
    cursor: bytes | None
    ledger: str
    logs_complete: bool
    late: bool
    ended: bool
    updated_s: float
    updated_day: int


class EndedRun(NamedTuple):
    """A run to be counted with the end of its job.

    Attributes:
        id: The job.
        counted: The totals of this run alone.
        run: The run for the history; None stores none.
        fingerprint: The fingerprint of its failure; None without a failure.
    """

    id: UUID
    counted: RunTotals
    run: PastRun | None
    fingerprint: str | None


@dataclass(slots=True)
class Batch:
    """Writes that are not in the database yet: of each job only the last state.

    Attributes:
        epochs: The epoch of each shard that is written to.
        new: Jobs that the database does not have.
        jobs: Changed jobs.
        cleared: Jobs whose sums by second are deleted, before others are added.
        seconds: Sums to be added by job and second.
        spans: New spans with their jobs.
        sent: Spans that are acknowledged.
        ended: Runs to be counted.
        names: Cached names by (identity, job id), as (shard, name, when).
        attempted: Whether an earlier attempt may have been committed.
    """

    epochs: dict[int, int] = field(default_factory=dict)
    new: dict[UUID, StoredRow] = field(default_factory=dict)
    jobs: dict[UUID, StoredRow] = field(default_factory=dict)
    cleared: set[UUID] = field(default_factory=set)
    seconds: dict[UUID, dict[int, tuple[int, int]]] = field(default_factory=dict)
    spans: list[tuple[UUID, OutboxSpan]] = field(default_factory=list)
    sent: list[tuple[UUID, str]] = field(default_factory=list)
    ended: list[EndedRun] = field(default_factory=list)
    names: dict[tuple[str, str], tuple[int, str, float]] = field(default_factory=dict)
    attempted: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.epochs

    def add_seconds(self, job: UUID, seconds: Mapping[int, tuple[int, int]]) -> None:
        """Add sums by second of a job."""
        known = self.seconds.setdefault(job, {})
        for second, (lines, uid_sum) in seconds.items():
            lines_before, sum_before = known.get(second, (0, 0))
            known[second] = lines_before + lines, (sum_before + uid_sum) % _MOD

    def clear_seconds(self, job: UUID) -> None:
        """Delete the sums of a job that were added so far."""
        self.seconds.pop(job, None)
        self.cleared.add(job)

    def of_shards(self, shards: Iterable[int]) -> Batch:
        """Return the part of some shards."""
        kept = set(shards)
        return Batch(
            {shard: epoch for shard, epoch in self.epochs.items() if shard in kept},
            {job: row for job, row in self.new.items() if row.shard in kept},
            {job: row for job, row in self.jobs.items() if row.shard in kept},
            {job for job in self.cleared if job.bytes[0] in kept},
            {job: seconds for job, seconds in self.seconds.items() if job.bytes[0] in kept},
            [span for span in self.spans if span[0].bytes[0] in kept],
            [sent for sent in self.sent if sent[0].bytes[0] in kept],
            [run for run in self.ended if run.id.bytes[0] in kept],
            {name: row for name, row in self.names.items() if row[0] in kept},
            self.attempted,
        )

    def parts(self) -> list[Batch]:
        """Return a batch for each shard: where one value is refused, the others are written."""
        return [self.of_shards([shard]) for shard in self.epochs]


class Written(NamedTuple):
    """What a transaction has written.

    Attributes:
        writes: The number of transactions of this agent, with this one.
        lost: Shards whose epoch has moved on; their writes had no effect.
        totals: The totals that have changed, with the runs of all agents.
        runs: The numbers of the runs in the history.
    """

    writes: int
    lost: frozenset[int]
    totals: list[RunTotals]
    runs: list[int]


def write_batch(connection: Connection, tables: Tables, agent: int, writes: int, batch: Batch) -> Written:
    """Write a batch in one transaction.

    Args:
        connection: The connection of the writer.
        tables: The tables of the fleet.
        agent: The agent's number.
        writes: The number of this agent's transactions so far.
        batch: The writes.

    Raises:
        DivergedError: The database has lost transactions of this agent.
        psycopg.Error: Nothing was written, or it is not known whether it was: try the same batch again.
    """
    lost: frozenset[int] = frozenset()
    totals: list[RunTotals] = []
    runs: list[int] = []
    with transaction(connection) as begun:
        # Not in the agent's other row: a write that waits must not hold up the renewal of the leases.
        row = connection.execute(
            tables.sql("UPDATE $writers SET writes = writes + 1 WHERE agent = %s RETURNING writes"), (agent,)
        ).fetchone()
        if batch.attempted and row == (writes + 2,):
            raise psycopg.Rollback(begun)  # the earlier attempt was committed
        if row != (writes + 1,):
            raise DivergedError(
                f"the fleet's database has {row[0] - 1 if row else 'no'} of {writes} transactions of this agent:"
                " it was restored, or failed over to a copy that lagged"
            )
        held = _fenced(connection, tables, agent, batch.epochs)
        lost = frozenset(batch.epochs.keys() - held)
        if lost:
            batch = batch.of_shards(held)
        totals, runs = _write(connection, tables, batch)
    return Written(writes + 1, lost, totals, runs)


def _fenced(connection: Connection, tables: Tables, agent: int, epochs: Mapping[int, int]) -> set[int]:
    """Lock the leases of shards against a takeover until the commit; return those that the agent still holds."""
    rows = connection.execute(
        # A renewal changes no key, so it does not wait for this lock; a takeover does: it locks FOR UPDATE.
        tables.sql(
            "SELECT shard FROM $leases WHERE owner = %s AND (shard, epoch) IN"
            " (SELECT * FROM unnest(%s::smallint[], %s::bigint[])) FOR KEY SHARE"
        ),
        (agent, list(epochs.keys()), list(epochs.values())),
    ).fetchall()
    return {shard for (shard,) in rows}


_COLUMNS = (
    "id, shard, identity, job_id, name, stream, cursor, ledger, logs_complete, late, ended, updated_s, updated_day"
)
_ARRAYS = (
    "unnest(%s::uuid[], %s::smallint[], %s::text[], %s::text[], %s::text[], %s::integer[], %s::bytea[], %s::text[],"
    " %s::boolean[], %s::boolean[], %s::boolean[], %s::double precision[], %s::integer[])"
)
_CHANGING = ("stream", "cursor", "ledger", "logs_complete", "late", "ended", "updated_s", "updated_day")
_SET = ", ".join(f"{column} = new.{column}" for column in _CHANGING)
_SET_EXCLUDED = ", ".join(f"{column} = excluded.{column}" for column in _CHANGING)


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    columns: list[list[Any]] = [[] for _ in range(width)]
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return columns


def _write(connection: Connection, tables: Tables, batch: Batch) -> tuple[list[RunTotals], list[int]]:
    """Write all of a batch in the caller's transaction; return the changed totals and the numbers of the runs."""
    ended = batch.ended
    if ended:
        known = connection.execute(
            tables.sql("SELECT id FROM $jobs WHERE id = ANY(%s) AND ended FOR UPDATE"), ([run.id for run in ended],)
        ).fetchall()
        counted = {job for (job,) in known}
        ended = [run for run in ended if run.id not in counted]
    if batch.new:
        connection.execute(
            tables.sql(
                f"INSERT INTO $jobs ({_COLUMNS}) SELECT * FROM {_ARRAYS}"  # noqa: S608 - constants
                f" ON CONFLICT (id) DO UPDATE SET {_SET_EXCLUDED}"
            ),
            _columns(batch.new.values(), len(StoredRow._fields)),
        )
    if batch.jobs:
        cursor = connection.execute(
            tables.sql(f"UPDATE $jobs AS job SET {_SET} FROM {_ARRAYS} AS new ({_COLUMNS}) WHERE job.id = new.id"),  # noqa: S608
            _columns(batch.jobs.values(), len(StoredRow._fields)),
        )
        if cursor.rowcount != len(batch.jobs):
            lacking = len(batch.jobs) - cursor.rowcount
            raise DivergedError(f"the fleet's database lacks {lacking} {plural(lacking, 'job')} of this agent")
    if batch.cleared:
        connection.execute(tables.sql("DELETE FROM $seconds WHERE job = ANY(%s)"), (list(batch.cleared),))
    _write_seconds(connection, tables, batch)
    _write_spans(connection, tables, batch)
    if batch.names:
        names = [(*name, *row) for name, row in batch.names.items()]
        connection.execute(
            tables.sql(
                "INSERT INTO $names SELECT * FROM unnest(%s::text[], %s::text[], %s::smallint[], %s::text[],"
                " %s::double precision[]) ON CONFLICT (identity, job_id)"
                " DO UPDATE SET name = excluded.name, asked_s = excluded.asked_s"
            ),
            _columns(names, 5),
        )
    return _count_runs(connection, tables, ended), _write_history(connection, tables, ended)


def _write_seconds(connection: Connection, tables: Tables, batch: Batch) -> None:
    rows = [
        (job, second, lines, uid_sum)
        for job, seconds in batch.seconds.items()
        for second, (lines, uid_sum) in seconds.items()
    ]
    if rows:
        connection.execute(
            tables.sql(
                "INSERT INTO $seconds AS known SELECT * FROM unnest(%s::uuid[], %s::bigint[], %s::bigint[],"
                " %s::numeric[]) ON CONFLICT (job, second) DO UPDATE SET lines = known.lines + excluded.lines,"
                " uid_sum = (known.uid_sum + excluded.uid_sum) %% (2::numeric ^ 64)"
            ),
            _columns(rows, 4),
        )


def _write_spans(connection: Connection, tables: Tables, batch: Batch) -> None:
    if batch.spans:
        rows = [(job, span.span_id, job.bytes[0], span.resource, span.span) for job, span in batch.spans]
        connection.execute(
            tables.sql(
                "INSERT INTO $spans (job, span_id, shard, resource, span) SELECT * FROM unnest(%s::uuid[], %s::text[],"
                " %s::smallint[], %s::bytea[], %s::bytea[]) ON CONFLICT DO NOTHING"
            ),
            _columns(rows, 5),
        )
    if batch.sent:
        connection.execute(
            tables.sql(
                "UPDATE $spans AS span SET acked = true FROM unnest(%s::uuid[], %s::text[]) AS sent (job, span_id)"
                " WHERE span.job = sent.job AND span.span_id = sent.span_id"
            ),
            _columns(batch.sent, 2),
        )


def _count_runs(connection: Connection, tables: Tables, ended: Sequence[EndedRun]) -> list[RunTotals]:
    """Add runs to the totals that all agents share; return the changed totals."""
    added: dict[tuple[str, str, str], RunTotals] = {}
    for _, counted, _, _ in ended:
        known = added.get(counted.key)
        added[counted.key] = known.merge(counted) if known is not None else counted
    changed = []
    # In one order, so that agents wait for each other and not in a circle.
    for key in sorted(added):
        connection.execute(tables.sql("INSERT INTO $runs VALUES (%s, %s, %s, 0, '', '') ON CONFLICT DO NOTHING"), key)
        row = connection.execute(
            tables.sql(
                "SELECT pipeline, result, error_type, sum_s, buckets, exemplars FROM $runs"
                " WHERE pipeline = %s AND result = %s AND error_type = %s FOR UPDATE"
            ),
            key,
        ).fetchone()
        totals = added[key]
        if row is not None and row[4]:
            try:
                totals = RunTotals.from_row(row).merge(totals)
            except ValueError as error:
                _log.warning("the fleet's database: replacing damaged run totals: %s", error)
        connection.execute(
            tables.sql(
                "UPDATE $runs SET sum_s = %s, buckets = %s, exemplars = %s, changed_at = clock_timestamp()"
                " WHERE pipeline = %s AND result = %s AND error_type = %s"
            ),
            (*totals.to_row()[3:], *key),
        )
        changed.append(totals)
    return changed


def _write_history(connection: Connection, tables: Tables, ended: Sequence[EndedRun]) -> list[int]:
    """Add runs to the history; beyond its limits, the oldest of each pipeline are deleted."""
    # In one order, so that agents wait for each other and not in a circle.
    runs = sorted(
        ((run.pipeline, run, fingerprint) for _, _, run, fingerprint in ended if run is not None),
        key=lambda one: (one[0], one[2] or ""),
    )
    numbers: list[int] = []
    for pipeline, run, fingerprint in runs:
        if run.too_fast:
            connection.execute(
                tables.sql(
                    "INSERT INTO $too_fast AS known VALUES (%s, 1)"
                    " ON CONFLICT (pipeline) DO UPDATE SET runs = known.runs + 1"
                ),
                (pipeline,),
            )
        if pipeline == OTHER_PIPELINES:
            continue
        row = connection.execute(
            tables.sql("INSERT INTO $history (pipeline, facts) VALUES (%s, %s) RETURNING run"),
            (pipeline, run.to_json()),
        ).fetchone()
        numbers += row or ()
        if fingerprint is not None:
            connection.execute(
                tables.sql(
                    "INSERT INTO $failures AS known VALUES (%(pipeline)s, %(fingerprint)s, 1, %(ended)s, %(ended)s)"
                    " ON CONFLICT (pipeline, fingerprint) DO UPDATE SET runs = known.runs + 1,"
                    " first_unix_nano = least(known.first_unix_nano, %(ended)s),"
                    " last_unix_nano = greatest(known.last_unix_nano, %(ended)s), changed_at = clock_timestamp()"
                ),
                {"pipeline": pipeline, "fingerprint": fingerprint, "ended": run.ended_unix_nano},
            )
    for pipeline in dict.fromkeys(pipeline for pipeline, _, _ in runs):
        connection.execute(
            tables.sql(
                "DELETE FROM $history WHERE pipeline = %s AND run <="
                " (SELECT run FROM $history WHERE pipeline = %s ORDER BY run DESC LIMIT 1 OFFSET %s)"
            ),
            (pipeline, pipeline, KEPT_RUNS),
        )
        connection.execute(
            tables.sql(
                "DELETE FROM $failures WHERE pipeline = %s AND fingerprint IN (SELECT fingerprint FROM $failures"
                " WHERE pipeline = %s ORDER BY last_unix_nano DESC OFFSET %s)"
            ),
            (pipeline, pipeline, KEPT_FAILURES),
        )
    return numbers
