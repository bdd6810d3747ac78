"""What OTLP endpoints answer and what files for a replay hold, of any content: an outcome, or an unreadable line."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.status_pb2 import Status
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan._backoff import MAX_RETRY_AFTER_S, parse_retry_after_s
from tailspan_agent.commands.replay import replay
from tailspan_agent.exporter.dead_letter import summarize
from tailspan_agent.exporter.outcome import (
    Delivered,
    EndpointFault,
    Rejected,
    Retry,
    TooLarge,
    classify_grpc,
    classify_success,
)
from tailspan_agent.otlp.json_lines import UnreadableLineError, decode_line, encode_line
from tailspan_agent.otlp.messages import split_request
from tests.property.effort import fuzz

OUTCOMES = (Delivered, EndpointFault, Rejected, Retry, TooLarge)
SIGNALS = st.sampled_from(["logs", "traces", "metrics"])
CODES = st.sampled_from(
    [
        "UNAVAILABLE",
        "RESOURCE_EXHAUSTED",
        "INVALID_ARGUMENT",
        "INTERNAL",
        "UNIMPLEMENTED",
        "CANCELLED",
        "no such code",
        "",
    ]
)
# Damaged RetryInfo under its true name: the delay is a message of two varints.
RETRY_INFO = st.binary(max_size=20).map(
    lambda value: Status(
        code=8,
        details=[
            AnyMessage(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\x0a" + bytes([len(value)]) + value)
        ],
    ).SerializeToString()
)


@fuzz(300)
@given(code=CODES, message=st.text(max_size=40), details=st.none() | st.binary(max_size=60) | RETRY_INFO)
def test_any_grpc_error(code: str, message: str, details: bytes | None) -> None:
    """A status and its details mean something, and never a wait without end."""
    outcome = classify_grpc(code, message, details)
    assert isinstance(outcome, OUTCOMES)
    if isinstance(outcome, Retry) and outcome.after_s is not None:
        assert 0 <= outcome.after_s <= MAX_RETRY_AFTER_S


@fuzz(300)
@given(
    signal=SIGNALS,
    body=st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)).map(
        lambda value: json.dumps(
            {"partialSuccess": {"rejectedLogRecords": value, "rejectedSpans": value, "errorMessage": value}}
        ).encode()
    ),
    count=st.integers(0, 10),
    content_type=st.sampled_from(["application/json", "application/x-protobuf", "text/html", ""]),
)
@example(signal="logs", body=b"[" * 100_000, count=1, content_type="application/json")
@example(signal="logs", body=b'{"partialSuccess":' * 50_000, count=1, content_type="application/json")
@example(
    signal="logs",
    body=b"\x0a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    count=3,
    content_type="application/x-protobuf",
)
def test_any_success(signal: str, body: bytes, count: int, content_type: str) -> None:
    """However a success is worded, no more records are refused than were sent."""
    outcome = classify_success(signal, body, count, content_type)
    assert isinstance(outcome, Delivered | Rejected)
    if isinstance(outcome, Rejected):
        assert outcome.rejected is not None
        assert 0 <= outcome.rejected <= count


@fuzz(300)
@given(
    value=st.text(max_size=40)
    | st.from_regex(r"[A-Z][a-z]{2}, \d{1,2} [A-Z][a-z]{2} \d{1,6} \d{1,2}:\d\d:\d\d .{0,8}", fullmatch=True)
)
@example(value="9" * 100_000)
@example(value="(" * 20_000)
@example(value="Mon, 01 Jan 0001 00:00:00 +2359")
def test_any_retry_after(value: str) -> None:
    """Seconds, or nothing."""
    seconds = parse_retry_after_s(value, datetime(2026, 1, 1, tzinfo=UTC))
    assert seconds is None or seconds >= 0


KEYS = st.sampled_from(
    [
        "resourceLogs",
        "resourceSpans",
        "resourceMetrics",
        "resource",
        "scopeLogs",
        "scopeSpans",
        "logRecords",
        "spans",
        "attributes",
        "key",
        "value",
        "stringValue",
        "intValue",
        "bytesValue",
        "arrayValue",
        "kvlistValue",
        "values",
        "body",
        "traceId",
        "spanId",
        "timeUnixNano",
        "severityNumber",
        "tailspan",
        "kind",
        "flags",
        "droppedAttributesCount",
    ]
)
OTLP = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["-1", "1e3", "0" * 32, "99999999999999999999", "NaN", "zz", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@fuzz(300)
@given(document=OTLP)
def test_any_otlp_json(document: Any) -> None:
    """What is read as a request can be written, split and read again."""
    with suppress(UnreadableLineError):
        signal, payload = decode_line(json.dumps(document).encode())
        assert decode_line(encode_line(signal, payload)) == (signal, payload)
        split_request(signal, payload)


class Taker:
    """An exporter that takes everything."""

    endpoint = "nowhere"

    async def export(self, payload: bytes, count: int) -> Delivered:
        return Delivered()

    async def aclose(self) -> None:
        return


@fuzz(60)
@given(
    content=st.binary(max_size=300)
    | st.lists(OTLP, max_size=4).map(lambda items: b"\n".join(json.dumps(item).encode() for item in items)),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
    zipped=st.booleans(),
)
def test_any_file_for_a_replay(content: bytes, suffix: str, zipped: bool) -> None:
    """Lines that cannot be read are counted; the dead letter's summary bears them too."""
    with tempfile.TemporaryDirectory() as path:
        file = Path(path) / f"logs{suffix}"
        file.write_bytes(gzip.compress(content) if zipped else content)
        result = asyncio.run(replay([file], {signal: Taker() for signal in ("logs", "traces", "metrics")}))
        assert result.files == 1
        summarize(Path(path))


@pytest.mark.parametrize(
    "unit", [b"[", b'{"resourceLogs":[', b'{"a":', b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":']
)
def test_a_deeply_nested_line_is_unreadable(unit: bytes) -> None:
    """Depth costs neither the stack nor the process."""
    with pytest.raises(UnreadableLineError):
        decode_line(unit * 50_000)
