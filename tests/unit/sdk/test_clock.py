"""When a clock may be believed for deleting what is old by it."""

from __future__ import annotations

import pytest

from tailspan._clock import settled_clock

HOUR_S, DAY_S, YEAR_S = 3600.0, 86400.0, 365 * 86400.0
NOW_S = 1_795_000_000.0


class Calls:
    """Calls at these times, each with what the one before returned."""

    def __init__(self) -> None:
        self.last_s: float | None = None
        self.since_s: float | None = None

    def at(self, *times_s: float) -> list[bool]:
        answers = []
        for now_s in times_s:
            answer, self.since_s = settled_clock(self.last_s, self.since_s, now_s, usual_s=30 * DAY_S)
            self.last_s = now_s
            answers.append(answer)
        return answers


@pytest.fixture
def settled() -> Calls:
    """A clock that has gone right for a day."""
    calls = Calls()
    assert calls.at(NOW_S - 2 * DAY_S, NOW_S - DAY_S) == [False, True]
    return calls


def test_a_clock_that_goes_right_is_believed(settled: Calls) -> None:
    """Hourly, daily, weekly: nothing is held back."""
    assert all(settled.at(NOW_S, NOW_S + HOUR_S, NOW_S + DAY_S, NOW_S + 8 * DAY_S, NOW_S + 37 * DAY_S))


@pytest.mark.parametrize("wrong_s", [NOW_S + 73 * YEAR_S, NOW_S + 2 * YEAR_S, NOW_S + 60 * DAY_S])
def test_a_clock_that_is_wrong_for_hours_deletes_nothing(settled: Calls, wrong_s: float) -> None:
    """Neither while it is wrong, nor when it is right again, until a day later."""
    assert not any(settled.at(wrong_s, wrong_s + HOUR_S, wrong_s + 5 * HOUR_S))
    assert not any(settled.at(NOW_S + 6 * HOUR_S, NOW_S + 7 * HOUR_S))
    assert settled.at(NOW_S + 31 * HOUR_S) == [True]


def test_a_clock_that_is_wrong_again_deletes_nothing(settled: Calls) -> None:
    """Each start of a machine without a battery may be one in 2099."""
    for day in range(3):
        assert settled.at(NOW_S + 73 * YEAR_S + day, NOW_S + day * HOUR_S) == [False, False]


def test_a_clock_that_is_set_back_deletes_nothing_for_a_day(settled: Calls) -> None:
    """1970 until the time is known, then the present: both are steps."""
    assert settled.at(60.0, NOW_S, NOW_S + HOUR_S, NOW_S + DAY_S) == [False, False, False, True]


def test_a_machine_that_was_off_deletes_later(settled: Calls) -> None:
    """A pause of two months looks like a step; after a day, or a second pause, it is believed."""
    assert settled.at(NOW_S + 60 * DAY_S, NOW_S + 61 * DAY_S) == [False, True]
    assert settled.at(NOW_S + 121 * DAY_S, NOW_S + 181 * DAY_S) == [False, True]
