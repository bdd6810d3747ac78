"""`Writes`: the writes of an open transaction of SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Writes"]


class Writes:
    """The writes of the open transaction, kept until it is committed: one that fails is made again from them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._made: list[tuple[str, Sequence[Any]]] = []

    def __len__(self) -> int:
        return len(self._made)

    def execute(self, statement: str, values: Sequence[object] | Mapping[str, object] = ()) -> sqlite3.Cursor:
        """Make a write."""
        cursor = self._db.execute(statement, values)
        self._made.append((statement, (values,)))
        return cursor

    def executemany(self, statement: str, rows: Sequence[Any]) -> sqlite3.Cursor:
        """Make a write for each row."""
        cursor = self._db.executemany(statement, rows)
        self._made.append((statement, rows))
        return cursor

    def make_again(self) -> None:
        """Make all writes again, in a new transaction."""
        for statement, rows in self._made:
            self._db.executemany(statement, rows)

    def forget(self, first: int = 0) -> None:
        """Forget the writes from a number on: they are committed, or rolled back."""
        del self._made[first:]
