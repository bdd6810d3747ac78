"""The SQLite store keeps every promise of `CheckpointStore`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.checkpoint.store import SqliteStore
from tests.fakes.store_promises import StorePromises


class TestSqliteStore(StorePromises):
    """A directory; a kill leaves the files as they are."""

    @asynccontextmanager
    async def opened(self, home: Path, *, crash: bool = False) -> AsyncIterator[CheckpointStore]:
        """Open the store of a directory."""
        store = SqliteStore(home)
        try:
            yield store
        finally:
            store.close()
