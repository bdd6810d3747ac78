"""The fakes that Tailspan gives its users: they behave like a service and a clock."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.errors import CursorExpiredError, JobNotFoundError, ServiceUnavailableError
from tailspan.models import JobState
from tailspan.services import JobService, SubmitService
from tailspan.testing import FakeClock, FakeService


def read(service, job_id="j", cursor=None, **options):
    """Return the lines and the last cursor of a read."""

    async def run():
        lines, last = [], cursor
        async for page in service.read_logs(job_id, cursor, **options):
            lines.extend(line.decode() for line in page.lines)
            last = page.cursor
        return lines, last

    return anyio.run(run)


def test_it_is_a_job_service():
    """The fake implements the protocols that real services implement."""
    service = FakeService()
    assert isinstance(service, JobService)
    assert isinstance(service, SubmitService)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=8), st.integers(1, 4))
def test_reading_on_from_a_cursor_gives_each_line_once(batches, page_lines):
    """However lines come and pages end, going on from the last cursor loses and repeats nothing."""
    service = FakeService(page_lines=page_lines)
    service.add_job("j")
    seen, cursor = [], None
    for batch in batches:
        service.add_lines("j", *batch, timestamp_ms=1)
        lines, cursor = read(service, cursor=cursor)
        seen.extend(lines)
    assert seen == [line for batch in batches for line in batch]


def test_a_job_has_a_status_of_all_fields():
    """States set what a service would: end times, the Fused fields, a trace id of its own."""
    service = FakeService()
    running = service.add_job("j", job_name="etl", total_tasks=4)
    assert (running.status, running.finished_at, running.total_tasks) == ("running", None, 4)
    failed = service.set_state("j", "FAILED", exit_code=2)
    assert (failed.job_status, failed.exit_code, failed.logs_complete) == ("Failed", 2, True)
    assert failed.finished_at is not None
    assert failed.trace_id != service.add_job("k").trace_id


def test_errors_come_when_they_were_planned():
    """Each planned error is raised once, in order; then the method works again; requests are recorded."""
    service = FakeService()
    service.add_job("j")
    service.fail_next("get_job", ServiceUnavailableError("one"), ServiceUnavailableError("two"))
    for words in ("one", "two"):
        with pytest.raises(ServiceUnavailableError, match=words):
            anyio.run(service.get_job, "j")
    assert anyio.run(service.get_job, "j").state is JobState.RUNNING
    with pytest.raises(JobNotFoundError):
        anyio.run(service.get_job, "k")
    assert service.calls == [("get_job", "j")] * 3 + [("get_job", "k")]


def test_expired_lines_are_a_gap_for_old_cursors_only():
    """A cursor before the dropped lines is an error that has the oldest cursor left, where a first read begins."""
    service = FakeService(page_lines=1)
    service.add_job("j")
    service.add_lines("j", "1", "2", "3", timestamp_ms=1)
    service.expire("j", 2)
    assert read(service)[0] == ["3"]
    with pytest.raises(CursorExpiredError) as caught:
        read(service, cursor=b"1")
    assert read(service, cursor=caught.value.resume_cursor)[0] == ["3"]


def test_the_clock_passes_only_in_sleeps_and_acts_on_the_way():
    """Sleeps take no time; what was planned happens in order, at its time."""
    clock = FakeClock(1000)
    seen = []
    clock.at(2, lambda: seen.append(clock.monotonic_s()))
    clock.at(1, lambda: seen.append(clock.monotonic_s()))
    clock.at(5, lambda: seen.append(clock.monotonic_s()))
    anyio.run(clock.sleep, 3)
    assert (seen, clock.monotonic_s(), clock.wall_s(), clock.sleeps) == ([1, 2], 3, 1003, [3])
