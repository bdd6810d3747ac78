"""The checkpoint store: what the endpoint has acknowledged, on disk, so that a restart neither loses nor repeats lines.

SQLite in WAL mode with ``synchronous = NORMAL``. A commit costs as much as ten writes, so the writes of 50 ms share
one. A killed process loses these, a power failure can undo the last commits: that repeats lines (with the same uid) but
never skips one. Jobs are keyed by the identity of their service and their id, not by the name of a configuration
section: renaming a section loses no checkpoint.

    jobs      one row for each job: the acknowledged cursor and the ledger as of that cursor (column facts)
    seconds   for each job and second of source time: number and uid sum of the acknowledged lines
              (services that have only times: finds lines that were never relayed after the job's end)
    spans     ended spans exactly as first sent; they stay after their acknowledgement, so that none is created twice
    runs      cumulative run totals of each pipeline, so that metrics survive restarts
    history   the last ended runs of each pipeline (`history`), with failures and too_fast
    names     names of listed jobs: a list without names costs one request for each job, once

This is the store of one agent: see `CheckpointStore` for what every store promises. Nothing here waits for the disk: a
thread copies what is committed from SQLite's log into the file.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tailspan._clock import settled_clock
from tailspan._plural import plural
from tailspan._private_dirs import make_private
from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.pipeline_names import utf8_name
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.database import connect, copy_log, file_at, is_damage, lock, salvage
from tailspan_agent.checkpoint.history import StoredHistory
from tailspan_agent.checkpoint.outbox import Outbox
from tailspan_agent.checkpoint.rows import Ack, Checkpoint, LedgerReader, OutboxSpan
from tailspan_agent.checkpoint.writes import Writes
from tailspan_agent.errors import CheckpointError, ValueRefusedError
from tailspan_agent.otlp.wire import UINT64_MAX

__all__ = ["Ack", "Checkpoint", "OutboxSpan", "SqliteStore", "read_checkpoint", "read_instance_id"]

_SMALLEST_BYTES = 512
# How many jobs are searched, and deleted, before other tasks run: about ten milliseconds of work.
_PART, _FORGOTTEN_PART = 5000, 1000
_GATHER_S = 0.05
_RETRY_S = 1.0
# As much is written again at once: a thread copies the log of writes into the file, because its fsync may take seconds.
_LOG_BYTES = 4 << 20
_COMMITS_A_CHECK = 8
_FUTURE_S = 86400.0

# What is raised for a value that SQLite cannot hold, or a check of the schema refuses: the file itself is fine.
_REFUSED = (
    UnicodeEncodeError,
    OverflowError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
)

_ACK = (
    "UPDATE jobs SET cursor = coalesce(?, cursor), facts = ?, updated_s = ?, logs_complete = max(logs_complete, ?),"
    " late = coalesce(?, late) WHERE key = ?"
)
_ADD_SPAN = "INSERT OR IGNORE INTO spans (job, span_id, resource, span) VALUES (?, ?, ?, ?)"

_SECOND = "SELECT lines, uid_sum FROM seconds WHERE job = ? AND second = ?"

_OLD_JOBS = (
    "SELECT key, job_id FROM jobs WHERE key > ? AND key <= ? AND updated_s < ?"
    " AND NOT (? AND EXISTS (SELECT 1 FROM spans WHERE job = jobs.key AND acked = 0))"
)
_DELETES = (
    "DELETE FROM spans WHERE job = ?",
    "DELETE FROM seconds WHERE job = ?",
    "DELETE FROM jobs WHERE key = ?",
)

_log = logging.getLogger(__name__)


_CHECKPOINT = (
    "SELECT key, name, backfill, cursor, facts, logs_complete, late, ended FROM jobs WHERE identity = ? AND job_id = ?"
)


def read_checkpoint(state_dir: Path, identity: str, job_id: str) -> Checkpoint | None:
    """Return the checkpoint of a job from the store of another agent, running or not; None without one.

    Raises:
        CheckpointError: The store cannot be read.
    """
    path = state_dir / "checkpoints.db"
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            if db.execute("PRAGMA user_version").fetchone() == (0,):
                return None  # its agent is about to create the schema
            return _checkpoint(db.execute(_CHECKPOINT, (identity, job_id)).fetchall())
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the checkpoint store {path}: {error}") from error


def read_instance_id(state_dir: Path) -> str | None:
    """Return the UUID of a state directory from the store of another agent, running or not; None without one."""
    path = state_dir / "checkpoints.db"
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'instance_id'").fetchone()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the checkpoint store {path}: {error}") from error
    return row[0] if row is not None else None


def _checkpoint(rows: list[Any]) -> Checkpoint | None:
    if not rows:
        return None
    key, name, stream, cursor, ledger, logs_complete, late, ended = rows[0]
    return Checkpoint(key, name, int(stream), cursor, ledger, bool(logs_complete), bool(late), bool(ended))


class SqliteStore:
    """The durable state of one agent, a `CheckpointStore`. A lock allows one agent for each directory.

    Args:
        state_dir: The agent's directory; created with mode 0700 if missing.

    Attributes:
        path: The file.
        recovered: The damage for which the file was set aside when it was opened; None without damage.

    Raises:
        CheckpointError: Another agent uses the directory, the file is from a newer version, or the disk fails.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "checkpoints.db"
        self.recovered: str | None = None
        self.write_failed = False
        self._commits = 0
        self._outbox = Outbox()
        self._is_writing = False
        self._totals: dict[tuple[str, str, str], RunTotals] = {}
        self._counted: dict[tuple[str, str, str], RunTotals] = {}
        self._commit_timer: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None
        self._copying: threading.Thread | None = None
        try:
            make_private(state_dir)
            self._lock_fd = lock(state_dir)
        except OSError as error:
            raise CheckpointError(f"cannot use agent.state_dir {state_dir}: {error.strerror}") from error
        with ExitStack() as undo:
            undo.callback(os.close, self._lock_fd)
            self._db = self._open()
            undo.callback(self._db.close)
            self._writes = Writes(self._db)
            self._file = file_at(self.path)
            self._has_names, self._has_seconds = False, bool(self._select("SELECT 1 FROM seconds LIMIT 1"))
            self._db.execute("PRAGMA temp_store = MEMORY")  # where the index of names is
            self.instance_id = self._meta("instance_id", str(uuid.uuid4()))
            self.start_unix_nano = int(self._meta("start_unix_nano", str(time.time_ns())))
            self._totals = {totals.key: totals for totals in self._runs()}
            undo.pop_all()
        self.acked_at_s = time.time()
        self.history = StoredHistory(self._select)
        self.ledgers = LedgerReader(self._select)

    def _open(self) -> sqlite3.Connection:
        try:
            if self.path.exists() and self.path.stat().st_size < _SMALLEST_BYTES:
                self.recovered = "it was empty"
            return connect(self.path)
        except (OSError, sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise CheckpointError(f"cannot open the checkpoint store {self.path}: {error}") from error
            # SQLite quotes damaged content in its messages, with its line breaks.
            self.recovered = " ".join(str(error).split())
        try:
            return self._salvaged()
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(f"cannot set aside the damaged checkpoint store {self.path}: {error}") from error

    def _index_names(self) -> None:
        """Make an index of the jobs by name: a search through 100,000 jobs for each of them would be quadratic.

        In memory, so that the file stays as earlier versions know it. Most agents never need it: their jobs write into
        the main stream of their pipeline.
        """
        with self._reading():
            is_alone = not self._db.in_transaction
            if is_alone:
                self._db.execute("BEGIN")
            self._db.execute("DROP TABLE IF EXISTS temp.named")
            self._db.execute(
                "CREATE TEMP TABLE named (hash INTEGER, job INTEGER, PRIMARY KEY (hash, job)) WITHOUT ROWID"
            )
            names = self._db.execute("SELECT name, key FROM jobs")
            self._db.executemany("INSERT INTO temp.named VALUES (?, ?)", ((hash(name), key) for name, key in names))
            if is_alone:
                self._db.execute("COMMIT")
        self._has_names = True

    def _salvaged(self) -> sqlite3.Connection:
        """Set the damaged file aside, and return a new store with the rows that it still has."""
        aside = self.path.with_name(f"checkpoints.corrupt-{time.time_ns()}.db")
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        with ExitStack() as undo:
            db = connect(self.path)
            undo.callback(db.close)
            rows = salvage(aside, db)
            undo.pop_all()
        self.recovered = f"{self.recovered}; set aside as {aside.name}, {rows} {plural(rows, 'row')} salvaged"
        return db

    def close(self) -> None:
        """Commit what is written, close the file and release the lock of the directory."""
        try:
            self._commit()
        except CheckpointError as error:
            _log.error("the last writes are lost: %s", error)
        if self._commit_timer is not None:
            self._commit_timer[1].cancel()
        if self._copying is not None:
            self._copying.join()
        self._db.close()
        os.close(self._lock_fd)

    def _meta(self, key: str, default: str) -> str:
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, default))
            text: str = self._select("SELECT value FROM meta WHERE key = ?", key)[0][0]
            return text

    def together(self) -> AbstractContextManager[object]:
        """Return a context that makes one transaction of all writes in it, or undoes all of them."""
        return self._transaction()

    def _transaction(self) -> _Unit:
        """Make writes that belong together; they are committed within `_GATHER_S`, with those of other jobs.

        After a failed commit, and where no event loop runs, they are committed at once: there may be no later moment.
        """
        return _Unit(self)

    def begin_unit(self) -> tuple[Writes, int | None]:
        """Return the writes, and where those of a new unit begin; None within another unit."""
        if self._is_writing:
            return self._writes, None
        first, self._is_writing = len(self._writes), True
        try:
            self._begin()
        except BaseException as error:
            self._fail_unit(first, error)
            raise
        return self._writes, first

    def end_unit(self, first: int, error: BaseException | None) -> None:
        """Let the writes of a unit be committed, or undo them.

        Args:
            first: Where they begin.
            error: What the unit has raised; None: nothing.
        """
        if error is not None:
            self._fail_unit(first, error)
            return
        try:
            if self.write_failed or not self._commits_later():
                self._commit()
        except BaseException as failure:
            self._fail_unit(first, failure)
            raise
        self._is_writing = False

    def _fail_unit(self, first: int, error: BaseException) -> None:
        self._writes.forget(first)
        self._outbox.lose()
        self._is_writing = False
        self._undo(error)

    def _undo(self, error: BaseException) -> None:
        """Roll back, and raise an error of SQLite as ours.

        This undoes all writes since the last commit, and `_begin` makes those again that are not forgotten. Errors are
        rare, and a savepoint for each unit costs more than its writes.
        """
        self._roll_back()
        if isinstance(error, _REFUSED):
            raise ValueRefusedError(f"the checkpoint store cannot hold a value: {error}") from error
        if isinstance(error, sqlite3.Error | UnicodeDecodeError):
            self.write_failed = True
            raise CheckpointError(f"cannot write the checkpoint store {self.path}: {error}") from error

    def _begin(self) -> None:
        """Open a transaction, and make the writes of one that failed again."""
        if self._db.in_transaction:
            return
        if file_at(self.path) != self._file:
            # SQLite would go on writing to a deleted file.
            self.write_failed = True
            raise CheckpointError(
                f"the checkpoint store {self.path} was deleted or replaced while the agent runs:"
                " restore it, or restart the agent"
            )
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._writes.make_again()
        except sqlite3.Error:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        self._has_names = False
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _commits_later(self) -> bool:
        """Start the timer of the next commit, unless it runs; return False where there is no event loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._commit_timer is None or self._commit_timer[0] is not loop:
            self._commit_timer = loop, loop.call_later(_GATHER_S, self._on_timer)
        return True

    def _on_timer(self) -> None:
        self._commit_timer, loop = None, asyncio.get_running_loop()
        had_failed = self.write_failed
        try:
            self._commit()
        except CheckpointError as error:
            if not had_failed:
                _log.error("the checkpoint of sent lines: waiting until the disk is usable: %s", error)
            self._commit_timer = loop, loop.call_later(_RETRY_S, self._on_timer)

    def _commit(self) -> None:
        """Commit all writes until now.

        Raises:
            CheckpointError: The disk fails. The writes are kept for the next attempt.
        """
        if self._writes or self._db.in_transaction:
            try:
                self._begin()
                self._write_counted()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._undo(error)
                raise
            self._writes.forget()
            self.write_failed = False
            self._commits += 1
            if self._commits % _COMMITS_A_CHECK == 0:
                self._copy_log()
        self._totals |= self._counted
        self._counted.clear()

    def _write_counted(self) -> None:
        """Write the totals of the runs in this transaction: many runs share a row."""
        if self._counted:
            rows = [totals.to_row() for totals in self._counted.values()]
            self._db.executemany("REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?)", rows)
            StoredHistory.trim(self._db, {totals.pipeline for totals in self._counted.values()})

    def _copy_log(self) -> None:
        """Let a thread copy a long log of writes into the file, unless one does so already."""
        if self._copying is not None and self._copying.is_alive():
            return
        with suppress(OSError, RuntimeError):  # RuntimeError: there can be no further thread now
            if self.path.with_name(f"{self.path.name}-wal").stat().st_size >= _LOG_BYTES:
                self._copying = threading.Thread(target=copy_log, args=(self.path,), daemon=True)
                self._copying.start()

    def _select(self, query: str, *values: object) -> list[Any]:
        with self._reading():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            if self._writes:
                self._begin()
            yield
        except (UnicodeEncodeError, OverflowError) as error:
            raise ValueRefusedError(f"the checkpoint store cannot hold a value: {error}") from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the checkpoint store {self.path}: {error}") from error

    def job(self, identity: str, job_id: str) -> Checkpoint | None:
        """Return the checkpoint of a job; None for an unknown job."""
        return _checkpoint(self._select(_CHECKPOINT, identity, job_id))

    def add_job(self, identity: str, job_id: str, name: str, *, stream: int, ledger: str) -> Checkpoint:
        """Add a job that is seen for the first time, and return its checkpoint; a known job is unchanged."""
        with self._transaction() as db:
            stored_name = utf8_name(name)
            added = db.execute(
                "INSERT OR IGNORE INTO jobs (identity, job_id, name, backfill, facts, updated_s)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (identity, job_id, stored_name, stream, ledger, time.time()),
            )
            if not added.rowcount:
                checkpoint = self.job(identity, job_id)
                assert checkpoint is not None
                return checkpoint
            key = added.lastrowid
            assert key is not None
            if self._has_names:
                # Not one of the writes that are made again: after a rollback, the index is made again when needed.
                self._db.execute("INSERT OR IGNORE INTO temp.named VALUES (?, ?)", (hash(stored_name), key))
        return Checkpoint(key, stored_name, stream, None, ledger, logs_complete=False, late=False, ended=False)

    def finished_jobs(self, identity: str) -> set[str]:
        """Return the ids of all jobs of a service that need no more work."""
        query = "SELECT job_id FROM jobs WHERE identity = ? AND ended = 1 AND logs_complete = 1 AND late = 0"
        return {job_id for (job_id,) in self._select(query, identity)}

    def unfinished_jobs(self, identity: str) -> Iterator[list[tuple[str, str]]]:
        """Yield id and name of all other known jobs of a service, oldest first, in parts: each takes milliseconds."""
        after = -1 << 63
        while (until := self._next_part(after, _PART)) is not None:
            yield self._select(
                "SELECT job_id, name FROM jobs WHERE key > ? AND key <= ? AND identity = ?"
                " AND (ended = 0 OR logs_complete = 0 OR late = 1) ORDER BY key",
                after,
                until,
                identity,
            )
            after = until

    def ack(self, acks: Iterable[Ack]) -> None:
        """Store acknowledgements, in one transaction; one that cannot be stored does not affect those of other jobs."""
        now_s = time.time()
        with self._transaction() as db:
            acks = list(acks)
            if self._ack(db, acks, now_s) is not None:
                for ack in acks:
                    error = self._ack(db, [ack], now_s)
                    if error is not None:
                        _log.error(
                            "checkpoint store %s: an ack of job number %d is lost: %s", self.path, ack.key, error
                        )
        self.acked_at_s = now_s

    def _ack(self, db: Writes, acks: Sequence[Ack], now_s: float) -> Exception | None:
        """Store acknowledgements; return the error for one that cannot be stored, and then store none."""
        first = len(db)
        try:
            rows = [(ack.cursor, ack.ledger, now_s, ack.completes is not None, ack.completes, ack.key) for ack in acks]
            db.executemany(_ACK, rows)
            for ack in acks:
                for second, (lines, uid_sum) in ack.seconds.items():
                    self._add_second(db, ack.key, second, lines, uid_sum)
                if ack.completes is not None:
                    self._clear_seconds(db, ack.key, late=ack.completes)
        except (ValueRefusedError, *_REFUSED) as error:
            db.forget(first)
            self._roll_back()
            self._begin()
            return error
        return None

    def _add_second(self, db: Writes, key: int, second: int, lines: int, uid_sum: int) -> None:
        # SQLite's integers are signed and do not wrap: the sum mod 2^64 is stored as text.
        for stored_lines, stored_sum in self._select(_SECOND, key, second):
            lines += stored_lines
            uid_sum += int(stored_sum)
        self._has_seconds = True
        db.execute("REPLACE INTO seconds VALUES (?, ?, ?, ?)", (key, second, lines, str(uid_sum & UINT64_MAX)))

    async def written(self) -> None:
        """Commit all earlier writes; wait while the disk fails."""
        while True:
            try:
                return self._commit()
            except CheckpointError:
                await asyncio.sleep(_RETRY_S)

    async def seconds(self, key: int) -> dict[int, tuple[int, int]]:
        """Return number and uid sum (mod 2^64) of a job's acknowledged lines by second of source time."""
        rows = self._select("SELECT second, lines, uid_sum FROM seconds WHERE job = ?", key)
        return {second: (lines, int(uid_sum)) for second, lines, uid_sum in rows}

    def is_writable(self) -> bool:
        """Return whether writes succeed; if the last one failed, try one."""
        if self.write_failed:
            with suppress(CheckpointError), self._transaction() as db:
                db.execute("REPLACE INTO meta VALUES ('tried', ?)", (str(time.time_ns()),))
        return not self.write_failed

    def update_ledger(self, key: int, ledger: str) -> None:
        """Store a ledger that changed without a line: with a new state."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET facts = ?, updated_s = ? WHERE key = ?", (ledger, time.time(), key))

    def update_stream(self, key: int, stream: int) -> None:
        """Store the log stream that a job's next lines go to."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET backfill = ?, updated_s = ? WHERE key = ?", (stream, time.time(), key))

    def newest_by_stream(self, name: str) -> dict[int, int]:
        """Return the time of the newest line of each further log stream of a pipeline, in ns since the epoch.

        No store has a newer one, whether or not it was acknowledged.
        """
        query = (
            "SELECT CAST(line.key AS INTEGER), max(line.value)"
            " FROM jobs, json_each(iif(json_valid(facts), facts, '{}'), '$.log_streams') AS line"
            " WHERE jobs.key IN (SELECT job FROM temp.named WHERE hash = ?) AND name = ? AND line.type = 'integer'"
            " GROUP BY 1"
        )
        if not self._has_names:
            self._index_names()
        return dict(self._select(query, hash(name), name))

    def complete_logs(self, key: int, *, late: bool = False) -> None:
        """Store that all lines of an ended job are acknowledged.

        Args:
            key: The store's number for the job.
            late: Whether more lines may become visible; if not, the sums by second are deleted.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET logs_complete = 1, late = ?, updated_s = ? WHERE key = ?", (late, time.time(), key)
            )
            self._clear_seconds(db, key, late=late)

    def _clear_seconds(self, db: Writes, key: int, *, late: bool) -> None:
        if not late and self._has_seconds:
            db.execute("DELETE FROM seconds WHERE job = ?", (key,))

    def add_spans(self, key: int, spans: Sequence[OutboxSpan]) -> set[str]:
        """Write spans; one that is stored already keeps its first bytes.

        Returns:
            The ids of the new spans.
        """
        with self._transaction() as db:
            new = [
                span for span in spans if db.execute(_ADD_SPAN, (key, span.span_id, span.resource, span.span)).rowcount
            ]
            self._outbox.add(new)
        return {span.span_id for span in new}

    def end_job(
        self,
        key: int,
        spans: Sequence[OutboxSpan],
        counted: RunTotals,
        *,
        run: PastRun | None = None,
        fingerprint: str | None = None,
    ) -> bool:
        """Write a job's last spans and count its run, in one transaction, once; see `CheckpointStore`."""
        before = self._counted.copy()
        try:
            with self._transaction() as db:
                if db.execute("UPDATE jobs SET ended = 1 WHERE key = ? AND ended = 0", (key,)).rowcount == 0:
                    return False
                rows = [(key, span.span_id, span.resource, span.span) for span in spans]
                if db.executemany(_ADD_SPAN, rows).rowcount == len(spans):
                    self._outbox.add(spans)
                else:
                    self._outbox.lose()  # an earlier process has written some of them, and may have sent them
                if run is not None:
                    StoredHistory.add(db, run, fingerprint)
                # The totals are written with those of other jobs: what SQLite refuses must fail here, for this job.
                "".join(counted.key).encode()
                known = before.get(counted.key) or self._totals.get(counted.key)
                self._counted[counted.key] = known.merge(counted) if known is not None else counted
        except BaseException:
            self._counted = before
            raise
        return True

    @property
    def totals(self) -> Mapping[tuple[str, str, str], RunTotals]:
        """The totals of all ended runs that are committed: after a crash, they must not be smaller."""
        with suppress(CheckpointError):
            self._commit()
        return self._totals

    def _runs(self) -> list[RunTotals]:
        """Return the totals of all ended runs; exemplars of an impossible time, from an earlier agent, are left out."""
        rows = self._select("SELECT pipeline, result, error_type, sum_s, buckets, exemplars FROM runs")
        totals = []
        for row in rows:
            try:
                totals.append(RunTotals.from_row(row).without_exemplars_after(time.time_ns() + int(_FUTURE_S * 1e9)))
            except ValueError as error:
                _log.warning("checkpoint store %s: skipping damaged run totals: %s", self.path, error)
        return totals

    def unsent_spans(self, limit: int, max_bytes: int = 3 << 20) -> list[OutboxSpan]:
        """Return spans that are committed and not acknowledged, oldest jobs first.

        Args:
            limit: Maximum number of spans.
            max_bytes: Maximum number of bytes of all spans with their resources; one larger span is returned alone.
        """
        if self._outbox.is_whole:
            found = _first_spans(self._outbox.in_order()[:limit], max_bytes)
        else:
            query = "SELECT job, span_id, resource, span FROM spans WHERE acked = 0 ORDER BY job LIMIT ?"
            # Row by row: hundreds of failed jobs have megabytes of stack traces.
            with self._reading(), closing(self._db.execute(query, (limit,))) as rows:
                found = _first_spans(itertools.starmap(OutboxSpan, rows), max_bytes)
        if found:
            self._commit()
        else:
            self._outbox.start()
        return found

    def ack_spans(self, spans: Iterable[OutboxSpan]) -> None:
        """Store that spans are acknowledged."""
        spans = list(spans)
        with self._transaction() as db:
            db.executemany(
                "UPDATE spans SET acked = 1 WHERE job = ? AND span_id = ?", [(span.job, span.span_id) for span in spans]
            )
        self._outbox.remove(spans)

    def names(self, identity: str) -> dict[str, str]:
        """Return the cached names of a service's jobs by id."""
        return dict(self._select("SELECT job_id, name FROM names WHERE identity = ?", identity))

    def add_name(self, identity: str, job_id: str, name: str) -> None:
        """Cache the name of a listed job."""
        with self._transaction() as db:
            db.execute("REPLACE INTO names VALUES (?, ?, ?, ?)", (identity, job_id, utf8_name(name), time.time()))

    async def may_forget(self, now_s: float, usual_s: float) -> bool:
        """Return whether the clock has gone right for long enough to forget what is old by it.

        Args:
            now_s: The present, in seconds since the epoch.
            usual_s: A longer time since the last call may be a step of the clock; see `settled_clock`.
        """
        rows = self._select("SELECT value FROM meta WHERE key = 'clock'")
        last_s, _, since_s = rows[0][0].partition(" ") if rows else ("", "", "")
        settled, since = settled_clock(_number(last_s), _number(since_s), now_s, usual_s=usual_s)
        with self._transaction() as db:
            db.execute(
                "REPLACE INTO meta VALUES ('clock', ?)", (f"{now_s:.0f} {'' if since is None else f'{since:.0f}'}",)
            )
        return settled

    async def forget(self, older_than_s: float, *, keep: Collection[str] = (), keep_unsent: bool = True) -> int:
        """Delete jobs without a change for a long time, and names that were cached as long ago.

        Args:
            older_than_s: How long, in seconds; at least the largest `lookback`: a job that its service still lists
                must not be forgotten.
            keep: Ids of jobs to keep: those that are followed, however silent, or named by a watch.
            keep_unsent: Whether to keep jobs with unsent spans; if traces are not exported, that would be for ever.

        Returns:
            Number of deleted jobs.
        """
        now_s, kept, forgotten = time.time(), frozenset(keep), 0
        with self._transaction() as db:
            # Written while the clock was wrong: they age from now on.
            db.execute("UPDATE jobs SET updated_s = ? WHERE updated_s > ?", (now_s, now_s + _FUTURE_S))
            db.execute("UPDATE names SET asked_s = ? WHERE asked_s > ?", (now_s, now_s + _FUTURE_S))
            # If such a job is listed again, its name costs one more request.
            db.execute("DELETE FROM names WHERE asked_s < ?", (now_s - older_than_s,))
        after = -1 << 63
        while (until := self._next_part(after, _FORGOTTEN_PART)) is not None:
            with self._transaction() as db:
                old = self._select(_OLD_JOBS, after, until, now_s - older_than_s, keep_unsent)
                keys = [(key,) for key, job_id in old if job_id not in kept]
                for delete in _DELETES:
                    db.executemany(delete, keys)
                if keys:
                    self._outbox.lose()
            forgotten += len(keys)
            after = until
            await asyncio.sleep(0)
        return forgotten

    def _next_part(self, after: int, rows: int) -> int | None:
        """Return the last number of a part of all jobs that begins after a number; None after the last job."""
        last = "SELECT max(key) FROM (SELECT key FROM jobs WHERE key > ? ORDER BY key LIMIT ?)"
        until: int | None = self._select(last, after, rows)[0][0]
        return until


class _Unit:
    """Writes that belong together; a class, because each job makes a dozen."""

    __slots__ = ("_first", "_store")

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._first: int | None = None

    def __enter__(self) -> Writes:
        writes, self._first = self._store.begin_unit()
        return writes

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if self._first is not None:
            self._store.end_unit(self._first, error)


def _first_spans(spans: Iterable[OutboxSpan], max_bytes: int) -> list[OutboxSpan]:
    """Return the first of some spans that do not have too many bytes; at least one."""
    found: list[OutboxSpan] = []
    size = 0
    for span in spans:
        size += span.size
        if found and size > max_bytes:
            break
        found.append(span)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
