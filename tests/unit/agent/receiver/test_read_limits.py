"""`ReadLimit`: the read that waited longest is next, whatever its queue, and no queue takes all places."""

from __future__ import annotations

import asyncio
import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.receiver.read_limits import ReadLimit


class Field:
    """Reads that record the order in which they got a place, and end when the test says so."""

    def __init__(self, limit: float, limit_per_queue: float) -> None:
        self.readers = ReadLimit(limit, limit_per_queue)
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def _read(self, name: str) -> None:
        # The first letter of the name is the queue.
        async with self.readers.of(name[0]):
            self.begun.append(name)
            await self._ends[name].wait()
            if name.endswith("!"):
                raise ValueError(name)

    async def ask(self, *names: str) -> None:
        """Start reads, one after the other."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._read(name))
            await anyio.wait_all_tasks_blocked()

    async def end(self, *names: str) -> None:
        """End reads."""
        for name in names:
            self._ends[name].set()
            await asyncio.wait([self.tasks[name]])
            await anyio.wait_all_tasks_blocked()

    async def cancel(self, *names: str) -> None:
        """Cancel reads together."""
        for name in names:
            self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name] for name in names])
        await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_the_longest_wait_is_next() -> None:
    """Also if most reads are of one queue: turns do not alternate between queues."""
    field = Field(2, 2)
    await field.ask("a1", "a2", "a3", "b1", "a4", "b2")
    await field.end("a1", "a2", "a3", "b1")
    assert field.begun == ["a1", "a2", "a3", "b1", "a4", "b2"]
    await field.end("a4", "b2")


@pytest.mark.anyio
async def test_a_full_queue_does_not_block_the_others() -> None:
    """However many of its reads wait."""
    field = Field(3, 2)
    await field.ask("a1", "a2", "a3", "a4", "b1", "b2")
    assert field.begun == ["a1", "a2", "b1"]
    await field.end("b1")
    assert field.begun[3:] == ["b2"]
    await field.end("a1", "b2", "a2")
    assert field.begun[4:] == ["a3", "a4"]
    await field.end("a3", "a4")


@pytest.mark.anyio
async def test_a_place_is_given_back_however_a_read_ends() -> None:
    """After an error, or cancelled while it reads or waits."""
    field = Field(1, 1)
    await field.ask("a1!", "a2", "b3", "b4", "a5")
    await field.cancel("a2")
    await field.end("a1!")
    assert isinstance(field.tasks["a1!"].exception(), ValueError)
    assert field.begun == ["a1!", "b3"]
    await field.cancel("b3", "b4")
    assert field.begun == ["a1!", "b3", "a5"]
    await field.end("a5")
    await field.ask("b6")
    assert field.begun[3:] == ["b6"]
    await field.end("b6")


@pytest.mark.anyio
async def test_a_place_is_given_back_by_a_read_cancelled_at_its_turn() -> None:
    """It was admitted and has not run since."""
    readers, over, begun = ReadLimit(1, 1), asyncio.Event(), []

    async def first() -> None:
        async with readers.of("a"):
            await over.wait()
        second.cancel()

    async def read(queue: str) -> None:
        async with readers.of(queue):
            begun.append(queue)

    task = asyncio.create_task(first())
    await anyio.wait_all_tasks_blocked()
    second = asyncio.create_task(read("b"))
    await anyio.wait_all_tasks_blocked()
    over.set()
    await asyncio.wait([task, second])
    assert second.cancelled()
    await asyncio.wait_for(read("c"), 10)
    assert begun == ["c"]


@given(
    st.integers(1, 4) | st.just(math.inf),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["ask", "end", "cancel"]), st.integers(0, 9), st.sampled_from("abc"))),
)
def test_no_place_is_lost_or_given_twice(limit, limit_per_queue, steps) -> None:
    """In any order of starts, ends and cancellations; at the end every read had its turn."""

    async def run() -> None:
        field = Field(limit, limit_per_queue)
        for number, (what, which, queue) in enumerate(steps):
            left = [name for name, task in field.tasks.items() if not task.done()]
            reading = [name for name in field.begun if name in left]
            assert len(reading) <= limit
            for one in "abc":
                mine = [name for name in left if name[0] == one]
                now = [name for name in reading if name[0] == one]
                assert len(now) <= limit_per_queue
                assert len(reading) == limit or len(now) == min(len(mine), limit_per_queue)
                assert now == [name for name in mine if name in now] == mine[: len(now)]
            if what == "ask":
                await field.ask(f"{queue}{number}")
            elif what == "end" and reading:
                await field.end(reading[which % len(reading)])
            elif what == "cancel" and left:
                await field.cancel(left[which % len(left)])
        while reading := [name for name in field.begun if not field.tasks[name].done()]:
            await field.end(reading[0])
        assert all(task.done() for task in field.tasks.values())

    asyncio.run(run())
