"""The tailer: the task that follows one job, from its first sight to its run span.

It drives the pure `tailspan.logs.follow.Follower`, reads pages, and hands them to the job's `JobPipeline`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

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
from tailspan.logs.page import LogPage
from tailspan.models import JobState, ListedJob
from tailspan_agent.analysis.assessment import JobSnapshot, assess
from tailspan_agent.analysis.failure import failure_of
from tailspan_agent.job.alerts import new_alerts
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.job_pipeline import JobPipeline
from tailspan_agent.receiver.poll_schedule import PollSchedule, status_known_of
from tailspan_agent.receiver.reconcile import last_lines, relay_missing
from tailspan_agent.receiver.source import Source

__all__ = ["Tailer"]

_FOLLOW_TO_END_S = 3600.0
_AUTH_RETRY_S = 30.0
_RUN_SPAN_WAIT_S = 2.0
_LATE_POLLS_S = (10.0, 600.0)

_log = logging.getLogger(__name__)


class Tailer:
    """Follows one job and relays it.

    Args:
        context: What all tailers share.
        source: The service that has the job.
        watch: The watch that matched it.
        job_id: The job.
        name: Its name, where it is known before its first status.
        once: Relay what is readable now, then stop; an ended job completely.

    Attributes:
        schedule: When it looks at the job.
        finished: Whether the job has ended and everything of it was relayed and acked.
        failure: Why the last attempt failed; None after one that succeeded.
    """

    def __init__(
        self, context: PipelineContext, source: Source, watch: Watch, job_id: str, name: str = "", *, once: bool = False
    ) -> None:
        self.finished = False
        self.failure: TailspanError | None = None
        self.watch = watch
        self.job_id = job_id
        self.once = once
        self._context = context
        self._source = source
        self._service = source.service
        self._sent: JobPipeline | None = None
        self._first_seen_ns = time.time_ns()
        self._follower = Follower(
            poll_min_s=self._service.poll_min_s,
            poll_max_s=self._service.poll_max_s,
            settle_s=watch.settle,
            follow_to_end_s=0.0 if once else _FOLLOW_TO_END_S,
        )
        self.schedule = PollSchedule(self._follower)
        self._name = name
        self._done = self._end_told = self._came_late = False
        self._errors = 0
        self._behind = True
        self._stream = self._stream_of(name)
        if name:
            # Before anybody reads: who is the oldest of a pipeline is known only when all have said where they are.
            context.stream_order.join(self._stream, self)

    @property
    def service_name(self) -> str:
        """The configured name of the job's service."""
        return self._service.name

    @property
    def job_name(self) -> str:
        """The job's name; empty where it is not known before its first status."""
        return self._sent.job.job_name if self._sent is not None else self._name

    @property
    def late(self) -> bool:
        """Whether all of the job was relayed, and it is looked at for lines that become visible late."""
        return self._sent is not None and self._sent.late

    @property
    def followed(self) -> JobSnapshot | None:
        """What the metrics say of this job now; None before anything is known of it and after its end."""
        if self.finished or self.late:
            return None
        if self._sent is not None:
            return self._sent.followed
        return self.schedule.listed(self._service, self._name)

    def on_row(self, row: ListedJob) -> None:
        """Take in the job's row of a listing; a job that has become odd is looked at, too."""
        self.schedule.on_row(row)
        if self._sent is not None and self._sent.job.last_heartbeat is not None and self.schedule.is_long_parked:
            # A heartbeat that nobody looks for is not one that has stopped.
            self._sent.job = dataclasses.replace(self._sent.job, last_heartbeat=None)
        followed = self.followed if self.schedule.parked else None
        if followed is not None:
            history = self._context.pipeline_stats.histories.of(self._context.names.find(self.job_name))
            ledger = self._sent.ledger if self._sent is not None else JobLedger(first_seen_ns=self._first_seen_ns)
            if any(new_alerts(assess(followed, history, time.time_ns()), ledger)):
                self.schedule.wake()

    def use(self, watch: Watch) -> None:
        """Go over to a changed watch; cursor and what is in flight stay."""
        self.watch = watch
        self._follower.settle_s = watch.settle
        if self._sent is not None:
            self._sent.use(watch)

    async def run(self) -> None:
        """Follow the job to its end; returns when nothing is left to do for it."""
        try:
            if not self._source.is_cheap and self._has_nothing_new():
                self.leave_stream()
                await self.schedule.wait(self._source.first_look_delay_s())
            while not (self._done or self.finished):
                try:
                    delay_s = await self._turn()
                    self.failure, self._errors = None, 0
                except ServiceError as error:
                    if isinstance(error, JobNotFoundError) and await self._is_gone():
                        await self._gone(error)
                        return
                    delay_s = self._after(error)
                    if self.once:
                        return
                    # Others of its stream must not wait for a job that cannot be read.
                    self.leave_stream()
                if not (self._done or self.finished):
                    await self.schedule.wait(delay_s)
        finally:
            self.leave_stream()

    def _has_nothing_new(self) -> bool:
        """Return whether the list says that there is no line but those that were relayed."""
        row = self.schedule.row
        if self.once or row is None or row.state not in (JobState.PENDING, JobState.RUNNING):
            return False
        known = self._context.store.job(self._service.identity, self.job_id)
        try:
            return row.lines == (JobLedger.from_json(known.ledger).lines if known is not None else 0)
        except ValueError:
            return False

    def leave_stream(self) -> None:
        """Let the others of its stream go on."""
        self._context.stream_order.leave(self._stream, self)

    def _stream_of(self, name: str) -> str:
        return f"{self._service.name}/{name}"

    async def _turn(self) -> float | None:
        """Ask, read and relay once; return how long to wait for the next time, see `PollSchedule.delay_s`."""
        first = self._sent is None
        sent = self._sent
        asked = sent is None or self.schedule.status_is_due(late=self.late)
        if sent is None or asked:
            sent = await self._see_status()
        if sent.done:
            self.finished = True
            return None
        running = not self._follower.state.is_terminal
        if first and running and not self.schedule.told and self._has_nothing_new():
            await sent.tell_what_is_odd()
            return None
        if sent.late:
            self._done = self.once
            return await self._look_again(sent)
        started_s, from_start = time.monotonic(), sent.cursor is None
        unstarted = first or sent.ledger.first_line_ns is None
        lines = await self._read(sent)
        self._follower.on_read(lines, started_s, from_start=from_start)
        if lines and unstarted and not self._follower.state.is_terminal:
            # A first line says that it has started; its service may know when. The last ones are written at its end.
            sent = await self._see_status() if sent.job.state is JobState.PENDING else sent
            sent.write_spans()
        if self.schedule.on_read(lines) and not first:
            await self._see_status()
        if asked or not lines:
            await sent.tell_what_is_odd()
        if self._follower.complete:
            # Something outlives the job and may still write. Its trace is whole now, its log is followed on.
            still_open = sent.job.logs_complete is False and sent.sends_logs
            if not (still_open and self._end_told):
                await self._finish(sent, logs_complete=not still_open)
        if self.once and (self._follower.complete or not self._follower.state.is_terminal):
            await sent.all_acked()
            self._done = True
        return self.schedule.delay_s(behind=self._behind, gather_s=self._source.gather_s(sent.cursor))

    async def _see_status(self) -> JobPipeline:
        sent = self._sent
        self._context.health.polled(self._service.name)
        job = await self._service.get_job(self.job_id)
        now_s = self.schedule.on_status(job)
        if sent is None:
            await self._context.nothing_in_flight(self._service.identity, self.job_id)
            with self._context.store.together():
                sent = JobPipeline(self._context, self._service, self.watch, job, self._first_seen_ns)
                if not sent.done:
                    sent.see(job)
            self._sent = sent
            self.leave_stream()
            self._stream = self._stream_of(job.job_name)
        else:
            sent.see(job)
        self._follower.on_status(job, now_s, time.time())
        return sent

    async def _read(self, sent: JobPipeline) -> int:
        """Relay the lines that are readable now; return how many."""
        if self._behind and sent.sends_logs:
            self._context.stream_order.join(self._stream, self, sent.position_ns)
            await self._context.stream_order.turn(self._stream, self)
        queue = self._context.queue(self._service.identity, self.job_id)
        lines, more = 0, True
        while more:
            readers, keys = self._source.readers(queue, sent.cursor)
            # A long log is read in turns with the others of its lane, or a line of theirs would wait for all of it.
            async with readers:
                found, more = await self._read_from(sent, **keys)
            lines += found
        if not lines and sent.nothing_in_flight:
            self._behind = False
            self.leave_stream()
        return lines

    async def _read_from(self, sent: JobPipeline, **keys: Any) -> tuple[int, bool]:
        """Relay lines after the cursor; return how many, and whether the log may have more behind the new cursor."""
        self._context.health.polled(self._service.name)
        lines, left = 0, self._source.pages_a_turn
        try:
            async with aclosing(self._pages(sent.cursor, late_window_s=self.watch.late_window, **keys)) as pages:
                async for page in pages:
                    lines += page.line_count
                    await sent.send_page(page)
                    left -= 1
                    if not left:
                        return lines, True
        except CursorExpiredError as error:
            if error.resume_cursor == sent.cursor:
                raise
            _log.warning("job %s of service %s: lines are lost: %s", self.job_id, self._service.name, error)
            self._context.health.gap(self._service.name)
            sent.cursor = error.resume_cursor
            return lines, True
        return lines, False

    async def _pages(self, cursor: bytes | None = None, **keys: Any) -> AsyncGenerator[LogPage, None]:
        pages = self._service.read_logs(self.job_id, cursor, **keys)
        # Closed at whatever page this task is cancelled, so that its connection is free at once.
        async with aclosing(pages):
            try:
                async for page in pages:
                    yield page
            except JobNotFoundError:
                # A job that wrote nothing may have no log; whether the job is gone only its own status says.
                await self._service.get_job(self.job_id)

    async def _finish(self, sent: JobPipeline, *, logs_complete: bool) -> None:
        """The job has ended and its log was read to the end: relay what came late, write its spans, count its run.

        Args:
            sent: The job.
            logs_complete: Whether no further line can come.
        """
        if self._may_lack_lines(sent) and sent.sends_logs and not self._follower.read_whole:
            await relay_missing(self._pages, sent)
        if sent.job.state is not JobState.SUCCEEDED and sent.ledger.failure is None:
            sent.ledger = msgspec.structs.replace(sent.ledger, failure=failure_of(await last_lines(self._pages, sent)))
        # The run span says what was acked, but it does not wait for a logs endpoint that is away, nor for room there.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RUN_SPAN_WAIT_S):
                await sent.all_acked()
        sent.end(logs_complete=logs_complete)
        self._end_told = True
        await sent.send_failure()
        if logs_complete:
            # A service that does not mark the end of a log may show a line of it whenever it likes.
            late = sent.job.logs_complete is None and sent.sends_logs and self._ended_ago_s(sent) < _FOLLOW_TO_END_S
            await sent.complete(logs_complete=True, late=late)
            self.finished = self.once or not late

    async def _look_again(self, sent: JobPipeline) -> float | None:
        """All of it was relayed: relay what became visible since then, and say when to look again."""
        ago_s = self._ended_ago_s(sent)
        lines = await self._read(sent)
        self._came_late = self._came_late or lines > 0
        over = ago_s >= _FOLLOW_TO_END_S
        if over and self._came_late and self._may_lack_lines(sent):
            # It has shown that it is late, so what lies before the window may be missing, too.
            lines += await relay_missing(self._pages, sent)
        if lines:
            await sent.complete(logs_complete=True, late=not over)
        elif over:
            sent.settle()
        self.finished = over
        if over or self.once:
            return None
        shortest_s, longest_s = _LATE_POLLS_S
        return min(max(shortest_s, ago_s), longest_s) * random.uniform(0.9, 1.1)

    def _may_lack_lines(self, sent: JobPipeline) -> bool:
        """Return whether lines may have become visible where no read looked for them."""
        by_times = self._service.final_read and not self._source.merges(sent.cursor)
        return by_times and self.watch.final_read

    @staticmethod
    def _ended_ago_s(sent: JobPipeline) -> float:
        """Return how long ago the job ended, in seconds, as well as anybody knows."""
        now_ns = time.time_ns()
        seen_ns = sent.ledger.states[-1][0] if sent.ledger.states else now_ns
        return (now_ns - min(seen_ns, sent.ended_ns or sent.ledger.last_line_ns or seen_ns)) / 1e9

    async def _is_gone(self) -> bool:
        """Return whether the service has deleted the job: only a 404 on its own status says so, one on its log not."""
        try:
            await self._service.get_job(self.job_id)
        except JobNotFoundError:
            return True
        except ServiceError:
            return False
        return False

    async def _gone(self, error: JobNotFoundError) -> None:
        """The service deleted a job that was followed: what was read stays true, and its trace gets its root."""
        if self._sent is None:
            self._sent = self._remembered()
        sent = self._sent
        if sent is None:
            self.failure = error
            return
        if sent.late:
            sent.settle()
            self.failure, self.finished = None, True
            return
        _log.warning("job %s is gone at service %s before its end was relayed", self.job_id, self._service.name)
        self._context.health.gap(self._service.name)
        if not sent.job.state.is_terminal:
            reason = "the job was deleted at its service while it was followed"
            sent.see(dataclasses.replace(sent.job, state=JobState.LOST, error=reason))
        sent.end(logs_complete=False)
        await sent.complete(logs_complete=False)
        self.failure, self.finished = None, True

    def _remembered(self) -> JobPipeline | None:
        """Return a job that the service has forgotten and the store has not."""
        known = self._context.store.job(self._service.identity, self.job_id)
        if known is None:
            return None
        job = status_known_of(self._service, self.job_id, known.name)
        sent = JobPipeline(self._context, self._service, self.watch, job, self._first_seen_ns)
        if sent.ledger.states and sent.ledger.states[-1][1].is_terminal:
            sent.job = dataclasses.replace(job, state=sent.ledger.states[-1][1])
        return sent

    def _after(self, error: ServiceError) -> float:
        """Say what went wrong, once, and return how long to wait before the next try."""
        self._context.health.poll_failed(self._service.name, error)
        if self.failure is None:
            _log.warning("job %s of service %s: %s", self.job_id, self._service.name, error)
        self.failure = error
        self._errors += 1
        if self._sent is not None:
            self._sent.job = dataclasses.replace(self._sent.job, stale=True)
        if isinstance(error, AuthError):
            return _AUTH_RETRY_S
        asked_s = error.retry_after_s if isinstance(error, ServiceUnavailableError) else None
        return backoff_s(self._errors, random.random(), retry_after_s=asked_s)
