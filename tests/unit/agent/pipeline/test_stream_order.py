"""Jobs of one stream catch up oldest first."""

from __future__ import annotations

import asyncio

from tailspan_agent.pipeline.stream_order import StreamOrder
from tests.fakes.agents import looped

HOUR_NS = 3600 * 1_000_000_000


async def turns(stream_order: StreamOrder, stream: str, *members: str) -> list[str]:
    """Return the members that need not wait."""
    tasks = {member: asyncio.create_task(stream_order.turn(stream, member)) for member in members}
    for _ in range(3):
        await asyncio.sleep(0)
    done = [member for member, task in tasks.items() if task.done()]
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    return done


@looped
async def test_the_oldest_goes_first_and_those_close_to_it() -> None:
    """A member that is more than half of Loki's window ahead waits; others do not."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", 1 * HOUR_NS)
    stream_order.join("etl", "near", 1 * HOUR_NS + HOUR_NS // 2)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "etl", "old", "near", "new") == ["old", "near"]


@looped
async def test_a_member_that_leaves_releases_the_next() -> None:
    """Leaving wakes the members that wait; leaving twice, or without joining, is fine."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    waiting = asyncio.create_task(stream_order.turn("etl", "new"))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream_order.leave("etl", "old")
    await waiting
    stream_order.leave("etl", "old")
    stream_order.leave("web", "stranger")


@looped
async def test_a_member_that_advances_releases_the_next() -> None:
    """Joining again with a later time is progress."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    waiting = asyncio.create_task(stream_order.turn("etl", "new"))
    await asyncio.sleep(0)
    stream_order.join("etl", "old", 3 * HOUR_NS)
    await waiting


@looped
async def test_a_member_at_an_unknown_time_holds_the_others() -> None:
    """Otherwise the first job that answers would go first, however new it is."""
    stream_order = StreamOrder()
    stream_order.join("etl", "unknown")
    stream_order.join("etl", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "etl", "new") == []
    stream_order.join("etl", "unknown", 4 * HOUR_NS)
    assert await turns(stream_order, "etl", "unknown", "new") == ["new"]


@looped
async def test_other_streams_and_caught_up_jobs_do_not_wait() -> None:
    """Members of other streams do not wait; nor does a job that has caught up."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("web", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "web", "new") == ["new"]
    assert await turns(stream_order, "etl", "live") == ["live"]
