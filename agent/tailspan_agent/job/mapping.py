"""A job in OpenTelemetry: its resource, its spans, and the log records of its failure and its receipt. Pure.

The spans, each sent as soon as its values are final (a trace store shows a span only after it has ended):

    run         RUN {name}, the whole job; the parent of the others
    submitted   a millisecond at the start, so that a running job is visible at once
    queued      from submission to start
    executing   from start to end; the parent of the job's own spans (its id is in the job's TRACEPARENT)
    {task}      each attempt of a task, see `tailspan_agent.job.task_spans`

Source: OpenTelemetry semantic conventions 1.44.0, CICD spans and attributes, exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime

from msgspec.structs import replace

from tailspan._identity import job_hash, span_id, trace_id
from tailspan._plural import plural
from tailspan.logs.page import NANOS_PER_MS
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan_agent.analysis.failure import Failure, error_type, exit_reason, out_of_memory_line
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.task_spans import LineTimes, TaskScene, failed_task, task_spans, with_tasks
from tailspan_agent.job.times import SHORTEST_NS, JobTimes
from tailspan_agent.otlp.log_record import LogRecordData, Severity
from tailspan_agent.otlp.span import SpanData, SpanEvent, SpanKind, SpanLink, StatusCode
from tailspan_agent.otlp.text import STORED_BYTES, shorten_middle, shorten_stack
from tailspan_agent.otlp.wire import AttributeValue
from tailspan_agent.records.encode import span_id_of, task_span_id
from tailspan_agent.records.span_lines import SpanLines

__all__ = [
    "JobLedger",
    "failure_record",
    "failure_text",
    "receipt_record",
    "resource_attributes",
    "spans_of",
]

_BACKFILL = "backfill"
_EVENTS = "events"
_AGENT_CHARS = 8
_SUBMITTED_NS = NANOS_PER_MS
_MAX_STATUS_CHARS = 1000
_MAX_MESSAGE_CHARS = 2000
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


def resource_attributes(
    job: JobStatus,
    *,
    service_name: str,
    watch_attributes: Mapping[str, str],
    otlp_resource: Mapping[str, str],
    stream: int = 0,
    agent_id: str = "",
    of_events: bool = False,
) -> dict[str, AttributeValue]:
    """Return the resource of a job's records and spans.

    Args:
        job: The job.
        service_name: The configured name of its service.
        watch_attributes: The attributes of its watch.
        otlp_resource: The attributes of all telemetry.
        stream: The log stream of the pipeline that its lines go to: 0 for the main one; see `StoreStreams`.
        agent_id: The UUID of the agent: two agents do not share a stream of lines that are far behind.
        of_events: Whether the records are events, such as the failure of a job. They have streams of their own, so that
            a query finds them without reading the lines.

    Returns:
        Attributes by name. The keys set here take precedence over the job's attributes, those over the watch's, those
        over the configuration's. The job's id is only in ``cicd.pipeline.run.id``: of most other attributes, Loki
        would create a stream for each job.
    """
    name = job.job_name or "unnamed"
    own = {
        "service.name": name,
        "service.namespace": service_name,
        "service.instance.id": _stream_name(stream, agent_id, of_events=of_events),
        "cicd.pipeline.name": name,
        "cicd.pipeline.run.id": job.job_id,
        "cicd.pipeline.run.url.full": job.url,
        "cicd.worker.id": job.instance_id,
        "host.id": job.instance_id,
        "host.type": job.instance_type,
    }
    return {
        **otlp_resource,
        **watch_attributes,
        **job.attributes,
        **{key: value for key, value in own.items() if value is not None},
    }


def _stream_name(stream: int, agent_id: str, *, of_events: bool) -> str | None:
    parts = [_EVENTS] if of_events else []
    if stream:
        parts += [_BACKFILL, agent_id[:_AGENT_CHARS]]
    if stream > 1:
        parts.append(str(stream - 1))
    return "-".join(filter(None, parts)) or None


def spans_of(
    job: JobStatus,
    ledger: JobLedger,
    *,
    delivery_known: bool = True,
    lines: SpanLines | None = None,
    tasks: Sequence[TaskRun] = (),
    task_lines: LineTimes | None = None,
    written_tasks: Container[tuple[str, int]] = (),
) -> list[SpanData]:
    """Return the spans of a job that have ended by now, in the order in which they end.

    Args:
        job: The latest status of the job.
        ledger: Its ledger. The run span contains all lines, so it needs ``logs_complete``.
        delivery_known: Whether all lines are acknowledged. If not, the run span has no attributes of their delivery:
            a span cannot be corrected later; the receipt has them.
        lines: Lines that the spans of the execution and of tasks carry as events, for stores that keep only traces.
        tasks: Every attempt of the job's tasks.
        task_lines: The times of the tasks' lines.
        written_tasks: Attempts of tasks to leave out, by id and number: a job may have thousands.

    Returns:
        Spans; their ids depend on the job's identity only. A span that was returned before may have other values now:
        always send the one that was stored first.
    """
    times = with_tasks(JobTimes.of(job, ledger), tasks)
    run_id = span_id_of(job, "run")
    # While the job runs, its run span is missing: a search by run id must find one of its children.
    names: dict[str, AttributeValue] = {
        "cicd.pipeline.name": job.job_name or "unnamed",
        "cicd.pipeline.run.id": job.job_id,
    }

    def child(name: str, start_ns: int, end_ns: int) -> SpanData:
        return SpanData(
            trace_id=job.trace_id,
            span_id=span_id_of(job, name),
            parent_span_id=run_id,
            name=name,
            start_unix_nano=start_ns,
            end_unix_nano=max(end_ns, start_ns + SHORTEST_NS),
            attributes=names,
        )

    spans = [child("submitted", times.submitted_ns, times.submitted_ns + _SUBMITTED_NS)]
    ended = job.state.is_terminal and ledger.logs_complete is not None
    if times.started_ns is not None:
        spans.append(child("queued", times.submitted_ns, times.started_ns))
        if ended:
            executing = child("executing", times.started_ns, times.finished_ns)
            spans.append(executing if lines is None else _with_lines(executing, lines))
    elif ended:
        spans.append(child("queued", times.submitted_ns, times.finished_ns))
    if tasks:
        line_times, task_texts = task_lines or LineTimes(), None if lines is None else lines.tasks
        spans += task_spans(job, tasks, TaskScene(times, line_times, task_texts, written_tasks, ended))
    if ended:
        spans.append(_run_span(job, ledger, times, delivery_known=delivery_known))
    return spans


def failure_record(job: JobStatus, ledger: JobLedger, tasks: Sequence[TaskRun] = ()) -> LogRecordData | None:
    """Return the log record of a job's failure; None if it did not fail or has not ended.

    Args:
        job: The last status of the job.
        ledger: Its ledger.
        tasks: Every attempt of its tasks: the record goes to the span of the one that failed.
    """
    if error_type(job, ledger.failure) is None:
        return None
    lines = ledger.failure.last_lines if ledger.failure else ()
    task = failed_task(tasks)
    return LogRecordData(
        time_unix_nano=JobTimes.of(job, ledger).finished_ns,
        severity=Severity(17, "ERROR"),
        body="\n".join((f"{job.job_name}: {failure_text(job, ledger.failure)}", _recurrence(ledger), *lines)),
        attributes={
            "log.record.uid": f"{job_hash(job.identity, job.job_id)}.failure.{job.attempt}",
            **_exception(job, ledger.failure),
            **_failure(job, ledger),
            **({} if task is None else {"cicd.pipeline.task.name": task.name}),
        },
        trace_id=bytes.fromhex(job.trace_id),
        span_id=bytes.fromhex(
            span_id_of(job, "run") if task is None else task_span_id(job, task.task_id, task.attempt)
        ),
        event_name="exception",
    )


def receipt_record(job: JobStatus, ledger: JobLedger, *, still_open: bool = False) -> LogRecordData:
    """Return a job's delivery receipt: how many lines were read, and how many records acknowledged and rejected.

    Args:
        job: The last status of the job.
        ledger: Its ledger as of the last acknowledgement.
        still_open: Whether its service marks the log as open: then ``logs_complete`` is False, but no line is lost.
    """
    rejected, shortened = sum(ledger.delivery.rejected.values()), ledger.delivery.shortened
    is_lacking = rejected or shortened or not (ledger.logs_complete or still_open)
    return LogRecordData(
        time_unix_nano=JobTimes.of(job, ledger).finished_ns,
        severity=Severity(13, "WARN") if is_lacking else Severity(9, "INFO"),
        body=f"{job.job_name}: {ledger.lines} {plural(ledger.lines, 'line')} read,"
        f" {ledger.delivery.acked} {plural(ledger.delivery.acked, 'record')} acked, {rejected} rejected"
        + (f", {shortened} shortened" if shortened else ""),
        attributes={
            "log.record.uid": f"{job_hash(job.identity, job.job_id)}.receipt.{job.attempt}"
            + (f".{ledger.receipts}" if ledger.receipts > 1 else ""),
            **({"tailspan.receipt.amends": ledger.receipts - 1} if ledger.receipts > 1 else {}),
            **{key: value for key, value in {**_lines(ledger), **_delivery(ledger)}.items() if value is not None},
        },
        trace_id=bytes.fromhex(job.trace_id),
        span_id=bytes.fromhex(span_id_of(job, "run")),
        event_name="tailspan.receipt",
    )


def _lines(ledger: JobLedger) -> dict[str, AttributeValue | None]:
    return {
        "tailspan.lines.read": ledger.lines,
        "tailspan.lines.first_unix_nano": ledger.first_line_ns,
        "tailspan.lines.last_unix_nano": ledger.last_line_ns,
        "tailspan.lines.hash": f"{ledger.stream_hash:016x}",
    }


def _delivery(ledger: JobLedger) -> dict[str, AttributeValue | None]:
    delivery = ledger.delivery
    return {
        "tailspan.logs.complete": ledger.logs_complete,
        "tailspan.records.acked": delivery.acked,
        "tailspan.records.rejected": sum(delivery.rejected.values()),
        **{f"tailspan.records.rejected.{kind}": count for kind, count in sorted(delivery.rejected.items())},
        "tailspan.records.rejected.unidentified": None if delivery.identified else True,
        "tailspan.records.shortened": delivery.shortened or None,
        "tailspan.records.resent": delivery.resent,
    }


def _with_lines(span: SpanData, lines: SpanLines) -> SpanData:
    chosen = lines.chosen()
    return replace(
        span,
        attributes={**span.attributes, "tailspan.lines.left_out": lines.count - len(chosen)},
        events=tuple(line.event for line in chosen),
    )


def _run_span(job: JobStatus, ledger: JobLedger, times: JobTimes, *, delivery_known: bool) -> SpanData:
    result = job.state.result
    failed = job.state is not JobState.SUCCEEDED
    attributes: dict[str, AttributeValue | None] = {
        **job.details,
        "cicd.pipeline.action.name": "RUN",
        "cicd.pipeline.name": job.job_name,
        "cicd.pipeline.run.id": job.job_id,
        "cicd.pipeline.run.url.full": job.url,
        "cicd.pipeline.result": result,
        "error.type": error_type(job, ledger.failure),
        "process.exit.code": job.exit_code,
        **_failure(job, ledger),
        "tailspan.job.tasks.total": job.total_tasks or None,
        "tailspan.job.tasks.finished": job.finished_tasks if job.total_tasks else None,
        **_lines(ledger),
        **(_delivery(ledger) if delivery_known else {}),
    }
    return SpanData(
        trace_id=job.trace_id,
        span_id=span_id_of(job, "run"),
        name=f"RUN {job.job_name}",
        kind=SpanKind.SERVER,
        start_unix_nano=times.submitted_ns,
        end_unix_nano=max(times.finished_ns, (times.started_ns or times.submitted_ns) + SHORTEST_NS),
        attributes={key: value for key, value in attributes.items() if value is not None},
        events=tuple(_events(job, ledger, times)),
        links=(*_links(job.parent), *_earlier_attempt(job)),
        status=StatusCode.ERROR if failed else StatusCode.UNSET,
        status_message=failure_text(job, ledger.failure)[:_MAX_STATUS_CHARS] if failed else "",
    )


def _events(job: JobStatus, ledger: JobLedger, times: JobTimes) -> list[SpanEvent]:
    events = [
        SpanEvent(
            # States are seen by polling, so late, even after the end.
            time_unix_nano=min(max(seen_ns, times.submitted_ns), times.finished_ns),
            name="tailspan.job.state",
            attributes={"tailspan.job.state": str(state)},
        )
        for seen_ns, state in ledger.states
    ]
    events += [
        SpanEvent(time_unix_nano=min(max(sent_ns, times.submitted_ns), times.finished_ns), name=f"tailspan.job.{alert}")
        for sent_ns, alert in ledger.alerts
    ]
    if error_type(job, ledger.failure) is not None:
        events.append(
            SpanEvent(
                time_unix_nano=times.finished_ns,
                name="exception",
                attributes=_exception(job, ledger.failure, max_bytes=STORED_BYTES),
            )
        )
    return events


def _failure(job: JobStatus, ledger: JobLedger) -> dict[str, AttributeValue]:
    """Return the exit reason, and how often the pipeline had this failure."""
    reason = exit_reason(job, ledger.failure)
    attributes: dict[str, AttributeValue] = {} if reason is None else {"tailspan.exit.reason": reason}
    if ledger.fingerprint:
        attributes["tailspan.failure.fingerprint"] = ledger.fingerprint
        attributes["tailspan.failure.count"] = ledger.failures_before + 1
        if ledger.first_failed_ns is not None:
            attributes["tailspan.failure.first_seen"] = _iso(ledger.first_failed_ns)
    return attributes


def _recurrence(ledger: JobLedger) -> str:
    if ledger.first_failed_ns is None:
        return "first seen with this run"
    times = ledger.failures_before + 1
    return f"seen {times} {plural(times, 'time')} since {_iso(ledger.first_failed_ns)}"


def _iso(unix_nano: int) -> str:
    return datetime.fromtimestamp(unix_nano / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _exception(job: JobStatus, failure: Failure | None, *, max_bytes: int | None = None) -> dict[str, AttributeValue]:
    """Return the exception's attributes, each of at most `max_bytes` if given: a store would cut its end."""
    kind = error_type(job, failure) or ""
    stack = failure.stacktrace if failure else None
    message = failure.message if failure and stack else failure_text(job, failure)
    if max_bytes is not None:
        message = shorten_middle(message, max_bytes)
        stack = shorten_stack(stack, max_bytes) if stack else None
    attributes: dict[str, AttributeValue] = {"exception.type": kind, "exception.message": message}
    return {**attributes, "exception.stacktrace": stack} if stack else attributes


def failure_text(job: JobStatus, failure: Failure | None) -> str:
    """Return why a job did not succeed, in one or a few lines of at most 2,000 characters in total."""
    if job.state is JobState.FAILED and failure and failure.exception_type:
        text = f"{failure.exception_type}: {failure.message}" if failure.message else failure.exception_type
    else:
        # The service's reason is more reliable than a last line, which may be about anything.
        text = job.error or (failure.message if failure else f"the job ended as {job.state}")
        memory = out_of_memory_line(job, failure) if job.state is JobState.FAILED else None
        if memory is not None and memory not in text:
            text = f"{text} ({memory})"
    return text[:_MAX_MESSAGE_CHARS]


def _links(traceparent: str | None) -> tuple[SpanLink, ...]:
    """Return a link to the span that started the job; none without a valid traceparent."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if not match or not int(match[1], 16) or not int(match[2], 16):
        return ()
    return (SpanLink(trace_id=match[1], span_id=match[2], flags=int(match[3], 16)),)


def _earlier_attempt(job: JobStatus) -> tuple[SpanLink, ...]:
    """Return a link to the run span of the previous attempt, which has a trace of its own."""
    if job.attempt <= 1:
        return ()
    earlier, job_id = job.attempt - 1, job.retry_of or job.job_id
    span = span_id(job.identity, job_id, "run", earlier)
    return (SpanLink(trace_id=trace_id(job.identity, job_id, earlier), span_id=span),)
