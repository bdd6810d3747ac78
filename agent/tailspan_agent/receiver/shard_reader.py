"""`SharedReader`: reads the jobs of the shards that this agent of a fleet owns; see `ShardReader`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from tailspan.services._requests import Pace
from tailspan_agent.fleet.shards import SHARDS, shard_of
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.receiver import Receiver

__all__ = ["SharedReader"]


class SharedReader:
    """The tailers, queues and spans of shared jobs.

    Args:
        receiver: Follows the jobs.
        context: Shared by the tailers of shared jobs.
    """

    def __init__(self, receiver: Receiver, context: PipelineContext) -> None:
        self._receiver = receiver
        self._context = context

    def on_gained(self) -> None:
        """Find the jobs of new shards, and send the spans that their last owner left."""
        self._receiver.on_gained()
        if self._context.spans is not None:
            self._context.spans.wake()

    def use_share(self, share: float) -> None:
        """Send to services only this part of their ``requests_per_second``, which is the fleet's."""
        Pace.share = max(share, 1 / SHARDS)

    async def stop_reading(self, is_kept: Callable[[str, str], bool]) -> None:
        """Stop the tailers of all jobs that are not kept.

        Args:
            is_kept: Returns whether the job with this service identity and id is still read.
        """
        await self._receiver.keep_only(is_kept)

    async def flush(self, shards: Collection[int]) -> None:
        """Wait until what is on its way of the jobs of some shards, and their spans, is acknowledged."""
        sending = [job for key, job in self._context.in_flight.items() if shard_of(*key) in shards]
        await asyncio.gather(*(job.left_flight() for job in sending))
        if self._context.spans is not None:
            await self._context.spans.nothing_in_flight()

    async def abandon(self, *, cut: bool) -> None:
        """Drop what is queued of jobs that are not read any more.

        Args:
            cut: Whether to cut the requests on their way, too.
        """
        for queue in self._context.queues:
            await queue.abandon(cut=cut)
        if cut and self._context.spans is not None:
            self._context.spans.abandon()
