"""A job's ledger adds up its pages and is stored as JSON."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import Line, LineRun, LogPage
from tailspan.models import JobState
from tailspan_agent.analysis.failure import failure_of
from tailspan_agent.job.ledger import JobLedger


def timed(*lines: tuple[int, str]) -> LogPage:
    return LogPage.from_lines([Line(ns, text) for ns, text in lines], cursor=b"", identity="id", job_id="j1")


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.text("ab", max_size=3)), min_size=1), min_size=1, max_size=5))
def test_pages_add_up(pages: list[list[tuple[int, str]]]) -> None:
    """Count, first and last time and hash are those of all lines, also with a restart after any page."""
    ledger = JobLedger(first_seen_ns=5)
    uids = []
    for lines in pages:
        page = timed(*lines)
        uids += [int(uid, 16) for uid in page.uids()]
        ledger = JobLedger.from_json(ledger.with_page(page).to_json())
    times = [ns for lines in pages for ns, _ in lines]
    assert ledger.lines == len(times)
    assert ledger.first_line_ns == min(times)
    assert ledger.last_line_ns is not None
    assert ledger.last_line_ns >= max(times)
    assert ledger.stream_hash == sum(uids) % 2**64


def test_the_hash_of_a_service_with_offsets_is_that_of_its_bytes() -> None:
    """Count and crc32 do not depend on the pages: the crc32 is of the bytes, with a newline after each line."""
    ledger = JobLedger(first_seen_ns=5)
    for lines in ([b"a", b"\xff b"], [b""], [b"c"]):
        ledger = ledger.with_page(LogPage(list(lines), [LineRun(len(lines), 7, uid_prefix="x")], b""))
    assert (ledger.lines, ledger.stream_hash) == (4, zlib.crc32(b"a\n\xff b\n\nc\n"))


def test_the_last_line_of_a_run_is_the_last() -> None:
    """Each line of a run is a nanosecond later than the one before."""
    ledger = JobLedger(first_seen_ns=5).with_page(LogPage([b""] * 3, [LineRun(3, 100, uid_prefix="x")], b""))
    assert (ledger.first_line_ns, ledger.last_line_ns) == (100, 102)


def test_states_are_kept_as_they_change() -> None:
    """A repeated state adds nothing; a state that comes back does."""
    ledger = JobLedger(first_seen_ns=5)
    for ns, state in ((1, JobState.PENDING), (2, JobState.PENDING), (3, JobState.RUNNING), (4, JobState.PENDING)):
        ledger = ledger.with_state(ns, state)
    assert ledger.states == ((1, JobState.PENDING), (3, JobState.RUNNING), (4, JobState.PENDING))
    assert ledger.with_state(9, JobState.PENDING) is ledger


def test_everything_survives_as_json() -> None:
    """Also the failure and the states."""
    ledger = JobLedger(
        first_seen_ns=1,
        states=((1, JobState.FAILED),),
        failure=failure_of(["Traceback (most recent call last):", '  File "x", line 1', "ValueError: no"]),
        logs_complete=True,
    )
    assert ledger.failure is not None
    assert JobLedger.from_json(ledger.to_json()) == ledger


def test_stored_names_stay() -> None:
    """An older agent's store is read, and what is written back has the same names: an older agent can read it."""
    stored = (
        '{"first_seen_ns":1,"first_line_ns":2,"last_line_ns":3,"lines":4,"states":[[5,"RUNNING"],[6,"FAILED"]],'
        '"stream_hash":7,"digest":{"exception_type":null,"message":"no such file","stacktrace":null,'
        '"last_lines":["no such file"]},"delivery":{"acked":3,"rejected":{"invalid":1},"identified":true,"resent":0},'
        '"logs_complete":true,"failure_told":true,"quiet_ns":8,"heartbeat_gap_s":0.5,"alerts":[[9,"slow"]],'
        '"receipts":1,"failures_before":2,"first_failed_ns":10,"fingerprint":"f0","last_line":"no such file"}'
    )
    ledger = JobLedger.from_json(stored)
    assert ledger.failure_reported
    assert ledger.failure == failure_of(["no such file"])
    # An older agent ignores what was added since.
    assert ledger.to_json() == stored.replace('"resent":0', '"resent":0,"shortened":0')


@pytest.mark.parametrize("text", ["", "[]", '{"first_seen_ns": "x"}', '{"first_seen_ns": 1, "states": [[1, "NO"]]}'])
def test_damaged_json_is_a_value_error(text: str) -> None:
    """The caller can handle it and start with an empty ledger."""
    with pytest.raises(ValueError, match=r".+"):
        JobLedger.from_json(text)
