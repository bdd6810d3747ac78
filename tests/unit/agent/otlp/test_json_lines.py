"""OTLP JSON lines against google's own JSON mapping and opentelemetry-proto's messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.otlp.json_lines import UnreadableLineError, decode_line, encode_line
from tailspan_agent.otlp.messages import MESSAGES, DecodeError
from tests.fakes.otlp_rows import log_rows, parse_json
from tests.fakes.otlp_samples import logs_payload, payload_of
from tests.property.effort import fuzz

_INT_RANGES = {
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
}
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_MAX_DEPTH = 9


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """Return a strategy for one value of a field."""
    if field.message_type is not None:
        return messages(field.message_type, depth + 1)
    if field.type in _INT_RANGES:
        low, high = _INT_RANGES[field.type]
        return st.integers(low, high)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=16)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXT
    return st.floats(allow_nan=False) | st.just(float("nan"))


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> dict[str, Any]:
    """Draw the fields of any message of the OTLP schema, as keyword arguments of its class."""
    fields: dict[str, Any] = {}
    oneofs: set[str] = set()
    # At the top always something, further down ever less.
    likely = depth < 4
    for field in descriptor.fields:
        if depth >= _MAX_DEPTH and field.message_type is not None:
            continue
        oneof = field.containing_oneof
        if (oneof is not None and oneof.name in oneofs) or not (likely or draw(st.integers(0, 2)) == 0):
            continue
        if oneof is not None and len(oneof.fields) > 1 and draw(st.booleans()):
            continue
        one = values(field, depth)
        fields[field.name] = draw(st.lists(one, max_size=2)) if field.is_repeated else draw(one)
        if oneof is not None:
            oneofs.add(oneof.name)
    return fields


@pytest.mark.parametrize("signal", MESSAGES)
@fuzz(40)
@given(data=st.data())
def test_round_trip_of_any_request(signal: str, data: st.DataObject) -> None:
    """Any valid request comes back byte for byte, and google's parser reads the same from the line."""
    request_type = MESSAGES[signal].request
    request = request_type(**data.draw(messages(request_type.DESCRIPTOR)))
    payload = request.SerializeToString(deterministic=True)

    line = encode_line(signal, payload)

    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    found, again = decode_line(line)
    assert found == signal
    assert request_type.FromString(again).SerializeToString(deterministic=True) == payload
    assert parse_json(signal, line).SerializeToString(deterministic=True) == payload


def test_format_of_a_line() -> None:
    """Hex ids, 64-bit integers as strings, enums as numbers, camelCase: the format of the collector's receiver."""
    record = json.loads(encode_line("logs", logs_payload(1)))["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0]
    assert record == {
        "timeUnixNano": "1700000000000000000",
        "traceId": "000102030405060708090a0b0c0d0e0f",
        "spanId": "0001020304050607",
        "flags": 1,
        "body": {"stringValue": "job 0"},
    }
    span = json.loads(encode_line("traces", payload_of("traces")))["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert span["kind"] == 2


def test_note_comes_first_and_is_ignored() -> None:
    """The reason of a rejection is at the start of the line, and OTLP readers ignore it."""
    payload = logs_payload(2)
    line = encode_line("logs", payload, {"reason": "HTTP 400"})
    assert line.startswith(b'{"tailspan":{"reason":"HTTP 400"},"resourceLogs":[')
    assert decode_line(line) == ("logs", payload)


def test_an_empty_request_is_a_line_with_the_key_of_its_signal() -> None:
    """A reader knows the signal by the key."""
    assert encode_line("traces", b"") == b'{"resourceSpans":[]}\n'
    assert decode_line(b'{"resourceSpans":[]}') == ("traces", b"")


def test_encoding_an_invalid_request_is_an_error() -> None:
    """An invalid payload must not become an empty line."""
    with pytest.raises(DecodeError):
        encode_line("logs", b"\xff\xff\xff")


def test_decode_is_as_lenient_as_the_specification_requires() -> None:
    """Numbers for strings, names for enums, null, upper-case ids and unknown keys come from other writers."""
    line = (
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"timeUnixNano":5,"severityNumber":"SEVERITY_NUMBER_INFO",'
        b'"traceId":"000102030405060708090A0B0C0D0E0F","attributes":null,"later":{"a":[1]},'
        b'"body":{"intValue":"7"}}]}],"schemaUrl":"s"}],"extra":1}'
    )
    signal, payload = decode_line(line)
    (row,) = log_rows(MESSAGES[signal].request.FromString(payload))
    assert (row.time_unix_nano, row.severity_number, row.body) == (5, 9, 7)
    assert row.trace_id == "000102030405060708090a0b0c0d0e0f"


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b"5",
        b"{}",
        b'{"other":[]}',
        b'{"resourceLogs":[],"resourceSpans":[]}',
        b'{"resourceLogs":{}}',
        b'{"resourceLogs":[5]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":"xyz"}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":5}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"timeUnixNano":"-1"}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"timeUnixNano":1.5}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"bytesValue":"a"}}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":5}}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"\xff"}}]}]}]}',
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":' + b'{"arrayValue":{"values":[' * 500,
        b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":' + b'{"arrayValue":{"values":[' * 20_000,
    ],
)
def test_unreadable_lines_are_errors(line: bytes) -> None:
    """Any damaged or foreign line is one kind of error."""
    with pytest.raises(UnreadableLineError):
        decode_line(line)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(line: bytes) -> None:
    """Replay reads any file that a user names."""
    with pytest.raises(UnreadableLineError):
        decode_line(line)


def test_deep_nesting_is_an_unreadable_line() -> None:
    """A valid line with deeper nesting than protobuf reads is an unreadable line."""
    depth = 300
    body = b'{"arrayValue":{"values":[' * depth + b'{"intValue":"1"}' + b"]}}" * depth
    line = b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":' + body + b"}]}]}]}"
    with pytest.raises(UnreadableLineError):
        decode_line(line)
