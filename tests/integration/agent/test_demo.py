"""`tailspan demo` under adverse conditions; `tests/e2e/test_demo.py` tests its output."""

from __future__ import annotations

import socket

import pytest

from tailspan.config import load_settings
from tailspan_agent.agent import Agent
from tailspan_agent.commands import demo
from tests.fakes.agents import looped


@looped
async def test_two_demos_at_once_use_different_ports(tmp_path):
    """Both found the port free at the same moment: the second one takes another, also in its file."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        host, port = other.getsockname()
        settings = load_settings(demo._write_config(tmp_path, f"{host}:{port}"))
        agent, running = await demo._start_agent(settings, tmp_path)
        assert agent.server is not None
        assert agent.server.address != (host, port)
        agent.stop()
        await running
    assert load_settings(tmp_path / "config.toml").agent.listen == "127.0.0.1:0"


@looped
async def test_the_error_that_ended_the_agent_is_that_of_the_demo(tmp_path, monkeypatch):
    """Before it submits a job that no agent would relay."""

    def fail(_: Agent) -> None:
        raise OSError("no page")

    monkeypatch.setattr(Agent, "_make_server", fail)
    settings = load_settings(demo._write_config(tmp_path, "127.0.0.1:0"))
    with pytest.raises(OSError, match="no page"):
        await demo._start_agent(settings, tmp_path)
