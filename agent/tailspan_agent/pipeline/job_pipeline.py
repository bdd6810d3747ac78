"""`JobPipeline`: what is sent of one job, and what of it is acked.

Lines go as chunks into the job's lane; spans go into the store, from where the span lane sends them. What is known of
the job's lines is stored together with the cursor of their page, so a restart continues exactly there.
"""

from __future__ import annotations

import dataclasses
import logging
import time

import msgspec

from tailspan.config import Watch
from tailspan.logs.page import LogPage
from tailspan.models import JobState, RunResponse
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot, assess
from tailspan_agent.analysis.baseline import PipelineHistory
from tailspan_agent.analysis.failure import error_type, fingerprint_of
from tailspan_agent.analysis.progress import ProgressMeter
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.store import Ack, Checkpoint, OutboxSpan
from tailspan_agent.job.alerts import alert_record, alert_text, new_alerts
from tailspan_agent.job.ledger import ChunkResult, JobLedger
from tailspan_agent.job.line_sums import Seconds, add_seconds, page_seconds
from tailspan_agent.job.mapping import failure_record, failure_text, receipt_record, resource_attributes, spans_of
from tailspan_agent.job.times import past_run
from tailspan_agent.otlp.log_record import LogRecordData, encode_log_record
from tailspan_agent.otlp.requests import encode_resource
from tailspan_agent.otlp.span import SpanData, encode_span
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.queue import Chunk
from tailspan_agent.records.encode import LogContext, encode_lines
from tailspan_agent.records.redact import Redactor
from tailspan_agent.tasks import Flag

__all__ = ["BACKFILL_S", "JobPipeline"]

_log = logging.getLogger(__name__)

BACKFILL_S = 1800.0
"""A job whose newest line is older than this when it is first seen is backfill: in Loki a stream of its own."""


class JobPipeline:
    """Sends one job's telemetry; made with the job's first status.

    Args:
        context: What all jobs share.
        service: The service that has the job.
        watch: The watch that matched it.
        job: Its first status.
        first_seen_ns: When it was first seen, in ns since the epoch.

    Attributes:
        job: The last status.
        ledger: What is known of its lines and states as read; the store has them as acked.
        cursor: Where the lines end that were put into the lane.
        late: Whether all of it was relayed and lines may still become visible.
    """

    def __init__(
        self, context: PipelineContext, service: JobService, watch: Watch, job: RunResponse, first_seen_ns: int
    ) -> None:
        self.job = job
        self._redacted: tuple[RunResponse, Redactor, RunResponse] | None = None
        self._context = context
        self._service = service
        self._queue = context.queue(service.identity, job.job_id)
        known = context.store.job(service.identity, job.job_id)
        self.checkpoint = known or self._first_checkpoint(first_seen_ns)
        self.cursor = self.checkpoint.cursor
        self.late = self.checkpoint.late
        self.ledger = self._acked_ledger = JobLedger.restored(self.checkpoint.ledger, job.job_id, first_seen_ns)
        self._watch = watch
        self._log_context = LogContext.for_job(job, min_severity=watch.min_severity, redactor=context.redactor)
        self._resource = self._make_resource()
        context.sending[service.identity, job.job_id] = self
        self._progress = ProgressMeter(self.redact)
        self._too_fast: str | None = None
        self._unacked = 0
        self._unacked_seconds: Seconds = {}
        self._all_acked = Flag(is_set=True)

    def _first_checkpoint(self, first_seen_ns: int) -> Checkpoint:
        newest_ns = self.ended_ns
        return self._context.store.add_job(
            self._service.identity,
            self.job.job_id,
            self.job.job_name,
            backfill=newest_ns is not None and first_seen_ns - newest_ns > BACKFILL_S * 1e9,
            ledger=JobLedger(first_seen_ns=first_seen_ns).to_json(),
        )

    def _make_resource(self) -> bytes:
        return encode_resource(
            resource_attributes(
                self._told,
                service_name=self._service.name,
                watch_attributes=self._watch.attributes,
                otlp_resource=self._context.otlp_resource,
                backfill=self.checkpoint.backfill,
            )
        )

    @property
    def _told(self) -> RunResponse:
        """The status as it may leave this machine."""
        redactor = self._context.redactor
        if redactor is None:
            return self.job
        if self._redacted is None or self._redacted[0] is not self.job or self._redacted[1] is not redactor:
            self._redacted = self.job, redactor, redactor.redact_job(self.job)
        return self._redacted[2]

    def use(self, watch: Watch) -> None:
        """Go over to a changed watch; what is on its way goes as it is."""
        learner = self._log_context.learner
        self._watch = watch
        self._log_context = LogContext.for_job(
            self.job, min_severity=watch.min_severity, redactor=self._context.redactor
        )
        self._log_context.learner = learner
        self._resource = self._make_resource()

    @property
    def ended_ns(self) -> int | None:
        """When the job ended, in ns since the epoch: about the time of its newest line; None while it has not."""
        ended = self.job.finished_at or self.job.job_status_date
        return int(ended.timestamp() * 1e9) if ended is not None and self.job.state.is_terminal else None

    @property
    def position_ns(self) -> int:
        """About the time of the next lines, in ns since the epoch."""
        return self.ledger.last_line_ns or self.ended_ns or time.time_ns()

    @property
    def sends_logs(self) -> bool:
        """Whether logs are among the signals."""
        return self._queue is not None

    @property
    def done(self) -> bool:
        """Whether nothing is left to relay, by this process or an earlier one."""
        return self.checkpoint.ended and not self.late and (self.checkpoint.logs_complete or not self.sends_logs)

    @property
    def followed(self) -> JobSnapshot:
        """The job as metrics and page show it."""
        return JobSnapshot(
            service=self._service.name,
            status=self.job,
            first_line_unix_nano=self.ledger.first_line_ns,
            last_line_unix_nano=self.ledger.last_line_ns,
            progress=self._progress.progress,
            identity=self._service.identity,
            lines=self.ledger.lines,
            last_line=self.ledger.last_line,
            behind_unix_nano=None if self.nothing_in_flight else self._acked_ledger.last_line_ns,
        )

    def see(self, job: RunResponse) -> None:
        """Take in a status; spans that have ended with it are written."""
        if job.last_heartbeat is not None and self.job.last_heartbeat is not None:
            self.ledger = self.ledger.with_heartbeat((job.last_heartbeat - self.job.last_heartbeat).total_seconds())
        known = self.job
        if job.attempt > known.attempt:
            self._end_attempt()
        self.job = job
        self.late = self.late and job.state.is_terminal  # it runs again
        ledger = self.ledger.with_state(time.time_ns(), job.state)
        if ledger is not self.ledger:
            self.ledger = ledger
            if job is not known:
                self.use(self._watch)  # a machine is known only when one runs the job; an attempt has its own trace
            self._keep_seen()
            self.write_spans()

    def _end_attempt(self) -> None:
        """Write the spans of an attempt that is over: the next one is a trace of its own, linked to this one."""
        if not self.job.state.is_terminal:
            self.job = dataclasses.replace(self.job, state=JobState.FAILED, error="it failed and was tried again")
        now_ns = time.time_ns()
        self.ledger = msgspec.structs.replace(self.ledger.with_state(now_ns, self.job.state), logs_complete=False)
        self.write_spans()
        # What follows belongs to the next attempt: times anew, the count of all lines goes on.
        self.ledger = msgspec.structs.replace(
            self.ledger, first_seen_ns=now_ns, first_line_ns=None, last_line_ns=None, states=(), logs_complete=None
        )

    def _keep_seen(self) -> None:
        """Store what was seen of the job without a line; of its lines what is acked."""
        self._acked_ledger = self._acked_ledger.with_seen(self.ledger)
        self._context.store.update_ledger(self.checkpoint.key, self._acked_ledger.to_json())

    @property
    def _history(self) -> PipelineHistory:
        return self._context.pipeline_stats.histories.of(self._context.names.find(self.job.job_name))

    async def tell_what_is_odd(self) -> None:
        """Tell once, in our log and in its own, that the job is silent or slow by its pipeline's own past."""
        history, now_ns = self._history, time.time_ns()
        assessment = assess(self.followed, history, now_ns)
        for kind in new_alerts(assessment, self.ledger):
            duration_s, quiet_s = assessment.running_s or 0.0, assessment.quiet_s or 0.0
            text = alert_text(kind, self._told, history, duration_s=duration_s, quiet_s=quiet_s)
            _log.warning("job %s of service %s is %s: %s", self.job.job_id, self._service.name, kind, text)
            self.ledger = self.ledger.with_alert(now_ns, kind)
            self._keep_seen()
            await self._send_event(alert_record(kind, text, self._told, self.ledger, time_unix_nano=now_ns))

    async def send_page(self, page: LogPage, *, late: bool = False) -> None:
        """Encode a page and put it into the job's lane; waits while the lane is full.

        Args:
            page: The next page; without a logs signal it is only learnt from.
            late: Whether these lines became visible behind the cursor, which then stays where it is.
        """
        if self._queue is not None:
            await self._queue.room()
        self.ledger = self.ledger.with_page(page)
        if not late:
            self.ledger = self.ledger.with_last_line(page.last_lines(1)[0], self.redact)
        if not late and not self.job.state.is_terminal:
            self._progress.see(page, time.monotonic())
        cursor = None if late else page.cursor
        if self._queue is not None:
            encoded = encode_lines(page, context=self._log_context, observed_unix_nano=time.time_ns())
            self._context.health.records_read(
                self._service.name,
                encoded.count,
                dropped=encoded.dropped,
                redactions=encoded.redactions,
                late=encoded.count if late else 0,
            )
            newest_ns = page.runs[-1].time_unix_nano
            await self._put(encoded.records, encoded.count, cursor, page_seconds(page), newest_ns)
        self.cursor = cursor or self.cursor

    async def _put(self, records: bytes, count: int, cursor: bytes | None, seconds: Seconds, newest_ns: int) -> None:
        assert self._queue is not None
        ledger, health = self.ledger, self._context.health

        def settle(result: ChunkResult) -> Ack:
            # What a restart at this cursor must know: the lines up to this page, the states seen up to now.
            delivery = self._acked_ledger.delivery.after(count, result)
            self._acked_ledger = msgspec.structs.replace(ledger.with_seen(self.ledger), delivery=delivery)
            health.records_acked(self._service.name, count - result.rejected, newest_ns)
            if result.rejected:
                health.records_rejected(self._service.name, result.rejected, result.kind)
            return Ack(self.checkpoint.key, cursor, self._acked_ledger.to_json(), seconds)

        def done() -> None:
            self._off_the_way(seconds)
            health.checkpointed()

        self._unacked += 1
        add_seconds(self._unacked_seconds, seconds)
        self._all_acked.clear()
        try:
            await self._queue.put(Chunk(self._resource, records, count, settle, done))
        except BaseException:
            # Cancelled while the lane was full: the next tailer of this job reads these lines again.
            self._off_the_way(seconds)
            health.records_abandoned(self._service.name, count)
            raise

    def _off_the_way(self, seconds: Seconds) -> None:
        self._unacked -= 1
        add_seconds(self._unacked_seconds, seconds, -1)
        if not self._unacked:
            self._all_acked.set()

    @property
    def nothing_in_flight(self) -> bool:
        """Whether everything that was put into the lane needs no more work."""
        return not self._unacked

    async def all_acked(self) -> None:
        """Wait until everything that was put into the lane needs no more work."""
        await self._all_acked.wait()

    def relayed_seconds(self) -> Seconds:
        """Return the per-second sums of all lines that were sent or are on their way."""
        seconds = self._context.store.seconds(self.checkpoint.key)
        add_seconds(seconds, self._unacked_seconds)
        return seconds

    async def take_back(self, repeated: Seconds) -> None:
        """Count lines once that were sent twice: the sums say what the service has, not what was sent.

        Args:
            repeated: The sums of the lines that were sent again.
        """
        lines, uid_sum = (sum(column) for column in zip(*repeated.values(), strict=True))
        stream_hash = (self.ledger.stream_hash - uid_sum) % (1 << 64)
        self.ledger = msgspec.structs.replace(self.ledger, lines=self.ledger.lines - lines, stream_hash=stream_hash)
        negative: Seconds = {}
        add_seconds(negative, repeated, -1)
        await self._put(b"", 0, None, negative, 0)

    def redact(self, text: str) -> str:
        """Return the text without the configured secrets."""
        return self._context.redactor.redact(text)[0] if self._context.redactor is not None else text

    async def send_failure(self) -> None:
        """Put the record that says why the job failed, or that it was too fast, behind its lines, once."""
        record = failure_record(self._told, self.ledger, observed_unix_nano=time.time_ns())
        if record is not None and not self.ledger.failure_reported:
            self.ledger = msgspec.structs.replace(self.ledger, failure_reported=True)
            await self._send_event(record)
        if self._too_fast is not None:
            text, self._too_fast = self._too_fast, None
            ended_ns = self.ledger.alerts[-1][0]
            await self._send_event(alert_record("too_fast", text, self._told, self.ledger, time_unix_nano=ended_ns))

    async def _send_event(self, record: LogRecordData) -> None:
        if self._queue is not None:
            self._context.health.records_read(self._service.name, 1)
            await self._put(encode_log_record(record), 1, None, {}, record.time_unix_nano)

    def write_spans(self) -> None:
        """Write the spans that have ended by now; a span that was written before stays as it was."""
        if self._context.store.add_spans(self.checkpoint.key, self._outbox(spans_of(self._told, self.ledger))):
            self._wake_spans()

    def end(self, *, logs_complete: bool) -> None:
        """Write the job's last spans and count its run: once, whatever happens to the endpoint.

        Args:
            logs_complete: Whether its log was read to its end.
        """
        complete = logs_complete and self.nothing_in_flight
        self.ledger = msgspec.structs.replace(self.ledger, logs_complete=complete, delivery=self._acked_ledger.delivery)
        name, pipeline_stats = self._context.names.label(self.job.job_name), self._context.pipeline_stats
        history = pipeline_stats.histories.of(name)
        ended = past_run(self.job, self.ledger, name, history)
        if ended.too_fast:
            self.ledger = self.ledger.with_alert(ended.ended_unix_nano, "too_fast")
        kind = error_type(self.job, self.ledger.failure)
        if kind is not None and not self.ledger.fingerprint:
            self._recognise(name, kind)
        spans = spans_of(self._told, self.ledger)
        empty = RunTotals(name, ended.result, kind)
        totals = self._context.totals.get(empty.key, empty).add(
            ended.duration_s,
            trace_id=spans[-1].trace_id,
            span_id=spans[-1].span_id,
            time_unix_nano=spans[-1].end_unix_nano,
        )
        fingerprint = self.ledger.fingerprint or None
        if self._context.store.end_job(
            self.checkpoint.key, self._outbox(spans), totals, run=ended, fingerprint=fingerprint
        ):
            self._context.totals[totals.key] = totals
            pipeline_stats.histories.add(ended)
            if ended.too_fast:
                pipeline_stats.too_fast[name] = pipeline_stats.too_fast.get(name, 0) + 1
                self._too_fast = alert_text("too_fast", self._told, history, duration_s=ended.duration_s, quiet_s=0.0)
                _log.warning("job %s of service %s: %s", self.job.job_id, self._service.name, self._too_fast)
        self._wake_spans()

    def _recognise(self, pipeline: str, kind: str) -> None:
        """Note how often the pipeline failed in this way before."""
        fingerprint = fingerprint_of(kind, failure_text(self._told, self.ledger.failure), self.ledger.failure)
        count, first_ns = self._context.store.history.earlier_failures(pipeline, fingerprint)
        self.ledger = msgspec.structs.replace(
            self.ledger, fingerprint=fingerprint, failures_before=count, first_failed_ns=first_ns
        )
        self._keep_seen()  # first: a run that is counted must not meet itself after a restart

    async def complete(self, *, logs_complete: bool, late: bool = False) -> None:
        """Wait for the last ack, write the receipt or, where there is one, an amended one, and note that all is done.

        Args:
            logs_complete: Whether its log was read to its end.
            late: Whether lines may still become visible.
        """
        await self.all_acked()
        if self.sends_logs:
            told = self._acked_ledger
            self.ledger = msgspec.structs.replace(told, logs_complete=logs_complete, receipts=told.receipts + 1)
            await self._send_event(receipt_record(self._told, self.ledger, observed_unix_nano=time.time_ns()))
            await self.all_acked()
            self.settle(late=late)

    def settle(self, *, late: bool = False) -> None:
        """Note that all lines are acked, and whether more may still become visible."""
        self.late = late
        self._context.store.complete_logs(self.checkpoint.key, late=late)

    def _outbox(self, spans: list[SpanData]) -> list[OutboxSpan]:
        key = self.checkpoint.key
        return [OutboxSpan(key, span.span_id, self._resource, encode_span(span)) for span in spans]

    def _wake_spans(self) -> None:
        if self._context.spans is not None:
            self._context.spans.wake()
