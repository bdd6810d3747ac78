"""A job in OpenTelemetry: resource, spans and records."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tailspan._identity import span_id, trace_id
from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.failure import Failure, error_type, failure_of
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import (
    failure_record,
    failure_text,
    resource_attributes,
    spans_of,
)
from tailspan_agent.job.times import run_duration_s
from tailspan_agent.otlp.log_record import encode_log_record
from tailspan_agent.otlp.span import SpanData, SpanKind, SpanLink, StatusCode, encode_span

T0 = datetime(2024, 5, 12, 12, 0, 0, 123456, tzinfo=UTC)
NS0 = 1_715_515_200_123_456_000
S = 1_000_000_000
FAILURE = failure_of(["Traceback (most recent call last):", '  File "x.py", line 1, in f', "ValueError: no tile"])


def job(state: JobState = JobState.SUCCEEDED, **fields: Any) -> JobStatus:
    known = {
        "job_id": "job-1",
        "job_name": "etl",
        "identity": "id",
        "trace_id": trace_id("id", "job-1"),
        "submitted_at": T0,
        "started_at": T0 + timedelta(seconds=2),
    }
    if state.is_terminal:
        known["finished_at"] = T0 + timedelta(seconds=10)
    return JobStatus.from_state(state, **{**known, **fields})


def ledger(**fields: Any) -> JobLedger:
    known = {"first_seen_ns": NS0 + S, "first_line_ns": NS0 + 3 * S, "last_line_ns": NS0 + 9 * S, "logs_complete": True}
    return JobLedger(**{**known, **fields})


def by_name(spans: list[SpanData]) -> dict[str, SpanData]:
    return {span.name: span for span in spans}


def times(span: SpanData) -> tuple[int, int]:
    """Return a span's start and end in seconds after T0."""
    return (span.start_unix_nano - NS0) // S, (span.end_unix_nano - NS0) // S


def resource(run: JobStatus, **options: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"service_name": "fused", "watch_attributes": {}, "otlp_resource": {}}
    return resource_attributes(run, **{**known, **options})


def test_the_resource_of_a_job() -> None:
    """A job's resource has the names of the semantic conventions, and the id in one place."""
    run = job(instance_id="i-1", instance_type="m5.large", url="https://x/job-1", attributes={"team": "geo"})
    assert resource(run, watch_attributes={"env": "prod"}) == {
        "service.name": "etl",
        "service.namespace": "fused",
        "cicd.pipeline.name": "etl",
        "cicd.pipeline.run.id": "job-1",
        "cicd.pipeline.run.url.full": "https://x/job-1",
        "cicd.worker.id": "i-1",
        "host.id": "i-1",
        "host.type": "m5.large",
        "team": "geo",
        "env": "prod",
    }


def test_unknown_attributes_are_absent() -> None:
    """An attribute without a value is missing, not empty."""
    assert set(resource(job())) == {"service.name", "service.namespace", "cicd.pipeline.name", "cicd.pipeline.run.id"}


def test_precedence_of_attributes() -> None:
    """The job's own keys override its attributes, those the watch's, those the configuration's."""
    run = job(attributes={"a": "user", "service.name": "user"})
    made = resource(
        run, watch_attributes={"a": "watch", "b": "watch"}, otlp_resource={"a": "otlp", "b": "otlp", "c": "otlp"}
    )
    assert (made["a"], made["b"], made["c"], made["service.name"]) == ("user", "watch", "otlp", "etl")


def test_backfill_has_a_separate_stream() -> None:
    """Old lines and events get a service.instance.id, which two agents do not share for old lines."""
    agent_id = "0f1e2d3c-aaaa-4bbb-8ccc-ddddeeeeffff"
    assert resource(job(), stream=1, agent_id=agent_id)["service.instance.id"] == "backfill-0f1e2d3c"
    assert resource(job(), stream=3, agent_id=agent_id)["service.instance.id"] == "backfill-0f1e2d3c-2"
    assert resource(job(), of_events=True, agent_id=agent_id)["service.instance.id"] == "events"
    events = resource(job(), stream=2, of_events=True, agent_id=agent_id)
    assert events["service.instance.id"] == "events-backfill-0f1e2d3c-1"
    assert "service.instance.id" not in resource(job(), agent_id=agent_id)


def test_what_is_not_known_of_the_delivery_is_absent() -> None:
    """A span cannot be corrected: it says nothing of lines that are still on their way."""
    run = spans_of(job(), ledger(lines=7, logs_complete=False), delivery_known=False)[-1]
    assert run.attributes["tailspan.lines.read"] == 7
    assert not [key for key in run.attributes if key.startswith(("tailspan.records", "tailspan.logs"))]


def test_a_pending_job_is_visible() -> None:
    """A short span is sent as soon as a job is seen; no span is sent before its end."""
    (anchor,) = spans_of(job(JobState.PENDING, started_at=None), JobLedger(first_seen_ns=NS0 + S))
    assert anchor == SpanData(
        trace_id=trace_id("id", "job-1"),
        span_id=span_id("id", "job-1", "submitted"),
        parent_span_id=span_id("id", "job-1", "run"),
        name="submitted",
        start_unix_nano=NS0,
        end_unix_nano=NS0 + 1_000_000,
        attributes={"cicd.pipeline.name": "etl", "cicd.pipeline.run.id": "job-1"},
    )


def test_a_running_job_has_been_queued() -> None:
    """Once it has started, the queued span has ended; the run span has not, whatever the state of its log."""
    spans = by_name(spans_of(job(JobState.RUNNING), ledger(logs_complete=None)))
    assert list(spans) == ["submitted", "queued"]
    assert times(spans["queued"]) == (0, 2)


def test_an_ended_job_waits_for_its_log() -> None:
    """The run span contains all lines, so it waits for the end of the log."""
    assert [span.name for span in spans_of(job(), ledger(logs_complete=None))] == ["submitted", "queued"]
    assert [span.name for span in spans_of(job(), ledger(logs_complete=False))][2:] == ["executing", "RUN etl"]


def test_the_spans_of_a_job_that_succeeded() -> None:
    """Ids, parents, kinds, times and attributes are as documented; the status is unset."""
    run = job(
        details={"process.command": "python etl.py"},
        total_tasks=8,
        finished_tasks=8,
        exit_code=0,
        attempt=2,
        parent=f"00-{'ab' * 16}-{'cd' * 8}-01",
    )
    spans = by_name(spans_of(run, ledger(lines=7, states=((NS0 + 2 * S, JobState.RUNNING), (NS0 + 99 * S, run.state)))))
    root, executing = spans["RUN etl"], spans["executing"]
    assert {name: span.span_id for name, span in spans.items()} == {
        "submitted": span_id("id", "job-1", "submitted", 2),
        "queued": span_id("id", "job-1", "queued", 2),
        "executing": span_id("id", "job-1", "executing", 2),
        "RUN etl": span_id("id", "job-1", "run", 2),
    }
    assert {span.trace_id for span in spans.values()} == {run.trace_id}
    assert {span.parent_span_id for span in spans.values() if span is not root} == {root.span_id}
    assert (root.parent_span_id, root.kind, executing.kind) == ("", SpanKind.SERVER, SpanKind.INTERNAL)
    assert (times(root), times(executing)) == ((0, 10), (2, 10))
    assert (root.status, root.status_message) == (StatusCode.UNSET, "")
    assert root.links == (
        SpanLink(trace_id="ab" * 16, span_id="cd" * 8, flags=1),
        SpanLink(trace_id=trace_id("id", "job-1", 1), span_id=span_id("id", "job-1", "run", 1), flags=1),
    )
    assert root.attributes == {
        "process.command": "python etl.py",
        "cicd.pipeline.action.name": "RUN",
        "cicd.pipeline.name": "etl",
        "cicd.pipeline.run.id": "job-1",
        "cicd.pipeline.result": "success",
        "process.exit.code": 0,
        "tailspan.job.tasks.total": 8,
        "tailspan.job.tasks.finished": 8,
        "tailspan.lines.read": 7,
        "tailspan.lines.first_unix_nano": 1715515203123456000,
        "tailspan.lines.last_unix_nano": 1715515209123456000,
        "tailspan.lines.hash": "0000000000000000",
        "tailspan.records.acked": 0,
        "tailspan.records.rejected": 0,
        "tailspan.records.resent": 0,
        "tailspan.logs.complete": True,
    }
    assert executing.attributes == {"cicd.pipeline.name": "etl", "cicd.pipeline.run.id": "job-1"}
    assert [(event.attributes["tailspan.job.state"], (event.time_unix_nano - NS0) // S) for event in root.events] == [
        ("RUNNING", 2),
        ("SUCCEEDED", 10),
    ]


def test_the_run_span_of_a_failed_job() -> None:
    """Result, error type, status message and one exception event come from the traceback."""
    root = spans_of(job(JobState.FAILED, exit_code=1, error="exit code 1"), ledger(failure=FAILURE))[-1]
    assert (root.attributes["cicd.pipeline.result"], root.attributes["error.type"]) == ("failure", "ValueError")
    assert (root.status, root.status_message) == (StatusCode.ERROR, "ValueError: no tile")
    (event,) = root.events
    assert (event.name, event.time_unix_nano) == ("exception", root.end_unix_nano)
    assert FAILURE is not None
    assert event.attributes == {
        "exception.type": "ValueError",
        "exception.message": "no tile",
        "exception.stacktrace": FAILURE.stacktrace,
    }


@pytest.mark.parametrize(
    ("state", "fields", "failure", "result", "error", "text"),
    [
        (JobState.FAILED, {"exit_code": 3}, None, "failure", "exit 3", "the job ended as FAILED"),
        (JobState.FAILED, {"exit_code": 137, "error": "killed"}, None, "failure", "SIGKILL", "killed"),
        (JobState.FAILED, {}, failure_of(["no such file"]), "failure", "_OTHER", "no such file"),
        (JobState.LOST, {"error": "supervisor gone"}, FAILURE, "error", "lost", "supervisor gone"),
        (JobState.TIMED_OUT, {"error": "over 5 s"}, FAILURE, "timeout", None, "over 5 s"),
        (JobState.CANCELED, {}, None, "cancellation", None, "the job ended as CANCELED"),
        (JobState.CANCELED, {}, FAILURE, "cancellation", None, "no tile"),
    ],
)
def test_how_jobs_end(
    state: JobState, fields: dict[str, Any], failure: Failure | None, result: str, error: str | None, text: str
) -> None:
    """Each end has its result; only failure and error have an error type, an exception event and a record."""
    run, seen = job(state, **fields), ledger(failure=failure)
    root = spans_of(run, seen)[-1]
    assert root.attributes["cicd.pipeline.result"] == result
    assert root.attributes.get("error.type") == error == error_type(run, failure)
    assert (root.status, root.status_message) == (StatusCode.ERROR, text)
    assert len(root.events) == (error is not None)
    assert (failure_record(run, seen) is not None) == (error is not None)


def test_no_error_without_failure() -> None:
    """A job that runs or succeeded has no error type and no failure record."""
    assert error_type(job(), FAILURE) is None
    assert failure_record(job(), ledger(failure=FAILURE)) is None
    assert failure_record(job(JobState.RUNNING), ledger()) is None


def test_the_failure_record() -> None:
    """One record with the exception, at the end of the run, on its span, with the last lines as text."""
    run, seen = job(JobState.FAILED), ledger(failure=FAILURE)
    record = failure_record(run, seen)
    assert record is not None
    assert record.time_unix_nano == spans_of(run, seen)[-1].end_unix_nano
    assert record.span_id.hex() == span_id("id", "job-1", "run")
    assert (record.event_name, record.severity.text) == ("exception", "ERROR")
    assert record.body.startswith(
        "etl: ValueError: no tile\nfirst seen with this run\nTraceback (most recent call last):"
    )
    assert record.attributes["exception.type"] == "ValueError"
    assert record.attributes["log.record.uid"]
    assert failure_record(run, seen) == record


def test_the_failure_record_fits_loki() -> None:
    """Attributes of any failure stay below 64 KB."""
    lines = ["Traceback (most recent call last):", *['  File "€.py", line 1, in f', "    " + "€" * 3000] * 500]
    failure = failure_of([*lines, "E" * 4000 + ": " + "€" * 4000])
    for seen in (ledger(failure=failure), ledger(failure=None)):
        record = failure_record(job(JobState.FAILED, error="€" * 100_000), seen)
        assert record is not None
        assert len(encode_log_record(replace(record, body=""))) < 64 * 1024
        assert len(record.body.encode()) <= 256 * 1024


@pytest.mark.parametrize(
    ("fields", "seen", "queued", "run"),
    [
        # Fused reports neither the submission nor the start.
        ({"submitted_at": None, "started_at": None}, {}, (1, 3), (1, 10)),
        # Found only after its first lines: it cannot have been submitted after them.
        ({"submitted_at": None, "started_at": None}, {"first_seen_ns": NS0 + 8 * S}, (3, 3), (3, 10)),
        # Lines before the start and after the end, by clocks that differ.
        ({}, {"first_line_ns": NS0 + S, "last_line_ns": NS0 + 12 * S}, (0, 1), (0, 12)),
        ({}, {"first_line_ns": NS0 - 5 * S}, (-5, -5), (-5, 10)),
        # Without an end from the service: the last change of state, else the last line, else when it was seen.
        ({"finished_at": None, "job_status_date": T0 + timedelta(seconds=11)}, {}, (0, 2), (0, 11)),
        ({"finished_at": None, "job_status_date": None}, {}, (0, 2), (0, 9)),
        (
            {"finished_at": None, "job_status_date": None},
            {"first_line_ns": None, "last_line_ns": None, "states": ((NS0 + 20 * S, JobState.SUCCEEDED),)},
            (0, 2),
            (0, 20),
        ),
        # Never started, never spoke: it was queued until it ended.
        ({"started_at": None}, {"first_line_ns": None, "last_line_ns": None}, (0, 10), (0, 10)),
        # An end before the start is a clock that was set back.
        ({"finished_at": T0 - timedelta(seconds=9)}, {"first_line_ns": None, "last_line_ns": None}, (0, 2), (0, 2)),
    ],
)
def test_times(fields: dict[str, Any], seen: dict[str, Any], queued: tuple[int, int], run: tuple[int, int]) -> None:
    """Times that the service does not report come from the ledger, and spans contain their lines."""
    spans = by_name(spans_of(job(**{"job_status_date": None, **fields}), ledger(**seen)))
    assert (times(spans["queued"]), times(spans["RUN etl"])) == (queued, run)


OPTIONAL_TIMES = st.none() | st.integers(-100, 100)


@given(
    st.sampled_from(list(JobState)),
    st.lists(OPTIONAL_TIMES, min_size=4, max_size=4),
    st.tuples(st.integers(-100, 100), st.integers(0, 100)) | st.none(),
    st.integers(-100, 100),
    st.sampled_from([None, True, False]),
)
def test_spans_hold_together(
    state: JobState, told: list[int | None], lines: tuple[int, int] | None, seen: int, complete: bool | None
) -> None:
    """With any clocks: each span has a duration, children are within the run, lines within `executing`."""
    names = ("submitted_at", "started_at", "finished_at", "job_status_date")
    fields = {
        name: None if after is None else T0 + timedelta(seconds=after) for name, after in zip(names, told, strict=True)
    }
    known: dict[str, Any] = {"first_line_ns": None, "last_line_ns": None}
    if lines:
        known = {"first_line_ns": NS0 + lines[0] * S, "last_line_ns": NS0 + sum(lines) * S}
    seen_facts = ledger(first_seen_ns=NS0 + seen * S, logs_complete=complete, **known)
    spans = by_name(spans_of(job(state, **fields), seen_facts))
    assert all(span.start_unix_nano < span.end_unix_nano and encode_span(span) for span in spans.values())
    assert ("RUN etl" in spans) == (state.is_terminal and complete is not None)
    if "RUN etl" in spans:
        root = spans.pop("RUN etl")
        assert all(root.start_unix_nano <= span.start_unix_nano <= root.end_unix_nano for span in spans.values())
        inner = [span for name, span in spans.items() if name != "submitted"]
        assert all(span.end_unix_nano <= root.end_unix_nano for span in inner)
        if lines:
            assert spans["executing"].start_unix_nano <= known["first_line_ns"]
            assert spans["executing"].end_unix_nano >= known["last_line_ns"]


@pytest.mark.parametrize(
    "parent", ["", "nonsense", f"00-{'0' * 32}-{'cd' * 8}-01", f"00-{'ab' * 16}-{'0' * 16}-01", f"00-{'AB' * 16}-x-01"]
)
def test_an_invalid_traceparent_makes_no_link(parent: str) -> None:
    """Only a valid traceparent becomes a link."""
    assert spans_of(job(parent=parent), ledger())[-1].links == ()


def test_times_keep_microseconds() -> None:
    """Nanoseconds since the epoch do not fit a float: times are converted without one."""
    assert spans_of(job(JobState.PENDING), JobLedger(first_seen_ns=1))[0].start_unix_nano == NS0


def test_the_text_of_a_failure_without_message() -> None:
    """An exception without a message is shown by its type."""
    failure = Failure(exception_type="KeyboardInterrupt", message="", stacktrace="x", last_lines=("x",))
    assert failure_text(job(JobState.FAILED), failure) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("fields", "seen", "seconds"),
    [
        ({}, {}, 8.0),
        ({}, {"last_line_ns": NS0 + 60 * S}, 8.0),
        ({"started_at": None}, {}, 7.0),
        ({"finished_at": None}, {}, 7.0),
        ({"started_at": None}, {"first_line_ns": None, "last_line_ns": None}, 0.0),
    ],
    ids=["as the service says", "late lines", "from the first line", "to the last line", "never started"],
)
def test_a_run_lasts_from_its_start(fields: dict[str, Any], seen: dict[str, Any], seconds: float) -> None:
    """Like `JobStatus.duration`, without the time in the queue; unknown times come from lines."""
    assert run_duration_s(job(**fields), ledger(**seen)) == seconds
