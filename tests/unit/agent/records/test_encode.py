"""OTLP bytes encoded by hand equal those of OpenTelemetry's own messages."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ScopeLogs
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tailspan._identity import span_id, trace_id
from tailspan.logs.clean import MAX_BODY_BYTES, clean, split_long
from tailspan.logs.page import CLEAN, Line, LineRun, LogPage, Stream
from tailspan.models import JobState, JobStatus
from tailspan_agent.otlp.log_record import LogRecordData, Severity, encode_log_record
from tailspan_agent.otlp.requests import encode_resource, logs_request, traces_request
from tailspan_agent.otlp.span import SpanData, SpanEvent, SpanKind, SpanLink, StatusCode, encode_span
from tailspan_agent.records.encode import EncodedLines, LogContext, encode_lines
from tailspan_agent.records.framing import frame_in_python
from tailspan_agent.records.redact import Redactor
from tailspan_agent.records.severity import SEVERITIES, find_severities_in_python, find_severity

TRACE, SPAN = bytes(range(16)), bytes(range(8))

TEXTS = st.sampled_from(
    [b"", b"INFO: x", b"12:00:00 DEBUG y", b"[error] z", b"\x1b[31mWARNING: red\x1b[0m", b"10%\r90%\r", b"\xff\xfe",
     "é€😀".encode(), b"a\0b", b"token=hunter22 and hunter22", b"n" * 127, b"n" * 128, b"n" * 2000, b"n" * 17000]
)  # fmt: skip
BODIES = st.lists(TEXTS | st.binary(max_size=40), min_size=1, max_size=30)


@st.composite
def pages(draw: st.DrawFn) -> LogPage:
    """Return pages like those of services: with uid prefixes or digests, with runs of any length."""
    lines = draw(BODIES)
    runs = []
    left = len(lines)
    while left:
        count = draw(st.integers(1, left))
        start = len(lines) - left
        may_be_clean = all(
            line.isascii() and not re.search(rb"[\x1b\r\0\n]", line) for line in lines[start : start + count]
        )
        runs.append(
            LineRun(
                count,
                draw(st.integers(0, 1 << 63)),
                draw(st.sampled_from([Stream.NONE, Stream.STDOUT, Stream.STDERR])),
                CLEAN if may_be_clean and draw(st.booleans()) else 0,
                draw(st.text("0123456789abcdef", min_size=1, max_size=140)),
            )
        )
        left -= count
    digests = b""
    if draw(st.booleans()):
        digests = draw(st.binary(min_size=8 * len(lines), max_size=8 * len(lines)))
        runs = [run._replace(uid_prefix="") for run in runs]
    return LogPage(lines, runs, b"", digests)


def expected(page: LogPage, min_severity: int = 0, redactor: Redactor | None = None) -> list[LogRecord]:
    """Return the records of a page, encoded line by line with OpenTelemetry's own messages."""
    runs = [run for run in page.runs for _ in range(run.lines)]
    records = []
    for line, time, uid, run in zip(page.lines, page.times_unix_nano(), page.uids(), runs, strict=True):
        stream = Stream.NAMES[run.stream]
        text = clean(line)
        severity = SEVERITIES[find_severity(text.encode())]
        if 0 < severity.number < min_severity:
            continue
        if redactor:
            text = redactor.redact(text)[0]
        parts = split_long(text.encode())
        # A numbered run has the millisecond of its start: no page has a part of it.
        observed = time if page.digests or len(parts) > 1 else run.time_unix_nano
        for number, part in enumerate(parts):
            record = LogRecord(
                time_unix_nano=time,
                observed_time_unix_nano=observed // 1_000_000 * 1_000_000,
                severity_number=severity.number,  # type: ignore[arg-type]
                severity_text=severity.text,
                flags=1,
                trace_id=TRACE,
                span_id=SPAN,
            )
            record.body.string_value = part.decode()
            if stream:
                record.attributes.add(key="log.iostream").value.string_value = stream
            uid_of_part = f"{uid}.{number}" if len(parts) > 1 else uid
            record.attributes.add(key="log.record.uid").value.string_value = uid_of_part
            if len(parts) > 1:
                record.attributes.add(key="tailspan.line.part").value.int_value = number
            records.append(record)
    return records


@pytest.fixture(autouse=True, scope="module", params=["as installed", "in Python"])
def _framing(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of this holds for what was compiled and for what runs elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in Python":
            encode = sys.modules["tailspan_agent.records.encode"]  # the package has a function of that name
            patch.setattr(encode, "find_severities", find_severities_in_python)
            patch.setattr(encode, "frame", frame_in_python)
        yield


def parsed(encoded: EncodedLines) -> list[LogRecord]:
    found = [list(ScopeLogs.FromString(records).log_records) for records, _ in encoded.pieces]
    assert [len(records) for records in found] == [count for _, count in encoded.pieces]
    return [record for records in found for record in records]


def context(**options: Any) -> LogContext:
    return LogContext(trace_id=TRACE, span_id=SPAN, **options)


@given(st.lists(pages(), min_size=1, max_size=3), st.sampled_from([0, 9, 17]), st.booleans())
def test_records_equal_those_of_the_messages(batch: list[LogPage], min_severity: int, redacts: bool) -> None:
    """Any page has exactly the records that upb encodes line by line, and every line is counted."""
    redactor = Redactor({"test": "hunter22"}, [("token=", re.compile(r"token=\w+"))]) if redacts else None
    job = context(min_severity=min_severity, redactor=redactor)
    for page in batch:
        encoded = encode_lines(page, context=job)
        wanted = expected(page, min_severity, redactor)
        assert parsed(encoded) == wanted
        assert encoded.count == len(wanted)
        assert encoded.dropped == len(page.lines) - len(wanted)
        assert encoded.redactions == sum(record.body.string_value.count("[REDACTED]") for record in wanted)


def test_long_lines_are_split_in_place() -> None:
    """Lines above 256 KB become parts in order, with uids of their own, between the lines around them."""
    lines = [
        b"first",
        b"x" * (MAX_BODY_BYTES + 1),
        b"ERROR: " + b"\xe2\x82\xac" * MAX_BODY_BYTES,
        b"DEBUG: no",
        b"last",
    ]
    page = LogPage(lines, [LineRun(2, 7, Stream.STDERR, CLEAN, "ab"), LineRun(3, 100, 0, 0, "cd")], b"")
    encoded = encode_lines(page, context=context(min_severity=9))
    records = parsed(encoded)
    assert records == expected(page, 9)
    assert (encoded.count, encoded.dropped) == (8, 1)
    assert len({attributes_of(record)["log.record.uid"] for record in records}) == 8
    assert "".join(record.body.string_value for record in records[3:7]) == lines[2].decode()
    assert all(len(record.body.string_value.encode()) <= MAX_BODY_BYTES for record in records)


@pytest.mark.parametrize("start", [10**18, (1 << 60) - 2500, (1 << 64) - 5000])
def test_a_full_page_of_one_run(start: int) -> None:
    """A page with the maximum number of lines is one numbered run, also if the low bytes of its times overflow."""
    page = LogPage([b"%d" % number for number in range(5000)], [LineRun(5000, start, 1, CLEAN, "ff")], b"")
    encoded = encode_lines(page, context=context())
    assert parsed(encoded) == expected(page)


def test_times_out_of_range_are_relayed() -> None:
    """A broken clock does not stop the relay: times become the nearest valid ones."""
    lines = [Line(-5, "before 1970"), Line(1 << 70, "far future"), Line(5, "fine")]
    page = LogPage.from_lines(lines, cursor=b"", identity="i", job_id="j")
    records = parsed(encode_lines(page, context=context()))
    assert [record.time_unix_nano for record in records] == [0, (1 << 64) - 1, 5]
    page = LogPage([b"a", b"b", b"c"], [LineRun(3, -1, uid_prefix="x")], b"")
    records = parsed(encode_lines(page, context=context()))
    assert [record.time_unix_nano for record in records] == [0, 1, 2]


def test_an_embedded_newline_does_not_shift_lines() -> None:
    """A message of several lines is one record, without trailing newlines."""
    page = LogPage([b"a\nb", b"c\n", b"d"], [LineRun(3, 1)], b"", bytes(24))
    records = parsed(encode_lines(page, context=context()))
    assert [record.body.string_value for record in records] == ["a\nb", "c", "d"]


def test_an_empty_page_makes_nothing() -> None:
    """No lines, no records, no request."""
    encoded = encode_lines(LogPage([], [], b""), context=context())
    assert (encoded.pieces, encoded.count) == ([], 0)
    assert logs_request([(encode_resource({}), [])]) == b""


def test_a_page_is_encoded_the_same_again() -> None:
    """After a restart, an agent with an empty cache encodes a page to the same bytes."""
    page = LogPage([b"12:00:00 INFO a", b"12:00:01 INFO b"] * 3, [LineRun(6, 1, 1, 0, "aa")], b"")
    job = context()
    first = encode_lines(page, context=job)
    assert encode_lines(page, context=job) == first
    assert encode_lines(page, context=context()) == first


def test_the_context_of_a_job_has_the_ids_of_its_run_span() -> None:
    """Records refer to the run span, whose id any program can compute from the job's id."""
    job = JobStatus.from_state(
        JobState.RUNNING, job_id="j", job_name="etl", identity="i", trace_id=trace_id("i", "j"), attempt=2
    )
    made = LogContext.for_job(job, min_severity="warning")
    assert (made.trace_id.hex(), made.span_id.hex()) == (trace_id("i", "j"), span_id("i", "j", "run", 2))
    assert made.min_severity == 13


VALUES = (
    st.text()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.lists(st.text())
)
ATTRIBUTES = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)
TIMES = st.integers(0, (1 << 64) - 1)


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [item.string_value for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes_of(message: Any) -> dict[str, Any]:
    return {attribute.key: value_of(attribute.value) for attribute in message.attributes}


def typed(attributes: dict[str, Any]) -> dict[str, tuple[type, Any]]:
    """Return attributes with their types: True is not 1."""
    return {key: (type(value), value) for key, value in attributes.items()}


@given(ATTRIBUTES, ATTRIBUTES, st.text(), st.text(), TIMES, st.sampled_from(SEVERITIES))
def test_single_records(
    resource: dict[str, Any], attributes: dict[str, Any], body: str, event: str, time: int, severity: Severity
) -> None:
    """The record of an event has body, attributes of every type, severity, ids and event name."""
    data = LogRecordData(
        time_unix_nano=time,
        severity=severity,
        body=body,
        attributes=attributes,
        trace_id=TRACE,
        span_id=SPAN,
        event_name=event,
    )
    request = ExportLogsServiceRequest.FromString(
        logs_request([(encode_resource(resource), [encode_log_record(data), encode_log_record(data)])])
    )
    (group,) = request.resource_logs
    assert typed(attributes_of(group.resource)) == typed(resource)
    (scope,) = group.scope_logs
    assert (scope.scope.name, bool(scope.scope.version)) == ("tailspan", True)
    assert scope.schema_url == group.schema_url == "https://opentelemetry.io/schemas/1.44.0"
    record, again = scope.log_records
    assert record == again
    assert typed(attributes_of(record)) == typed(attributes)
    assert (record.body.string_value, record.event_name, record.time_unix_nano) == (body, event, time)
    assert (record.severity_number, record.severity_text) == severity
    assert (record.trace_id, record.span_id, record.flags) == (TRACE, SPAN, 1)
    assert record.observed_time_unix_nano == time // 1_000_000 * 1_000_000


@given(ATTRIBUTES, ATTRIBUTES, st.text(), st.text(), TIMES, st.booleans())
def test_spans(
    attributes: dict[str, Any], ledger: dict[str, Any], name: str, message: str, time: int, is_error: bool
) -> None:
    """A span has all its ids, kind, times, attributes, events, links and status."""
    span = SpanData(
        trace_id=TRACE.hex(),
        span_id=SPAN.hex(),
        parent_span_id="ff" * 8,
        name=name,
        kind=SpanKind.SERVER,
        start_unix_nano=time,
        end_unix_nano=time,
        attributes=attributes,
        events=(SpanEvent(time_unix_nano=time, name=name, attributes=ledger), SpanEvent(time_unix_nano=1, name="b")),
        links=(SpanLink(trace_id="ab" * 16, span_id="cd" * 8, flags=0),),
        status=StatusCode.ERROR if is_error else StatusCode.UNSET,
        status_message=message if is_error else "",
    )
    request = ExportTraceServiceRequest.FromString(traces_request([(encode_resource({}), [encode_span(span)])]))
    (read,) = request.resource_spans[0].scope_spans[0].spans
    wanted = Span(
        trace_id=TRACE,
        span_id=SPAN,
        parent_span_id=b"\xff" * 8,
        name=name,
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=time,
        end_time_unix_nano=time,
        flags=1,
    )
    assert typed(attributes_of(read)) == typed(attributes)
    assert typed(attributes_of(read.events[0])) == typed(ledger)
    assert [(event.name, event.time_unix_nano) for event in read.events] == [(name, time), ("b", 1)]
    assert [(link.trace_id.hex(), link.span_id.hex(), link.flags) for link in read.links] == [("ab" * 16, "cd" * 8, 0)]
    assert (read.status.code, read.status.message) == ((2, message) if is_error else (0, ""))
    for field in ("attributes", "events", "links", "status"):
        read.ClearField(field)  # type: ignore[arg-type]
    assert read == wanted


def test_a_root_span_has_no_parent() -> None:
    """Stores recognize a root span by the absent parent, not by zeros."""
    span = SpanData(trace_id=TRACE.hex(), span_id=SPAN.hex(), name="RUN x", start_unix_nano=1, end_unix_nano=2)
    request = ExportTraceServiceRequest.FromString(traces_request([(b"", [encode_span(span)])]))
    assert request.resource_spans[0].scope_spans[0].spans[0].parent_span_id == b""


def test_groups_without_records_are_left_out() -> None:
    """Empty groups are not sent."""
    record = encode_log_record(LogRecordData(time_unix_nano=1, body="", trace_id=TRACE, span_id=SPAN))
    groups = [(encode_resource({"a": "1"}), []), (encode_resource({"a": "2"}), [b"", record])]
    request = ExportLogsServiceRequest.FromString(logs_request(groups))
    assert [attributes_of(group.resource) for group in request.resource_logs] == [{"a": "2"}]
    assert request.resource_logs[0].scope_logs[0].log_records[0].body.WhichOneof("value") == "string_value"


@pytest.mark.parametrize(("value", "sent"), [("\ud800 half", "? half"), (1 << 63, str(1 << 63))])
def test_values_that_otlp_cannot_encode(value: str | int, sent: str) -> None:
    """A lone surrogate or an integer above 64 bits is replaced by the nearest valid value."""
    request = ExportLogsServiceRequest.FromString(logs_request([(encode_resource({"v": value}), [b"\x12\x00"])]))
    assert attributes_of(request.resource_logs[0].resource) == {"v": sent}
