"""`Receiver`: the services that are watched, their watchers, and the tailers of their jobs, as tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack

from tailspan.config import Settings, Watch
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError, TailspanError
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.errors import AgentError, CheckpointError
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.queue import until_usable
from tailspan_agent.receiver.discovery import JobDiscovery, match
from tailspan_agent.receiver.source import Source
from tailspan_agent.receiver.tailer import Tailer
from tailspan_agent.tasks import cancelled

__all__ = ["Receiver"]

_CRASH_PAUSE_S = 30.0

_log = logging.getLogger(__name__)


class Receiver:
    """Who follows what now.

    Args:
        context: What all tailers share.
        opener: Makes the configured service of a name.

    Attributes:
        tailers: The tailers that run, with their tasks.
        discoveries: The watchers by the configured name of their service.
        started: How many jobs a single pass (`once`) has begun with.
        failed: Ids of those that could not be relayed, and why.
    """

    def __init__(self, context: PipelineContext, opener: Callable[[str, Settings], JobService]) -> None:
        self.tailers: dict[Tailer, asyncio.Task[None]] = {}
        self.discoveries: dict[str, JobDiscovery] = {}
        self.started = 0
        self.failed: list[tuple[str, TailspanError]] = []
        self._context = context
        self._opener = opener
        self._sources: dict[str, Source] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def unreachable(self) -> list[str]:
        """The services that cannot be asked now, by name."""
        found = {name for name, discovery in self.discoveries.items() if discovery.failure}
        troubles = (AuthError, ServiceUnavailableError)
        return sorted(found | {one.service_name for one in self.tailers if isinstance(one.failure, troubles)})

    @property
    def services(self) -> dict[str, JobService]:
        """The watched services by their configured name."""
        return {name: source.service for name, source in self._sources.items()}

    @property
    def followed(self) -> list[JobSnapshot]:
        """The jobs that are followed now and whose status is known."""
        jobs = [tailer.followed for tailer in self.tailers]
        return [job for job in jobs if job is not None]

    @property
    def failures(self) -> dict[str, str]:
        """Why services cannot be asked now, by name."""
        return {
            name: str(discovery.failure)
            for name, discovery in self.discoveries.items()
            if discovery.failure is not None
        }

    @property
    def has_seen_all(self) -> bool:
        """Whether every watched service was looked at wholly, and answered the last time."""
        return all(discovery.has_scanned and discovery.failure is None for discovery in self.discoveries.values())

    def kept(self, old: Settings, new: Settings) -> dict[str, Source]:
        """Return the services that a changed configuration leaves as they are."""
        return {
            name: source
            for name, source in self._sources.items()
            if name in _by_service(new) and new.services.get(name) == old.services.get(name)
        }

    async def open(self, settings: Settings, kept: Mapping[str, Source]) -> dict[str, Source]:
        """Open the watched services that are not kept: all, or with an error none.

        Raises:
            ConfigError: Options that do not fit, or two services that are one and the same.
        """
        opened: dict[str, Source] = {}
        async with AsyncExitStack() as undo:
            for name in _by_service(settings):
                if name not in kept:
                    service = self._opener(name, settings)
                    service.tries = 1  # a tailer has a retry schedule of its own
                    source = Source(service)
                    undo.push_async_callback(source.service.aclose)
                    _check_identity(source, [*kept.values(), *opened.values()])
                    opened[name] = source
            undo.pop_all()
        return opened

    def watch(self, sources: Mapping[str, Source], settings: Settings, *, once: bool = False) -> None:
        """Watch opened services; with `once` they are not looked at before somebody scans."""
        watches = _by_service(settings)
        for name, source in sources.items():
            self._sources[name] = source
            self._context.health.add_service(name)
            discovery = self.discoveries[name] = JobDiscovery(
                self._context, source, watches[name], once=once, start=self._start
            )
            if not once:
                self._tasks[name] = asyncio.create_task(discovery.run())

    async def go_over(self, kept: Mapping[str, Source], sources: Mapping[str, Source], settings: Settings) -> None:
        """Go over to a changed configuration: end what is gone, begin what is new, leave the rest running.

        Args:
            kept: From `kept`.
            sources: From `open`.
            settings: The new configuration.
        """
        for name in [name for name in self.discoveries if name not in kept]:
            await self._unwatch(name)
        watches = _by_service(settings)
        for name, discovery in self.discoveries.items():
            await self._rematch(discovery, watches[name])
        self.watch(sources, settings)

    async def stop_reading(self) -> None:
        """End all watchers and tailers; what they have read is on its way."""
        for task in list(self._tasks.values()):
            await cancelled(task)
        # Only now: a watcher that is stopped in the middle of a list still starts the tailers of what it has found.
        for task in list(self.tailers.values()):
            await cancelled(task)

    async def aclose(self) -> None:
        """End everything and close the services."""
        async with AsyncExitStack() as stack:
            for source in self._sources.values():
                stack.push_async_callback(source.service.aclose)
            await self.stop_reading()

    async def _unwatch(self, name: str) -> None:
        await cancelled(self._tasks.pop(name))
        for tailer in list(self.discoveries.pop(name).tailers.values()):
            await self._end(tailer)
        await self._sources.pop(name).service.aclose()

    async def _rematch(self, discovery: JobDiscovery, watches: Sequence[Watch]) -> None:
        changed = discovery.watches != watches
        if changed:
            # It starts what it has found, so that this is matched too; begun anew, it looks at once.
            await cancelled(self._tasks[discovery.name])
        for tailer in list(discovery.tailers.values()):
            watch = match(watches, tailer.job_id, tailer.job_name)
            if watch is None:
                await self._end(tailer)
            else:
                tailer.use(watch)
        if changed:
            discovery.use(watches)
            self._tasks[discovery.name] = asyncio.create_task(discovery.run())

    def _start(self, tailer: Tailer) -> None:
        self.started += tailer.once
        discovery = self.discoveries[tailer.service_name]
        task = self.tailers[tailer] = asyncio.create_task(self._run(tailer))

        def ended(_: asyncio.Task[None]) -> None:
            del self.tailers[tailer]
            tailer.leave_stream()  # a task that was cancelled before it began has not
            discovery.forget(tailer)
            if tailer.once and tailer.failure is not None:
                self.failed.append((tailer.job_id, tailer.failure))

        task.add_done_callback(ended)

    async def _run(self, tailer: Tailer) -> None:
        try:
            await tailer.run()
            return
        except TailspanError as error:
            _log.error("job %s: %s", tailer.job_id, error)
            tailer.failure = error
        except Exception as error:
            _log.exception("job %s: a fault of the agent; the job is taken up again later", tailer.job_id)
            tailer.failure = AgentError(f"job {tailer.job_id}: a fault of the agent: {error!r}")
        if tailer.once:
            return
        if isinstance(tailer.failure, CheckpointError) and self._context.store.refused:
            # What this tailer holds may be ahead of the store: the next one begins where the store is.
            await until_usable(self._context.store)
        else:
            await asyncio.sleep(_CRASH_PAUSE_S)

    async def _end(self, tailer: Tailer) -> None:
        task = self.tailers.get(tailer)
        if task is not None:
            await cancelled(task)


def _check_identity(source: Source, others: Iterable[Source]) -> None:
    for other in others:
        if other.service.identity == source.service.identity:
            names = f"services.{other.service.name} and services.{source.service.name}"
            raise ConfigError(f"{names} are one and the same service: watch one of them", key=names)


def _by_service(settings: Settings) -> dict[str, list[Watch]]:
    watches: dict[str, list[Watch]] = {}
    for watch in settings.agent.watch:
        watches.setdefault(watch.service, []).append(watch)
    return watches
