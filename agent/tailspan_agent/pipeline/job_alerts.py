"""`JobAlerts`: log records of the agent's own in the log of a job: anomalies, and why it failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from tailspan_agent.analysis.assessment import JobSnapshot, assess
from tailspan_agent.analysis.baseline import PastRun, PipelineHistory
from tailspan_agent.job.alerts import alert_record, alert_text, new_alerts
from tailspan_agent.job.mapping import failure_record
from tailspan_agent.otlp.log_record import LogRecordData
from tailspan_agent.pipeline.tracked_job import TrackedJob

__all__ = ["JobAlerts"]

_log = logging.getLogger(__name__)

_Send: TypeAlias = Callable[[LogRecordData], Awaitable[None]]


class JobAlerts:
    """Reports anomalies and the failure of one job, each once, also across restarts.

    Args:
        job: The job.
    """

    __slots__ = ("_job", "_too_fast")

    def __init__(self, job: TrackedJob) -> None:
        self._job = job
        self._too_fast: str | None = None

    async def report_anomalies(self, snapshot: JobSnapshot, send: _Send) -> None:
        """Report in the agent's log and the job's log that the job is silent or slow, compared with past runs.

        Args:
            snapshot: The job at present.
            send: Queues a record behind the job's lines.
        """
        job, history, now_ns = self._job, self._job.history, time.time_ns()
        assessment = assess(snapshot, history, now_ns)
        for kind in new_alerts(assessment, job.ledger):
            duration_s, quiet_s = assessment.running_s or 0.0, assessment.quiet_s or 0.0
            text = alert_text(kind, job.redacted_status, history, duration_s=duration_s, quiet_s=quiet_s)
            _log.warning("job %s of service %s is %s: %s", job.status.job_id, job.service.name, kind, text)
            job.ledger = job.ledger.with_alert(now_ns, kind)
            job.store_ledger()
            await send(alert_record(kind, text, job.redacted_status, job.ledger, time_unix_nano=now_ns))

    def on_too_fast(self, run: PastRun, history: PipelineHistory) -> None:
        """Note that the run succeeded much faster than its pipeline ever did; `send_pending` sends the record.

        Args:
            run: The run.
            history: The past runs of its pipeline, without this one.
        """
        job, too_fast = self._job, self._job.context.pipeline_stats.too_fast
        if job.context.owns is None:  # the runs of shared jobs are counted by their store, for all agents
            too_fast[run.pipeline] = too_fast.get(run.pipeline, 0) + 1
        self._too_fast = alert_text("too_fast", job.redacted_status, history, duration_s=run.duration_s, quiet_s=0.0)
        _log.warning("job %s of service %s: %s", job.status.job_id, job.service.name, self._too_fast)

    async def send_pending(self, send: _Send) -> None:
        """Queue, once, the record that says why the job failed, or that it was too fast.

        Args:
            send: Queues a record behind the job's lines.
        """
        job = self._job
        record = failure_record(job.redacted_status, job.ledger, job.tasks)
        if record is not None and not job.ledger.failure_reported:
            job.update_ledger(failure_reported=True)
            await send(record)
        if self._too_fast is not None:
            text, self._too_fast = self._too_fast, None
            ended_ns = job.ledger.alerts[-1][0]
            await send(alert_record("too_fast", text, job.redacted_status, job.ledger, time_unix_nano=ended_ns))
