"""Events of CloudWatch Logs in any order: a position takes each one once, whatever was read before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tailspan.services.aws.logs import EventPosition

_WINDOW_S = 10.0

events = st.lists(
    st.tuples(st.integers(0, 30_000), st.integers(0, 5_000)), min_size=1, max_size=60
)  # time and lateness of each, in ms


@settings(max_examples=60)
@given(events, st.lists(st.integers(0, 45_000), max_size=8))
def test_each_event_is_taken_once(written, reads):
    """Reads at any time, each with a cursor from the one before: no event twice, none of the late window missing."""
    every = [
        {"timestamp": at_ms, "eventId": f"{number:04d}", "ingestionTime": at_ms + late_ms}
        for number, (at_ms, late_ms) in enumerate(written)
    ]
    cursor, taken, places = None, [], set()
    for now_ms in (*sorted(reads), 50_000):
        position = EventPosition.read(cursor, service="s", job_id="j")
        start_ms = position.start_ms(_WINDOW_S) if cursor is not None else 0
        visible = [one for one in every if one["ingestionTime"] <= now_ms and one["timestamp"] >= start_ms]
        for event in sorted(visible, key=lambda one: (one["timestamp"], one["ingestionTime"], one["eventId"])):
            number = position.take(event)
            if number is not None:
                taken.append(event["eventId"])
                # Each line has a time of its own.
                assert (event["timestamp"], number) not in places
                places.add((event["timestamp"], number))
        position.forget(_WINDOW_S)
        cursor = position.pack()
    assert sorted(taken) == [event["eventId"] for event in every]
