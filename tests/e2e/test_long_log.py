"""A first read of a very long log: one reply of the service, relayed with bounded memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from tests.e2e.conftest import TAILSPAN, Machine
from tests.fakes.collector import Collector
from tests.fakes.job_api import FakeJobApi

LINES = 200_000
MAX_RSS_MIB = 130  # the reply alone is 27 MB, and as Python objects three times that


def reply(since_ms: int | None) -> Iterator[bytes]:
    """The whole log as one JSON array, in chunks, as a server streams it."""
    for start in range(0, LINES, 1000):
        lines = (
            b'{"message":"record %d of the night, processed without anything to say about it, except that it was long",'
            b'"timestamp":%d}' % (number, 1_700_000_000_000 + number // 4)
            for number in range(start, start + 1000)
        )
        yield (b"," if start else b"[") + b",".join(lines)
    yield b"]"


def test_a_long_log_is_relayed_with_bounded_memory(machine: Machine, collector: Collector) -> None:
    """Each line arrives once; the agent's memory does not grow with the log."""
    with FakeJobApi() as api:
        job = api.add_job("long", name="long", job_status="Done")
        job.body = reply
        machine.configure(
            f'[services.api]\ntype = "fused"\nbase_url = "{api.base_url}"\n'
            '[[agent.watch]]\nservice = "api"\njobs = ["long"]\n'
            f'[otlp]\nendpoint = "{collector.http_url}"\nsignals = ["logs"]\n'
        )
        process = subprocess.Popen([TAILSPAN, "agent", "run", "--once"], env=machine.env, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    uids = [row.attributes["log.record.uid"] for row in collector.log_records() if not row.event_name]
    assert len(uids) == len(set(uids)) == LINES
    assert usage.ru_maxrss / 1024 < MAX_RSS_MIB
