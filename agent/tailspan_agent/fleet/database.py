"""The fleet's database: connections in threads of their own, and the schema with its migration."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString, TypeAlias, TypeVar, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from tailspan._secrets import add_secret, mask
from tailspan.errors import ConfigError
from tailspan_agent.errors import CheckpointError
from tailspan_agent.fleet.shards import METRICS_LEASE

__all__ = [
    "SCHEMA_VERSION",
    "Connection",
    "DatabaseThread",
    "Tables",
    "migrate",
    "newer_schema",
    "query",
    "schema_version",
    "transaction",
]

Connection: TypeAlias = psycopg.Connection[TupleRow]
T = TypeVar("T")

_CONNECT_S = 5
_LEAST_SERVER = 140000
_LONGEST_PAUSE_MS = "4000"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# Any number: all migrations of Tailspan in one database wait for each other.
_MIGRATION_LOCK = 0x7461696C
_VERSION_1 = f"""
CREATE TABLE meta (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE agents (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    instance text NOT NULL, host text NOT NULL, pid integer NOT NULL, version text NOT NULL, page text NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT clock_timestamp(), expires_at timestamptz NOT NULL,
    draining boolean NOT NULL DEFAULT false, health text NOT NULL DEFAULT '{{}}'
) WITH (fillfactor = 50);
CREATE TABLE writers (agent bigint PRIMARY KEY, writes bigint NOT NULL DEFAULT 0) WITH (fillfactor = 50);
CREATE TABLE leases (
    shard smallint PRIMARY KEY, owner bigint, epoch bigint NOT NULL DEFAULT 0, expires_at timestamptz,
    takeovers bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
INSERT INTO leases (shard) SELECT generate_series(0, {METRICS_LEASE});
CREATE TABLE jobs (
    id uuid PRIMARY KEY, number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    shard smallint NOT NULL, identity text NOT NULL, job_id text NOT NULL, name text NOT NULL,
    stream integer NOT NULL, cursor bytea, ledger text NOT NULL,
    logs_complete boolean NOT NULL, late boolean NOT NULL, ended boolean NOT NULL,
    updated_s double precision NOT NULL, updated_day integer NOT NULL
) WITH (fillfactor = 70);
CREATE INDEX jobs_of_shard ON jobs (shard, updated_day);
CREATE TABLE seconds (
    job uuid NOT NULL, second bigint NOT NULL, lines bigint NOT NULL CHECK (lines >= 0), uid_sum numeric(20) NOT NULL,
    PRIMARY KEY (job, second)
) WITH (fillfactor = 70);
CREATE TABLE spans (
    job uuid NOT NULL, span_id text NOT NULL, number bigint GENERATED ALWAYS AS IDENTITY, shard smallint NOT NULL,
    resource bytea NOT NULL, span bytea NOT NULL, acked boolean NOT NULL DEFAULT false, PRIMARY KEY (job, span_id)
);
CREATE INDEX unsent_spans ON spans (shard, number) WHERE NOT acked;
CREATE TABLE runs (
    pipeline text NOT NULL, result text NOT NULL, error_type text NOT NULL, sum_s double precision NOT NULL,
    buckets text NOT NULL, exemplars text NOT NULL, changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (pipeline, result, error_type)
);
CREATE INDEX changed_runs ON runs (changed_at);
CREATE TABLE history (run bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, pipeline text NOT NULL, facts text NOT NULL);
CREATE INDEX history_of_pipeline ON history (pipeline, run);
CREATE TABLE failures (
    pipeline text NOT NULL, fingerprint text NOT NULL, runs bigint NOT NULL, first_unix_nano bigint NOT NULL,
    last_unix_nano bigint NOT NULL, changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (pipeline, fingerprint)
);
CREATE INDEX changed_failures ON failures (changed_at);
CREATE TABLE too_fast (pipeline text PRIMARY KEY, runs bigint NOT NULL);
CREATE TABLE names (
    identity text NOT NULL, job_id text NOT NULL, shard smallint NOT NULL, name text NOT NULL,
    asked_s double precision NOT NULL, PRIMARY KEY (identity, job_id)
);
CREATE INDEX names_of_shard ON names (shard);
"""
# For the page of any agent, which reads the jobs that others follow.
_VERSION_2 = "CREATE INDEX open_jobs ON jobs (number) WHERE NOT ended;"
# The changes of each version. A change only adds: agents of the version before write until they have handed over.
VERSIONS = (_VERSION_1, _VERSION_2)
SCHEMA_VERSION = len(VERSIONS)

_log = logging.getLogger(__name__)


def query(text: Any) -> LiteralString:
    """Return SQL that was put together from constants and a checked schema name, for psycopg's types."""
    checked: LiteralString = text
    return checked


class Tables:
    """The tables of one fleet: a schema of its own, named in each statement, since a pooler may share connections.

    Args:
        fleet: ``fleet.name``.

    Raises:
        ConfigError: The name is not possible.
    """

    def __init__(self, fleet: str) -> None:
        if not _NAME.fullmatch(fleet):
            raise ConfigError(
                f"{fleet!r}: a name has up to 40 of a-z, 0-9 and _, and begins with a letter", key="fleet.name"
            )
        self.fleet = fleet
        self.schema = f"tailspan_{fleet}"
        self.channel = self.schema

    def sql(self, text: str) -> LiteralString:
        """Return SQL with the schema in place of ``$``."""
        return query(text.replace("$", f"{self.schema}."))


class DatabaseThread:
    """One connection, used only in a thread of its own; an error closes it, and the next work connects again.

    Args:
        dsn: The connection string of libpq.
        purpose: What the connection is for; visible in ``pg_stat_activity``.

    Attributes:
        failure: Why the last work failed; None if it succeeded.
    """

    def __init__(self, dsn: str, purpose: str) -> None:
        self.failure: str | None = None
        self._dsn = dsn
        self._purpose = purpose
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"fleet-{purpose}")
        self._connection: Connection | None = None
        self._closed = False

    @property
    def connection(self) -> Connection | None:
        """The open connection; None without one. Only for its socket and its notifications."""
        return self._connection

    def copied_socket(self) -> int | None:
        """Return a copy of the connection's socket, to wait for notifications; None without a connection.

        The copy belongs to the caller: the thread may close the connection at any time.
        """
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError, psycopg.Error):
                return os.dup(connection.fileno())
        return None

    async def run(self, work: Callable[[Connection], T], *, timeout_s: float) -> T:
        """Do work in the thread, in order with all other work.

        Args:
            work: Called with an open connection, which commits each statement unless the work makes a transaction.
            timeout_s: Seconds after which the connection is cut, which makes the work fail.

        Raises:
            CheckpointError: The database cannot be reached or refuses.
        """
        if self._closed:
            raise CheckpointError("the fleet's database connection is closed")
        doing = asyncio.get_running_loop().run_in_executor(self._threads, self._do, work)
        try:
            # Not asyncio.wait_for: before Python 3.12 it returns the result to a task that was just cancelled.
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(doing)
        except TimeoutError:
            self._cut()
            doing.add_done_callback(_ignore_result)
            self.failure = f"no answer in {timeout_s:g} s"
            raise CheckpointError(f"the fleet's database: {self.failure}") from None

    def run_now(self, work: Callable[[Connection], T]) -> T:
        """Do work in the thread and wait for it; only before the event loop runs.

        Raises:
            CheckpointError: The database cannot be reached or refuses.
        """
        return self._threads.submit(self._do, work).result()

    def _do(self, work: Callable[[Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = connect(self._dsn, self._purpose)
            result = work(self._connection)
        except psycopg.Error as error:
            if not isinstance(error, psycopg.DataError | psycopg.IntegrityError):
                self._disconnect()
            self.failure = _text(error)
            raise CheckpointError(f"the fleet's database: {self.failure}") from error
        self.failure = None
        return result

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    def _cut(self) -> None:
        """Shut the socket down: a thread that waits for an answer wakes up with an error."""
        connection = self._connection
        if connection is not None:
            with (
                contextlib.suppress(OSError, psycopg.Error),
                socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as other,
            ):
                other.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, and wait for the thread to end."""
        if not self._closed:
            self._closed = True
            self._cut()
            self._threads.submit(self._disconnect)
            self._threads.shutdown()


def _ignore_result(doing: asyncio.Future[Any]) -> None:
    if not doing.cancelled():
        doing.exception()


def _text(error: psycopg.Error) -> str:
    """Return the error's message in one line, without secrets."""
    return mask(" ".join(str(error).split()) or type(error).__name__)


def connect(dsn: str, purpose: str) -> Connection:
    """Open a connection.

    Raises:
        ConfigError: The connection string is not valid.
        psycopg.Error: The server cannot be reached.
    """
    try:
        known = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigError(f"not a connection string of PostgreSQL: {_text(error)}", key="fleet.dsn") from None
    add_secret(str(known.get("password") or ""))
    # A peer that vanished is found within seconds; what the connection string says goes first.
    defaults = {
        "connect_timeout": _CONNECT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    options = {key: value for key, value in defaults.items() if key not in known}
    return psycopg.connect(
        dsn,
        autocommit=True,
        # A pooler may give the next transaction to another server process, which has not prepared anything.
        prepare_threshold=None,
        client_encoding="utf8",
        application_name=f"tailspan {purpose}",
        **cast(dict[str, Any], options),
    )


@contextmanager
def transaction(connection: Connection) -> Iterator[psycopg.Transaction]:
    """Make a transaction, which the server ends if this process stops in it: its locks would stop the other agents."""
    with connection.transaction() as begun:
        connection.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, true)", (_LONGEST_PAUSE_MS,))
        yield begun


def migrate(connection: Connection, tables: Tables) -> None:
    """Create the tables of a fleet, or migrate them, while no other agent does.

    Raises:
        CheckpointError: The database cannot hold the fleet, or has the schema of a newer version.
    """
    if connection.info.server_version < _LEAST_SERVER:
        raise CheckpointError(
            f"the fleet's database is PostgreSQL {connection.info.server_version // 10000}: 14 or newer is needed"
        )
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise CheckpointError(f"the fleet's database has the encoding {encoding}: UTF8 is needed")
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        version = schema_version(connection, tables)
        if version > SCHEMA_VERSION:
            raise CheckpointError(newer_schema(version, tables))
        if version == SCHEMA_VERSION:
            return
        if not version:
            connection.execute(query(f"CREATE SCHEMA IF NOT EXISTS {tables.schema}"))
        connection.execute(query(f"SET LOCAL search_path = {tables.schema}"))
        for step in VERSIONS[version:]:
            connection.execute(query(step))
        connection.execute(
            "INSERT INTO meta VALUES ('schema_version', %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (str(SCHEMA_VERSION),),
        )
        connection.execute(
            "INSERT INTO meta VALUES ('instance_id', gen_random_uuid()::text),"
            " ('start_unix_nano', (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint::text)"
            " ON CONFLICT (key) DO NOTHING"
        )


def schema_version(connection: Connection, tables: Tables) -> int:
    """Return the version of a fleet's tables; 0 without tables."""
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (f"{tables.schema}.meta",)).fetchone()
    if row is None or not row[0]:
        return 0
    found = connection.execute(tables.sql("SELECT value FROM $meta WHERE key = 'schema_version'")).fetchone()
    return int(found[0]) if found is not None else 0


def newer_schema(version: int, tables: Tables) -> str:
    """Return why an agent cannot use the tables of a newer version, and which one to upgrade."""
    return (
        f"the fleet {tables.fleet!r} has schema version {version} of a newer Tailspan; this agent on"
        f" {socket.gethostname()} knows versions up to {SCHEMA_VERSION}: upgrade this agent"
    )
