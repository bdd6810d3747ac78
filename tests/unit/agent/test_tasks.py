"""Waiting for tasks."""

from __future__ import annotations

import asyncio

import pytest

from tailspan_agent.tasks import Flag

pytestmark = pytest.mark.anyio


async def test_setting_a_flag_wakes_all_waiting_tasks() -> None:
    """Also if it is cleared before they run; a later task waits again."""
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


async def test_a_set_flag_does_not_wait() -> None:
    """Whether set from the start or later."""
    await asyncio.wait_for(Flag(is_set=True).wait(), 10)


async def test_a_cancelled_waiting_task_is_removed() -> None:
    """The others continue to wait."""
    flag = Flag()
    first, second = (asyncio.create_task(flag.wait()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    flag.set()
    await asyncio.wait_for(second, 10)
    assert first.cancelled()
