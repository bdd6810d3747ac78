"""Waiting for other tasks."""

from __future__ import annotations

import asyncio

import pytest

from tailspan_agent.tasks import Flag

pytestmark = pytest.mark.anyio


async def test_all_who_wait_for_a_flag_go_on_when_it_is_set() -> None:
    """Also where it is cleared again before they run; who comes after that waits anew."""
    flag = Flag()
    waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    flag.set()
    flag.clear()
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flag.wait(), 0.01)
    flag.set()
    await asyncio.wait_for(flag.wait(), 10)


async def test_flag_that_is_set_keeps_nobody() -> None:
    """From its start, or by now."""
    await asyncio.wait_for(Flag(is_set=True).wait(), 10)


async def test_who_gives_up_waiting_for_a_flag_is_forgotten() -> None:
    """The others go on."""
    flag = Flag()
    first, second = (asyncio.create_task(flag.wait()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    flag.set()
    await asyncio.wait_for(second, 10)
    assert first.cancelled()
