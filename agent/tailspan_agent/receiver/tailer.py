"""`Tailer`: follows one job from its discovery to its last acknowledged line.

It polls the service, feeds the job's `Follower` and `JobLifecycle` with what it reads, and carries out the actions
that the lifecycle returns. Lines go to the job's `JobPipeline`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from functools import partial

from tailspan._backoff import backoff_s
from tailspan.config import Watch
from tailspan.errors import (
    AuthError,
    CursorExpiredError,
    JobNotFoundError,
    ServiceError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.logs.follow import Follower
from tailspan.models import JobState, ListedJob
from tailspan_agent.analysis.assessment import JobSnapshot, assess
from tailspan_agent.analysis.failure import Failure, failure_of
from tailspan_agent.job.alerts import new_alerts
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.job_pipeline import JobPipeline
from tailspan_agent.pipeline.stream_order import CatchUp
from tailspan_agent.receiver.lifecycle import (
    Action,
    AllAcked,
    AwaitAcks,
    CloseLog,
    CompleteLog,
    EndReported,
    JobDeleted,
    JobLifecycle,
    LateLinesRead,
    LogCompleted,
    LogRead,
    Observation,
    ReadLateLines,
    ReadLog,
    Reconcile,
    Reconciled,
    ReportEnd,
    ReportLost,
    StatusSeen,
    TailState,
    WaitForChange,
    advance,
)
from tailspan_agent.receiver.poll_schedule import PollSchedule, late_lines_delay_s, status_known_of
from tailspan_agent.receiver.reconcile import last_lines, relay_missing
from tailspan_agent.receiver.source import Source

__all__ = ["Tailer"]

_AUTH_RETRY_S = 30.0

_log = logging.getLogger(__name__)


class Tailer:
    """Follows and relays one job.

    Args:
        context: Shared by all jobs.
        source: The service that has the job.
        watch: The watch that matched the job.
        job_id: The job.
        name: The job's name; empty if it is not known before the first status.
        once: Relay what is readable now, then stop; an ended job completely.
        on_first_turn: Called with the job's id when the first turn is over, however it ended; may be called again.

    Attributes:
        on_due: Called with this object when a poll is due while the schedule rests.
        schedule: When the job is polled.
        lifecycle: The state of the job.
        failure: Why the last poll failed; None after one that succeeded.
    """

    __slots__ = (
        "_catch_up",
        "_context",
        "_errors",
        "_first_seen_ns",
        "_follower",
        "_is_listed",
        "_is_new",
        "_name",
        "_on_first_turn",
        "_pipeline",
        "_service",
        "_source",
        "failure",
        "job_id",
        "lifecycle",
        "on_due",
        "schedule",
        "watch",
    )

    def __init__(
        self,
        context: PipelineContext,
        source: Source,
        watch: Watch,
        job_id: str,
        name: str = "",
        *,
        once: bool = False,
        on_first_turn: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.failure: TailspanError | None = None
        self.watch = watch
        self.job_id = job_id
        self.lifecycle = JobLifecycle(once=once, relays_logs=bool(context.queues))
        self._context = context
        self._source = source
        self._service = source.service
        self._pipeline: JobPipeline | None = None
        self._first_seen_ns = time.time_ns()
        self._follower = Follower(
            poll_min_s=self._service.poll_min_s,
            poll_max_s=self._service.poll_max_s,
            settle_s=watch.settle,
        )
        self.on_due: Callable[[Tailer], object] = lambda _: None
        self.schedule = PollSchedule(self._follower, self._call_on_due, has_tasks=source.has_tasks)
        self._name = name
        self._errors = 0
        self._on_first_turn = on_first_turn
        self._is_new, self._is_listed = True, False
        self._catch_up = CatchUp(context.stream_order, self._service.name, name)

    def _call_on_due(self) -> None:
        self.on_due(self)

    @property
    def service_name(self) -> str:
        """The configured name of the job's service."""
        return self._service.name

    @property
    def job_name(self) -> str:
        """The job's name; empty if it is not known before the first status."""
        return self._pipeline.status.job_name if self._pipeline is not None else self._name

    @property
    def once(self) -> bool:
        """Whether this is a single pass."""
        return self.lifecycle.once

    @property
    def finished(self) -> bool:
        """Whether the job has ended and all of it is relayed and acknowledged."""
        return self.lifecycle.state is TailState.DONE

    @property
    def expects_late_lines(self) -> bool:
        """Whether the job is over and relayed, and only late lines may follow."""
        return self.lifecycle.state is TailState.LATE_LINES

    @property
    def followed(self) -> JobSnapshot | None:
        """The job as metrics and page show it; None before anything is known of the job, and after its end."""
        if self.finished or self.expects_late_lines:
            return None
        if self._pipeline is not None:
            return self._pipeline.snapshot
        return self.schedule.listed(self._service, self._name)

    def on_row(self, row: ListedJob) -> None:
        """Apply the job's row of the list; wake the tailer of a parked job that has become silent or slow."""
        self.schedule.on_row(row)
        if self._is_new and not self._is_listed and self._has_nothing_new():
            # Before any job of its stream is read: a silent one has nothing for which the others must wait.
            self.leave_stream()
            self._is_listed = True
            self._context.health.run_changes.set()
        if self._pipeline is not None and self.schedule.is_long_parked:
            self._pipeline.expire_heartbeat()
        if self.schedule.parked and self._has_new_alert():
            self.schedule.wake()

    def _has_new_alert(self) -> bool:
        """Return whether the job has become silent or slow, and no alert says so."""
        history = self._context.pipeline_stats.histories.of(self._context.names.find(self.job_name))
        # With too few past runs nothing is unusual: thousands of jobs of new pipelines need no snapshot.
        followed = self.followed if history.is_enough else None
        if followed is None:
            return False
        ledger = self._pipeline.ledger if self._pipeline is not None else JobLedger(first_seen_ns=self._first_seen_ns)
        return any(new_alerts(assess(followed, history, time.time_ns()), ledger))

    def apply_settings(self, watch: Watch) -> None:
        """Apply changed watch settings; cursor and queued lines stay as they are."""
        self.watch = watch
        self._follower.settle_s = watch.settle
        if self._pipeline is not None:
            self._pipeline.apply_settings(watch)

    async def report_end_ahead(self) -> None:
        """Report the end of a job whose lines wait, because the logs endpoint accepts none of them now."""
        pipeline = self._pipeline
        if pipeline is None or pipeline.run_reported or not pipeline.relays_logs:
            return
        if not self._follower.ended and (pipeline.status.state.is_terminal or self.schedule.status_is_due()):
            await self._poll_status()
        if self._follower.ended and pipeline.job.ended_ago_s >= self.watch.settle:
            read = partial(self._source.pages, self.job_id)

            async def find_failure() -> Failure | None:
                return failure_of(await last_lines(read, pipeline))

            await self._poll_tasks(pipeline)
            await pipeline.end_run_ahead(read, find_failure)

    def leave_stream(self) -> None:
        """Let the other jobs of the stream continue."""
        self._catch_up.leave()

    async def run(self) -> None:
        """Follow the job until its schedule rests, or until nothing is left to do for it.

        Raises:
            TailspanError: The store cannot be used, or the service broke a promise; a new tailer may retry.
        """
        try:
            if self._is_new and self._waits_for_first_poll():
                return
            while not self.lifecycle.is_over:
                self.schedule.on_poll()
                try:
                    delay_s = await self._turn()
                    self.failure, self._errors = None, 0
                except ServiceError as error:
                    if isinstance(error, JobNotFoundError) and await self._is_deleted():
                        await self._on_deleted(error)
                        return
                    delay_s = self._on_error(error)
                    if self.once:
                        return
                    # A job that cannot be read must not hold up the others of its stream.
                    self.leave_stream()
                self._on_first_turn(self.job_id)
                if self.lifecycle.is_over or self.schedule.rest(delay_s):
                    return
                await asyncio.sleep(0)
        finally:
            if not self.schedule.is_resting:
                self.leave_stream()
                self._on_first_turn(self.job_id)

    def _waits_for_first_poll(self) -> bool:
        """Return whether the first poll is due later: the list shows nothing new of the job."""
        self._is_new = False
        if self._source.polls_are_free or not self._has_nothing_new():
            return False
        return self.schedule.rest(self._source.first_poll_delay_s())

    def _has_nothing_new(self) -> bool:
        """Return whether the list shows no line but those that were relayed."""
        row = self.schedule.row
        if self.once or row is None or row.state not in (JobState.PENDING, JobState.RUNNING):
            return False
        known = self._context.store.job(self._service.identity, self.job_id)
        try:
            return row.lines == (JobLedger.from_json(known.ledger).lines if known is not None else 0)
        except ValueError:
            return False

    def _advance(self, seen: Observation) -> Action:
        self.lifecycle, action = advance(self.lifecycle, seen)
        return action

    async def _turn(self) -> float | None:
        """Poll the job once; return the delay until the next poll, see `PollSchedule.delay_s`."""
        pipeline, action = self._pipeline, self.lifecycle.next_read
        if pipeline is not None:
            pipeline.check_not_lost()
        opened = pipeline is None
        status_polled = opened or self.schedule.status_is_due(late=self.expects_late_lines)
        if pipeline is None or status_polled:
            pipeline, action = await self._poll_status()
        match action:
            case ReadLog():
                return await self._read_turn(pipeline, opened=opened, status_polled=status_polled)
            case ReadLateLines():
                return await self._late_turn(pipeline)
            case WaitForChange():
                await pipeline.report_anomalies()
        return None

    async def _poll_status(self) -> tuple[JobPipeline, Action]:
        """Request the status; return the pipeline, which the first status opens, and the action that follows."""
        pipeline = self._pipeline
        self._context.health.polled(self._service.name)
        status = await self._source.get_job(self.job_id)
        now_s = self.schedule.on_status(status)
        terminal, end_mark = status.state.is_terminal, status.logs_complete
        if pipeline is not None:
            pipeline.on_status(status)
            await self._poll_tasks(pipeline)
            self._follower.on_status(status, now_s, time.time())
            return pipeline, self._advance(StatusSeen(terminal=terminal, end_mark=end_mark))
        await self._context.nothing_in_flight(self._service.identity, self.job_id)
        with self._context.store.together():
            pipeline = JobPipeline(
                self._context, self._service, self.watch, status, self._first_seen_ns, is_listed=self._is_listed
            )
            late_lines = pipeline.job.checkpoint.late
            if late_lines or not pipeline.completed_before:
                pipeline.on_status(status)
        self._pipeline = pipeline
        self.schedule.forget_listed()
        if late_lines or not pipeline.completed_before:
            await self._poll_tasks(pipeline)
        self._catch_up.move(self._service.name, pipeline.status.job_name)
        self._follower.on_status(status, now_s, time.time())
        first = StatusSeen(
            terminal=terminal,
            end_mark=end_mark,
            completed_before=pipeline.completed_before,
            late_lines=late_lines,
            nothing_new=not terminal and not self.schedule.has_changes and self._has_nothing_new(),
        )
        return pipeline, self._advance(first)

    async def _poll_tasks(self, pipeline: JobPipeline) -> None:
        """Request the job's tasks, if its service has tasks."""
        tasks = await self._source.list_tasks(self.job_id)
        if tasks is not None:
            self._context.health.polled(self._service.name)
            pipeline.on_tasks(tasks)

    async def _read_turn(self, pipeline: JobPipeline, *, opened: bool, status_polled: bool) -> float | None:
        """Relay the lines that are readable now, and the end of the job once it is certain."""
        started_s, from_start = time.monotonic(), pipeline.cursor is None
        unstarted = opened or pipeline.ledger.first_line_ns is None
        lines = await self._read(pipeline)
        self._follower.on_read(lines, started_s, from_start=from_start)
        if not (self._follower.complete or pipeline.spans.has_written):
            pipeline.spans.write()  # the end of this job is not near: its log is long, or settles
        pipeline.write_attempts()
        if lines and unstarted and not self._follower.state.is_terminal:
            # The first line shows that the job has started; its service may know when. The end writes all spans.
            if pipeline.status.state is JobState.PENDING:
                await self._poll_status()
            pipeline.spans.write()
        if self.schedule.on_read(lines) and not opened:
            await self._poll_status()
        if status_polled or not lines:
            await pipeline.report_anomalies()
        await self._carry_out(self._advance(LogRead(complete=self._follower.complete)), pipeline)
        if self.lifecycle.is_over:
            return None
        gather_s = self._source.gather_s(pipeline.cursor)
        delay_s = self.schedule.delay_s(catching_up=self._catch_up.catching_up, gather_s=gather_s)
        wait_s = None if lines else await self._relay_open_line(pipeline)
        return min((one for one in (delay_s, wait_s) if one is not None), default=None)

    async def _relay_open_line(self, pipeline: JobPipeline) -> float | None:
        """Relay what a running job has written of its next line; return when more of it may be sent, in seconds."""
        if self.once or not pipeline.relays_logs or self.lifecycle.state is not TailState.FOLLOWING:
            return None
        line = await self._source.open_line(self.job_id)
        return None if line is None else await pipeline.send_open_line(line)

    async def _late_turn(self, pipeline: JobPipeline) -> float | None:
        """Relay the lines that became visible after the log was complete."""
        ended_ago_s, started_s = pipeline.job.ended_ago_s, time.monotonic()
        lines = await self._read(pipeline)
        self._follower.on_read(lines, started_s)
        may_lack_lines = self._may_lack_lines(pipeline)
        seen = LateLinesRead(lines=lines, ended_ago_s=ended_ago_s, may_lack_lines=may_lack_lines)
        await self._carry_out(self._advance(seen), pipeline)
        # A log that is marked as open has a writer.
        return self.schedule.delay_s() if self.lifecycle.end_mark is False else late_lines_delay_s(ended_ago_s)

    async def _carry_out(self, action: Action, pipeline: JobPipeline) -> None:
        """Carry out an action and those that follow from it, until the next one is to wait or to stop."""
        while True:
            match action:
                case ReportEnd(log_complete=log_complete):
                    await self._report_end(pipeline, log_complete=log_complete)
                    ended_ago_s = pipeline.job.ended_ago_s
                    action = self._advance(EndReported(log_complete=log_complete, ended_ago_s=ended_ago_s))
                case CompleteLog(late_lines=late_lines, still_open=still_open):
                    await pipeline.complete_log(read_to_end=True, late_lines=late_lines, still_open=still_open)
                    action = self._advance(LogCompleted(late_lines=late_lines))
                case CloseLog():
                    pipeline.close_log()
                    action = self._advance(LogCompleted())
                case Reconcile(lines=lines):
                    found = await relay_missing(partial(self._source.pages, self.job_id), pipeline)
                    action = self._advance(Reconciled(lines=lines + found))
                case AwaitAcks():
                    await pipeline.all_acked()
                    action = self._advance(AllAcked())
                case ReportLost():
                    await self._report_lost(pipeline)
                    action = self._advance(LogCompleted())
                case _:
                    return

    async def _read(self, pipeline: JobPipeline) -> int:
        """Relay the lines that are readable now; return how many."""
        if pipeline.relays_logs:
            await self._catch_up.turn(pipeline.position_ns)
        lines, more = 0, True
        while more:
            # A long log is read in turns with the other jobs of its queue: their lines do not wait for all of it.
            found, more = await self._read_pages(pipeline)
            lines += found
        if not lines and pipeline.nothing_in_flight:
            self._catch_up.caught_up()
        return lines

    async def _read_pages(self, pipeline: JobPipeline) -> tuple[int, bool]:
        """Relay one turn of pages after the cursor; return the number of lines, and whether to continue."""
        lines, left = 0, self._source.pages_per_turn
        async with self._source.open_log(
            self.job_id, pipeline.cursor, pipeline.queue, late_window_s=self.watch.late_window
        ) as pages:
            self._context.health.polled(self._service.name)
            try:
                async for page in pages:
                    lines += page.line_count
                    await pipeline.send_page(page)
                    left -= 1
                    if not left:
                        return lines, True
            except CursorExpiredError as error:
                if error.resume_cursor == pipeline.cursor:
                    raise
                _log.warning("job %s of service %s: lines are lost: %s", self.job_id, self._service.name, error)
                self._context.health.gap(self._service.name)
                pipeline.skip_to(error.resume_cursor)
                return lines, True
        return lines, False

    async def _report_end(self, pipeline: JobPipeline, *, log_complete: bool) -> None:
        """Relay what became visible late, find why the job failed, write the last spans and count the run."""
        read = partial(self._source.pages, self.job_id)
        if self._may_lack_lines(pipeline) and pipeline.relays_logs and not self._follower.read_whole:
            await relay_missing(read, pipeline)
        # What happened since the last status: the last attempts may end after the job.
        await self._poll_tasks(pipeline)
        if pipeline.status.state is not JobState.SUCCEEDED and pipeline.ledger.failure is None:
            pipeline.attach_failure(failure_of(await last_lines(read, pipeline)))
        await pipeline.collect_span_lines(read)
        await pipeline.acked_soon()
        pipeline.end_run(log_complete=log_complete)
        await pipeline.send_pending_alerts()

    def _may_lack_lines(self, pipeline: JobPipeline) -> bool:
        """Return whether lines may have become visible where no read looks for them."""
        return self._source.may_be_late(pipeline.cursor) and self.watch.final_read

    async def _is_deleted(self) -> bool:
        """Return whether the service has deleted the job: only a 404 of the status says so, not one of the log."""
        try:
            await self._source.get_job(self.job_id)
        except JobNotFoundError:
            return True
        except ServiceError:
            return False
        return False

    async def _on_deleted(self, error: JobNotFoundError) -> None:
        """Complete a job that the service deleted: what was read stays valid, and the trace gets its root span."""
        if self._pipeline is None:
            self._pipeline = self._restored_pipeline()
        pipeline = self._pipeline
        if pipeline is None:
            self.failure = error
            return
        await self._carry_out(self._advance(JobDeleted(late_lines=pipeline.job.checkpoint.late)), pipeline)
        self.failure = None

    def _restored_pipeline(self) -> JobPipeline | None:
        """Return the pipeline of a job that the store has and the service does not."""
        known = self._context.store.job(self._service.identity, self.job_id)
        if known is None:
            return None
        status = status_known_of(self._service, self.job_id, known.name)
        pipeline = JobPipeline(self._context, self._service, self.watch, status, self._first_seen_ns)
        pipeline.recall_state()
        return pipeline

    async def _report_lost(self, pipeline: JobPipeline) -> None:
        """Write the end of a job that was deleted before its end was relayed."""
        _log.warning("job %s was deleted at service %s before its end was relayed", self.job_id, self._service.name)
        self._context.health.gap(self._service.name)
        pipeline.mark_lost("the job was deleted at its service while it was followed")
        await pipeline.acked_soon()
        pipeline.end_run(log_complete=False)
        await pipeline.complete_log(read_to_end=False)

    def _on_error(self, error: ServiceError) -> float:
        """Log the first of a series of errors; return the delay before the next poll, in seconds."""
        self._context.health.poll_failed(self._service.name, error)
        if self.failure is None:
            _log.warning("job %s of service %s: %s", self.job_id, self._service.name, error)
        self.failure = error
        self._errors += 1
        if self._pipeline is not None:
            self._pipeline.mark_stale()
        if isinstance(error, AuthError):
            return _AUTH_RETRY_S
        asked_s = error.retry_after_s if isinstance(error, ServiceUnavailableError) else None
        return backoff_s(self._errors, random.random(), retry_after_s=asked_s)
