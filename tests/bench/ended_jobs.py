"""W15: an agent that lists ten thousand ended jobs again and again, and follows one silent job among them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.measure import cpu_of, peak_rss, started, tailspan
from tests.bench.receiver import receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row
from tests.fakes.aws import FakeAws, write_credentials
from tests.fakes.docker import FakeEngine
from tests.fakes.json_api import FakeJsonApi
from tests.fakes.ray import FakeRay

__all__ = ["ended_jobs"]

_SETTLED_S = 60.0
_WATCHED_S = 120.0


def ended_jobs(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield the rows of each service, whose double is a server on loopback."""
    count = scale.of(10_000)
    with receiving(directory) as receiver:
        for kind, make in _DOUBLES.items():
            home = directory / kind
            home.mkdir()
            with make(count) as server:
                config = home / "config.toml"
                config.write_text(
                    f"[services.{kind}]\n{server.section}\n"
                    f'[agent]\nstate_dir = {json.dumps(str(home / "agent"))}\nlisten = ""\n'
                    f'[[agent.watch]]\nservice = "{kind}"\ndiscover = true\nname = "followed"\nlookback = "87600h"\n'
                    f'[otlp]\nendpoint = "{receiver.http_url}"\n'
                )
                write_credentials(home / "credentials", "token-1")
                env = {**os.environ, "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials")}
                command = tailspan("agent", "run", "--config", str(config))
                with started(command, log=home / "agent.log", env=env) as (pid, _):
                    # Until the whole list was read once, and the followed job has become silent.
                    time.sleep(_SETTLED_S * max(scale.factor, 0.5))
                    begun_s, before_s, requests = time.perf_counter(), cpu_of(pid), len(server.requests)
                    time.sleep(_WATCHED_S * min(scale.factor, 1.0))
                    elapsed_s = time.perf_counter() - begun_s
                    share = (cpu_of(pid) - before_s) / elapsed_s * 100
                    rate, memory = (len(server.requests) - requests) / elapsed_s * 60, peak_rss(pid)
            yield Row(case=f"W15 {kind}", figure=share, unit="% of a core", goal=Goal(10))
            yield Row(case=f"W15 {kind}, memory", figure=memory / MIB, unit="MiB")
            yield Row(case=f"W15 {kind}, requests", figure=rate, unit="requests/min")


def _aws_batch(count: int) -> FakeAws:
    server = FakeAws()
    for number in range(count):
        job_id = server.add_job(name=f"job-{number % 20}", at_ms=server.start_ms - number * 1_000)
        server.end(job_id, at_ms=server.start_ms - number * 1_000 + 500)
    server.add_job(name="followed")
    return server


def _ray(count: int) -> FakeRay:
    server = FakeRay()
    message = "Job entrypoint command failed with exit code 1, last available logs:\n" + "line of the log\n" * 60
    for number in range(count):
        more = {
            "start_time": server.start_ms - number * 1_000,
            "message": message if number % 10 == 0 else "Job ended.",
        }
        server.add_job(f"job-{number}", "FAILED", end_time=server.start_ms - number * 1_000 + 500, **more)
    server.add_job("followed", metadata={"job_name": "followed"})
    return server


def _docker(count: int) -> FakeEngine:
    server = FakeEngine()
    for number in range(count):
        # About as much as Docker says of a container.
        labels = {f"org.label.of.the.image.{place}": "a value of some length" * 2 for place in range(8)}
        server.run(f"job-{number}", labels=labels, status="exited", exit_code=number % 2)
    server.run("followed")
    return server


_DOUBLES: dict[str, Callable[[int], FakeJsonApi | FakeEngine]] = {
    "aws_batch": _aws_batch,
    "docker": _docker,
    "ray": _ray,
}
