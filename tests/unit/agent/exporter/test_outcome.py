"""The outcome of each response: every rule as a row of a table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tailspan_agent.exporter.outcome import (
    MAX_RETRY_AFTER_S,
    Delivered,
    EndpointFault,
    Outcome,
    Rejected,
    Retry,
    TooLarge,
    classify_grpc,
    classify_http,
)

NOW = datetime(2026, 7, 26, 12, 0, 0, tzinfo=UTC)


def http(status: int, headers: dict[str, str] | None = None, body: bytes = b"", signal: str = "logs") -> Outcome:
    return classify_http(signal, status, headers or {}, body, 10, NOW)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_success(status: int) -> None:
    """Loki returns 204 where the specification requires 200."""
    assert http(status) == Delivered()


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_statuses_that_are_retried_for_ever(status: int) -> None:
    """The four that the specification lists as retryable."""
    assert http(status) == Retry(f"HTTP {status}")


@pytest.mark.parametrize("status", [500, 501, 505, 507, 520, 599, 408, 425])
def test_statuses_that_are_retried_a_few_times(status: int) -> None:
    """Gateways return them now and then, but the batch may also be the cause."""
    assert http(status) == Retry(f"HTTP {status}", server_error=True)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 401, 402, 403, 404, 405, 407, 410, 415, 431])
def test_statuses_about_the_endpoint(status: int) -> None:
    """A wrong address or wrong credentials must not cost a record."""
    assert isinstance(http(status), EndpointFault)


@pytest.mark.parametrize("status", [400, 422])
def test_statuses_about_the_batch(status: int) -> None:
    """The same bytes would be rejected again."""
    assert http(status) == Rejected(None, f"HTTP {status}")


def test_413_is_too_large() -> None:
    """Parts of the request may be below the limit."""
    assert http(413) == TooLarge("HTTP 413")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("Sun, 26 Jul 2026 12:00:30 GMT", 30.0),
        ("Sun, 26 Jul 2026 11:00:00 GMT", 0.0),
        ("999999999", MAX_RETRY_AFTER_S),
        ("Sun, 26 Jul 2099 12:00:00 GMT", MAX_RETRY_AFTER_S),
        ("soon", None),
        ("", None),
        ("nan", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_retry_after(status: int, value: str, seconds: float | None) -> None:
    """Seconds or a date; a wrong value must not stop exports for days."""
    outcome = http(status, {"retry-after": value})
    assert isinstance(outcome, Retry)
    assert outcome.after_s == seconds


@pytest.mark.parametrize(
    ("signal", "response_type", "field"),
    [
        ("logs", ExportLogsServiceResponse, "rejected_log_records"),
        ("traces", ExportTraceServiceResponse, "rejected_spans"),
        ("metrics", ExportMetricsServiceResponse, "rejected_data_points"),
    ],
)
def test_partial_success(signal: str, response_type: type[Any], field: str) -> None:
    """Rejected records are neither retried nor counted as delivered."""
    body = response_type(partial_success={field: 4, "error_message": "too old"}).SerializeToString()
    assert http(200, body=body, signal=signal) == Rejected(4, "too old", kind="partial")


def test_partial_success_as_json() -> None:
    """Some endpoints respond in JSON to any request."""
    body = b'{"partialSuccess":{"rejectedLogRecords":"4","errorMessage":"too old"}}'
    outcome = http(200, {"content-type": "application/json; charset=utf-8"}, body)
    assert outcome == Rejected(4, "too old", kind="partial")


def test_partial_success_of_more_than_was_sent() -> None:
    """An endpoint cannot reject more records than were sent."""
    body = ExportLogsServiceResponse(partial_success={"rejected_log_records": 99}).SerializeToString()
    outcome = http(200, body=body)
    assert isinstance(outcome, Rejected)
    assert outcome.rejected == 10


@pytest.mark.parametrize("rejected", [0, -3])
def test_message_without_rejections_is_a_warning(rejected: int) -> None:
    """The specification's form of a warning; a negative count is a bug of the endpoint."""
    body = ExportLogsServiceResponse(partial_success={"rejected_log_records": rejected, "error_message": "slow down"})
    assert http(200, body=body.SerializeToString()) == Delivered("slow down")


def test_empty_partial_success_is_plain_success() -> None:
    """It equals a missing one."""
    body = ExportLogsServiceResponse(partial_success={}).SerializeToString()
    assert http(200, body=body) == Delivered()


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/html", b"<html>welcome</html>"), ("application/json", b"[1, 2"), ("application/x-protobuf", b"\xff\xff")],
)
def test_success_with_garbage_is_delivered_with_a_warning(content_type: str, body: bytes) -> None:
    """The status decides, but a web page that returns 200 for everything is noticed."""
    outcome = http(200, {"content-type": content_type}, body)
    assert isinstance(outcome, Delivered)
    assert outcome.warning


def test_error_message_of_a_status_body() -> None:
    """OTLP errors have a google.rpc.Status; the log shows its message, not its bytes. Loki's has no code."""
    for code in (3, 0):
        body = Status(code=code, message="bad span id").SerializeToString()
        for content_type in ("application/x-protobuf", "application/octet-stream", ""):
            assert http(400, {"content-type": content_type}, body) == Rejected(None, "HTTP 400: bad span id")


@pytest.mark.parametrize(
    "text",
    [
        "ingestion rate limit exceeded for user fake (limit: 4194304 bytes/sec) while attempting to ingest "
        "'17555' lines totaling '6864005' bytes, reduce log volume",
        "Per stream rate limit exceeded (limit: 3MB/sec) while attempting to ingest for stream "
        "'{service_name=\"etl\"}' totaling 16MB, consider splitting a stream",
        "ingestion rate limit (local: 15000000 bytes, global: 0 bytes) exceeded while adding 20000000 bytes",
        '{"code":8,"message":"rate limit (limit: 1.5MB/sec), lines totaling 1600kB"}',
    ],
)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_a_limit_below_the_bytes_of_the_request_is_too_large(text: str, status: int) -> None:
    """Waiting does not help. A request below the limit only has to wait."""
    assert isinstance(http(status, body=text.encode()), TooLarge)
    below = (
        text.replace("6864005", "4194304").replace("16MB", "900kB").replace("20000000", "10").replace("1600k", "16k")
    )
    assert isinstance(http(status, body=below.encode()), Retry)


@pytest.mark.parametrize(
    ("text", "kind", "ignored"),
    [
        ("entry too far behind', user 'fake', total ignored: 3 out of 10 for stream: {}", "too_old", 3),
        ("entry too far behind', user 'fake', total ignored: 3 out of 7 for stream: {}", "too_old", None),
        ("2 errors like: entry for stream '{}' has timestamp too old: T", "too_old", None),
        ("entry for stream '{}' has timestamp too new: T", "too_new", None),
        ("entry out of order", "too_old", None),
        ("bad id", "invalid", None),
    ],
)
def test_reasons_of_rejected_lines(text: str, kind: str, ignored: int | None) -> None:
    """The number of ignored lines counts only if the store means the whole request: it may report one of its parts."""
    assert http(400, body=text.encode()) == Rejected(None, f"HTTP 400: {text}", kind, ignored=ignored)


def test_error_message_is_short_and_printable() -> None:
    """An HTML page or a control sequence must not flood or garble the agent's log."""
    outcome = http(400, {"content-type": "text/html"}, b"\x1b[31m<html>\n" + b"x" * 10_000)
    assert isinstance(outcome, Rejected)
    assert len(outcome.reason) < 400
    assert outcome.reason.isprintable()


def test_redirect_names_the_remedy() -> None:
    """Most often, the endpoint is http:// instead of https://."""
    outcome = http(301, {"location": "https://elsewhere/"})
    assert isinstance(outcome, EndpointFault)
    assert "configure the final address" in outcome.reason


@given(status=st.integers(100, 999), body=st.binary(max_size=200), content_type=st.text(max_size=20))
def test_every_http_response_has_an_outcome(status: int, body: bytes, content_type: str) -> None:
    """Any response gives an outcome, never an exception."""
    outcome = classify_http("logs", status, {"content-type": content_type}, body, 10, NOW)
    assert isinstance(outcome, Delivered | Retry | Rejected | EndpointFault | TooLarge)
    assert isinstance(outcome, Delivered | Rejected) or not 200 <= status < 300


def details(*, retry_s: float | None) -> bytes:
    """Return ``grpc-status-details-bin`` with a detail of another kind first."""
    status = Status(code=8, message="busy")
    status.details.add().Pack(ErrorInfo(reason="QUOTA"))
    if retry_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(retry_s * 1000))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status.SerializeToString()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("CANCELLED", Retry("gRPC CANCELLED: m")),
        ("DEADLINE_EXCEEDED", Retry("gRPC DEADLINE_EXCEEDED: m")),
        ("ABORTED", Retry("gRPC ABORTED: m")),
        ("OUT_OF_RANGE", Retry("gRPC OUT_OF_RANGE: m")),
        ("UNAVAILABLE", Retry("gRPC UNAVAILABLE: m")),
        ("DATA_LOSS", Retry("gRPC DATA_LOSS: m")),
        ("INTERNAL", Retry("gRPC INTERNAL: m", server_error=True)),
        ("UNKNOWN", Retry("gRPC UNKNOWN: m", server_error=True)),
        ("UNIMPLEMENTED", EndpointFault("gRPC UNIMPLEMENTED: m")),
        ("UNAUTHENTICATED", EndpointFault("gRPC UNAUTHENTICATED: m")),
        ("PERMISSION_DENIED", EndpointFault("gRPC PERMISSION_DENIED: m")),
        ("INVALID_ARGUMENT", Rejected(None, "gRPC INVALID_ARGUMENT: m")),
        ("FAILED_PRECONDITION", Rejected(None, "gRPC FAILED_PRECONDITION: m")),
        ("NOT_FOUND", Rejected(None, "gRPC NOT_FOUND: m")),
        ("ALREADY_EXISTS", Rejected(None, "gRPC ALREADY_EXISTS: m")),
        ("RESOURCE_EXHAUSTED", Rejected(None, "gRPC RESOURCE_EXHAUSTED: m")),
    ],
)
def test_grpc_codes(code: str, expected: Outcome) -> None:
    """Every status code that a server may return."""
    assert classify_grpc(code, "m", None) == expected


@pytest.mark.parametrize(("retry_s", "after_s"), [(2.5, 2.5), (0, 0.0), (-1, 0.0), (999_999, MAX_RETRY_AFTER_S)])
def test_resource_exhausted_with_retry_info_is_retried(retry_s: float, after_s: float) -> None:
    """With RetryInfo, a gRPC server reports when the quota is available again."""
    assert classify_grpc("RESOURCE_EXHAUSTED", "m", details(retry_s=retry_s)) == Retry(
        "gRPC RESOURCE_EXHAUSTED: m", after_s=after_s
    )


@pytest.mark.parametrize("status_details", [None, b"", b"\xff\xff\xff", details(retry_s=None)])
def test_resource_exhausted_without_retry_info_is_rejected(status_details: bytes | None) -> None:
    """By the specification, without RetryInfo a retry does not help."""
    assert isinstance(classify_grpc("RESOURCE_EXHAUSTED", "m", status_details), Rejected)


def test_unavailable_with_retry_info_waits_so_long() -> None:
    """A server that is up throttles."""
    assert classify_grpc("UNAVAILABLE", "", details(retry_s=3)) == Retry("gRPC UNAVAILABLE", after_s=3.0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (6079900 vs. 4194304)"),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (6079900 vs. 4194304)"),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 6079900"),
        ("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size."),
        ("OUT_OF_RANGE", "Error, decoded message length too large: found 6079900 bytes, the limit is: 4194304 bytes"),
    ],
)
def test_grpc_message_over_the_limit_is_too_large(code: str, message: str) -> None:
    """The messages of grpc-go, -core, -java, -dotnet and tonic (rotel): retrying the whole request would never end."""
    assert isinstance(classify_grpc(code, message, None), TooLarge)


def test_grpc_tls_error_is_an_endpoint_fault() -> None:
    """Retrying does not make a certificate valid."""
    message = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Ssl handshake failed: ..."
    assert isinstance(classify_grpc("UNAVAILABLE", message, None), EndpointFault)
