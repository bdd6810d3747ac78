"""`Patience`: a time limit, counted in seconds in which a processor was free."""

from __future__ import annotations

import os

from tests.patience import Patience


class _Machine:
    """Gives the time, and for each process how long it waited for a processor."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waited_s = {1: 5.0, 2: 7.0}

    def patience(self, limit_s: float) -> Patience:
        return Patience(
            limit_s, lambda: list(self.waited_s), clock=lambda: self.now_s, waited=lambda pid: self.waited_s[pid]
        )


def test_patience_ends_at_its_limit_on_a_free_machine() -> None:
    """Without a wait for a processor, the limit is one of wall time."""
    machine = _Machine()
    patience = machine.patience(10.0)
    machine.now_s += 9.0
    assert not patience.is_over()
    machine.now_s += 1.0
    assert patience.is_over()


def test_time_without_a_processor_does_not_count() -> None:
    """A process that waits for a processor, or several at the same time, stop the clock; they never set it back."""
    machine = _Machine()
    patience = machine.patience(10.0)
    for _ in range(50):
        machine.now_s += 1.0
        machine.waited_s[1] += 0.9
        machine.waited_s[2] += 0.8
        assert not patience.is_over()
    machine.now_s += 10.0
    assert patience.is_over()


def test_a_process_may_come_and_go() -> None:
    """What a new process waited before does not count, nor does one that has ended."""
    machine = _Machine()
    patience = machine.patience(10.0)
    machine.now_s += 4.0
    machine.waited_s = {3: 1000.0}
    assert not patience.is_over()
    machine.now_s += 6.0
    assert patience.is_over()


def test_the_real_clock_reads_the_own_process() -> None:
    """Without a time left it is over at once, by the real files of the system."""
    assert Patience(0.0, lambda: [os.getpid()]).is_over()
    assert not Patience(1000.0, lambda: [os.getpid()]).is_over()
