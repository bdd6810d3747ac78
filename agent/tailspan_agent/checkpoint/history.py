"""The history in the checkpoint store: the last ended runs of each pipeline, and how often each failure occurred.

Its size is limited: a pipeline has at most `KEPT_RUNS` runs and `KEPT_FAILURES` different failures, and only pipelines
with metrics of their own (`agent.max_pipeline_names`) have a history.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Collection
from typing import Any

from tailspan_agent.analysis.baseline import KEPT_RUNS, PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.checkpoint.writes import Writes

__all__ = ["KEPT_FAILURES", "StoredHistory"]

KEPT_FAILURES = 100
_FUTURE_NS = 86400 * 10**9

_log = logging.getLogger(__name__)


class StoredHistory:
    """The history of an open store.

    Args:
        select: Runs a query with its values and returns the rows.
    """

    def __init__(self, select: Callable[..., list[Any]]) -> None:
        self._select = select

    @staticmethod
    def add(db: Writes, run: PastRun, fingerprint: str | None) -> None:
        """Write an ended run in the caller's transaction; `trim` follows before its commit.

        Args:
            db: The caller's transaction.
            run: The run.
            fingerprint: The fingerprint of its failure; None without a failure.
        """
        if run.too_fast:
            db.execute(
                "INSERT INTO too_fast VALUES (?, 1) ON CONFLICT (pipeline) DO UPDATE SET runs = runs + 1",
                (run.pipeline,),
            )
        if run.pipeline == OTHER_PIPELINES:
            return
        db.execute("INSERT INTO history (pipeline, facts) VALUES (?, ?)", (run.pipeline, run.to_json()))
        if fingerprint is None:
            return
        db.execute(
            "INSERT INTO failures VALUES (:pipeline, :fingerprint, 1, :ended, :ended)"
            " ON CONFLICT (pipeline, fingerprint) DO UPDATE SET runs = runs + 1,"
            " first_unix_nano = min(first_unix_nano, :ended), last_unix_nano = max(last_unix_nano, :ended)",
            {"pipeline": run.pipeline, "fingerprint": fingerprint, "ended": run.ended_unix_nano},
        )

    @staticmethod
    def trim(db: sqlite3.Connection, pipelines: Collection[str]) -> None:
        """Delete the oldest runs and failures of pipelines beyond the limits, in the caller's transaction."""
        for pipeline in pipelines:
            db.execute(
                "DELETE FROM history WHERE pipeline = ? AND run <="
                " (SELECT run FROM history WHERE pipeline = ? ORDER BY run DESC LIMIT 1 OFFSET ?)",
                (pipeline, pipeline, KEPT_RUNS),
            )
            db.execute(
                "DELETE FROM failures WHERE pipeline = ? AND fingerprint IN (SELECT fingerprint FROM failures"
                " WHERE pipeline = ? ORDER BY last_unix_nano DESC LIMIT -1 OFFSET ?)",
                (pipeline, pipeline, KEPT_FAILURES),
            )

    def past_runs(self) -> list[PastRun]:
        """Return the last ended runs of all pipelines; log a warning for a damaged or impossible run and skip it."""
        runs = []
        latest_ns = time.time_ns() + _FUTURE_NS
        for (text,) in self._select("SELECT facts FROM history ORDER BY run"):
            try:
                run = PastRun.from_json(text)
            except ValueError as error:
                _log.warning("checkpoint store: skipping a damaged run in the history: %s", error)
                continue
            if 0 <= run.ended_unix_nano <= latest_ns and 0 <= (run.started_unix_nano or 0) <= latest_ns:
                runs.append(run)
            else:
                _log.warning("checkpoint store: skipping a run of job %s with an impossible time", run.job_id)
        return runs

    def too_fast(self) -> dict[str, int]:
        """Return the number of suspiciously fast runs since the store was created, by pipeline."""
        return dict(self._select("SELECT pipeline, runs FROM too_fast"))

    def earlier_failures(self, pipeline: str, fingerprint: str) -> tuple[int, int | None]:
        """Return the number of earlier runs with a failure, and when the first one failed, in ns since the epoch.

        Args:
            pipeline: The label of the pipeline.
            fingerprint: The fingerprint of the failure.
        """
        query = "SELECT runs, first_unix_nano FROM failures WHERE pipeline = ? AND fingerprint = ?"
        rows = self._select(query, pipeline, fingerprint)
        return rows[0] if rows else (0, None)
