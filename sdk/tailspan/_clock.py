"""`Clock`: time and waits, so that a test can replace them."""

from __future__ import annotations

import time

__all__ = ["Clock", "settled_clock"]

_DAY_S = 86400.0
_LONGEST_PAUSE_S = 400 * _DAY_S


def settled_clock(
    last_s: float | None, since_s: float | None, now_s: float, *, usual_s: float
) -> tuple[bool, float | None]:
    """Return whether the clock has gone right for long enough to delete what is old by it.

    A clock that is wrong once (2099, because a battery is empty) must not make everything old. After a step, nothing is
    deleted for a day. A pause looks like a step: a machine that was off for two months deletes a day later, or when it
    is on again after another pause of up to 400 days.

    Args:
        last_s: When this was called last, in seconds since the epoch; None for the first call.
        since_s: What the last call returned.
        now_s: The present, in seconds since the epoch.
        usual_s: A longer time between two calls may be a step of the clock.

    Returns:
        Whether to delete now, and the second value for the next call: since when the clock has gone right after a step;
        None without a recent one.
    """
    pause_s = None if last_s is None else now_s - last_s
    if pause_s is None or not 0 <= pause_s <= _LONGEST_PAUSE_S:
        return False, now_s
    if pause_s > max(usual_s, _DAY_S) and since_s is None:
        return False, now_s
    if since_s is not None and not now_s - since_s >= _DAY_S:
        return False, min(since_s, now_s)
    return True, None


class Clock:
    """Real time. `tailspan.testing.FakeClock` is the other one."""

    def monotonic_s(self) -> float:
        """Return seconds that only ever grow, for durations and deadlines."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        import asyncio  # reading local files needs no event loop

        await asyncio.sleep(seconds)
