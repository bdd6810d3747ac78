"""The gRPC exporter against a receiver on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from tailspan.config.signals import SIGNALS
from tailspan.errors import ConfigError
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry, TooLarge
from tests.fakes.collector import Collector, Reply
from tests.fakes.otlp_samples import exporter_to, logs_payload, payload_of


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver that accepts everything by default."""
    with Collector() as collector:
        yield collector


def export(url: str, payload: bytes = b"", count: int = 3, times: int = 1, **keys: Any) -> list[Outcome]:
    """Export one payload several times with one exporter."""

    async def run() -> list[Outcome]:
        exporter = exporter_to(url, protocol="grpc", **keys)
        try:
            return [await exporter.export(payload or logs_payload(3), count) for _ in range(times)]
        finally:
            await exporter.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_payload_arrives_unchanged(collector: Collector, signal: str, compression: str) -> None:
    """The bytes that arrive are the bytes that were encoded."""
    payload = payload_of(signal)
    assert export(collector.grpc_url, payload, signal=signal, compression=compression) == [Delivered()]
    (request,) = collector.requests
    assert (request.signal, request.protocol, request.payload) == (signal, "grpc", payload)


def test_metadata(collector: Collector) -> None:
    """Header names are sent in lower case, which gRPC requires."""
    export(collector.grpc_url, headers={"X-Scope-OrgID": SecretStr("tenant")})
    sent = collector.requests[0].headers
    assert sent["x-scope-orgid"] == "tenant"
    assert sent["user-agent"].startswith("tailspan/")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(grpc="UNAVAILABLE", message="busy"), Retry("gRPC UNAVAILABLE: busy")),
        (Reply(grpc="UNAVAILABLE", retry_after_s=4), Retry("gRPC UNAVAILABLE", after_s=4.0)),
        (Reply(grpc="CANCELLED"), Retry("gRPC CANCELLED")),
        (Reply(grpc="RESOURCE_EXHAUSTED", retry_after_s=0.5), Retry("gRPC RESOURCE_EXHAUSTED", after_s=0.5)),
        (Reply(grpc="RESOURCE_EXHAUSTED"), Rejected(None, "gRPC RESOURCE_EXHAUSTED")),
        (Reply(grpc="INTERNAL"), Retry("gRPC INTERNAL", server_error=True)),
        (Reply(grpc="UNIMPLEMENTED"), EndpointFault("gRPC UNIMPLEMENTED")),
        (Reply(grpc="INVALID_ARGUMENT", message="bad"), Rejected(None, "gRPC INVALID_ARGUMENT: bad")),
        (Reply(rejected=2, message="too old"), Rejected(2, "too old", kind="partial")),
        (Reply(message="slow down"), Delivered("slow down")),
    ],
)
def test_outcomes(collector: Collector, reply: Reply, expected: Outcome) -> None:
    """A sample of the outcome rules, over a real connection."""
    collector.script("logs", reply)
    assert export(collector.grpc_url) == [expected]


def test_message_over_the_receivers_limit_is_too_large(collector: Collector) -> None:
    """grpc's own response to a request above the server's limit."""
    payload = logs_payload(70, padding="x" * (1 << 20))
    (outcome,) = export(collector.grpc_url, payload, 70, compression="none")
    assert isinstance(outcome, TooLarge)


def test_silence_is_retried_after_the_timeout(collector: Collector) -> None:
    """A hanging receiver costs one timeout and does not block the exporter."""
    collector.script("logs", Reply(hang=True))
    first, second = export(collector.grpc_url, times=2, timeout=3)  # the second has that time, too
    assert isinstance(first, Retry)
    assert "DEADLINE_EXCEEDED" in first.reason
    assert second == Delivered()


def test_refused_connection_is_retried() -> None:
    """A collector that is down comes back."""
    with Collector() as collector:
        url = collector.grpc_url
    (outcome,) = export(url)
    assert isinstance(outcome, Retry)
    assert not outcome.server_error


def test_http_server_in_place_of_grpc_is_not_an_ack(collector: Collector) -> None:
    """The ports 4317 and 4318 are easily confused."""
    (outcome,) = export(collector.http_url)
    assert isinstance(outcome, Retry | EndpointFault)


def test_cancelled_export_leaves_the_exporter_usable(collector: Collector) -> None:
    """Shutdown and reload cancel exports in flight."""
    url = collector.grpc_url
    collector.script("logs", Reply(hang=True))

    async def run() -> Outcome:
        exporter = exporter_to(url, protocol="grpc")
        task = asyncio.ensure_future(exporter.export(logs_payload(1), 1))
        await asyncio.to_thread(collector.wait_until, lambda: len(collector.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcome = await exporter.export(logs_payload(1), 1)
        await exporter.aclose()
        return outcome

    assert asyncio.run(run()) == Delivered()


@pytest.mark.parametrize("name", ["x y", "x!", "grpc-timeout", "trace-bin", "ü"])
def test_names_that_grpc_cannot_send_are_a_configuration_error(name: str) -> None:
    """HTTP accepts more header names than gRPC."""
    with pytest.raises(ConfigError, match=r"otlp\.headers"):
        exporter_to("http://127.0.0.1:4317", protocol="grpc", headers={name: SecretStr("s3cret-t0ken")})


def test_value_that_grpc_cannot_send_is_an_endpoint_fault(collector: Collector) -> None:
    """An exporter never raises for a header value."""
    (outcome,) = export(collector.grpc_url, headers={"x-a": SecretStr("s3cret\nt0ken")})
    assert isinstance(outcome, EndpointFault)
    assert "s3cret" not in outcome.reason


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:4317", "http://user:secret@127.0.0.1:4317", "http://"])
def test_address_that_grpc_cannot_use_is_a_configuration_error(url: str) -> None:
    """The error comes at the start and does not show the password."""
    with pytest.raises(ConfigError, match=r"otlp\.endpoint") as caught:
        exporter_to(url, protocol="grpc")
    assert "secret" not in str(caught.value)


def test_zstd_is_a_configuration_error() -> None:
    """gRPC has no zstd, and sending gzip instead would ignore the setting."""
    with pytest.raises(ConfigError, match=r"otlp\.compression"):
        exporter_to("http://127.0.0.1:4317", protocol="grpc", compression="zstd")


def test_grpc_is_imported_only_if_it_is_used() -> None:
    """Importing it costs 80 ms and 10 MB, which OTLP over HTTP does not need."""
    code = "import sys, tailspan_agent.exporter.http, tailspan_agent.exporter.retry; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
