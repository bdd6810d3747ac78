"""Live updates to clients that are slow, many or gone, and of jobs whose service is: none of them holds up another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator

import pytest

from tailspan_agent.agent import Agent
from tailspan_agent.web import event_stream as live
from tailspan_agent.web import server as status_server
from tailspan_agent.web.event_stream import EventStreams
from tests.fakes.agents import looped, until
from tests.integration.agent.web.test_page import looking


class Unread:
    """A client that asks for a stream of much text and never reads a byte of it."""

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
        """Make a large event whenever the last one was sent."""
        try:
            while True:
                self.made += 1
                yield live.format_event("jobs", {"text": "x" * 4_000_000})
                await asyncio.sleep(0)
        finally:
            self.is_closed = True

    async def stalls(self) -> None:
        """Wait until no more is sent to it."""
        await until(lambda: self.made)
        made = 0
        while made != self.made:
            made = self.made
            await asyncio.sleep(0.05)


@looped
async def test_who_never_reads_is_dropped(bench, monkeypatch, caplog):
    """Its place and what was made for it are given back after a while, without a word in the log."""
    monkeypatch.setattr(status_server, "_READ_TIMEOUT_S", 0.2)
    async with looking(bench) as (agent, _):
        client = Unread(agent, monkeypatch)
        with client.socket:
            await until(lambda: client.is_closed)
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []


@looped
async def test_an_agent_stops_although_a_client_never_reads(bench, monkeypatch, caplog):
    """Neither in its time nor when that is over does a client that never reads keep the agent from its end."""
    monkeypatch.setattr(live, "_STREAM_S", 0.2)
    async with looking(bench) as (agent, _):
        client = Unread(agent, monkeypatch)
        await client.stalls()
        await asyncio.sleep(0.3)  # the time of the stream is over
    client.socket.close()
    assert client.is_closed
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []
