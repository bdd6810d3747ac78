"""`JobDiscovery`: lists the jobs of one service, matches them with the watches, and starts their tailers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing, suppress
from fnmatch import fnmatchcase

from tailspan._backoff import backoff_s
from tailspan.config import Watch
from tailspan.errors import JobNotFoundError, ProtocolError, RequestRejectedError, ServiceError, TailspanError
from tailspan.models import ListedJob
from tailspan.services import ChangeFeed, ChangeFeedService
from tailspan.services.registry import plugin_fault
from tailspan_agent.errors import AgentError
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.backlog import Backlog, WaitingJob
from tailspan_agent.receiver.source import Source
from tailspan_agent.receiver.tailer import Tailer

__all__ = ["JobDiscovery", "match"]

_FULL_SCAN_S = 60.0
_DISCOVER_S = 5.0
_FREE_DISCOVER_S = 0.5
_SHARE_OF_A_CORE = 0.01
_SHARE_OF_REQUESTS = 0.25
_LONGEST_PAUSE_S = 10.0
_LONGEST_LIST_PAUSE_S = 25.0
# The longest time that a notification waits for others. A busy agent gathers more, and so polls less often.
_CHANGES_EVERY_S, _CHANGES_EVERY_BUSY_S = 0.03, 0.05
_BUSY_SHARE = 0.5
_OWNERSHIP_S = 1.0  # how soon an agent of a fleet lists again after it has taken jobs over
# Ended jobs in their first turn at a time. Each takes some ten KiB until it is relayed, and up to a second: what its
# endpoint needs to acknowledge its lines and its receipt.
_FIRST_TURNS = 256
_ROWS_A_STEP = 200
_MAX_ID_BYTES = 1024
_CLOCK_STEP_S = 3600.0

_log = logging.getLogger(__name__)


def match(watches: Sequence[Watch], job_id: str, name: str) -> Watch | None:
    """Return the first watch that matches a job, with the largest lookback of all that match.

    Args:
        watches: The watches of the job's service, in the order of the file.
        job_id: The job.
        name: The job's name, for the globs.
    """
    matching = [watch for watch in watches if job_id in watch.jobs or _discovers(watch, name)]
    if not matching:
        return None
    lookback = max(watch.lookback for watch in matching)
    return matching[0] if lookback == matching[0].lookback else matching[0].model_copy(update={"lookback": lookback})


def _discovers(watch: Watch, name: str) -> bool:
    if not watch.discover or any(fnmatchcase(name, pattern) for pattern in watch.exclude):
        return False
    return watch.name is None or fnmatchcase(name, watch.name)


class JobDiscovery:
    """Finds the jobs of one service.

    Args:
        context: Shared by all tailers.
        source: The service.
        watches: The watches of the service, in the order of the file.
        once: Whether tailers relay only what is readable now.
        start: Called with each new tailer, to run it.

    Attributes:
        tailers: The running tailers of this service, by job id.
        backlog: Found jobs that have no tailer yet.
        failure: Why the last list failed; None after one that succeeded.
        skipped: Listed jobs whose name could not be read, with the reason.
    """

    def __init__(
        self,
        context: PipelineContext,
        source: Source,
        watches: Sequence[Watch],
        *,
        once: bool = False,
        start: Callable[[Tailer], None],
    ) -> None:
        self.tailers: dict[str, Tailer] = {}
        self.backlog = Backlog()
        self.watches = watches
        self.failure: TailspanError | None = None
        self.skipped: dict[str, ServiceError] = {}
        self._context = context
        self._source = source
        self._service = source.service
        self._once = once
        self._start = start
        self._on_first_turn = self._leave_first_turn  # one object for the tailers of all jobs
        self._names = context.store.names(self._service.identity)
        self._ignored = context.store.finished_jobs(self._service.identity)
        self._deleted: set[str] = set()
        self._unlisted: set[str] = set()
        self._found: list[Tailer] = []
        self._in_first_turn: set[str] = set()
        self._stopped = False
        self._clock_ahead_s = time.time() - time.monotonic()
        self._full_scan_at_s = float("-inf")
        self._relist = asyncio.Event()
        self._changes: ChangeFeed | None = None
        self._reported: set[str] = set()
        self._lost_feeds = 0
        self._gathered_at_s = time.monotonic(), time.thread_time()

    @property
    def name(self) -> str:
        """The service's configured name."""
        return self._service.name

    @property
    def identity(self) -> str:
        """The service's identity."""
        return self._service.identity

    @property
    def has_scanned(self) -> bool:
        """Whether the service was listed completely once."""
        return self._full_scan_at_s > float("-inf")

    async def run(self) -> None:
        """List and start tailers until cancelled."""
        errors = 0
        self._stopped = False
        try:
            while True:
                is_first, begun_s, cpu_s = not self.has_scanned, time.monotonic(), time.thread_time()
                is_rare = self._source.polls_are_free and self._full_scan_is_due
                try:
                    self._open_changes()
                    await self.scan()
                except TailspanError as error:
                    self._context.health.poll_failed(self.name, error)
                    if self.failure is None:
                        _log.warning("service %s: %s", self.name, error)
                    self.failure, errors = error, errors + 1
                    self._drop_old_rows()
                    await self._wait(max(_DISCOVER_S, backoff_s(errors, random.random())))
                else:
                    if self.failure is not None:
                        _log.info("service %s answers again", self.name)
                    self.failure, errors = None, 0
                    # The first list may load modules, which no later one does: it says nothing of their cost. Nor does
                    # a full list, once a minute, if polls are free: the next ones end where nothing has changed.
                    measured_s = time.monotonic() - begun_s, time.thread_time() - cpu_s
                    cost_s = (0.0, 0.0) if is_first or is_rare else measured_s
                    pause_s = self._pause_s(*cost_s)
                    await self._wait(pause_s * random.uniform(0.9, 1.1))
        finally:
            self._close_changes()
            self.stop()

    def stop(self) -> None:
        """Start no further tailers; the next list finds the jobs again that wait now."""
        self._stopped = True
        self.backlog.clear()

    def _pause_s(self, scan_s: float, scan_cpu_s: float) -> float:
        """Return the pause before the next list, in seconds, so that thousands of running jobs cost little."""
        share_s = scan_cpu_s / _SHARE_OF_A_CORE
        if self._source.polls_are_free:
            return max(min(share_s, _LONGEST_PAUSE_S), _FREE_DISCOVER_S)
        return max(_DISCOVER_S, min(max(share_s, scan_s / _SHARE_OF_REQUESTS), _LONGEST_LIST_PAUSE_S))

    def _open_changes(self) -> None:
        if self._changes is None and isinstance(self._service, ChangeFeedService) and self._full_scan_is_due:
            try:
                self._changes = self._service.open_changes()
            except Exception:
                # Change notifications only save polls; without them all jobs are polled.
                _log.exception("service %s: change notifications failed; falling back to polling", self.name)
            for tailer in self.tailers.values():
                self._subscribe(tailer)

    def _lose_changes(self, error: ServiceError) -> None:
        """Close a feed that reports nothing any more: one that worked is opened again at once, another one later."""
        self._lost_feeds += 1
        self._close_changes()
        if self._lost_feeds == 1:
            _log.warning("service %s: change notifications lost (%s); falling back to polling", self.name, error)
            self._wake_tailers(None)

    def _close_changes(self) -> None:
        if self._changes is not None:
            self._changes.close()
            self._changes = None
        for tailer in self.tailers.values():
            tailer.schedule.has_changes = False
            tailer.schedule.wake()

    def _subscribe(self, tailer: Tailer) -> None:
        tailer.schedule.has_changes = self._changes is not None and self._changes.follow(tailer.job_id)

    async def _wait(self, pause_s: float) -> None:
        """Apply change notifications until the next list is due: after the pause, or when a new job is reported."""
        begun_s = time.monotonic()
        due_s = begun_s + pause_s
        if self._changes is not None and self.failure is None:
            due_s = max(due_s, self._full_scan_at_s + _FULL_SCAN_S)
        while (left_s := due_s - time.monotonic()) > 0:
            if self._changes is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._relist.wait()
                        return
                continue
            try:
                async with asyncio.timeout(left_s if self._context.owns is None else min(left_s, _OWNERSHIP_S)):
                    jobs = await self._changes.wait()
            except TimeoutError:
                if self._relist.is_set():
                    return
                continue
            except ServiceError as error:
                self._lose_changes(error)
                due_s = begun_s + pause_s
                continue
            self._lost_feeds = 0
            is_of_followed = self._wake_tailers(jobs)
            if jobs is None or self._reported:
                due_s = min(due_s, begun_s + pause_s)
            # Gather notifications: a poll costs much more than its notification.
            await asyncio.sleep(self._gather_s() if is_of_followed else _CHANGES_EVERY_BUSY_S)

    def _gather_s(self) -> float:
        """Return how long to gather notifications, in seconds, by what the agent has used since the last gather."""
        since_s, since_cpu_s = self._gathered_at_s
        self._gathered_at_s = now_s, cpu_s = time.monotonic(), time.thread_time()
        is_busy = cpu_s - since_cpu_s > _BUSY_SHARE * (now_s - since_s)
        return _CHANGES_EVERY_BUSY_S if is_busy else _CHANGES_EVERY_S

    def _wake_tailers(self, jobs: Collection[str] | None) -> bool:
        """Wake the tailers of changed jobs, None for all, and note new jobs; return whether a tailer was woken."""
        if jobs is None:
            self._full_scan_at_s = float("-inf")
            for tailer in self.tailers.values():
                if not tailer.schedule.is_counted:
                    tailer.schedule.wake()
            return True
        is_of_followed = False
        for job_id in jobs:
            if job_id in self.tailers:
                self.tailers[job_id].schedule.wake()
                is_of_followed = True
            elif job_id not in self._ignored and job_id not in self.backlog:
                self._reported.add(job_id)
        return is_of_followed

    def _drop_old_rows(self) -> None:
        """Poll the jobs whose rows are old: the list cannot be read."""
        for tailer in self.tailers.values():
            if tailer.schedule.row is not None and tailer.schedule.row_age_s > _FULL_SCAN_S:
                tailer.schedule.on_unlisted()

    async def scan(self) -> None:
        """List once: start a tailer for each watched job that has none.

        Raises:
            ServiceError: The list failed.
            AgentError: The store cannot be used, or the service plugin has a bug.
        """
        now_s = time.monotonic()
        if self._relist.is_set():
            self._relist.clear()
            self._ignored = self._context.store.finished_jobs(self._service.identity)
            self._full_scan_at_s = float("-inf")
        full = self._full_scan_is_due
        try:
            await self._scan(full)
        except TailspanError:
            raise
        except Exception as error:
            fault = plugin_fault(self._service, error)
            if fault is not None:
                raise AgentError(fault) from error
            _log.exception("service %s: unexpected error in the service plugin or the agent (please report)", self.name)
            text = f"unexpected error in the service plugin or the agent (please report): {error!r}"
            raise AgentError(f"service {self.name}: {text}") from error
        finally:
            self._start_found()
        self._reported.clear()
        if full:
            self._full_scan_at_s = now_s

    @property
    def _full_scan_is_due(self) -> bool:
        return time.monotonic() - self._full_scan_at_s >= _FULL_SCAN_S

    async def _scan(self, full: bool) -> None:
        discover = any(watch.discover for watch in self.watches)
        if full:
            ahead_s = time.time() - time.monotonic()
            if abs(ahead_s - self._clock_ahead_s) > _CLOCK_STEP_S:
                # What was too old by the clock before may not be by this one.
                self._ignored = self._context.store.finished_jobs(self._service.identity)
            self._clock_ahead_s = ahead_s
            self._ignored -= self._deleted
            self._deleted.clear()
            # However old it is: a job that the store has as unfinished gets its end.
            for jobs in self._context.store.unfinished_jobs(self._service.identity):
                for job_id, name in jobs:
                    if job_id in self.tailers or job_id in self._ignored or job_id in self.backlog:
                        continue
                    if self._owns(job_id):
                        self.backlog.put(WaitingJob(job_id, name, None))
                await asyncio.sleep(0)
        for job_id in dict.fromkeys(job_id for watch in self.watches for job_id in watch.jobs):
            if job_id not in self.tailers and job_id not in self._ignored and self._owns(job_id):
                # An earlier watch may match the job by its name.
                self._follow(job_id, await self._name_of(job_id) if discover else "")
        if discover:
            await self._discover(full)

    async def _discover(self, full: bool) -> None:
        """Read the list, newest first, as far as it may have changes; a full scan as far as `lookback` reaches."""
        self._context.health.polled(self.name)
        if not full and self._reported and await self._apply_reported():
            return
        running = {job_id for job_id, tailer in self.tailers.items() if not tailer.expects_late_lines}
        unseen = running - self._unlisted if full or not self._source.polls_are_free else set()
        listing = self._source.list_jobs(self._has_row)
        async with aclosing(listing):
            async for rows in listing:
                changed = False
                for number, row in enumerate(rows, 1):
                    unseen.discard(row.job_id)
                    changed = await self._apply_row(row) or changed
                    if not number % _ROWS_A_STEP:
                        await asyncio.sleep(0)
                if not all(row.job_name for row in rows):
                    # Each name cost a request: the rest of the list may take minutes.
                    self._start_found()
                # The list is a bulk status of the followed jobs: it is read until all of them were listed.
                if rows and not unseen and (self._too_old(rows[-1]) if full else not changed):
                    return
        for job_id in unseen:
            if job_id in self.tailers:
                self.tailers[job_id].schedule.on_unlisted()
        # Jobs that the list never has: a search for them would read the whole list each time.
        self._unlisted |= unseen

    async def _apply_reported(self) -> bool:
        """Apply the rows of the new jobs that were reported; return False if the service has no rows of single jobs."""
        rows = await self._source.rows(self._reported, self._has_row)
        for row in rows or ():
            await self._apply_row(row)
        return rows is not None

    def _has_row(self, row: ListedJob) -> bool:
        """Return whether this row was applied before, or is of a job that is not followed."""
        tailer = self.tailers.get(row.job_id)
        return row.job_id in self._ignored if tailer is None else tailer.schedule.row is row

    async def _apply_row(self, row: ListedJob) -> bool:
        """Apply one row; return whether it was new."""
        tailer = self.tailers.get(row.job_id)
        if tailer is not None:
            tailer.on_row(row)
            return False
        if row.job_id in self._ignored or not self._owns(row.job_id) or self._still_waits(row):
            return False
        try:
            _check_id(row.job_id)
            if self._ended_before(row, self._lookback_s):
                self._ignored.add(row.job_id)
                return True
            name = row.job_name or await self._name_of(row.job_id)
        except (ProtocolError, RequestRejectedError) as error:
            # One job that cannot be read must not hide the others.
            if row.job_id not in self.skipped:
                shown = row.job_id[:_MAX_ID_BYTES].encode(errors="backslashreplace").decode()
                _log.warning("job %s of service %s: %s", shown, self.name, error)
            self.skipped[row.job_id] = error
            return False
        self.skipped.pop(row.job_id, None)
        watch = match(self.watches, row.job_id, name)
        if watch is None or self._ended_before(row, watch.lookback):
            self._ignored.add(row.job_id)
        elif row.state.is_terminal:
            self.backlog.put(WaitingJob(row.job_id, name, row))
        else:
            self._follow(row.job_id, name)
            if row.job_id in self.tailers:
                self.tailers[row.job_id].on_row(row)
        return True

    def _still_waits(self, row: ListedJob) -> bool:
        """Note the row of a job that waits; return False if it does not, or runs and need not wait any more."""
        waiting = self.backlog.get(row.job_id)
        if waiting is None:
            return False
        if not row.state.is_terminal:
            self.backlog.remove(row.job_id)
            return False
        if waiting.row is not row:
            self.backlog.put(WaitingJob(row.job_id, row.job_name or waiting.name, row))
        return True

    async def _name_of(self, job_id: str) -> str:
        """Return a job's name, requested once; empty if the service has no such job."""
        name = self._names.get(job_id)
        if name is None:
            try:
                name = (await self._source.get_job(job_id)).job_name
            except JobNotFoundError:
                return ""
            self._names[job_id] = name
            self._context.store.add_name(self._service.identity, job_id, name)
        return name

    def _ended_before(self, row: ListedJob, lookback_s: float) -> bool:
        """Return whether the job ended before the lookback; a job that the store has is always finished."""
        if not row.state.is_terminal or _age_s(row) <= lookback_s:
            return False
        return self._context.store.job(self._service.identity, row.job_id) is None

    @property
    def _lookback_s(self) -> float:
        return max(watch.lookback for watch in self.watches)

    def _too_old(self, row: ListedJob) -> bool:
        return not self._source.polls_are_free and row.created_at is not None and _age_s(row) > self._lookback_s

    def _follow(self, job_id: str, name: str) -> None:
        if job_id not in self.tailers and job_id not in self._ignored:
            self.backlog.remove(job_id)
            tailer = self._make_tailer(job_id, name)
            if tailer is not None:
                self._found.append(tailer)

    def _make_tailer(self, job_id: str, name: str) -> Tailer | None:
        """Return a new tailer of a job; None if no watch matches it."""
        watch = match(self.watches, job_id, name)
        if watch is None or not self._owns(job_id):
            return None
        tailer = Tailer(
            self._context,
            self._source,
            watch,
            job_id,
            name,
            once=self._once,
            on_first_turn=self._on_first_turn,
        )
        self.tailers[job_id] = tailer
        if self._changes is not None:
            self._subscribe(tailer)
        return tailer

    def _owns(self, job_id: str) -> bool:
        """Return whether this agent follows the job, and no other agent of its fleet."""
        owns = self._context.owns
        return owns is None or owns(self._service.identity, job_id)

    def on_gained(self) -> None:
        """List again at once: this agent follows more jobs from now on."""
        self._relist.set()

    def drop(self, is_kept: Callable[[str], bool]) -> list[Tailer]:
        """Forget the jobs that are not kept; return their running tailers, which the caller stops.

        Args:
            is_kept: Returns whether a job is still followed by this agent.
        """
        for job_id in self.backlog.ids:
            if not is_kept(job_id):
                self.backlog.remove(job_id)
        found, self._found = self._found, []
        for tailer in found:
            if is_kept(tailer.job_id):
                self._found.append(tailer)
            else:
                tailer.leave_stream()
                self.forget(tailer)
        return [tailer for job_id, tailer in self.tailers.items() if not is_kept(job_id)]

    def _start_found(self) -> None:
        # After the list, which is newest first: the oldest job of a pipeline must be known before any is read.
        for tailer in reversed(self._found):
            self._start(tailer)
        self._found.clear()
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start tailers of jobs that wait, as far as there is room."""
        while not self._stopped and len(self._in_first_turn) < _FIRST_TURNS and (job := self.backlog.take()):
            tailer = self._make_tailer(job.job_id, job.name)
            if tailer is not None:
                if job.row is not None:
                    tailer.on_row(job.row)
                self._in_first_turn.add(job.job_id)
                self._start(tailer)

    def _leave_first_turn(self, job_id: str) -> None:
        if job_id in self._in_first_turn:
            self._in_first_turn.remove(job_id)
            if self.has_scanned or self._once:
                self._start_waiting()

    def apply_watches(self, watches: Sequence[Watch]) -> None:
        """Apply changed watches: every job is matched again."""
        self.watches = watches
        self._ignored = self._context.store.finished_jobs(self._service.identity)
        self._deleted.clear()
        self._unlisted.clear()
        self._full_scan_at_s = float("-inf")

    def forget(self, tailer: Tailer) -> None:
        """Remove a tailer that has stopped; a finished job is not followed again, a deleted one after a full scan."""
        self.tailers.pop(tailer.job_id, None)
        self._leave_first_turn(tailer.job_id)
        if self._changes is not None:
            self._changes.leave(tailer.job_id)
        deleted = isinstance(tailer.failure, JobNotFoundError)
        if tailer.finished or deleted:
            self._ignored.add(tailer.job_id)
        if deleted:
            self._deleted.add(tailer.job_id)


def _check_id(job_id: str) -> None:
    """Raise ProtocolError for an id that cannot be stored and sent: it has no UTF-8, or is too long."""
    try:
        size = len(job_id.encode())
    except UnicodeEncodeError:
        raise ProtocolError("job id is not valid Unicode (lone surrogate)", job_id=job_id) from None
    if not 0 < size <= _MAX_ID_BYTES:
        raise ProtocolError(f"a job id of {size} B; from 1 to {_MAX_ID_BYTES} are possible", job_id=job_id[:80])


def _age_s(row: ListedJob) -> float:
    """Return how long ago the row's job last changed, in seconds; 0 if unknown."""
    when = row.state_since or row.created_at
    return time.time() - when.timestamp() if when is not None else 0.0
