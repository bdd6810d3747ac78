"""A real agent, real local jobs and a fake remote service, with every kind of failure that the agent counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from tests.fakes.collector import Collector, Reply
from tests.fakes.job_api import FakeJobApi, status_fault
from tests.ports import free_port

TAILSPAN = str(Path(sys.executable).with_name("tailspan"))
BROKEN = "import logging; logging.warning('careful'); {}['amount']"


class Fleet:
    """An agent, its jobs and its endpoint; all of it ends with the block.

    Attributes:
        collector: The endpoint.
        api: The remote job service ``remote``.
        address: Where the agent serves /metrics.
        env: The environment of its commands.
    """

    def __init__(self, home: Path, expected: str = "nightly") -> None:
        """Write the configuration; the pipeline ``expected`` must start every second, ``etl`` every hour."""
        self._expect = ("etl", "1h") if expected == "etl" else (expected, "1s")
        self.collector = Collector()
        self.api = FakeJobApi()
        self._home = home
        self.address = f"127.0.0.1:{free_port()}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = (
            os.environ
            | {"PATH": path}
            | {"TAILSPAN_CONFIG": str(home / "config.toml"), "OTEL_METRIC_EXPORT_INTERVAL": "500"}
        )
        self._agent: subprocess.Popen[bytes] | None = None
        self._detached: list[str] = []

    def __enter__(self) -> Self:
        self.collector.start()
        self.api.__enter__()
        (self._home / "config.toml").write_text(
            f"""
            [services.local]
            state_dir = "{self._home}/jobs"
            [services.remote]
            type = "fused"
            base_url = "{self.api.base_url}"
            [agent]
            state_dir = "{self._home}/agent"
            listen = "{self.address}"
            run_id_on_metrics = true
            [[agent.watch]]
            service = "local"
            discover = true
            name = "noisy"
            min_severity = "WARN"
            settle = 0
            [[agent.watch]]
            service = "local"
            discover = true
            settle = 0
            [[agent.watch]]
            service = "remote"
            discover = true
            [[agent.expect]]
            name = "{self._expect[0]}"
            every = "{self._expect[1]}"
            grace = 0
            [otlp]
            endpoint = "{self.collector.http_url}"
            """
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop_agent()
        for job_id in self._detached:
            subprocess.run([TAILSPAN, "cancel", job_id], env=self.env, capture_output=True, timeout=60)
        self.api.__exit__()
        self.collector.stop()

    def start_agent(self) -> None:
        """Start the agent and wait until it serves."""
        self._agent = subprocess.Popen([TAILSPAN, "agent", "run"], env=self.env, stderr=subprocess.DEVNULL)
        self.wait_for(lambda: bool(self.metrics()))

    def stop_agent(self) -> None:
        """Stop it without a drain: the endpoint may accept nothing."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
            self._agent = None

    def run(self, name: str, *command: str) -> None:
        """Run a job to its end, however it ends."""
        subprocess.run([TAILSPAN, "run", "--name", name, "--", *command], env=self.env, capture_output=True, timeout=60)

    def detach(self, name: str, *command: str) -> str:
        """Start a job that runs on, and return its id."""
        arguments = [TAILSPAN, "run", "--detach", "--name", name, "--", *command]
        done = subprocess.run(arguments, env=self.env, capture_output=True, text=True, timeout=60, check=True)
        self._detached.append(done.stdout.strip())
        return self._detached[-1]

    def states(self) -> dict[str, str]:
        """Return the state of the newest job of each name."""
        done = subprocess.run([TAILSPAN, "jobs", "--json"], env=self.env, capture_output=True, timeout=60, check=True)
        return {row["job_name"]: row["state"] for row in reversed(json.loads(done.stdout))}

    def _texts(self) -> set[str]:
        """Return the texts of the received log records, each up to the first colon."""
        return {str(record.body).partition(":")[0] for record in self.collector.log_records()}

    def metrics(self) -> str:
        """Return the text of a scrape; empty while the agent does not serve."""
        request = urllib.request.Request(f"http://{self.address}/metrics")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                text: str = answer.read().decode()
        except OSError:
            return ""
        return text

    def trouble(self) -> None:
        """Cause failures, dropped lines, rejected records, failed requests and anomalies."""
        now = datetime.now(UTC)
        remote = self.api.add_job(
            "r-1", name="remote", total_tasks=10, finished_tasks=4, last_heartbeat=now.isoformat()
        )
        remote.line("a line of long ago", int(now.timestamp() * 1000) - 1_000_000)
        submitted = (now - timedelta(minutes=20)).isoformat()
        self.api.add_job("r-2", name="queued", job_status="Pending", submitted_at=submitted)
        self.wait_for(lambda: "tailspan_job_progress_ratio" in self.metrics())
        self.wait_for(lambda: 'tailspan_pipeline_missing{cicd_pipeline_name="nightly"} 1' in self.metrics())
        # the scripted replies must not meet these two records
        self.wait_for(lambda: {"a line of long ago", "nightly"} <= self._texts())
        # a rejection of part of a batch, which is never sent again: after a 400, its halves would be accepted
        self.collector.script("logs", Reply(503, retry_after_s=0.1), Reply(rejected=1, message="no"))
        self.collector.script("metrics", Reply(503))
        self.api.fault(status_fault(401), times=None)  # not retried, so it is counted at once
        self.run("noisy", sys.executable, "-c", "print('INFO nothing'); print('WARNING something')")
        self.run("broken", sys.executable, "-c", BROKEN)
        self.run("broken", sys.executable, "-c", BROKEN)
        self.wait_for(lambda: "tailspan_agent_poll_errors_total" in self.metrics())
        self.api.clear_faults()

    @staticmethod
    def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait until a condition holds."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "the condition does not hold in time"
            time.sleep(0.1)
