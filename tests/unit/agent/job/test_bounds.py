"""What a job service may return, and what of it enters the agent."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs

from tailspan._identity import trace_id
from tailspan.logs.clean import clean
from tailspan.logs.page import CLEAN, Line, LineRun, LogPage, TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan_agent.job.bounds import (
    DROPPED_ATTRIBUTES,
    LATEST_NS,
    MAX_ATTRIBUTE_BYTES,
    MAX_ATTRIBUTES,
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    bounded_page,
    bounded_row,
    bounded_status,
    bounded_tasks,
    is_reserved,
)
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import spans_of
from tailspan_agent.job.task_spans import LineTimes
from tailspan_agent.otlp.span import encode_span
from tailspan_agent.records.encode import LogContext, encode_lines

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
SURROGATE = "\ud83d"


def status(**fields: Any) -> JobStatus:
    own = {"job_id": "j", "job_name": "etl", "identity": "id", "trace_id": trace_id("id", "j")}
    return dataclasses.replace(JobStatus.from_state(JobState.FAILED, **own), **fields)


def bounded(**fields: Any) -> JobStatus:
    return bounded_status(status(**fields), "j", identity="id", now=NOW)[0]


def test_a_status_in_range_is_the_same_object() -> None:
    """Each poll of each job passes here: what is in range is not copied, and nothing is noted."""
    given_status = status(
        started_at=NOW - timedelta(hours=1),
        finished_at=NOW,
        exit_code=3,
        error="no such file",
        attributes={"team": "geo", "deployment.environment.name": "prod", "hostel": "x"},
        details={"process.command": "etl", "host.name": "h1"},
    )
    assert bounded_status(given_status, "j", identity="id", now=NOW) == (given_status, [], 0)
    assert bounded_status(given_status, "j", identity="id", now=NOW)[0] is given_status


@pytest.mark.parametrize("name", ["submitted_at", "started_at", "finished_at", "job_status_date", "last_heartbeat"])
@pytest.mark.parametrize(
    "time",
    [
        datetime(9999, 12, 31, 23, 59, 59, 999999, UTC),
        datetime.max,  # noqa: DTZ901 - a plugin may return one without a zone
        datetime(9999, 12, 31, tzinfo=timezone(-timedelta(hours=23))),
        datetime(2262, 4, 12, tzinfo=UTC),
        datetime(2099, 1, 1, tzinfo=UTC),
        NOW + timedelta(days=2),
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=23))),
        datetime(1970, 1, 1, tzinfo=UTC),
        1e300,
        "2026-01-01T00:00:00Z",
    ],
)
def test_a_time_that_cannot_be_is_not_known(name: str, time: Any) -> None:
    """The usual values for "no time", times of a wrong clock, and values that are not times."""
    changed, notes, _ = bounded_status(status(**{name: time}), "j", identity="id", now=NOW)
    assert getattr(changed, name) is None
    assert [note.split()[0] for note in notes if note.startswith(name)] == [name]


def test_times_of_clocks_that_differ_stay() -> None:
    """A day ahead is possible: clocks and time zones differ. A time without a zone is UTC."""
    assert bounded(finished_at=NOW + timedelta(hours=23)).finished_at == NOW + timedelta(hours=23)
    naive = datetime(2026, 11, 29)  # noqa: DTZ001 - the case
    assert bounded(finished_at=naive).finished_at == datetime(2026, 11, 29, tzinfo=UTC)


def test_an_agent_without_a_clock_knows_no_future() -> None:
    """A machine without a battery starts in 1970, and the times of its jobs are right."""
    start = datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
    assert bounded_status(status(finished_at=NOW), "j", identity="id", now=start)[0].finished_at == NOW


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("exit_code", 1 << 64, None),
        ("exit_code", -(10**300), None),
        ("exit_code", "1", None),
        ("exit_code", True, None),
        ("exit_code", 0xC0000005, 0xC0000005),
        ("total_tasks", 10**300, 1 << 53),
        ("finished_tasks", -5, 0),
        ("total_tasks", 1.5, 0),
        ("attempt", 1 << 70, 1 << 31),
        ("attempt", 0, 1),
        ("state", "FAILED", JobState.FAILED),
        ("state", "BROKEN", JobState.UNKNOWN),
        ("state", None, JobState.UNKNOWN),
        ("job_name", f"a{SURROGATE}b", "a?b"),
        ("job_name", None, ""),
        ("job_name", 5, ""),
        ("error", SURROGATE, "?"),
        ("url", b"x", None),
        ("identity", "", "id"),
        ("trace_id", "xyz", trace_id("id", "j")),
        ("trace_id", None, trace_id("id", "j")),
        ("job_id", "of another job", "j"),
        ("attributes", None, {DROPPED_ATTRIBUTES: "1"}),
    ],
)
def test_values_are_brought_into_range_or_dropped(field: str, value: Any, expected: Any) -> None:
    """Numbers fit 64 bits, texts are Unicode, and values of another type are as good as missing."""
    assert getattr(bounded(**{field: value}), field) == expected


@pytest.mark.parametrize("field", ["job_name", "error", "url", "instance_id", "parent", "status"])
def test_long_texts_are_cut(field: str) -> None:
    """A megabyte of wide characters stays out; the start and the end are kept."""
    text = getattr(bounded(**{field: "<" + "\U0001f600" * 250_000 + ">"}), field)
    assert len(text.encode()) <= 8192
    assert (text[0], text[-1]) == ("<", ">")


@pytest.mark.parametrize(
    "key",
    [
        "service.instance.id", "service_instance_id", "Service.Instance.ID", "service.name", "cicd.pipeline.run.id",
        "cicd.anything", "tailspan.records.acked", "tailspan", "host.name", "HOST.ID", "host-name", "log.record.uid",
        "log_record_uid", "telemetry.sdk.name", "error.type", " host.name", "_tailspan_x", "exception.type",
    ],
)  # fmt: skip
def test_reserved_keys_are_dropped_in_any_spelling(key: str) -> None:
    """Stores make one name of spellings that differ in case and punctuation."""
    assert is_reserved(key)
    assert bounded(attributes={key: "x", "team": "geo"}).attributes == {"team": "geo", DROPPED_ATTRIBUTES: "1"}


def test_details_cannot_claim_what_the_agent_counts() -> None:
    """Details go onto the run span, next to the delivery; the host's name is one of them."""
    details = {"tailspan.records.acked": "9", "cicd.pipeline.result": "success", "host.name": "h", "process.owner": "o"}
    assert bounded(details=details).details == {"host.name": "h", "process.owner": "o"}


@pytest.mark.parametrize(
    ("attributes", "kept", "dropped"),
    [
        ({"": "x", " ": "y", "a": "b"}, 1, 2),
        ({f"k{number}": "v" for number in range(1000)}, MAX_ATTRIBUTES, 1000 - MAX_ATTRIBUTES),
        ({"k" * (MAX_KEY_BYTES + 1): "v", "ok": "v"}, 1, 1),
        ({"k": "\U0001f600" * 100_000}, 1, 1),
        ({f"k{number}": "v" * MAX_VALUE_BYTES for number in range(60)}, 7, 53),
        ({"n": 5, "ok": "v"}, 1, 1),
        ({5: "v", "ok": "v"}, 1, 1),
        ({f"a{SURROGATE}": "1", "a?": "2"}, 1, 1),
    ],
)
def test_attributes_are_bounded_and_counted(attributes: Mapping[Any, Any], kept: int, dropped: int) -> None:
    """Number, keys, values and the whole are bounded; an attribute has the number of those that were dropped or cut."""
    changed, notes, count = bounded_status(status(attributes=attributes), "j", identity="id", now=NOW)
    assert (len(changed.attributes) - 1, count, changed.attributes[DROPPED_ATTRIBUTES]) == (kept, dropped, str(dropped))
    assert sum(len(key.encode()) + len(value.encode()) for key, value in changed.attributes.items()) <= (
        MAX_ATTRIBUTE_BYTES + 100
    )
    assert notes


def test_a_key_that_is_left_out_is_not_kept_in_memory() -> None:
    """Any user of a job service can make new ones of megabytes, as often as they like."""
    key = "k" * (MAX_KEY_BYTES + 1)
    before = sys.getrefcount(key)
    assert bounded(attributes={key: "v"}).attributes == {DROPPED_ATTRIBUTES: "1"}
    assert sys.getrefcount(key) == before


def test_rows_are_brought_into_range() -> None:
    """A row decides what is a backfill: an impossible time is not known."""
    row = ListedJob(
        job_id="j",
        job_name=SURROGATE,
        created_at=datetime.max.replace(tzinfo=UTC),
        state_since=datetime(9999, 1, 1, tzinfo=UTC),
        lines=1 << 90,
    )
    changed = bounded_row(row, now=NOW)
    assert (changed.job_name, changed.created_at, changed.state_since, changed.lines) == ("?", None, None, 1 << 53)
    assert bounded_row(changed, now=NOW) is changed


@pytest.mark.parametrize("time_ns", [-1, -(1 << 63), (1 << 63) - 1, 1 << 64, 10**30])
def test_lines_have_times_of_64_bits(time_ns: int) -> None:
    """The text and the uid of such a line stay as they are."""
    page = LogPage.from_lines([Line(time_ns, "a")], cursor=b"c", identity="id", job_id="j")
    changed = bounded_page(page)
    assert 0 <= changed.times_unix_nano()[0] <= LATEST_NS
    assert (changed.lines, changed.uids(), changed.cursor) == (page.lines, page.uids(), b"c")
    text = LogPage(None, [LineRun(2, time_ns)], b"c", text=b"a\nb\n")
    assert (bounded_page(text).text, bounded_page(text).line_count) == (b"a\nb\n", 2)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=9), st.datetimes(),
    st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3), st.sampled_from(JobState),
    st.text(st.characters(categories=["Cs"]), max_size=3),
)  # fmt: skip
FIELDS = (
    "job_name", "state", "exit_code", "attempt", "total_tasks", "finished_at", "started_at", "submitted_at", "error",
    "attributes", "details", "url", "parent", "identity", "trace_id", "job_status_date", "last_heartbeat",
)  # fmt: skip


@given(fields=st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_any_status_can_be_stored_and_sent(fields: dict[str, Any]) -> None:
    """Whatever a service returns: its spans are encoded, its ledger is JSON, and all its times fit 64 bits."""
    changed = bounded(**fields)
    ledger = JobLedger(first_seen_ns=1, logs_complete=True)
    for span in spans_of(changed, ledger):
        assert encode_span(span)
        assert 0 <= span.start_unix_nano < span.end_unix_nano < 1 << 63
    own = {key: value for key, value in changed.attributes.items() if key != DROPPED_ATTRIBUTES}
    again = bounded_status(dataclasses.replace(changed, attributes=own), "j", identity="id", now=NOW)
    assert again[1:] == ([], 0)


TASK_FIELDS = ("name", "attempt", "result", "exit_code", "error", "url", "parent", "after", "started_at", "finished_at")


@given(fields=st.dictionaries(st.sampled_from(TASK_FIELDS), ANYTHING), task_id=ANYTHING)
def test_any_task_can_be_sent(fields: dict[str, Any], task_id: Any) -> None:
    """Whatever a service returns: a task without a usable id is dropped, the spans of the others are encoded."""
    task = TaskRun(task_id=task_id, **{"name": "t", **fields})  # type: ignore[arg-type]
    tasks = bounded_tasks([task, TaskRun(task_id="good", name="good", result="success")], now=NOW)
    assert tasks[-1].task_id == "good"
    spans = spans_of(bounded(), JobLedger(first_seen_ns=1, logs_complete=True), tasks=tasks, task_lines=LineTimes())
    for span in spans:
        assert encode_span(span)
    assert bounded_tasks(tasks, now=NOW) == tasks


ROW_FIELDS = ("job_name", "state", "created_at", "state_since", "instance_id", "instance_type", "lines")


@given(fields=st.dictionaries(st.sampled_from(ROW_FIELDS), ANYTHING))
def test_any_row_is_brought_into_range(fields: dict[str, Any]) -> None:
    """What is in range stays; times are aware, names can be encoded, and counts fit 64 bits."""
    row = bounded_row(ListedJob(job_id="j", **fields), now=NOW)
    assert bounded_row(row, now=NOW) is row
    assert (row.job_name or "").encode() is not None
    assert all(time is None or time.timestamp() > 0 for time in (row.created_at, row.state_since))
    assert row.lines is None or 0 <= row.lines < 1 << 63


LINE = st.binary(max_size=5).map(lambda text: text.replace(b"\n", b" "))


@given(
    runs=st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING, LINE), min_size=1, max_size=4),
    tasks=st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING), max_size=2),
)
def test_any_page_can_be_sent(runs: list[tuple[Any, ...]], tasks: list[tuple[Any, ...]]) -> None:
    """Whatever time, stream, severity, task and flag a service gives a line: its text becomes a record."""
    page = LogPage(
        [text for *_, text in runs],
        [LineRun(1, time, stream, CLEAN, "", task, severity) for time, stream, task, severity, _ in runs],
        b"c",
        bytes(8 * len(runs)),
        tasks=tuple(TaskRef(*task) for task in tasks),
    )
    changed = bounded_page(page)
    assert (changed.lines, changed.uids(), changed.cursor) == (page.lines, page.uids(), b"c")
    encoded = encode_lines(changed, context=LogContext.for_job(bounded()))
    records = ScopeLogs.FromString(b"".join(records for records, _ in encoded.pieces)).log_records
    assert [record.body.string_value for record in records] == [clean(text) for *_, text in runs]
    assert bounded_page(changed) is changed
