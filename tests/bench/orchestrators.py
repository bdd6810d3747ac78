"""W14: CPU and requests of a thousand runs of an orchestrator with 20 tasks each, and whether limits are kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.measure import Usage, run, started, tailspan
from tests.bench.receiver import RECORD, Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import Goal, Row
from tests.fakes.airflow import FakeAirflow
from tests.fakes.dagster import FakeDagster
from tests.fakes.json_api import FakeJsonApi
from tests.fakes.prefect import FakePrefect

__all__ = ["runs_with_tasks"]

_TASKS, _LINES = 20, 2
_LINE = f"line{RECORD.decode()}"
_UNLIMITED = 10_000.0
_LIMIT = 20.0
_WATCHED_S = 20.0
_AT_THE_EDGES = 1.05  # a request or two more, where the time begins and ends


def runs_with_tasks(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield the rows of each orchestrator, whose double is a server on loopback."""
    count = scale.of(1000)
    with receiving(directory) as receiver:
        for kind, make in _DOUBLES.items():
            with make(count, ended=True) as server:
                usage = _relayed(kind, server, receiver, directory / kind, count)
                requests = len(server.requests)
            lines = count * _TASKS * _LINES
            yield Row(case=f"W14 {kind}", lines=lines, usage=usage, requests=requests)
            yield Row(case=f"W14 {kind}, CPU a run", figure=usage.cpu_s / count * 1000, unit="ms")
            yield Row(case=f"W14 {kind}, requests a run", figure=requests / count, unit="requests")
            with make(count, ended=False) as server:
                rate = _rate(kind, server, receiver, directory / f"{kind}-running")
            yield Row(
                case=f"W14 {kind}, running",
                figure=rate * 60,
                unit="requests/min",
                goal=Goal(_LIMIT * 60 * _AT_THE_EDGES),
            )


def _relayed(kind: str, server: FakeJsonApi, receiver: Receiver, directory: Path, count: int) -> Usage:
    """Relay all runs with one pass of a new agent."""
    receiver.counts()  # sets them to 0
    config = str(_config(kind, server, receiver, directory))
    # However busy the machine is: what counts is CPU.
    usage = run(tailspan("agent", "run", "--config", config, "--once", "--timeout", "3600"))
    records = receiver.counts()["records"]
    if records != count * _TASKS * _LINES:
        raise RuntimeError(f"W14 {kind}: {records} records came of {count * _TASKS * _LINES} lines")
    return usage


def _rate(kind: str, server: FakeJsonApi, receiver: Receiver, directory: Path) -> float:
    """Return the requests a second of an agent that follows running runs."""
    config = _config(kind, server, receiver, directory, requests_per_second=_LIMIT)
    with started(tailspan("agent", "run", "--config", str(config)), log=directory / "agent.log"):
        while not server.requests:
            time.sleep(0.1)
        before = len(server.requests)
        time.sleep(_WATCHED_S)
        return (len(server.requests) - before) / _WATCHED_S


def _config(
    kind: str, server: FakeJsonApi, receiver: Receiver, directory: Path, *, requests_per_second: float = _UNLIMITED
) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    path = directory / "config.toml"
    path.write_text(
        f'[services.{kind}]\ntype = "{kind}"\nbase_url = "{server.url}"\nrequests_per_second = {requests_per_second}\n'
        f'[agent]\nstate_dir = {json.dumps(str(directory / "agent"))}\nlisten = "127.0.0.1:0"\n'
        f'[[agent.watch]]\nservice = "{kind}"\ndiscover = true\nlookback = "87600h"\nsettle = 0\n'
        f'[otlp]\nendpoint = "{receiver.http_url}"\n'
    )
    return path


def _prefect(count: int, *, ended: bool) -> FakeJsonApi:
    server = FakePrefect()
    for number in range(count):
        run_id = server.add_flow_run(start_s=number)
        for task in range(_TASKS):
            states = ("RUNNING", "", number + task), ("COMPLETED", "", number + task + 0.5)
            task_id = server.add_task_run(run_id, f"task-{task}", *states)
            for line in range(_LINES):
                server.log(run_id, f"{_LINE}{line} of task {task}", number + task + line / 10, task=task_id)
        if ended:
            server.set_state(run_id, "COMPLETED", number + _TASKS)
    return server


def _airflow(count: int, *, ended: bool) -> FakeJsonApi:
    server = FakeAirflow()
    for number in range(count):
        job_id = server.add_run(run=f"manual__{number}", start=float(number))
        for index in range(_TASKS):
            task = server.add_task(job_id, f"task_{index}")
            task.start(float(number + index))
            for line in range(_LINES):
                task.log(f"{_LINE}{line} of task {index}", number + index + line / 10)
            task.end(number + index + 0.5)
        if ended:
            server.set_state(job_id, "success", float(number + _TASKS))
    return server


def _dagster(count: int, *, ended: bool) -> FakeJsonApi:
    server = FakeDagster()
    for number in range(count):
        run_id = server.add_run(plan={f"step_{index}": [] for index in range(_TASKS)}, at_s=number)
        for index in range(_TASKS):
            step = f"step_{index}"
            server.event(run_id, "STEP_START", number + index, stepKey=step)
            for line in range(_LINES):
                server.log(run_id, f"{_LINE}{line} of {step}", number + index + line / 10, step=step)
            server.event(run_id, "STEP_SUCCESS", number + index + 0.5, stepKey=step)
        if ended:
            server.end(run_id, "SUCCESS", number + _TASKS)
    return server


_DOUBLES: dict[str, Callable[..., FakeJsonApi]] = {"airflow": _airflow, "dagster": _dagster, "prefect": _prefect}
