"""The checkpoint store's file: its schema, its lock, and what happens when it is damaged or from another version."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sqlite3
import time
from pathlib import Path

from tailspan_agent.errors import CheckpointError

__all__ = ["SCHEMA_VERSION", "connect", "lock", "lock_holder", "salvage"]

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    key INTEGER PRIMARY KEY,
    identity TEXT NOT NULL,
    job_id TEXT NOT NULL,
    name TEXT NOT NULL,
    backfill INTEGER NOT NULL,
    cursor BLOB,
    facts TEXT NOT NULL,
    logs_complete INTEGER NOT NULL DEFAULT 0,
    ended INTEGER NOT NULL DEFAULT 0,
    updated_s REAL NOT NULL,
    UNIQUE (identity, job_id)
);
CREATE TABLE seconds (
    job INTEGER NOT NULL, second INTEGER NOT NULL, lines INTEGER NOT NULL, uid_sum TEXT NOT NULL,
    PRIMARY KEY (job, second)
) WITHOUT ROWID;
CREATE TABLE spans (
    job INTEGER NOT NULL, span_id TEXT NOT NULL, resource BLOB NOT NULL, span BLOB NOT NULL,
    acked INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, span_id)
) WITHOUT ROWID;
CREATE INDEX unsent_spans ON spans (job) WHERE acked = 0;
CREATE TABLE runs (
    pipeline TEXT NOT NULL, result TEXT NOT NULL, error_type TEXT NOT NULL,
    sum_s REAL NOT NULL, buckets TEXT NOT NULL, exemplars TEXT NOT NULL,
    PRIMARY KEY (pipeline, result, error_type)
) WITHOUT ROWID;
CREATE TABLE names (
    identity TEXT NOT NULL, job_id TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (identity, job_id)
) WITHOUT ROWID;
"""
TABLES = ("meta", "jobs", "seconds", "spans", "runs", "names")


def lock(state_dir: Path) -> int:
    """Hold the directory for this process; the lock goes with the process, however it ends.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        CheckpointError: Another agent holds it; the message says which.
    """
    path = state_dir / "agent.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 500, 0).decode("utf-8", "replace").strip() or "a process that did not say who it is"
        os.close(fd)
        raise CheckpointError(
            f"agent.state_dir {state_dir} is in use by {holder}; stop that agent, or give this one another state_dir"
        ) from error
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"agent pid {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    return fd


def lock_holder(state_dir: Path) -> int | None:
    """Return the pid of the agent that holds the directory; None where none does."""
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


def connect(path: Path) -> sqlite3.Connection:
    """Open the store, making or migrating it where needed.

    Raises:
        CheckpointError: The file was made by a newer version; it is left untouched.
        sqlite3.DatabaseError: The file is damaged.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.close(fd)
    db = sqlite3.connect(path, isolation_level=None)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"the checkpoint store {path} is of version {version}, made by a newer Tailspan;"
                f" this one knows up to {SCHEMA_VERSION}: upgrade, or use another agent.state_dir"
            )
        (answer,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        for table in TABLES:
            db.execute(f"SELECT * FROM {table} LIMIT 1")  # noqa: S608 - constants
    except BaseException:
        db.close()
        raise
    return db


def salvage(aside: Path, into: sqlite3.Connection) -> int:
    """Copy every row that can still be read; what cannot resumes by `lookback`."""
    rows = 0
    source = sqlite3.connect(f"file:{aside}?mode=ro", uri=True)
    try:
        for table in TABLES:
            try:
                for row in source.execute(f"SELECT * FROM {table}"):  # noqa: S608 - constants
                    marks = ", ".join("?" * len(row))
                    with_row = into.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)  # noqa: S608
                    rows += with_row.rowcount
            except sqlite3.DatabaseError:
                continue
    finally:
        source.close()
    return rows
