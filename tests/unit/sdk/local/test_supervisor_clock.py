"""The clock of a job: wall-clock time that is read once, at its start."""

from __future__ import annotations

import time

from tailspan.local.supervisor import _CLOCK, _Clock

_HOUR_NS = 3_600_000_000_000


def test_an_interrupted_reading_does_not_shift_all_times_of_a_job() -> None:
    """On a busy machine the process may wait within a reading; the quickest one counts."""
    readings = iter([(80_000_000, _HOUR_NS + 70_000_000), (300, _HOUR_NS + 200), (90, _HOUR_NS), (400, 0), (95, 0)])
    clock = _Clock(lambda: next(readings))
    before = time.clock_gettime_ns(_CLOCK)
    now = clock.now()
    assert before <= now - _HOUR_NS <= time.clock_gettime_ns(_CLOCK)


def test_a_line_is_never_earlier_than_its_writing() -> None:
    """The clock may be ahead of the wall clock by the length of a reading, but not behind it."""
    for _ in range(100):
        clock = _Clock()
        before = time.time_ns()
        assert clock.now() >= before
