"""The file of the checkpoint store: its schema and migration, its lock, and the recovery of a damaged file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import sqlite3
import time
from contextlib import closing
from functools import cache
from itertools import product
from pathlib import Path

from tailspan_agent.errors import CheckpointError

__all__ = ["SCHEMA_VERSION", "connect", "copy_log", "file_at", "is_damage", "lock", "lock_holder", "salvage"]

# The checks find damage in a file that is still a database: `connect` runs them, and `salvage` skips such rows.
_VERSION_1 = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (typeof(value) = 'text'),
    CHECK (key <> 'start_unix_nano' OR (value NOT GLOB '*[^0-9]*' AND length(value) BETWEEN 1 AND 19))
) WITHOUT ROWID;
CREATE TABLE jobs (
    key INTEGER PRIMARY KEY,
    identity TEXT NOT NULL,
    job_id TEXT NOT NULL,
    name TEXT NOT NULL CHECK (typeof(name) = 'text'),
    backfill INTEGER NOT NULL,
    cursor BLOB CHECK (typeof(cursor) IN ('blob', 'null')),
    facts TEXT NOT NULL CHECK (typeof(facts) = 'text'),
    logs_complete INTEGER NOT NULL DEFAULT 0,
    ended INTEGER NOT NULL DEFAULT 0,
    updated_s REAL NOT NULL CHECK (typeof(updated_s) = 'real'),
    UNIQUE (identity, job_id),
    CHECK (typeof(identity) = 'text' AND typeof(job_id) = 'text')
);
CREATE TABLE seconds (
    job INTEGER NOT NULL, second INTEGER NOT NULL, lines INTEGER NOT NULL, uid_sum TEXT NOT NULL,
    PRIMARY KEY (job, second),
    CHECK (typeof(second) = 'integer' AND typeof(lines) = 'integer' AND lines BETWEEN 0 AND 1 << 53),
    CHECK (typeof(uid_sum) = 'text' AND uid_sum NOT GLOB '*[^0-9]*' AND length(uid_sum) BETWEEN 1 AND 20)
) WITHOUT ROWID;
CREATE TABLE spans (
    job INTEGER NOT NULL, span_id TEXT NOT NULL, resource BLOB NOT NULL, span BLOB NOT NULL,
    acked INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, span_id),
    CHECK (typeof(span_id) = 'text' AND typeof(resource) = 'blob' AND typeof(span) = 'blob')
) WITHOUT ROWID;
CREATE INDEX unsent_spans ON spans (job) WHERE acked = 0;
CREATE TABLE runs (
    pipeline TEXT NOT NULL, result TEXT NOT NULL, error_type TEXT NOT NULL,
    sum_s REAL NOT NULL, buckets TEXT NOT NULL, exemplars TEXT NOT NULL,
    PRIMARY KEY (pipeline, result, error_type),
    CHECK (typeof(pipeline) = 'text' AND typeof(result) = 'text' AND typeof(error_type) = 'text')
) WITHOUT ROWID;
CREATE TABLE names (
    identity TEXT NOT NULL, job_id TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (identity, job_id),
    CHECK (typeof(identity) = 'text' AND typeof(job_id) = 'text' AND typeof(name) = 'text')
) WITHOUT ROWID;
"""
_VERSION_2 = """
ALTER TABLE jobs ADD COLUMN late INTEGER NOT NULL DEFAULT 0;
DROP TABLE names;
CREATE TABLE names (
    identity TEXT NOT NULL, job_id TEXT NOT NULL, name TEXT NOT NULL, asked_s REAL NOT NULL,
    PRIMARY KEY (identity, job_id),
    CHECK (typeof(identity) = 'text' AND typeof(job_id) = 'text' AND typeof(name) = 'text')
) WITHOUT ROWID;
CREATE TABLE history (
    run INTEGER PRIMARY KEY, pipeline TEXT NOT NULL, facts TEXT NOT NULL,
    CHECK (typeof(pipeline) = 'text' AND typeof(facts) = 'text')
);
CREATE INDEX history_of_pipeline ON history (pipeline, run);
CREATE TABLE failures (
    pipeline TEXT NOT NULL, fingerprint TEXT NOT NULL, runs INTEGER NOT NULL,
    first_unix_nano INTEGER NOT NULL, last_unix_nano INTEGER NOT NULL,
    PRIMARY KEY (pipeline, fingerprint),
    CHECK (typeof(pipeline) = 'text' AND typeof(fingerprint) = 'text'),
    CHECK (typeof(runs) = 'integer' AND typeof(first_unix_nano) = 'integer' AND typeof(last_unix_nano) = 'integer')
) WITHOUT ROWID;
CREATE TABLE too_fast (
    pipeline TEXT PRIMARY KEY, runs INTEGER NOT NULL CHECK (typeof(pipeline) = 'text' AND typeof(runs) = 'integer')
) WITHOUT ROWID;
"""
# The changes of each version: a new store applies all, an older one those that it lacks.
VERSIONS = (_VERSION_1, _VERSION_2)
SCHEMA_VERSION = len(VERSIONS)
TABLES = ("meta", "jobs", "seconds", "spans", "runs", "names", "history", "failures", "too_fast")
# No other process should write the store; if one does, it must not block the agent's event loop for long.
_BUSY_S = 0.2
_FILE_FORMAT = 2  # the newest file format of SQLite
# A log of writes that is longer is copied into the file by the commit itself; see `copy_log`.
_MAX_LOG_PAGES = 1 << 14
# What is kept of a log that was copied whole. Otherwise it keeps its largest size, and seems to be full for ever.
_KEPT_LOG_BYTES = 1 << 20
_MAX_FILLED_BYTES = 1 << 36  # a damaged header may have any size


def lock(state_dir: Path) -> int:
    """Lock the directory for this process; the lock ends with the process, however it ends.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        CheckpointError: Another agent has the lock; the message names it.
    """
    path = state_dir / "agent.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 500, 0).decode("utf-8", "replace").strip() or "an unknown process"
        os.close(fd)
        raise CheckpointError(
            f"agent.state_dir {state_dir} is in use by {holder}; stop that agent, or give this one another state_dir"
        ) from error
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"agent pid {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    return fd


def lock_holder(state_dir: Path) -> int | None:
    """Return the process id of the agent that has the lock; None without one."""
    try:
        fd = os.open(state_dir / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        found = re.match(rb"agent pid (\d+) ", os.pread(fd, 500, 0))
        return int(found[1]) if found else None
    finally:
        os.close(fd)
    return None


def file_at(path: Path) -> tuple[int, int] | None:
    """Return the identity of the file at a path, device and inode; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def connect(path: Path) -> sqlite3.Connection:
    """Open the store; create or migrate it if needed.

    Raises:
        CheckpointError: The file is from a newer version; it is left unchanged.
        sqlite3.DatabaseError: The file is damaged.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    header = os.pread(fd, 20, 0)
    os.close(fd)
    version = _version(path)
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"the checkpoint store {path} has version {version} of a newer Tailspan;"
            f" this one reads up to version {SCHEMA_VERSION}: upgrade, or use another agent.state_dir"
        )
    db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    db.text_factory = _text
    try:
        # SQLite opens a file with a larger number, but does not write it.
        if max(header[18:20], default=0) > _FILE_FORMAT:
            raise sqlite3.DatabaseError("its header is damaged")
        (answer,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {_MAX_LOG_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {_KEPT_LOG_BYTES}")
        if version < SCHEMA_VERSION:
            steps = "".join(VERSIONS[version:])
            db.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if _schema_of(db) != _schema():
            raise sqlite3.DatabaseError("its schema is damaged")
    except BaseException:
        db.close()
        raise
    return db


def copy_log(path: Path) -> None:
    """Copy SQLite's log of writes into the file, as far as no other connection reads it. Waits for the disk."""
    # What cannot be copied now is copied later, at the latest when the store is closed.
    with (
        contextlib.suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as db,
    ):
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


@cache
def _schema() -> set[str]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(VERSIONS))
        return _schema_of(db)


def _schema_of(db: sqlite3.Connection) -> set[str]:
    return {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}


def is_damage(error: Exception) -> bool:
    """Return whether an error of `connect` is about the content of the file, not the disk or another process."""
    if isinstance(error, sqlite3.OperationalError):
        # The generic error code: the statements are correct, so the content is damaged.
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_ERROR
    return isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError)


def _version(path: Path) -> int:
    # Read-only: even closing a file that was opened for writing can change it.
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        return version


def salvage(aside: Path, into: sqlite3.Connection) -> int:
    """Copy every readable row; a job without its row resumes by `lookback`.

    Args:
        aside: The damaged file; a truncated file is extended with zeros.
        into: The new store.

    Returns:
        Number of copied rows.
    """
    _fill_up(aside)
    rows = 0
    with closing(sqlite3.connect(aside)) as source:
        source.text_factory = _text
        # A scan ends at the first damaged page; a scan in reverse finds the rows after it.
        for table, backwards in product(TABLES, (0, 1)):
            # SQLite quotes damaged content in its messages, which may not be UTF-8.
            with contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError):
                source.execute(f"PRAGMA reverse_unordered_selects = {backwards}")
                for row in source.execute(f"SELECT * FROM {table}"):  # noqa: S608 - constants
                    marks = ", ".join("?" * len(row))
                    with contextlib.suppress(sqlite3.IntegrityError):
                        rows += into.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row).rowcount  # noqa: S608
    return rows


def _fill_up(path: Path) -> None:
    """Extend a truncated file to the size in its header: otherwise SQLite reads none of its pages.

    Source: SQLite's database file format, the database header.
    """
    with path.open("r+b") as file:
        header = file.read(100)
        if len(header) == 100 and header.startswith(b"SQLite format 3\0"):
            page_size = int.from_bytes(header[16:18], "big")
            size = int.from_bytes(header[28:32], "big") * (65536 if page_size == 1 else page_size)
            if file.seek(0, os.SEEK_END) < size <= _MAX_FILLED_BYTES:
                file.truncate(size)


def _text(raw: bytes) -> str:
    # One damaged text must not make its whole table unreadable.
    return raw.decode("utf-8", "replace")
