"""`MissingRuns`: reports pipelines of `[[agent.expect]]` that did not start in time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from tailspan.config import Settings
from tailspan_agent.analysis.assessment import JobSnapshot, last_starts, missing_pipelines
from tailspan_agent.job.alerts import missing_record
from tailspan_agent.otlp.log_record import encode_log_record
from tailspan_agent.otlp.requests import encode_resource
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.queue import Chunk

__all__ = ["MissingRuns"]

_CHECK_S = 5.0

_log = logging.getLogger(__name__)


class MissingRuns:
    """Checks every few seconds; reports each missing run once, in the agent's log and as a log record.

    Args:
        context: The past runs of pipelines, and the log queues.
        jobs: Returns the followed jobs.
        settings: Returns the present configuration.
        seen_all: Returns whether every watched service was listed completely and answers. Otherwise a run may have
            started unseen, and the last result stays.
        starts_elsewhere: Returns when running jobs that other agents of the fleet follow have started, by name, in ns
            since the epoch; None while another agent reports missing runs.
    """

    def __init__(
        self,
        context: PipelineContext,
        *,
        jobs: Callable[[], Iterable[JobSnapshot]],
        settings: Callable[[], Settings],
        seen_all: Callable[[], bool],
        starts_elsewhere: Callable[[], Awaitable[Mapping[str, int] | None]] | None = None,
    ) -> None:
        self._context = context
        self._jobs = jobs
        self._settings = settings
        self._seen_all = seen_all
        self._starts_elsewhere = starts_elsewhere

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await self.check(time.time_ns())

    async def check(self, now_unix_nano: int) -> None:
        """Check once.

        Args:
            now_unix_nano: The present time, in ns since the epoch.
        """
        expects = self._settings().agent.expect
        pipeline_stats, names = self._context.pipeline_stats, self._context.names
        if not expects:
            pipeline_stats.missing.clear()
        if not expects or not self._seen_all():
            return
        elsewhere = await self._starts_elsewhere() if self._starts_elsewhere is not None else {}
        if elsewhere is None:
            pipeline_stats.missing.clear()
            return
        starts = last_starts(
            pipeline_stats.histories, [(names.label(job.status.job_name), job) for job in self._jobs()]
        )
        for job_name, start_ns in elsewhere.items():
            name = names.label(job_name)
            starts[name] = max(start_ns, starts.get(name, 0))
        before = dict(pipeline_stats.missing)
        pipeline_stats.missing = missing_pipelines(expects, starts, self._context.store.start_unix_nano, now_unix_nano)
        for expect in expects:
            if pipeline_stats.missing[expect.name] and not before.get(expect.name):
                record = missing_record(expect, starts.get(expect.name), now_unix_nano)
                _log.warning("pipeline %s", record.body)
                queue = self._context.queue("", expect.name)
                if queue is not None:
                    own = {"service.name": expect.name, "cicd.pipeline.name": expect.name}
                    resource = encode_resource({**self._context.otlp_resource, **own})
                    await queue.put(
                        Chunk(resource, deque([(encode_log_record(record), 1)]), lambda _: None, lambda: None)
                    )
            elif before.get(expect.name) and not pipeline_stats.missing[expect.name]:
                _log.info("pipeline %s has started", expect.name)
