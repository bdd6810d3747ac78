"""How hard property tests try: ``HYPOTHESIS_PROFILE`` is ``local`` (the default), ``ci`` or ``long``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

_FACTOR = {"local": 0.25, "ci": 1, "long": 10}[os.environ.get("HYPOTHESIS_PROFILE", "local")]


def fuzz(examples: int = 100) -> settings:
    """Return settings with a number of examples: a quarter of it in the profile `local`, ten times it in `long`."""
    # No deadline of hypothesis: a loaded machine would exceed it. The tests limit sizes to find what is slow.
    suppressed = list(HealthCheck)
    return settings(max_examples=round(examples * _FACTOR), deadline=None, suppress_health_check=suppressed)


def assert_linear(work: Callable[[Any], object], make: Callable[[int], Any], size: int) -> None:
    """Fail if input four times as large takes far more than four times as long.

    Args:
        work: The call to measure.
        make: Returns input of a size.
        size: The smaller size; large enough that it takes at least a millisecond or so.
    """

    def took_s(argument: Any) -> float:
        start = time.process_time()
        work(argument)
        return time.process_time() - start

    small, large = make(size), make(4 * size)
    # Quadratic work takes sixteen times as long; half a second and a second try allow for noise.
    assert any(took_s(large) < 8 * took_s(small) + 0.5 for _ in range(2))
