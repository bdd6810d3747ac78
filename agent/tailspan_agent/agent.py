"""The agent: puts the parts together, starts them, reloads them by difference, and stops them in order.

watchers -> tailers -> lanes -> outlets (sender, exporter) -> acks -> store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from tailspan.config import Settings, Watch
from tailspan.errors import ConfigError, ServiceError, TailspanError
from tailspan.services import JobService, open_service
from tailspan_agent.agent_metrics import AgentMetrics, agent_resource
from tailspan_agent.backlog import Backlog
from tailspan_agent.checkpoint import Store
from tailspan_agent.job_metrics import FollowedJob
from tailspan_agent.lanes import Lane, SpanLane
from tailspan_agent.outlets import Outlets
from tailspan_agent.redact import Redactor
from tailspan_agent.relay import Relay, Source
from tailspan_agent.runs import PipelineNames
from tailspan_agent.status_server import StatusServer
from tailspan_agent.tailer import Tailer
from tailspan_agent.telemetry import MetricsPush, Telemetry, export_interval_s
from tailspan_agent.watcher import Watcher, match

__all__ = ["Agent", "OnceResult"]

_LANES = 8
_CRASH_PAUSE_S = 30.0
_FORGET_S = 30 * 86400.0
_HOUSEKEEPING_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnceResult:
    """What one pass relayed.

    Attributes:
        jobs: How many jobs were looked at.
        acked: How many log records the endpoint took.
        rejected: How many records went to the dead letter.
        failures: Services and jobs that could not be read, and why.
        delivered: Whether all that was read is acked or dead-lettered.
    """

    jobs: int
    acked: int
    rejected: int
    failures: tuple[ServiceError, ...]
    delivered: bool


class Agent:
    """One agent over one state directory. Make it, then `run` it or `run_once`, inside one event loop.

    Args:
        settings: The loaded configuration.
        opener: Makes the configured service of a name.

    Raises:
        ConfigError: The configuration asks for what cannot be.
        CheckpointError: The state directory cannot be used, or another agent holds it.
    """

    def __init__(self, settings: Settings, opener: Callable[[str, Settings], JobService] = open_service) -> None:
        if settings.otlp.disabled:
            raise ConfigError("OTEL_SDK_DISABLED is set: unset it to let the agent relay", key="OTEL_SDK_DISABLED")
        self.settings = settings
        self._opener = opener
        self.store = Store(settings.agent.state_dir)
        if self.store.recovered:
            _log.warning("the checkpoint store was damaged (%s)", self.store.recovered)
        self.metrics = AgentMetrics(
            agent_resource(settings.agent.service_name, self.store.instance_id, settings.otlp.resource)
        )
        self.outlets = Outlets(settings, self.metrics)
        logs, traces = self.outlets.get("logs"), self.outlets.get("traces")
        runs = self.store.runs()
        self._relay = Relay(
            store=self.store,
            lanes=[Lane(self.store, logs) for _ in range(_LANES)] if logs else [],
            spans=SpanLane(self.store, traces) if traces else None,
            backlog=Backlog(),
            health=self.metrics,
            redactor=Redactor.from_settings(settings.redact),
            otlp_resource=settings.otlp.resource,
            names=PipelineNames(settings.agent.max_pipeline_names, (total.pipeline for total in runs)),
            totals={total.key: total for total in runs},
        )
        self.telemetry = Telemetry(
            self.metrics,
            runs=lambda: list(self._relay.totals.values()),
            jobs=lambda: list(self._followed()),
            names=self._relay.names,
            start_unix_nano=self.store.start_unix_nano,
            run_id_on_metrics=settings.agent.run_id_on_metrics,
        )
        self._sources: dict[str, Source] = {}
        self._watchers: dict[str, Watcher] = {}
        self._watcher_tasks: dict[str, asyncio.Task[None]] = {}
        self._tailers: dict[Tailer, asyncio.Task[None]] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._pushing: MetricsPush | None = None
        self.server: StatusServer | None = None
        self._stopping = asyncio.Event()
        self._skip_drain = asyncio.Event()

    @property
    def tailers(self) -> list[Tailer]:
        """The tailers that run now."""
        return list(self._tailers)

    @property
    def watchers(self) -> list[Watcher]:
        """The watchers, one per watched service."""
        return list(self._watchers.values())

    def problems(self) -> list[str]:
        """Return short words for what keeps the agent from relaying; empty when it is ready."""
        found = [f"endpoint_{signal}_paused" for signal in self.outlets.paused()]
        found += [f"service_{watcher.name}_unreachable" for watcher in self._watchers.values() if watcher.failure]
        return found

    def _followed(self) -> Iterator[FollowedJob]:
        jobs = [tailer.followed for tailer in self._tailers]
        yield from (job for job in jobs if job is not None)

    def stop(self) -> None:
        """Ask `run` to stop reading, finish what is in flight, and return; a second call skips the drain."""
        if self._stopping.is_set():
            self._skip_drain.set()
        self._stopping.set()

    async def run(
        self, *, on_ready: Callable[[], object] = lambda: None, on_stop: Callable[[], object] = lambda: None
    ) -> None:
        """Relay until `stop` is called, then drain for up to ``agent.drain_timeout``.

        Args:
            on_ready: Called once when jobs are followed.
            on_stop: Called once when the drain begins.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            self._start_pumps()
            address = self.settings.agent.listen_address
            if address is not None:
                self.server = StatusServer(
                    address,
                    metrics=self.telemetry.prometheus_text,
                    readiness=self.problems,
                    token=self.settings.agent.read_token(),
                    allowed_hosts=self.settings.agent.allowed_hosts,
                )
                await stack.enter_async_context(self.server)
            push = self._pushing = self._push()
            if push is not None:
                self._pumps.append(asyncio.create_task(push.run(asyncio.Event())))
            self._watch(self.settings)
            self._pumps.append(asyncio.create_task(self._housekeep()))
            _log.info("the agent follows %s", ", ".join(sorted(self._watchers)) or "nothing")
            on_ready()
            await self._stopping.wait()
            on_stop()
            _log.info("stopping: what was read is sent, for up to %g s", self.settings.agent.drain_timeout)
            await self._stop_reading()
            drained = await self._drain(self.settings.agent.drain_timeout)
            if push is not None and not self._skip_drain.is_set():
                await self._within(push.export(), 5.0)
            if not drained:
                _log.warning("stopped before all was acked; the next start goes on from the last checkpoint")

    async def run_once(self, timeout_s: float) -> OnceResult:
        """Relay what is readable now: ended jobs completely, running jobs to their present end.

        Args:
            timeout_s: How long it may take, in seconds.

        Returns:
            What was relayed, and whether all of it is acked.
        """
        failures: list[ServiceError] = []
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            self._start_pumps()
            self._watch(self.settings, once=True)
            everything: list[Tailer] = []

            async def relay() -> None:
                for watcher in self._watchers.values():
                    try:
                        await watcher.scan()
                    except ServiceError as error:
                        failures.append(error)
                everything.extend(self._tailers)
                while self._tailers:
                    await asyncio.wait(self._tailers.values())
                await self._flush()
                push = self._push()
                if push is not None:
                    await push.export()

            stopped = asyncio.create_task(self._stopping.wait())
            relaying = asyncio.create_task(relay())
            await asyncio.wait({stopped, relaying}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            delivered = relaying.done()
            for task in (stopped, relaying):
                task.cancel()
            await asyncio.gather(stopped, relaying, return_exceptions=True)
            if delivered:
                relaying.result()
            failures += [tailer.failure for tailer in everything if tailer.failure is not None]
            await self._stop_reading()
            return OnceResult(
                jobs=len(everything),
                acked=logs.delivered if (logs := self.outlets.get("logs")) else 0,
                rejected=self.outlets.rejected,
                failures=tuple(failures),
                delivered=delivered,
            )
        raise AssertionError("unreachable")

    async def reload(self, settings: Settings) -> None:
        """Go over to a changed configuration: stop what is gone, start what is new, leave the rest running.

        Args:
            settings: The newly loaded configuration. ``agent.state_dir``, ``agent.listen`` and the set of signals are
                taken up at the next start only.
        """
        old = self.settings
        for key in ("state_dir", "listen"):
            if getattr(settings.agent, key) != getattr(old.agent, key):
                _log.warning("agent.%s changed: it takes effect when the agent is started anew", key)
        await self.outlets.reload(settings)
        self.settings = settings
        if self._pushing is not None and self.outlets.metrics_exporter is not None:
            self._pushing.use(self.outlets.metrics_exporter)
        changed = {name for name in self._watchers if settings.services.get(name) != old.services.get(name)}
        by_service = _watches_by_service(settings)
        for name in [name for name in self._watchers if name in changed or name not in by_service]:
            await self._unwatch(name)
        for name, watcher in self._watchers.items():
            await self._rematch(watcher, by_service[name])
        self._watch(settings)
        _log.info("the configuration was reloaded")

    async def _rematch(self, watcher: Watcher, watches: list[Watch]) -> None:
        if watcher.watches == watches:
            return
        for tailer in list(watcher.tailers.values()):
            if match(watches, tailer.job_id, tailer.job_name) != tailer.watch:
                await self._cancel(tailer)
        watcher.use(watches)

    def _watch(self, settings: Settings, *, once: bool = False) -> None:
        """Start a watcher for every watched service that has none."""
        for name, watches in _watches_by_service(settings).items():
            if name in self._watchers:
                continue
            source = Source(self._opener(name, settings))
            self._check_identity(source)
            self._sources[name] = source
            self.metrics.know_service(name)
            watcher = Watcher(self._relay, source, watches, once=once, start=lambda tailer: self._start(tailer))
            self._watchers[name] = watcher
            if not once:
                self._watcher_tasks[name] = asyncio.create_task(watcher.run())

    def _check_identity(self, source: Source) -> None:
        for other in self._sources.values():
            if other.service.identity == source.service.identity:
                names = f"services.{other.service.name} and services.{source.service.name}"
                raise ConfigError(f"{names} are one and the same service: watch one of them", key=names)

    async def _unwatch(self, name: str) -> None:
        task = self._watcher_tasks.pop(name, None)
        if task is not None:
            await _cancelled(task)
        for tailer in list(self._watchers.pop(name).tailers.values()):
            await self._cancel(tailer)
        await self._sources.pop(name).service.aclose()

    def _start(self, tailer: Tailer) -> None:
        self._tailers[tailer] = asyncio.create_task(self._run_tailer(tailer))

    async def _run_tailer(self, tailer: Tailer) -> None:
        try:
            await tailer.run()
        except TailspanError as error:
            _log.error("job %s: %s", tailer.job_id, error)
            await self._pause_after(tailer)
        except Exception:
            _log.exception("job %s: a fault of the agent; the job is taken up again later", tailer.job_id)
            await self._pause_after(tailer)
        finally:
            self._tailers.pop(tailer, None)
            watcher = self._watchers.get(tailer.service_name)
            if watcher is not None:
                watcher.forget(tailer)

    async def _pause_after(self, tailer: Tailer) -> None:
        if not tailer.once:
            await asyncio.sleep(_CRASH_PAUSE_S)

    async def _cancel(self, tailer: Tailer) -> None:
        task = self._tailers.get(tailer)
        if task is not None:
            await _cancelled(task)

    def _start_pumps(self) -> None:
        self._pumps += [asyncio.create_task(lane.run()) for lane in self._relay.lanes]
        if self._relay.spans is not None:
            self._pumps.append(asyncio.create_task(self._relay.spans.run()))

    def _push(self) -> MetricsPush | None:
        exporter = self.outlets.metrics_exporter
        if exporter is None:
            return None
        return MetricsPush(self.telemetry, self.metrics, exporter, interval_s=export_interval_s())

    async def _housekeep(self) -> None:
        while True:
            lookback = max((watch.lookback for watch in self.settings.agent.watch), default=0.0)
            forgotten = self.store.forget(max(_FORGET_S, 2 * lookback))
            if forgotten:
                _log.info("%d jobs without change for 30 days were forgotten", forgotten)
            await asyncio.sleep(_HOUSEKEEPING_S)

    async def _stop_reading(self) -> None:
        for task in self._watcher_tasks.values():
            await _cancelled(task)
        for task in list(self._tailers.values()):
            await _cancelled(task)

    async def _flush(self) -> None:
        await asyncio.gather(*(lane.flush() for lane in self._relay.lanes))
        if self._relay.spans is not None:
            await self._relay.spans.flush()

    async def _drain(self, timeout_s: float) -> bool:
        return await self._within(self._flush(), timeout_s)

    async def _within(self, work: Coroutine[Any, Any, object], timeout_s: float) -> bool:
        task = asyncio.create_task(work)
        skip = asyncio.create_task(self._skip_drain.wait())
        await asyncio.wait({task, skip}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        done = task.done()
        await _cancelled(task)
        await _cancelled(skip)
        return done

    async def _close(self) -> None:
        await self._stop_reading()
        for task in self._pumps:
            await _cancelled(task)
        for source in self._sources.values():
            await source.service.aclose()
        await self.outlets.aclose()
        self.store.close()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _watches_by_service(settings: Settings) -> dict[str, list[Watch]]:
    by_service: dict[str, list[Watch]] = {}
    for watch in settings.agent.watch:
        by_service.setdefault(watch.service, []).append(watch)
    return by_service
