"""Local job files of any content: a status, a list and lines, or an error of ours; never a crash, never a hang."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.errors import CursorExpiredError, TailspanError
from tailspan.local.index import HEADER, Entry, pack_entry
from tailspan.logs.page import MAX_PAGE_LINES
from tailspan.models import JobStatus
from tailspan.services.local import LocalService
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import failure_record, resource_attributes, spans_of
from tailspan_agent.records.encode import LogContext, encode_lines
from tests.property.effort import fuzz

JOB = "20260101-000000000-aaaaaa"
GOOD = "20260101-000000000-bbbbbb"
KEYS = (
    "state",
    "name",
    "started_at",
    "finished_at",
    "exit_code",
    "error",
    "supervisor_pid",
    "lines",
    "end",
    "command",
    "cwd",
    "host",
    "user",
    "attributes",
    "submitted_at",
    "identity",
    "trace_id",
    "parent",
    "version",
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["RUNNING", "FAILED", "2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "\udcff", "0" * 32])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FILES = st.one_of(
    st.none(),
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from(KEYS), VALUES).map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
)
NUMBERS = st.integers(0, 40) | st.sampled_from([2**16, 2**31, 2**63 - 1])
ENTRIES = st.builds(
    Entry, NUMBERS, NUMBERS | st.sampled_from([-1, -(2**63)]), NUMBERS, st.integers(0, 255), st.integers(0, 255)
)
INDEXES = st.one_of(
    st.none(),
    st.binary(max_size=200),
    st.lists(ENTRIES | st.binary(min_size=32, max_size=32), max_size=6).map(
        lambda items: HEADER + b"".join(pack_entry(item) if isinstance(item, Entry) else item for item in items)
    ),
)


@contextmanager
def service() -> Iterator[LocalService]:
    with tempfile.TemporaryDirectory() as path:
        yield LocalService(state_dir=Path(path))


def put(local: LocalService, job_id: str, **files: bytes | None) -> Path:
    directory = local.state_dir / "jobs" / job_id
    directory.mkdir(parents=True)
    for name, content in files.items():
        if content is not None:
            (directory / name.replace("_", ".")).write_bytes(content)
    return directory


def look(local: LocalService, job_id: str) -> JobStatus | None:
    """Do with a job what command line and agent do, and return its status."""

    async def read() -> None:
        cursor: bytes | None = None
        for _ in range(200):
            try:
                async for page in local.read_logs(job_id, cursor):
                    assert 0 < len(page.lines) == sum(run.lines for run in page.runs) <= MAX_PAGE_LINES + 4096
                    encode_lines(page, context=context)
                    cursor = page.cursor
                return
            except CursorExpiredError as error:
                if error.resume_cursor is None or error.resume_cursor == cursor:
                    return
                cursor = error.resume_cursor
        raise AssertionError("reading goes in circles")

    async def ids() -> list[str]:
        return [row.job_id async for rows in local.list_jobs() for row in rows]

    assert job_id in anyio.run(ids)
    try:
        job = local.status(job_id)
        context = LogContext.for_job(job)
        anyio.run(local.log_times_ms, job_id)
        anyio.run(read)
    except TailspanError:
        return None
    ledger = JobLedger(first_seen_ns=1, logs_complete=True)
    spans_of(job, ledger)
    failure_record(job, ledger)
    resource_attributes(job, service_name="local", watch_attributes={}, otlp_resource={}, stream=0)
    return job


@fuzz(150)
@given(job=FILES, state=FILES, log=st.none() | st.binary(max_size=60), idx=INDEXES, lock=st.none() | st.just(b""))
@example(job=b"[" * 100_000, state=b"[" * 100_000, log=b"a\n", idx=HEADER, lock=b"")
@example(job=b"{}", state=b'{"state": "NONSENSE", "end": 1}', log=None, idx=None, lock=None)
@example(job=None, state=b"{}", log=b"x\n", idx=HEADER + pack_entry(Entry(2**62, 0, 2**62, 1, 0)), lock=None)
@example(
    job=None,
    state=b"{}",
    log=b"x\n" * 9,
    idx=HEADER + pack_entry(Entry(9, 0, 1, 1, 0)) + pack_entry(Entry(2, 0, 0, 1, 0)),
    lock=None,
)
def test_any_content(job, state, log, idx, lock) -> None:
    """Whatever stands in the files, they are read or refused, and other jobs are still listed."""
    with service() as local:
        put(local, JOB, job_json=job, state_json=state, log=log, log_idx=idx, lock=lock)
        put(local, GOOD, job_json=b'{"name": "good"}', state_json=b'{"state": "SUCCEEDED", "end": "x", "lines": 0}')
        look(local, JOB)
        good = look(local, GOOD)
        assert good is not None
        assert good.job_name == "good"


@pytest.mark.parametrize("name", ["job.json", "state.json", "log", "log.idx", "lock"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "loop"])
def test_what_is_no_file_is_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    """A link in a job's directory would lead a reader with more rights elsewhere, and a FIFO would hold it for ever."""
    local = LocalService(state_dir=tmp_path / "state")
    secret = tmp_path / "secret"
    secret.write_text('{"name": "hunter2", "error": "hunter2", "state": "FAILED"}\n')
    directory = put(local, JOB, job_json=b'{"name": "x"}', state_json=b"{}", log=b"", log_idx=HEADER, lock=b"")
    path = directory / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(secret if kind == "link" else path)
    assert "hunter2" not in repr(look(local, JOB))

    async def lines() -> list[bytes]:
        return [line async for page in local.read_logs(JOB) for line in page.lines]

    assert anyio.run(lines) == []


def test_a_job_that_is_a_link_is_none(tmp_path: Path) -> None:
    """A directory elsewhere does not become a job by a link to it."""
    local = LocalService(state_dir=tmp_path / "state")
    put(local, GOOD, job_json=b'{"name": "good"}')
    elsewhere = LocalService(state_dir=tmp_path / "elsewhere")
    target = put(elsewhere, JOB, job_json=b'{"name": "hunter2"}', log=b"hunter2\n", log_idx=HEADER)
    (local.state_dir / "jobs" / JOB).symlink_to(target)

    async def ids() -> list[str]:
        return [row.job_id async for rows in local.list_jobs() for row in rows]

    assert anyio.run(ids) == [GOOD]
    with pytest.raises(TailspanError, match="is a link"):
        local.status(JOB)
