"""`tailspan.http.client` against servers of bytes, and through proxies."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import socket
import ssl
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tailspan.errors import ConfigError
from tailspan.http.client import BROKEN, FAULTY, NEVER_SENT, TOO_SLOW, HttpClient, Reply

KEY = "services.test.base_url"
Answer = Callable[[bytes], bytes]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@asynccontextmanager
async def talking(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on this machine, whose connections end with it; yields HOST:PORT."""
    tasks = set[asyncio.Task[None] | None]()

    async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(ended, "127.0.0.1", 0, ssl=tls) as running:
        try:
            yield f"127.0.0.1:{running.sockets[0].getsockname()[1]}"
        finally:
            for task in tasks:
                assert task is not None
                task.cancel()
            await asyncio.gather(*filter(None, tasks))


@asynccontextmanager
async def server(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers each header with bytes; yields HOST:PORT."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()

    async with talking(serve, tls) as address:
        yield address


def ok(body: bytes = b"", *fields: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def client_of(url: str, **options: Any) -> HttpClient:
    return HttpClient(
        url, **{"key": KEY, "headers": {}, "timeout_s": 5.0, "keep_alive_s": 5.0, "max_idle": 1, **options}
    )


async def body_of(reply: Reply) -> bytes:
    try:
        return b"".join([piece async for piece in reply.pieces()])
    finally:
        await reply.aclose()


def asked(answer: Answer, use: Callable[[HttpClient], Awaitable[object]], url: str = "http://{}/base") -> list[bytes]:
    """Return the headers that a server saw while a client was used."""
    seen: list[bytes] = []

    def note(head: bytes) -> bytes:
        seen.append(head)
        return answer(head)

    async def main() -> None:
        async with server(note) as address:
            client = client_of(url.format(address))
            try:
                await use(client)
            finally:
                await client.aclose()

    asyncio.run(main())
    return seen


def test_connections_and_targets() -> None:
    """One connection for all, the target escaped once, the query of the call or of the URL."""

    async def use(client: HttpClient) -> None:
        for path, query in (("/a b%2Fc", "n=1"), ("/ü", ""), ("", "")):
            assert await body_of(await client.send("GET", path, query)) == b"x"

    heads = asked(lambda head: ok(b"x"), use, "http://{}/base?token=1")
    targets = [head.split(b" ")[1] for head in heads]
    assert targets == [b"/base/a%20b%2Fc?n=1", b"/base/%C3%BC?token=1", b"/base?token=1"]


def test_user_and_password_of_the_url_are_sent() -> None:
    """As basic authentication, unescaped, and nowhere else."""

    async def use(client: HttpClient) -> None:
        await body_of(await client.send("POST"))

    (head,) = asked(lambda head: ok(), use, "http://us%40er:pass@{}")
    assert base64.b64encode(b"us@er:pass") in head
    assert b"Content-Length: 0\r\n" in head
    assert b"pass@" not in head


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h", "http://", "http://a..b", "http://[::1", "http://h:x", f"http://{'a' * 64}",
        f"http://{'.'.join(['a' * 60] * 5)}", "http://a\0b",
    ],
)  # fmt: skip
def test_url_that_is_none(url: str) -> None:
    """Names the key that it is from."""
    with pytest.raises(ConfigError, match="is not a usable URL") as caught:
        client_of(url)
    assert caught.value.key == KEY


@pytest.mark.parametrize("name", [".x", "a..b", "x" * 64, "a\0b"])
def test_name_in_a_certificate_that_is_none(name: str) -> None:
    """ssl's own errors are not those of a connection, and name no key."""
    with pytest.raises(ConfigError, match=f"^{KEY}: .* name in a certificate"):
        client_of("http://jobs.test", server_name=name)


def test_headers_of_one_name_are_joined_and_the_status_is_told() -> None:
    """By lower-case name, as what reads them expects."""

    async def use(client: HttpClient) -> None:
        reply = await client.send("GET")
        assert (reply.status, reply.reason, reply.is_success) == (503, "Later", False)
        assert reply.headers["x-one"] == "1, 2"
        await reply.aclose()

    asked(lambda head: b"HTTP/1.1 503 Later\r\nX-One: 1\r\nx-one: 2\r\nContent-Length: 0\r\n\r\n", use)


def test_a_little_that_stands_for_much_comes_in_bounded_pieces() -> None:
    """The unread rest of a body is not decompressed."""
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(64)) + packer.flush()

    async def use(client: HttpClient) -> None:
        reply = await client.send("GET")
        sizes = []
        async for piece in reply.pieces():
            sizes.append(len(piece))
            if len(sizes) == 3:
                break
        await reply.aclose()
        assert max(sizes) <= 1 << 20

    tracemalloc.start()
    try:
        asked(lambda head: ok(bomb, b"Content-Encoding: gzip"), use)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [gzip.compress(b"text" * 100)[:-9], b"no gzip"], ids=["cut", "none"])
def test_damaged_compression(packed: bytes) -> None:
    """An incomplete or invalid body is an error, not a shorter text."""

    async def use(client: HttpClient) -> None:
        with pytest.raises(zlib.error):
            await body_of(await client.send("GET"))

    asked(lambda head: ok(packed, b"Content-Encoding: gzip"), use)


def two_members(text: bytes) -> bytes:
    return gzip.compress(text[:7]) + gzip.compress(text[7:])


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [(b"gzip", gzip.compress), (b"gzip", two_members), (b"deflate", zlib.compress), (b"identity", bytes)],
)
def test_compression(encoding: bytes, pack: Callable[[bytes], bytes]) -> None:
    """The text comes out, whatever of it was asked for; also that of files which were packed one after the other."""
    text = b"line\n" * 100_000

    async def use(client: HttpClient) -> None:
        assert await body_of(await client.send("GET")) == text

    asked(lambda head: ok(pack(text), b"Content-Encoding: " + encoding), use)


def test_body_that_breaks_off() -> None:
    """An error that its callers know."""

    async def use(client: HttpClient) -> None:
        with pytest.raises(BROKEN):
            await body_of(await client.send("GET"))

    def short(head: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense\r\n"

    asked(short, use)


@pytest.mark.parametrize("first", [ok(), b"HTTP/1.1 204 No Content\r\n\r\n"])
def test_what_comes_after_an_answer_is_no_answer_to_the_next_request(first: bytes) -> None:
    """A body where there can be none, or a second answer, ends the connection."""

    async def use(client: HttpClient) -> None:
        for _ in range(2):
            assert await body_of(await client.send("GET")) == b""

    asked(lambda head: first + ok(b"of another request"), use)


def test_a_body_is_read_once_and_not_after_its_reply_was_closed() -> None:
    """Its connection may have the answer to another request by then."""

    async def use(client: HttpClient) -> None:
        reply = await client.send("GET")
        pieces = reply.pieces()
        assert await anext(pieces) == b"text"
        assert [piece async for piece in pieces] == [piece async for piece in reply.pieces()] == []
        await reply.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await anext(reply.pieces())

    asked(lambda head: ok(b"text"), use)


@asynccontextmanager
async def counting() -> AsyncIterator[str]:
    """A server that answers with the number of the connection, and ends it after `/last`; yields its URL."""
    numbers = itertools.count()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, head = next(numbers), b""
        while b"/last" not in head:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(ok(b"%d" % number))

    async with talking(serve) as address:
        yield f"http://{address}"


def test_connections_are_kept_and_given_up() -> None:
    """Busy ones have no limit, few are kept, and none that the server has ended, that is old, or that is half read."""

    async def main() -> None:
        async with counting() as url:
            client = client_of(url)
            replies = [await client.send("GET") for _ in range(3)]
            assert [await body_of(reply) for reply in replies] == [b"0", b"1", b"2"]
            assert await body_of(await client.send("GET")) == b"0"
            await (reply := await client.send("GET")).aclose()
            await reply.aclose()
            assert await body_of(await client.send("GET")) == b"3"
            assert await body_of(await client.send("GET", "/last")) == b"3"
            assert await body_of(await client.send("GET")) == b"4"
            await client.aclose()
            assert await body_of(await client.send("GET")) == b"5"
            await client.aclose()
            hasty = client_of(url, keep_alive_s=0.0)
            assert [await body_of(await hasty.send("GET")) for _ in range(2)] == [b"6", b"7"]
            await hasty.aclose()

    asyncio.run(main())


def test_closing_the_client_ends_its_requests_and_leaves_no_connection() -> None:
    """A body without a length is then incomplete, and a connection that was being made is not kept."""

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\npart")
            await reader.read()

        async with talking(serve) as address:
            client = client_of(f"http://{address}")
            reply = await client.send("GET")
            connecting = asyncio.ensure_future(client.send("GET"))
            await asyncio.sleep(0)
            await client.aclose()
            with pytest.raises(BROKEN, match="closed"):
                await body_of(reply)
            with pytest.raises(NEVER_SENT, match="closed"):
                await connecting

    asyncio.run(main())


def test_closing_that_is_cancelled_leaves_no_connection() -> None:
    """As when an agent has no more time for its end."""

    async def main() -> None:
        async with counting() as url:
            client = client_of(url, max_idle=3)
            replies = [await client.send("GET") for _ in range(3)]
            streams = [reply._connection.stream for reply in replies]
            assert [await body_of(reply) for reply in replies] == [b"0", b"1", b"2"]
            closing = asyncio.ensure_future(client.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            await asyncio.sleep(0)
            assert all(stream.get_extra_info("socket").fileno() < 0 for stream in streams)

    asyncio.run(main())


def test_a_request_that_is_given_up_takes_its_connection_with_it() -> None:
    """The answer of one request is never that of the next one."""

    async def main() -> None:
        waiting = asyncio.Event()
        heads = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal heads
            while await reader.readuntil(b"\r\n\r\n"):
                heads += 1
                if heads == 1:
                    waiting.set()
                    await asyncio.sleep(0.05)
                writer.write(ok(b"%d" % heads))

        async with talking(serve) as address:
            client = client_of(f"http://{address}")
            sending = asyncio.ensure_future(client.send("GET"))
            await waiting.wait()
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert await body_of(await client.send("GET")) == b"2"
            await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "Server disconnected without sending a response."),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "Content-Length"),
        (b"nonsense\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "without a pending proposal"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal", "peer closed connection"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (200 << 10), "Receive buffer too long"),
    ],
)
def test_an_answer_that_is_none(answer: bytes, text: str) -> None:
    """Each has its reason."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.write_eof()
        await reader.read()

    async def main() -> None:
        async with talking(serve) as address:
            client = client_of(f"http://{address}")
            with pytest.raises(BROKEN, match=text):
                await body_of(await client.send("GET"))
            await client.aclose()

    asyncio.run(main())


def test_a_silent_server_and_a_request_that_is_not_http() -> None:
    """The groups of errors, by which callers decide whether to retry."""

    async def main() -> None:
        async with talking(lambda reader, _: reader.read()) as address:
            client = client_of(f"http://{address}", timeout_s=0.1)
            with pytest.raises(TOO_SLOW):
                await client.send("GET")
            with pytest.raises(FAULTY, match="header X-Key") as caught:
                await client.send("GET", headers={"X-Key": "two\nlines"})
            assert "lines" not in str(caught.value)
            await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("size", [10, 1 << 20, (5 << 20) + 1])
def test_bodies_arrive_whole(size: int) -> None:
    """In one packet with the header, or in slices; an answer to `100 Continue` is no answer."""
    content, found = bytes(range(256)) * (size // 256) + b"x" * (size % 256), bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % size in head
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        found.extend(await reader.readexactly(size))
        writer.write(ok(b"all"))
        await reader.read()

    async def main() -> None:
        async with talking(serve) as address:
            client = client_of(f"http://{address}")
            assert await body_of(await client.send("POST", content=content)) == b"all"
            await client.aclose()

    asyncio.run(main())
    assert found == content


def test_a_proxy_is_used_where_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy sees the whole URL and its own credentials; the host never hears of it."""

    async def main() -> list[bytes]:
        seen: list[bytes] = []

        def proxy(head: bytes) -> bytes:
            seen.append(head)
            return ok(b"by proxy")

        async with server(proxy) as address:
            monkeypatch.setenv("http_proxy", f"http://me:secret@{address}")
            client = client_of("http://jobs.test/base")
            assert await body_of(await client.send("GET", "/x")) == b"by proxy"
            await client.aclose()
        return seen

    (head,) = asyncio.run(main())
    assert head.startswith(b"GET http://jobs.test/base/x HTTP/1.1\r\n")
    assert base64.b64encode(b"me:secret") in head


def test_a_unix_socket_needs_no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its server gets a path, and not the proxy's credentials."""

    async def main() -> bytes:
        heads: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(ok())
            writer.close()

        monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
        async with await asyncio.start_unix_server(serve, tmp_path / "s"):
            client = client_of("http://jobs.test/base", socket=tmp_path / "s", streams=True)
            await body_of(await client.send("GET"))
            await client.aclose()
        return heads[0]

    head = asyncio.run(main())
    assert head.startswith(b"GET /base HTTP/1.1\r\n")
    assert b"Proxy-Authorization" not in head


@pytest.mark.parametrize(
    ("host", "exception"),
    [
        ("127.0.0.1", ""),
        ("localhost", ""),
        ("0.0.0.0", "0.0.0.0"),
        ("0.0.0.0", "*"),
        ("0.0.0.0", "0.0.0.0:{}"),
    ],
)
def test_hosts_that_need_no_proxy(monkeypatch: pytest.MonkeyPatch, host: str, exception: str) -> None:
    """This machine, whose tokens a proxy must not see; and exceptions by name, by port, or for all."""

    async def main() -> None:
        async with server(lambda head: ok(b"itself")) as address:
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
            monkeypatch.setenv("no_proxy", exception.format(address.partition(":")[2]))
            client = client_of(f"http://{host}:{address.partition(':')[2]}")
            assert await body_of(await client.send("GET")) == b"itself"
            await client.aclose()

    asyncio.run(main())


def test_tls_goes_through_a_proxy_as_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a CONNECT request; its refusal is an error of a request that never arrived."""

    async def main() -> list[bytes]:
        seen: list[bytes] = []

        def proxy(head: bytes) -> bytes:
            seen.append(head)
            return b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"

        async with server(proxy) as address:
            monkeypatch.setenv("https_proxy", address)
            client = client_of("https://jobs.test/base")
            with pytest.raises(BROKEN, match="403"):
                await client.send("GET", "/x")
            await client.aclose()
        return seen

    (head,) = asyncio.run(main())
    assert head.startswith(b"CONNECT jobs.test:443 HTTP/1.1\r\n")


async def relaying_proxy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, seen: list[str]
) -> None:
    """Accept CONNECT, or SOCKS 5, from me:secret; connect to a port of this machine, whatever the request names."""
    first = await reader.readexactly(1)
    if first == b"C":
        head = first + await reader.readuntil(b"\r\n\r\n")
        assert base64.b64encode(b"me:secret") in head
        seen.append(head.split()[1].decode())
        answer = b"HTTP/1.1 200 Connected\r\n\r\n"
    else:
        assert await reader.readexactly(2) == b"\1\2"
        writer.write(b"\5\2")
        assert await reader.readexactly(11) == b"\1\2me\6secret"
        writer.write(b"\1\0")
        assert await reader.readexactly(4) == b"\5\1\0\3"
        name = await reader.readexactly((await reader.readexactly(1))[0])
        seen.append(f"{name.decode()}:{int.from_bytes(await reader.readexactly(2), 'big')}")
        answer = b"\5\0\0\1\x7f\0\0\1\0\1"
    their_reader, their_writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(answer)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
        target.close()

    try:
        await asyncio.gather(copy(reader, their_writer), copy(their_reader, writer))
    finally:
        their_writer.close()


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
def test_tls_reaches_the_server_through_a_tunnel(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The proxy is asked for the server by name, and the certificate is the server's."""
    authority, seen = trustme.CA(), []
    context, tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("jobs.test").configure_cert(context)
    authority.configure_trust(tls)

    async def main() -> None:
        async with server(lambda head: ok(b"secure"), context) as address:
            port = int(address.partition(":")[2])
            async with talking(lambda *ends: relaying_proxy(*ends, port, seen)) as proxy:
                monkeypatch.setenv("https_proxy", f"{scheme}://me:secret@{proxy}")
                client = client_of("https://jobs.test/base", tls=tls)
                for _ in range(2):
                    assert await body_of(await client.send("GET")) == b"secure"
                await client.aclose()

    asyncio.run(main())
    assert seen == ["jobs.test:443"]


@pytest.mark.parametrize("scheme", ["", "http", "socks5"])
def test_a_silent_connection_is_watched_by_the_system(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Directly and through a proxy: nothing else finds out that the other side has died."""

    async def main() -> None:
        async with server(lambda head: ok(b"by proxy")) as address:
            port = int(address.partition(":")[2])
            async with talking(lambda *ends: relaying_proxy(*ends, port, [])) as socks:
                monkeypatch.setenv("http_proxy", f"{scheme}://me:secret@{address if scheme == 'http' else socks}")
                client = client_of("http://jobs.test" if scheme else f"http://{address}", streams=True)
                reply = await client.send("GET")
                connected = reply._connection.stream.get_extra_info("socket")
                assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
                assert await body_of(reply) == b"by proxy"
                await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "without sending a response"),
        (b"nonsense\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "sent data before the server could"),
        (b"HTTP/1.1 407 Login\r\n\r\n", "407 Login"),
        (None, "^$"),
    ],
)
def test_an_http_proxy_that_does_not_connect(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    """The request never arrived, so it may be sent again."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is not None:
            writer.write(answer)
            writer.write_eof()
        await reader.read()

    async def main() -> None:
        async with talking(refuse) as address:
            monkeypatch.setenv("https_proxy", f"http://me:secret@{address}")
            client = client_of("https://jobs.test", timeout_s=5.0 if answer is not None else 0.1)
            assert "secret" not in repr(client._proxy)
            with pytest.raises(NEVER_SENT, match=reason):
                await client.send("POST")
            await client.aclose()

    asyncio.run(main())


def test_a_proxy_whose_authorities_cannot_be_used_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is left open by an error of the configuration."""
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1

    async def main() -> None:
        async with talking(count) as address:
            monkeypatch.setenv("http_proxy", f"https://{address}")
            monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
            client = client_of("http://jobs.test")
            with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
                await client.send("GET")
            monkeypatch.delenv("http_proxy")
            after = client_of(f"http://{address}")
            with pytest.raises(BROKEN):
                await after.send("GET")

    asyncio.run(main())
    assert connections == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\5\xff", "another way of authentication"),
        (b"\5\0\5\5\0\1", "connection refused"),
        (b"\5\0\5\x63\0\1", "error 99"),
        (b"\5", "has closed the connection"),
        (b"\5\0\5\0\0\1\0\0\0\0\0\0early", "sent data before the server could"),
    ],
)
def test_a_socks_proxy_that_does_not_connect(monkeypatch: pytest.MonkeyPatch, answer: bytes, reason: str) -> None:
    """Its reason is that of a request that never arrived."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.write_eof()
        await reader.read()

    async def main() -> None:
        async with talking(refuse) as address:
            monkeypatch.setenv("all_proxy", f"socks5://{address}")
            client = client_of("http://jobs.test")
            with pytest.raises(NEVER_SENT, match=reason):
                await client.send("GET")
            await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    "proxy", ["gopher://secret@proxy:1", "http://:1", "http://secret@proxy:x", f"socks5://secret{'x' * 255}@proxy:1"]
)
def test_proxies_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """Told before anything is sent, without their password."""
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(ConfigError, match="environment names") as caught:
        client_of("http://jobs.test")
    assert "secret" not in str(caught.value)
