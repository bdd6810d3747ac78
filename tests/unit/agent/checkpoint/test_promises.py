"""The SQLite store keeps every promise of `CheckpointStore`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.checkpoint.store import SqliteStore
from tests.fakes.store_promises import STEPS, StorePromises
from tests.property.effort import fuzz


class TestSqliteStore(StorePromises):
    """A directory; a kill leaves the files as they are."""

    @asynccontextmanager
    async def opened(self, home: Path, *, crash: bool = False) -> AsyncIterator[CheckpointStore]:
        """Open the store of a directory."""
        store = SqliteStore(home)
        try:
            yield store
        finally:
            if crash:
                shutil.copytree(home, home / "killed")
            store.close()
            if crash:
                for file in (home / "killed").iterdir():
                    file.replace(home / file.name)

    @fuzz(60)
    @given(steps=st.lists(STEPS, max_size=25), written_after=st.integers(0, 25), crash=st.booleans())
    def test_a_store_is_what_was_done(self, steps: Sequence[tuple[Any, ...]], written_after: int, crash: bool) -> None:
        """After any writes and a restart the store is the same; after a kill it is as it was at one moment before."""
        self.check_steps(steps, written_after, crash)
