"""A first read of a very long log: one reply of the service, relayed with bounded memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector
from tests.fakes.job_api import FakeJobApi
from tests.prove.world import lines_in

LINES = 120_000
MAX_RSS_MIB = 100  # the reply alone is 16 MB, and as Python objects three times that, beside an agent of 60


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


def peak_rss_kib(pid: int) -> int:
    """The peak memory of a process; 0 if the system does not report it (macOS) or the process has ended.

    Not the value of `wait4`, which includes the test's own memory, from which the process was forked.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


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
        process = machine.start("agent", "run", "--once")
        peak_kib = 0
        while process.poll() is None:
            peak_kib = max(peak_kib, peak_rss_kib(process.pid))
            time.sleep(0.02)
    assert process.returncode == 0
    found = [line for request in collector.requests if request.signal == "logs" for line in lines_in(request.message)]
    assert len(found) == len({uid for *_, uid in found}) == LINES
    assert peak_kib / 1024 < MAX_RSS_MIB
    assert peak_kib or not Path("/proc/self/status").exists()
