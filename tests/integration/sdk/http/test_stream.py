"""`tailspan.http.stream`: connections against real servers on loopback, plain and with TLS."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from tailspan.http.errors import ConnectError, ConnectTimeout, ReadError, ReadTimeout, WriteError, WriteTimeout
from tailspan.http.stream import NetworkStream, _addresses, connect_reason, connect_tcp

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SECONDS = 20.0


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@asynccontextmanager
async def serving(serve: Serve, authority: trustme.CA | None = None) -> AsyncIterator[int]:
    """A server on 127.0.0.1, which hangs up after serving; yields its port."""

    handlers = set[asyncio.Task[None] | None]()

    async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        try:
            await serve(reader, writer)
            writer.close()
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()

    context = None
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
    async with await asyncio.start_server(ended, "127.0.0.1", 0, ssl=context) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            for handler in handlers:
                assert handler is not None
                handler.cancel()  # from Python 3.12.1 on, the end of a server waits for its connections


@asynccontextmanager
async def connected(
    serve: Serve, authority: trustme.CA | None = None, *, name: str = "127.0.0.1"
) -> AsyncIterator[NetworkStream]:
    """A connection to a server; with TLS where there is an authority."""
    async with serving(serve, authority) as port:
        stream = await connect_tcp(name, port, timeout_s=SECONDS)
        try:
            if authority is not None:
                client = ssl.create_default_context()
                authority.configure_trust(client)
                await stream.start_tls(client, server_name="127.0.0.1", timeout_s=SECONDS)
            yield stream
        finally:
            await stream.aclose()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"farewell")


async def read_all(stream: NetworkStream) -> bytes:
    found = bytearray()
    while piece := await stream.read(timeout_s=SECONDS):
        found += piece
    return bytes(found)


@pytest.mark.parametrize("with_tls", [False, True])
def test_what_is_sent_arrives_and_comes_back(authority: trustme.CA, with_tls: bool) -> None:
    """Much more than any buffer holds, in both directions at once."""
    text = bytes(range(256)) * (4 << 12)

    async def main() -> None:
        async with connected(echo, authority if with_tls else None) as stream:
            found = bytearray()

            async def receive() -> None:
                while len(found) < len(text):
                    found.extend(await stream.read(timeout_s=SECONDS))

            receiving = asyncio.ensure_future(receive())
            for start in range(0, len(text), 1 << 20):
                await stream.write(memoryview(text)[start : start + (1 << 20)], timeout_s=SECONDS)
            await receiving
            assert found == text
            assert (stream.get_extra_info("ssl_object") is not None) is with_tls

    asyncio.run(main())


@pytest.mark.parametrize("with_tls", [False, True])
def test_nothing_is_read_ahead_without_limit(authority: trustme.CA, with_tls: bool) -> None:
    """A server that sends faster than we work must wait, or its log would fill our memory."""
    whole, sent = 32 << 20, 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < whole:
            writer.write(bytes(1 << 20))
            sent += 1 << 20
            await writer.drain()

    async def main() -> None:
        async with connected(flood, authority if with_tls else None) as stream:
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
            assert sent < whole / 2
            assert len(await read_all(stream)) == whole

    asyncio.run(main())


@pytest.mark.parametrize("with_tls", [False, True])
def test_the_servers_end_is_the_end(authority: trustme.CA, with_tls: bool) -> None:
    """What came before it is still read, and an idle connection is known to be of no more use."""

    async def main() -> None:
        async with connected(farewell, authority if with_tls else None) as stream:
            while not stream.is_readable:
                await asyncio.sleep(0.01)
            assert await read_all(stream) == b"farewell"
            assert await stream.read(timeout_s=SECONDS) == b""
            assert stream.is_readable
            with pytest.raises(WriteError):
                await stream.write(b"too late", timeout_s=SECONDS)

    asyncio.run(main())


def test_a_reset_is_an_error_after_what_came() -> None:
    """A reply that was cut off must not pass for a whole one."""

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"part")
        await reader.readexactly(1)
        await reader.readexactly(1)
        linger_for_no_time = struct.pack("ii", 1, 0)
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
        writer.transport.abort()

    async def main() -> None:
        async with connected(cut) as stream:
            await stream.write(b"1", timeout_s=SECONDS)
            assert await stream.read(timeout_s=SECONDS) == b"part"
            await stream.write(b"2", timeout_s=SECONDS)
            with pytest.raises(ReadError, match="reset"):
                await stream.read(timeout_s=SECONDS)
            with pytest.raises(WriteError):
                await stream.write(b"3", timeout_s=SECONDS)

    asyncio.run(main())


def test_silent_servers_are_not_waited_for_longer_than_asked() -> None:
    """Not for an answer, and not for room to send; a read that was given up loses nothing."""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"late")
        await asyncio.sleep(3600)

    async def main() -> None:
        async with connected(late) as stream:
            with pytest.raises(ReadTimeout):
                await stream.read(timeout_s=0.05)
            await stream.write(b"1", timeout_s=SECONDS)
            assert await stream.read(timeout_s=SECONDS) == b"late"
            with pytest.raises(WriteTimeout):
                await stream.write(bytes(64 << 20), timeout_s=0.2)

    asyncio.run(main())


def test_a_read_that_is_cancelled_can_be_made_again() -> None:
    """A tailer is stopped at whatever point it is."""

    async def main() -> None:
        async with connected(echo) as stream:
            reading = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await stream.write(b"again")
            assert await stream.read(timeout_s=SECONDS) == b"again"

    asyncio.run(main())


def test_names_are_looked_up() -> None:
    """Also where a name has an address of each family, and one of them has no server."""

    async def main() -> None:
        async with connected(echo, name="localhost") as stream:
            assert stream.get_extra_info("peername")[0] == "127.0.0.1"
            assert stream.get_extra_info("sockname")[0] == "127.0.0.1"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[Errno 111] Connect call failed ('127.0.0.1', 9)", "connection refused"),
        (
            "Multiple exceptions: [Errno 111] Connect call failed ('::1', 9, 0, 0), [Errno 111] ...",
            "connection refused",
        ),
        ("[Errno -2] Name or service not known", "name or service not known"),
        ("Multiple exceptions: [Errno 111] a, [Errno 113] b", "Multiple exceptions: [Errno 111] a, [Errno 113] b"),
        ("no sockets", "no sockets"),
    ],
)
def test_reasons_are_in_the_words_of_the_system(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers become texts; several different errors stay as asyncio reports them."""
    monkeypatch.setattr(os, "strerror", {111: "Connection refused", 113: "No route to host"}.__getitem__)
    assert connect_reason(OSError(text)) == reason


def test_no_server() -> None:
    """A refused connection names its reason."""

    async def main() -> None:
        async with serving(echo) as port:
            pass
        with pytest.raises(ConnectError, match=r"^connection refused$"):
            await connect_tcp("127.0.0.1", port, timeout_s=SECONDS)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("serve", "timeout_s", "expected"),
    [(silence, 0.2, ConnectTimeout), (farewell, SECONDS, ConnectError)],
    ids=["mute", "plain"],
)
def test_servers_without_tls(serve: Serve, timeout_s: float, expected: type[Exception]) -> None:
    """A handshake that fails or takes too long is a connection that there is not."""

    async def main() -> None:
        async with connected(serve) as stream:
            with pytest.raises(expected):
                await stream.start_tls(ssl.create_default_context(), server_name="127.0.0.1", timeout_s=timeout_s)

    asyncio.run(main())


def test_a_stranger_is_not_trusted(authority: trustme.CA) -> None:
    """The error has the reason, so that the caller can name the setting."""

    async def main() -> None:
        async with serving(echo, trustme.CA()) as port:
            stream = await connect_tcp("127.0.0.1", port)
            client = ssl.create_default_context()
            authority.configure_trust(client)
            with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED") as refused:
                await stream.start_tls(client, server_name="127.0.0.1", timeout_s=SECONDS)
            assert isinstance(refused.value.__cause__, ssl.SSLError)

    asyncio.run(main())


def test_what_came_before_tls_is_nobodys_word(authority: trustme.CA) -> None:
    """Who sits between could answer in plain text at once, and leave the handshake to the true server."""

    async def main() -> None:
        async with serving(echo, authority) as port:

            async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"forged")
                to_server, its_writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    its_writer.write(await reader.readexactly(1) + await reader.read(1 << 16))
                    writer.write(await to_server.read(1 << 16))
                except asyncio.IncompleteReadError:
                    pass
                finally:
                    its_writer.transport.abort()
                    await asyncio.sleep(0)

            async with connected(between) as stream:
                while not stream.is_readable:
                    await asyncio.sleep(0.01)
                client = ssl.create_default_context()
                authority.configure_trust(client)
                with pytest.raises(ConnectError) as refused:
                    await stream.start_tls(client, server_name="127.0.0.1", timeout_s=SECONDS)
                assert isinstance(refused.value.__cause__, ssl.SSLError)

    asyncio.run(main())


def test_who_hangs_up_before_tls_is_not_waited_for() -> None:
    """A forwarded port without a target accepts connections and closes them; asyncio would wait for a handshake."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return

    async def main() -> None:
        async with connected(hang_up) as stream:
            while not stream.is_readable:
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectError, match="closed"):
                await stream.start_tls(ssl.create_default_context(), server_name="127.0.0.1", timeout_s=SECONDS)

    asyncio.run(main())


@pytest.mark.parametrize("reads_on", [True, False])
def test_an_answer_that_comes_while_we_still_send(reads_on: bool) -> None:
    """nginx answers 413 to a large body, ends its side at once and reads on for a while, or not."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"too large")
        writer.write_eof()
        while reads_on and await reader.read(1 << 16):
            pass
        if not reads_on:
            await asyncio.sleep(SECONDS)

    async def main() -> None:
        async with connected(refuse) as stream:
            with pytest.raises(WriteError):
                await stream.write(bytes(64 << 20), timeout_s=SECONDS / 2)
            assert await read_all(stream) == b"too large"
            await asyncio.sleep(0.1)  # asyncio sends what it still has, and closes

    asyncio.run(main())


def test_an_end_is_seen_before_the_loop_tells_of_it() -> None:
    """A program that computes between two requests must not send the second one to a server that has gone."""

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        stream = await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout_s=SECONDS)
        server = listener.accept()[0]
        server.send(b"an answer")
        assert await stream.read(timeout_s=SECONDS) == b"an answer"
        assert not stream.is_readable
        server.close()
        listener.close()
        time.sleep(0.1)  # the loop does not run meanwhile
        assert stream.is_readable
        await stream.aclose()

    asyncio.run(main())


def test_a_connection_that_broke_at_once_has_no_options() -> None:
    """A forwarded port without a target resets what it has just accepted; that is an error of the first read."""

    async def main() -> None:
        async with connected(silence) as stream:
            transport = stream._transport
            await stream.aclose()
            late = NetworkStream(streams=True)
            late.connection_made(transport)
            late.connection_lost(ConnectionResetError("reset"))
            with pytest.raises(ReadError, match="reset"):
                await late.read()

    asyncio.run(main())


def test_a_link_local_address_keeps_its_interface() -> None:
    """Without the interface such an address cannot be reached."""

    class LinkLocal(asyncio.SelectorEventLoop):
        async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", port, 0, 4)),
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", port, 0, 0)),
            ]

    with asyncio.Runner(loop_factory=LinkLocal) as runner:
        assert runner.run(_addresses("printer.local", 1)) == ["fe80::1%4", "fd00::1"]


class Names(asyncio.SelectorEventLoop):
    """A loop in which each name has the address of a machine that never answers before that of one that does."""

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]


@contextlib.contextmanager
def never_answering(port: int) -> Iterator[None]:
    """A listener whose queue is full: the system drops what else wants to connect."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.2", port))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", port))
        yield


def test_an_address_that_never_answers_costs_a_quarter_of_a_second() -> None:
    """Many machines have an IPv6 address that their network does not route."""

    async def main() -> None:
        async with serving(echo) as port:
            with never_answering(port):
                stream = await connect_tcp("server", port, timeout_s=SECONDS)
                assert stream.get_extra_info("peername")[0] == "127.0.0.1"
                await stream.aclose()
                with pytest.raises(ConnectTimeout):
                    await connect_tcp("127.0.0.2", port, timeout_s=0.1)

    with asyncio.Runner(loop_factory=Names) as runner:
        runner.run(main())


def test_connecting_can_be_cancelled_at_any_moment() -> None:
    """No connection is left behind, also none that was made just then; the test run fails of an open socket."""

    async def main() -> None:
        async with serving(farewell) as port:
            for rounds in range(40):
                connecting = asyncio.ensure_future(connect_tcp("127.0.0.1", port))
                for _ in range(rounds):
                    await asyncio.sleep(0 if rounds < 20 else 0.0005)
                if connecting.done():
                    await connecting.result().aclose()
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await connecting

    asyncio.run(main())
    gc.collect()
