"""`tailspan_agent.receiver.read_limits`: the longest wait is next, whatever its lane, and no lane takes all places."""

from __future__ import annotations

import asyncio
import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.receiver.read_limits import ReadLimit


class Field:
    """Reads that begin in the order in which they have a place, and end when told to."""

    def __init__(self, most: float, most_a_lane: float) -> None:
        self.readers = ReadLimit(most, most_a_lane)
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def _read(self, name: str) -> None:
        # The lane is the first letter of its name.
        async with self.readers.of(name[0]):
            self.begun.append(name)
            await self._ends[name].wait()
            if name.endswith("!"):
                raise ValueError(name)

    async def ask(self, *names: str) -> None:
        """Begin reads, one after the other."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._read(name))
            await anyio.wait_all_tasks_blocked()

    async def end(self, *names: str) -> None:
        """Let reads end."""
        for name in names:
            self._ends[name].set()
            await asyncio.wait([self.tasks[name]])
            await anyio.wait_all_tasks_blocked()

    async def cancel(self, *names: str) -> None:
        """Cancel reads, before any of them can act on it."""
        for name in names:
            self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name] for name in names])
        await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_who_waits_longest_is_next() -> None:
    """Also where most of them are of one lane: turns do not go by lane."""
    field = Field(2, 2)
    await field.ask("a1", "a2", "a3", "b1", "a4", "b2")
    await field.end("a1", "a2", "a3", "b1")
    assert field.begun == ["a1", "a2", "a3", "b1", "a4", "b2"]
    await field.end("a4", "b2")


@pytest.mark.anyio
async def test_a_lane_that_is_full_keeps_no_others_waiting() -> None:
    """However many of it wait."""
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
    """By an error, or cancelled while it reads or waits."""
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
async def test_a_place_is_given_back_by_who_is_cancelled_in_the_moment_of_its_turn() -> None:
    """It was given the place and has not run since."""
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
def test_no_place_is_lost_or_given_twice(most, most_a_lane, steps) -> None:
    """Whatever happens in whatever order, and at the end all have had their turn."""

    async def run() -> None:
        field = Field(most, most_a_lane)
        for number, (what, which, queue) in enumerate(steps):
            left = [name for name, task in field.tasks.items() if not task.done()]
            reading = [name for name in field.begun if name in left]
            assert len(reading) <= most
            for one in "abc":
                mine = [name for name in left if name[0] == one]
                now = [name for name in reading if name[0] == one]
                assert len(now) <= most_a_lane
                assert len(reading) == most or len(now) == min(len(mine), most_a_lane)
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
