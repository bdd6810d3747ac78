"""What is odd about a job or a pipeline, as the log record and the words that tell it. Pure.

silent      no line (or heartbeat) for longer than its pipeline's past says
slow        running for longer than its pipeline's past says
too_fast    succeeded much sooner than its pipeline ever did
missing     an `[[agent.expect]]` pipeline did not start in time
"""

from __future__ import annotations

from collections.abc import Iterator

from tailspan._identity import job_hash, span_id
from tailspan.config import Expect
from tailspan.models import RunResponse
from tailspan_agent.analysis.assessment import Assessment
from tailspan_agent.analysis.baseline import PipelineHistory
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.otlp.log_record import LogRecordData, Severity

__all__ = ["alert_record", "alert_text", "missing_record", "new_alerts"]

_WARN = Severity(13, "WARN")
_MOST_ALERTS = 20


def new_alerts(assessment: Assessment, ledger: JobLedger) -> Iterator[str]:
    """Yield what is odd about a job and was not told yet; each silence is told once.

    Args:
        assessment: What can be told of it now.
        ledger: What was told.
    """
    told = {kind: told_ns for told_ns, kind in ledger.alerts}
    if len(ledger.alerts) >= _MOST_ALERTS:
        return
    if assessment.silent and ("silent" not in told or (ledger.last_line_ns or 0) > told["silent"]):
        yield "silent"
    if assessment.slow and "slow" not in told:
        yield "slow"


def alert_text(kind: str, job: RunResponse, history: PipelineHistory, *, duration_s: float, quiet_s: float) -> str:
    """Return in one line what is odd, with the past that says so.

    Args:
        kind: ``silent``, ``slow`` or ``too_fast``.
        job: Its status.
        history: The past of its pipeline.
        duration_s: How long it has been running, or ran, in seconds.
        quiet_s: How long there was no line, in seconds.
    """
    past = f"by its last {len(history.succeeded)} successful runs"
    if kind == "silent":
        return (
            f"{job.job_name}: no line for {quiet_s:.0f} s; {past} over {history.silent_after_s or 0:.0f} s is unusual"
        )
    usual = f"{past} it takes {history.p50_s or 0:.1f} s, and rarely over {history.p95_s or 0:.1f} s"
    if kind == "slow":
        return f"{job.job_name}: running for {duration_s:.1f} s; {usual}"
    return f"{job.job_name}: succeeded after only {duration_s:.1f} s; {usual}"


def alert_record(kind: str, text: str, job: RunResponse, ledger: JobLedger, *, time_unix_nano: int) -> LogRecordData:
    """Return the record that tells it, in the job's own log and trace.

    Args:
        kind: ``silent``, ``slow`` or ``too_fast``.
        text: From `alert_text`.
        job: Its status.
        ledger: With this alert among `JobLedger.alerts`.
        time_unix_nano: When it is so, in ns since the epoch.
    """
    return LogRecordData(
        time_unix_nano=time_unix_nano,
        observed_unix_nano=time_unix_nano,
        severity=_WARN,
        body=text,
        attributes={
            "log.record.uid": f"{job_hash(job.identity, job.job_id)}.{kind}.{job.attempt}.{len(ledger.alerts)}",
            "tailspan.alert": kind,
        },
        trace_id=bytes.fromhex(job.trace_id),
        span_id=bytes.fromhex(span_id(job.identity, job.job_id, "run", job.attempt)),
        event_name=f"tailspan.job.{kind}",
    )


def missing_record(expect: Expect, last_start_unix_nano: int | None, now_unix_nano: int) -> LogRecordData:
    """Return the record that tells that a pipeline did not start in time.

    Args:
        expect: What was expected.
        last_start_unix_nano: When it last started; None when that was never seen.
        now_unix_nano: The moment, in ns since the epoch.
    """
    ago = (
        f"{(now_unix_nano - last_start_unix_nano) / 1e9:.0f} s ago" if last_start_unix_nano else "never, as far as seen"
    )
    return LogRecordData(
        time_unix_nano=now_unix_nano,
        observed_unix_nano=now_unix_nano,
        severity=_WARN,
        body=f"{expect.name}: did not start in time: expected every {expect.every:g} s"
        f" with {expect.grace:g} s of grace, last started {ago}",
        attributes={"tailspan.alert": "missing"},
        event_name="tailspan.pipeline.missing",
    )
