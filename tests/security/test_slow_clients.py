"""What one client cannot do to our HTTP servers: hold them with half requests, or fill them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tailspan.http import server_limits as http_limits
from tailspan.job_api.server import create_app, listen, make_server
from tailspan_agent.web.server import StatusServer
from tests.fakes.scripted_service import ScriptedJob, ScriptedService, serving

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
PATIENCE_S = 20.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds are long in a test."""
    monkeypatch.setattr(http_limits, "REQUEST_S", 0.5)


async def with_job_api(use: Callable[[int], Awaitable[None]]) -> None:
    service = ScriptedService({"j": ScriptedJob(lines=["x" * 10_000] * 2_000, page_lines=100)})
    with listen("127.0.0.1", 0, None) as listener:
        server = make_server(create_app(service))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await use(listener.getsockname()[1])
        server.should_exit = True
        await running


async def scraped(_: str) -> tuple[Iterator[bytes], str]:
    return iter([b"x" * 100_000] * 200), "text/plain"


async def no_delivery(identity: str, job_id: str) -> dict[str, object]:
    return {}


async def with_status_page(use: Callable[[int], Awaitable[None]]) -> None:
    async with StatusServer(
        ("127.0.0.1", 0),
        metrics=scraped,
        readiness=lambda: ["endpoint_logs_paused"],
        delivery=no_delivery,
    ) as server:
        await use(server.address[1])


SERVERS = pytest.mark.parametrize("server", [with_job_api, with_status_page])
UNFINISHED = {
    "nothing": b"",
    "half a header": b"GET /healthz HTTP/1.1\r\nHost: loc",
    "a header without end": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: y\r\n",
    "a second request": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he",
    "a body that does not come": b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    "chunks without end": b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
}


@SERVERS
@pytest.mark.parametrize("start", UNFINISHED.values(), ids=UNFINISHED)
def test_an_unfinished_request_is_dropped(quick: None, server: Callable[..., Awaitable[None]], start: bytes) -> None:
    """Also a request that sends one byte at a time, which is never idle."""

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def drip() -> None:
            while True:
                writer.write(b"x" if start else b"G")
                await writer.drain()
                await asyncio.sleep(0.02)

        writer.write(start)
        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(PATIENCE_S):
            try:
                while await reader.read(4096):
                    pass
            except ConnectionError:
                pass
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.close()

    asyncio.run(server(use))


@SERVERS
def test_a_connection_that_is_used_is_kept(quick: None, server: Callable[..., Awaitable[None]]) -> None:
    """The deadline is one of a request, not of a connection: pollers keep theirs between requests."""

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(PATIENCE_S):
                header = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
            await asyncio.sleep(0.8)
        writer.close()

    asyncio.run(server(use))


def test_a_log_may_be_read_slowly(quick: None) -> None:
    """The deadline ends with the request: a reply takes as long as its reader."""
    lines = ["x" * 10_000] * 2_000
    with (
        serving(ScriptedService({"huge": ScriptedJob(lines=lines, page_lines=100)})) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as slow,
    ):
        slow.sendall(b"GET /server/v1/logs/huge HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = len(slow.recv(1000))
        time.sleep(3 * http_limits.REQUEST_S)
        while data := slow.recv(1 << 20):
            received += len(data)
    assert received > 20_000_000


@SERVERS
def test_a_header_has_a_limit(server: Callable[..., Awaitable[None]]) -> None:
    """A header of megabytes is refused while it comes, not held."""

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * (1 << 20))
        async with asyncio.timeout(PATIENCE_S):
            try:
                answer = await reader.read(4096)
            except ConnectionError:
                answer = b""
        assert b"200" not in answer.split(b"\r\n")[0]
        writer.close()

    asyncio.run(server(use))


@SERVERS
def test_a_client_that_never_reads_is_dropped(
    monkeypatch: pytest.MonkeyPatch, server: Callable[..., Awaitable[None]]
) -> None:
    """It asks for more than the buffers on the way hold, and reads nothing: its connection ends."""
    monkeypatch.setattr(http_limits, "UNREAD_S", 0.2)
    path = b"/server/v1/logs/j" if server is with_job_api else b"/metrics"

    async def use(port: int) -> None:
        # With a limit of one byte asyncio reads no more than the first part.
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
        async with asyncio.timeout(PATIENCE_S):
            while not writer.transport.is_closing():
                await asyncio.sleep(0.05)
                writer.write(b"x")  # fails once the connection has ended

    asyncio.run(server(use))
