"""The plain functions: the user's API, called as users call it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import threading
import warnings
from datetime import timedelta

import pytest

import tailspan
from tailspan import (
    InProgressWarning,
    JobNotFoundError,
    JobState,
    WaitTimeoutError,
    job_cancel,
    job_get_exec_time,
    job_get_logs,
    job_get_status,
    job_list,
    job_print_logs,
    job_submit,
    job_tail_logs,
    job_wait_for_job,
)
from tailspan.testing import FakeService


@pytest.fixture
def service():
    """Return a service in memory with one ended job, ``j``, of three lines."""
    service = FakeService()
    service.add_job("j")
    service.add_lines("j", "one", "  two", "three", timestamp_ms=1000, step_ms=250)
    service.set_state("j", "SUCCEEDED")
    return service


def test_each_verb_does_what_it_says(service, capsys):
    """All verbs over one job, from its submission to its last line."""
    submitted = job_submit(["true"], name="new", service=service)
    assert submitted.state is JobState.PENDING
    assert job_cancel(submitted).state is JobState.CANCELED
    assert [row.job_id for row in job_list(service=service)] == [submitted.job_id, "j"]
    assert job_get_status("j", service=service).state is JobState.SUCCEEDED
    assert job_get_logs("j", service=service)[0] == {"message": "one", "timestamp": 1000}
    assert job_get_exec_time("j", service=service) == timedelta(milliseconds=500)
    assert job_wait_for_job("j", service=service).job_id == "j"
    job_print_logs("j", service=service)
    job_tail_logs("j", 0.01, False, service=service)
    assert capsys.readouterr().out == "one\n  two\nthree\n" * 2


def test_a_status_has_the_verbs_as_methods(service, capsys):
    """A RunResponse remembers its service: its methods need nothing more."""
    status = job_get_status("j", service=service)
    assert status.get_status() == status
    assert len(status.get_logs()) == 3
    assert status.get_exec_time() == timedelta(milliseconds=500)
    assert status.wait_for_job() == status
    assert status.cancel() == status
    status.print_logs(1250)
    status.tail_logs(0.01, sample_logs=False)
    assert capsys.readouterr().out == "  two\nthree\none\n  two\nthree\n"


def test_a_listed_job_is_a_job(service):
    """Every verb takes a row of the list."""
    (row,) = job_list(service=service)
    assert job_get_status(row).job_id == "j"


def test_lines_go_to_the_present_stdout_or_to_the_file(service):
    """Printing follows a redirected sys.stdout, as print does, and prefers the file that was given."""
    redirected, given = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(redirected):
        job_print_logs("j", service=service)
        job_print_logs("j", 1500, given, service=service)
        job_tail_logs("j", 0.01, service=service)
    assert redirected.getvalue() == "one\n  two\nthree\n[tailspan] 2 lines left out\nthree\n"
    assert given.getvalue() == "three\n"


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return that it is a terminal."""
        return True


def test_a_line_cannot_act_on_the_readers_terminal(service, monkeypatch):
    """On a terminal only colours of a remote line stay; in a file it stays as it was written."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    hostile = "\x1b]0;title\x07\x1b[2J\x1b[31mred"
    service.add_lines("j", hostile, timestamp_ms=9000)
    terminal, file = Terminal(), io.StringIO()
    job_print_logs("j", 9000, terminal, service=service)
    job_print_logs("j", 9000, file, service=service)
    assert terminal.getvalue() == "\x1b[31mred\x1b[0m\n"
    assert file.getvalue() == hostile + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    job_print_logs("j", 9000, terminal, service=service)
    assert terminal.getvalue() == "red\n"


def test_a_file_that_lacks_a_character_still_gets_the_line(service):
    """An ASCII pipe does not end the reading."""
    service.add_lines("j", "grün", timestamp_ms=9000)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    job_print_logs("j", 9000, file, service=service)
    assert raw.getvalue() == b"gr?n\n"


def test_errors_name_the_job(service):
    """The exception of the service reaches the caller as it is."""
    with pytest.raises(JobNotFoundError, match="has no job 'k'") as caught:
        job_get_logs("k", service=service)
    assert (caught.value.service, caught.value.job_id) == ("fake", "k")
    with pytest.raises(JobNotFoundError):
        job_tail_logs("k", service=service)


def test_waiting_in_vain_raises_a_timeout_error(service):
    """The built-in TimeoutError catches it, and it has the last status."""
    service.add_job("r")
    with pytest.raises(TimeoutError) as caught:
        job_wait_for_job("r", 0.01, 0.05, service=service)
    assert isinstance(caught.value, WaitTimeoutError)
    assert caught.value.last_status is not None


def test_the_in_progress_warning_points_at_the_caller(service):
    """The warning names the line of the call, so that the default filter shows it once there."""
    service.add_job("r")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert job_get_exec_time("r", service=service) == timedelta(0)
    assert [(one.category, one.filename) for one in caught] == [(InProgressWarning, __file__)]


def test_verbs_work_in_a_notebook_and_in_threads(service):
    """Inside a running loop, and from several threads at once."""
    out = io.StringIO()

    async def cell() -> None:
        job_tail_logs("j", 0.01, False, service=service, file=out)
        assert job_get_status("j", service=service).state is JobState.SUCCEEDED

    asyncio.run(cell())
    assert out.getvalue() == "one\n  two\nthree\n"
    files = [io.StringIO() for _ in range(8)]
    threads = [
        threading.Thread(target=job_tail_logs, args=("j", 0.01, False), kwargs={"service": service, "file": file})
        for file in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {file.getvalue() for file in files} == {"one\n  two\nthree\n"}


class Broken(io.StringIO):
    """A file whose reader has gone."""

    def write(self, text: str) -> int:
        """Fail as a pipe does."""
        raise BrokenPipeError


def test_a_file_that_fails_ends_the_tail(service):
    """The error of the caller's file is the caller's; the next verb works."""
    with pytest.raises(BrokenPipeError):
        job_tail_logs("j", 0.01, service=service, file=Broken())
    assert job_get_status("j", service=service).job_id == "j"


def test_the_verbs_of_another_thread_go_on_while_one_prints_slowly(service):
    """Printing happens in the caller's thread: a reader that stalls does not stall the others."""
    blocked, release = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            blocked.set()
            release.wait(30)
            return len(text)

    thread = threading.Thread(target=job_print_logs, args=("j", None, Slow()), kwargs={"service": service})
    thread.start()
    try:
        assert blocked.wait(30)
        assert job_get_status("j", service=service).job_id == "j"
    finally:
        release.set()
        thread.join()


def test_the_package_offers_what_it_names():
    """Every public name can be had from the package, and the list of them is sorted."""
    assert tailspan.__all__ == sorted(tailspan.__all__)
    assert {name for name in tailspan.__all__ if not hasattr(tailspan, name)} == set()
    assert set(tailspan.__all__) <= set(dir(tailspan))
    with pytest.raises(AttributeError, match="job_fly"):
        _ = tailspan.job_fly
    assert "tailspan.jobs" in sys.modules
