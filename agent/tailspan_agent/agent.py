"""The agent: puts the parts together, starts them, reloads them by difference, and stops them in order.

discoveries -> tailers -> queues -> endpoints (retrying exporter) -> acks -> store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tailspan.config import Settings
from tailspan.config.signals import SIGNALS
from tailspan.errors import ConfigError, JobNotFoundError, TailspanError
from tailspan.services import JobService
from tailspan.services.registry import open_service
from tailspan_agent.analysis.assessment import Assessment, JobSnapshot, PipelineStats, assess
from tailspan_agent.analysis.baseline import Histories
from tailspan_agent.analysis.run_totals import PipelineNames
from tailspan_agent.checkpoint.store import Store
from tailspan_agent.errors import CheckpointError
from tailspan_agent.exporter.endpoints import Endpoints
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.metrics.agent import AgentMetrics, agent_resource
from tailspan_agent.metrics.telemetry import MetricsPush, Telemetry, export_interval_s
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.missing_runs import MissingRuns
from tailspan_agent.pipeline.queue import LogQueue, SpanQueue
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.receiver.discovery import JobDiscovery
from tailspan_agent.receiver.receiver import Receiver
from tailspan_agent.receiver.tailer import Tailer
from tailspan_agent.records.redact import Redactor
from tailspan_agent.tasks import cancelled
from tailspan_agent.web.agent_view import AgentView

if TYPE_CHECKING:
    from tailspan_agent.web.server import StatusServer

__all__ = ["Agent", "OnceResult"]

_LANES = 2
_FORGET_S = 30 * 86400.0
_HOUSEKEEPING_S = 3600.0
_LAST_PUSH_S = 5.0

_RESTART_KEYS = (
    "state_dir",
    "listen",
    "token",
    "token_file",
    "max_pipeline_names",
    "run_id_on_metrics",
    "service_name",
)

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
    failures: tuple[TailspanError, ...]
    delivered: bool


class Agent:
    """One agent over one state directory. Make it, then `run` it or `run_once`, inside one event loop.

    Args:
        settings: The loaded configuration.
        opener: Makes the configured service of a name.

    Attributes:
        pipeline_stats: What is known of pipelines from their past: ``histories.of(label)`` is a `PipelineHistory`
            last runs, the success rate and the usual durations; iterating ``histories`` names them.

    Raises:
        ConfigError: The configuration asks for what cannot be.
        CheckpointError: The state directory cannot be used, or another agent holds it.
    """

    def __init__(self, settings: Settings, opener: Callable[[str, Settings], JobService] = open_service) -> None:
        _check_enabled(settings)
        self.settings = settings
        with contextlib.ExitStack() as undo:
            self.store = Store(settings.agent.state_dir)
            undo.callback(self.store.close)
            if self.store.recovered:
                _log.warning("the checkpoint store was damaged (%s)", self.store.recovered)
            self._make_parts(settings)
            undo.pop_all()
        self._receiver = Receiver(self._context, opener)
        self._pumps: list[asyncio.Task[None]] = []
        self._pushing: asyncio.Task[None] | None = None
        self.server: StatusServer | None = None
        self._stopping = asyncio.Event()
        self._skip_drain = asyncio.Event()
        self._follows = asyncio.Event()
        self._changing = asyncio.Lock()

    def _make_parts(self, settings: Settings) -> None:
        self.metrics = AgentMetrics(
            agent_resource(settings.agent.service_name, self.store.instance_id, settings.otlp.resource)
        )
        self.endpoints = Endpoints(settings, self.metrics)
        logs, traces = self.endpoints.get("logs"), self.endpoints.get("traces")
        runs = self.store.runs()
        # What is expected comes first: it must not share a name with what is not, however many names there are.
        known = [*(expect.name for expect in settings.agent.expect), *(total.pipeline for total in runs)]
        self.pipeline_stats = PipelineStats(
            histories=Histories(self.store.history.past_runs()), too_fast=self.store.history.too_fast()
        )
        self._context = PipelineContext(
            store=self.store,
            queues=[LogQueue(self.store, logs) for _ in range(_LANES)] if logs else [],
            spans=SpanQueue(self.store, traces) if traces else None,
            stream_order=StreamOrder(),
            health=self.metrics,
            redactor=Redactor.from_settings(settings.redact),
            otlp_resource=settings.otlp.resource,
            names=PipelineNames(settings.agent.max_pipeline_names, known),
            totals={total.key: total for total in runs},
            pipeline_stats=self.pipeline_stats,
        )
        self.telemetry = Telemetry(
            self.metrics,
            runs=lambda: list(self._context.totals.values()),
            jobs=self._followed,
            names=self._context.names,
            start_unix_nano=self.store.start_unix_nano,
            pipeline_stats=self.pipeline_stats,
            run_id_on_metrics=settings.agent.run_id_on_metrics,
        )

    @property
    def tailers(self) -> list[Tailer]:
        """The tailers that run now."""
        return list(self._receiver.tailers)

    @property
    def discoveries(self) -> list[JobDiscovery]:
        """The watchers, one per watched service."""
        return list(self._receiver.discoveries.values())

    def problems(self) -> list[str]:
        """Return short words for what keeps the agent from relaying; empty when it is ready."""
        found = [f"endpoint_{signal}_paused" for signal in self.endpoints.paused()]
        found += ["checkpoint_store_unwritable"] if self.store.refused else []
        return found + [f"service_{name}_unreachable" for name in self._receiver.unreachable]

    def delivery(self, identity: str, job_id: str) -> dict[str, object]:
        """Return what became of a job's lines, for ``tailspan wait --delivered``.

        Args:
            identity: The identity of the job's service.
            job_id: The job; a job that the agent does not know is not complete.
        """
        known = self.store.job(identity, job_id)
        if known is None:
            return {"known": False, "logs_complete": False}
        ledger = JobLedger.from_json(known.ledger)
        return {"known": True, "logs_complete": known.logs_complete, "lines": ledger.lines, **asdict(ledger.delivery)}

    def followed_jobs(self) -> list[tuple[JobSnapshot, Assessment]]:
        """Return the jobs that are followed now, each with what can be told of it: progress, time left, what is odd."""
        now_ns, label, histories = time.time_ns(), self._context.names.label, self.pipeline_stats.histories
        jobs = self._receiver.followed
        return [(job, assess(job, histories.of(label(job.status.job_name)), now_ns)) for job in jobs]

    def _followed(self) -> list[JobSnapshot]:
        self.endpoints.paused()  # asked with each snapshot, so that the metrics say it too
        return self._receiver.followed

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

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
                # Uvicorn and Starlette take 90 ms, which a single pass does without.
                from tailspan_agent.web.server import StatusServer

                self.server = StatusServer(
                    address,
                    metrics=self.telemetry.prometheus_text,
                    readiness=self.problems,
                    delivery=self.delivery,
                    shown=AgentView(
                        context=self._context,
                        receiver=self._receiver,
                        settings=lambda: self.settings,
                        endpoints=self.endpoints,
                        problems=self.problems,
                    ),
                    token=self.settings.agent.read_token(),
                    allowed_hosts=self.settings.agent.allowed_hosts,
                )
                await stack.enter_async_context(self.server)
            self._start_pushing()
            self._receiver.watch(await self._receiver.open(self.settings, {}), self.settings)
            self._pumps.append(asyncio.create_task(self._housekeep()))
            missing_runs = MissingRuns(
                self._context,
                jobs=lambda: self._receiver.followed,
                settings=lambda: self.settings,
                seen_all=lambda: self._receiver.has_seen_all,
            )
            self._pumps.append(asyncio.create_task(missing_runs.run()))
            _log.info("the agent follows %s", ", ".join(sorted(self._receiver.discoveries)) or "nothing")
            self._follows.set()
            on_ready()
            await self._first_of(self._stopping.wait())
            on_stop()
            _log.info("stopping: what was read is sent, for up to %g s", self.settings.agent.drain_timeout)
            async with self._changing:
                await self._receiver.stop_reading()
            drained = await self._within(self._flush(), self.settings.agent.drain_timeout)
            push = self._push()
            if push is not None and not self._skip_drain.is_set():
                await self._within(push.export(), _LAST_PUSH_S)
            if not drained:
                _log.warning("stopped before all was acked; the next start goes on from the last checkpoint")

    async def run_once(self, timeout_s: float) -> OnceResult:
        """Relay what is readable now: ended jobs completely, running jobs to their present end.

        Args:
            timeout_s: How long it may take, in seconds.

        Returns:
            What was relayed, and whether all of it is acked.
        """
        failures: list[TailspanError] = []
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            for queue in self._context.queues:
                queue.linger = False  # nothing more will come that would be worth to wait for
            self._start_pumps()
            receiver = self._receiver
            receiver.watch(await receiver.open(self.settings, {}), self.settings, once=True)

            async def relay() -> None:
                for discovery in self.discoveries:
                    try:
                        await discovery.scan()
                    except TailspanError as error:
                        failures.append(error)
                    failures.extend(discovery.skipped.values())
                while receiver.tailers:
                    await asyncio.wait(receiver.tailers.values())
                await self._flush()
                push = self._push()
                if push is not None:
                    await push.export()

            delivered = await self._first_of(self._stopping.wait(), relay(), timeout_s=timeout_s) == 1
            await receiver.stop_reading()
            named = {job_id for watch in self.settings.agent.watch for job_id in watch.jobs}
            # A job that was listed and deleted before it was read is not one that somebody misspelt.
            failures += [
                error for job_id, error in receiver.failed if not isinstance(error, JobNotFoundError) or job_id in named
            ]
            return OnceResult(
                jobs=receiver.started,
                acked=logs.delivered if (logs := self.endpoints.get("logs")) else 0,
                rejected=self.endpoints.rejected,
                failures=tuple(failures),
                delivered=delivered,
            )
        raise AssertionError("unreachable")

    async def reload(self, settings: Settings) -> None:
        """Go over to a changed configuration: stop what is gone, start what is new, leave the rest running.

        Args:
            settings: The newly loaded configuration. ``agent.state_dir``, ``agent.listen``, the limits of metrics and
                the set of relayed signals are taken up at the next start only.

        Raises:
            ConfigError: The configuration asks for what cannot be; nothing was changed.
        """
        _check_enabled(settings)
        redactor = Redactor.from_settings(settings.redact)
        # Neither while it starts nor while it stops: what is followed then would be followed twice, or not be drained.
        await self._follows.wait()
        async with self._changing:
            if not self._stopping.is_set():
                await self._go_over(settings, redactor)

    async def _go_over(self, settings: Settings, redactor: Redactor | None) -> None:
        kept = self._receiver.kept(self.settings, settings)
        async with contextlib.AsyncExitStack() as undo:
            sources = await self._receiver.open(settings, kept)
            for source in sources.values():
                undo.push_async_callback(source.service.aclose)
            await self._stop_pushing()
            try:
                await self.endpoints.reload(settings)
            finally:
                self._start_pushing()
            undo.pop_all()
        for key in changes_that_need_restart(self.settings, settings):
            _log.warning("%s changed: it takes effect when the agent is started anew", key)
        self.settings = settings
        self._context.redactor, self._context.otlp_resource = redactor, settings.otlp.resource
        await self._receiver.go_over(kept, sources, settings)
        _log.info("the configuration was reloaded")

    def _start_pumps(self) -> None:
        self._pumps += [asyncio.create_task(queue.run()) for queue in self._context.queues]
        if self._context.spans is not None:
            self._pumps.append(asyncio.create_task(self._context.spans.run()))

    def _push(self) -> MetricsPush | None:
        exporter = self.endpoints.metrics_exporter
        if exporter is None:
            return None
        return MetricsPush(self.telemetry, self.metrics, exporter, interval_s=export_interval_s())

    def _start_pushing(self) -> None:
        push = self._push()
        if push is not None:
            self._pushing = asyncio.create_task(push.run(asyncio.Event()))

    async def _stop_pushing(self) -> None:
        if self._pushing is not None:
            await cancelled(self._pushing)

    async def _housekeep(self) -> None:
        while True:
            watches = self.settings.agent.watch
            lookback = max((watch.lookback for watch in watches), default=0.0)
            keep = {tailer.job_id for tailer in self.tailers} | {job for watch in watches for job in watch.jobs}
            sends_spans = self._context.spans is not None
            try:
                forgotten = self.store.forget(max(_FORGET_S, 2 * lookback), keep=keep, keep_unsent=sends_spans)
            except CheckpointError as error:
                _log.warning("old jobs are not forgotten: %s", error)
            else:
                if forgotten:
                    _log.info("%d jobs without change for 30 days were forgotten", forgotten)
            await asyncio.sleep(_HOUSEKEEPING_S)

    async def _first_of(self, *work: Coroutine[Any, Any, object], timeout_s: float | None = None) -> int | None:
        """Wait for the first of these, or for a pump to fail: what it had in hand is sent again by the next process.

        Returns:
            Which one it was; None when the time was up.
        """
        tasks = [asyncio.create_task(coroutine) for coroutine in work]
        try:
            await asyncio.wait([*tasks, *self._pumps], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for pump in self._pumps:
                if pump.done():
                    pump.result()
            first = next((number for number, task in enumerate(tasks) if task.done()), None)
            if first is not None:
                tasks.pop(first).result()
            return first
        finally:
            for task in tasks:
                await cancelled(task)

    async def _flush(self) -> None:
        await asyncio.gather(*(queue.flush() for queue in self._context.queues))
        if self._context.spans is not None:
            await self._context.spans.flush()

    async def _within(self, work: Coroutine[Any, Any, object], timeout_s: float) -> bool:
        return await self._first_of(work, self._skip_drain.wait(), timeout_s=timeout_s) == 0

    async def _close(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.store.close)
            stack.push_async_callback(self.endpoints.aclose)
            stack.push_async_callback(self._receiver.aclose)
            await self._receiver.stop_reading()
            await self._stop_pushing()
            for task in self._pumps:
                await cancelled(task)


def _check_enabled(settings: Settings) -> None:
    if settings.otlp.disabled:
        raise ConfigError("OTEL_SDK_DISABLED is set: unset it to let the agent relay", key="OTEL_SDK_DISABLED")


def changes_that_need_restart(old: Settings, new: Settings) -> list[str]:
    """Return the changed keys that take effect only after a restart.

    Args:
        old: As the agent runs now.
        new: As newly loaded.
    """
    waiting = [f"agent.{key}" for key in _RESTART_KEYS if getattr(new.agent, key) != getattr(old.agent, key)]
    if any((new.otlp.for_signal(name) is None) != (old.otlp.for_signal(name) is None) for name in SIGNALS):
        waiting.append("otlp.signals")
    return waiting
