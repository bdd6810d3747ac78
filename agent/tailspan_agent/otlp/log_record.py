"""One log record as OTLP bytes. Pure; field numbers are listed in `tailspan_agent.otlp.requests`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from tailspan.logs.page import NANOS_PER_MS
from tailspan_agent.otlp.span import SAMPLED
from tailspan_agent.otlp.wire import (
    AttributeValue,
    attributes_fields,
    bytes_field,
    fixed32_field,
    fixed64_field,
    in_uint64,
    string_field,
    varint,
    varint_field,
)

__all__ = [
    "UNKNOWN_SEVERITY",
    "LogRecordData",
    "Severity",
    "encode_log_record",
    "observed_field",
    "origin_fields",
    "severity_fields",
]


class Severity(NamedTuple):
    """The severity of a log record.

    Attributes:
        number: 1 (TRACE) to 24 (FATAL4); 0 is unspecified.
        text: The level as the line has it; empty if unspecified.
    """

    number: int
    text: str


UNKNOWN_SEVERITY = Severity(0, "")
_FLAGS = fixed32_field(8, SAMPLED)


class LogRecordData(msgspec.Struct, frozen=True, kw_only=True):
    """One log record.

    Attributes:
        time_unix_nano: When it happened, in ns since the epoch.
        severity: Its severity.
        body: Its text.
        attributes: Its attributes.
        trace_id: 16 bytes; empty for a record without a job.
        span_id: 8 bytes; empty for a record without a job.
        event_name: The name of the event; empty for a line of a log.
    """

    time_unix_nano: int
    severity: Severity = UNKNOWN_SEVERITY
    body: str
    attributes: Mapping[str, AttributeValue] = msgspec.field(default_factory=dict)
    trace_id: bytes = b""
    span_id: bytes = b""
    event_name: str = ""


def encode_log_record(record: LogRecordData) -> bytes:
    """Return one record as a ``ScopeLogs.log_records`` field, ready for `logs_request`."""
    parts = (
        severity_fields(record.severity),
        bytes_field(5, string_field(1, record.body)),
        attributes_fields(6, record.attributes),
        origin_fields(record.trace_id, record.span_id),
        observed_field(record.time_unix_nano),
        string_field(12, record.event_name) if record.event_name else b"",
        fixed64_field(1, record.time_unix_nano),
    )
    return bytes_field(2, b"".join(parts))


@lru_cache(maxsize=64)
def severity_fields(severity: Severity) -> bytes:
    """Return the two fields of a severity; empty if it is unspecified."""
    return varint_field(2, severity.number) + string_field(3, severity.text) if severity.number else b""


def origin_fields(trace_id: bytes, span_id: bytes) -> bytes:
    """Return the fields that all records of one job share."""
    return _FLAGS + b"\x4a\x10%b\x52\x08%b" % (trace_id, span_id) if trace_id else b""


def observed_field(time_unix_nano: int) -> bytes:
    """Return the observed time: the millisecond of the record's own time.

    It follows from the record, not from the clock: a record that is sent again is equal, and a store that drops equal
    records drops it (Loki compares this field, too). Nanoseconds count lines within an instant: where a page begins
    must not matter.
    """
    return _pack_observed(_OBSERVED_TAG, in_uint64(time_unix_nano - time_unix_nano % NANOS_PER_MS))


_OBSERVED_TAG = varint(11 << 3 | 1)
_pack_observed = struct.Struct("<cQ").pack
