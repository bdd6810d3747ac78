"""Jobs of a real Ray, relayed by a real agent: equal to the log files of the head node at the end.

Ray listens on many ports of all interfaces, so it runs where these are none but loopback: as root, by ``unshare -n``.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tailspan import Client, load_settings
from tailspan.models import JobState
from tests.fakes.collector import Collector
from tests.orchestrators.harness import Orchestrator, Relay, results

pytestmark = [pytest.mark.services, pytest.mark.timeout(1500)]

CLONE_NEWNET = 0x40000000  # os.unshare needs Python 3.12
TOKEN = "a-token-of-thirty-two-characters-"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
URL = "http://127.0.0.1:8265"
TICKS = """
import sys, time
print('start', flush=True); print('to stderr', file=sys.stderr, flush=True)
for i in range({count}): print('tick', i, flush=True); time.sleep({pause})
print('gr\\u00f6\\u00dfe\\n\\nno newline', end='', flush=True)
"""
TASKS = (
    "import ray; ray.init(); f = ray.remote(lambda n: print('in task', n)); ray.get([f.remote(n) for n in range(3)])"
)
RESULTS = {"SUCCEEDED": "success", "FAILED": "failure", "STOPPED": "cancellation"}


class Ray(Orchestrator):
    """A real head node, with token authentication, in a network of its own."""

    def __init__(self, directory: Path, outer_network: str) -> None:
        self._outer_network = outer_network
        # Its sockets are in the temporary directory, and their paths have little room.
        self.temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        super().__init__("ray", directory, env)
        self.api = httpx.Client(base_url=URL, timeout=60, headers={"Authorization": f"Bearer {TOKEN}"})

    def __exit__(self, *error: Any) -> None:
        self.api.close()
        subprocess.run(["ray", "stop", "--force"], env=self.env, check=False, capture_output=True)
        super().__exit__(*error)
        self._end_all()
        shutil.rmtree(self.temp, ignore_errors=True)

    def _end_all(self) -> None:
        """End what jobs left behind: Ray can leave a child of a stopped job running. Only they are in this network."""
        network = os.readlink("/proc/thread-self/ns/net")
        assert network != self._outer_network
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "net") == network and int(process.name) != os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)

    def run(self) -> None:
        """Start the head node, and wait until it answers."""
        options = {
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": "8265",
            "num-cpus": "2",
            "object-store-memory": "100000000",
            "temp-dir": str(self.temp),
        }
        self.start("ray", "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items()))
        self.wait_until(lambda: self.api.get("/api/jobs/").is_success, "the head node")

    def submit(self, job_id: str, entrypoint: str, **more: Any) -> None:
        """Submit a job; a head node that has just started refuses it for some seconds."""
        body = {"entrypoint": entrypoint, "submission_id": job_id, **more}
        self.wait_until(lambda: self.api.post("/api/jobs/", json=body).is_success, f"the submission of {job_id}", 120)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the submitted jobs by id."""
        rows = self.api.get("/api/jobs/").raise_for_status().json()
        return {row["submission_id"]: row for row in rows if row["type"] == "SUBMISSION"}

    def lines(self) -> Counter[str]:
        """Return the lines of all log files, without colours."""
        found: Counter[str] = Counter()
        for job_id in self.jobs():
            text = (self.temp / "session_latest" / "logs" / f"job-driver-{job_id}.log").read_text()
            found.update(COLOUR.sub("", text).removesuffix("\n").split("\n"))
        return found


@contextmanager
def isolated() -> Iterator[str]:
    """Move this thread, and what it starts, to a network of its own; skip the test where that is not possible.

    Yields:
        The network of all others.
    """
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("Ray listens on all interfaces: this test needs root, Linux and iproute2 for a network of its own")
    outer = os.readlink("/proc/thread-self/ns/net")
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network of its own for this test: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield outer
        finally:
            assert libc.setns(own, CLONE_NEWNET) == 0
    finally:
        os.close(own)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    """A head node for all tests of this module."""
    with isolated() as outer, Ray(tmp_path_factory.mktemp("ray"), outer) as server:
        server.run()
        yield server


@pytest.mark.parametrize("way", ["file", "socket"])
def test_jobs_arrive_whole_through_stops_of_the_agent(ray: Ray, tmp_path: Path, way: str) -> None:
    """Jobs that succeed, fail, start tasks and are stopped, read from files and through the API: no line is missing.

    Meanwhile the agent is killed and stopped.
    """
    program = ray.directory / f"ticks-{way}.py"
    program.write_text(TICKS.format(count=120, pause=0.2))
    quick = ray.directory / f"quick-{way}.py"
    quick.write_text(TICKS.format(count=3000, pause=0))
    before = ray.lines()
    ray.submit(f"nightly-{way}", f"python {program}", metadata={"job_name": "nightly", "team": "geo"})
    ray.submit(f"quick-{way}", f"python {quick}")
    ray.submit(f"fails-{way}", "echo hi; exit 3")
    ray.submit(f"tasks-{way}", f'python -c "{TASKS}"')
    ray.submit(f"stopped-{way}", "sleep 1000", runtime_env={"env_vars": {"SECRET": "secret-value-1"}})
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    section = f'base_url = "{URL}"\ntoken_file = "{token_file}"\n'
    section += f'temp_dir = "{ray.temp if way == "file" else tmp_path}"\n'
    mine = [f"{name}-{way}" for name in ("nightly", "quick", "fails", "tasks", "stopped")]
    with Collector() as collector, Relay("ray", section, collector, tmp_path) as relay:
        config = relay.config.read_text()
        relay.config.write_text(config.replace("discover = true", f"jobs = {mine}".replace("'", '"')))
        relay.interrupt(signal.SIGKILL)
        relay.interrupt(signal.SIGTERM)
        with Client(load_settings(relay.config)) as client:
            assert client.cancel(f"stopped-{way}", service="ray").job_id == f"stopped-{way}"
        ray.wait_until(lambda: all(ray.jobs()[one]["status"] in RESULTS for one in mine), "the end of the jobs", 300)
        relay.finish()
        expected = ray.lines() - before

        def found() -> Counter[str]:
            rows = {row.attributes["log.record.uid"]: row for row in collector.log_records() if not row.event_name}
            return Counter(row.body for row in rows.values())

        deadline = time.monotonic() + 60
        while found() != expected and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (expected - found(), found() - expected) == (Counter(), Counter())
        spans = relay.spans(runs=len(mine), attempts=0)
        assert not any("secret-value-1" in str(record) for record in collector.log_records())
    jobs = ray.jobs()
    assert results(spans) == {one: RESULTS[jobs[one]["status"]] for one in mine}
    shown = {span.name for span in spans.values() if span.name.startswith("RUN ")}
    assert shown == {"RUN nightly", f"RUN quick-{way}", "RUN echo", "RUN python", "RUN sleep"}
    for span in spans.values():
        if span.name.startswith("RUN "):
            job = jobs[span.attributes["cicd.pipeline.run.id"]]
            assert abs(span.start_unix_nano / 1e6 - job["start_time"]) < 2
            assert abs(span.end_unix_nano / 1e6 - job["end_time"]) < 10_000


def test_submit_and_cancel(ray: Ray, tmp_path: Path) -> None:
    """A job that is submitted through Tailspan has its name and ends when it is canceled."""
    config = tmp_path / "config.toml"
    config.write_text(f'[services.ray]\nbase_url = "{URL}"\ntoken = "{TOKEN}"\n')
    with Client(load_settings(config)) as client:
        job = client.submit(["sleep", "1000"], name="sleeper", attributes={"a": "b"}, service="ray")
        assert job.job_name == "sleeper"
        ray.wait_until(lambda: client.get_status(job).state is JobState.RUNNING, "its start", 120)
        client.cancel(job)
        ray.wait_until(lambda: client.get_status(job).state is JobState.CANCELED, "its end", 120)
