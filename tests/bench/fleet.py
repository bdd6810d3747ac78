"""W10: a fleet: 100,000 known jobs, 1,000 that write a line a second, four agents, one PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tailspan.local.store import JobStore
from tailspan_agent.checkpoint.rows import Ack
from tailspan_agent.errors import LeaseLostError
from tailspan_agent.fleet.database import Connection, DatabaseThread, Tables
from tailspan_agent.fleet.leases import AgentInfo, join, renew
from tailspan_agent.fleet.shard_rows import read_shards
from tailspan_agent.fleet.shards import METRICS_LEASE, SHARDS
from tailspan_agent.fleet.store import PostgresStore, open_store
from tailspan_agent.tasks import cancelled
from tests.bench.holder import HOLDING
from tests.bench.job_server import SERVING, base_url
from tests.bench.measure import cpu_of, peak_rss, started, tailspan
from tests.bench.receiver import receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row
from tests.fakes.postgres import Postgres

__all__ = ["shared_jobs"]

_KNOWN, _SPEAKERS, _AGENTS = 100_000, 1_000, 4
_LEASE_S = 15.0
_PATIENCE_S = 300.0
_SETTLE_S, _WATCH_S, _ACKS_S = 60.0, 60.0, 20.0
_ACKS_PER_S = 5_000
_LEDGER = '{"first_seen_ns":1764450000000000000,"first_line_ns":1764450000000000000,"lines":1000,"stream_hash":12345}'


@dataclass(frozen=True, slots=True)
class _Database:
    """The database of the agents, as it is measured."""

    postgres: Postgres
    tables: Tables

    def query(self, text: str, *values: object) -> list[tuple[object, ...]]:
        return self.postgres.execute(self.tables.sql(text), *values)

    def transactions(self) -> int:
        """Return the number of commits so far; a backend reports its own after a second."""
        (row,) = self.postgres.execute("SELECT sum(xact_commit)::bigint FROM pg_stat_database")
        return int(str(row[0]))

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server and all of its processes, also of those that have ended."""
        pid = self.postgres.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = cpu_of(pid)
        for child in children:
            with suppress(FileNotFoundError):
                total += cpu_of(int(child))
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]
        return total + sum(map(int, ended)) / os.sysconf("SC_CLK_TCK")

    def followed(self) -> int:
        """Return the number of jobs that agents follow."""
        return int(str(self.query("SELECT count(*) FROM $jobs WHERE NOT ended")[0][0]))

    def shares(self) -> list[int]:
        """Return the number of shards of each agent whose leases have not ended."""
        rows = self.query(
            "SELECT count(*) FROM $leases WHERE shard < %s AND expires_at > clock_timestamp() GROUP BY owner",
            METRICS_LEASE,
        )
        return sorted(int(str(count)) for (count,) in rows)

    def is_balanced(self, agents: int) -> bool:
        """Return whether so many agents own all shards, each one the same number, plus or minus one."""
        shares = self.shares()
        return len(shares) == agents and sum(shares) == SHARDS and shares[-1] - shares[0] <= 1


def shared_jobs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield what agents and database cost, how long a takeover takes, and what many acks cost."""
    store = directory / "jobs"
    speakers = scale.of(_SPEAKERS, least=8)
    holder = [sys.executable, "-m", "tests.bench.holder", str(store), str(speakers), str(speakers)]
    server = [sys.executable, "-m", "tests.bench.job_server", str(store)]
    with Postgres(durable=True) as postgres, receiving(directory) as receiver:
        database = _Database(postgres, Tables("bench"))
        open_store(postgres.dsn, "bench", "fill").close()
        _fill(database, JobStore(store).identity, scale.of(_KNOWN))
        with (
            started(holder, log=directory / "holder.log", says=HOLDING),
            started(server, log=directory / "server.log", says=SERVING) as (_, said),
            _agents(directory, base_url(said), receiver.http_url, postgres.dsn) as pids,
        ):
            _until(lambda: database.is_balanced(_AGENTS) and database.followed() >= speakers, "the start")
            time.sleep(_SETTLE_S)
            receiver.counts()
            watched_s = _WATCH_S if scale.factor >= 1 else _WATCH_S / 3
            yield from _steady(database, pids, watched_s)
            yield Row(case="W10 lines relayed", figure=receiver.counts()["records"] / watched_s, unit="lines/s")
            yield Row(case="W10 agent, peak memory", figure=max(map(peak_rss, pids)) / MIB, unit="MiB")
            begun_s = time.monotonic()
            os.kill(pids[0], 9)
            _until(lambda: database.is_balanced(_AGENTS - 1), "the takeover")
            leases = (time.monotonic() - begun_s) / _LEASE_S
            yield Row(case="W10 takeover of a killed agent's shards", figure=leases, unit="leases", goal=Goal(2))
        yield from asyncio.run(_acks(_Database(postgres, Tables("acks")), scale.of(_ACKS_PER_S)))


def _steady(database: _Database, pids: list[int], watched_s: float) -> Iterator[Row]:
    begun_s, commits, cpu_s = time.monotonic(), database.transactions(), database.cpu_s()
    before = [cpu_of(pid) for pid in pids]
    time.sleep(watched_s)
    elapsed_s = time.monotonic() - begun_s
    shares = [(cpu_of(pid) - start) / elapsed_s * 100 for pid, start in zip(pids, before, strict=True)]
    yield Row(case="W10 agent, the busiest", figure=max(shares), unit="% of a core", goal=Goal(8))
    share = (database.cpu_s() - cpu_s) / elapsed_s * 100
    yield Row(case="W10 database", figure=share, unit="% of a core", goal=Goal(15))
    per_s = (database.transactions() - commits) / elapsed_s
    yield Row(case="W10 database, transactions", figure=per_s, unit="/s", goal=Goal(50))


def _fill(database: _Database, identity: str, count: int) -> None:
    """Add finished jobs, as after a month, each with a span."""
    database.query(
        "INSERT INTO $jobs (id, shard, identity, job_id, name, stream, cursor, ledger, logs_complete, late, ended,"
        " updated_s, updated_day) SELECT encode(substr(hash, 1, 16), 'hex')::uuid, get_byte(hash, 0), %s, job_id, name,"
        " 0, 'x', %s, true, false, true, %s, %s FROM (SELECT 'known-' || n AS job_id, 'bench-' || n %% 10 AS name,"
        " sha256(convert_to(%s, 'UTF8') || '\\x00'::bytea || convert_to('known-' || n, 'UTF8')) AS hash"
        " FROM generate_series(1, %s) AS n) AS made",
        identity, _LEDGER, time.time(), int(time.time() // 86400), identity, count,
    )  # fmt: skip
    database.query(
        "INSERT INTO $spans (job, span_id, shard, resource, span, acked)"
        " SELECT id, left(id::text, 8), shard, repeat('r', 300)::bytea, repeat('s', 400)::bytea, true FROM $jobs"
    )
    database.postgres.execute("VACUUM ANALYZE")


@contextmanager
def _agents(directory: Path, base: str, endpoint: str, dsn: str) -> Iterator[list[int]]:
    """Run the agents while the block runs."""
    with ExitStack() as stack:
        pids = []
        for number in range(_AGENTS):
            config = directory / f"agent-{number}.toml"
            config.write_text(
                f'[services.fused]\nbase_url = "{base}"\n'
                f'[agent]\nstate_dir = "{directory}/agent-{number}"\nlisten = ""\n'
                f'[fleet]\ndsn = "{dsn}"\nname = "bench"\nlease = {_LEASE_S}\n'
                f'[[agent.watch]]\nservice = "fused"\ndiscover = true\n[otlp]\nendpoint = "{endpoint}"\n'
            )
            command, log = tailspan("agent", "run", "--config", str(config)), directory / f"agent-{number}.log"
            pids.append(stack.enter_context(started(command, log=log))[0])
        yield pids


async def _acks(database: _Database, per_s: int) -> list[Row]:
    """Return what the acknowledgements of four agents cost, each of another job, at a fixed rate."""
    stores: list[PostgresStore] = []
    with ExitStack() as stack:
        for number in range(_AGENTS):
            store = open_store(database.postgres.dsn, database.tables.fleet, f"agent-{number}")
            stack.callback(store.close)
            stores.append(store)
        leases = DatabaseThread(database.postgres.dsn, "bench leases")
        stack.callback(leases.close)
        keys = [
            _own_jobs(store, leases, number, per_s // _AGENTS) for number, store in enumerate(_joined(stores, leases))
        ]
        writing = [asyncio.create_task(store.run()) for store in stores]
        await asyncio.gather(*(store.written() for store in stores))
        await asyncio.sleep(2)
        commits, cpu_s, begun_s, done = database.transactions(), database.cpu_s(), time.monotonic(), 0
        while (elapsed_s := time.monotonic() - begun_s) < _ACKS_S:
            due = int(elapsed_s * per_s / _AGENTS)
            for store, own in zip(stores, keys, strict=True):
                store.ack(Ack(own[n % len(own)], b"%d" % n, _LEDGER) for n in range(done, due))
            done = due
            await asyncio.sleep(0.02)
        await asyncio.gather(*(store.written() for store in stores))
        elapsed_s = time.monotonic() - begun_s
        used_s = database.cpu_s() - cpu_s
        await asyncio.sleep(2)  # a backend reports its commits after a second
        transactions = database.transactions() - commits
        await cancelled(*writing)
    rate = done * _AGENTS / elapsed_s
    return [
        Row(case="W10 acks", figure=rate, unit="acks/s", goal=Goal(0.98 * per_s, at_least=True)),
        Row(case="W10 acks, transactions", figure=transactions / elapsed_s, unit="/s", goal=Goal(50)),
        Row(case="W10 acks, database", figure=used_s / elapsed_s * 100, unit="% of a core"),
    ]


def _joined(stores: list[PostgresStore], leases: DatabaseThread) -> list[PostgresStore]:
    """Let the agents join, all before the first one takes shards."""
    for store in stores:
        info = AgentInfo(store.instance_id, "bench", 1, "0", "")
        tables = store.tables
        store.writer.join(
            leases.run_now(lambda connection, info=info, tables=tables: join(connection, tables, info, 600.0)), 0
        )
    return stores


def _own_jobs(store: PostgresStore, leases: DatabaseThread, number: int, count: int) -> list[int]:
    """Take an agent's share of the shards, and add jobs in them; return their keys."""

    def take(connection: Connection) -> dict[int, int]:
        standing = renew(connection, store.tables, store.agent, {}, lease_s=600.0, draining=False, health={})
        return {shard: epoch for shard, epoch in standing.taken.items() if shard < METRICS_LEASE}

    taken = leases.run_now(take)
    store.adopt(taken, leases.run_now(lambda connection: read_shards(connection, store.tables, list(taken))))
    keys: list[int] = []
    tried = 0
    while len(keys) < count:
        tried += 1
        with suppress(LeaseLostError):  # another agent owns the job
            keys.append(store.add_job("bench", f"{number}-{tried}", "bench", stream=0, ledger=_LEDGER).key)
    return keys


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"W10: {what} took longer than {_PATIENCE_S:g} s")
        time.sleep(0.1)
