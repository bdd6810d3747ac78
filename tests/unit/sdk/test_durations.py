"""`tailspan._durations`: one form of durations, which is read back as it was written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan._durations import age_text, duration_text, parse_duration_s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.2, "200 ms"),
        (1.0, "1 s"),
        (12.34, "12.3 s"),
        (245, "4m 05s"),
        (12000, "3h 20m"),
        (187200, "2d 04h"),
    ],
)
def test_two_units_at_most(seconds: float, text: str) -> None:
    """A whole number of seconds has no decimals."""
    assert duration_text(seconds) == text


@given(st.floats(0, 1e9))
def test_what_is_written_is_read(seconds: float) -> None:
    """What is shown can be typed; it is within a unit of the last place shown."""
    read = parse_duration_s(duration_text(seconds).replace(" ", ""))
    unit = 0.001 if seconds < 1 else 0.1 if seconds < 60 else 1 if seconds < 3600 else 60 if seconds < 86400 else 3600
    assert abs(read - seconds) <= unit


@pytest.mark.parametrize(("seconds", "text"), [(0.5, "now"), (12, "12s ago"), (7300, "2h ago"), (-300, "in 5m")])
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    """Also those of the future."""
    assert age_text(seconds) == text
