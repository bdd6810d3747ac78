"""The agent: builds its parts, starts them, reloads what changed, and stops them in order.

discoveries -> tailers -> queues -> endpoints (retrying exporter) -> acks -> store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict

from tailspan import __version__
from tailspan._durations import duration_text
from tailspan._own_token import own_token
from tailspan._plural import plural
from tailspan._secrets import mask
from tailspan.config import Settings
from tailspan.config.signals import SIGNALS, Signal
from tailspan.errors import ConfigError, JobNotFoundError, TailspanError
from tailspan.local.agent_page import announce_page
from tailspan.services import JobService
from tailspan.services.registry import open_service
from tailspan_agent.analysis.assessment import Assessment, JobSnapshot, PipelineStats, assess
from tailspan_agent.analysis.baseline import Histories
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.checkpoint.store import SqliteStore
from tailspan_agent.errors import CheckpointError
from tailspan_agent.exporter.endpoints import SHORT_OUTAGE_S, Endpoints
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.metrics.agent import AgentMetrics, agent_resource
from tailspan_agent.metrics.push import MetricsPush, export_interval_s
from tailspan_agent.metrics.snapshot import FleetTotals, MetricsReader, exports_exponential_histograms
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.missing_runs import MissingRuns
from tailspan_agent.pipeline.queue import LogQueue, SpanQueue
from tailspan_agent.pipeline.store_streams import LogNames, StoreStreams
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.receiver.discovery import JobDiscovery
from tailspan_agent.receiver.receiver import Receiver
from tailspan_agent.receiver.tailer import Tailer
from tailspan_agent.records.redact import Redactor
from tailspan_agent.tasks import cancelled
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.server import StatusServer
from tailspan_agent.web.server_access import ServerAccess

if TYPE_CHECKING:
    from tailspan_agent.checkpoint.protocol import CheckpointStore
    from tailspan_agent.fleet.member import FleetMember
    from tailspan_agent.fleet.overview import FleetOverview
    from tailspan_agent.fleet.store import PostgresStore

__all__ = ["Agent", "OnceResult", "ReloadResult"]

_LOG_QUEUES = 2
_FORGET_S = 30 * 86400.0
_HOUSEKEEPING_S = 3600.0
_LAST_PUSH_S = 5.0
_MAX_ERROR_CHARS = 300

_RESTART_KEYS = (
    "state_dir",
    "listen",
    "max_log_names",
    "max_pipeline_names",
    "run_id_on_metrics",
    "service_name",
)

_log = logging.getLogger(__name__)


class OnceResult(msgspec.Struct, frozen=True):
    """The result of one pass.

    Attributes:
        jobs: Number of jobs read.
        acked: Number of log records that the endpoint acknowledged.
        rejected: Number of records in the dead letter.
        failures: Why services and jobs could not be read.
        delivered: True if everything that was read is acknowledged or in the dead letter.
    """

    jobs: int
    acked: int
    rejected: int
    failures: tuple[TailspanError, ...]
    delivered: bool


class ReloadResult(msgspec.Struct, frozen=True):
    """The result of a reload.

    Attributes:
        changed: The tables and keys that differ from before, such as ``agent.watch``.
        needs_restart: Those of them that take effect after a restart only.
        problems: Why services could not be opened.
    """

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]
    problems: tuple[str, ...]


class Agent:
    """One agent over one state directory. Create it, then call `run` or `run_once` in one event loop.

    Args:
        settings: The loaded configuration.
        opener: Opens the configured service of a name.
        needs_page_token: Whether the page requires a token even if none is configured.

    Attributes:
        pipeline_stats: Past runs of pipelines: ``histories.of(label)`` is a `PipelineHistory` with the last runs, the
            success rate and the usual durations; iterating over ``histories`` yields the labels.

    Raises:
        ConfigError: The configuration cannot work.
        CheckpointError: The state directory cannot be used, or another agent has locked it.
    """

    def __init__(
        self,
        settings: Settings,
        opener: Callable[[str, Settings], JobService] = open_service,
        *,
        needs_page_token: bool = True,
    ) -> None:
        _check_enabled(settings)
        self._needs_page_token = needs_page_token
        self.settings = settings
        self._shared: PipelineContext | None = None
        self._shared_store: PostgresStore | None = None
        self._member: FleetMember | None = None
        self._overview: FleetOverview | None = None
        with contextlib.ExitStack() as undo:
            self.store = SqliteStore(settings.agent.state_dir)
            undo.callback(self.store.close)
            if self.store.recovered:
                _log.warning("the checkpoint store was damaged (%s)", self.store.recovered)
            self._make_parts(settings)
            self._receiver = Receiver(self._context, opener)
            if settings.fleet.is_used:
                self._make_fleet(settings, opener, undo)
            undo.pop_all()
        self._background: list[asyncio.Task[None]] = []
        self._pushing: asyncio.Task[None] | None = None
        self.server: StatusServer | None = None
        self._stopping = asyncio.Event()
        self._skip_drain = asyncio.Event()
        self._follows = asyncio.Event()
        self._changing = asyncio.Lock()

    def _make_fleet(
        self, settings: Settings, opener: Callable[[str, Settings], JobService], undo: contextlib.ExitStack
    ) -> None:
        """Share the jobs of services that are not read from this machine with other agents.

        Raises:
            ConfigError: The driver of PostgreSQL is missing, or its connection string is not valid.
            CheckpointError: The database cannot be used.
        """
        # An agent that is alone needs no driver, and pays nothing for it.
        try:
            from tailspan_agent.fleet.leases import AgentInfo
            from tailspan_agent.fleet.member import FleetMember
            from tailspan_agent.fleet.overview import FleetOverview
            from tailspan_agent.fleet.store import open_store
        except ImportError as error:
            raise ConfigError(f"a fleet needs psycopg: pip install 'tailspan[fleet]' ({error})", key="fleet") from error
        from tailspan_agent.receiver.shard_reader import SharedReader

        dsn, instance_id = settings.fleet.read_dsn(), self.store.instance_id
        store = self._shared_store = open_store(dsn, settings.fleet.name, instance_id)
        undo.callback(store.close)
        # Pipelines have one history, whichever store has counted their runs.
        for run in store.history.past_runs():
            self.pipeline_stats.histories.add(run)
        for pipeline, _, _ in store.totals:
            self._names.label(pipeline)
        shared = self._shared = self._make_context(store, settings)
        self._receiver = Receiver(self._context, opener, shared)
        page = settings.agent.public_url or ""
        self._member = FleetMember(
            dsn,
            store,
            AgentInfo(instance_id, socket.gethostname(), os.getpid(), __version__, page),
            lease_s=settings.fleet.lease,
            reader=SharedReader(self._receiver, shared),
            health=self._fleet_health,
        )
        undo.callback(self._member.close)
        self._overview = FleetOverview(store, lease_s=settings.fleet.lease)
        self.metrics.add_fleet(self._member)
        shared.owns = self._member.owns
        member = self._member
        self.metrics_reader = self._make_metrics_reader(
            settings,
            FleetTotals(
                agent_resource(settings.agent.service_name, store.fleet_id, settings.otlp.resource),
                store.start_unix_nano,
                lambda: list(store.counts.totals.values()) if member.has_metrics else None,
                store.history.too_fast,
            ),
        )

    def _make_parts(self, settings: Settings) -> None:
        self.metrics = AgentMetrics(
            agent_resource(settings.agent.service_name, self.store.instance_id, settings.otlp.resource)
        )
        self.endpoints = Endpoints(settings, self.metrics)
        self.pipeline_stats = PipelineStats(
            histories=Histories(self.store.history.past_runs()), too_fast=self.store.history.too_fast()
        )
        # Expected pipelines come first, so that they keep their own label however many other names there are.
        counted = (totals.pipeline for totals in self.store.totals.values())
        known = [*(expect.name for expect in settings.agent.expect), *counted]
        self._names = PipelineNames(settings.agent.max_pipeline_names, known)
        self._context = self._make_context(self.store, settings)
        self.metrics_reader = self._make_metrics_reader(settings)

    def _make_metrics_reader(self, settings: Settings, fleet: FleetTotals | None = None) -> MetricsReader:
        return MetricsReader(
            self.metrics,
            runs=lambda: list(self.store.totals.values()),
            tasks=lambda: [total for context in self._contexts for total in context.task_totals.values()],
            jobs=self._snapshots,
            names=self._names,
            start_unix_nano=self.store.start_unix_nano,
            pipeline_stats=self.pipeline_stats,
            run_id_on_metrics=settings.agent.run_id_on_metrics,
            exponential=exports_exponential_histograms(),
            fleet=fleet,
        )

    def _make_context(self, store: CheckpointStore, settings: Settings) -> PipelineContext:
        """Return what the pipelines of the jobs of one store share."""
        logs, traces = self.endpoints.get("logs"), self.endpoints.get("traces")
        return PipelineContext(
            store=store,
            queues=[LogQueue(store, logs) for _ in range(_LOG_QUEUES)] if logs else [],
            spans=SpanQueue(store, traces) if traces else None,
            stream_order=StreamOrder(),
            store_streams=StoreStreams(store.newest_by_stream),
            log_names=LogNames(settings.agent.max_log_names, self.metrics.log_name_shared),
            health=self.metrics,
            redactor=Redactor.from_settings(settings.redact),
            otlp_resource=settings.otlp.resource,
            lines_on_spans=settings.otlp.puts_lines_on_spans,
            names=self._names,
            task_names=PipelineNames(settings.agent.max_task_names),
            pipeline_stats=self.pipeline_stats,
        )

    @property
    def _contexts(self) -> list[PipelineContext]:
        """What the pipelines of this agent's own jobs share, and those of the fleet's jobs."""
        return [self._context] if self._shared is None else [self._context, self._shared]

    @property
    def tailers(self) -> list[Tailer]:
        """The running tailers."""
        return list(self._receiver.tailers)

    @property
    def discoveries(self) -> list[JobDiscovery]:
        """The job discoveries, one per watched service."""
        return list(self._receiver.discoveries.values())

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def problems(self) -> list[str]:
        """Return codes of what keeps the agent from relaying; empty when it is ready."""
        paused, long_ago_s = self.endpoints.paused(), time.time() - SHORT_OUTAGE_S
        codes = [f"endpoint_{signal}_paused" for signal in paused]
        codes += [
            f"endpoint_{signal}_retrying {outage}"
            for signal, outage in self.endpoints.outages.items()
            if signal not in paused and outage.since_s <= long_ago_s
        ]
        codes += ["checkpoint_store_unwritable"] if self.store.write_failed else []
        if self._member is not None and self._member.problem is not None:
            codes.append(self._member.problem)
        return codes + [f"service_{name}_unreachable" for name in self._receiver.unreachable]

    async def delivery(self, identity: str, job_id: str) -> dict[str, object]:
        """Return the delivery state of a job's lines, for ``tailspan wait --delivered``.

        In a fleet, of a job of another agent as well.

        Args:
            identity: The identity of the job's service.
            job_id: An unknown job is not complete.
        """
        found = (context.store.job(identity, job_id) for context in self._contexts)
        known = next((checkpoint for checkpoint in found if checkpoint is not None), None)
        if known is None and self._overview is not None:
            with contextlib.suppress(CheckpointError):
                stored = await self._overview.find(identity, job_id)
                known = stored.checkpoint if stored is not None else None
        if known is None:
            return {"known": False, "logs_complete": False}
        ledger = JobLedger.from_json(known.ledger)
        return {"known": True, "logs_complete": known.logs_complete, "lines": ledger.lines, **asdict(ledger.delivery)}

    def followed_jobs(self) -> list[tuple[JobSnapshot, Assessment]]:
        """Return the followed jobs, each with its assessment: progress, time left, anomalies."""
        now_ns, label, histories = time.time_ns(), self._context.names.label, self.pipeline_stats.histories
        jobs = self._receiver.followed
        return [(job, assess(job, histories.of(label(job.status.job_name)), now_ns)) for job in jobs]

    def stop(self) -> None:
        """Ask `run` to stop reading, send what is in flight, and return; a second call skips the drain."""
        if self._stopping.is_set():
            self._skip_drain.set()
        self._stopping.set()

    async def run(
        self, *, on_ready: Callable[[], object] = lambda: None, on_stop: Callable[[], object] = lambda: None
    ) -> None:
        """Relay until `stop` is called, then drain for up to ``agent.drain_timeout``.

        Args:
            on_ready: Called once when jobs are followed.
            on_stop: Called once when the drain starts.
        """
        try:
            self._start_queues()
            self.server = self._make_server()
            async with self.server or contextlib.nullcontext():
                self._log_what_it_uses()
                self._start_pushing()
                await self._follow()
                on_ready()
                await self._completes(self._stopping.wait())
                on_stop()
                await self._drain()
        finally:
            announce_page(str(self.settings.agent.state_dir), None)
            await self._close()

    def _log_what_it_uses(self) -> None:
        path = self.settings.path
        _log.info("the configuration is %s", path or "that of the environment and the defaults; no file is named")
        for target, signals in _by_target(self.endpoints.targets).items():
            _log.info("%s go to %s", " and ".join(signals), target)
        if self.server is not None:
            _log.info("the page is at %s", self.server.link)
            if self.server.page_url:
                announce_page(str(self.settings.agent.state_dir), self.server.page_url)
        else:
            _log.info("there is no page: agent.listen is empty")

    async def run_once(self, timeout_s: float) -> OnceResult:
        """Relay what is readable now: ended jobs completely, running jobs up to their current end.

        Args:
            timeout_s: Time limit in seconds.

        Returns:
            What was relayed, and whether all of it is acknowledged.
        """
        receiver = self._receiver
        scan_failures: list[TailspanError] = []
        if self._member is not None:
            await self._close()
            raise ConfigError("a single pass cannot share jobs with other agents: remove [fleet]", key="fleet")
        try:
            self._start_queues()
            receiver.watch(await receiver.open(self.settings, {}, once=True), self.settings, once=True)
            delivered = await self._completes(
                self._relay_readable(scan_failures), interrupt=self._stopping, timeout_s=timeout_s
            )
            await receiver.stop_reading()
            logs = self.endpoints.get("logs")
            return OnceResult(
                jobs=receiver.started,
                acked=logs.delivered if logs else 0,
                rejected=self.endpoints.rejected,
                failures=(*receiver.broken.values(), *scan_failures, *self._tailer_failures()),
                delivered=delivered,
            )
        finally:
            await self._close()

    async def reload(self, settings: Settings) -> ReloadResult:
        """Apply a changed configuration: stop what is gone, start what is new, leave the rest running.

        Args:
            settings: The newly loaded configuration. ``agent.state_dir``, ``agent.listen``, the limits of metrics and
                the set of relayed signals take effect after a restart only.

        Returns:
            What changed.

        Raises:
            ConfigError: The configuration cannot work; nothing was changed.
        """
        _check_enabled(settings)
        redactor = Redactor.from_settings(settings.redact)
        access = self._access(settings) if self.server is not None else None
        # Not during the start, which would follow jobs twice, nor during the stop, which would not drain new ones.
        await self._follows.wait()
        old = self.settings
        async with self._changing:
            if not self._stopping.is_set():
                await self._apply(settings, redactor)
                if access is not None and self.server is not None:
                    self.server.change_access(access)
        return ReloadResult(
            changed=tuple(_changed_keys(old, settings)),
            needs_restart=tuple(_changes_that_need_restart(old, settings)),
            problems=tuple(map(str, self._receiver.broken.values())),
        )

    async def _apply(self, settings: Settings, redactor: Redactor | None) -> None:
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
        for key in _changes_that_need_restart(self.settings, settings):
            _log.warning("%s changed: restart the agent to apply it", key)
        self.settings = settings
        for context in self._contexts:
            context.redactor, context.otlp_resource = redactor, settings.otlp.resource
        await self._receiver.apply_configuration(kept, sources, settings)
        _log.info("the configuration was reloaded")

    def _snapshots(self) -> list[JobSnapshot]:
        self.endpoints.paused()  # updates the metrics of paused endpoints, which go into the same snapshot
        return self._receiver.followed

    def _make_server(self) -> StatusServer | None:
        address = self.settings.agent.listen_address or self.settings.agent.listen_socket
        if address is None:
            return None
        view = AgentView(
            context=self._context,
            receiver=self._receiver,
            settings=lambda: self.settings,
            endpoints=self.endpoints,
            problems=self.problems,
            shared=self._shared,
            fleet=self._overview,
        )
        return StatusServer(
            address,
            metrics=self.metrics_reader.prometheus_pieces,
            readiness=self.problems,
            delivery=self.delivery,
            view=view,
            access=self._access(self.settings),
        )

    def _access(self, settings: Settings) -> ServerAccess:
        """Return who may use the server.

        Raises:
            ConfigError: A token cannot be read or made.
        """
        agent = settings.agent
        token = agent.read_token()
        own = token is None and self._needs_page_token and agent.listen_socket is None
        return ServerAccess(
            token=token,
            page_token=own_token(agent.page_token_file, instead="agent.token_file") if own else None,
            allowed_hosts=agent.allowed_hosts,
            public_url=agent.public_url,
        )

    async def _follow(self) -> None:
        """Start to discover and follow jobs, and the tasks that need the discoveries."""
        receiver = self._receiver
        receiver.watch(await receiver.open(self.settings, {}), self.settings)
        missing_runs = MissingRuns(
            self._shared or self._context,
            jobs=lambda: receiver.followed,
            settings=lambda: self.settings,
            seen_all=lambda: receiver.has_seen_all,
            starts_elsewhere=self._starts_elsewhere if self._member is not None else None,
        )
        self._background += [asyncio.create_task(self._housekeep()), asyncio.create_task(missing_runs.run())]
        _log.info("the agent follows %s", ", ".join(sorted(receiver.discoveries)) or "no service")
        self._follows.set()

    async def _drain(self) -> None:
        """Stop reading, and send what was read for up to ``agent.drain_timeout``."""
        timeout_s = self.settings.agent.drain_timeout
        _log.info("stopping: sending what was read, for up to %s", duration_text(timeout_s))
        async with self._changing:
            await self._receiver.stop_reading()
        drained = await self._completes(self._flush(), interrupt=self._skip_drain, timeout_s=timeout_s)
        push = self._make_push()
        if push is not None and not self._skip_drain.is_set():
            await self._completes(self._push_last(push), interrupt=self._skip_drain, timeout_s=_LAST_PUSH_S)
        if self._member is not None and not self._skip_drain.is_set():
            await self._member.leave()
        if not drained:
            _log.warning("stopped before everything was acknowledged; the next start resumes at the last checkpoint")

    async def _push_last(self, push: MetricsPush) -> None:
        """Export the metrics once more, with the runs that were counted until now."""
        if self._shared_store is not None:
            await self._shared_store.written()
            with contextlib.suppress(CheckpointError):
                await self._shared_store.counts.refresh()
        await push.export()

    async def _relay_readable(self, failures: list[TailspanError]) -> None:
        """Read every watched job once and send its lines; collect the failures of services."""
        for discovery in self.discoveries:
            try:
                await discovery.scan()
            except TailspanError as error:
                failures.append(error)
            failures.extend(discovery.skipped.values())
        await self._receiver.all_stopped()
        await self._flush()
        push = self._make_push()
        if push is not None:
            await push.export()

    def _tailer_failures(self) -> list[TailspanError]:
        named = {job_id for watch in self.settings.agent.watch for job_id in watch.jobs}
        # A discovered job that was deleted before it was read is not a failure; a configured id without a job is.
        return [
            error
            for job_id, error in self._receiver.failed
            if not isinstance(error, JobNotFoundError) or job_id in named
        ]

    def _start_queues(self) -> None:
        if self._shared_store is not None and self._member is not None:
            self._member.start()
            self._background += [
                asyncio.create_task(self._shared_store.run()),
                asyncio.create_task(self._learn_from_others(self._shared_store)),
            ]
        for context in self._contexts:
            self._background += [asyncio.create_task(queue.run()) for queue in context.queues]
            if context.spans is not None:
                self._background.append(asyncio.create_task(context.spans.run()))
        if self._context.spans is not None and self._context.queues:
            reporting = self._receiver.report_ends_ahead(lambda: self.endpoints.logs_wait)
            self._background.append(asyncio.create_task(reporting))

    def _fleet_health(self) -> dict[str, object]:
        """Return what the other agents of the fleet, and ``tailspan agent fleet``, see of this one."""
        lags = self.metrics.lags_s().values()
        redactor = self._context.redactor
        redact: Callable[[str], str] = (lambda text: redactor.redact(text)[0]) if redactor is not None else str
        errors = [f"{signal}: {outage.reason}" for signal, outage in self.endpoints.outages.items()]
        errors += [f"{service}: {failure}" for service, failure in self._receiver.failures.items()]
        return {
            "jobs": len(self._receiver.tailers),
            "lag_s": round(max(lags), 1) if lags else None,
            "problems": self.problems(),
            "errors": [redact(mask(error))[:_MAX_ERROR_CHARS] for error in errors],
        }

    async def _starts_elsewhere(self) -> Mapping[str, int] | None:
        """Return the starts of running jobs of the whole fleet; None if another agent reports missing runs."""
        if self._member is None or self._shared_store is None or not self._member.has_metrics:
            return None
        try:
            return await self._shared_store.running_starts([expect.name for expect in self.settings.agent.expect])
        except CheckpointError:
            return None

    async def _learn_from_others(self, store: PostgresStore) -> None:
        """Take the runs that other agents have counted into the histories of pipelines, until cancelled."""
        histories = self.pipeline_stats.histories
        while True:
            await asyncio.sleep(self.settings.fleet.lease / 3)
            with contextlib.suppress(CheckpointError):
                await store.counts.refresh()
                for run in store.counts.take_new_runs():
                    if run not in histories.of(run.pipeline).runs:
                        histories.add(run)

    def _make_push(self) -> MetricsPush | None:
        exporter = self.endpoints.metrics_exporter
        if exporter is None:
            return None
        return MetricsPush(
            self.metrics_reader,
            self.metrics,
            exporter,
            interval_s=export_interval_s(),
            on_unsupported=partial(self.endpoints.on_unsupported, "metrics"),
        )

    def _start_pushing(self) -> None:
        push = self._make_push()
        if push is not None:
            self._pushing = asyncio.create_task(push.run(asyncio.Event()))

    async def _stop_pushing(self) -> None:
        if self._pushing is not None:
            await cancelled(self._pushing)

    async def _housekeep(self) -> None:
        while True:
            for context in self._contexts:
                await self._forget_old_jobs(context.store)
            await asyncio.sleep(_HOUSEKEEPING_S)

    async def _forget_old_jobs(self, store: CheckpointStore) -> None:
        watches = self.settings.agent.watch
        lookback = max((watch.lookback for watch in watches), default=0.0)
        keep = {tailer.job_id for tailer in self.tailers} | {job for watch in watches for job in watch.jobs}
        sends_spans = self._context.spans is not None
        older_than_s, forgotten = max(_FORGET_S, 2 * lookback), 0
        try:
            if await store.may_forget(time.time(), older_than_s):
                forgotten = await store.forget(older_than_s, keep=keep, keep_unsent=sends_spans)
        except CheckpointError as error:
            _log.warning("old jobs were not removed from the checkpoint store: %s", error)
        else:
            if forgotten:
                _log.info(
                    "removed %d %s without a change for 30 days from the checkpoint store",
                    forgotten,
                    plural(forgotten, "job"),
                )

    async def _completes(
        self,
        work: Coroutine[Any, Any, object],
        *,
        interrupt: asyncio.Event | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Run work until it ends, an event is set, the time is up, or a background task fails.

        A failed background task ends the agent: what it was sending is sent again by the next process.

        Args:
            work: Cancelled if it does not end first.
            interrupt: The event.
            timeout_s: Seconds; None means no limit.

        Returns:
            True if the work completed.
        """
        working = asyncio.create_task(work)
        waiting = [working] if interrupt is None else [working, asyncio.create_task(interrupt.wait())]
        try:
            await asyncio.wait([*waiting, *self._background], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in self._background:
                if task.done():
                    task.result()
            if not working.done():
                return False
            waiting.remove(working)
            working.result()
            return True
        finally:
            for unfinished in waiting:
                await cancelled(unfinished)

    async def _flush(self) -> None:
        await asyncio.gather(*(queue.flush() for context in self._contexts for queue in context.queues))
        await asyncio.gather(*(context.spans.flush() for context in self._contexts if context.spans is not None))

    async def _close(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.store.close)
            if self._shared is not None:
                stack.callback(self._shared.store.close)
            if self._member is not None:
                stack.push_async_callback(self._member.aclose)
            stack.push_async_callback(self.endpoints.aclose)
            stack.push_async_callback(self._receiver.aclose)
            await self._receiver.stop_reading()
            await self._stop_pushing()
            for task in self._background:
                await cancelled(task)


def _by_target(targets: Mapping[Signal, str]) -> dict[str, list[str]]:
    """Return the signals that go to each endpoint."""
    signals: dict[str, list[str]] = {}
    for signal, target in targets.items():
        signals.setdefault(target, []).append(signal)
    return signals


def _check_enabled(settings: Settings) -> None:
    if settings.otlp.disabled:
        raise ConfigError("OTEL_SDK_DISABLED is set: unset it to let the agent relay", key="OTEL_SDK_DISABLED")


def _changed_keys(old: Settings, new: Settings) -> list[str]:
    """Return the keys that differ, without their values: some are secret."""
    found: list[str] = []
    before, after = old.model_dump(), new.model_dump()
    for table in sorted(before.keys() | after.keys()):
        one, other = before.get(table), after.get(table)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{table}.{key}" for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
        elif one != other:
            found.append(table)
    return found


def _changes_that_need_restart(old: Settings, new: Settings) -> list[str]:
    """Return the changed keys that take effect only after a restart."""
    keys = [f"agent.{key}" for key in _RESTART_KEYS if getattr(new.agent, key) != getattr(old.agent, key)]
    if any((new.otlp.for_signal(name) is None) != (old.otlp.for_signal(name) is None) for name in SIGNALS):
        keys.append("otlp.signals")
    if new.otlp.puts_lines_on_spans != old.otlp.puts_lines_on_spans:
        keys.append("otlp.lines_on_spans")
    return keys
