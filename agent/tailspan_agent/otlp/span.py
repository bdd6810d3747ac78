"""One span as OTLP bytes. Pure; field numbers are listed in `tailspan_agent.otlp.requests`."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from tailspan_agent.otlp.wire import (
    AttributeValue,
    attributes_fields,
    bytes_field,
    fixed32_field,
    fixed64_field,
    in_uint64,
    string_field,
    varint_field,
)

__all__ = ["SAMPLED", "SpanData", "SpanEvent", "SpanKind", "SpanLink", "StatusCode", "encode_span"]

SAMPLED = 1
"""The W3C trace flags of all spans and records; the random bit is off, since ids are hashes."""


class SpanKind(enum.IntEnum):
    """The values of SpanKind in trace.proto that the agent uses."""

    INTERNAL = 1
    SERVER = 2


class StatusCode(enum.IntEnum):
    """The values of Status.StatusCode in trace.proto that the agent uses; OK is reserved for users."""

    UNSET = 0
    ERROR = 2


class SpanEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a span; its time is in ns since the epoch."""

    time_unix_nano: int
    name: str
    attributes: Mapping[str, AttributeValue] = msgspec.field(default_factory=dict)


class SpanLink(msgspec.Struct, frozen=True, kw_only=True):
    """A link to a span of another trace; ids are hexadecimal digits."""

    trace_id: str
    span_id: str
    flags: int = SAMPLED


class SpanData(msgspec.Struct, frozen=True, kw_only=True):
    """A span that has ended.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        parent_span_id: 16 hexadecimal digits; empty for a root span.
        name: Its name.
        kind: Its SpanKind.
        start_unix_nano: When it started, in ns since the epoch.
        end_unix_nano: When it ended, in ns since the epoch.
        attributes: Its attributes.
        events: Its events, oldest first.
        links: Its links to other traces.
        status: ERROR or UNSET.
        status_message: The reason of ERROR.
    """

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    name: str
    kind: SpanKind = SpanKind.INTERNAL
    start_unix_nano: int
    end_unix_nano: int
    attributes: Mapping[str, AttributeValue] = msgspec.field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    status: StatusCode = StatusCode.UNSET
    status_message: str = ""


def encode_span(span: SpanData) -> bytes:
    """Return the span as a ``ScopeSpans.spans`` field, ready for `tailspan_agent.otlp.requests.traces_request`."""
    start_ns, end_ns = in_uint64(span.start_unix_nano), in_uint64(span.end_unix_nano)
    parts = [
        _ids(span.trace_id, span.span_id),
        b"\x22\x08" + bytes.fromhex(span.parent_span_id) if span.parent_span_id else b"",
        _name_field(span.name),
        _KIND_AND_TIMES.pack(6 << 3, span.kind, 7 << 3 | 1, start_ns, 8 << 3 | 1, end_ns),
        attributes_fields(9, span.attributes),
    ]
    for event in span.events:
        attributes = attributes_fields(3, event.attributes)
        parts.append(bytes_field(11, fixed64_field(1, event.time_unix_nano) + string_field(2, event.name) + attributes))
    parts += [bytes_field(13, _ids(link.trace_id, link.span_id) + fixed32_field(6, link.flags)) for link in span.links]
    if span.status != StatusCode.UNSET:
        parts.append(bytes_field(15, string_field(2, span.status_message) + varint_field(3, span.status)))
    parts.append(_FLAGS)
    return bytes_field(2, b"".join(parts))


@lru_cache(maxsize=64)  # the phases of all jobs have the same names
def _name_field(name: str) -> bytes:
    return string_field(5, name)


def _ids(trace_id: str, span_id: str) -> bytes:
    return b"\x0a\x10%b\x12\x08%b" % (bytes.fromhex(trace_id), bytes.fromhex(span_id))


_KIND_AND_TIMES = struct.Struct("<BBBQBQ")
_FLAGS = fixed32_field(16, SAMPLED)
