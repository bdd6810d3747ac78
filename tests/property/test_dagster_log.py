"""Positions and output of Dagster's runs: whatever is read in whatever pieces, each line is read once."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from tailspan.errors import ConfigError
from tailspan.services.dagster.log import Capture, Position, Printed, Records, head_bytes, output_items
from tailspan.services.dagster.wire import Event, Events
from tests.property.effort import fuzz

PIECES = st.lists(
    st.sampled_from([b"a", b"\n", b"\r\n", "\u00e4".encode(), b"\xff", b"\xf0\x9f", b"b" * 20]), max_size=40
)
EVENTS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["one", "two"]), st.sampled_from("xy")), max_size=30)


@fuzz(200)
@given(PIECES, st.lists(st.integers(1, 30), min_size=1))
def test_output_in_any_pieces(parts: list[bytes], sizes: list[int]) -> None:
    """The lines are those of the whole, and where U+FFFD does not hide it, each ends at its own byte."""
    written = b"".join(parts)
    capture = Capture("key", "one", 1, 0, 1)
    texts: list[str | bytes] = []
    for size in [*sizes, *[len(written) + 1] * 2]:
        start = capture.offsets[0]
        found = written[start : start + size]
        piece = Printed(found.decode("utf-8", "replace"), len(found), len(found) >= size)
        consumed = head_bytes(piece)
        assert consumed in (None, found.rfind(b"\n") + 1)
        if consumed is None:
            consumed = found.rfind(b"\n") + 1
        if not piece.full:
            consumed = piece.size
        items, end, number = output_items(capture, 0, piece, consumed, Records("run"), 10.0)
        for item in items:
            texts.append(item.line.message)
            if item.offset is not None:
                assert item.offset == len(written) or written[item.offset - 1 : item.offset] == b"\n"
        capture.offsets, capture.lines = (end, 0), (number, 0)
        if not piece.full:
            break
    whole = written.decode("utf-8", "replace").split("\n")
    assert texts == (whole if whole[-1] else whole[:-1])


@fuzz(200)
@given(EVENTS, st.lists(st.tuples(st.integers(0, 30), st.floats(0, 9), st.booleans()), max_size=8), st.booleans())
def test_events_in_any_pages(rows: list[tuple[int, str, str]], reads: list[tuple[int, float, bool]], old: bool) -> None:
    """Events of one moment, step and text are told apart by their number, also after a restart at any page."""
    events = [Event(timestamp=ms, step_key=step, message=text) for ms, step, text in rows]
    position, ids, now_s = Position(), [], 9_999.0 if old else 100.0
    for most, seconds, restarts in [*reads, (len(events), 0.0, True), (len(events), 0.0, True)]:
        now_s += seconds
        reader, first, more = position.reader(), int(position.after or 0), True
        while more:
            page = events[first : first + max(most, 1)]
            first += len(page)
            more = first < len(events)
            for event, uid, _ in reader.new_events(page):
                ids.append(uid)
                position.add(event)
            position.move(Events(cursor=str(first), has_more=more, events=page), reader, now_s)
            if more and restarts:
                position = Position.read(position.pack(), service="dagster", job_id="run")
                break
    assert len(set(ids)) == len(ids) == len(events)
    whole = [uid for _, uid, _ in Position().reader().new_events(events)]
    assert sorted(ids) == sorted(whole)


@fuzz(200)
@given(st.binary(max_size=60))
def test_a_cursor_of_any_bytes(cursor: bytes) -> None:
    """Bytes that are no cursor are reported as such."""
    with suppress(ConfigError):
        Position.read(cursor, service="dagster", job_id="run").pack()
