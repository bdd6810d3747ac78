"""What the tailers share: the store, the lanes, the service with its limit of concurrent reads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary
from zlib import crc32

from tailspan.services import JobService, MergingService
from tailspan_agent.agent_metrics import AgentMetrics
from tailspan_agent.backlog import Backlog
from tailspan_agent.checkpoint import Store
from tailspan_agent.insight import Insights
from tailspan_agent.lanes import Lane, SpanLane
from tailspan_agent.readers import Readers
from tailspan_agent.redact import Redactor
from tailspan_agent.runs import PipelineNames, RunTotals

if TYPE_CHECKING:
    from tailspan_agent.job_relay import JobRelay

__all__ = ["Relay", "Source"]

# They wait for their service most of the time. Of two lanes one that is stuck leaves the other two.
_READERS, _READERS_A_LANE = 8, 6
# Reading costs only CPU: a second reader is there so that one job's long log does not keep all others waiting.
_READERS_A_LANE_IF_CHEAP = 2
# Reads that go in one request: each holds at most 64 KiB.
_READERS_A_LANE_IF_MERGED = 64
_PAGES_A_TURN = 8
_FIRST_LOOKS = 100
_FIRST_LOOKS_PER_S = 2.0


class Source:
    """A job service as the agent uses it: a few reads at a time, however many jobs there are.

    Args:
        service: The service.
    """

    def __init__(self, service: JobService) -> None:
        self.service = service
        self._merging = service if isinstance(service, MergingService) else None
        self._single = (
            Readers(math.inf, _READERS_A_LANE_IF_CHEAP) if self.is_cheap else Readers(_READERS, _READERS_A_LANE)
        )
        self._merged = Readers(math.inf, _READERS_A_LANE_IF_MERGED)
        self._first_look_at_s = float("-inf")

    @property
    def is_cheap(self) -> bool:
        """Whether looking costs no request: so it is with a service that may be asked each two seconds for each job."""
        return self.service.poll_max_s <= 2.0

    def merges(self, cursor: bytes | None) -> bool:
        """See `tailspan.services.MergingService`; False for other services."""
        return self._merging is not None and self._merging.merges(cursor)

    def gather_s(self, cursor: bytes | None) -> float:
        """Return for how long a read after this cursor waits for those of other jobs, in seconds."""
        return self._merging.gather_s if self._merging is not None and self._merging.merges(cursor) else 0.0

    @property
    def pages_a_turn(self) -> float:
        """How many pages of a log are read before others have their turn; a reply over HTTP is read to its end."""
        return _PAGES_A_TURN if self.is_cheap else math.inf

    def readers(
        self, lane: Lane | None, cursor: bytes | None
    ) -> tuple[AbstractAsyncContextManager[None], dict[str, Any]]:
        """Return what limits the reads of one lane's jobs.

        Args:
            lane: The lane; None where no lines are sent.
            cursor: After which the job is read.

        Returns:
            What to hold while it is read, and further keywords for ``read_logs``.
        """
        if self.merges(cursor):
            return self._merged.of(lane), {"long_reads": self._single.of(lane)}
        return self._single.of(lane), {}

    def first_look_delay_s(self) -> float:
        """Return when to look for the first time at one more job that has nothing new, in seconds from now.

        The first hundred are looked at at once. With thousands, those that speak must not wait for all that do not.
        """
        if self.is_cheap:
            return 0.0
        now_s = time.monotonic()
        begun_s = now_s - _FIRST_LOOKS / _FIRST_LOOKS_PER_S
        self._first_look_at_s = max(self._first_look_at_s, begun_s) + 1 / _FIRST_LOOKS_PER_S
        return max(0.0, self._first_look_at_s - now_s)


@dataclass(kw_only=True)
class Relay:
    """What all tailers share.

    Attributes:
        store: The checkpoint store.
        lanes: The lanes of log records; empty when logs are not among the signals.
        spans: The lane of spans; None when traces are not among the signals (spans are kept in the store).
        backlog: Who is behind.
        health: The agent's own health.
        redactor: Takes secrets out of lines; exchanged by a reload.
        otlp_resource: Attributes for all telemetry, from the configuration; exchanged by a reload.
        names: Which pipelines have metrics of their own.
        totals: Run totals by their key, as in the store.
        insights: What is known of pipelines from their past, as in the store.
        sending: What has lines on their way, by service identity and job id; also when its tailer is gone.
    """

    store: Store
    lanes: list[Lane]
    spans: SpanLane | None
    backlog: Backlog
    health: AgentMetrics
    redactor: Redactor | None
    otlp_resource: Mapping[str, str]
    names: PipelineNames
    totals: dict[tuple[str, str, str], RunTotals] = field(default_factory=dict)
    insights: Insights = field(default_factory=Insights)
    sending: WeakValueDictionary[tuple[str, str], JobRelay] = field(default_factory=WeakValueDictionary)

    def lane(self, identity: str, job_id: str) -> Lane | None:
        """Return the lane of a job: always the same one, so that order holds within the job."""
        key = f"{identity}\0{job_id}".encode(errors="surrogatepass")
        return self.lanes[crc32(key) % len(self.lanes)] if self.lanes else None

    async def nothing_in_flight(self, identity: str, job_id: str) -> None:
        """Wait until what an earlier tailer of the job has sent is acked: only then the checkpoint is its end."""
        earlier = self.sending.get((identity, job_id))
        if earlier is not None:
            await earlier.all_acked()
