"""The exporters against a real collector (rotel), which forwards what it understood to our receiver."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, TooLarge
from tailspan_agent.otlp.json_lines import encode_line
from tests.fakes.collector import Collector
from tests.fakes.otlp_samples import SPAN_ID, TRACE_ID, exporter_to, logs_payload, metrics_payload, traces_payload
from tests.fakes.rotel import Rotel, rotel_binary

pytestmark = pytest.mark.skipif(rotel_binary() is None, reason="there is no rotel that runs here")


@pytest.fixture(scope="module")
def behind() -> Iterator[Collector]:
    """Receives what the collector forwards."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def rotel(behind: Collector) -> Iterator[Rotel]:
    """The collector; one process for the module."""
    with Rotel(behind) as process:
        yield process


@pytest.fixture(autouse=True)
def _empty(behind: Collector) -> None:
    """Each test counts its own records."""
    behind.clear()


def export(rotel: Rotel, protocol: str, signal: str, payload: bytes, compression: str = "gzip") -> Outcome:
    async def run() -> Outcome:
        url = rotel.grpc_url if protocol == "grpc" else rotel.http_url
        exporter = exporter_to(url, signal=signal, protocol=protocol, compression=compression)
        try:
            return await exporter.export(payload, 1)
        finally:
            await exporter.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_all_signals_arrive_through_a_real_collector(
    rotel: Rotel, behind: Collector, protocol: str, compression: str
) -> None:
    """The collector decodes our requests and forwards the same records."""
    assert export(rotel, protocol, "logs", logs_payload(5), compression) == Delivered()
    assert export(rotel, protocol, "traces", traces_payload("RUN job"), compression) == Delivered()
    assert export(rotel, protocol, "metrics", metrics_payload(7), compression) == Delivered()
    behind.wait_until(lambda: len(behind.log_records()) >= 5 and bool(behind.spans()) and bool(behind.metrics()))
    records = behind.log_records()
    assert [record.body for record in records] == [f"job {index}" for index in range(5)]
    assert {record.trace_id for record in records} == {TRACE_ID.hex()}
    assert {record.resource["service.name"] for record in records} == {"job"}
    (span,) = behind.spans()
    assert (span.name, span.kind, span.span_id) == ("RUN job", "SERVER", SPAN_ID.hex())
    (metric,) = behind.metrics()
    assert (metric.name, metric.unit, metric.value) == ("tailspan.job.tasks.total", "{task}", 7)


def test_our_json_lines_are_read_by_a_real_collector(rotel: Rotel, behind: Collector) -> None:
    """OTLP files and dead letters, with their reasons, are valid OTLP JSON for another implementation."""
    for note in (None, {"reason": "HTTP 400"}):
        for signal, payload in (("logs", logs_payload(2)), ("traces", traces_payload("RUN job"))):
            answer = httpx.post(
                f"{rotel.http_url}/v1/{signal}",
                content=encode_line(signal, payload, note),
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == 200, answer.text
    behind.wait_until(lambda: len(behind.log_records()) >= 4 and len(behind.spans()) >= 2)
    assert {record.trace_id for record in behind.log_records()} == {TRACE_ID.hex()}


def test_a_real_collectors_size_limit_is_recognised(rotel: Rotel) -> None:
    """tonic answers OUT_OF_RANGE, which OTLP calls retryable: the same request would be retried for ever."""
    payload = logs_payload(5, padding="x" * (1 << 20))
    assert isinstance(export(rotel, "grpc", "logs", payload, "none"), TooLarge)


def test_a_wrong_path_is_an_endpoint_fault(rotel: Rotel) -> None:
    """A base URL with a wrong path must not lose records."""

    async def run() -> Outcome:
        exporter = exporter_to(f"{rotel.http_url}/otlp/v1/logs")
        try:
            return await exporter.export(logs_payload(1), 1)
        finally:
            await exporter.aclose()

    assert isinstance(asyncio.run(run()), EndpointFault)
