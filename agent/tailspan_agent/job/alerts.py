"""Alerts: anomalies of a job or a pipeline as log records. Pure.

silent      no line (or heartbeat) for longer than is usual for its pipeline
slow        running for longer than is usual for its pipeline
too_fast    succeeded much sooner than is usual for its pipeline
missing     an `[[agent.expect]]` pipeline did not start in time
"""

from __future__ import annotations

from collections.abc import Iterator

from tailspan._durations import age_text, duration_text
from tailspan._identity import job_hash
from tailspan._plural import plural
from tailspan.config import Expect
from tailspan.models import JobStatus
from tailspan_agent.analysis.assessment import Assessment
from tailspan_agent.analysis.baseline import PipelineHistory
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.otlp.log_record import LogRecordData, Severity
from tailspan_agent.records.encode import span_id_of

__all__ = ["alert_record", "alert_text", "missing_record", "new_alerts"]

_WARN = Severity(13, "WARN")
_MAX_ALERTS = 20


def new_alerts(assessment: Assessment, ledger: JobLedger) -> Iterator[str]:
    """Yield the alerts of a job that were not sent yet; each silence has one alert.

    Args:
        assessment: The current assessment of the job.
        ledger: Its ledger, with the alerts sent before.
    """
    sent_ns = {alert: time_ns for time_ns, alert in ledger.alerts}
    if len(ledger.alerts) >= _MAX_ALERTS:
        return
    if assessment.silent and ("silent" not in sent_ns or (ledger.last_line_ns or 0) > sent_ns["silent"]):
        yield "silent"
    if assessment.slow and "slow" not in sent_ns:
        yield "slow"


def alert_text(alert: str, job: JobStatus, history: PipelineHistory, *, duration_s: float, quiet_s: float) -> str:
    """Return the text of an alert in one line, with the history that explains it.

    Args:
        alert: ``silent``, ``slow`` or ``too_fast``.
        job: The status of the job.
        history: The history of its pipeline.
        duration_s: How long it has been running, or ran, in seconds.
        quiet_s: The time without a line, in seconds.
    """
    runs = len(history.succeeded)
    past = f"by its last {runs} successful {plural(runs, 'run')}"
    if alert == "silent":
        unusual = duration_text(history.silent_after_s or 0)
        return f"{job.job_name}: no line for {duration_text(quiet_s)}; {past} over {unusual} is unusual"
    usual = f"{past} it takes {duration_text(history.p50_s or 0)}, and rarely over {duration_text(history.p95_s or 0)}"
    if alert == "slow":
        return f"{job.job_name}: running for {duration_text(duration_s)}; {usual}"
    return f"{job.job_name}: succeeded after only {duration_text(duration_s)}; {usual}"


def alert_record(alert: str, text: str, job: JobStatus, ledger: JobLedger, *, time_unix_nano: int) -> LogRecordData:
    """Return the log record of an alert, in the job's own log and trace.

    Args:
        alert: ``silent``, ``slow`` or ``too_fast``.
        text: The text from `alert_text`.
        job: The status of the job.
        ledger: Its ledger, including this alert.
        time_unix_nano: The time of the alert, in ns since the epoch.
    """
    return LogRecordData(
        time_unix_nano=time_unix_nano,
        severity=_WARN,
        body=text,
        attributes={
            "log.record.uid": f"{job_hash(job.identity, job.job_id)}.{alert}.{job.attempt}.{len(ledger.alerts)}",
            "tailspan.alert": alert,
        },
        trace_id=bytes.fromhex(job.trace_id),
        span_id=bytes.fromhex(span_id_of(job, "run")),
        event_name=f"tailspan.job.{alert}",
    )


def missing_record(expect: Expect, last_start_unix_nano: int | None, now_unix_nano: int) -> LogRecordData:
    """Return the log record of a pipeline that did not start in time.

    Args:
        expect: The expected pipeline.
        last_start_unix_nano: When it last started, in ns since the epoch; None if it was never seen to start.
        now_unix_nano: The time, in ns since the epoch.
    """
    ago = age_text((now_unix_nano - last_start_unix_nano) / 1e9) if last_start_unix_nano else "never, as far as seen"
    return LogRecordData(
        time_unix_nano=now_unix_nano,
        severity=_WARN,
        body=f"{expect.name}: did not start in time: expected every {duration_text(expect.every)}"
        f" with {duration_text(expect.grace)} of grace, last started {ago}",
        attributes={"tailspan.alert": "missing"},
        event_name="tailspan.pipeline.missing",
    )
