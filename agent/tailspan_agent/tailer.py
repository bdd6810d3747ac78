"""The tailer: one job, from its first sight to its run span.

It drives the pure `tailspan.follow.Follower`, reads pages, encodes them, and puts them into the job's lane. What it
knows of the job's lines goes into the checkpoint together with the cursor, so a restart continues exactly there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from zlib import crc32

from tailspan.clean import clean
from tailspan.config import Watch
from tailspan.errors import AuthError, CursorExpiredError, JobNotFoundError, ServiceError, ServiceUnavailableError
from tailspan.follow import Follower
from tailspan.identity import span_id
from tailspan.models import JobState, ListedJob, RunResponse
from tailspan.page import LogPage
from tailspan.services import JobService
from tailspan_agent.backlog import Backlog
from tailspan_agent.checkpoint import Ack, Checkpoint, OutboxSpan, Store
from tailspan_agent.digest import Digest, digest_of
from tailspan_agent.encode import LogContext, encode_lines, encode_resource, encode_span
from tailspan_agent.final_read import Seconds, add_seconds, missing_lines, page_seconds, page_uids, select_lines
from tailspan_agent.health import Health
from tailspan_agent.job_metrics import FollowedJob
from tailspan_agent.lanes import Chunk, Lane, SpanLane
from tailspan_agent.mapping import JobFacts, failure_record, resource_attributes, spans_of
from tailspan_agent.redact import Redactor
from tailspan_agent.runs import PipelineNames, RunTotals

__all__ = ["Tailer"]

FOLLOW_TO_END_S = 3600.0
BACKFILL_S = 1800.0
_AUTH_RETRY_S = 30.0
_LISTED_STATUS_S = 30.0
_DIGEST_LINES = 200
_DIGEST_MS = 5000
_READERS = 16

_log = logging.getLogger(__name__)


class Tailer:
    """Follows one job and relays it.

    Args:
        relay: What all tailers share.
        source: The service that has the job.
        watch: The watch that matched it.
        job_id: The job.
        once: Relay what is readable now, then stop; an ended job completely.

    Attributes:
        job: The last status, or None before the first.
        facts: What is known of the job's lines and states as read (the store has them as acked).
        finished: Whether the job has ended and everything of it was relayed and acked.
        failure: Why the last attempt to ask the service failed; None after one that succeeded.
    """

    def __init__(self, relay: Relay, source: Source, watch: Watch, job_id: str, *, once: bool = False) -> None:
        self.job: RunResponse | None = None
        self.facts = JobFacts()
        self.finished = False
        self.failure: ServiceError | None = None
        self.watch = watch
        self.job_id = job_id
        self._relay = relay
        self._source = source
        self._service = source.service
        self._once = once
        self._lane = relay.lane(self._service.identity, job_id)
        self._follower = Follower(
            poll_min_s=self._service.poll_min_s,
            poll_max_s=self._service.poll_max_s,
            settle_s=watch.settle,
            follow_to_end_s=0.0 if once else FOLLOW_TO_END_S,
        )
        self._checkpoint: Checkpoint | None = None
        self._stream = ""
        self._cursor: bytes | None = None
        self._unacked = 0
        self._unacked_seconds: Seconds = {}
        self._all_acked = asyncio.Event()
        self._all_acked.set()
        self._wake = asyncio.Event()
        self._status_at_s = float("-inf")
        self._row: ListedJob | None = None
        self._row_at_s = float("-inf")
        self._row_news = False
        self._errors = 0

    def on_row(self, row: ListedJob) -> None:
        """Take in the job's row of a listing: the bulk status that saves a request per silent job."""
        known = self._row
        self._row = row
        self._row_at_s = time.monotonic()
        if known is None:
            return
        if row.state is not known.state or row.lines != known.lines:
            self._row_news = row.state is not known.state
            self._follower.wake()
            self._wake.set()

    async def run(self) -> None:
        """Follow the job to its end; returns when nothing is left to do for it."""
        try:
            while True:
                try:
                    delay_s = await self._turn()
                    self.failure, self._errors = None, 0
                except JobNotFoundError as error:
                    self.failure = error
                    await self._gone()
                    return
                except ServiceError as error:
                    delay_s = self._after(error)
                    if self._once:
                        return
                if delay_s is None:
                    return
                await self._sleep(delay_s)
        finally:
            await self._relay.backlog.leave(self._stream, self)

    async def _turn(self) -> float | None:
        """Ask, read and relay once; return how long to wait for the next time, or None when all is done."""
        now_s = time.monotonic()
        if self.job is None or self._status_is_due(now_s):
            self._on_status(await self._service.get_job(self.job_id))
        assert self._checkpoint is not None
        if self._checkpoint.ended and (self._checkpoint.logs_complete or self._lane is None):
            self.finished = True
            return None
        started_s = time.monotonic()
        lines = await self._read()
        self._follower.on_read(lines, started_s)
        if lines:
            self._write_spans()
        if self._follower.complete:
            await self._finish()
            return None
        if self._once and not self._follower.state.is_terminal:
            await self._all_acked.wait()
            return None
        return self._follower.delay_s(time.monotonic(), random.random())

    def _status_is_due(self, now_s: float) -> bool:
        if self._row_news or self._follower.needs_status:
            return True
        # A listing that shows this job has its state too; without one, each turn asks.
        listed = now_s - self._row_at_s < _LISTED_STATUS_S
        return not listed or now_s - self._status_at_s >= _LISTED_STATUS_S

    def _on_status(self, job: RunResponse) -> None:
        now_s = time.monotonic()
        self._status_at_s, self._row_news = now_s, False
        changed = self.job is None or job.state is not self.job.state
        self._relay.health.polled(self._service.name)
        if self.job is None:
            self._start(job)
        self.job = job
        self._follower.on_status(job, now_s, time.time())
        if changed:
            self.facts = self.facts.with_state(time.time_ns(), job.state)
            self._write_spans()

    def _start(self, job: RunResponse) -> None:
        """Take up the job where the checkpoint left it, or begin."""
        store, identity = self._relay.store, self._service.identity
        checkpoint = store.job(identity, self.job_id)
        if checkpoint is None:
            now_ns = time.time_ns()
            facts = JobFacts(first_seen_ns=now_ns)
            last_ns = _newest_ns(job)
            backfill = last_ns is not None and now_ns - last_ns > BACKFILL_S * 1e9
            checkpoint = store.add_job(identity, self.job_id, job.job_name, backfill=backfill, facts=facts.to_json())
        self._checkpoint = checkpoint
        self._cursor = checkpoint.cursor
        self.facts = JobFacts.from_json(checkpoint.facts)
        self._resource = encode_resource(
            resource_attributes(
                job,
                service_name=self._service.name,
                watch_attributes=self.watch.attributes,
                otlp_resource=self._relay.otlp_resource,
                backfill=checkpoint.backfill,
            )
        )
        self._context = LogContext(
            trace_id=bytes.fromhex(job.trace_id),
            span_id=bytes.fromhex(span_id(job.identity, job.job_id, "run", job.attempt)),
            min_severity=self.watch.min_severity,
            redactor=self._relay.redactor,
        )
        self._stream = f"{job.job_name}/backfill" if checkpoint.backfill else job.job_name
        if self._lane is not None and not checkpoint.logs_complete:
            position_ns = self.facts.last_line_ns or _newest_ns(job) or time.time_ns()
            self._relay.backlog.join(self._stream, self, position_ns)

    async def _read(self) -> int:
        """Relay the lines that are readable now; return how many."""
        await self._relay.backlog.turn(self._stream, self)
        lines = 0
        try:
            async with self._source.readers:
                pages = self._service.read_logs(self.job_id, self._cursor, late_window_s=self.watch.late_window)
                async for page in pages:
                    lines += len(page.lines)
                    await self._relay_page(page, page.cursor)
                    self._cursor = page.cursor
        except CursorExpiredError as error:
            _log.warning("lines of job %s of %s were gone before they were read: %s", self.job_id, self._service.name, error)
            self._relay.health.gap(self._service.name)
            self._cursor = error.resume_cursor
        if lines == 0 or self._follower.state.is_terminal:
            await self._all_acked.wait()
            await self._relay.backlog.leave(self._stream, self)
        return lines

    async def _relay_page(self, page: LogPage, cursor: bytes | None, *, late: bool = False) -> None:
        """Encode a page and put it into the job's lane; without a logs signal only learn from it."""
        assert self._checkpoint is not None
        self.facts = self.facts.with_page(page)
        if self._lane is None:
            return
        encoded = encode_lines(page, context=self._context, observed_unix_nano=time.time_ns())
        self._relay.health.records_read(
            self._service.name,
            encoded.count,
            dropped=encoded.dropped,
            redactions=encoded.redactions,
            late=encoded.count if late else 0,
        )
        await self._put(encoded.records, encoded.count, cursor, page_seconds(page), page.runs[-1].time_unix_nano)

    async def _put(
        self, records: bytes, count: int, cursor: bytes | None, seconds: Seconds, newest_ns: int
    ) -> None:
        assert self._checkpoint is not None and self._lane is not None
        key, facts = self._checkpoint.key, self.facts

        def ack() -> Ack:
            # What a restart at this cursor must know: the lines up to this page, the states seen up to now.
            return Ack(key, cursor, dataclasses.replace(facts, states=self.facts.states).to_json(), seconds)

        def done(rejected: int, reason: str) -> None:
            self._unacked -= 1
            add_seconds(self._unacked_seconds, seconds, -1)
            self._relay.health.records_acked(self._service.name, count - rejected, newest_ns)
            if rejected:
                self._relay.health.records_rejected(self._service.name, rejected, reason)
            if not self._unacked:
                self._all_acked.set()

        self._unacked += 1
        add_seconds(self._unacked_seconds, seconds)
        self._all_acked.clear()
        await self._lane.put(Chunk(self._resource, records, count, ack, done))

    async def _finish(self) -> None:
        """The job has ended and its log was read to the end: relay what came late, write its spans, count its run."""
        assert self._checkpoint is not None and self.job is not None
        if self._service.final_read and self.watch.final_read and self._lane is not None:
            await self._final_read()
        if self.job.state is not JobState.SUCCEEDED and self.facts.digest is None:
            self.facts = dataclasses.replace(self.facts, digest=digest_of(await self._last_lines()))
        self.facts = dataclasses.replace(self.facts, logs_complete=True)
        failure = encode_failure(self.job, self.facts, self._context)
        if failure is not None and self._lane is not None:
            await self._put(failure, 1, None, {}, self.facts.last_line_ns or 0)
        self._end(self.job)
        await self._all_acked.wait()
        if self._lane is not None:
            self._relay.store.complete_logs(self._checkpoint.key)
        self.finished = True

    async def _final_read(self) -> None:
        """Compare the whole log with what was relayed, and relay what became visible too late for any window."""
        assert self._checkpoint is not None
        relayed = self._relay.store.seconds(self._checkpoint.key)
        add_seconds(relayed, self._unacked_seconds)
        found: Seconds = {}
        async for page in self._service.read_logs(self.job_id):
            add_seconds(found, page_seconds(page))
        differing = {second for second, sums in found.items() if sums != relayed.get(second, (0, 0))}
        if not differing:
            return
        uids: dict[int, list[int]] = {second: [] for second in differing}
        async for page in self._service.read_logs(self.job_id):
            for second, uid in page_uids_by_second(page):
                if second in uids:
                    uids[second].append(uid)
        late = {
            found_uids[index]
            for second, found_uids in uids.items()
            for index in missing_lines(found_uids, *relayed.get(second, (0, 0)))
        }
        async for page in self._service.read_logs(self.job_id):
            selected = select_lines(page, late)
            if selected is not None:
                await self._relay_page(selected, None, late=True)

    async def _last_lines(self) -> list[str]:
        """Return the job's last lines, for the failure digest."""
        last_ns = self.facts.last_line_ns
        lines: deque[str] = deque(maxlen=_DIGEST_LINES)
        if last_ns is not None:
            since_ms = last_ns // NANOS_PER_MS - _DIGEST_MS
            async for page in self._service.read_logs(self.job_id, since_ms=since_ms):
                lines.extend(self._relay.redactor.redact(clean(line))[0] for line in page.lines[-_DIGEST_LINES:])
        return list(lines)

    def _end(self, job: RunResponse) -> None:
        """Write the job's last spans and count its run: once, whatever happens to the endpoint."""
        assert self._checkpoint is not None
        spans = spans_of(job, self.facts)
        run = spans[-1]
        result, error_type = job.state.result or "error", error_type_of(job)
        name = self._relay.names.label(job.job_name)
        empty = RunTotals(name, result, error_type)
        duration_s = (run.end_unix_nano - run.start_unix_nano) / 1e9
        totals = self._relay.totals.get(empty.key, empty).add(
            duration_s, trace_id=job.trace_id, span_id=run.span_id.hex(), time_unix_nano=run.end_unix_nano
        )
        if self._relay.store.end_job(self._checkpoint.key, self._outbox(spans), totals):
            self._relay.totals[totals.key] = totals
        self._wake_spans()

    def _write_spans(self) -> None:
        """Write the spans that have ended by now; a span that was written before stays as it was."""
        assert self._checkpoint is not None and self.job is not None
        if self._relay.store.add_spans(self._checkpoint.key, self._outbox(spans_of(self.job, self.facts))):
            self._wake_spans()

    def _outbox(self, spans: list[SpanData]) -> list[OutboxSpan]:
        assert self._checkpoint is not None
        key = self._checkpoint.key
        return [OutboxSpan(key, span.span_id.hex(), self._resource, encode_span(span)) for span in spans]

    def _wake_spans(self) -> None:
        if self._relay.spans is not None:
            self._relay.spans.wake()

    async def _gone(self) -> None:
        """The service deleted the job in mid-follow: what was read stays true, and its trace gets its root."""
        _log.warning("job %s is gone at service %s before its log was complete", self.job_id, self._service.name)
        if self.job is None:
            return
        if not self.job.state.is_terminal:
            self.job = dataclasses.replace(
                self.job, state=JobState.LOST, error="the job was deleted at its service while it was followed"
            )
        self._relay.health.gap(self._service.name)
        assert self._checkpoint is not None
        self._end(self.job)
        await self._all_acked.wait()
        self._relay.store.complete_logs(self._checkpoint.key)
        self.finished = True

    def _after(self, error: ServiceError) -> float:
        """Say what went wrong, once, and return how long to wait before the next try."""
        self._relay.health.poll_failed(self._service.name, error)
        if self.failure is None:
            _log.warning("job %s of service %s: %s", self.job_id, self._service.name, error)
        self.failure = error
        self._errors += 1
        if self.job is not None:
            self.job = dataclasses.replace(self.job, stale=True)
        if isinstance(error, AuthError):
            return _AUTH_RETRY_S
        asked_s = error.retry_after_s if isinstance(error, ServiceUnavailableError) else None
        return max(asked_s or 0.0, backoff_s(self._errors, random.random()))

    async def _sleep(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        self._wake.clear()

    @property
    def followed(self) -> FollowedJob | None:
        """What the metrics say of this job now; None before its first status and after its end."""
        if self.job is None or self.finished:
            return None
        return FollowedJob(
            service=self._service.name,
            status=self.job,
            first_line_unix_nano=self.facts.first_line_ns,
            last_line_unix_nano=self.facts.last_line_ns,
        )


def _newest_ns(job: RunResponse) -> int | None:
    """Return when an ended job ended, in ns since the epoch: about the time of its newest line."""
    ended = job.finished_at or job.job_status_date
    return int(ended.timestamp() * 1e9) if ended is not None and job.state.is_terminal else None
