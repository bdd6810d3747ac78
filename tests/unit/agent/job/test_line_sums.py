"""Lines that were never relayed are found by number and uid sum for each second of source time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import Line, LineRun, LogPage, line_digest
from tailspan_agent.job.line_sums import (
    Seconds,
    add_seconds,
    missing_lines,
    page_seconds,
    page_uids,
    page_uids_by_second,
    select_lines,
    sum_digests,
    sum_digests_in_python,
)

MASK = (1 << 64) - 1
S = 1_000_000_000


def uid(number: int) -> int:
    """A uid with large values, as lines have them: sums of small numbers collide."""
    return int.from_bytes(line_digest("id", "j1", 0, b"%d" % number, 0))


def page(*lines: tuple[int, str]) -> LogPage:
    return LogPage.from_lines([Line(ns, text) for ns, text in lines], cursor=b"c", identity="id", job_id="j1")


@given(st.lists(st.integers(0, MASK) | st.just(MASK), max_size=9))
def test_uids_are_summed_in_c_as_in_python(uids: list[int]) -> None:
    """Modulo 2^64."""
    digests = b"".join(one.to_bytes(8) for one in uids)
    assert sum_digests(digests) == sum_digests_in_python(digests) == sum(uids) & MASK


@given(st.lists(st.booleans(), max_size=30))
def test_missing_lines_are_always_returned(relayed: list[bool]) -> None:
    """For any set of lines, no missing line is omitted; one or two missing lines are found exactly."""
    uids = [uid(number) for number in range(len(relayed))]
    sent = [one for one, was in zip(uids, relayed, strict=True) if was]
    missing = {index for index, was in enumerate(relayed) if not was}
    found = missing_lines(uids, len(sent), sum(sent) & MASK)
    assert missing <= set(found)
    assert found == sorted(set(found))
    if len(missing) <= 2:
        assert set(found) == missing


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 3))
def test_lines_that_the_service_dropped_hide_none(relayed: list[bool], dropped: int) -> None:
    """Missing lines are found although the service has dropped relayed lines since."""
    uids = [uid(number) for number in range(len(relayed))]
    sent = [one for one, was in zip(uids, relayed, strict=True) if was] + [uid(1000 + n) for n in range(dropped)]
    missing = {index for index, was in enumerate(relayed) if not was}
    assert missing <= set(missing_lines(uids, len(sent), sum(sent) & MASK))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 999), st.text("ab", max_size=2)), max_size=40), st.data())
def test_sums_of_pages_add_up(lines: list[tuple[int, int, str]], data: st.DataObject) -> None:
    """The sums of a log are those of its lines, whatever its pages."""
    whole = page(*[(second * S + ms * 1_000_000, text) for second, ms, text in sorted(lines)])
    total = page_seconds(whole)
    by_line: Seconds = {}
    for second, one in page_uids_by_second(whole):
        add_seconds(by_line, {second: (1, one)})
    assert total == by_line
    uids = page_uids(whole)
    assert sum(count for count, _ in total.values()) == len(uids) == len(lines)
    kept = set(data.draw(st.lists(st.sampled_from(uids)))) if uids else set()
    rest = dict(total)
    selected = select_lines(whole, kept)
    if selected is not None:
        assert set(page_uids(selected)) == kept
        assert selected.cursor == whole.cursor
        add_seconds(rest, page_seconds(selected), -1)
    assert sum(count for count, _ in rest.values()) == len(lines) - len(kept)


def test_selected_lines_are_unchanged() -> None:
    """Times, streams and uids of the selected lines are unchanged: the record is the missed one."""
    whole = LogPage.from_lines(
        [Line(S, "a"), Line(S, "b", "stderr"), Line(S, "c", "stderr"), Line(2 * S, "d")],
        cursor=b"c",
        identity="id",
        job_id="j1",
    )
    uids = page_uids(whole)
    selected = select_lines(whole, {uids[2], uids[3]})
    assert selected is not None
    assert selected.lines == [b"c", b"d"]
    assert selected.times_unix_nano() == whole.times_unix_nano()[2:]
    assert [run.stream for run in selected.runs] == [2, 0]
    assert selected.uids() == whole.uids()[2:]
    assert select_lines(whole, set()) is None


def test_services_with_offsets_have_no_sums() -> None:
    """Their cursor is enough to know what was read."""
    offsets = LogPage([b"a", b"b"], [LineRun(2, S, uid_prefix="x.")], b"c")
    assert (page_uids(offsets), page_seconds(offsets), list(page_uids_by_second(offsets))) == ((), {}, [])


def test_sums_that_cancel_take_no_room() -> None:
    """A job that runs for weeks has many seconds: those without lines in flight are dropped."""
    total: Seconds = {}
    add_seconds(total, {1: (2, 5), 2: (1, 1)})
    add_seconds(total, {1: (2, 5)}, -1)
    assert total == {2: (1, 1)}
