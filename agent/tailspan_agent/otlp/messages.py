"""OTLP export requests as protobuf messages: the types of each signal, counting records, halving a request.

Importing this module imports protobuf, which costs 15 ms. What runs for every batch (`requests`, `log_record`, `span`)
does without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

from tailspan._plural import plural
from tailspan.config.signals import Signal
from tailspan_agent.otlp.wire import bytes_field, varint_at

__all__ = [
    "MESSAGES",
    "DecodeError",
    "SignalMessages",
    "count_records",
    "parse_request",
    "shorten_request",
    "split_by_resource",
    "split_request",
]


@dataclass(frozen=True, slots=True)
class SignalMessages:
    """The OTLP messages of one signal. A *record* is a log record, a span or a metric.

    Attributes:
        request: Export*ServiceRequest.
        response: Export*ServiceResponse.
        resources, scopes, records: Field names on the way from the request to the records.
        json_key: The key of the resources in OTLP JSON.
    """

    request: type[Any]
    response: type[Any]
    resources: str
    scopes: str
    records: str
    json_key: str


MESSAGES: Final[Mapping[Signal, SignalMessages]] = {
    "logs": SignalMessages(
        logs.ExportLogsServiceRequest,
        logs.ExportLogsServiceResponse,
        "resource_logs",
        "scope_logs",
        "log_records",
        "resourceLogs",
    ),
    "traces": SignalMessages(
        traces.ExportTraceServiceRequest,
        traces.ExportTraceServiceResponse,
        "resource_spans",
        "scope_spans",
        "spans",
        "resourceSpans",
    ),
    "metrics": SignalMessages(
        metrics.ExportMetricsServiceRequest,
        metrics.ExportMetricsServiceResponse,
        "resource_metrics",
        "scope_metrics",
        "metrics",
        "resourceMetrics",
    ),
}


_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


def parse_request(signal: Signal, payload: bytes) -> Any:
    """Return the payload as the signal's Export*ServiceRequest.

    Raises:
        DecodeError: The payload is not a valid request.
    """
    return MESSAGES[signal].request.FromString(payload)


def count_records(signal: Signal, request: Message) -> int:
    """Return the number of log records, spans or metrics in a request."""
    return sum(len(records) for _, _, records in _groups(MESSAGES[signal], request))


def split_request(signal: Signal, payload: bytes) -> list[tuple[bytes, int]]:
    """Halve a request by records, keeping order, resources and scopes.

    Args:
        signal: The signal.
        payload: A serialized Export*ServiceRequest.

    Returns:
        Two pairs (payload, number of records), or one pair if the request has fewer than two records.

    Raises:
        DecodeError: The payload is not a valid request.
    """
    messages = MESSAGES[signal]
    request = parse_request(signal, payload)
    total = count_records(signal, request)
    if total < 2:
        return [(payload, total)]
    halves = messages.request(), messages.request()
    room = total // 2
    for resource, scope, records in _groups(messages, request):
        for half, part in ((halves[0], records[:room]), (halves[1], records[room:])):
            if part:
                _append(messages, half, resource, scope, part)
        room = max(0, room - len(records))
    return [(halves[0].SerializeToString(), total // 2), (halves[1].SerializeToString(), total - total // 2)]


def split_by_resource(payload: bytes) -> list[tuple[bytes, int]]:
    """Split a request into one for each resource, in order.

    Resources are not decoded: one that is not valid must not spoil the others.

    Returns:
        Pairs (payload, number of records).

    Raises:
        DecodeError: The payload is not made of resources.
    """
    try:
        return [(bytes_field(1, resource), _count_in(resource)) for resource in _parts(payload, 1)]
    except ValueError as error:
        raise DecodeError(str(error)) from None


def _count_in(resource: bytes) -> int:
    """Return the number of records of an encoded resource: field 2 has the scopes, and theirs the records."""
    return sum(1 for scope in _parts(resource, 2) for _ in _parts(scope, 2))


def _parts(message: bytes, number: int) -> Iterator[bytes]:
    """Yield the contents of the fields of one number of an encoded message, which are messages.

    Raises:
        ValueError: The message is cut off or has other kinds of fields.
    """
    position = 0
    while position < len(message):
        tag, position = varint_at(message, position)
        if tag & 7 == _VARINT:
            _, position = varint_at(message, position)
            continue
        size, position = (_FIXED[tag & 7], position) if tag & 7 in _FIXED else varint_at(message, position)
        if position + size > len(message) or tag & 7 not in (*_FIXED, _BYTES):
            raise ValueError("the field is not whole")
        if tag == number << 3 | _BYTES:
            yield message[position : position + size]
        position += size


def shorten_request(signal: Signal, payload: bytes, max_bytes: int) -> bytes | None:
    """Shorten the long texts of a request's records in their middle, and mark the records.

    Args:
        signal: The signal.
        payload: A serialized Export*ServiceRequest.
        max_bytes: The most that a text may take, in bytes.

    Returns:
        The shortened request; None if no text is longer.

    Raises:
        DecodeError: The payload is not a valid request.
    """
    messages = MESSAGES[signal]
    request = parse_request(signal, payload)
    left_out = 0
    for _, _, records in _groups(messages, request):
        for record in records:
            values = [item.value for item in getattr(record, "attributes", ())]
            values += [item.value for event in getattr(record, "events", ()) for item in event.attributes]
            values += [record.body] if signal == "logs" else []
            cut = sum(_shorten_value(value, max_bytes) for value in values)
            if cut and hasattr(record, "attributes"):
                record.attributes.add(key="tailspan.shortened_bytes").value.int_value = cut
            left_out += cut
    return bytes(request.SerializeToString()) if left_out else None


def _shorten_value(value: Any, max_bytes: int) -> int:
    """Shorten a string value in its middle; return the number of bytes left out."""
    text = value.string_value if value.WhichOneof("value") == "string_value" else ""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return 0
    half = max_bytes // 2
    left_out = len(encoded) - 2 * half
    head, tail = encoded[:half].decode(errors="ignore"), encoded[-half:].decode(errors="ignore")
    value.string_value = f"{head} … {left_out} {plural(left_out, 'byte')} left out … {tail}"
    return left_out


def _groups(messages: SignalMessages, request: Any) -> Iterator[tuple[Any, Any, Any]]:
    for resource in getattr(request, messages.resources):
        for scope in getattr(resource, messages.scopes):
            yield resource, scope, getattr(scope, messages.records)


def _append(messages: SignalMessages, request: Any, resource: Any, scope: Any, records: Any) -> None:
    new_resource = getattr(request, messages.resources).add(schema_url=resource.schema_url)
    if resource.HasField("resource"):
        new_resource.resource.CopyFrom(resource.resource)
    new_scope = getattr(new_resource, messages.scopes).add(schema_url=scope.schema_url)
    if scope.HasField("scope"):
        new_scope.scope.CopyFrom(scope.scope)
    getattr(new_scope, messages.records).extend(records)
