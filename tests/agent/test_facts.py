"""What is known of a job's lines adds up, page by page, and survives as JSON."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.models import JobState
from tailspan.page import Line, LogPage, Run
from tailspan_agent.digest import digest_of
from tailspan_agent.facts import JobFacts


def timed(*lines: tuple[int, str]) -> LogPage:
    return LogPage.from_lines([Line(ns, text) for ns, text in lines], cursor=b"", identity="id", job_id="j1")


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.text("ab", max_size=3)), min_size=1), min_size=1, max_size=5))
def test_pages_add_up(pages: list[list[tuple[int, str]]]) -> None:
    """Lines, first and last time and hash are those of all lines, and survive a restart after any page."""
    facts = JobFacts(first_seen_ns=5)
    uids = []
    for lines in pages:
        page = timed(*lines)
        uids += [int(uid, 16) for uid in page.uids()]
        facts = JobFacts.from_json(facts.with_page(page).to_json())
    times = [ns for lines in pages for ns, _ in lines]
    assert facts.lines == len(times)
    assert facts.first_line_ns == min(times)
    assert facts.last_line_ns is not None
    assert facts.last_line_ns >= max(times)
    assert facts.stream_hash == sum(uids) % 2**64


def test_the_hash_of_a_service_with_offsets_is_that_of_its_bytes() -> None:
    """In whatever pages the log came: count and crc32 of the bytes, a newline after each line."""
    facts = JobFacts(first_seen_ns=5)
    for lines in ([b"a", b"\xff b"], [b""], [b"c"]):
        facts = facts.with_page(LogPage(list(lines), [Run(len(lines), 7, uid_prefix="x")], b""))
    assert (facts.lines, facts.stream_hash) == (4, zlib.crc32(b"a\n\xff b\n\nc\n"))


def test_the_last_line_of_a_run_is_the_last() -> None:
    """Each line of a run is a nanosecond later than the one before."""
    facts = JobFacts(first_seen_ns=5).with_page(LogPage([b""] * 3, [Run(3, 100, uid_prefix="x")], b""))
    assert (facts.first_line_ns, facts.last_line_ns) == (100, 102)


def test_states_are_kept_as_they_change() -> None:
    """A state that is seen again adds nothing; one that comes back does."""
    facts = JobFacts(first_seen_ns=5)
    for ns, state in ((1, JobState.PENDING), (2, JobState.PENDING), (3, JobState.RUNNING), (4, JobState.PENDING)):
        facts = facts.with_state(ns, state)
    assert facts.states == ((1, JobState.PENDING), (3, JobState.RUNNING), (4, JobState.PENDING))
    assert facts.with_state(9, JobState.PENDING) is facts


def test_everything_survives_as_json() -> None:
    """Digest and states too."""
    facts = JobFacts(
        first_seen_ns=1,
        states=((1, JobState.FAILED),),
        digest=digest_of(["Traceback (most recent call last):", '  File "x", line 1', "ValueError: no"]),
        logs_complete=True,
    )
    assert facts.digest is not None
    assert JobFacts.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("text", ["", "[]", '{"first_seen_ns": "x"}', '{"first_seen_ns": 1, "states": [[1, "NO"]]}'])
def test_damaged_json_is_a_value_error(text: str) -> None:
    """So that whoever reads it can go on without."""
    with pytest.raises(ValueError, match=r".+"):
        JobFacts.from_json(text)
