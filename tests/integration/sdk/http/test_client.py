"""`tailspan.http.client` against servers of bytes, and through proxies."""

from __future__ import annotations

import asyncio
import base64
import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tailspan.errors import ConfigError
from tailspan.http.client import BROKEN, HttpClient, Reply

KEY = "services.test.base_url"
Answer = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A server that answers each header with bytes; yields HOST:PORT."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield f"127.0.0.1:{running.sockets[0].getsockname()[1]}"


def ok(body: bytes = b"", *fields: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def client_of(url: str) -> HttpClient:
    return HttpClient(url, key=KEY, headers={}, timeout_s=5.0, keep_alive_s=5.0, max_idle=1)


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
    "url", ["ftp://h", "http://", "http://a..b", "http://[::1", "http://h:x", f"http://{'a' * 64}"]
)
def test_url_that_is_none(url: str) -> None:
    """Names the key that it is from."""
    with pytest.raises(ConfigError, match="is not a usable URL") as caught:
        client_of(url)
    assert caught.value.key == KEY


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


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"identity"])
def test_compression(encoding: bytes) -> None:
    """The text comes out, whatever of it was asked for."""
    text = b"line\n" * 100_000
    pack = {b"gzip": gzip.compress, b"deflate": zlib.compress, b"identity": bytes}[encoding]

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


@pytest.mark.parametrize("proxy", ["gopher://secret@proxy:1", "http://:1", "http://secret@proxy:x", "socks5://proxy:1"])
def test_proxies_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """Told before anything is sent, without their password."""
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(ConfigError, match="environment names") as caught:
        client_of("http://jobs.test")
    assert "secret" not in str(caught.value)
