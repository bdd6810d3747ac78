"""Delays between attempts, and what Retry-After means."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan._backoff import MAX_RETRY_AFTER_S, backoff_s, parse_retry_after_s

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def test_doubles_up_to_the_maximum():
    """Without jitter's help the delays are half of 0.5, 1, 2, 4 ... and stop at half of the maximum."""
    assert [backoff_s(attempt, 0.0, first_s=0.5, max_s=3.0) for attempt in range(5)] == [0.25, 0.5, 1.0, 1.5, 1.5]


@given(st.integers(0, 10**9), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 1e6))
def test_stays_between_its_bounds(attempt, jitter, retry_after_s):
    """The delay is at most the maximum, and never less than the server demands, up to an hour."""
    delay = backoff_s(attempt, jitter, first_s=0.5, max_s=30.0, retry_after_s=retry_after_s)
    asked = min(retry_after_s or 0.0, MAX_RETRY_AFTER_S)
    assert asked <= delay <= max(30.0, asked * 1.1)


def test_jitter_spreads_callers():
    """Two callers with other random numbers wait differently, also with the same Retry-After."""
    assert backoff_s(3, 0.1) != backoff_s(3, 0.9)
    assert backoff_s(0, 0.1, retry_after_s=60) != backoff_s(0, 0.9, retry_after_s=60)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("Thu, 01 Jan 2026 12:01:30 GMT", 90.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 13:01:30 +0100", 90.0),
        ("Thursday, 01-Jan-26 12:00:10 GMT", 10.0),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("nan", None),
        ("1e9", None),
        ("9" * 400, None),
        ("Thu, 99 Foo 2026 99:99:99 GMT", None),
    ],
)
def test_parses_retry_after(value, seconds):
    """Seconds and HTTP dates are understood, a date in the past is now, and anything else is as if it was not there."""
    assert parse_retry_after_s(value, NOW) == seconds


@given(st.text(max_size=40))
def test_no_header_breaks_the_parser(value):
    """Whatever a server sends, the result is None or a valid delay."""
    seconds = parse_retry_after_s(value, NOW)
    assert seconds is None or 0 <= seconds <= timedelta(days=4_000_000).total_seconds()
