"""`Clock`: time and waits, so that a test can replace them."""

from __future__ import annotations

import time

__all__ = ["Clock"]


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
        import anyio  # reading local files needs no event loop

        await anyio.sleep(seconds)
