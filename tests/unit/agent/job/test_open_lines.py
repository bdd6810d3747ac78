"""`tailspan_agent.job.open_lines`: which states of open lines become records, and what these have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import LogPage, OpenLine
from tailspan.models import JobStatus
from tailspan_agent.job.open_lines import OpenLineLimit, open_line_record


def line(text: bytes) -> OpenLine:
    """Return an open line."""
    return OpenLine(text, 7, f"uid-{len(text)}")


def sent(limit: OpenLineLimit, text: bytes, now_s: float) -> bool:
    """Send a line if the limit allows it; return whether it does."""
    if limit.wait_s(line(text), now_s) != 0:
        return False
    limit.on_sent(line(text))
    return True


@given(st.lists(st.tuples(st.floats(0, 30), st.binary(max_size=2)), max_size=60))
def test_no_job_causes_a_flood_of_records(states: list[tuple[float, bytes]]) -> None:
    """Ten at once and one every 10 s, whatever the job writes; one that waits is sent after the wait."""
    limit, now_s, records = OpenLineLimit(), 1e6, 0
    for pause_s, text in states:
        now_s += pause_s
        records += sent(limit, text, now_s)
        assert records <= 10 + (now_s - 1e6) / 10 + 1e-6
        wait_s = limit.wait_s(line(text + b"more"), now_s)
        assert wait_s is not None
        assert 0 <= wait_s <= 10.000001
        assert limit.wait_s(line(text + b"more"), now_s + wait_s + 1e-6) == 0


def test_a_text_is_sent_once_for_each_line() -> None:
    """A question that is asked twice is two lines; a line of the other stream in between changes nothing."""
    limit = OpenLineLimit()
    assert sent(limit, b"Continue? ", 0)
    assert limit.wait_s(line(b"Continue? "), 9) is None
    limit.on_page(LogPage([b"other"], [], b""))
    assert limit.wait_s(line(b"Continue? "), 9) is None
    limit.on_page(LogPage([b"other", b"Continue? yes"], [], b""))
    assert sent(limit, b"Continue? ", 9)


def test_the_record_is_an_event_with_an_identity_of_its_own() -> None:
    """Those who read only lines ignore it; the attribute is for stores that do not keep names of events."""
    status = JobStatus.from_state("RUNNING", job_id="j", job_name="n", identity="i", trace_id="ab" * 16)
    record = open_line_record(line(b"Continue? "), "Continue? ", status)
    assert (record.event_name, record.body, record.time_unix_nano) == ("tailspan.line.open", "Continue? ", 7)
    assert record.attributes == {"log.record.uid": "uid-10", "tailspan.line.open": True}
    assert record.trace_id == bytes.fromhex("ab" * 16)
