"""OTLP requests as rows for comparison: each record with the values of its resource and scope."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

REQUESTS: Mapping[str, type[Message]] = {
    "logs": logs_service_pb2.ExportLogsServiceRequest,
    "traces": trace_service_pb2.ExportTraceServiceRequest,
    "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
}


@dataclass(frozen=True)
class LogRow:
    """One log record with what it inherits."""

    body: Any
    time_unix_nano: int
    observed_time_unix_nano: int
    severity_number: int
    severity_text: str
    trace_id: str
    span_id: str
    flags: int
    event_name: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str


@dataclass(frozen=True)
class EventRow:
    """One span event."""

    name: str
    time_unix_nano: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SpanRow:
    """One span with what it inherits; `kind` and `status` are enum names without their prefix."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str
    start_unix_nano: int
    end_unix_nano: int
    status: str
    status_message: str
    flags: int
    attributes: dict[str, Any]
    events: list[EventRow]
    links: list[tuple[str, str]]
    resource: dict[str, Any]
    scope: str


@dataclass(frozen=True)
class MetricRow:
    """One data point: `value` is a number, the point's message for histograms, or None for the end of a series."""

    name: str
    unit: str
    kind: str
    value: Any
    attributes: dict[str, Any]
    start_unix_nano: int
    time_unix_nano: int
    resource: dict[str, Any]
    scope: str


def parse_json(signal: str, text: str | bytes) -> Message:
    """Parse OTLP JSON with google's own parser; only the hex ids need translating.

    Source: OpenTelemetry protocol specification, JSON Protobuf Encoding.
    """
    return json_format.ParseDict(_ids_to_base64(json.loads(text)), REQUESTS[signal]())


def _ids_to_base64(value: Any) -> Any:
    if isinstance(value, list):
        return [_ids_to_base64(item) for item in value]
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(item)).decode()
            if key in {"traceId", "spanId", "parentSpanId"}
            else _ids_to_base64(item)
            for key, item in value.items()
        }
    return value


def plain_value(value: AnyValue) -> Any:
    """Return an AnyValue as the Python value that it stands for."""
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [plain_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return plain_attributes(value.kvlist_value.values)
        case kind:
            return getattr(value, kind)


def plain_attributes(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    """Return a list of attributes as a dict."""
    return {item.key: plain_value(item.value) for item in attributes}


def count_records(signal: str, message: Any) -> int:
    """Return how many log records, spans or metric data points a request has."""
    if signal == "logs":
        return sum(len(scope.log_records) for group in message.resource_logs for scope in group.scope_logs)
    rows = {"traces": span_rows, "metrics": metric_rows}[signal]
    return sum(1 for _ in rows(message))


def log_rows(message: Any) -> Iterator[LogRow]:
    """Flatten an ExportLogsServiceRequest."""
    for group in message.resource_logs:
        resource = plain_attributes(group.resource.attributes)
        for scope in group.scope_logs:
            for record in scope.log_records:
                yield LogRow(
                    body=plain_value(record.body),
                    time_unix_nano=record.time_unix_nano,
                    observed_time_unix_nano=record.observed_time_unix_nano,
                    severity_number=record.severity_number,
                    severity_text=record.severity_text,
                    trace_id=record.trace_id.hex(),
                    span_id=record.span_id.hex(),
                    flags=record.flags,
                    event_name=record.event_name,
                    attributes=plain_attributes(record.attributes),
                    resource=resource,
                    scope=scope.scope.name,
                )


def span_rows(message: Any) -> Iterator[SpanRow]:
    """Flatten an ExportTraceServiceRequest."""
    for group in message.resource_spans:
        resource = plain_attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield SpanRow(
                    name=span.name,
                    kind=span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_span_id=span.parent_span_id.hex(),
                    start_unix_nano=span.start_time_unix_nano,
                    end_unix_nano=span.end_time_unix_nano,
                    status=span.status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    status_message=span.status.message,
                    flags=span.flags,
                    attributes=plain_attributes(span.attributes),
                    events=[EventRow(e.name, e.time_unix_nano, plain_attributes(e.attributes)) for e in span.events],
                    links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    resource=resource,
                    scope=scope.scope.name,
                )


def metric_rows(message: Any) -> Iterator[MetricRow]:
    """Flatten an ExportMetricsServiceRequest."""
    for group in message.resource_metrics:
        resource = plain_attributes(group.resource.attributes)
        for scope in group.scope_metrics:
            for metric in scope.metrics:
                kind = metric.WhichOneof("data")
                if kind is None:
                    continue
                for point in getattr(metric, kind).data_points:
                    number = point.WhichOneof("value") if kind in {"gauge", "sum"} else None
                    value = getattr(point, number) if number else None if point.flags & 1 else point
                    yield MetricRow(
                        name=metric.name,
                        unit=metric.unit,
                        kind=kind,
                        value=value,
                        attributes=plain_attributes(point.attributes),
                        start_unix_nano=point.start_time_unix_nano,
                        time_unix_nano=point.time_unix_nano,
                        resource=resource,
                        scope=scope.scope.name,
                    )
