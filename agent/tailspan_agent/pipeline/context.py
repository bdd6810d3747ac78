"""`PipelineContext`: what the pipelines of all jobs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary
from zlib import crc32

from tailspan_agent.analysis.assessment import PipelineStats
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.store import Store
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.pipeline.queue import LogQueue, SpanQueue
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.records.redact import Redactor

if TYPE_CHECKING:
    from tailspan_agent.pipeline.job_pipeline import JobPipeline

__all__ = ["PipelineContext"]


@dataclass(kw_only=True)
class PipelineContext:
    """What all tailers share.

    Attributes:
        store: The checkpoint store.
        queues: The lanes of log records; empty when logs are not among the signals.
        spans: The lane of spans; None when traces are not among the signals (spans are kept in the store).
        stream_order: Who is behind.
        health: The agent's own health.
        redactor: Takes secrets out of lines; exchanged by a reload.
        otlp_resource: Attributes for all telemetry, from the configuration; exchanged by a reload.
        names: Which pipelines have metrics of their own.
        totals: Run totals by their key, as in the store.
        pipeline_stats: What is known of pipelines from their past, as in the store.
        sending: What has lines on their way, by service identity and job id; also when its tailer is gone.
    """

    store: Store
    queues: list[LogQueue]
    spans: SpanQueue | None
    stream_order: StreamOrder
    health: AgentMetrics
    redactor: Redactor | None
    otlp_resource: Mapping[str, str]
    names: PipelineNames
    totals: dict[tuple[str, str, str], RunTotals] = field(default_factory=dict)
    pipeline_stats: PipelineStats = field(default_factory=PipelineStats)
    sending: WeakValueDictionary[tuple[str, str], JobPipeline] = field(default_factory=WeakValueDictionary)

    def queue(self, identity: str, job_id: str) -> LogQueue | None:
        """Return the lane of a job: always the same one, so that order holds within the job."""
        key = f"{identity}\0{job_id}".encode(errors="surrogatepass")
        return self.queues[crc32(key) % len(self.queues)] if self.queues else None

    async def nothing_in_flight(self, identity: str, job_id: str) -> None:
        """Wait until what an earlier tailer of the job has sent is acked: only then the checkpoint is its end."""
        earlier = self.sending.get((identity, job_id))
        if earlier is not None:
            await earlier.all_acked()
