"""Waiting for tasks."""

from __future__ import annotations

import asyncio

import pytest

from tailspan_agent.tasks import Flag, Patience, Signal

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


async def test_a_signal_wakes_the_tasks_for_which_something_holds_now() -> None:
    """In the order in which they came; the others wait again, and one that was cancelled is dropped."""
    signal, room, order = Signal(), [0], list[int]()

    async def take(number: int) -> None:
        await signal.wait_for(lambda: room[0] > 0)
        room[0] -= 1
        order.append(number)

    tasks = [asyncio.create_task(take(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    for freed in (2, 1):
        room[0] += freed
        signal.notify()
        for _ in range(3):
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.wait(tasks), 10)
    assert (order, room, signal._waiters) == ([0, 2, 3], [0], [])


async def test_waits_end_after_their_time_in_their_order() -> None:
    """They share a timer; a wait that its flag has ended is not held until then."""
    patience, ended = Patience(0.02), []

    async def wait(name: str, flag: Flag) -> None:
        await flag.wait(patience)
        ended.append(name)

    never, soon = Flag(), Flag()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(wait("first", never))
        tasks.create_task(wait("set", soon))
        tasks.create_task(wait("second", never))
        await asyncio.sleep(0)
        soon.set()
    assert ended == ["set", "first", "second"]
    # The timer has ended with the last wait; a later one starts it again.
    await asyncio.wait_for(Flag().wait(patience), 10)
