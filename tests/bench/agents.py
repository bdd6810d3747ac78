"""Agents of the benchmarks: their configuration, one pass with ``--once``, and agents that run on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import Usage, cpu_of, peak_rss, run, started, tailspan

__all__ = ["Plan", "relay_once", "running"]

SECRET = {"BENCH_SECRET": "a-secret-that-no-line-has"}
_TIMEOUT_S = "600"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an agent relays where; all else is as it is by default, with redaction by value.

    Attributes:
        directory: Its own directory.
        store: State directory of the local jobs; None: jobs come over HTTP.
        base_url: The job API, where there is no store.
        endpoint: OTLP endpoint.
        protocol: ``http/protobuf`` or ``grpc``.
        compression: ``none``, ``gzip`` or ``zstd``.
        requests_per_second: The limit towards the job API.
        in_python: Whether lines are framed in Python, as where nothing could be compiled.
    """

    directory: Path
    endpoint: str
    store: Path | None = None
    base_url: str = ""
    protocol: str = "http/protobuf"
    compression: str = "none"
    requests_per_second: float = 20
    in_python: bool = False

    @property
    def environ(self) -> dict[str, str]:
        """What its process has in its environment."""
        if not self.in_python:
            return SECRET
        return {**SECRET, "PYTHONPATH": os.pathsep.join(filter(None, (self._hiding, os.environ.get("PYTHONPATH"))))}

    @property
    def _hiding(self) -> str:
        """A directory whose only module hides the compiled part."""
        return str(self.directory / "hiding")

    @property
    def state_dir(self) -> Path:
        """The agent's state directory."""
        return self.directory / "agent"

    def write(self) -> Path:
        """Write the configuration; return its path."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.store is not None:
            service, lines = "local", [f"state_dir = {json.dumps(str(self.store))}"]
        else:
            service = "fused"
            lines = [f'base_url = "{self.base_url}"', f"requests_per_second = {self.requests_per_second}"]
        if self.in_python:
            module = Path(self._hiding, "sitecustomize.py")
            module.parent.mkdir(exist_ok=True)
            hidden = "sys.modules['tailspan._compiled'] = None"
            module.write_text(f"import sys\n{hidden}\n")
        path = self.directory / "config.toml"
        path.write_text(
            f"[services.{service}]\n" + "\n".join(lines) + f"\n[agent]\nstate_dir = {json.dumps(str(self.state_dir))}\n"
            f'listen = "127.0.0.1:0"\n[[agent.watch]]\nservice = "{service}"\ndiscover = true\n'
            f'[otlp]\nendpoint = "{self.endpoint}"\nprotocol = "{self.protocol}"\ncompression = "{self.compression}"\n'
            f"[redact]\nenv = {json.dumps(list(SECRET))}\n"
        )
        return path


def relay_once(plan: Plan) -> Usage:
    """Relay all jobs with a new agent and ``--once``."""
    shutil.rmtree(plan.state_dir, ignore_errors=True)
    config = str(plan.write())
    return run(tailspan("agent", "run", "--config", config, "--once", "--timeout", _TIMEOUT_S), env=plan.environ)


class RunningAgent:
    """An agent that runs on.

    Attributes:
        pid: Its process.
        ready_s: How long it took from its start until it said that it is ready.
    """

    def __init__(self, pid: int, ready_s: float) -> None:
        self.pid = pid
        self.ready_s = ready_s

    def watch(self, seconds: float) -> Usage:
        """Let it work for a while; return what it used up in that while, and its peak of memory."""
        before, begun = cpu_of(self.pid), time.perf_counter()
        time.sleep(seconds)
        return Usage(cpu_of(self.pid) - before, time.perf_counter() - begun, peak_rss(self.pid))


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[RunningAgent]:
    """Run an agent while the block runs; begins when it says that it is ready, as to systemd."""
    config = str(plan.write())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        address = str(plan.directory / "notify")
        Path(address).unlink(missing_ok=True)
        ready.bind(address)
        ready.settimeout(120)
        begun = time.perf_counter()
        command = tailspan("agent", "run", "--config", config)
        with started(command, log=plan.directory / "agent.log", env={**SECRET, "NOTIFY_SOCKET": address}) as (pid, _):
            while b"READY=1" not in ready.recv(4096):
                pass
            yield RunningAgent(pid, time.perf_counter() - begun)
