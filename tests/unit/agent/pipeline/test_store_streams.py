"""`StoreStreams`: lines of any age go to a stream that accepts them, in as few streams as possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import Line, LogPage
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.pipeline.store_streams import (
    MAIN_STREAM,
    LabelValues,
    LogNames,
    StoreStreams,
    may_be_too_old,
    parts_in_time,
)

MINUTE_NS = 60 * 1_000_000_000
HOUR_NS = 60 * MINUTE_NS
NOW_NS = 1_000 * HOUR_NS


def choose(streams: StoreStreams, current: int, oldest_ns: int, newest_ns: int, *, ended: bool = True) -> int:
    is_past = ended and current != MAIN_STREAM
    stream = streams.find("local", "etl", current, oldest_ns, is_past=is_past, now_ns=NOW_NS)
    assert not streams.note("local", "etl", stream, oldest_ns, newest_ns)
    return stream


def empty() -> StoreStreams:
    return StoreStreams(lambda name: {})


def test_lines_of_now_share_the_main_stream() -> None:
    """However many jobs print them."""
    streams = empty()
    assert {choose(streams, MAIN_STREAM, NOW_NS - MINUTE_NS, NOW_NS) for _ in range(9)} == {MAIN_STREAM}


def test_jobs_that_follow_each_other_share_a_stream() -> None:
    """A backfill of a year of daily runs makes one stream."""
    streams = empty()
    starts = [NOW_NS - days * 24 * HOUR_NS for days in range(300, 0, -1)]
    assert {choose(streams, 0, start, start + 2 * HOUR_NS) for start in starts} == {1}


def test_jobs_that_overlap_get_a_stream_each() -> None:
    """And keep it, page by page."""
    streams = empty()
    start = NOW_NS - 10 * HOUR_NS
    current = [choose(streams, 0, start, start + 2 * HOUR_NS) for _ in range(3)]
    assert current == [1, 2, 3]
    for hour in range(2, 6):
        at = start + hour * HOUR_NS
        assert [choose(streams, own, at, at + HOUR_NS) for own in current] == current


def test_a_running_job_returns_to_the_main_stream() -> None:
    """When it has caught up; an ended job stays where it is."""
    streams = empty()
    own = choose(streams, 0, NOW_NS - 3 * HOUR_NS, NOW_NS - HOUR_NS, ended=False)
    assert choose(streams, own, NOW_NS - MINUTE_NS, NOW_NS, ended=False) == MAIN_STREAM
    assert choose(streams, own, NOW_NS - MINUTE_NS, NOW_NS, ended=True) == own


def test_times_before_1970_end_as_any_other() -> None:
    """A job with a broken clock gets a stream, too."""
    assert choose(empty(), 0, -9 * HOUR_NS, -8 * HOUR_NS) == 1


def test_streams_of_an_earlier_process_are_known() -> None:
    """Their newest lines are asked for once, by name."""
    asked = []
    streams = StoreStreams(lambda name: asked.append(name) or {1: NOW_NS - HOUR_NS, 2: NOW_NS - 9 * HOUR_NS})
    assert choose(streams, 0, NOW_NS - 8 * HOUR_NS, NOW_NS - 7 * HOUR_NS) == 2
    assert choose(streams, 0, NOW_NS - 8 * HOUR_NS, NOW_NS - 6 * HOUR_NS) == 3
    assert asked == ["etl"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 600), st.integers(0, 90)), max_size=60))
def test_no_line_is_too_far_behind(pages: list[tuple[int, int, int]]) -> None:
    """Whatever the order of the pages: a store with a window of an hour accepts each of them."""
    streams, current, newest = empty(), dict.fromkeys(range(4), MAIN_STREAM), {}
    for job, start, length in pages:
        oldest_ns = NOW_NS - 700 * MINUTE_NS + start * MINUTE_NS
        newest_ns = oldest_ns + length * MINUTE_NS
        stream = current[job] = choose(streams, current[job], oldest_ns, newest_ns, ended=job % 2 == 0)
        assert oldest_ns >= newest.get(stream, 0) - HOUR_NS
        newest[stream] = max(newest.get(stream, 0), newest_ns)


def test_names_beyond_the_limit_share_one() -> None:
    """Each further job is counted once; the names in use keep theirs; a name is free again after an hour."""
    now_s, folded = [0.0], []
    names = LogNames(2, lambda: folded.append(1), clock_s=lambda: now_s[0])
    assert [names.take(name) for name in ("a", "b", "c")] == [True, True, False]
    assert not names.take("c", is_shared=True)
    assert (names.take("a"), len(folded), len(names)) == (True, 1, 2)
    now_s[0] = 3601.0
    assert names.take("c", is_shared=True)
    assert names.take("c", 1)
    assert not names.take("c", 2)


def test_the_shared_name_has_a_limited_number_of_streams() -> None:
    """Beyond it, the stream that is the least far ahead is used, and the lines are known to be behind."""
    streams, start_ns = empty(), NOW_NS - 10 * HOUR_NS

    def choose_shared(hours: int) -> tuple[int, bool]:
        stream = streams.find("local", OTHER_PIPELINES, 0, start_ns, is_past=True, now_ns=NOW_NS)
        return stream, streams.note("local", OTHER_PIPELINES, stream, start_ns, start_ns + hours * HOUR_NS)

    assert [choose_shared(2 + number % 3) for number in range(500)] == [(number + 1, False) for number in range(500)]
    assert choose_shared(9) == (1, True)
    assert choose_shared(9) == (4, True)


def test_a_label_with_a_value_for_each_run_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each pipeline and key; keys that are no labels, and labels with a few values, may have any value."""
    labels = LabelValues()
    for number in range(100):
        labels.note("etl", {"k8s.pod.name": f"pod-{number}", "git.sha": str(number), "cloud.region": "eu"})
        labels.note("web", {"k8s.pod.name": f"pod-{number % 20}"})
    (record,) = caplog.records
    assert record.message.startswith("attribute k8s.pod.name has more than 20 values in pipeline etl")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_lines_far_behind_others_of_their_page_are_noticed(minutes: list[int]) -> None:
    """In a page in order of time there are none, however long it is; one that jumps back by 31 minutes has some."""
    times_ns = [NOW_NS + minute * MINUTE_NS for minute in minutes]
    behind = any(later < earlier - 30 for number, later in enumerate(minutes) for earlier in minutes[:number])
    assert may_be_too_old(times_ns, max(times_ns) - min(times_ns)) == behind
    assert not may_be_too_old(sorted(times_ns), max(times_ns) - min(times_ns))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.booleans())
def test_parts_of_a_page_are_short_and_whole(minutes: list[int], with_uids: bool) -> None:
    """No part spans more than half an hour; together they are the page, uids included. A short page is not cut."""
    times_ns = [NOW_NS + sum(minutes[: number + 1]) * MINUTE_NS for number in range(len(minutes))]
    lines = [Line(time_ns, f"line {number}") for number, time_ns in enumerate(times_ns)]
    page = LogPage.from_lines(lines, cursor=b"c", identity="i", job_id="j")
    if not with_uids:
        runs = [run._replace(uid_prefix=f"{number}.") for number, run in enumerate(page.runs)]
        page = LogPage(None, runs, b"c", text=page.joined())
    parts = list(parts_in_time(page))
    assert all(max(times) - min(times) <= 31 * MINUTE_NS for times in (part.times_unix_nano() for part in parts))
    for column in (LogPage.times_unix_nano, LogPage.uids, lambda part: part.lines):
        assert [value for part in parts for value in column(part)] == column(page)
    assert (len(parts) == 1) == (parts[0] is page)
