"""`Receiver`: the watched services, their discoveries, and the tailers of their jobs.

A tailer is a task only while it polls its job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

from tailspan.config import Settings, Watch
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError, TailspanError
from tailspan.services import JobService
from tailspan.services.registry import PluginError, plugin_fault
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.errors import AgentError, CheckpointError, LeaseLostError
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.queue import until_usable
from tailspan_agent.receiver.discovery import JobDiscovery, match
from tailspan_agent.receiver.source import Source
from tailspan_agent.receiver.tailer import Tailer
from tailspan_agent.tasks import cancelled

__all__ = ["Receiver"]

_CRASH_PAUSE_S = 30.0
# A poll of a local job takes a millisecond at most: health requests are answered between these.
_POLLS_PER_PASS = 16
_ENDS_EVERY_S = 1.0
_ENDS_SHARE = 4.0
"""The pause after a pass over jobs whose lines wait, in times of its duration: relaying goes first."""

_log = logging.getLogger(__name__)


class Receiver:
    """Runs the discoveries of all watched services and the tailers of their jobs.

    Args:
        context: Shared by all tailers.
        opener: Makes the configured service of a name.
        shared: Shared by the tailers of jobs that a fleet of agents shares: those of services that are not read from
            this machine. None: this agent follows all jobs.

    Attributes:
        tailers: The tailers of all followed jobs, with their tasks; None for one that rests, or whose poll is due.
        discoveries: The discoveries, by the configured name of their service.
        started: The number of jobs that a single pass (`once`) started.
        broken: Why the plugins of services cannot be used, by the services' names; the other services are followed.
        failed: The jobs of a single pass that could not be relayed, as (job id, reason).
    """

    def __init__(
        self,
        context: PipelineContext,
        opener: Callable[[str, Settings], JobService],
        shared: PipelineContext | None = None,
    ) -> None:
        self.tailers: dict[Tailer, asyncio.Task[None] | None] = {}
        self._due: deque[Tailer] = deque()
        self._stopped_tailer = asyncio.Event()
        self.discoveries: dict[str, JobDiscovery] = {}
        self.started = 0
        self.broken: dict[str, PluginError] = {}
        self.failed: list[tuple[str, TailspanError]] = []
        self._context = context
        self._opener = opener
        self._shared = shared
        self._on_due = self._resume  # one object for the tailers of all jobs
        self._sources: dict[str, Source] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def unreachable(self) -> list[str]:
        """The names of the services that fail to answer."""
        found = {name for name, discovery in self.discoveries.items() if discovery.failure} | self.broken.keys()
        causes = (AuthError, ServiceUnavailableError)
        return sorted(found | {one.service_name for one in self.tailers if isinstance(one.failure, causes)})

    @property
    def services(self) -> dict[str, JobService]:
        """The watched services by their configured name."""
        return {name: source.service for name, source in self._sources.items()}

    @property
    def followed(self) -> list[JobSnapshot]:
        """Snapshots of the followed jobs."""
        jobs = [tailer.followed for tailer in self.tailers]
        return [job for job in jobs if job is not None]

    @property
    def failures(self) -> dict[str, str]:
        """Why services could not be listed the last time, by name."""
        failures = {name: one.failure for name, one in self.discoveries.items() if one.failure is not None}
        return {name: str(error) for name, error in (failures | self.broken).items()}

    @property
    def has_seen_all(self) -> bool:
        """Whether every watched service was listed completely once and answered the last time, and no job waits."""
        return all(
            discovery.has_scanned and discovery.failure is None and not discovery.backlog
            for discovery in self.discoveries.values()
        )

    def context_of(self, service: JobService) -> PipelineContext:
        """Return what the tailers of a service share."""
        return self._context if self._shared is None or service.polls_are_free else self._shared

    def on_gained(self) -> None:
        """Find the jobs that this agent follows from now on, and another one of its fleet before."""
        for discovery in self._shared_discoveries():
            discovery.on_gained()

    async def keep_only(self, is_kept: Callable[[str, str], bool]) -> None:
        """Stop to follow the shared jobs that are not kept.

        Args:
            is_kept: Returns whether the job with this service identity and id is still followed.
        """
        dropped: list[Tailer] = []
        for discovery in self._shared_discoveries():
            dropped += discovery.drop(partial(is_kept, discovery.identity))
        await self._stop(dropped)

    def _shared_discoveries(self) -> list[JobDiscovery]:
        return [
            self.discoveries[name]
            for name, source in self._sources.items()
            if name in self.discoveries and self.context_of(source.service) is self._shared
        ]

    def kept(self, old: Settings, new: Settings) -> dict[str, Source]:
        """Return the services that a changed configuration leaves as they are."""
        return {
            name: source
            for name, source in self._sources.items()
            if name in _by_service(new) and new.services.get(name) == old.services.get(name)
        }

    async def open(self, settings: Settings, kept: Mapping[str, Source], *, once: bool = False) -> dict[str, Source]:
        """Open the watched services that are not kept; on an error, open none.

        A plugin that cannot be used is logged and left out (`broken`), if another service is left.

        Args:
            settings: The configuration.
            kept: The services that stay open.
            once: Whether each job is read once only.

        Returns:
            The opened services, by name.

        Raises:
            ConfigError: Invalid options, or two sections configure the same service.
            PluginError: Of the watched services none can be used.
        """
        opened: dict[str, Source] = {}
        broken: dict[str, PluginError] = {}
        async with AsyncExitStack() as undo:
            for name in _by_service(settings):
                if name in kept:
                    continue
                try:
                    service = self._opener(name, settings)
                except PluginError as error:
                    broken[name] = error
                    continue
                if not once:
                    service.tries = 1  # a tailer that goes on has a retry schedule of its own
                source = Source(service, partial(self._context.health.attributes_dropped, name))
                undo.push_async_callback(source.service.aclose)
                _check_identity(source, [*kept.values(), *opened.values()])
                opened[name] = source
            if broken and not opened and not kept:
                raise next(iter(broken.values()))
            undo.pop_all()
        for problem in broken.values():
            _log.error("%s; the other services are followed", problem)
        self.broken = broken
        return opened

    def watch(self, sources: Mapping[str, Source], settings: Settings, *, once: bool = False) -> None:
        """Start the discoveries of opened services; with `once` the caller scans instead."""
        watches = _by_service(settings)
        for name, source in sources.items():
            self._sources[name] = source
            self._context.health.add_service(name)
            discovery = self.discoveries[name] = JobDiscovery(
                self.context_of(source.service), source, watches[name], once=once, start=self._start
            )
            if not once:
                self._tasks[name] = asyncio.create_task(discovery.run())

    async def apply_configuration(
        self, kept: Mapping[str, Source], sources: Mapping[str, Source], settings: Settings
    ) -> None:
        """Apply a changed configuration: stop removed services, start new ones, leave the others running.

        Args:
            kept: The services that stay open, from `kept`.
            sources: The new services, from `open`.
            settings: The new configuration.
        """
        for name in [name for name in self.discoveries if name not in kept]:
            await self._unwatch(name)
        watches = _by_service(settings)
        for name, discovery in self.discoveries.items():
            await self._rematch(discovery, watches[name])
        self.watch(sources, settings)

    async def report_ends_ahead(self, logs_wait: Callable[[], bool]) -> None:
        """Report the ends of jobs before their lines while those cannot be sent. Runs until it is cancelled.

        A queue that is full stops the reading of its jobs, and so hides their ends.

        Args:
            logs_wait: Returns whether the logs endpoint accepts nothing now.
        """
        while True:
            begun_s = time.monotonic()
            if logs_wait():
                for tailer in list(self.tailers):
                    await self._report_end_ahead(tailer)
            await asyncio.sleep(max(_ENDS_EVERY_S, _ENDS_SHARE * (time.monotonic() - begun_s)))

    async def _report_end_ahead(self, tailer: Tailer) -> None:
        try:
            await tailer.report_end_ahead()
        except TailspanError as error:
            _log.debug("job %s: its end is not known yet: %s", tailer.job_id, error)
        except Exception:
            _log.exception("job %s: unexpected error (a bug in the agent); the job will be retried", tailer.job_id)

    async def stop_reading(self) -> None:
        """Stop all discoveries and tailers; queued lines are still sent."""
        await cancelled(*self._tasks.values())
        for discovery in self.discoveries.values():
            discovery.stop()
        # Discoveries first: one that is stopped in the middle of a list still starts the tailers of the jobs it found.
        await self._stop(self.tailers)

    async def aclose(self) -> None:
        """Stop all tasks and close the services."""
        async with AsyncExitStack() as stack:
            for source in self._sources.values():
                stack.push_async_callback(source.service.aclose)
            await self.stop_reading()

    async def _unwatch(self, name: str) -> None:
        await cancelled(self._tasks.pop(name))
        await self._stop(self.discoveries.pop(name).tailers.values())
        await self._sources.pop(name).service.aclose()

    async def _rematch(self, discovery: JobDiscovery, watches: Sequence[Watch]) -> None:
        changed = discovery.watches != watches
        if changed:
            # Stopped, it starts the tailers of the jobs it found, so that they match too; restarted, it lists at once.
            await cancelled(self._tasks[discovery.name])
        unwatched = []
        for tailer in list(discovery.tailers.values()):
            watch = match(watches, tailer.job_id, tailer.job_name)
            if watch is None:
                unwatched.append(tailer)
            else:
                tailer.apply_settings(watch)
        await self._stop(unwatched)
        if changed:
            discovery.apply_watches(watches)
            self._tasks[discovery.name] = asyncio.create_task(discovery.run())

    def _start(self, tailer: Tailer) -> None:
        self.started += tailer.once
        tailer.on_due = self._on_due
        self._resume(tailer)

    def _resume(self, tailer: Tailer) -> None:
        self.tailers[tailer] = None
        self._due.append(tailer)
        if len(self._due) == 1:
            asyncio.get_running_loop().call_soon(self._start_due)

    def _start_due(self) -> None:
        """Start some due polls: however many there are at one moment, the loop is free every few milliseconds."""
        for _ in range(min(_POLLS_PER_PASS, len(self._due))):
            tailer = self._due.popleft()
            if tailer in self.tailers:  # not stopped meanwhile
                task = self.tailers[tailer] = asyncio.create_task(self._run(tailer))
                task.add_done_callback(partial(self._on_task_end, tailer))
        if self._due:
            asyncio.get_running_loop().call_soon(self._start_due)

    def _on_task_end(self, tailer: Tailer, task: asyncio.Task[None]) -> None:
        if self.tailers.get(tailer) is task:
            self._forget(tailer)

    def _forget(self, tailer: Tailer) -> None:
        del self.tailers[tailer]
        tailer.schedule.close()
        tailer.leave_stream()  # a task that was cancelled before its start has not left
        # A service that is not watched any more has no discovery.
        if (discovery := self.discoveries.get(tailer.service_name)) is not None:
            discovery.forget(tailer)
        if tailer.once and tailer.failure is not None:
            self.failed.append((tailer.job_id, tailer.failure))
        self._stopped_tailer.set()

    async def _stop(self, tailers: Iterable[Tailer]) -> None:
        tasks = []
        for tailer in [tailer for tailer in tailers if tailer in self.tailers]:
            task = self.tailers[tailer]
            if task is not None:
                tasks.append(task)
            else:
                self._forget(tailer)
        await cancelled(*tasks)

    async def all_stopped(self) -> None:
        """Wait until no job is followed."""
        while self.tailers:
            self._stopped_tailer.clear()
            await self._stopped_tailer.wait()

    async def _run(self, tailer: Tailer) -> None:
        try:
            await tailer.run()
            if tailer.schedule.is_resting:
                self.tailers[tailer] = None
            return
        except LeaseLostError:
            return  # the agent that has the job now continues
        except TailspanError as error:
            _log.error("job %s: %s", tailer.job_id, error)
            tailer.failure = error
        except Exception as error:
            fault = plugin_fault(self._sources[tailer.service_name].service, error)
            if fault is not None:
                _log.error("job %s: service %s: %s; the job will be retried", tailer.job_id, tailer.service_name, fault)
            else:
                _log.exception("job %s: unexpected error (a bug in the agent); the job will be retried", tailer.job_id)
                fault = f"unexpected error (a bug in the agent): {error!r}"
            tailer.failure = AgentError(f"job {tailer.job_id}: {fault}")
        if tailer.once:
            return
        if isinstance(tailer.failure, CheckpointError) and self._context.store.write_failed:
            # The memory of this tailer may be ahead of the store: the next tailer continues from the store.
            await until_usable(self._context.store)
        else:
            await asyncio.sleep(_CRASH_PAUSE_S)


def _check_identity(source: Source, others: Iterable[Source]) -> None:
    for other in others:
        if other.service.identity == source.service.identity:
            names = f"services.{other.service.name} and services.{source.service.name}"
            raise ConfigError(f"{names} configure the same service: watch only one of them", key=names)


def _by_service(settings: Settings) -> dict[str, list[Watch]]:
    watches: dict[str, list[Watch]] = {}
    for watch in settings.agent.watch:
        watches.setdefault(watch.service, []).append(watch)
    return watches
