"""`tailspan.services.fused.window`: every line once, with the same uid, wherever reads are cut."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.errors import ConfigError
from tailspan.logs.page import line_digest
from tailspan.services.fused.window import (
    MAX_WINDOW_LINES,
    LateWindow,
    distinct_digests,
    distinct_digests_in_python,
)

IDENTITY, JOB = "https://example.test/server/v1", "job-1"
LATE_S = 0.05

TEXTS = st.sampled_from([b"heartbeat", b"heartbeat ", b"", "ü \0 \n".encode(), b"checked 10 rows, 0 ERRORS"])


def take(window, times_ms, texts):
    """Give a window lines as `tailspan.services.fused.stream.pages` does."""
    runs = [(ms, len(list(equal))) for ms, equal in groupby(times_ms)]
    instants, counts = [ms for ms, _ in runs], [count for _, count in runs]
    return (window.take_in_order(list(texts), instants, counts) if runs else None) or window.take(times_ms, texts)


def digests_of(new):
    """Return the digest of each new line."""
    return [new.digests[at : at + 8] for at in range(0, len(new.digests), 8)]


def times_of(new):
    """Return the time of each new line."""
    ends = [*new.starts[1:], len(new.places)]
    runs = zip(new.starts, ends, new.firsts_unix_nano, strict=True)
    return [first + number for start, end, first in runs for number in range(end - start)]


class Server:
    """Lines with the number of the first read that sees them, sorted by time as services do."""

    def __init__(self, lines, *, inclusive):
        self.lines = lines
        self.inclusive = inclusive

    def reply(self, read, since_ms):
        """Return the lines that this read gets."""
        first = -1 if since_ms is None else since_ms if self.inclusive else since_ms + 1
        return sorted(
            ((ms, text) for ms, text, visible in self.lines if visible <= read and ms >= first),
            key=lambda line: line[0],
        )


def follow(server, reads, *, cuts=(), slice_lines=3, late_window_s=LATE_S, max_lines=MAX_WINDOW_LINES, since_ms=None):
    """Read to the present end ``reads`` times; a read in ``cuts`` ends after that many slices. Return the lines."""
    cursor = None
    cuts = dict(cuts)
    out = []
    for read in range(1, reads + 1):
        window = LateWindow(
            IDENTITY,
            JOB,
            cursor,
            since_ms=since_ms if cursor is None else None,
            late_window_s=late_window_s,
            max_lines=max_lines,
        )
        reply = server.reply(read, window.since_ms)
        for number, start in enumerate(range(0, len(reply), slice_lines)):
            if number >= cuts.get(read, 10**9):
                break
            part = reply[start : start + slice_lines]
            new = take(window, [ms for ms, _ in part], [text for _, text in part])
            if new.places:
                chosen = [part[place] for place in new.places]
                out += zip(chosen, times_of(new), digests_of(new), strict=True)
                cursor = window.cursor()
    return out


def with_visibility(steps):
    """Turn (advance of the newest line, age of this line, text, new read?) into lines that are not too late."""
    lines, newest, read = [], 1_000, 1
    for advance_ms, back_ms, text, next_read in steps:
        read += next_read
        newest += advance_ms
        lines.append((newest - back_ms, text, read))
    return lines, read


STEPS = st.lists(st.tuples(st.integers(0, 80) | st.just(0), st.integers(0, 50), TEXTS, st.booleans()), max_size=60)
CUTS = st.dictionaries(st.integers(1, 40), st.integers(0, 5), max_size=6)


@given(STEPS, CUTS, st.integers(1, 7), st.booleans())
@example([(0, 0, b"a", False), (0, 0, b"a", True), (0, 0, b"b", True), (0, 0, b"a", False)], {}, 3, False)
def test_late_lines_within_the_window_come_once(steps, cuts, slice_lines, inclusive):
    """However late within the window a line becomes visible, and wherever reads end, it comes once with its uid."""
    # A line may be as old as the window when it appears, and a read that was cut lags behind: read once more.
    lines, last_read = with_visibility(steps)
    server = Server(lines, inclusive=inclusive)
    reads = last_read + 1
    got = follow(server, reads, cuts={r: c for r, c in cuts.items() if r <= last_read}, slice_lines=slice_lines)
    full = follow(server_at_end(lines, inclusive), 1)
    assert Counter(line for line, _, _ in got) == Counter((ms, text) for ms, text, _ in lines)
    assert sorted(uid for _, _, uid in got) == sorted(uid for _, _, uid in full)
    assert len({uid for _, _, uid in got}) == len(got)


def server_at_end(lines, inclusive):
    """Return the server with every line visible."""
    return Server([(ms, text, 1) for ms, text, _ in lines], inclusive=inclusive)


@given(STEPS, CUTS, st.integers(1, 7), st.booleans(), st.integers(1, 8))
def test_lines_in_order_are_the_same_wherever_reads_are_cut(steps, cuts, slice_lines, inclusive, max_lines):
    """Without late lines, order, times and uids equal those of one full read, also when the window is full."""
    lines, last_read = with_visibility([(advance, 0, text, read) for advance, _, text, read in steps])
    server = Server(lines, inclusive=inclusive)
    cuts = {r: c for r, c in cuts.items() if r <= last_read}
    got = follow(server, last_read + 1, cuts=cuts, slice_lines=slice_lines, max_lines=max_lines)
    assert got == follow(server_at_end(lines, inclusive), 1, max_lines=max_lines)
    assert [line for line, _, _ in got] == [(ms, text) for ms, text, _ in lines]
    assert len({uid for _, _, uid in got}) == len(got)


@given(st.lists(st.tuples(st.integers(0, 5_000), TEXTS), max_size=40), st.integers(1, 7))
def test_a_reply_out_of_order_comes_whole(lines, slice_lines):
    """A first reply in any order is returned whole and in its order."""

    class Unsorted(Server):
        def reply(self, read, since_ms):
            return [(ms, text) for ms, text, _ in self.lines]

    server = Unsorted([(ms, text, 1) for ms, text in lines], inclusive=True)
    assert [line for line, _, _ in follow(server, 1, slice_lines=slice_lines)] == lines


@given(st.lists(st.tuples(st.integers(0, 40), TEXTS), min_size=1, max_size=40), st.permutations(range(40)))
def test_a_reread_out_of_order_drops_what_was_seen(lines, order):
    """Lines of earlier reads stay known until the end of the reply, although newer lines move the window meanwhile."""
    first = LateWindow(IDENTITY, JOB, late_window_s=10)
    take(first, [ms for ms, _ in lines], [text for _, text in lines])
    again = LateWindow(IDENTITY, JOB, first.cursor(), late_window_s=10)
    reply = [(10**6, b"new"), *(lines[place] for place in order if place < len(lines))]
    new = [take(again, [ms], [text]).places for ms, text in reply]
    assert [len(places) for places in new] == [1] + [0] * len(lines)


def test_uid_and_time_are_the_contract():
    """Uids are `line_digest` of the millisecond and the occurrence; times count up within the millisecond."""
    new = take(LateWindow(IDENTITY, JOB, late_window_s=10), [7, 7, 7, 8], [b"a", b"b", b"a", b"a"])
    assert times_of(new) == [7_000_000, 7_000_001, 7_000_002, 8_000_000]
    expected = [(7_000_000, b"a", 0), (7_000_000, b"b", 0), (7_000_000, b"a", 1), (8_000_000, b"a", 0)]
    assert digests_of(new) == [line_digest(IDENTITY, JOB, nano, text, nth) for nano, text, nth in expected]


def test_since_drops_older_lines():
    """A read since a time asks for one ms more, and drops older lines that the service sends."""
    window = LateWindow(IDENTITY, JOB, since_ms=5, late_window_s=10)
    assert window.since_ms == 4
    assert list(take(window, [4, 5, 6], [b"a", b"b", b"c"]).places) == [1, 2]


def test_the_window_is_bounded():
    """A busy job's cursor holds at most the limit of lines and the newest millisecond."""
    window = LateWindow(IDENTITY, JOB, late_window_s=10, max_lines=100)
    for start in range(0, 5_000, 50):
        take(window, range(start, start + 50), [b"x"] * 50)
        assert len(window.cursor()) < 100 * 12 + 100
    assert window.since_ms is None
    assert LateWindow(IDENTITY, JOB, window.cursor(), late_window_s=10, max_lines=100).since_ms == 4_899


def test_a_very_full_millisecond_is_bounded():
    """A million lines that share one timestamp make a small cursor, and the next read finds only what is new."""
    window = LateWindow(IDENTITY, JOB, late_window_s=10, max_lines=100)
    take(window, [1] * 1_000, [b"x"] * 1_000)
    cursor = window.cursor()
    assert len(cursor) < 100
    again = LateWindow(IDENTITY, JOB, cursor, late_window_s=10, max_lines=100)
    new = take(again, [1] * 1_002, [b"x"] * 1_002)
    assert list(new.places) == [1_000, 1_001]
    assert times_of(new) == [1_001_000, 1_001_001]


def test_more_lines_than_ns_stay_in_their_millisecond():
    """The ordinal is capped below 1 ms."""
    window = LateWindow(IDENTITY, JOB, late_window_s=10, max_lines=3)
    window._kept.totals[1] = 999_999
    assert times_of(take(window, [1, 1, 1], [b"x"] * 3)) == [1_999_999] * 3


@pytest.mark.parametrize("cursor", [b"", b"\x00", b"123:4", b"\x93\x01\x02\x03"])
def test_a_foreign_cursor_is_refused(cursor):
    """A cursor of another service is an error that says so, instead of skipping lines."""
    with pytest.raises(ConfigError, match="cursor"):
        LateWindow(IDENTITY, JOB, cursor, late_window_s=10)


def test_a_damaged_cursor_is_refused():
    """A cursor that lost its end is not read as a shorter window."""
    window = LateWindow(IDENTITY, JOB, late_window_s=10)
    take(window, [1, 2], [b"a", b"b"])
    for end in range(len(window.cursor())):
        with pytest.raises(ConfigError):
            LateWindow(IDENTITY, JOB, window.cursor()[:end], late_window_s=10)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), TEXTS), max_size=12), max_size=8), st.booleans(), st.integers(1, 20)
)
def test_lines_taken_together_equal_lines_taken_one_by_one(slices, in_order, max_lines):
    """The fast path gives the same places, times, uids and cursors as the slow one, for any lines."""
    quick, slow = (LateWindow(IDENTITY, JOB, late_window_s=0.01, max_lines=max_lines) for _ in range(2))
    for lines in sorted(slices) if in_order else slices:
        part = sorted(lines, key=lambda line: line[0]) if in_order else lines
        times, texts = [ms for ms, _ in part], [text for _, text in part]
        found, expected = take(quick, times, texts), slow.take(times, texts)
        assert (list(found.places), *found[1:]) == (list(expected.places), *expected[1:])
        assert quick.cursor() == slow.cursor()


MANY = st.lists(st.tuples(st.sampled_from([0, 1, 10**12, 2**63 // 10**6]), st.binary(max_size=300)), max_size=12)


@given(st.binary(max_size=300), MANY, st.lists(st.integers(0, 11), max_size=3), st.booleans())
@example(b"k" * 128, [(1, b"x" * size) for size in (0, 105, 106, 107, 233, 234, 235)], [], True)
def test_digests_are_the_same_in_c_and_in_python(key, lines, known, are_text):
    """Of keys and lines of any length; None where a line was there before."""
    texts = [text.replace(b"\n", b"") if are_text else text for _, text in lines]
    instants, counts = [ms for ms, _ in lines], [1] * len(lines)
    given_lines = b"".join(text + b"\n" for text in texts) if are_text else texts
    others = b"".join(
        distinct_digests_in_python(key, texts[at : at + 1], instants[at : at + 1], [1], b"")
        for at in known
        if at < len(lines)
    )
    found = distinct_digests(key, given_lines, instants, counts, others)
    assert found == distinct_digests_in_python(key, given_lines, instants, counts, others)
    equal = len(set(zip(instants, texts, strict=True))) < len(lines)
    assert (found is None) == (equal or bool(others))


@pytest.mark.parametrize(
    ("lines", "instants", "counts"),
    [
        ([b"a"], [1], [2]),
        ([b"a", b"b"], [1], [1]),
        (b"a\nb", [1, 2], [1, 1]),
        (b"", [1], [1]),
        ([b"a"], [1], []),
        ([1], [1], [1]),
        ([b"a"], [-1], [1]),
        ([b"a"], ["1"], [1]),
        ([b"a"], [1], [None]),
    ],
)
def test_columns_that_do_not_fit_together_are_an_error_in_c(lines, instants, counts):
    """And no crash: C trusts no length."""
    if distinct_digests is not distinct_digests_in_python:
        with pytest.raises((ValueError, TypeError, IndexError, OverflowError)):
            distinct_digests(b"key", lines, instants, counts, b"")


def test_the_bytes_of_a_cursor_are_fixed():
    """Checkpoints of earlier versions hold them: another form would stop every followed job."""
    window = LateWindow("i", "j", late_window_s=10)
    take(window, [1000, 1000, 1003], [b"a", b"b", b"c"])
    cursor = b"\x95\xb1tailspan.window/1\x00\x92\xcd\x03\xe8\x03\x92\x02\x01\xc4\x18" + b"".join(
        line_digest("i", "j", ms * 1_000_000, text, 0) for ms, text in [(1000, b"a"), (1000, b"b"), (1003, b"c")]
    )
    assert window.cursor() == cursor
    again = LateWindow("i", "j", cursor, late_window_s=10)
    assert list(take(again, [1000, 1000, 1003, 1003], [b"a", b"b", b"c", b"c"]).places) == [3]


SLICES = st.lists(st.lists(st.tuples(st.integers(0, 40), TEXTS), max_size=8), max_size=4)
LOST = [[(0, b"a"), (2, b"a"), (2, b"a"), (2, b"b"), (38, b"c")], [(2, b"d")]]


@given(st.lists(SLICES, max_size=4), st.integers(1, 5), st.sampled_from([0, 0.01, 10]))
@example([[[(0, b"b"), (2, b"x")]], LOST], 2, 0)
@example([[[(0, b"x")]], [[(0, b"x")]]], 1, 0)  # as many lines as fit, read again
def test_a_window_can_always_read_its_own_cursor(reads, max_lines, late_window_s):
    """Whatever order the lines come in, and although the server may lose lines that it has sent."""
    cursor = None
    for slices in reads:
        window = LateWindow(IDENTITY, JOB, cursor, late_window_s=late_window_s, max_lines=max_lines)
        for lines in slices:
            take(window, [ms for ms, _ in lines], [text for _, text in lines])
            cursor = window.cursor()
            LateWindow(IDENTITY, JOB, cursor, late_window_s=late_window_s, max_lines=max_lines)


def test_a_line_of_the_far_future_hides_none_that_follows():
    """The next read still asks for the lines of today, and returns the one of 2200 only once."""
    today_ms, later_ms = 1_800_000_000_000, 7_258_118_400_000
    limits = {"late_window_s": 10, "latest_ms": today_ms + 86_400_000}
    first = LateWindow(IDENTITY, JOB, **limits)
    assert len(take(first, [today_ms, later_ms], [b"a", b"b"]).places) == 2
    second = LateWindow(IDENTITY, JOB, first.cursor(), **limits)
    assert second.since_ms == today_ms - 10_001
    assert take(second, [today_ms, today_ms + 5, later_ms], [b"a", b"c", b"b"]).places == [1]
    third = LateWindow(IDENTITY, JOB, second.cursor(), **limits)
    assert take(third, [today_ms + 5, today_ms + 9, later_ms], [b"c", b"d", b"b"]).places == [1]


def test_a_log_of_the_far_future_only_is_read():
    """Its lines come once, although none of their times is believed."""
    limits = {"late_window_s": 10, "latest_ms": 1000, "max_lines": 10}
    times = list(range(5000, 5030))
    first = LateWindow(IDENTITY, JOB, **limits)
    assert len(take(first, times, [b"x"] * 30).places) == 30
    second = LateWindow(IDENTITY, JOB, first.cursor(), **limits)
    assert take(second, [*times, 5030], [b"x"] * 31).places == [30]
