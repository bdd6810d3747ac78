"""The rows of shards in the database: read when an agent takes them, deleted when they are old."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from tailspan_agent.fleet.batch import StoredRow
from tailspan_agent.fleet.database import Connection, Tables, transaction

__all__ = ["DELETED_AT_ONCE", "ShardRows", "delete_old_jobs", "read_shards"]

DELETED_AT_ONCE = 500
"""The largest number of jobs that one transaction deletes."""

_DAY_S = 86400
_FUTURE_DAYS = 1


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


def delete_old_jobs(
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
        "limit": DELETED_AT_ONCE,
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
