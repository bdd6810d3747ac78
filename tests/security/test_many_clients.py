"""What many clients cannot do to our HTTP servers: lock others out, fill the log, or cause a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import h11
import pytest

from tailspan.http import server_limits
from tailspan.job_api import server as job_api
from tailspan_agent.web import app as status_app
from tests.security.test_slow_clients import SERVERS, Reader, Writer, with_job_api, with_status_page

PATIENCE_S = 20.0
MOST = 10
HEALTH = "/healthz"
JOBS = "/server/v1/job/self"
REQUEST = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
FLOODS = {
    "idle": b"",
    "slow header": b"GET / HTTP/1.1\r\nHo",
    "slow body": b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx",
    "kept alive": REQUEST.format(HEALTH).encode(),
    "without access": b"GET / HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n",
    "pipelined": REQUEST.format(HEALTH).encode() * 50,
    "no HTTP": b"\x16\x03\x01\x00" * 40,
    "broken chunks": b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nzz",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "many headers at the end": b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    + b"X: y\r\n" * 10_000
    + b"\r\n",
    "a null byte": b"GET /static/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
Server = Callable[[Callable[[int], Awaitable[None]]], Awaitable[None]]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten connections are as good as four hundred."""
    monkeypatch.setattr(job_api, "_MAX_CONNECTIONS", MOST)
    monkeypatch.setattr(status_app, "_MAX_CONNECTIONS", MOST)
    monkeypatch.setattr(server_limits, "_logged_s", {})


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[Reader, Writer]]:
    """One connection, ended at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(port: int, path: str) -> int:
    """Return the status of one request on a connection of its own; 0 if the connection ends first."""
    async with asyncio.timeout(PATIENCE_S), connected(port) as (reader, writer):
        writer.write(REQUEST.format(path).encode())
        try:
            return int((await reader.readuntil(b"\r\n")).split()[1])
        except (ConnectionError, asyncio.IncompleteReadError):
            return 0


MANY = b"X: y\r\n" * 1000
TOO_MANY = {
    "at once": [b"GET / HTTP/1.1\r\nHost: localhost\r\n" + MANY + b"\r\n"],
    "one after the other": [b"GET / HTTP/1.1\r\nHost: localhost\r\n", *[MANY[:600]] * 9],
    "in a request behind another": [f"{REQUEST.format(HEALTH)}GET / HTTP/1.1\r\n".encode() + MANY + b"\r\n"],
    "behind a body": [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + MANY
    ],
    "large": [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"],
}


@SERVERS
@pytest.mark.parametrize("parts", TOO_MANY.values(), ids=TOO_MANY)
def test_too_many_headers_are_not_parsed(server: Server, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that parses ten thousand headers of each client answers nobody meanwhile."""
    parsed: list[int] = []
    normalize = h11._events.normalize_and_validate

    def counted(headers: list[object], **options: object) -> object:
        parsed.append(len(headers))
        return normalize(headers, **options)

    monkeypatch.setattr(h11._events, "normalize_and_validate", counted)

    async def use(port: int) -> None:
        async with asyncio.timeout(PATIENCE_S), connected(port) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                answer = await reader.read()
                assert b" 400 Bad Request" in answer or b" 401 Unauthorized" in answer
        assert max(parsed) <= server_limits._MOST_HEADERS

    asyncio.run(server(use))


@SERVERS
@pytest.mark.parametrize("first", FLOODS.values(), ids=FLOODS)
def test_a_flood_locks_nobody_out(server: Server, first: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Five times the limit, half of them closed in one direction: others are answered, with one line in the log."""
    path = JOBS if server is with_job_api else HEALTH

    async def use(port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(5 * MOST):
                _, writer = await stack.enter_async_context(connected(port))
                writer.write(first)
                if number % 2:
                    with contextlib.suppress(OSError):  # made room already
                        writer.write_eof()
            assert await status_of(port, path) == 200
        assert await status_of(port, path) == 200

    asyncio.run(server(use))
    assert not [record for record in caplog.records if record.exc_info]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


@SERVERS
def test_the_longest_idle_connection_goes_first(server: Server) -> None:
    """A connection that is in use stays, whatever comes after it."""
    path = JOBS if server is with_job_api else HEALTH

    async def use(port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            oldest, _ = await stack.enter_async_context(connected(port))
            reader, writer = await stack.enter_async_context(connected(port))
            for _ in range(3 * MOST):
                await stack.enter_async_context(connected(port))
                writer.write(REQUEST.format(path).encode())
                async with asyncio.timeout(PATIENCE_S):
                    header = await reader.readuntil(b"\r\n\r\n")
                    length = next(line for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                    await reader.readexactly(int(length.split(b":")[1]))
            async with asyncio.timeout(PATIENCE_S):
                with contextlib.suppress(ConnectionError):
                    assert await oldest.read() == b""

    asyncio.run(server(use))


def test_a_client_without_access_keeps_no_connection() -> None:
    """After the answer the server ends the connection."""

    async def use(port: int) -> None:
        async with asyncio.timeout(PATIENCE_S), connected(port) as (reader, writer):
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n")
            assert b"\r\nconnection: close\r\n" in await reader.read()

    asyncio.run(with_status_page(use))


def test_a_request_that_breaks_logs_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A bug answers 500 and names its place, without the request's text and without a traceback."""

    def broken(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("tailspan.job_api.endpoints._whole_number", broken)

    async def use(port: int) -> None:
        assert [await status_of(port, JOBS) for _ in range(3)] == [500] * 3

    asyncio.run(with_job_api(use))
    (record,) = caplog.records
    assert "KeyError in" in record.message
    assert "secret" not in caplog.text
    assert record.exc_info is None


def test_accepting_again_when_files_run_out(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio reports each failed accept() with a traceback: one line is logged, and idle connections make room."""

    async def use(port: int) -> None:
        async with connected(port) as (reader, _):
            await status_of(port, JOBS)
            error = {"message": "socket.accept() out of system resource", "exception": OSError(24, "no file left")}
            for _ in range(100):
                asyncio.get_running_loop().call_exception_handler(error)
            async with asyncio.timeout(PATIENCE_S):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""

    asyncio.run(with_job_api(use))
    (record,) = caplog.records
    assert "was not accepted ([Errno 24] no file left)" in record.message
    assert record.exc_info is None
