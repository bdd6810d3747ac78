"""`FleetCounts`: the totals and the history of runs that all agents of a fleet share, as the database has them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.fleet.batch import EndedRun, Written
from tailspan_agent.fleet.database import Connection, DatabaseThread, Tables

__all__ = ["Changes", "FleetCounts", "FleetHistory"]

_READ_TIMEOUT_S = 30.0
_MOST_SEEN_RUNS = 10_000

_log = logging.getLogger(__name__)


class Changes(NamedTuple):
    """What agents have counted, as rows of the database.

    Attributes:
        read_at: When it was read, by the clock of the database.
        runs: Changed rows of ``runs``.
        failures: Changed rows of ``failures``.
        too_fast: All rows of ``too_fast``.
        history: New rows of ``history``.
    """

    read_at: str
    runs: list[Any]
    failures: list[Any]
    too_fast: list[Any]
    history: list[Any]


class FleetHistory:
    """The history of all agents, as read at the start and refreshed; see `tailspan_agent.checkpoint.protocol`."""

    def __init__(self) -> None:
        self.runs: list[PastRun] = []
        self.too_fast_runs: dict[str, int] = {}
        self.failures: dict[tuple[str, str], tuple[int, int | None]] = {}

    def past_runs(self) -> list[PastRun]:
        """Return the last ended runs of all pipelines when the store was opened."""
        return list(self.runs)

    def too_fast(self) -> dict[str, int]:
        """Return the number of suspiciously fast runs since the fleet began, by pipeline."""
        return dict(self.too_fast_runs)

    def earlier_failures(self, pipeline: str, fingerprint: str) -> tuple[int, int | None]:
        """Return the number of earlier runs with a failure, and when the first one failed, in ns since the epoch."""
        return self.failures.get((pipeline, fingerprint), (0, None))

    def add(self, run: PastRun, fingerprint: str | None) -> None:
        """Add a run of this agent."""
        if run.too_fast:
            self.too_fast_runs[run.pipeline] = self.too_fast_runs.get(run.pipeline, 0) + 1
        if fingerprint is not None and run.pipeline != OTHER_PIPELINES:
            runs, first_ns = self.failures.get((run.pipeline, fingerprint), (0, None))
            first_ns = run.ended_unix_nano if first_ns is None else min(first_ns, run.ended_unix_nano)
            self.failures[run.pipeline, fingerprint] = runs + 1, first_ns


class FleetCounts:
    """What all agents have counted, read at the start and refreshed.

    Args:
        reader: The connection for reads.
        tables: The tables of the fleet.

    Attributes:
        totals: The totals of all ended runs, without what is not written yet: they never go back.
        history: The last ended runs of each pipeline, with those of this agent that are not written yet.
    """

    def __init__(self, reader: DatabaseThread, tables: Tables) -> None:
        self.totals: dict[tuple[str, str, str], RunTotals] = {}
        self.history = FleetHistory()
        self._reader = reader
        self._tables = tables
        self._newest_run = 0
        self._seen_runs: dict[int, None] = {}
        self._new_runs: list[PastRun] = []
        self._read_at = ""

    def start(self, connection: Connection) -> None:
        """Read all for the first time."""
        self.apply(self.read(connection))
        self.history.runs = self.take_new_runs()

    def with_unwritten(self, runs: Iterable[EndedRun]) -> dict[tuple[str, str, str], RunTotals]:
        """Return the totals with runs of this agent that are not written yet."""
        totals = dict(self.totals)
        for ended in runs:
            known = totals.get(ended.counted.key)
            totals[ended.counted.key] = known.merge(ended.counted) if known is not None else ended.counted
        return totals

    def on_written(self, written: Written) -> None:
        """Add what a transaction of this agent has counted."""
        for totals in written.totals:
            self._count(totals)
        for number in written.runs:
            self._see(number)

    def read(self, connection: Connection) -> Changes:
        """Read what agents have counted since the last call; a little more, because transactions end in any order."""
        tables, since = self._tables, self._read_at or "-infinity"
        now = connection.execute("SELECT (clock_timestamp() - interval '30 s')::text").fetchone()
        runs = connection.execute(
            tables.sql(
                "SELECT pipeline, result, error_type, sum_s, buckets, exemplars FROM $runs"
                " WHERE changed_at >= %s::timestamptz"
            ),
            (since,),
        ).fetchall()
        failures = connection.execute(
            tables.sql(
                "SELECT pipeline, fingerprint, runs, first_unix_nano FROM $failures WHERE changed_at >= %s::timestamptz"
            ),
            (since,),
        ).fetchall()
        too_fast = connection.execute(tables.sql("SELECT pipeline, runs FROM $too_fast")).fetchall()
        history = connection.execute(
            tables.sql("SELECT run, facts FROM $history WHERE run > %s ORDER BY run"),
            (self._newest_run - _MOST_SEEN_RUNS // 10,),
        ).fetchall()
        return Changes(now[0] if now else "", runs, failures, too_fast, history)

    def apply(self, changes: Changes) -> None:
        """Add what `read` has read."""
        self._read_at, runs, failures, too_fast, history = changes
        for row in runs:
            try:
                self._count(RunTotals.from_row(row))
            except ValueError as error:
                _log.warning("the fleet's database: skipping damaged run totals: %s", error)
        for pipeline, fingerprint, count, first_ns in failures:
            self.history.failures[pipeline, fingerprint] = count, first_ns
        for pipeline, count in too_fast:
            # A counter: what this agent has added and not written yet must not go away again.
            self.history.too_fast_runs[pipeline] = max(count, self.history.too_fast_runs.get(pipeline, 0))
        for number, facts in history:
            if number in self._seen_runs:
                continue
            self._see(number)
            try:
                self._new_runs.append(PastRun.from_json(facts))
            except ValueError as error:
                _log.warning("the fleet's database: skipping a damaged run in the history: %s", error)

    def _see(self, number: int) -> None:
        self._seen_runs[number] = None
        self._newest_run = max(self._newest_run, number)
        while len(self._seen_runs) > _MOST_SEEN_RUNS:
            del self._seen_runs[next(iter(self._seen_runs))]

    def _count(self, totals: RunTotals) -> None:
        known = self.totals.get(totals.key)
        if known is None or known.count <= totals.count:
            self.totals[totals.key] = totals

    async def refresh(self) -> None:
        """Read what other agents have counted.

        Raises:
            CheckpointError: The database cannot be reached.
        """
        self.apply(await self._reader.run(self.read, timeout_s=_READ_TIMEOUT_S))

    def take_new_runs(self) -> list[PastRun]:
        """Return the runs of other agents that were read since the last call."""
        new, self._new_runs = self._new_runs, []
        return new
