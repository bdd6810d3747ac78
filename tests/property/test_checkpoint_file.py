"""A checkpoint store with any damage: it opens, healed if needed, or says clearly why not; and then opens again."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.store import Ack, OutboxSpan, SqliteStore
from tailspan_agent.errors import CheckpointError
from tailspan_agent.job.ledger import JobLedger
from tests.property.effort import fuzz


def fill(state_dir: Path) -> None:
    """Make a store with a row in every table."""
    store = SqliteStore(state_dir)
    for number in range(3):
        job = store.add_job(
            "me", f"job-{number}", f"name-{number}", stream=0, ledger=JobLedger(first_seen_ns=1).to_json()
        )
        store.ack([Ack(job.key, b"cursor", JobLedger(first_seen_ns=2).to_json(), {5: (2, 3)})])
        span = OutboxSpan(job.key, f"span-{number}", b"resource", b"span")
        store.end_job(job.key, [span], RunTotals(f"name-{number}", "success", None).add(1.5))
        store.add_name("me", f"job-{number}", f"name-{number}")
    store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of such a store."""
    home = tmp_path_factory.mktemp("whole")
    fill(home)
    return home / "checkpoints.db"


def use(state_dir: Path) -> None:
    """Do what an agent does with its store."""
    store = SqliteStore(state_dir)
    try:
        assert store.totals is not None
        store.names("me")
        store.finished_jobs("me")
        store.unsent_spans(10)
        for job_id, _ in [*chain.from_iterable(store.unfinished_jobs("me")), ("job-0", ""), ("new", "")]:
            job = store.job("me", str(job_id)) or store.add_job("me", "new", "n", stream=0, ledger="{}")
            # A job with a damaged ledger starts again: `tailspan_agent.pipeline.job_pipeline`.
            with suppress(ValueError):
                JobLedger.from_json(job.ledger)
            asyncio.run(store.seconds(job.key))
            store.ack([Ack(job.key, b"c", "{}", {5: (1, 1)})])
        asyncio.run(store.forget(0.0))
    finally:
        store.close()


def opens_again(state_dir: Path) -> None:
    """Use a damaged store; an error is one of ours, and does not come again for ever."""
    said = ""
    try:
        use(state_dir)
    except CheckpointError as error:
        said = str(error)
    if "newer Tailspan" not in said:
        # What was wrong was set aside, or comes again in the same words: never another crash.
        assert said == ""
        use(state_dir)
        use(state_dir)


@pytest.mark.parametrize("at", [18, 19, 44, 47])
def test_a_file_of_a_future_format_is_damaged(whole: Path, tmp_path: Path, at: int) -> None:
    """SQLite opens it only for reading, which looks like missing rights, start after start; or not at all."""
    content = bytearray(whole.read_bytes())
    content[at] = 24
    (tmp_path / "checkpoints.db").write_bytes(content)
    opens_again(tmp_path)


@fuzz(60)
@given(data=st.data())
def test_any_bytes_in_the_file(whole: Path, data: st.DataObject) -> None:
    """Bytes flipped, a piece overwritten, a cut, or nothing of ours at all."""
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=600))
        content[at : at + len(piece)] = piece
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    if data.draw(st.integers(0, 9)) == 0:
        content = bytearray(data.draw(st.binary(max_size=5000)))
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "checkpoints.db").write_bytes(content)
        opens_again(Path(path))


@fuzz(100)
@given(
    column=st.sampled_from(
        [
            ("meta", "value"),
            ("jobs", "name"),
            ("jobs", "facts"),
            ("jobs", "cursor"),
            ("jobs", "updated_s"),
            ("seconds", "lines"),
            ("seconds", "uid_sum"),
            ("seconds", "second"),
            ("spans", "resource"),
            ("spans", "span"),
            ("spans", "span_id"),
            ("runs", "sum_s"),
            ("runs", "buckets"),
            ("runs", "exemplars"),
            ("runs", "pipeline"),
            ("names", "name"),
        ]
    ),
    value=st.text(max_size=10)
    | st.binary(max_size=10)
    | st.integers(-(2**63), 2**50)
    | st.floats(allow_nan=False, width=16)
    | st.sampled_from(["[]", "[1]", "{}", "null", '[["a"]]', "1" * 5000]),
)
def test_any_value_in_a_row(whole: Path, column: tuple[str, str], value: object) -> None:
    """Damage that SQLite cannot see: a value that is another one, or of another type."""
    with tempfile.TemporaryDirectory() as path:
        file = Path(path) / "checkpoints.db"
        file.write_bytes(whole.read_bytes())
        with closing(sqlite3.connect(file)) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.execute(f"UPDATE OR IGNORE {column[0]} SET {column[1]} = ?", (value,))
            db.commit()
        opens_again(Path(path))
        assert list(Path(path).glob("checkpoints.db"))
