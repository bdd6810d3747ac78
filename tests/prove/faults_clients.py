"""Faults of clients of the agent's server: what they do to it must delay neither probes nor the relay."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from tests.prove.configuration import speak
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Settings, World

MAX_HEALTH_S = 1.0
MAX_LOG_BYTES = 4096
_TIMEOUT_S = 20.0
_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True)
class Flood:
    """A row.

    Attributes:
        name: The row's name.
        connections: How many connections are opened, as fast as possible, five times.
        sends: What each sends before it waits.
    """

    name: str
    connections: int
    sends: bytes

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run, alone=True)

    def _run(self, seed: str) -> Row:
        waits_s: list[float] = []
        with World(seed, Settings(page=True)) as world:
            world.fused_job("fused-0")
            world.local_job("local-0", burst=20, pause_s=0.01)
            world.configure()
            world.start(strict=True)
            world.until(lambda: all(world.acked(job) for job in world.jobs), "the first lines")
            before = len(world.log)
            with _probing(world.page_url, waits_s):
                for _ in range(5):
                    speak(world)
                    self._flood(world)
            logged = world.log[before:]
            row = Row(self.name, [world.finish()])
        row.notes.append(f"{len(waits_s)} probes of /healthz, the slowest {max(waits_s, default=0):.2f} s")
        if not waits_s or max(waits_s) > MAX_HEALTH_S:
            row.problems.append(f"/healthz took {max(waits_s, default=_TIMEOUT_S):.2f} s")
        if len(logged) > MAX_LOG_BYTES or "Traceback" in logged or "traceback" in logged:
            row.problems.append(f"{len(logged)} bytes were logged, such as {logged[:100]!r}")
        return row

    def _flood(self, world: World) -> None:
        address = "127.0.0.1", int(world.page_url.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            for _ in range(self.connections):
                with contextlib.suppress(OSError):
                    client = stack.enter_context(socket.create_connection(address, _TIMEOUT_S))
                    client.sendall(self.sends)
            time.sleep(1.0)


@contextlib.contextmanager
def _probing(url: str, waits_s: list[float]) -> Iterator[None]:
    """Request the health four times a second, and note how long each answer took."""
    stop = threading.Event()

    def probe() -> None:
        while not stop.wait(0.25):
            started_s = time.monotonic()
            try:
                with urllib.request.urlopen(f"{url}/healthz", timeout=_TIMEOUT_S):
                    waits_s.append(time.monotonic() - started_s)
            except OSError:
                waits_s.append(_TIMEOUT_S)

    probing = threading.Thread(target=probe)
    probing.start()
    try:
        yield
    finally:
        stop.set()
        probing.join()


FAULTS = (
    Flood("clients: 1,200 idle connections, five times", 1200, b""),
    Flood("clients: 505 kept-alive connections without a token", 505, _HEALTH + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    Flood("clients: half a request from 600 connections", 600, b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-"),
    Flood("clients: 100 that send requests and read no answer", 100, _HEALTH * 2000),
)
