"""The watcher: which jobs of one service are followed. It lists, matches, and starts a tailer for each job it finds."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase

from tailspan._backoff import backoff_s
from tailspan.config import Watch
from tailspan.errors import JobNotFoundError, ProtocolError, RequestRejectedError, ServiceError, TailspanError
from tailspan.models import ListedJob
from tailspan.services import ChangeFeed, ChangeFeedService
from tailspan_agent.errors import AgentError
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.source import Source
from tailspan_agent.receiver.tailer import Tailer

__all__ = ["JobDiscovery", "match"]

_FULL_SCAN_S = 60.0
_DISCOVER_S = 5.0
_CHEAP_DISCOVER_S = 0.5
_SHARE_OF_A_CORE = 0.01
_SHARE_OF_REQUESTS = 0.25
_LONGEST_PAUSE_S = 10.0
_LONGEST_LIST_PAUSE_S = 25.0
_NEWS_EVERY_S = 0.05

_log = logging.getLogger(__name__)


def match(watches: Sequence[Watch], job_id: str, name: str) -> Watch | None:
    """Return the watch that a job belongs to: the first that matches, with the largest lookback of all that do.

    Args:
        watches: The watches of the job's service, in the order of the file.
        job_id: The job.
        name: Its name, for the globs.
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
        context: What all tailers share.
        source: The service.
        watches: Its watches, in the order of the file.
        once: Whether tailers relay only what is readable now.
        start: Called with each new tailer, to run it.

    Attributes:
        tailers: The tailers of this service by job id, running ones only.
        failure: Why the service could not be asked the last time; None after an answer.
        skipped: Listed jobs whose name could not be asked for, and why.
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
        self.watches = watches
        self.failure: TailspanError | None = None
        self.skipped: dict[str, ServiceError] = {}
        self._context = context
        self._source = source
        self._service = source.service
        self._once = once
        self._start = start
        self._names = context.store.names(self._service.identity)
        self._settled = context.store.finished_jobs(self._service.identity)
        self._missing: set[str] = set()
        self._unlisted: set[str] = set()
        self._found: list[Tailer] = []
        self._full_scan_at_s = float("-inf")
        self._news: ChangeFeed | None = None

    @property
    def name(self) -> str:
        """The service's configured name."""
        return self._service.name

    @property
    def has_scanned(self) -> bool:
        """Whether all that its service lists was looked at once."""
        return self._full_scan_at_s > float("-inf")

    async def run(self) -> None:
        """Look for jobs until cancelled."""
        errors = 0
        try:
            while True:
                begun_s, cpu_s = time.monotonic(), time.thread_time()
                try:
                    self._open_news()
                    await self.scan()
                except TailspanError as error:
                    self._context.health.poll_failed(self.name, error)
                    if self.failure is None:
                        _log.warning("service %s: %s", self.name, error)
                    self.failure, errors = error, errors + 1
                    self._distrust_rows()
                    await self._listen(max(_DISCOVER_S, backoff_s(errors, random.random())))
                else:
                    if self.failure is not None:
                        _log.info("service %s answers again", self.name)
                    self.failure, errors = None, 0
                    pause_s = self._pause_s(time.monotonic() - begun_s, time.thread_time() - cpu_s)
                    await self._listen(pause_s * random.uniform(0.9, 1.1))
        finally:
            self._close_news()

    def _pause_s(self, scan_s: float, scan_cpu_s: float) -> float:
        """Return how long not to look: thousands of running jobs must not be felt, by us nor by the service."""
        share_s = scan_cpu_s / _SHARE_OF_A_CORE
        if self._source.is_cheap:
            return max(min(share_s, _LONGEST_PAUSE_S), _CHEAP_DISCOVER_S)
        return max(_DISCOVER_S, min(max(share_s, scan_s / _SHARE_OF_REQUESTS), _LONGEST_LIST_PAUSE_S))

    def _open_news(self) -> None:
        if self._news is None and isinstance(self._service, ChangeFeedService) and self._full_scan_is_due:
            try:
                self._news = self._service.open_changes()
            except Exception:
                # News only make looking cheaper: without them, or with a fault in them, jobs are looked at.
                _log.exception("service %s: there are no news", self.name)
            for tailer in self.tailers.values():
                self._hear_of(tailer)

    def _close_news(self) -> None:
        if self._news is not None:
            self._news.close()
            self._news = None
        for tailer in self.tailers.values():
            tailer.schedule.told = False
            tailer.schedule.wake()

    def _hear_of(self, tailer: Tailer) -> None:
        tailer.schedule.told = self._news is not None and self._news.follow(tailer.job_id)

    async def _listen(self, pause_s: float) -> None:
        """Hear news until it is time to look: after the pause, or with news only when they tell of a new job."""
        begun_s = time.monotonic()
        due_s = begun_s + pause_s
        if self._news is not None and self.failure is None:
            due_s = max(due_s, self._full_scan_at_s + _FULL_SCAN_S)
        while (left_s := due_s - time.monotonic()) > 0:
            if self._news is None:
                await asyncio.sleep(left_s)
                continue
            try:
                async with asyncio.timeout(left_s):
                    jobs = await self._news.wait()
            except TimeoutError:
                return
            except ServiceError as error:
                _log.warning("service %s: no news any more, its jobs are looked at: %s", self.name, error)
                self._close_news()
                jobs = None
            if self._spread(jobs):
                due_s = min(due_s, begun_s + pause_s)
            # What comes together is read together: each look at a job costs much more than its news.
            await asyncio.sleep(_NEWS_EVERY_S)

    def _spread(self, jobs: Collection[str] | None) -> bool:
        """Wake the tailers of jobs with news; return whether there are jobs without a tailer to be looked for."""
        if jobs is None:
            self._full_scan_at_s = float("-inf")
            for tailer in self.tailers.values():
                if not tailer.schedule.is_counted:
                    tailer.schedule.wake()
            return True
        unknown = False
        for job_id in jobs:
            if job_id in self.tailers:
                self.tailers[job_id].schedule.wake()
            else:
                unknown = unknown or job_id not in self._settled
        return unknown

    def _distrust_rows(self) -> None:
        """Have the jobs asked for whose rows are old, when the list cannot be read."""
        for tailer in self.tailers.values():
            if tailer.schedule.row is not None and tailer.schedule.row_age_s > _FULL_SCAN_S:
                tailer.schedule.on_unlisted()

    async def scan(self) -> None:
        """Look once: start a tailer for each job that is watched and has none.

        Raises:
            ServiceError: The service could not be asked.
            AgentError: The store could not be used, or the service broke its promises.
        """
        now_s = time.monotonic()
        full = self._full_scan_is_due
        try:
            await self._scan(full)
        except TailspanError:
            raise
        except Exception as error:
            _log.exception("service %s: a fault of its class or of the agent", self.name)
            raise AgentError(f"service {self.name}: a fault of its class or of the agent: {error!r}") from error
        finally:
            self._start_found()
        if full:
            self._full_scan_at_s = now_s

    @property
    def _full_scan_is_due(self) -> bool:
        return time.monotonic() - self._full_scan_at_s >= _FULL_SCAN_S

    async def _scan(self, full: bool) -> None:
        discover = any(watch.discover for watch in self.watches)
        if full:
            self._settled -= self._missing
            self._missing.clear()
            # However old they are: what the store knows as unfinished gets its end.
            for job_id, name in self._context.store.unfinished_jobs(self._service.identity):
                self._follow(job_id, name)
        for job_id in dict.fromkeys(job_id for watch in self.watches for job_id in watch.jobs):
            if job_id not in self.tailers and job_id not in self._settled:
                # An earlier watch may discover it by its name.
                self._follow(job_id, await self._name_of(job_id) if discover else "")
        if discover:
            await self._discover(full)

    async def _discover(self, full: bool) -> None:
        """Read the list, newest first, as far as it can hold news; a full scan as far as `lookback` reaches."""
        running = {job_id for job_id, tailer in self.tailers.items() if not tailer.late}
        unseen = running - self._unlisted if full or not self._source.is_cheap else set()
        self._context.health.polled(self.name)
        listing = self._service.list_jobs()
        async with aclosing(listing):
            async for rows in listing:
                news = False
                for row in rows:
                    unseen.discard(row.job_id)
                    news = await self._take_up(row) or news
                if not all(row.job_name for row in rows):
                    # Each name was a request: the rest of the list may be minutes away.
                    self._start_found()
                # The list is the followed jobs' status, one request for many: it is read until all were seen.
                if rows and not unseen and (self._too_old(rows[-1]) if full else not news):
                    return
        for job_id in unseen:
            if job_id in self.tailers:
                self.tailers[job_id].schedule.on_unlisted()
        # Jobs of somebody else: looking for them again would read the whole list each time.
        self._unlisted |= unseen

    async def _take_up(self, row: ListedJob) -> bool:
        """Deal with one row; return whether it was news."""
        tailer = self.tailers.get(row.job_id)
        if tailer is not None:
            tailer.on_row(row)
            return False
        if row.job_id in self._settled:
            return False
        try:
            _check_text(row.job_id)
            if self._ended_before(row, self._lookback_s):
                self._settled.add(row.job_id)
                return True
            name = row.job_name or await self._name_of(row.job_id)
        except (ProtocolError, RequestRejectedError) as error:
            # One job that cannot be asked must not hide all others.
            shown = row.job_id.encode(errors="backslashreplace").decode()
            _log.warning("job %s of service %s: %s", shown, self.name, error)
            self.skipped[row.job_id] = error
            return False
        self.skipped.pop(row.job_id, None)
        watch = match(self.watches, row.job_id, name)
        if watch is None or self._ended_before(row, watch.lookback):
            self._settled.add(row.job_id)
        else:
            self._follow(row.job_id, name)
            self.tailers[row.job_id].on_row(row)
        return True

    async def _name_of(self, job_id: str) -> str:
        """Return a job's name, asked for once; empty where there is no such job."""
        name = self._names.get(job_id)
        if name is None:
            try:
                name = (await self._service.get_job(job_id)).job_name
            except JobNotFoundError:
                return ""
            self._names[job_id] = name
            self._context.store.add_name(self._service.identity, job_id, name)
        return name

    def _ended_before(self, row: ListedJob, lookback_s: float) -> bool:
        """Return whether the job ended too long ago to be taken up; one that was begun is finished."""
        if not row.state.is_terminal or _age_s(row) <= lookback_s:
            return False
        return self._context.store.job(self._service.identity, row.job_id) is None

    @property
    def _lookback_s(self) -> float:
        return max(watch.lookback for watch in self.watches)

    def _too_old(self, row: ListedJob) -> bool:
        return not self._source.is_cheap and row.created_at is not None and _age_s(row) > self._lookback_s

    def _follow(self, job_id: str, name: str) -> None:
        if job_id in self.tailers or job_id in self._settled:
            return
        watch = match(self.watches, job_id, name)
        if watch is not None:
            tailer = Tailer(self._context, self._source, watch, job_id, name, once=self._once)
            self.tailers[job_id] = tailer
            if self._news is not None:
                self._hear_of(tailer)
            self._found.append(tailer)

    def _start_found(self) -> None:
        # Only now: the list is newest first, and the oldest of a pipeline has to be known before the first is read.
        for tailer in reversed(self._found):
            self._start(tailer)
        self._found.clear()

    def use(self, watches: Sequence[Watch]) -> None:
        """Go over to other watches: every job is matched anew."""
        self.watches = watches
        self._settled = self._context.store.finished_jobs(self._service.identity)
        self._missing.clear()
        self._unlisted.clear()
        self._full_scan_at_s = float("-inf")

    def forget(self, tailer: Tailer) -> None:
        """Take a tailer that has ended off the list; a job that is done is not looked at again, a missing one later."""
        self.tailers.pop(tailer.job_id, None)
        if self._news is not None:
            self._news.leave(tailer.job_id)
        missing = isinstance(tailer.failure, JobNotFoundError)
        if tailer.finished or missing:
            self._settled.add(tailer.job_id)
        if missing:
            self._missing.add(tailer.job_id)


def _check_text(job_id: str) -> None:
    """Raise ProtocolError for an id with half of a surrogate pair: it has no UTF-8, in which ids are kept and sent."""
    try:
        job_id.encode()
    except UnicodeEncodeError:
        raise ProtocolError("its id is no text: it has half of a surrogate pair", job_id=job_id) from None


def _age_s(row: ListedJob) -> float:
    """Return how long ago the row's job last changed, in seconds; 0 when the row does not say."""
    when = row.state_since or row.created_at
    return time.time() - when.timestamp() if when is not None else 0.0
