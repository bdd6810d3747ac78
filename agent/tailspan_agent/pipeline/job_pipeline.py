"""`JobPipeline`: the lines of one job on their way from a page to an acknowledged checkpoint.

Lines go as chunks into the log queue. The ledger is stored together with the cursor of the last acknowledged page, so
a restart continues exactly there. The job's spans and alerts are objects of their own: `JobSpans`, `JobAlerts`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import NamedTuple

import msgspec

from tailspan._identity import trace_id
from tailspan._plural import plural
from tailspan.config import Watch
from tailspan.errors import CursorExpiredError
from tailspan.logs.clean import clean
from tailspan.logs.page import LogPage, OpenLine
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.failure import Failure
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.progress import ProgressMeter
from tailspan_agent.checkpoint.rows import Ack
from tailspan_agent.errors import LeaseLostError
from tailspan_agent.exporter.outcome import age_advice
from tailspan_agent.job.ledger import ChunkResult, JobLedger
from tailspan_agent.job.line_sums import Seconds, add_seconds, page_seconds
from tailspan_agent.job.mapping import receipt_record
from tailspan_agent.job.open_lines import OpenLineLimit, open_line_record
from tailspan_agent.job.task_spans import LineTimes
from tailspan_agent.job.times import past_run
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.otlp.log_record import LogRecordData, encode_log_record
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.job_alerts import JobAlerts
from tailspan_agent.pipeline.job_spans import JobSpans
from tailspan_agent.pipeline.queue import Chunk, Fence, LogQueue, copied_bytes
from tailspan_agent.pipeline.store_streams import MAIN_STREAM, WINDOW_NS, may_be_too_old, parts_in_time
from tailspan_agent.pipeline.tracked_job import TrackedJob
from tailspan_agent.records.encode import LogContext, encode_lines
from tailspan_agent.records.span_lines import SpanLines
from tailspan_agent.tasks import Flag

__all__ = ["JobPipeline"]

_log = logging.getLogger(__name__)


class _Records(NamedTuple):
    """Encoded records of lines.

    Attributes:
        pieces: Framed log records and their number, as `Chunk` has them.
        number: The number of records.
        oldest_ns: The time of the oldest one, in ns since the epoch.
        newest_ns: The time of the newest one.
        last_ns: The time of the last one.
    """

    pieces: Sequence[tuple[bytes, int]]
    number: int
    oldest_ns: int
    newest_ns: int
    last_ns: int


def _nothing() -> None:
    pass


class _Sent:
    """Records that were queued together; they are acknowledged with the last ones.

    Args:
        pipeline: The pipeline of their job.
        parts: The records.
        cursor: As in `Ack`, as are the next two.
        seconds: The sums of their lines.
        completes: Whether they are the last ones.
        are_lines: Whether they are lines of the job's log.

    Attributes:
        total: The number of records.
    """

    __slots__ = (
        "_are_lines",
        "_completes",
        "_cursor",
        "_earlier",
        "_has_left",
        "_last",
        "_ledger",
        "_pipeline",
        "_seconds",
        "total",
    )

    def __init__(
        self,
        pipeline: JobPipeline,
        parts: Sequence[_Records],
        cursor: bytes | None,
        seconds: Seconds,
        *,
        completes: bool | None,
        are_lines: bool,
    ) -> None:
        self.total = sum([part.number for part in parts])
        self._pipeline = pipeline
        self._ledger = pipeline.ledger
        self._last = parts[-1]
        self._cursor = cursor
        self._seconds = seconds
        self._completes = completes
        self._are_lines = are_lines
        self._earlier: ChunkResult | None = None
        self._has_left = False

    def on_result(self, part: _Records, result: ChunkResult) -> Ack | None:
        """Count the outcome of a part; return what to store with the last one."""
        pipeline, health = self._pipeline, self._pipeline.health
        name = pipeline.job.service.name
        health.records_acked(name, part.number - result.rejected, part.last_ns)
        if result.rejected:
            health.records_rejected(name, result.rejected, result.kind)
            if result.kind in ("too_old", "too_new") and self._are_lines:
                pipeline.on_rejected_age(result)
        self._earlier = result if self._earlier is None else self._earlier + result
        if part is not self._last:
            return None
        ledger = pipeline.ack(self.total, self._earlier, self._ledger)
        return Ack(pipeline.job.checkpoint.key, self._cursor, ledger, self._seconds, self._completes)

    def on_stored(self) -> None:
        """Leave: the ack is stored."""
        self.leave()
        self._pipeline.health.checkpointed()

    def on_void(self, part: _Records) -> None:
        """Leave a part to the agent that follows the job now."""
        self._pipeline.lose()
        self.leave()
        self._pipeline.health.records_abandoned(self._pipeline.job.service.name, part.number)

    def leave(self) -> None:
        """Leave the records in flight, once."""
        if not self._has_left:
            self._has_left = True
            self._pipeline.leave_flight(self._seconds)


class JobPipeline:
    """Encodes and queues the lines of one job, and stores what is acknowledged.

    Args:
        context: Shared by all jobs.
        service: The service that has the job.
        watch: The watch that matched the job.
        status: The first status.
        first_seen_ns: When the agent first saw the job, in ns since the epoch.
        is_listed: Whether the metrics show the run already, by its row of the list.

    Attributes:
        job: The status and the ledger of the job.
        spans: Writes the job's spans.
        alerts: Reports the job's anomalies and failure.
        cursor: The end of the lines that were queued.
    """

    __slots__ = (
        "__weakref__",
        "_age_lines",
        "_age_reason",
        "_age_reported",
        "_all_acked",
        "_attempts_ended",
        "_context",
        "_is_lost",
        "_log_context",
        "_open_lines",
        "_progress",
        "_queue",
        "_run_reported",
        "_unacked",
        "_unacked_seconds",
        "alerts",
        "cursor",
        "job",
        "spans",
    )

    def __init__(
        self,
        context: PipelineContext,
        service: JobService,
        watch: Watch,
        status: JobStatus,
        first_seen_ns: int,
        *,
        is_listed: bool = False,
    ) -> None:
        self.job = TrackedJob(context, service, watch, status, first_seen_ns)
        self.spans = JobSpans(self.job)
        self.alerts = JobAlerts(self.job)
        self.cursor = self.job.checkpoint.cursor
        self._context = context
        self._queue = context.queue(service.name, self.job.status.job_name)
        # Made with the first line: most jobs of a large agent are silent.
        self._log_context: LogContext | None = None
        self._progress: ProgressMeter | None = None
        self._open_lines: OpenLineLimit | None = None
        self._age_lines = self._age_reported = 0
        self._age_reason = ""
        self._run_reported = self.job.checkpoint.ended
        self._attempts_ended = False
        self._unacked = 0
        self._is_lost = False
        self._unacked_seconds: Seconds = {}
        self._all_acked = Flag(is_set=True)
        context.in_flight[service.identity, status.job_id] = self
        if not (status.state.is_terminal or is_listed):
            context.health.run_changes.set()
        self._end_unseen_attempt()

    @property
    def status(self) -> JobStatus:
        """The last status."""
        return self.job.status

    @property
    def ledger(self) -> JobLedger:
        """The job's lines and states as read."""
        return self.job.ledger

    @property
    def health(self) -> AgentMetrics:
        """The agent's own metrics."""
        return self._context.health

    @property
    def queue(self) -> LogQueue | None:
        """The queue of its next lines; None if logs are not among the signals."""
        return self._queue

    @property
    def relays_logs(self) -> bool:
        """Whether logs are among the signals."""
        return self._queue is not None

    @property
    def position_ns(self) -> int:
        """About the time of the next lines, in ns since the epoch."""
        return self.ledger.last_line_ns or self.job.ended_ns or time.time_ns()

    @property
    def completed_before(self) -> bool:
        """Whether an earlier process stored the end of the run and the complete log."""
        checkpoint = self.job.checkpoint
        return checkpoint.ended and (checkpoint.logs_complete or not self.relays_logs)

    @property
    def snapshot(self) -> JobSnapshot:
        """The job as metrics and page show it."""
        ledger, service = self.job.ledger, self.job.service
        return JobSnapshot(
            service=service.name,
            status=self.job.status,
            first_line_unix_nano=ledger.first_line_ns,
            last_line_unix_nano=ledger.last_line_ns,
            progress=None if self._progress is None else self._progress.progress,
            identity=service.identity,
            lines=ledger.lines,
            last_line=ledger.last_line,
            behind_unix_nano=None if self.nothing_in_flight else self.job.acked_ledger.last_line_ns,
            tasks=self.job.tasks,
        )

    def apply_settings(self, watch: Watch) -> None:
        """Apply changed watch settings; lines already queued keep the old ones."""
        self.job.apply_settings(watch)
        self._log_context = None

    @property
    def log_context(self) -> LogContext:
        """The context of the job's records."""
        if self._log_context is None:
            self._log_context = LogContext.for_job(
                self.job.status, min_severity=self.job.watch.min_severity, redactor=self._context.redactor
            )
        return self._log_context

    def on_status(self, status: JobStatus) -> None:
        """Apply a new status; write the spans that have ended with it, unless the end of the job does so at once."""
        job, known = self.job, self.job.status
        if status.last_heartbeat is not None and known.last_heartbeat is not None:
            job.ledger = job.ledger.with_heartbeat((status.last_heartbeat - known.last_heartbeat).total_seconds())
        if status.attempt > known.attempt:
            self._end_attempt(status.attempt)
        job.status = status
        ledger = job.with_state(job.ledger)
        if ledger is not job.ledger:
            job.ledger = ledger
            if status is not known:
                # The machine is known only while the job runs on one; each attempt has a trace of its own.
                self.apply_settings(job.watch)
            job.store_ledger()
            if not status.state.is_terminal:
                self.spans.write()
            if status.state is not known.state or status.attempt != known.attempt:
                self._context.health.run_changes.set()

    def on_tasks(self, tasks: Sequence[TaskRun]) -> None:
        """Apply the tasks as they are now; write the spans of ended attempts, unless their lines are to be read."""
        ended = {task.key for task in self.job.tasks if task.ended}
        self.job.update_tasks(tasks)
        if any(task.ended and task.key not in ended for task in tasks):
            self._attempts_ended = True
        if self.job.span_lines is None:
            self.write_attempts()

    def write_attempts(self) -> None:
        """Write the spans of attempts that have ended: their lines were read since."""
        if self._attempts_ended:
            self._attempts_ended = False
            self.spans.write()

    def _end_unseen_attempt(self) -> None:
        """Write the spans of the attempt in the store if the job was tried again while no agent was running."""
        job, status = self.job, self.job.status
        attempt = job.ledger.attempt or 1
        if status.attempt <= attempt or self._run_reported:
            return
        if not job.ledger.states:
            job.update_ledger(attempt=status.attempt)
            return
        trace = trace_id(status.identity, status.job_id, attempt)
        job.status = dataclasses.replace(
            status,
            attempt=attempt,
            trace_id=trace,
            state=JobState.RUNNING,
            job_status_date=None,
            submitted_at=None,
            started_at=None,
            finished_at=None,
            exit_code=None,
            error=None,
        )
        self._end_attempt(status.attempt)
        job.status = status
        self.apply_settings(job.watch)

    def _end_attempt(self, following: int) -> None:
        """Write the spans of an attempt that is over: the next one is a trace of its own, linked to this one.

        Args:
            following: The number of the next attempt.
        """
        job = self.job
        if not job.status.state.is_terminal:
            job.status = dataclasses.replace(job.status, state=JobState.FAILED, error="it failed and was tried again")
        now_ns = time.time_ns()
        job.ledger = msgspec.structs.replace(job.ledger.with_state(now_ns, job.status.state), logs_complete=False)
        self.spans.write()
        self.spans.start_attempt()
        job.start_span_lines()
        # What follows belongs to the next attempt: its times start again, the count of all lines continues.
        job.update_ledger(first_seen_ns=now_ns, first_line_ns=None, last_line_ns=None, states=(), logs_complete=None)
        job.update_ledger(attempt=following, ending=msgspec.UNSET)

    def mark_stale(self) -> None:
        """Note that the last status may be outdated: the service failed to answer."""
        self.job.status = dataclasses.replace(self.job.status, stale=True)

    def expire_heartbeat(self) -> None:
        """Drop the last heartbeat: while a job is not polled, an old heartbeat does not mean that it stopped."""
        if self.job.status.last_heartbeat is not None:
            self.job.status = dataclasses.replace(self.job.status, last_heartbeat=None)

    def recall_state(self) -> None:
        """Take the terminal state in the ledger, if any, as the job's state: the service does not know the job."""
        states = self.ledger.states
        if states and states[-1][1].is_terminal:
            self.job.status = dataclasses.replace(self.job.status, state=states[-1][1])

    def mark_lost(self, reason: str) -> None:
        """Set the state LOST, unless the job has ended.

        Args:
            reason: The error text of the status.
        """
        if not self.status.state.is_terminal:
            self.on_status(dataclasses.replace(self.status, state=JobState.LOST, error=reason))

    def skip_to(self, cursor: bytes | None) -> None:
        """Continue at another cursor, None for the oldest line left: lines before it are gone at the service."""
        self.cursor = cursor

    def attach_failure(self, failure: Failure | None) -> None:
        """Note why the job failed; None if its last lines do not say."""
        self.job.update_ledger(failure=failure)

    async def collect_span_lines(self, read: Callable[[], AsyncGenerator[LogPage, None]]) -> None:
        """Read the log again for the lines of the job's span, if an earlier process read the start of it.

        Args:
            read: Reads the log from its start.
        """
        if self.job.span_lines is None or self.job.span_lines.whole:
            return
        lines = SpanLines()
        # Relayed lines may be gone by now; the end of the job is reported all the same.
        with suppress(CursorExpiredError):
            async with aclosing(read()) as pages:
                async for page in pages:
                    lines.add(page, self.log_context)
            self.job.span_lines = lines

    def redact(self, text: str) -> str:
        """Return the text without the configured secrets."""
        return self.job.redact(text)

    async def report_anomalies(self) -> None:
        """Report anomalies of a running job once: agent log and job log."""
        if not self.status.state.is_terminal:
            await self.alerts.report_anomalies(self.snapshot, self._send_event)

    async def send_pending_alerts(self) -> None:
        """Queue, once, the record that says why the job failed, or that it was too fast."""
        await self.alerts.send_pending(self._send_event)

    async def send_page(self, page: LogPage, *, late: bool = False) -> None:
        """Encode and queue a page; wait while the queue is full.

        Args:
            page: The next page. Without a logs signal only the ledger changes.
            late: Whether these lines became visible behind the cursor, which then does not move.
        """
        self.check_not_lost()
        if self._queue is not None:
            await self._queue.room()
        job = self.job
        if self._open_lines is not None:
            self._open_lines.on_page(page)
        job.ledger = job.ledger.with_page(page)
        job.task_lines.add(page)
        if not late:
            job.ledger = job.ledger.with_last_line(page.last_lines(1)[0], job.redact)
            if job.span_lines is not None:
                job.span_lines.add(page, self.log_context)
        if not late and not job.status.state.is_terminal:
            self._progress = self._progress or ProgressMeter(job.redact)
            self._progress.add_page(page, time.monotonic())
        cursor = None if late else page.cursor
        if self._queue is not None:
            times_ns = [run.time_unix_nano for run in page.runs]
            oldest_ns, newest_ns = min(times_ns), max(times_ns)
            put = partial(self._put_page, page, times_ns, newest_ns - oldest_ns, cursor, late)
            await self._in_stream(oldest_ns, newest_ns, put)
        self.cursor = cursor or self.cursor

    async def _put_page(
        self, page: LogPage, times_ns: Sequence[int], span_ns: int, cursor: bytes | None, late: bool, is_behind: bool
    ) -> None:
        alone = is_behind or may_be_too_old(times_ns, span_ns)
        parts = parts_in_time(page) if self.job.checkpoint.stream and not alone else [page]
        encoded = [self._encode(part, late=late) for part in parts]
        await self._put(encoded, cursor, page_seconds(page), alone=alone)

    def _encode(self, page: LogPage, *, late: bool) -> _Records:
        encoded = encode_lines(page, context=self.log_context, copied=copied_bytes(self.job.log_resource))
        self._context.health.records_read(
            self.job.service.name,
            encoded.count,
            dropped=encoded.dropped,
            redactions=encoded.redactions,
            late=encoded.count if late else 0,
        )
        times_ns = [run.time_unix_nano for run in page.runs]
        return _Records(encoded.pieces, encoded.count, min(times_ns), max(times_ns), times_ns[-1])

    async def send_open_line(self, line: OpenLine) -> float | None:
        """Queue a record of the line whose newline has not come, unless it was sent already.

        Returns:
            How long to wait before this line may be sent, in seconds; None if nothing is left to send.
        """
        self._open_lines = self._open_lines or OpenLineLimit()
        job, wait_s = self.job, self._open_lines.wait_s(line, time.monotonic())
        text = job.redact_open(clean(line.text))
        if wait_s is None or not text or line.uid == job.ledger.open_line:
            return None
        job.ledger = job.ledger.with_last_line(text.encode(), job.redact)
        if wait_s:
            return wait_s
        self._open_lines.on_sent(line)
        job.ledger = msgspec.structs.replace(job.ledger, open_line=line.uid)
        await self._send_record(open_line_record(line, text, job.status))
        return None

    async def _put(
        self,
        parts: Sequence[_Records],
        cursor: bytes | None,
        seconds: Seconds,
        *,
        resource: bytes | None = None,
        alone: bool = False,
        are_lines: bool = True,
        completes: bool | None = None,
    ) -> None:
        """Queue records, which are acknowledged together when the last ones are delivered; `completes` as in `Ack`."""
        assert self._queue is not None
        job, sent = self.job, _Sent(self, parts, cursor, seconds, are_lines=are_lines, completes=completes)
        self._unacked += 1
        add_seconds(self._unacked_seconds, seconds)
        self._all_acked.clear()
        left = sent.total
        try:
            for part in parts:
                stored = sent.on_stored if part is parts[-1] else _nothing
                pieces = deque(part.pieces or [(b"", 0)])
                chunk = Chunk(resource or job.log_resource, pieces, partial(sent.on_result, part), stored, alone)
                if self._context.owns is not None:
                    chunk.fence = Fence(self._is_void, partial(sent.on_void, part))
                if job.checkpoint.stream:
                    chunk.on_send = job.note_sent(part.newest_ns)
                    chunk.stream, chunk.oldest_ns, chunk.newest_ns = job.stream_key, part.oldest_ns, part.newest_ns
                await self._queue.put(chunk)
                left -= part.number
        except BaseException:
            # Cancelled while the queue was full: the next tailer of this job reads these lines again.
            sent.leave()
            self._context.health.records_abandoned(job.service.name, left)
            raise

    def ack(self, records: int, result: ChunkResult, ledger: JobLedger) -> str:
        """Take note that records are delivered or in the dead letter; return the ledger to be stored with that.

        Args:
            records: Their number.
            result: The outcome.
            ledger: The ledger when they were queued: the lines up to them.
        """
        job = self.job
        # What a restart needs: the lines up to these, the states seen up to now.
        delivery = job.acked_ledger.delivery.after(records, result)
        job.acked_ledger = msgspec.structs.replace(ledger.with_seen(job.ledger), delivery=delivery)
        return job.acked_ledger.to_json()

    def lose(self) -> None:
        """Note that records were dropped, since another agent follows the job.

        Later lines must not move the cursor over these, even if this agent follows the job again by then.
        """
        self._is_lost = True

    def on_rejected_age(self, result: ChunkResult) -> None:
        """Report lines that the endpoint rejected for their age: the first ones, then each tenfold number."""
        self._age_lines += result.rejected
        self._age_reason = result.reason
        if self._age_lines >= 10 * self._age_reported:
            self._report_rejected_age()

    def _report_rejected_age(self) -> None:
        status = self.job.redacted_status
        self._age_reported = self._age_lines
        _log.warning(
            "job %s (%s) of service %s: %d %s rejected because of age, now in the dead letter: %s,"
            " then run `tailspan agent replay`: %s",
            status.job_id,
            status.job_name,
            self.job.service.name,
            self._age_lines,
            plural(self._age_lines, "line"),
            age_advice(self._age_reason),
            self._age_reason,
        )

    def _is_void(self) -> bool:
        owns = self._context.owns
        return self._is_lost or (owns is not None and not owns(self.job.service.identity, self.job.status.job_id))

    def check_not_lost(self) -> None:
        """Raise LeaseLostError if lines were dropped because another agent follows the job."""
        if self._is_lost:
            raise LeaseLostError("another agent follows the job")

    def leave_flight(self, seconds: Seconds) -> None:
        """Note that records are acknowledged and stored, or left to another tailer.

        Args:
            seconds: The sums of their lines.
        """
        self._unacked -= 1
        add_seconds(self._unacked_seconds, seconds, -1)
        if not self._unacked:
            self._all_acked.set()

    @property
    def nothing_in_flight(self) -> bool:
        """Whether all that was queued is acknowledged and stored."""
        return not self._unacked and not self._is_lost

    async def all_acked(self) -> None:
        """Wait until all that was queued is acknowledged and stored.

        Raises:
            LeaseLostError: Another agent of the fleet follows the job, and sends what is left.
        """
        await self._all_acked.wait()
        self.check_not_lost()

    async def acked_soon(self) -> None:
        """Wait for the acks that the run span counts, but not long: the logs endpoint may be down or slow.

        Raises:
            LeaseLostError: Another agent of the fleet follows the job, and sends what is left.
        """
        await self._all_acked.wait(self._context.run_span_patience)
        self.check_not_lost()

    async def left_flight(self) -> None:
        """Wait until nothing is queued any more: it is acknowledged and stored, or left to another agent."""
        await self._all_acked.wait()

    async def relayed_seconds(self) -> Seconds:
        """Return the per-second sums of all lines that were sent or queued."""
        seconds = await self._context.store.seconds(self.job.checkpoint.key)
        add_seconds(seconds, self._unacked_seconds)
        return seconds

    async def discount_repeats(self, repeated: Seconds) -> None:
        """Count lines once that were sent twice: the sums say what the service has, not what was sent.

        Args:
            repeated: The sums of the lines that were sent again.
        """
        lines, uid_sum = (sum(column) for column in zip(*repeated.values(), strict=True))
        stream_hash = (self.ledger.stream_hash - uid_sum) % (1 << 64)
        self.job.update_ledger(lines=self.ledger.lines - lines, stream_hash=stream_hash)
        negative: Seconds = {}
        add_seconds(negative, repeated, -1)
        await self._put([_Records([], 0, 0, 0, 0)], None, negative)

    async def _in_stream(self, oldest_ns: int, newest_ns: int, put: Callable[[bool], Awaitable[None]]) -> None:
        """Queue lines or a record in the log stream in which the store accepts them.

        Args:
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
            newest_ns: The time of the newest of them.
            put: Queues them; called with whether the store may reject them all the same.
        """
        if self._stays_in_main_stream(oldest_ns):
            await put(False)
        else:
            async with self._log_stream(oldest_ns, newest_ns) as is_behind:
                await put(is_behind)

    def _stays_in_main_stream(self, oldest_ns: int) -> bool:
        """Return whether the next lines follow the job's last ones in the main stream, as those of most jobs do.

        The order among jobs does not matter there, so that `_log_stream` need not hold the stream.

        Args:
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
        """
        job, name = self.job, self.job.status.job_name
        return (
            job.checkpoint.stream == MAIN_STREAM
            and not job.is_log_name_shared
            and oldest_ns >= time.time_ns() - WINDOW_NS
            and not job.is_past
            and self._queue is self._context.queue(job.service.name, name)
            # If there is no room for the name, `_log_stream` counts the job.
            and self._context.log_names.take(name, is_shared=True)
        )

    @asynccontextmanager
    async def _log_stream(self, oldest_ns: int, newest_ns: int) -> AsyncIterator[bool]:
        """Change to the log stream in which the store accepts the next lines, and hold it until they are queued.

        If another job put newer lines into the stream meanwhile, these would be too far behind them.

        Args:
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
            newest_ns: The time of the newest of them.

        Yields:
            Whether the store may reject the lines all the same.
        """
        job, streams, log_names = self.job, self._context.store_streams, self._context.log_names
        service_name = job.service.name
        for name in (job.status.job_name, OTHER_PIPELINES):
            async with streams.hold(service_name, name):
                current, is_past = job.checkpoint.stream, job.is_past
                stream = streams.find(service_name, name, current, oldest_ns, is_past=is_past, now_ns=time.time_ns())
                if name != OTHER_PIPELINES and not log_names.take(name, stream, is_shared=job.is_log_name_shared):
                    continue
                is_behind = streams.note(service_name, name, stream, oldest_ns, newest_ns)
                queue = self._context.queue(service_name, name)
                if stream != current or queue is not self._queue:
                    # Lines that are sent again after a crash must be equal, their stream included.
                    await self.all_acked()
                self._queue = queue
                job.change_stream(name, stream)
                yield is_behind
                return

    async def _send_event(self, record: LogRecordData) -> None:
        await self._send_record(record, of_events=True)

    async def _send_record(
        self, record: LogRecordData, *, of_events: bool = False, completes: bool | None = None
    ) -> None:
        if self._queue is not None:
            at_ns = record.time_unix_nano
            await self._in_stream(at_ns, at_ns, partial(self._put_record, record, of_events, completes))

    async def _put_record(
        self, record: LogRecordData, of_events: bool, completes: bool | None, is_behind: bool
    ) -> None:
        self._context.health.records_read(self.job.service.name, 1)
        resource, at_ns = self.job.event_resource if of_events else None, record.time_unix_nano
        records = _Records([(encode_log_record(record), 1)], 1, at_ns, at_ns, at_ns)
        await self._put([records], None, {}, resource=resource, alone=is_behind, are_lines=False, completes=completes)

    def end_run(self, *, log_complete: bool) -> None:
        """Write the last spans and count the run: once, whether or not the endpoint is available.

        Args:
            log_complete: Whether the log was read to its end.
        """
        delivery_known = self.nothing_in_flight
        self.job.update_ledger(delivery=self.job.acked_ledger.delivery)
        self._end_run(log_complete=log_complete and delivery_known, delivery_known=delivery_known)

    async def end_run_ahead(
        self, read: Callable[[], AsyncGenerator[LogPage, None]], find_failure: Callable[[], Awaitable[Failure | None]]
    ) -> None:
        """Write the last spans and count the run before its lines, which the logs endpoint does not accept now.

        Args:
            read: Reads the log from its start.
            find_failure: Returns why the job failed.
        """
        job = self.job
        ledger = JobLedger(first_seen_ns=job.ledger.first_seen_ns)
        lines, task_lines = SpanLines() if job.span_lines is not None else None, LineTimes()
        failure = job.ledger.failure
        if job.status.state is not JobState.SUCCEEDED and failure is None:
            failure = await find_failure()
        with suppress(CursorExpiredError):
            async with aclosing(read()) as pages:
                async for page in pages:
                    ledger = ledger.with_page(page)
                    task_lines.add(page)
                    if lines is not None:
                        lines.add(page, self.log_context)
        if self._run_reported:
            return
        relayed, relayed_lines, relayed_task_lines = job.ledger, job.span_lines, job.task_lines
        job.ledger = msgspec.structs.replace(ledger.with_seen(relayed), failure=failure)
        job.span_lines, job.task_lines = lines, task_lines
        try:
            self._end_run(log_complete=False, delivery_known=False)
        finally:
            job.ledger = msgspec.structs.replace(relayed.with_seen(job.ledger), failure=failure)
            job.span_lines, job.task_lines = relayed_lines, relayed_task_lines

    @property
    def run_reported(self) -> bool:
        """Whether the last spans are written and the run is counted."""
        return self._run_reported

    def _end_run(self, *, log_complete: bool, delivery_known: bool) -> None:
        job, reported_before = self.job, self._run_reported
        self._run_reported = True
        job.update_ledger(logs_complete=log_complete)
        name = self._context.names.label(job.status.job_name)
        history = self._context.pipeline_stats.histories.of(name)
        run = past_run(job.status, job.ledger, name, history, now_unix_nano=time.time_ns())
        if run.too_fast and not reported_before:
            job.ledger = job.ledger.with_alert(run.ended_unix_nano, "too_fast")
        if self.spans.end_run(run, delivery_known=delivery_known) and run.too_fast:
            self.alerts.on_too_fast(run, history)

    async def complete_log(self, *, read_to_end: bool, late_lines: bool = False, still_open: bool = False) -> None:
        """Wait for the last acknowledgement, write the receipt or amend it, and store that the log is complete.

        Args:
            read_to_end: Whether the log was read to its present end.
            late_lines: Whether lines may still become visible.
            still_open: Whether the service marks the log as open.
        """
        await self.all_acked()
        if self._age_lines > self._age_reported:
            self._report_rejected_age()
        if self.relays_logs:
            acked = self.job.acked_ledger
            self.job.ledger = msgspec.structs.replace(
                acked,
                logs_complete=read_to_end and not still_open,
                receipts=acked.receipts + 1,
            )
            record = receipt_record(self.job.redacted_status, self.ledger, still_open=still_open)
            await self._send_record(record, completes=late_lines)
            await self.all_acked()

    def close_log(self, *, late_lines: bool = False) -> None:
        """Store that all lines are acknowledged.

        Args:
            late_lines: Whether more may still become visible.
        """
        self._context.store.complete_logs(self.job.checkpoint.key, late=late_lines)
