"""How hard to try: a moment in ``make test``, long with ``HYPOTHESIS_PROFILE=long``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

_FACTOR = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1


def fuzz(examples: int = 100) -> settings:
    """Return the settings of a fuzz test that tries so many examples, or ten times as many."""
    # No deadline of hypothesis': a loaded machine would fail it. What must not hang is held by sizes instead.
    return settings(max_examples=examples * _FACTOR, deadline=None, suppress_health_check=list(HealthCheck))


def assert_linear(work: Callable[[Any], object], make: Callable[[int], Any], size: int) -> None:
    """Fail if input four times as large takes far more than four times as long.

    Args:
        work: What is tried.
        make: Returns input of a size.
        size: The smaller size; large enough that it takes at least a millisecond or so.
    """

    def took_s(argument: Any) -> float:
        start = time.process_time()
        work(argument)
        return time.process_time() - start

    small, large = make(size), make(4 * size)
    # Quadratic work takes sixteen times as long; the half second and the second try are for the noise.
    assert any(took_s(large) < 8 * took_s(small) + 0.5 for _ in range(2))
