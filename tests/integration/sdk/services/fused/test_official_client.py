"""What the official client gets wrong, row by row: each loses or repeats lines there, and must not here.

Every row runs against a server whose ``since_ms`` is inclusive and one whose is exclusive: which of them the hosted
server is, is not known. A clock that does not wait stands in for the seconds between two looks.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from datetime import timedelta

import anyio
import pytest

from tailspan.client import AsyncJobClient
from tailspan.config import Settings
from tailspan.errors import AuthError, ProtocolError, ServiceUnavailableError, TailspanError, WaitTimeoutError
from tailspan.models import JobState
from tailspan.services.fused import FusedService
from tailspan.testing import FakeClock
from tests.fakes.job_api import HANG, HTML, TRUNCATED, FakeJobApi, Fault, status_fault


@pytest.fixture(params=[True, False], ids=["inclusive", "exclusive"])
def api(request):
    """Return a running job API."""
    with FakeJobApi(inclusive=request.param) as api:
        yield api


@pytest.fixture
def clock():
    """Return a clock that does not wait."""
    return FakeClock()


@pytest.fixture
def do(api, clock):
    """Return a function that runs a verb of a client on that API and clock."""

    def do(verb, *args, **kwargs):
        async def run():
            options = {"base_url": api.base_url, "token": "of-the-test", "requests_per_second": 10_000}
            service = FusedService.from_options("fused", options, Settings())
            try:
                return await verb(AsyncJobClient(service=service, clock=clock), *args, **kwargs)
            finally:
                await service.aclose()

        return anyio.run(run)

    return do


@pytest.fixture
def tail(do):
    """Return a function that tails job ``j`` to its end and returns the printed lines."""

    def tail(**kwargs):
        out = io.StringIO()
        do(AsyncJobClient.job_tail_logs, "j", sample_logs=False, file=out, **kwargs)
        return out.getvalue().splitlines()

    return tail


def test_lines_that_share_the_newest_millisecond_and_come_later(api, tail):
    """Five lines, three of the newest millisecond, two of those visible later: none lost, none repeated."""
    job = api.add_job("j")
    for text, timestamp, read in (("a", 1, 1), ("b", 2, 1), ("c", 3, 1), ("d", 3, 2), ("e", 3, 3)):
        job.line(text, 1000 + timestamp, from_read=read)
    job.becomes("Done", from_status=5)
    assert tail() == ["a", "b", "c", "d", "e"]


def test_four_lines_a_millisecond(api, tail):
    """120 lines, four of each millisecond, cut anywhere between two looks."""
    job = api.add_job("j")
    for number in range(120):
        job.line(f"line {number}", 1000 + number // 4, from_read=1 + number // 7)
    job.becomes("Done", from_status=20)
    assert tail() == [f"line {number}" for number in range(120)]


def test_a_heartbeat_that_always_says_the_same(api, tail):
    """Equal texts are as many lines; the history is not fetched each time."""
    job = api.add_job("j")
    for number in range(12):
        job.line("heartbeat", 1_000_000 + 100_000 * number, from_read=1 + number)
    job.becomes("Done", from_status=14)
    assert tail() == ["heartbeat"] * 12
    assert sum("since_ms" not in request.query for request in api.asked("logs")) == 1


def test_equal_lines_of_one_millisecond_are_as_many_lines(api, tail):
    """The same text at the same time, some of it seen before: all are printed, once each."""
    job = api.add_job("j")
    for read in (1, 1, 2, 3, 3):
        job.line("tick", 1000, from_read=read)
    job.becomes("Done", from_status=4)
    assert tail() == ["tick"] * 5


def test_a_line_that_says_error(api, tail):
    """What a line says does not end the tail."""
    job = api.add_job("j")
    lines = ["start", "checked 10 rows, 0 ERRORS", *(f"row {number}" for number in range(15))]
    for number, text in enumerate(lines):
        job.line(text, 1000 + number, from_read=1 + number)
    job.becomes("Done", from_status=18)
    assert tail() == lines


def test_a_pending_job_with_a_line(api, tail):
    """A pending job is waited for, whether it has lines or not."""
    job = api.add_job("j", job_status="Pending")
    for number in range(11):
        job.line(str(number), 1000 + number, from_read=1 if number == 0 else 3 + number)
    job.becomes("Running", from_status=4)
    job.becomes("Done", from_status=16)
    assert tail() == [str(number) for number in range(11)]


def test_pending_and_then_failed_without_a_line(api, tail):
    """The end is noticed, and said."""
    job = api.add_job("j", job_status="Pending")
    job.becomes("Failed", from_status=3)
    assert tail() == ["[tailspan] job j failed, without a line"]


def test_a_finished_job_on_an_instance_that_still_runs(api, tail):
    """The job's status ends the tail, not the instance's."""
    job = api.add_job("j")
    job.line("done", 1000)
    job.becomes("Done", instance="running", from_status=2)
    assert tail() == ["done"]


def test_lines_that_become_visible_after_the_end(api, tail):
    """41 lines, each visible two looks after it was written, 20 of them after the job's end: all are printed."""
    job = api.add_job("j")
    for number in range(41):
        job.line(str(number), 1000 + 100 * number, from_read=3 + number // 10)
    job.becomes("Done", from_status=5)
    assert tail() == [str(number) for number in range(41)]


def test_a_job_that_ended_before(api, tail):
    """All its lines are printed."""
    job = api.add_job("j", job_status="Failed", job_status_date="2026-01-01T00:00:00+00:00")
    for number in range(5):
        job.line(str(number), 1000 + number)
    assert tail() == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("fault", [status_fault(500), TRUNCATED, Fault("reset"), HTML], ids=lambda fault: fault.kind)
@pytest.mark.parametrize("verb", ["logs", "status"])
def test_one_fault(api, tail, verb, fault):
    """One spoiled reply to a log or a status request does not end the tail."""
    job = api.add_job("j")
    for number in range(6):
        job.line(str(number), 1000 + number, from_read=1 + number)
    job.becomes("Done", from_status=8)
    hook = "on_read" if verb == "logs" else "on_status"
    setattr(job, hook, lambda number: api.fault(fault, on=verb) if number == 2 else None)
    assert tail() == ["0", "1", "2", "3", "4", "5"]


def test_waiting_ends_at_the_timeout(api, clock, do):
    """Poll 5 s, timeout 1 s: after 1 s, not after 5."""
    api.add_job("j")
    with pytest.raises(WaitTimeoutError):
        do(AsyncJobClient.job_wait_for_job, "j", 5, 1)
    assert clock.monotonic_s() == 1


def test_waiting_returns_the_finished_answer_that_it_has(api, clock, do):
    """Done at 0.7 s, poll 2 s, timeout 1 s: the finished answer is returned."""
    job = api.add_job("j")
    clock.at(0.7, lambda: job.becomes("Done"))
    assert do(AsyncJobClient.job_wait_for_job, "j", 2, 1).state is JobState.SUCCEEDED


def test_the_execution_time_of_a_long_log_is_bounded(api, do):
    """100,000 lines (12.7 MB in one reply): right, and never held in memory."""
    job = api.add_job("j", job_status="Done")
    text = b"x" * 80

    def body(since_ms):
        rows = range(100_000) if since_ms is None else range(since_ms + 1, 100_000)
        yield b"["
        for start in range(0, len(rows), 1000):
            chunk = (b'{"message":"%s","timestamp":%d}' % (text, row) for row in rows[start : start + 1000])
            yield (b"," if start else b"") + b",".join(chunk)
        yield b"]"

    job.body = body
    tracemalloc.start()
    try:
        assert do(AsyncJobClient.job_get_exec_time, "j") == timedelta(milliseconds=99_999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6e6


def test_the_execution_time_of_an_unsorted_log_is_not_negative(do):
    """The newest minus the oldest line, wherever they stand."""
    with FakeJobApi(sort=False) as api:
        job = api.add_job("j", job_status="Done")
        for timestamp in (5000, 9000, 1000):
            job.line("x", timestamp)

        async def run():
            options = {"type": "fused", "base_url": api.base_url, "token": "of-the-test"}
            service = FusedService.from_options("fused", options, Settings())
            async with AsyncJobClient(service=service) as client:
                try:
                    return await client.job_get_exec_time("j")
                finally:
                    await service.aclose()

        assert timedelta(0) <= anyio.run(run)


def test_indentation(api, do):
    """Printing keeps it."""
    api.add_job("j").line("  indented", 1000)
    out = io.StringIO()
    do(AsyncJobClient.job_print_logs, "j", None, out)
    assert out.getvalue() == "  indented\n"


def answered_in_time(call: Callable[[float], object]) -> str:
    """Return the error of a call with the first timeout that leaves time for an answer on this machine.

    Without an answer in time, waiting is an error, and tailing ends as it does after any timeout.
    """
    text = "no error"
    for timeout_s in (0.3, 1.0, 3.0, 10.0, 30.0):
        try:
            call(timeout_s)
        except TailspanError as error:
            text = str(error)
            if "answered" not in text:
                break
    return text


def test_a_service_that_is_down_for_ever(api, do):
    """Bounded by the caller's timeout, in the server's words; a cancel is not sent again."""
    api.add_job("j")
    api.fault(status_fault(503, "closed for maintenance"), times=None)
    assert "closed for maintenance" in answered_in_time(lambda s: do(AsyncJobClient.job_wait_for_job, "j", 5, s))
    assert "closed for maintenance" in answered_in_time(lambda s: do(AsyncJobClient.job_tail_logs, "j", timeout=s))
    api.clear_faults()
    api.fault(status_fault(503, "closed for maintenance"), on="cancel", times=None)
    with pytest.raises(ServiceUnavailableError, match="closed for maintenance"):
        do(AsyncJobClient.job_cancel, "j")
    assert len(api.asked("cancel")) == 1


def test_credentials_that_are_refused(api, do):
    """An error of ours at once, and no retries."""
    api.add_job("j")
    api.authorizations = {"Bearer another"}
    with pytest.raises(AuthError):
        do(AsyncJobClient.job_get_status, "j")
    assert len(api.asked("status")) <= 2


@pytest.mark.parametrize(
    "fault",
    [HTML, Fault(body=b"nonsense"), Fault(body=b'"a string"'), Fault(body=b'{"job_id": 5}')],
    ids=["HTML", "no JSON", "a string", "wrong types"],
)
def test_a_reply_of_the_wrong_shape(api, do, fault):
    """Raised as an error of ours, never as the parser's, and never returned as data."""
    api.add_job("j")
    api.fault(fault, on="status", times=None)
    api.fault(fault, on="logs", times=None)
    for verb in (AsyncJobClient.job_get_status, AsyncJobClient.job_get_logs):
        with pytest.raises(ProtocolError):
            do(verb, "j")


def test_no_credentials(monkeypatch, tmp_path):
    """Said at once, without a request and without a browser; the host does not even exist."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FUSED_AUTH_TOKEN", raising=False)

    async def run():
        options = {"type": "fused", "base_url": "https://jobs.invalid/server/v1"}
        service = FusedService.from_options("fused", options, Settings())
        try:
            await AsyncJobClient(service=service).job_get_status("j")
        finally:
            await service.aclose()

    with pytest.raises(AuthError):
        anyio.run(run)


def test_connections_are_kept(api, do):
    """Twenty requests share one connection."""
    api.add_job("j")

    async def ask(client):
        for _ in range(20):
            await client.job_get_status("j")
        return len(api._connections)

    assert do(ask) == 1


def test_a_server_that_hangs(api, do):
    """The timeout holds while a reply does not come."""
    api.add_job("j")
    api.fault(HANG, on="status", times=None)
    with pytest.raises(WaitTimeoutError):
        do(AsyncJobClient.job_wait_for_job, "j", 5, 0.05)


def test_the_import_is_light():
    """Only what is used is loaded."""
    code = "import sys, tailspan; print(len([name for name in sys.modules if name.startswith('tailspan')]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"1\n"
