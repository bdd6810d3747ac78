"""Finding the begin and the end of a log by looking at parts of it."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from tailspan.services.fused.log_times import Probe, find_times

MOST = 5


def find(times, *, end_ms, now_ms):
    """Find the times of a log of these (sorted) times; returns them, and how many lines were seen and read whole."""
    seen = []

    async def look(since_ms):
        found = [ms for ms in times if since_ms is None or ms >= since_ms]
        some = found[: MOST + 1]
        seen.append(len(some))
        return Probe(some[0], some[-1], len(some) == len(found)) if some else Probe(-1, -1, True)

    async def read_newest_ms(since_ms):
        found = [ms for ms in times if ms >= since_ms]
        seen.append(len(found))
        return max(found, default=-1)

    return asyncio.run(find_times(look, read_newest_ms, end_ms=end_ms, now_ms=now_ms)), seen


@given(st.lists(st.integers(0, 10**6), max_size=60), st.integers(0, 2 * 10**6), st.integers(0, 2 * 10**6))
def test_right_whatever_the_clocks_say(times, end_ms, now_ms):
    """First and last are right, though the end and the present are any moments."""
    times.sort()
    found, _ = find(times, end_ms=end_ms, now_ms=now_ms)
    assert found == ((times[0], times[-1]) if times else None)


def test_little_is_read_of_a_long_log():
    """With clocks that are right, a handful of looks finds the end of a log of any length."""
    times = list(range(0, 10**8, 1_000))
    found, seen = find(times, end_ms=10**8, now_ms=10**9)
    assert found == (0, 10**8 - 1_000)
    assert len(seen) < 5
    found, seen = find(times, end_ms=10**9, now_ms=10**9)
    assert found == (0, 10**8 - 1_000)
    assert len(seen) < 30
    assert max(seen) <= MOST + 1


def test_a_full_ms_at_the_end_is_read():
    """Where the last ms alone has more lines than a look, it is read."""
    found, _ = find([1] * 100 + [9] * 100, end_ms=9, now_ms=9)
    assert found == (1, 9)
