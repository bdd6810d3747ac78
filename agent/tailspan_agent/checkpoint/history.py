"""What the checkpoint store keeps of ended runs: the last ones of each pipeline, and how often each failure was seen.

All of it is bounded: a pipeline has at most `KEPT_RUNS` runs and `KEPT_FAILURES` kinds of failure, and only pipelines
with metrics of their own (`agent.max_pipeline_names`) have any.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any

from tailspan_agent.analysis.baseline import KEPT_RUNS, PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES

__all__ = ["KEPT_FAILURES", "StoredHistory"]

KEPT_FAILURES = 100

_log = logging.getLogger(__name__)


class StoredHistory:
    """The history of an open store.

    Args:
        select: Runs a query with its values and returns the rows.
    """

    def __init__(self, select: Callable[..., list[Any]]) -> None:
        self._select = select

    @staticmethod
    def add(db: sqlite3.Connection, run: PastRun, fingerprint: str | None) -> None:
        """Write an ended run, inside the caller's transaction; the oldest of its pipeline make room.

        Args:
            db: The store.
            run: The run.
            fingerprint: Of its failure; None for a run without one.
        """
        if run.too_fast:
            db.execute(
                "INSERT INTO too_fast VALUES (?, 1) ON CONFLICT (pipeline) DO UPDATE SET runs = runs + 1",
                (run.pipeline,),
            )
        if run.pipeline == OTHER_PIPELINES:
            return
        db.execute("INSERT INTO history (pipeline, facts) VALUES (?, ?)", (run.pipeline, run.to_json()))
        db.execute(
            "DELETE FROM history WHERE pipeline = ? AND run <="
            " (SELECT run FROM history WHERE pipeline = ? ORDER BY run DESC LIMIT 1 OFFSET ?)",
            (run.pipeline, run.pipeline, KEPT_RUNS),
        )
        if fingerprint is None:
            return
        db.execute(
            "INSERT INTO failures VALUES (:pipeline, :fingerprint, 1, :ended, :ended)"
            " ON CONFLICT (pipeline, fingerprint) DO UPDATE SET runs = runs + 1,"
            " first_unix_nano = min(first_unix_nano, :ended), last_unix_nano = max(last_unix_nano, :ended)",
            {"pipeline": run.pipeline, "fingerprint": fingerprint, "ended": run.ended_unix_nano},
        )
        db.execute(
            "DELETE FROM failures WHERE pipeline = :pipeline AND fingerprint IN (SELECT fingerprint FROM failures"
            " WHERE pipeline = :pipeline ORDER BY last_unix_nano DESC LIMIT -1 OFFSET :kept)",
            {"pipeline": run.pipeline, "kept": KEPT_FAILURES},
        )

    def past_runs(self) -> list[PastRun]:
        """Return the last ended runs of all pipelines; a damaged one is left out, with a warning."""
        runs = []
        for (ledger,) in self._select("SELECT facts FROM history ORDER BY run"):
            try:
                runs.append(PastRun.from_json(ledger))
            except ValueError as error:
                _log.warning("a run in the history of the checkpoint store is damaged and left out: %s", error)
        return runs

    def too_fast(self) -> dict[str, int]:
        """Return for each pipeline how many runs succeeded suspiciously fast since the store was made."""
        return dict(self._select("SELECT pipeline, runs FROM too_fast"))

    def earlier_failures(self, pipeline: str, fingerprint: str) -> tuple[int, int | None]:
        """Return how many runs failed in this way before, and when the first one did, in ns since the epoch.

        Args:
            pipeline: The label of the pipeline.
            fingerprint: Of the failure.
        """
        query = "SELECT runs, first_unix_nano FROM failures WHERE pipeline = ? AND fingerprint = ?"
        rows = self._select(query, pipeline, fingerprint)
        return rows[0] if rows else (0, None)
