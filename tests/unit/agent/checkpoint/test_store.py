"""The checkpoint store: acks survive, damage is salvaged, a newer version stays unchanged."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path

import pytest

from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint import store as store_module
from tailspan_agent.checkpoint.database import SCHEMA_VERSION, lock_holder
from tailspan_agent.checkpoint.store import Ack, Checkpoint, OutboxSpan, SqliteStore, read_checkpoint
from tailspan_agent.errors import CheckpointError, ValueRefusedError
from tests.fakes.agents import looped, until

FACTS = '{"first_seen_ns":1}'
MANY = 2000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """An open store."""
    store = SqliteStore(tmp_path)
    yield store
    store.close()


def add(store: SqliteStore, job_id: str = "j1", identity: str = "id") -> Checkpoint:
    return store.add_job(identity, job_id, "etl", stream=0, ledger=FACTS)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def reopen(store: SqliteStore) -> SqliteStore:
    """Close the store and open it again."""
    store.close()
    return SqliteStore(store.path.parent)


def unfinished(store: SqliteStore) -> list[tuple[str, str]]:
    return list(chain.from_iterable(store.unfinished_jobs("id")))


def spans(key: int, *ids: str, data: bytes = b"span") -> list[OutboxSpan]:
    return [OutboxSpan(key, span_id, b"resource", data) for span_id in ids]


def test_acknowledgements_survive(tmp_path: Path) -> None:
    """Cursor, ledger, instance id and start time are the same after a restart."""
    store = SqliteStore(tmp_path)
    key = add(store).key
    store.ack([Ack(key, b"cursor 1", FACTS), Ack(key, b"cursor 2", '{"first_seen_ns":2}')])
    before = (store.instance_id, store.start_unix_nano)
    store = reopen(store)
    assert store.job("id", "j1") == Checkpoint(
        key, "etl", False, b"cursor 2", '{"first_seen_ns":2}', False, False, False
    )
    assert (store.instance_id, store.start_unix_nano, store.recovered) == (*before, None)
    store.close()


@looped
async def test_a_commit_that_fails_is_made_again(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk: what was written stays visible, further writes are refused, and all is stored once there is room."""
    first = add(store, "j1").key
    await store.written()
    with full_disk():
        second = add(store, "j2").key
        store.ack([Ack(first, b"here", FACTS)])
        assert store.end_job(first, spans(first, "s1"), RunTotals("etl", "success").add(1.0))
        await until(lambda: store.write_failed)
        assert store.job("id", "j1").cursor == b"here"
        assert (store.totals, store.is_writable()) == ({}, False)  # what a kill would undo is not counted
        with pytest.raises(CheckpointError, match="cannot write the checkpoint store"):
            add(store, "j3")
        with pytest.raises(CheckpointError):
            store.unsent_spans(10)
    assert "waiting until the disk is usable" in caplog.text
    await store.written()
    assert (store.write_failed, store.job("id", "j3")) == (False, None)
    assert store.totals["etl", "success", ""].count == 1
    assert not store.end_job(first, spans(first, "s1"), RunTotals("etl", "success").add(1.0))
    with closing(sqlite3.connect(store.path)) as other:
        rows = other.execute("SELECT key, cursor FROM jobs ORDER BY key").fetchall()
    assert rows == [(first, b"here"), (second, None)]


@looped
async def test_writes_of_one_moment_share_a_commit(store: SqliteStore) -> None:
    """Other processes see them a moment later, without a further call."""
    before = store._commits
    for number in range(20):
        add(store, f"j{number}")
    assert store._commits == before
    await until(lambda: read_checkpoint(store.path.parent, "id", "j19"))
    assert store._commits == before + 1


@looped
async def test_a_write_that_fails_undoes_no_other(store: SqliteStore) -> None:
    """Several writes that belong together are all undone; those before them are committed."""
    add(store, "j1")
    with suppress(ZeroDivisionError), store.together():
        add(store, "j2")
        raise ZeroDivisionError
    await store.written()
    assert (store.job("id", "j1") is None, store.job("id", "j2")) == (False, None)


def test_a_killed_process_loses_no_ack(tmp_path: Path) -> None:
    """SIGKILL right after an ack: the ack is stored, and the lock is released."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tailspan_agent.checkpoint.store import Ack, SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "job = store.add_job('id', 'j1', 'etl', stream=1, ledger='{}')\n"
        "store.ack([Ack(job.key, b'here', '{}', {7: (1, 2**64 - 1)})])\nos.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    with closing(SqliteStore(tmp_path)) as store:
        job = store.job("id", "j1")
        assert job is not None
        assert (job.cursor, job.stream) == (b"here", 1)
        assert asyncio.run(store.seconds(job.key)) == {7: (1, 2**64 - 1)}


def test_unfinished_jobs_come_in_parts(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part takes milliseconds, however many jobs there are and whatever their numbers."""
    monkeypatch.setattr(store_module, "_PART", 2)
    for number in range(5):
        add(store, f"j{number}")
    store._db.execute("UPDATE jobs SET key = ? WHERE job_id = 'j4'", ((1 << 63) - 1,))
    store._db.execute("UPDATE jobs SET key = -5 WHERE job_id = 'j3'")
    parts = [[job_id for job_id, _ in part] for part in store.unfinished_jobs("id")]
    assert parts == [["j3", "j0"], ["j1", "j2"], ["j4"]]


def test_old_jobs_are_forgotten_in_parts(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run in between, however many jobs are old; those of the list are kept."""
    monkeypatch.setattr(store_module, "_FORGOTTEN_PART", 2)
    for number in range(7):
        add(store, f"j{number}")

    async def main() -> tuple[int, int]:
        forgetting, turns = asyncio.ensure_future(store.forget(-1, keep={"j1", "j6", "unknown"})), 0
        while not forgetting.done():
            turns += 1
            await asyncio.sleep(0)
        return await forgetting, turns

    forgotten, turns = asyncio.run(main())
    assert forgotten == 5
    assert turns >= 4
    assert [job_id for job_id, _ in unfinished(store)] == ["j1", "j6"]


def test_the_newest_lines_of_a_pipeline_are_found_by_its_name(tmp_path: Path) -> None:
    """Not by a search through all jobs; also of jobs that an earlier process stored."""
    ledger = '{"first_seen_ns":1,"log_streams":{"2":7}}'
    with closing(SqliteStore(tmp_path)) as store:
        store.add_job("id", "old", "etl", stream=0, ledger=ledger)
    with closing(SqliteStore(tmp_path)) as store:
        store.add_job("id", "new", "web", stream=0, ledger=ledger)
        assert [store.newest_by_stream(name) for name in ("etl", "web", "none")] == [{2: 7}, {2: 7}, {}]
        plan = "EXPLAIN QUERY PLAN SELECT key FROM jobs WHERE key IN (SELECT job FROM temp.named WHERE hash = 1)"
        assert not any("SCAN" in str(step) for step in store._db.execute(plan))


@looped
async def test_names_are_found_after_a_unit_that_failed(store: SqliteStore) -> None:
    """The jobs before it are found, also the last ones; its own is not."""
    ledger = '{"first_seen_ns":1,"log_streams":{"2":7}}'
    store.add_job("id", "j1", "etl", stream=0, ledger=ledger)
    assert store.newest_by_stream("etl") == {2: 7}
    with suppress(ZeroDivisionError), store.together():
        store.add_job("id", "j2", "web", stream=0, ledger=ledger)
        assert store.newest_by_stream("web") == {2: 7}
        raise ZeroDivisionError
    store.add_job("id", "j3", "etl", stream=0, ledger=ledger.replace("7", "8"))
    assert [store.newest_by_stream(name) for name in ("etl", "web")] == [{2: 8}, {}]


@looped
async def test_a_refused_ack_undoes_no_other(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    """Neither those before it nor those after it, nor earlier writes that are not committed yet."""
    keys = [add(store, f"j{number}").key for number in range(3)]
    store.ack([Ack(key, cursor, FACTS) for key, cursor in zip(keys, (b"1", "\ud800", b"3"), strict=True)])  # type: ignore[arg-type]
    await store.written()
    with closing(sqlite3.connect(store.path)) as other:
        assert other.execute("SELECT cursor FROM jobs ORDER BY key").fetchall() == [(b"1",), (None,), (b"3",)]
    assert f"an ack of job number {keys[1]} is lost" in caplog.text


@looped
async def test_runs_are_counted_once_with_the_unit_that_ends_them(store: SqliteStore) -> None:
    """A run whose unit failed is not counted; those of one commit share a row of totals."""
    keys = [add(store, f"j{number}").key for number in range(3)]
    for key in keys[:2]:
        assert store.end_job(key, spans(key, f"s{key}"), RunTotals("etl", "success").add(1.0))
    for span, error in (("\ud800", None), (f"s{keys[2]}", "\ud800")):
        with pytest.raises(ValueRefusedError):
            store.end_job(keys[2], spans(keys[2], span), RunTotals("etl", "success", error).add(1.0))
    assert store.totals["etl", "success", ""].count == 2
    with closing(sqlite3.connect(store.path)) as other:
        assert other.execute("SELECT sum_s FROM runs").fetchall() == [(2.0,)]


def test_a_long_log_of_writes_is_copied_by_a_thread(tmp_path: Path) -> None:
    """A commit does not wait for the disk; a store that is closed at once has all of it."""
    with closing(SqliteStore(tmp_path)) as store:
        key, size = add(store).key, store.path.stat().st_size
        while store._copying is None:
            store.ack([Ack(key, os.urandom(100_000), FACTS)])
        store._copying.join()
        assert store.path.stat().st_size > size
        store.ack([Ack(key, b"last", FACTS)])
    with closing(sqlite3.connect(store.path)) as db:
        assert db.execute("SELECT cursor FROM jobs").fetchall() == [(b"last",)]


def test_another_process_can_read(store: SqliteStore) -> None:
    """`agent verify` reads the store of a running agent; a directory without a store has no job."""
    key = add(store).key
    store.ack([Ack(key, b"1", FACTS)])
    assert read_checkpoint(store.path.parent, "id", "j1") == store.job("id", "j1")
    assert read_checkpoint(store.path.parent, "id", "j2") is None
    assert read_checkpoint(store.path.parent / "nowhere", "id", "j1") is None


def test_reading_a_damaged_store_is_an_error(tmp_path: Path) -> None:
    """A file that is not a store is reported as unreadable and stays unchanged."""
    (tmp_path / "checkpoints.db").write_bytes(b"x" * 5000)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_checkpoint(tmp_path, "id", "j1")
    assert (tmp_path / "checkpoints.db").read_bytes() == b"x" * 5000


def test_one_agent_per_directory(store: SqliteStore) -> None:
    """The second agent's error names the first; the lock gives its pid and ends with it."""
    with pytest.raises(CheckpointError, match=rf"in use by agent pid {os.getpid()} on "):
        SqliteStore(store.path.parent)
    assert lock_holder(store.path.parent) == os.getpid()
    reopened = reopen(store)
    reopened.close()
    assert lock_holder(store.path.parent) is None
    assert lock_holder(store.path.parent / "nowhere") is None
    store.__init__(store.path.parent)  # type: ignore[misc]


def test_a_store_is_private(store: SqliteStore) -> None:
    """Other users must not read cursors and names."""
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_a_directory_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    """A file is in its place."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot use agent\.state_dir"):
        SqliteStore(tmp_path / "file")


def test_a_newer_version_stays_unchanged(tmp_path: Path) -> None:
    """A store of a newer Tailspan, including what is not yet in the main file: no byte changes."""
    store = SqliteStore(tmp_path)
    add(store)
    store.close()
    with closing(sqlite3.connect(store.path, isolation_level=None)) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        newer.execute("CREATE TABLE novelty (x)")
        before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoints.db*") if "shm" not in path.name}
        assert len(before) == 2, "what this is about: a write-ahead log beside the file"
        with pytest.raises(CheckpointError, match="of a newer Tailspan"):
            SqliteStore(tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(CheckpointError, match="of a newer Tailspan"):
        SqliteStore(tmp_path)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a store with many jobs."""
    directory = tmp_path_factory.mktemp("many")
    store = SqliteStore(directory)
    with closing(sqlite3.connect(store.path)) as db, db:
        db.executemany(
            "INSERT INTO jobs (identity, job_id, name, backfill, cursor, facts, updated_s) VALUES (?,?,?,?,?,?,?)",
            [("id", f"j{number}", "etl", 0, b"%d" % number, FACTS, time.time()) for number in range(MANY)],
        )
    store.close()
    return store.path.read_bytes()


@pytest.mark.parametrize("part", [0, 1, 50, 100, 4095, 4096, 4097, 0.5, 0.9])
def test_a_truncated_file_is_salvaged(tmp_path: Path, many: bytes, part: float) -> None:
    """No crash loop: the readable rows are salvaged, the damaged file is set aside, and this is reported."""
    size = int(part * len(many)) if isinstance(part, float) else part
    (tmp_path / "checkpoints.db").write_bytes(many[:size])
    with closing(SqliteStore(tmp_path)) as store:
        assert store.recovered
        known = dict(unfinished(store))
        assert len(known) >= (MANY * part * 0.6 if isinstance(part, float) else 0)
        assert all(store.job("id", job_id).cursor == job_id[1:].encode() for job_id in list(known)[:50])
        add(store, "new")
    aside = list(tmp_path.glob("checkpoints.corrupt-*.db"))
    assert len(aside) == (size > 1)
    with closing(SqliteStore(tmp_path)) as store:
        assert store.recovered is None


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_is_salvaged(tmp_path: Path, many: bytes, seed: int) -> None:
    """Whichever bytes are overwritten, the store opens, has no wrong cursor, and accepts new ones."""
    chance = random.Random(seed)
    damaged = bytearray(many)
    for _ in range(chance.choice([1, 3, 30])):
        start, length = chance.randrange(len(damaged)), chance.choice([1, 8, 600])
        damaged[start : start + length] = chance.randbytes(length)
    (tmp_path / "checkpoints.db").write_bytes(damaged)
    with closing(SqliteStore(tmp_path)) as store:
        unfinished(store)
        assert store.totals is not None
        store.unsent_spans(10)
        asyncio.run(store.forget(3600))
        assert store.job("id", add(store, "new").name) is None


def test_a_damaged_file_that_cannot_be_set_aside_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent ends with an error that names the file, and leaves the file as it is."""
    (tmp_path / "checkpoints.db").write_bytes(b"not a database, whatever it was")
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    (tmp_path / "checkpoints.corrupt-7.db").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot set aside the damaged .*checkpoints\.db: .*directory"):
        SqliteStore(tmp_path)
    assert (tmp_path / "checkpoints.db").read_bytes() == b"not a database, whatever it was"
    assert lock_holder(tmp_path) is None


def test_a_flipped_bit_in_totals_costs_only_these(tmp_path: Path) -> None:
    """Unreadable totals are skipped; the others are kept."""
    store = SqliteStore(tmp_path)
    for name in ("good", "bad"):
        key = add(store, name).key
        store.end_job(key, [], RunTotals(name, "success").add(1.0))
    store.close()
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE runs SET buckets = '[oops' WHERE pipeline = 'bad'")
    with closing(SqliteStore(tmp_path)) as store:
        assert [total.pipeline for total in store.totals.values()] == ["good"]


def test_a_failing_disk_is_a_checkpoint_error(store: SqliteStore) -> None:
    """Failed reads and writes raise one kind of error and change nothing."""
    key = add(store).key
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for write in (
            lambda: store.ack([Ack(key, b"x", FACTS)]),
            lambda: store.complete_logs(key),
            lambda: store.add_name("id", "j1", "x"),
            lambda: asyncio.run(store.forget(-1)),
        ):
            with pytest.raises(CheckpointError, match="cannot write the checkpoint store"):
                write()
        assert store.job("id", "j1") == Checkpoint(key, "etl", False, None, FACTS, False, False, False)
        assert (store.write_failed, store.is_writable()) == (True, False)
    assert (store.is_writable(), store.write_failed) == (True, False)
    store.ack([Ack(key, b"x", FACTS)])


def test_a_deleted_store_is_reported(store: SqliteStore) -> None:
    """SQLite would write on to a deleted file; a restored file is used again."""
    key = add(store).key
    aside = store.path.with_name("aside.db")
    store.path.rename(aside)
    for in_its_place in (lambda: None, store.path.touch):
        in_its_place()
        with pytest.raises(CheckpointError, match="was deleted or replaced while the agent runs: restore it"):
            store.ack([Ack(key, b"x", FACTS)])
        assert not store.is_writable()
    aside.replace(store.path)
    assert store.is_writable()
    store.ack([Ack(key, b"x", FACTS)])
    assert store.job("id", "j1").cursor == b"x"


def test_a_job_that_may_still_be_late_is_not_finished(store: SqliteStore) -> None:
    """Its lines are complete, and a restart polls it again; after its time it needs no more work."""
    key = add(store).key
    store.end_job(key, [], RunTotals("etl", "success").add(1.0))
    store.ack([Ack(key, b"x", FACTS, {7: (1, 5)})])
    store.complete_logs(key, late=True)
    assert (store.finished_jobs("id"), unfinished(store)) == (set(), [("j1", "etl")])
    assert asyncio.run(store.seconds(key)) == {7: (1, 5)}
    found = store.job("id", "j1")
    assert (found.logs_complete, found.late, found.ended) == (True, True, True)
    store.complete_logs(key)
    assert (store.finished_jobs("id"), unfinished(store), asyncio.run(store.seconds(key))) == ({"j1"}, [], {})


def test_names_are_forgotten_too(store: SqliteStore) -> None:
    """Also names of jobs that were never followed, of a service that is no longer watched."""
    store.add_name("gone", "j1", "etl")
    asyncio.run(store.forget(3600))
    assert store.names("gone") == {"j1": "etl"}
    asyncio.run(store.forget(-1))
    assert store.names("gone") == {}


def test_the_log_of_writes_is_copied_only_when_it_has_grown_again(store: SqliteStore):
    """SQLite does not shrink it by itself: a thread would then copy it after each few commits for ever."""
    log = store.path.with_name(f"{store.path.name}-wal")
    row, largest, copies = add(store), 0, 0
    for number in range(1500):
        store.ack([Ack(row.key, b"%d" % number, random.randbytes(3000).hex())])
        largest = max(largest, log.stat().st_size)
        if store._copying is not None:
            store._copying.join()
            copies, store._copying = copies + 1, None
    assert largest > store_module._LOG_BYTES
    assert 0 < copies < 10
