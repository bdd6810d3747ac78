"""How long a wait may last, so that it does not fail because the machine is busy with other work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["Patience"]

_NANOS_PER_S = 1e9
_READ_EACH_S = 1.0  # it takes longer than what most callers poll for


class Patience:
    """A time limit that does not count the time in which the processes concerned waited for a processor.

    Call `is_over` repeatedly: only what it finds at a call counts. It reads the processes' times once a second.

    Args:
        limit_s: The limit, in seconds.
        pids: Returns the ids of the processes concerned.
        clock: Returns monotonic seconds.
        waited: Returns how long a process has waited for a processor so far, in seconds.
    """

    def __init__(
        self,
        limit_s: float,
        pids: Callable[[], Iterable[int]],
        *,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[int], float] | None = None,
    ) -> None:
        self._left_s = limit_s
        self._pids = pids
        self._clock = clock
        self._waited = waited or _waited_s
        self._now_s = clock()
        self._waited_s = self._read()

    def is_over(self) -> bool:
        """Return whether the time is used up."""
        now_s = self._clock()
        if now_s - self._now_s < min(_READ_EACH_S, self._left_s):
            return False
        waited_s = self._read()
        delayed_s = sum(
            max(0.0, waited_s[pid] - before_s) for pid, before_s in self._waited_s.items() if pid in waited_s
        )
        self._left_s -= max(0.0, now_s - self._now_s - delayed_s)
        self._now_s, self._waited_s = now_s, waited_s
        return self._left_s <= 0

    def _read(self) -> dict[int, float]:
        return {pid: self._waited(pid) for pid in self._pids()}


def _waited_s(pid: int) -> float:
    """Return how long the threads of a process have waited for a processor; 0 where the system does not say.

    Source: proc(5), schedstat: the second number, in ns.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(task.read_text().split()[1])
    return total / _NANOS_PER_S
