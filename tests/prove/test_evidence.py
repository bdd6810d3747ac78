"""Which step a kill hit is decided by evidence, and a torn write is distinguished from a whole one."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.prove.evidence import Evidence, Step, WriteAhead, steps_of

AHEAD = {"answered": {"job": 20}, "acked": {"job": 10}}


@pytest.mark.parametrize(
    ("evidence", "steps"),
    [
        ({}, [Step.ELSEWHERE]),
        ({"handed": {"job": 5}}, [Step.READ]),
        ({"handed": {"job": 5}, "arrived": {"job": 5}}, [Step.ELSEWHERE]),
        ({"handed": {"job": 5}, "acked": {"job": 5}}, [Step.ELSEWHERE]),
        ({"encoded": 5}, [Step.ENCODED]),
        ({"encoded": 5, "begun": 5}, [Step.ELSEWHERE]),
        ({"encoded": 5, "open_requests": 1}, [Step.SENDING, Step.ENCODED]),
        (AHEAD, [Step.ANSWERED]),
        ({"answered": {"job": 10}, "acked": {"job": 10}}, [Step.ELSEWHERE]),
        ({**AHEAD, "torn_write": True, "open_requests": 1}, [Step.WRITING, Step.ANSWERED, Step.SENDING]),
        ({"draining": True}, [Step.ELSEWHERE]),
        ({"draining": True, "open_requests": 1}, [Step.DRAINING]),
        ({"draining": True, **AHEAD}, [Step.DRAINING]),
    ],
)
def test_the_steps_follow_from_the_evidence(evidence: dict[str, object], steps: list[Step]) -> None:
    """Only what there is evidence of counts, the furthest first."""
    assert steps_of(Evidence(**evidence)) == steps  # type: ignore[arg-type]


WRITER = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("CREATE TABLE IF NOT EXISTS t (x)")
for number in range(int(sys.argv[2])):
    db.execute("INSERT INTO t VALUES (randomblob(20000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


def write(database: Path, transactions: int) -> None:
    """Write a number of transactions and be killed."""
    done = subprocess.run([sys.executable, "-S", "-c", WRITER, str(database), str(transactions)])
    assert done.returncode == -signal.SIGKILL


def test_a_torn_write_differs_from_whole_ones_and_from_an_older_tear(tmp_path: Path) -> None:
    """A log that was cut within its last transaction is torn, once: not for the process that comes after."""
    database = tmp_path / "store.db"
    write(database, 2)
    before = WriteAhead.read(database)
    assert not before.torn_since(WriteAhead(b"", 0))
    write(database, 1)
    whole = WriteAhead.read(database)
    assert not whole.torn_since(before)
    # As if the process had been killed with two pages of its last transaction written, and none counted.
    log = Path(f"{database}-wal")
    os.truncate(log, len(before.log) + 2 * (24 + 4096))
    torn = WriteAhead(log.read_bytes(), before.committed)
    assert torn.torn_since(before)
    assert not torn.torn_since(torn)
    shutil.copytree(tmp_path, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "store.db")) as db:
        assert db.execute("SELECT count(*) FROM t").fetchone() == (2,)
