"""`tailspan wait --delivered`: a program can wait until the agent has acked a job's last line."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector, Reply
from tests.ports import free_port


@pytest.fixture
def address(machine: Machine, collector: Collector) -> str:
    """Where the agent listens on this machine."""
    address = f"127.0.0.1:{free_port()}"
    machine.configure(f'[otlp]\nendpoint = "{collector.http_url}"\n')
    machine.env["TAILSPAN_AGENT__LISTEN"] = address
    return address


def test_waiting_for_the_last_ack(machine: Machine, collector: Collector, address: str) -> None:
    """While the endpoint refuses, the ended job is not delivered; once it takes the lines, it is."""
    collector.always("logs", Reply(503, retry_after_s=0.2))
    machine.start("agent", "run")
    job_id = machine.detach(sys.executable, "-c", "print('last words')")
    machine.invoke("wait", job_id)
    collector.wait_until(lambda: any(request.signal == "logs" for request in collector.requests))
    early = machine.invoke("wait", job_id, "--delivered", "--timeout", "1", exit_code=124)
    assert "had not delivered" in early.stderr
    collector.always("logs", Reply())
    machine.tailspan("wait", job_id, "--delivered", "--timeout", "60")
    assert "last words" in [row.body for row in collector.log_records()]


def test_waiting_without_an_agent(machine: Machine, address: str) -> None:
    """It says that no agent answers, where, and what to do."""
    job_id = machine.detach(sys.executable, "-c", "pass")
    done = machine.invoke("wait", job_id, "--delivered", exit_code=3)
    assert address in done.stderr
    assert "tailspan agent run" in done.stderr
