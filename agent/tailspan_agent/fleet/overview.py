"""`FleetOverview`: what the page of any agent shows of the whole fleet, read from the database when a browser asks.

An agent has in memory only the jobs of its own shards; the others are read here. While a page is open, reads take at
most a twentieth of the time, however many jobs there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from tailspan_agent.checkpoint.rows import Checkpoint
from tailspan_agent.errors import CheckpointError
from tailspan_agent.fleet.database import Connection, Tables
from tailspan_agent.fleet.leases import FleetAgent, read_agents
from tailspan_agent.fleet.shards import job_uuid
from tailspan_agent.fleet.store import PostgresStore

__all__ = ["FleetOverview", "FoundJob", "SharedJob"]

_FRESH_S = 1.0
_READ_SHARE = 0.05
_READ_TIMEOUT_S = 10.0


class SharedJob(NamedTuple):
    """A job that has not ended and that another agent follows.

    Attributes:
        number: The database's number for the job.
        identity: The identity of its service.
        job_id: The job.
        name: The job's name.
        ledger: The JSON of its `JobLedger`.
        agent: The number of the agent; None while no agent has the job's shard.
    """

    number: int
    identity: str
    job_id: str
    name: str
    ledger: str
    agent: int | None


class FoundJob(NamedTuple):
    """What the database has of one job.

    Attributes:
        checkpoint: Its checkpoint; the key is the database's number for the job.
        agent: The number of the agent that has its shard; None while none has it.
    """

    checkpoint: Checkpoint
    agent: int | None


class FleetOverview:
    """The agents of a fleet, and the jobs that the others follow.

    Args:
        store: The store of the fleet.
        lease_s: ``fleet.lease``.

    Attributes:
        problem: Why the last read failed; None if it succeeded. What was read before is shown meanwhile.
        lease_s: ``fleet.lease``.
    """

    def __init__(self, store: PostgresStore, *, lease_s: float) -> None:
        self.problem: str | None = None
        self.lease_s = lease_s
        self._store = store
        self._agents: Mapping[int, FleetAgent] = {}
        self._jobs: Sequence[SharedJob] = ()
        self._due_s = float("-inf")

    @property
    def agent(self) -> int:
        """The number of this agent; 0 before it has joined."""
        return self._store.agent

    @property
    def agents(self) -> Mapping[int, FleetAgent]:
        """The agents at the last read, by number, in the order in which they joined."""
        return self._agents

    @property
    def jobs(self) -> Sequence[SharedJob]:
        """The jobs of other agents at the last read."""
        return self._jobs

    async def refresh(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Read agents and jobs, unless the last read was a moment ago; a failure is in `problem`."""
        begun_s = clock_s()
        if begun_s < self._due_s:
            return
        self._due_s = float("inf")  # other browsers do not wait for the same read
        try:
            self._agents, self._jobs = await self._store.reader.run(
                partial(_read, tables=self._store.tables, agent=self._store.agent), timeout_s=_READ_TIMEOUT_S
            )
            self.problem = None
        except CheckpointError as error:
            self.problem = str(error)
        finally:
            self._due_s = clock_s() + max(_FRESH_S, (clock_s() - begun_s) / _READ_SHARE)

    async def find(self, identity: str, job_id: str) -> FoundJob | None:
        """Return what the database has of a job, whichever agent follows it; None for an unknown job.

        Raises:
            CheckpointError: The database cannot be reached.
        """
        return await self._store.reader.run(
            partial(_find, tables=self._store.tables, identity=identity, job_id=job_id), timeout_s=_READ_TIMEOUT_S
        )


def _read(connection: Connection, tables: Tables, agent: int) -> tuple[dict[int, FleetAgent], list[SharedJob]]:
    jobs = connection.execute(
        tables.sql(
            "SELECT number, identity, job_id, name, ledger, owner FROM $jobs AS job JOIN $leases AS lease USING (shard)"
            " WHERE NOT ended AND owner IS DISTINCT FROM %s"
        ),
        (agent,),
    ).fetchall()
    return {one.id: one for one in read_agents(connection, tables)}, [SharedJob(*row) for row in jobs]


def _find(connection: Connection, tables: Tables, identity: str, job_id: str) -> FoundJob | None:
    row = connection.execute(
        tables.sql(
            "SELECT number, name, stream, cursor, ledger, logs_complete, late, ended, owner"
            " FROM $jobs AS job JOIN $leases AS lease USING (shard) WHERE id = %s"
        ),
        (job_uuid(identity, job_id),),
    ).fetchone()
    return FoundJob(Checkpoint(*row[:8]), row[8]) if row is not None else None
