"""OTLP export requests as messages: which types each signal has, how many records, and how to halve one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

__all__ = ["SIGNALS", "DecodeError", "Signal", "count_records", "parse_request", "split_request"]


@dataclass(frozen=True, slots=True)
class Signal:
    """The OTLP types of one signal. A *record* is a log record, a span or a metric.

    Attributes:
        request: Export*ServiceRequest.
        response: Export*ServiceResponse.
        grpc_method: Path of the Export method.
        resources, scopes, records: Field names down to the records.
        json_key: What an OTLP JSON document of this signal starts with.
    """

    request: type[Any]
    response: type[Any]
    grpc_method: str
    resources: str
    scopes: str
    records: str
    json_key: str


SIGNALS: Final[Mapping[str, Signal]] = {
    "logs": Signal(
        logs.ExportLogsServiceRequest,
        logs.ExportLogsServiceResponse,
        "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
        "resource_logs",
        "scope_logs",
        "log_records",
        "resourceLogs",
    ),
    "traces": Signal(
        traces.ExportTraceServiceRequest,
        traces.ExportTraceServiceResponse,
        "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
        "resource_spans",
        "scope_spans",
        "spans",
        "resourceSpans",
    ),
    "metrics": Signal(
        metrics.ExportMetricsServiceRequest,
        metrics.ExportMetricsServiceResponse,
        "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
        "resource_metrics",
        "scope_metrics",
        "metrics",
        "resourceMetrics",
    ),
}


def parse_request(signal: str, payload: bytes) -> Any:
    """Return the payload as the signal's Export*ServiceRequest.

    Raises:
        DecodeError: It is none.
    """
    return SIGNALS[signal].request.FromString(payload)


def count_records(signal: str, request: Message) -> int:
    """Return how many log records, spans or metrics a request has."""
    return sum(len(records) for _, _, records in _groups(SIGNALS[signal], request))


def split_request(signal: str, payload: bytes) -> list[tuple[bytes, int]]:
    """Halve a request by records, keeping order, resources and scopes.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        payload: A serialized Export*ServiceRequest.

    Returns:
        Two (payload, number of records), or the payload alone when it has fewer than two records.
    """
    kind = SIGNALS[signal]
    request = parse_request(signal, payload)
    total = count_records(signal, request)
    if total < 2:
        return [(payload, total)]
    halves = kind.request(), kind.request()
    room = total // 2
    for resource, scope, records in _groups(kind, request):
        for half, part in ((halves[0], records[:room]), (halves[1], records[room:])):
            if part:
                _append(kind, half, resource, scope, part)
        room = max(0, room - len(records))
    return [(halves[0].SerializeToString(), total // 2), (halves[1].SerializeToString(), total - total // 2)]


def _groups(kind: Signal, request: Any) -> Iterator[tuple[Any, Any, Any]]:
    for resource in getattr(request, kind.resources):
        for scope in getattr(resource, kind.scopes):
            yield resource, scope, getattr(scope, kind.records)


def _append(kind: Signal, request: Any, resource: Any, scope: Any, records: Any) -> None:
    new_resource = getattr(request, kind.resources).add(schema_url=resource.schema_url)
    if resource.HasField("resource"):
        new_resource.resource.CopyFrom(resource.resource)
    new_scope = getattr(new_resource, kind.scopes).add(schema_url=scope.schema_url)
    if scope.HasField("scope"):
        new_scope.scope.CopyFrom(scope.scope)
    getattr(new_scope, kind.records).extend(records)
