"""Jobs of one stream catch up oldest first."""

from __future__ import annotations

import asyncio

from tailspan_agent.pipeline.stream_order import StreamOrder
from tests.fakes.agents import looped

HOUR_NS = 3600 * 1_000_000_000


async def turns(stream_order: StreamOrder, stream: str, *members: str) -> list[str]:
    """Return whose turn it is: those that do not wait."""
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
    """Whoever is half of Loki's window ahead waits; whoever is within it does not."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", 1 * HOUR_NS)
    stream_order.join("etl", "near", 1 * HOUR_NS + HOUR_NS // 2)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "etl", "old", "near", "new") == ["old", "near"]


@looped
async def test_who_leaves_lets_the_next_go_on() -> None:
    """Leaving wakes those that wait; leaving twice, or never having joined, is fine."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    waiting = asyncio.create_task(stream_order.turn("etl", "new"))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream_order.leave("etl", "old")
    await waiting
    stream_order.leave("etl", "old")
    stream_order.leave("web", "nobody")


@looped
async def test_who_moves_on_lets_the_next_go_on() -> None:
    """Joining again with a later time is progress."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("etl", "new", 3 * HOUR_NS)
    waiting = asyncio.create_task(stream_order.turn("etl", "new"))
    await asyncio.sleep(0)
    stream_order.join("etl", "old", 3 * HOUR_NS)
    await waiting


@looped
async def test_who_has_not_said_where_it_is_is_waited_for() -> None:
    """Else the first that answers would go first, however new it is."""
    stream_order = StreamOrder()
    stream_order.join("etl", "unknown")
    stream_order.join("etl", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "etl", "new") == []
    stream_order.join("etl", "unknown", 4 * HOUR_NS)
    assert await turns(stream_order, "etl", "unknown", "new") == ["new"]


@looped
async def test_streams_and_those_who_caught_up_do_not_wait() -> None:
    """Other pipelines are no business of this one; nor is a job that follows live."""
    stream_order = StreamOrder()
    stream_order.join("etl", "old", HOUR_NS)
    stream_order.join("web", "new", 3 * HOUR_NS)
    assert await turns(stream_order, "web", "new") == ["new"]
    assert await turns(stream_order, "etl", "live") == ["live"]
