"""Live updates to slow, numerous or vanished clients: none of them delays another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator

import pytest

from tailspan.http import server_limits
from tailspan_agent.agent import Agent
from tailspan_agent.web import event_stream
from tailspan_agent.web.event_stream import EventStreams
from tests.fakes.agents import looped, until
from tests.integration.agent.web.test_page import browsing


class SilentClient:
    """A client that requests a stream of much text and never reads a byte of it."""

    def __init__(self, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
        assert agent.server is not None
        respond = EventStreams.respond
        monkeypatch.setattr(EventStreams, "respond", lambda streams, _, headers: respond(streams, self.events, headers))
        self.made = 0
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(agent.server.address)
        self.socket.sendall(b"GET /events/jobs HTTP/1.1\r\nhost: localhost\r\n\r\n")
        self.is_closed = False

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield a large event as soon as the last one was sent."""
        try:
            while True:
                self.made += 1
                yield event_stream.format_event("jobs", {"text": "x" * 4_000_000})
                await asyncio.sleep(0)
        finally:
            self.is_closed = True

    async def until_stalled(self) -> None:
        """Wait until nothing more can be sent to it."""
        await until(lambda: self.made)
        made = 0
        while made != self.made:
            made = self.made
            await asyncio.sleep(0.05)


@looped
async def test_a_client_that_never_reads_is_dropped(bench, monkeypatch, caplog):
    """Its place and its buffers are released after the read timeout, without a line in the log."""
    monkeypatch.setattr(server_limits, "UNREAD_S", 0.2)
    async with browsing(bench) as (agent, _):
        client = SilentClient(agent, monkeypatch)
        with client.socket:
            await until(lambda: client.is_closed)
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []


@looped
async def test_an_agent_stops_although_a_client_never_reads(bench, monkeypatch, caplog):
    """A client that never reads does not delay the agent's end, neither during its stream nor after it."""
    monkeypatch.setattr(event_stream, "_STREAM_S", 0.2)
    async with browsing(bench) as (agent, _):
        client = SilentClient(agent, monkeypatch)
        await client.until_stalled()
        await asyncio.sleep(0.3)  # until the stream's time is up
    client.socket.close()
    assert client.is_closed
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []
