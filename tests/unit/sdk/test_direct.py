"""Coroutines that wait for nothing: with an event loop, and without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tailspan._direct import checkpoint, iterate_directly, run_directly


async def count(limit: int, closed: list[int]) -> AsyncGenerator[int, None]:
    """Yield numbers, and note the last one at the end."""
    number = 0
    try:
        while number < limit:
            await checkpoint()
            number += 1
            yield number
    finally:
        await checkpoint()
        closed.append(number)


def test_a_checkpoint_lets_others_run() -> None:
    """In an event loop two tasks alternate."""
    order: list[str] = []

    async def work(name: str) -> None:
        for _ in range(2):
            order.append(name)
            await checkpoint()

    async def both() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(both())
    assert order == ["a", "b", "a", "b"]


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_coroutine_runs_to_its_end(in_a_loop: bool) -> None:
    """Its result is returned and its error raised, also in the thread of a running loop."""

    async def divide(by: int) -> float:
        await checkpoint()
        return 1 / by

    def check() -> None:
        assert run_directly(divide(4)) == 0.25
        with pytest.raises(ZeroDivisionError):
            run_directly(divide(0))

    async def main() -> None:
        check()

    if in_a_loop:
        asyncio.run(main())
    else:
        check()


def test_items_come_one_by_one() -> None:
    """The generator runs as far as its items are taken, and ends with its reader."""
    closed: list[int] = []
    assert list(iterate_directly(count(3, closed))) == [1, 2, 3]
    assert closed == [3]
    items = iterate_directly(count(3, closed))
    assert next(items) == 1
    items.close()
    assert closed == [3, 1]
