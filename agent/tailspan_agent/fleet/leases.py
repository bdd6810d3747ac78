"""Leases: the rows that say which agent owns which shard, and the transactions that renew, take and release them.

A lease ends by the clock of the database. Taking one increments its epoch, so the writes of an earlier owner have no
effect any more (`write_batch`). One statement renews all leases of an agent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tailspan_agent.fleet.batch import DivergedError
from tailspan_agent.fleet.database import Connection, Tables, schema_version, transaction
from tailspan_agent.fleet.shards import METRICS_LEASE, fair_share

__all__ = [
    "AgentInfo",
    "FleetAgent",
    "Standing",
    "join",
    "leases_of",
    "leave",
    "read_agents",
    "release",
    "renew",
    "request_drain",
]

_KEPT_LEASES = 100
"""An agent that has not renewed for that many leases is removed from the list of agents."""


class AgentInfo(NamedTuple):
    """What others see of an agent.

    Attributes:
        instance: The UUID of its state directory.
        host: Its host's name.
        pid: Its process id.
        version: Its version of Tailspan.
        page: The URL of its page; empty without one.
    """

    instance: str
    host: str
    pid: int
    version: str
    page: str


class FleetAgent(NamedTuple):
    """An agent as the others see it.

    Attributes:
        id: Its number; an agent that joined later has a larger one.
        info: Where it runs.
        draining: Whether it hands over everything.
        left_s: How long its leases last without a renewal, in seconds; negative after their end.
        shards: The number of its shards.
        health: What it reports of itself.
        has_metrics: Whether it exports what the whole fleet counts.
    """

    id: int
    info: AgentInfo
    draining: bool
    left_s: float
    shards: int
    health: Mapping[str, Any]
    has_metrics: bool


class Standing(NamedTuple):
    """What an agent has after a renewal.

    Attributes:
        held: The epochs of leases that were renewed.
        taken: The epochs of leases that were taken now.
        taken_over: How many of these belonged to an agent that did not renew them.
        share: The number of shards that it is to own.
        agents: The number of agents.
        writes: The number of its transactions, as the database has it.
        schema: The version of the tables.
        draining: Whether the agent is to hand over everything, as it or another process has asked.
    """

    held: dict[int, int]
    taken: dict[int, int]
    taken_over: int
    share: int
    agents: int
    writes: int
    schema: int
    draining: bool


def _notify(connection: Connection, tables: Tables) -> None:
    connection.execute("SELECT pg_notify(%s, '')", (tables.channel,))


def join(connection: Connection, tables: Tables, info: AgentInfo, lease_s: float) -> int:
    """Add an agent; return its number. What an earlier process of the same state directory has becomes free."""
    with transaction(connection):
        earlier = connection.execute(
            tables.sql("DELETE FROM $agents WHERE instance = %s RETURNING id"), (info.instance,)
        ).fetchall()
        ids = [agent for (agent,) in earlier]
        connection.execute(
            tables.sql("UPDATE $leases SET owner = NULL, expires_at = NULL WHERE owner = ANY(%s)"), (ids,)
        )
        connection.execute(tables.sql("DELETE FROM $writers WHERE agent = ANY(%s)"), (ids,))
        row = connection.execute(
            tables.sql(
                "INSERT INTO $agents (instance, host, pid, version, page, expires_at)"
                " VALUES (%s, %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s)) RETURNING id"
            ),
            (*info, lease_s),
        ).fetchone()
        assert row is not None
        agent: int = row[0]
        connection.execute(tables.sql("INSERT INTO $writers VALUES (%s)"), (agent,))
        _notify(connection, tables)
    return agent


def renew(
    connection: Connection,
    tables: Tables,
    agent: int,
    held: Mapping[int, int],
    *,
    lease_s: float,
    draining: bool,
    health: Mapping[str, Any],
) -> Standing:
    """Renew an agent's leases, and take free ones up to its fair share.

    Args:
        connection: The connection for leases.
        tables: The tables of the fleet.
        agent: The agent's number.
        held: The epoch of each lease that the agent has.
        lease_s: How long a lease lasts, in seconds.
        draining: Whether the agent takes no more shards, and hands over all that it has.
        health: What the others are to see of it.

    Raises:
        DivergedError: The database does not know the agent.
    """
    with transaction(connection):
        row = connection.execute(
            tables.sql(
                "WITH before AS (SELECT id, expires_at > clock_timestamp() AS was_live FROM $agents WHERE id = %s"
                " FOR UPDATE)"
                " UPDATE $agents AS agents SET expires_at = clock_timestamp() + make_interval(secs => %s), "
                " draining = draining OR %s, health = %s FROM before WHERE agents.id = before.id RETURNING draining,"
                " (SELECT writes FROM $writers WHERE agent = agents.id), was_live"
            ),
            (agent, lease_s, draining, json.dumps(health)),
        ).fetchone()
        if row is None or row[1] is None:
            raise DivergedError("the fleet's database does not know this agent any more")
        renewed = connection.execute(
            tables.sql(
                "UPDATE $leases AS lease SET expires_at = clock_timestamp() + make_interval(secs => %s)"
                " FROM unnest(%s::smallint[], %s::bigint[]) AS held (shard, epoch)"
                " WHERE lease.shard = held.shard AND lease.epoch = held.epoch AND owner = %s"
                " RETURNING lease.shard, lease.epoch"
            ),
            (lease_s, list(held.keys()), list(held.values()), agent),
        ).fetchall()
        kept: dict[int, int] = dict(renewed)
        agents = _taking_agents(connection, tables)
        if row[2]:
            # Otherwise the database was away for all agents, and the others are about to renew, too.
            _remove_silent_agents(connection, tables, lease_s)
        share = fair_share(agent, agents)
        shards = len(kept.keys() - {METRICS_LEASE})
        taken, taken_over = _take(connection, tables, agent, kept, share - shards, lease_s) if share else ({}, 0)
        version = schema_version(connection, tables)
        return Standing(kept, taken, taken_over, share, len(agents), row[1], version, row[0])


def _remove_silent_agents(connection: Connection, tables: Tables, lease_s: float) -> None:
    connection.execute(
        tables.sql(
            "WITH silent AS (DELETE FROM $agents WHERE expires_at < clock_timestamp() - make_interval(secs => %s)"
            " RETURNING id) DELETE FROM $writers WHERE agent IN (SELECT id FROM silent)"
        ),
        (_KEPT_LEASES * lease_s,),
    )


def _taking_agents(connection: Connection, tables: Tables) -> list[int]:
    """Return the numbers of the agents that share the shards."""
    rows = connection.execute(
        tables.sql("SELECT id FROM $agents WHERE expires_at > clock_timestamp() AND NOT draining")
    ).fetchall()
    return [agent for (agent,) in rows]


def _take(
    connection: Connection, tables: Tables, agent: int, kept: Collection[int], count: int, lease_s: float
) -> tuple[dict[int, int], int]:
    """Take free leases: some shards, and the lease of the metrics; return their epochs, and how many had an owner."""
    taken: dict[int, int] = {}
    taken_over = 0
    for condition, limit in ((f"shard < {METRICS_LEASE}", count), (f"shard = {METRICS_LEASE}", 1)):
        if limit <= 0:
            continue
        # A lease of this agent that it does not know of comes from before a failover: it is free as well.
        free = connection.execute(
            tables.sql(
                f"SELECT shard, owner FROM $leases WHERE {condition} AND shard <> ALL(%s)"  # noqa: S608 - constants
                " AND (owner IS NULL OR owner = %s OR expires_at <= clock_timestamp())"
                " ORDER BY shard LIMIT %s FOR UPDATE SKIP LOCKED"
            ),
            (list(kept), agent, limit),
        ).fetchall()
        rows = connection.execute(
            tables.sql(
                "UPDATE $leases SET owner = %s, epoch = epoch + 1,"
                " expires_at = clock_timestamp() + make_interval(secs => %s),"
                " takeovers = takeovers + (owner IS NOT NULL AND owner <> %s)::integer"
                " WHERE shard = ANY(%s) RETURNING shard, epoch"
            ),
            (agent, lease_s, agent, [shard for shard, _ in free]),
        ).fetchall()
        taken.update(rows)
        taken_over += sum(owner not in (None, agent) for shard, owner in free if shard != METRICS_LEASE)
    return taken, taken_over


def release(connection: Connection, tables: Tables, agent: int, epochs: Mapping[int, int]) -> None:
    """Make leases free, and wake the other agents."""
    with transaction(connection):
        connection.execute(
            tables.sql(
                "UPDATE $leases SET owner = NULL, expires_at = NULL WHERE owner = %s AND (shard, epoch) IN"
                " (SELECT * FROM unnest(%s::smallint[], %s::bigint[]))"
            ),
            (agent, list(epochs.keys()), list(epochs.values())),
        )
        _notify(connection, tables)


def leave(connection: Connection, tables: Tables, agent: int) -> None:
    """Remove an agent, make its leases free, and wake the other agents."""
    with transaction(connection):
        connection.execute(tables.sql("DELETE FROM $agents WHERE id = %s"), (agent,))
        connection.execute(tables.sql("DELETE FROM $writers WHERE agent = %s"), (agent,))
        connection.execute(tables.sql("UPDATE $leases SET owner = NULL, expires_at = NULL WHERE owner = %s"), (agent,))
        _notify(connection, tables)


def request_drain(connection: Connection, tables: Tables, instance: str) -> int | None:
    """Ask the agent of a state directory to hand over everything; return its number, None without such an agent."""
    with transaction(connection):
        row = connection.execute(
            tables.sql("UPDATE $agents SET draining = true WHERE instance = %s RETURNING id"), (instance,)
        ).fetchone()
        _notify(connection, tables)
    return row[0] if row is not None else None


def leases_of(connection: Connection, tables: Tables, agent: int) -> int:
    """Return the number of leases that an agent has; 0 also for one that has left."""
    row = connection.execute(tables.sql("SELECT count(*) FROM $leases WHERE owner = %s"), (agent,)).fetchone()
    return row[0] if row is not None else 0


def read_agents(connection: Connection, tables: Tables) -> Sequence[FleetAgent]:
    """Return all agents in the order in which they joined, with those that stopped without leaving."""
    rows = connection.execute(
        tables.sql(
            "SELECT id, instance, host, pid, version, page, draining,"
            " extract(epoch FROM expires_at - clock_timestamp())::double precision, health,"
            " (SELECT count(*) FROM $leases WHERE owner = agents.id AND shard <> %(metrics)s),"
            " EXISTS (SELECT FROM $leases WHERE owner = agents.id AND shard = %(metrics)s)"
            " FROM $agents AS agents ORDER BY id"
        ),
        {"metrics": METRICS_LEASE},
    ).fetchall()
    return [
        FleetAgent(row[0], AgentInfo(*row[1:6]), row[6], row[7], row[9], json.loads(row[8]), row[10]) for row in rows
    ]
