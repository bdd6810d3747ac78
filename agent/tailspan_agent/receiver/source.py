"""`Source`: a job service as the agent reads it, with limits on concurrent reads."""

from __future__ import annotations

import math
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

from tailspan.services import JobService, MergingService
from tailspan_agent.pipeline.queue import LogQueue
from tailspan_agent.receiver.read_limits import ReadLimit

__all__ = ["Source"]

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
            ReadLimit(math.inf, _READERS_A_LANE_IF_CHEAP) if self.is_cheap else ReadLimit(_READERS, _READERS_A_LANE)
        )
        self._merged = ReadLimit(math.inf, _READERS_A_LANE_IF_MERGED)
        self._first_look_at_s = float("-inf")

    @property
    def is_cheap(self) -> bool:
        """Whether polling costs no request."""
        return self.service.polls_are_free

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
        self, queue: LogQueue | None, cursor: bytes | None
    ) -> tuple[AbstractAsyncContextManager[None], dict[str, Any]]:
        """Return what limits the reads of one lane's jobs.

        Args:
            queue: The lane; None where no lines are sent.
            cursor: After which the job is read.

        Returns:
            What to hold while it is read, and further keywords for ``read_logs``.
        """
        if self.merges(cursor):
            return self._merged.of(queue), {"long_reads": self._single.of(queue)}
        return self._single.of(queue), {}

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
