"""What a poll of a followed job costs, in system calls: the same for a short and for a long log."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from tailspan.local.store import JobStore
from tailspan.services.local import LocalService
from tests.bench.holder import HeldJob

_OPENS = 4
"""The jobs' directory, the job's, the index and the log."""


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the files that are opened and the reads of them."""
    calls: Counter[str] = Counter()

    def count(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("open", "pread"):
            patched.setattr(os, name, count(name, getattr(os, name)))
        yield calls


async def read(service: LocalService, job_id: str, cursor: bytes | None) -> tuple[int, bytes | None]:
    """Return how many lines follow a cursor, and the next cursor."""
    lines = 0
    async for page in service.read_logs(job_id, cursor):
        lines, cursor = lines + page.line_count, page.cursor
    return lines, cursor


@pytest.mark.parametrize("lines", [1, 40, 2000])
def test_the_next_line_costs_the_same_in_every_log(tmp_path, monkeypatch, lines) -> None:
    """A poll that finds a line opens four files and reads six times at most: no search, and no request of the state."""
    service, job = LocalService(state_dir=tmp_path), HeldJob(JobStore(tmp_path), 0)
    for _ in range(lines):
        job.say()
    found, cursor = anyio.run(read, service, job.job_id, None)
    assert found == lines
    job.say()
    with counted(monkeypatch) as calls:
        found, cursor = anyio.run(read, service, job.job_id, cursor)
    assert found == 1
    assert calls["open"] == _OPENS
    assert calls["pread"] <= 6
    with counted(monkeypatch) as calls:
        assert anyio.run(read, service, job.job_id, cursor) == (0, cursor)
    assert calls["open"] == _OPENS
    job.end()


def test_text_without_an_entry_counts_once_the_job_has_ended(tmp_path) -> None:
    """A running job's text waits for its entry; once its supervisor is gone, its text is its last line."""
    service, job = LocalService(state_dir=tmp_path), HeldJob(JobStore(tmp_path), 0)
    job.say()
    with (tmp_path / "jobs" / job.job_id / "log").open("ab") as log:
        log.write(b"without an entry\n")
    found, cursor = anyio.run(read, service, job.job_id, None)
    assert found == 1
    job.end()
    assert anyio.run(read, service, job.job_id, cursor)[0] == 1
