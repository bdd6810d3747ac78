"""What a caller sees of a call that fails: the traceback ends at its line, and wrong arguments are named."""

from __future__ import annotations

import asyncio
import logging
import traceback
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pytest

import tailspan
from tailspan import AsyncJobClient, Client, ConfigError, JobNotFoundError, ServiceError, TailspanError
from tailspan._caller import for_callers
from tailspan.errors import ServiceUnavailableError
from tailspan.testing import FakeService


@pytest.fixture
def service():
    """Return a service in memory with one job."""
    service = FakeService()
    service.add_job("j")
    return service


def files_of(error):
    """Return the names of the files in a traceback as Python prints it, those of causes included."""
    printed = traceback.TracebackException.from_exception(error)
    files = [frame.filename for frame in printed.stack]
    while printed.__cause__ is not None or (printed.__context__ is not None and not printed.__suppress_context__):
        printed = printed.__cause__ or printed.__context__
        files += [frame.filename for frame in printed.stack]
    return files


SYNC_CALLS = {
    "function": lambda client, service: tailspan.job_get_status("x", service=service),
    "logs": lambda client, service: tailspan.job_get_logs("x", service=service),
    "list": lambda client, service: tailspan.job_list(service="nope"),
    "submit": lambda client, service: tailspan.job_submit("", service=service),
    "method": lambda client, service: client.wait_for_job("x"),
    "jobs": lambda client, service: client.jobs.get("x"),
    "handle": lambda client, service: client.jobs.get("j").wait_for_job(0.01, timeout=timedelta(milliseconds=20)),
    "generator": lambda client, service: next(client.iter_logs("x")),
    "updates": lambda client, service: list(client.follow_logs("x")),
    "type": lambda client, service: client.list_jobs("many"),
    "unknown argument": lambda client, service: tailspan.job_submit("true", nmae="x"),
    "settings": lambda client, service: tailspan.load_settings(Path("/nowhere/config.toml")),
    "service": lambda client, service: tailspan.open_service("nope"),
}


@pytest.mark.parametrize("name", SYNC_CALLS)
def test_a_traceback_ends_at_the_callers_line(name, service):
    """Of functions, methods and iterators."""
    with Client(service=service) as client, pytest.raises((TailspanError, TypeError)) as caught:
        SYNC_CALLS[name](client, service)
    assert set(files_of(caught.value)) == {__file__}


def test_a_traceback_of_awaitable_methods_ends_at_the_callers_line(service):
    """Of coroutines and asynchronous iterators."""

    async def run():
        async with AsyncJobClient(service=service) as client:
            with pytest.raises(JobNotFoundError) as awaited:
                await client.job_get_status("x")
            with pytest.raises(JobNotFoundError) as iterated:
                async for _ in client.follow_logs("x"):
                    pass
        return awaited.value, iterated.value

    for error in asyncio.run(run()):
        assert set(files_of(error)) == {__file__}


def test_what_caused_an_error_is_hidden_and_reachable():
    """Its frames are ours; the message names it."""

    @for_callers
    def verb():
        try:
            raise OSError("refused")
        except OSError as error:
            raise ServiceUnavailableError("cannot connect: refused") from error

    with pytest.raises(ServiceError) as caught:
        verb()
    assert set(files_of(caught.value)) == {__file__}
    assert len(files_of(caught.value)) == 1
    assert isinstance(caught.value.__context__, OSError)


def test_the_callers_own_exception_stays(service):
    """An error while the caller handles an exception is shown with it, as Python does."""
    try:
        raise KeyError("own")
    except KeyError:
        with pytest.raises(JobNotFoundError) as caught:
            tailspan.job_get_status("x", service=service)
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__


def test_ctrl_c_has_no_frames_of_ours():
    """It is how a notebook ends a wait."""

    @for_callers
    def verb():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        verb()
    assert len(files_of(caught.value)) == 1


def test_a_bug_keeps_its_frames():
    """A TypeError from inside, or any other error, is not the caller's: its frames are needed."""

    @for_callers
    def verb(number):
        return 1 + number

    with pytest.raises(TypeError) as caught:
        verb("x")
    assert len(files_of(caught.value)) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'nmbr'") as caught:
        verb(nmbr=1)
    assert len(files_of(caught.value)) == 1


def test_the_frames_are_logged_at_debug(service, caplog):
    """A bug report may need them; they are logged once."""
    with caplog.at_level(logging.DEBUG, "tailspan"), pytest.raises(JobNotFoundError):
        tailspan.job_get_status("x", service=service)
    (record,) = [record for record in caplog.records if record.name == "tailspan"]
    assert "_verbs.py" in "".join(traceback.format_exception(record.exc_info[1])) or record.exc_text


WRONG = [
    (lambda: tailspan.job_get_status(5), "job", "job is of type int: expected a job id, a RunResponse"),
    (lambda: tailspan.job_get_status(["j"]), "job", "job is of type list: expected a job id"),
    (lambda: tailspan.job_get_status("j", service=5), "service", r"service is 5 \(int\): expected a service's name"),
    (lambda: tailspan.job_get_logs("j", "1h"), "since_ms", r"since_ms is '1h' \(str\): expected milliseconds"),
    (lambda: tailspan.job_get_logs("j", task=5), "task", r"task is 5 \(int\): expected a task's name or id"),
    (lambda: tailspan.job_print_logs("j", file="out.txt"), "file", r"file is 'out.txt' \(str\): expected a text file"),
    (lambda: tailspan.job_tail_logs("j", "1"), "refresh_seconds", r"refresh_seconds is '1' \(str\): expected seconds"),
    (lambda: tailspan.job_tail_logs("j", None), "refresh_seconds", r"refresh_seconds is None \(NoneType\)"),
    (lambda: tailspan.job_tail_logs("j", get_logs_retries=1.5), "get_logs_retries", r"1.5 \(float\): expected a whole"),
    (lambda: tailspan.job_wait_for_job("j", timeout="30m"), "timeout", r"'30m' \(str\): expected seconds, a timedelta"),
    (lambda: tailspan.job_list("all"), "limit", r"limit is 'all' \(str\): expected a whole number or None"),
    (lambda: tailspan.job_list(name=1), "name", r"name is 1 \(int\): expected a string"),
    (lambda: tailspan.job_list(state=1), "state", r"state is 1 \(int\): expected a JobState"),
    (
        lambda: tailspan.job_submit(5),
        "command",
        r"command is 5 \(int\): expected a string, which a shell runs, or a list",
    ),
    (lambda: tailspan.job_submit(b"true"), "command", r"command is b'true' \(bytes\)"),
    (lambda: tailspan.job_submit(["sleep", 1]), "command", r"command\[1\] is 1 \(int\): expected a string"),
    (lambda: tailspan.job_submit("x", attributes=[]), "attributes", r"attributes is \[\] \(list\): expected a dict"),
    (lambda: tailspan.job_submit("x", attributes={"a": 1}), "attributes", r"attributes\['a'\] is of type int"),
    (lambda: tailspan.job_submit("x", env={1: "a"}), "env", r"env\[1\] is of type str: expected strings as keys"),
    (lambda: tailspan.job_submit("x", cwd=1), "cwd", r"cwd is 1 \(int\): expected a path"),
    (lambda: tailspan.job_list("x" * 200), "limit", r"x\.\.\. \(str\)"),
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_an_argument_of_a_wrong_type_is_named(place):
    """The error says what was given and what is expected, and has the name as its key."""
    call, key, words = WRONG[place]
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert caught.value.key == key
    assert len(files_of(caught.value)) == 2


def test_values_of_the_environment_are_not_shown():
    """They may be secrets."""
    with pytest.raises(ConfigError) as caught:
        tailspan.job_submit("x", env={"TOKEN": b"hunter2"})
    assert "hunter2" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(service):
    """NumPy's are neither int nor float, and neither are fractions."""
    service.set_state("j", "SUCCEEDED")
    assert tailspan.job_wait_for_job("j", Fraction(1, 100), Fraction(1), service=service).job_id == "j"
