"""`PipelineContext`: what the pipelines of all jobs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol
from weakref import WeakValueDictionary
from zlib import crc32

import msgspec

from tailspan_agent.analysis.assessment import PipelineStats
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.metrics.agent import AgentMetrics
from tailspan_agent.pipeline.queue import LogQueue, SpanQueue
from tailspan_agent.pipeline.store_streams import LabelValues, LogNames, StoreStreams
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.records.redact import Redactor
from tailspan_agent.tasks import Patience

__all__ = ["InFlight", "PipelineContext"]

_RUN_SPAN_WAIT_S = 2.0


class InFlight(Protocol):
    """A pipeline that may have unacknowledged lines."""

    async def left_flight(self) -> None:
        """Wait until nothing is queued any more: it is acknowledged and stored, or left to another agent."""


class PipelineContext(msgspec.Struct, kw_only=True):
    """What the pipelines of all jobs share.

    Attributes:
        store: The checkpoint store.
        queues: The log queues; empty if logs are not among the signals.
        spans: The span queue; None if traces are not among the signals (the store then keeps the spans).
        stream_order: The order in which jobs of one stream catch up.
        store_streams: The log stream of its pipeline that a job writes into.
        log_names: The ``service.name`` of logs.
        health: The agent's own metrics.
        redactor: Removes secrets from lines; a reload replaces it.
        otlp_resource: Configured attributes of all telemetry; a reload replaces them.
        lines_on_spans: Whether the span of the execution carries lines; see `SpanLines`.
        names: The pipelines that have metrics of their own.
        task_names: The tasks that have metrics of their own, each after the label of its pipeline.
        task_totals: Totals of the attempts of tasks by pipeline, task and result, since the agent started.
        pipeline_stats: The past runs of pipelines, as in the store.
        label_values: Warns of attributes that make a stream for each run.
        owns: Returns whether this agent follows the job with this service identity and id; None: it follows all.
        run_span_patience: Ends the wait of a run span for the acknowledgements that it counts.
        in_flight: Pipelines with unacknowledged lines, by (service identity, job id); also without their tailer.
    """

    store: CheckpointStore
    queues: list[LogQueue]
    spans: SpanQueue | None
    stream_order: StreamOrder
    store_streams: StoreStreams
    log_names: LogNames
    health: AgentMetrics
    redactor: Redactor | None
    otlp_resource: Mapping[str, str]
    names: PipelineNames
    task_names: PipelineNames
    lines_on_spans: bool = False
    owns: Callable[[str, str], bool] | None = None
    task_totals: dict[tuple[str, str, str], RunTotals] = msgspec.field(default_factory=dict)
    pipeline_stats: PipelineStats = msgspec.field(default_factory=PipelineStats)
    label_values: LabelValues = msgspec.field(default_factory=LabelValues)
    run_span_patience: Patience = msgspec.field(default_factory=lambda: Patience(_RUN_SPAN_WAIT_S))
    in_flight: WeakValueDictionary[tuple[str, str], InFlight] = msgspec.field(default_factory=WeakValueDictionary)

    def queue(self, service_name: str, log_name: str) -> LogQueue | None:
        """Return the log queue of all jobs of a name: Loki makes one stream of them, and rejects what is out of order.

        Args:
            service_name: The service of the jobs.
            log_name: The ``service.name`` of their lines.
        """
        key = f"{service_name}\0{log_name}".encode(errors="surrogatepass")
        return self.queues[crc32(key) % len(self.queues)] if self.queues else None

    async def nothing_in_flight(self, identity: str, job_id: str) -> None:
        """Wait until the lines of an earlier tailer of the job are acknowledged: then its checkpoint is final."""
        earlier = self.in_flight.get((identity, job_id))
        if earlier is not None:
            await earlier.left_flight()
