"""The watcher: which jobs of one service are followed. It lists, matches, and starts a tailer for each job it finds."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from tailspan.backoff import backoff_s
from tailspan.config import Watch
from tailspan.errors import JobNotFoundError, ServiceError
from tailspan.models import ListedJob
from tailspan_agent.relay import Relay, Source
from tailspan_agent.tailer import Tailer

__all__ = ["Watcher", "match"]

_FULL_SCAN_S = 60.0
_DISCOVER_S = 5.0
_CHEAP_DISCOVER_S = 0.5

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


class Watcher:
    """Finds the jobs of one service.

    Args:
        relay: What all tailers share.
        source: The service.
        watches: Its watches, in the order of the file.
        once: Whether tailers relay only what is readable now.
        start: Called with each new tailer, to run it.

    Attributes:
        tailers: The tailers of this service by job id, running ones only.
        failure: Why the service could not be asked the last time; None after an answer.
    """

    def __init__(
        self,
        relay: Relay,
        source: Source,
        watches: Sequence[Watch],
        *,
        once: bool = False,
        start: Callable[[Tailer], None],
    ) -> None:
        self.tailers: dict[str, Tailer] = {}
        self.watches = watches
        self.failure: ServiceError | None = None
        self._relay = relay
        self._source = source
        self._service = source.service
        self._once = once
        self._start = start
        self._names = relay.store.names(self._service.identity)
        self._settled = relay.store.finished_jobs(self._service.identity)
        self._full_scan_at_s = float("-inf")

    @property
    def name(self) -> str:
        """The service's configured name."""
        return self._service.name

    async def run(self) -> None:
        """Look for jobs until cancelled."""
        errors = 0
        while True:
            try:
                await self.scan()
            except ServiceError as error:
                self._relay.health.poll_failed(self.name, error)
                if self.failure is None:
                    _log.warning("service %s: %s", self.name, error)
                self.failure, errors = error, errors + 1
                await asyncio.sleep(max(_DISCOVER_S, backoff_s(errors, random.random())))
            else:
                if self.failure is not None:
                    _log.info("service %s answers again", self.name)
                self.failure, errors = None, 0
                await asyncio.sleep(
                    (_CHEAP_DISCOVER_S if self._lists_cheaply else _DISCOVER_S) * random.uniform(0.9, 1.1)
                )

    async def scan(self) -> None:
        """Look once: start a tailer for each job that is watched and has none.

        Raises:
            ServiceError: The service could not be asked.
        """
        for job_id in dict.fromkeys(job_id for watch in self.watches for job_id in watch.jobs):
            self._follow(job_id, "")
        if any(watch.discover for watch in self.watches):
            await self._resume()
            await self._discover()

    @property
    def _lists_cheaply(self) -> bool:
        # A service that may be asked each two seconds for each job is one whose list costs no request either.
        return self._service.poll_max_s <= 2.0

    async def _resume(self) -> None:
        """Take up the jobs that the store knows as unfinished, however old they are."""
        for job_id, name in self._relay.store.unfinished_jobs(self._service.identity):
            self._follow(job_id, name)

    async def _discover(self) -> None:
        """Read the list, newest first, as far as it can hold news."""
        now_s = time.monotonic()
        full = now_s - self._full_scan_at_s >= _FULL_SCAN_S
        unseen = set(self.tailers)
        self._relay.health.polled(self.name)
        async for rows in self._service.list_jobs():
            news = False
            for row in rows:
                unseen.discard(row.job_id)
                news = await self._take_up(row) or news
            if unseen and not self._lists_cheaply:
                # The list is these jobs' status: one request for many.
                continue
            if not news and (not full or self._too_old(rows[-1])):
                break
        if full:
            self._full_scan_at_s = now_s

    async def _take_up(self, row: ListedJob) -> bool:
        """Deal with one row; return whether it was news."""
        tailer = self.tailers.get(row.job_id)
        if tailer is not None:
            tailer.on_row(row)
            return False
        if row.job_id in self._settled:
            return False
        name = await self._name(row)
        watch = match(self.watches, row.job_id, name) if name is not None else None
        if watch is None or (row.state.is_terminal and _age_s(row) > watch.lookback and not self._known(row.job_id)):
            self._settled.add(row.job_id)
        else:
            self._follow(row.job_id, name or "")
        return True

    async def _name(self, row: ListedJob) -> str | None:
        name = row.job_name or self._names.get(row.job_id)
        if name is None:
            try:
                name = (await self._service.get_job(row.job_id)).job_name
            except JobNotFoundError:
                return None
            self._names[row.job_id] = name
            self._relay.store.add_name(self._service.identity, row.job_id, name)
        return name

    def _known(self, job_id: str) -> bool:
        return self._relay.store.job(self._service.identity, job_id) is not None

    def _too_old(self, row: ListedJob) -> bool:
        lookback_s = max((watch.lookback for watch in self.watches if watch.discover), default=0.0)
        return not self._lists_cheaply and row.created_at is not None and _age_s(row) > lookback_s

    def _follow(self, job_id: str, name: str) -> None:
        if job_id in self.tailers or job_id in self._settled:
            return
        watch = match(self.watches, job_id, name)
        if watch is not None:
            tailer = Tailer(self._relay, self._source, watch, job_id, once=self._once)
            self.tailers[job_id] = tailer
            self._start(tailer)

    def use(self, watches: Sequence[Watch]) -> None:
        """Go over to other watches: every job is matched anew."""
        self.watches = watches
        self._settled = self._relay.store.finished_jobs(self._service.identity)
        self._full_scan_at_s = float("-inf")

    def forget(self, tailer: Tailer) -> None:
        """Take a tailer that has ended off the list; a job that is done is not looked at again."""
        self.tailers.pop(tailer.job_id, None)
        if tailer.finished or isinstance(tailer.failure, JobNotFoundError):
            self._settled.add(tailer.job_id)


def _age_s(row: ListedJob) -> float:
    """Return how long ago the row's job last changed, in seconds; 0 when the row does not say."""
    when = row.state_since or row.created_at
    return time.time() - when.timestamp() if when is not None else 0.0
