"""`tailspan.http.websocket` through proxies; its messages are tested with the services that use them."""

from __future__ import annotations

import asyncio
import base64
import ssl

import pytest

from tailspan.http.websocket import WebSocket, WebSocketError


@pytest.mark.parametrize("form", ["http://me:se%40cret@{}", "me:se%40cret@{}", "http://me:se%40cret@{}/path"])
@pytest.mark.parametrize(("url", "variable"), [("ws://jobs.test", "http_proxy"), ("wss://jobs.test:8", "all_proxy")])
def test_the_proxy_is_that_of_other_requests(
    monkeypatch: pytest.MonkeyPatch, form: str, url: str, variable: str
) -> None:
    """By the same variables and in the same forms; its refusal is the error."""
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setenv(variable, form.format(f"127.0.0.1:{port}"))
            tls = ssl.create_default_context() if url.startswith("wss:") else None
            with pytest.raises(WebSocketError, match="403"):
                await WebSocket.open(f"{url}/x", headers={}, timeout_s=5.0, tls=tls)

    asyncio.run(main())
    (head,) = heads
    assert head.startswith(b"CONNECT jobs.test:%d " % (80 if url.startswith("ws:") else 8))
    assert base64.b64encode(b"me:se@cret") in head


@pytest.mark.parametrize("proxy", ["gopher://me:secret@proxy:1", "http://me:secret@:1", "http://secret@proxy:x"])
def test_a_proxy_that_cannot_be_used_keeps_its_password(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """The error reaches the agent's log."""
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(WebSocketError, match="environment names") as caught:
        asyncio.run(WebSocket.open("ws://jobs.test/x", headers={}, timeout_s=5.0))
    assert "secret" not in str(caught.value)
