"""The PostgreSQL store keeps every promise of `CheckpointStore`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.fleet.database import DatabaseThread, Tables, migrate
from tailspan_agent.fleet.leases import AgentInfo, join, leave, renew
from tailspan_agent.fleet.shard_rows import read_shards
from tailspan_agent.fleet.store import PostgresStore
from tailspan_agent.tasks import cancelled
from tests.fakes.postgres import Postgres
from tests.fakes.store_promises import STEPS, StorePromises
from tests.property.effort import fuzz

LEASE_S = 60.0


@asynccontextmanager
async def owner(dsn: str, fleet: str, *, crash: bool = False, instance: str = "me") -> AsyncIterator[PostgresStore]:
    """Open the store of an agent that owns all shards; in a crash it takes what is not written with it."""
    tables, leases = Tables(fleet), DatabaseThread(dsn, "leases")
    leases.run_now(lambda connection: migrate(connection, tables))
    store = PostgresStore(dsn, tables, instance, gather_s=0.002)
    info = AgentInfo(instance, "host", 1, "0", "")
    agent = leases.run_now(lambda connection: join(connection, tables, info, LEASE_S))
    taken = leases.run_now(
        lambda connection: renew(connection, tables, agent, {}, lease_s=LEASE_S, draining=False, health={})
    ).taken
    store.writer.join(agent, 0)
    store.adopt(taken, leases.run_now(lambda connection: read_shards(connection, tables, list(taken))))
    writing = asyncio.create_task(store.run())
    try:
        yield store
        if not crash:
            await store.written()
            leases.run_now(lambda connection: leave(connection, tables, agent))
    finally:
        await cancelled(writing)
        store.close()
        leases.close()


class TestPostgresStore(StorePromises):
    """A fleet for each place."""

    @pytest.fixture(autouse=True)
    def _server(self, postgres: Postgres) -> None:
        self.dsn = postgres.dsn

    @asynccontextmanager
    async def opened(self, home: Path, *, crash: bool = False) -> AsyncIterator[CheckpointStore]:
        """Open the store with all shards."""
        async with owner(self.dsn, "p" + sha256(str(home).encode()).hexdigest()[:30], crash=crash) as store:
            yield store

    @fuzz(12)
    @given(steps=st.lists(STEPS, max_size=25), written_after=st.integers(0, 25), crash=st.booleans())
    def test_a_store_is_what_was_done(self, steps: Sequence[tuple[Any, ...]], written_after: int, crash: bool) -> None:
        """After any writes and a restart the store is the same; after a kill it is as it was at one moment before."""
        self.check_steps(steps, written_after, crash)
