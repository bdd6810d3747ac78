"""`tailspan demo` where something is in its way; what it shows is tested in `tests/e2e/test_demo.py`."""

from __future__ import annotations

import socket

from tailspan.config import load_settings
from tailspan_agent.commands import demo
from tests.fakes.agents import looped


@looped
async def test_a_port_that_another_demo_was_faster_to_take_is_not_needed(tmp_path):
    """Both found it free at the same moment: the second one shows its page on another, and its file says so."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        host, port = other.getsockname()
        settings = load_settings(demo._write_config(tmp_path, f"{host}:{port}"))
        agent, running = await demo._start_agent(settings, tmp_path)
        assert agent.server is not None
        assert agent.server.address != (host, port)
        agent.stop()
        await running
    assert load_settings(tmp_path / "config.toml").agent.listen == "127.0.0.1:0"
