"""The HTTP exporter against a receiver on loopback: its requests, and its outcomes."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tailspan.config.signals import SIGNALS
from tailspan.errors import ConfigError
from tailspan.http.client import user_agent
from tailspan_agent.exporter.http import HttpExporter
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry, TooLarge
from tests.fakes.collector import Collector, Reply, success_body
from tests.fakes.otlp_samples import exporter_to, logs_payload, payload_of


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver that accepts everything by default."""
    with Collector() as collector:
        yield collector


def export(url: str, payload: bytes = b"", count: int = 3, times: int = 1, **keys: Any) -> list[Outcome]:
    """Export one payload several times with one exporter."""

    async def run() -> list[Outcome]:
        exporter = exporter_to(url, **keys)
        try:
            return [await exporter.export(payload or logs_payload(3), count) for _ in range(times)]
        finally:
            await exporter.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_payload_arrives_unchanged(collector: Collector, signal: str, compression: str) -> None:
    """The bytes that arrive are the bytes that were encoded."""
    payload = payload_of(signal)
    assert export(collector.http_url, payload, signal=signal, compression=compression) == [Delivered()]
    (request,) = collector.requests
    assert request.payload == payload
    assert request.path == f"/v1/{signal}"
    assert request.headers.get("content-encoding", "none") == compression


def test_large_payload_is_compressed(collector: Collector) -> None:
    """A large payload is compressed in a thread, beside the event loop."""
    payload = logs_payload(2000, padding=" of many lines that look alike")
    assert export(collector.http_url, payload, 2000) == [Delivered()]
    (request,) = collector.requests
    assert request.payload == payload
    assert request.wire_bytes < len(payload) / 5


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_large_payloads_are_compressed_at_the_same_time(collector: Collector, compression: str) -> None:
    """Threads compress beside each other, several times each, and each payload arrives unchanged."""
    payloads = [logs_payload(40, padding=f" of request {number}" * 200) for number in range(4)]

    async def run() -> list[Outcome]:
        exporter = exporter_to(collector.http_url, compression=compression)
        try:
            return [
                outcome
                for _ in range(3)
                for outcome in await asyncio.gather(*(exporter.export(payload, 40) for payload in payloads))
            ]
        finally:
            await exporter.aclose()

    assert asyncio.run(run()) == [Delivered()] * 12
    assert sorted(request.payload for request in collector.requests) == sorted(payloads * 3)


def test_headers(collector: Collector) -> None:
    """User agent, content headers, and the configured headers."""
    headers = {"X-Scope-OrgID": SecretStr("tenant"), "Authorization": SecretStr("Bearer secret")}
    export(collector.http_url, headers=headers)
    sent = collector.requests[0].headers
    assert sent["user-agent"] == user_agent()
    assert sent["user-agent"].startswith("tailspan/")
    assert sent["content-type"] == "application/x-protobuf"
    assert sent["x-scope-orgid"] == "tenant"
    assert sent["authorization"] == "Bearer secret"


def test_one_connection_is_kept(collector: Collector) -> None:
    """A connection for each request would cost a handshake each."""
    assert export(collector.http_url, times=5) == [Delivered()] * 5
    assert collector.connections == 1


def test_connection_is_kept_after_rejections(collector: Collector) -> None:
    """A response without success keeps the connection."""
    collector.script("logs", Reply(503, message="busy"), Reply(400, message="bad"), Reply(204))
    outcomes = export(collector.http_url, times=4)
    assert outcomes == [Retry("HTTP 503: busy"), Rejected(None, "HTTP 400: bad"), Delivered(), Delivered()]
    assert collector.connections == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(429, retry_after_s=4), Retry("HTTP 429", after_s=4.0)),
        (Reply(500), Retry("HTTP 500", server_error=True)),
        (Reply(401, message="who?"), EndpointFault("HTTP 401: who?")),
        (Reply(413), TooLarge("HTTP 413")),
        (Reply(rejected=2, message="too old"), Rejected(2, "too old", kind="partial")),
        (Reply(message="slow down"), Delivered("slow down")),
    ],
)
def test_outcomes(collector: Collector, reply: Reply, expected: Outcome) -> None:
    """A sample of the outcome rules, over a real connection."""
    collector.script("logs", reply)
    assert export(collector.http_url) == [expected]


def test_redirects_are_not_followed(collector: Collector) -> None:
    """A followed redirect would send the records, and the token, to any address."""
    collector.script("logs", Reply(307, headers={"Location": f"{collector.http_url}/v1/traces"}))
    (outcome,) = export(collector.http_url)
    assert isinstance(outcome, EndpointFault)
    assert len(collector.requests) == 1


@pytest.mark.parametrize("cut", ["request", "answer"])
def test_broken_connections_are_retried(collector: Collector, cut: str) -> None:
    """Before or within the response: it is unknown whether the records arrived, so they are sent again."""
    collector.script("logs", Reply(cut=cut))
    first, second = export(collector.http_url, times=2)
    assert isinstance(first, Retry)
    assert second == Delivered()


def test_silence_is_retried_after_the_timeout(collector: Collector) -> None:
    """A hanging receiver costs one timeout and does not block the exporter."""
    collector.script("logs", Reply(hang=True))
    first, second = export(collector.http_url, times=2, timeout=3)  # the second has that time, too
    assert first == Retry(f"{collector.http_url}/v1/logs: no answer within 3 s")
    assert second == Delivered()


def test_refused_connection_is_retried() -> None:
    """A collector that is down comes back."""
    with Collector() as collector:
        url = collector.http_url
    (outcome,) = export(url)
    assert isinstance(outcome, Retry)
    assert not outcome.server_error
    assert url in outcome.reason


def test_name_that_does_not_resolve_is_retried() -> None:
    """A failure of DNS is temporary."""
    (outcome,) = export("http://nowhere.invalid:4318")
    assert isinstance(outcome, Retry)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1/logs", "http:///v1/logs", f"http://{'a' * 64}.test/v1/logs"])
def test_invalid_address_names_its_key(url: str) -> None:
    """An invalid URL is a configuration error, not a crash or an endless retry."""
    with pytest.raises(ConfigError, match="is not a usable URL") as caught:
        export(url)
    assert caught.value.key == "otlp.endpoint"


def test_endless_body_is_not_read_to_its_end(collector: Collector) -> None:
    """A response of any size must not fill the memory."""
    collector.script("logs", Reply(body=b"\n" * (8 << 20), headers={"Content-Type": "text/plain"}))
    first, second = export(collector.http_url, times=2)
    assert isinstance(first, Delivered)
    assert first.warning
    assert second == Delivered()


def test_body_that_cannot_be_decompressed_does_not_undo_a_success(collector: Collector) -> None:
    """The status decides."""
    collector.script("logs", Reply(body=b"not gzip", headers={"Content-Encoding": "gzip"}))
    (outcome,) = export(collector.http_url)
    assert isinstance(outcome, Delivered)
    assert outcome.warning


def test_a_compression_bomb_is_not_decompressed(collector: Collector) -> None:
    """A few hundred KB of gzip can be a gigabyte: memory stays bounded, and the next response is read normally."""
    bomb = gzip.compress(bytes(256 << 20), compresslevel=1)
    partial = gzip.compress(success_body("logs", Reply(rejected=1, message="too old")).SerializeToString())
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/x-protobuf"}
    collector.script("logs", Reply(body=bomb, headers=packed), Reply(body=partial, headers=packed))
    tracemalloc.start()
    try:
        first, second = export(collector.http_url, times=2)
        assert tracemalloc.get_traced_memory()[1] < len(bomb) + (16 << 20)
    finally:
        tracemalloc.stop()
    assert isinstance(first, Delivered)
    assert second == Rejected(1, "too old", kind="partial")


def test_credentials_are_not_shown(collector: Collector) -> None:
    """Neither the endpoint's name nor an error that quotes our header has them."""
    collector.script("logs", Reply(401, message="bad token s3cret-t0ken"))
    url = collector.http_url.replace("http://", "http://user:s3cret-t0ken@") + "/v1/logs?key=s3cret-t0ken"
    exporter = exporter_to(url, headers={"Authorization": SecretStr("s3cret-t0ken")})
    assert "s3cret" not in exporter.endpoint
    (outcome,) = export(url, headers={"Authorization": SecretStr("s3cret-t0ken")})
    assert outcome == EndpointFault("HTTP 401: bad token ***")
    asyncio.run(exporter.aclose())


def test_spaces_around_a_header_value_are_removed(collector: Collector) -> None:
    """A token file often ends with a line break, which HTTP does not allow."""
    assert export(collector.http_url, headers={"Authorization": SecretStr(" Bearer x\n")}) == [Delivered()]
    assert collector.requests[0].headers["authorization"] == "Bearer x"


def test_cancelled_export_leaves_the_exporter_usable(collector: Collector) -> None:
    """Shutdown and reload cancel exports in flight."""
    collector.script("logs", Reply(hang=True))

    async def run() -> Outcome:
        exporter = exporter_to(collector.http_url)
        task = asyncio.ensure_future(exporter.export(logs_payload(1), 1))
        await asyncio.to_thread(collector.wait_until, lambda: len(collector.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcome = await exporter.export(logs_payload(1), 1)
        await exporter.aclose()
        return outcome

    assert asyncio.run(run()) == Delivered()


@pytest.mark.parametrize("key", ["ca_file", "client_cert"])
def test_missing_certificate_files_name_their_key(tmp_path: Path, key: str) -> None:
    """The error comes at the start and names the configuration key."""
    with pytest.raises(ConfigError, match=rf"otlp\.{key}") as caught:
        exporter_to("https://127.0.0.1", **{key: tmp_path / "missing.pem"})
    assert caught.value.key == f"otlp.{key}"


@pytest.mark.parametrize("key", ["ca_file", "client_cert"])
def test_certificate_files_with_something_else_name_their_key(tmp_path: Path, key: str) -> None:
    """A key instead of a certificate, a DER file, an empty file."""
    path = tmp_path / "odd.pem"
    path.write_text("no certificate")
    with pytest.raises(ConfigError, match=rf"otlp\.{key}"):
        exporter_to("https://127.0.0.1", **{key: path})


def test_make_exporter_makes_an_http_exporter() -> None:
    """The default protocol."""
    exporter = exporter_to("http://127.0.0.1:4318")
    assert isinstance(exporter, HttpExporter)
    asyncio.run(exporter.aclose())
