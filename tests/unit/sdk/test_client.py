"""`AsyncJobClient`: what each verb does, on a service in memory and a clock that does not wait."""

from __future__ import annotations

import dataclasses
import inspect
import io
import pickle
import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from tailspan import jobs
from tailspan.client import AsyncJobClient
from tailspan.config import load_settings
from tailspan.errors import (
    AuthError,
    ConfigError,
    InProgressWarning,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
    WaitTimeoutError,
)
from tailspan.models import JobState
from tailspan.services import JobService
from tailspan.testing import FakeClock, FakeService

DOWN = ServiceUnavailableError("the service says: maintenance")


@pytest.fixture
def service():
    """Return a service in memory with one running job, ``j``."""
    service = FakeService()
    service.add_job("j")
    return service


@pytest.fixture
def clock():
    """Return a clock that does not wait."""
    return FakeClock()


@pytest.fixture
def do(service, clock):
    """Return a function that runs a verb of a client on that service and clock."""

    def do(verb, *args, **kwargs):
        async def run():
            async with AsyncJobClient(service=service, clock=clock) as client:
                return await verb(client, *args, **kwargs)

        return anyio.run(run)

    return do


@pytest.fixture
def follow(service, clock):
    """Return a function that follows a job's log and returns its updates."""

    def follow(*args, **kwargs):
        async def run():
            client = AsyncJobClient(service=service, clock=clock)
            return [update async for update in client.follow_logs(*args, **kwargs)]

        return anyio.run(run)

    return follow


def texts(updates):
    """Return the lines of those updates."""
    return [message["message"] for update in updates for message in update.messages]


def test_every_verb_is_a_method_with_the_same_parameters():
    """The awaitable methods and the plain functions take the same; methods may take more by keyword."""
    for name in jobs.__all__:
        function = inspect.signature(getattr(jobs, name)).parameters
        method = dict(inspect.signature(getattr(AsyncJobClient, name)).parameters)
        del method["self"]
        assert [str(one) for one in function.values()] == [str(method[key]) for key in function]
        assert all(one.kind is one.KEYWORD_ONLY for key, one in method.items() if key not in function)


def test_logs_are_oldest_first_and_keep_the_order_within_a_millisecond(service, do):
    """Messages are dicts sorted by time; equal times and equal texts all stay."""
    service.add_lines("j", "b", "b", "a", timestamp_ms=2000)
    service.add_lines("j", "first", timestamp_ms=1000, stream="stderr")
    assert do(AsyncJobClient.job_get_logs, "j") == [
        {"message": "first", "timestamp": 1000, "stream": "stderr"},
        *({"message": text, "timestamp": 2000} for text in "bba"),
    ]
    assert len(do(AsyncJobClient.job_get_logs, "j", 2000)) == 3
    assert do(AsyncJobClient.job_get_logs, "j", 2001) == []


def test_printing_keeps_indentation_and_every_line(do):
    """Printing keeps the text of each line."""
    service = FakeService(page_lines=2)
    service.add_job("j")
    service.add_lines("j", "  indented", "", "\ttab", "ends by itself\n", "ä \x1b[31mred", timestamp_ms=1)
    out = io.StringIO()
    do(AsyncJobClient.job_print_logs, "j", None, out, service=service)
    assert out.getvalue() == "  indented\n\n\ttab\nends by itself\nä \x1b[31mred\n"


def test_status_knows_its_service(service, do):
    """A status and a listed job lead back to where they came from, without naming it again."""
    status = do(AsyncJobClient.job_get_status, "j")
    assert status._origin is service
    other = FakeService("other")
    assert do(AsyncJobClient.job_get_status, status).job_id == "j"
    with pytest.raises(JobNotFoundError):
        do(AsyncJobClient.job_get_status, status, service=other)
    (row,) = do(AsyncJobClient.job_list)
    assert row._origin is service


def test_answers_can_be_sent_to_another_process(service, do):
    """A pickled status has the name of its service, not the service with its connections."""
    for answer in (do(AsyncJobClient.job_get_status, "j"), *do(AsyncJobClient.job_list)):
        received = pickle.loads(pickle.dumps(answer))
        assert received == answer
        assert (received._origin, received.service) == (None, "fake")


def test_cancel_asks_once_and_leaves_ended_jobs_alone(service, do):
    """An ended job is answered without a cancel request; a running one is cancelled."""
    assert do(AsyncJobClient.job_cancel, "j").state is JobState.CANCELED
    assert [method for method, _ in service.calls].count("cancel") == 1
    assert do(AsyncJobClient.job_cancel, "j").state is JobState.CANCELED
    assert [method for method, _ in service.calls].count("cancel") == 1


def test_cancel_of_a_job_that_ends_meanwhile_is_no_error(service, do):
    """A refusal counts only if the job has not ended."""
    service.fail_next("cancel", RequestRejectedError("not running", status_code=409))
    service.before_next("cancel", lambda: service.set_state("j", "SUCCEEDED"))
    assert do(AsyncJobClient.job_cancel, "j").state is JobState.SUCCEEDED
    service.add_job("k")
    service.fail_next("cancel", RequestRejectedError("not yours", status_code=409))
    with pytest.raises(RequestRejectedError, match="not yours"):
        do(AsyncJobClient.job_cancel, "k")


def test_exec_time_is_last_minus_first_line_and_never_negative(service, do):
    """Zero with fewer than two lines; unsorted lines do not make it negative."""
    service.set_state("j", "SUCCEEDED")
    assert do(AsyncJobClient.job_get_exec_time, "j") == timedelta(0)
    service.add_lines("j", "x", timestamp_ms=5000)
    assert do(AsyncJobClient.job_get_exec_time, "j") == timedelta(0)
    service.add_lines("j", "y", timestamp_ms=2500)
    assert do(AsyncJobClient.job_get_exec_time, "j") == timedelta(seconds=2.5)


def test_exec_time_of_a_running_job_warns(service, do):
    """The time so far comes with a warning of its own class."""
    service.add_lines("j", "x", "y", timestamp_ms=0, step_ms=1500)
    with pytest.warns(InProgressWarning, match="job j is RUNNING"):
        assert do(AsyncJobClient.job_get_exec_time, "j") == timedelta(seconds=1.5)
    service.set_state("j", "FAILED")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        do(AsyncJobClient.job_get_exec_time, "j")


def test_wait_returns_the_final_status(service, clock, do):
    """It polls at every interval until the job has ended; a failed job is a state, not an error."""
    clock.at(12, lambda: service.set_state("j", "FAILED", exit_code=3))
    status = do(AsyncJobClient.job_wait_for_job, "j")
    assert (status.state, status.exit_code, clock.sleeps) == (JobState.FAILED, 3, [5, 5, 5])


def test_wait_never_sleeps_past_its_deadline(service, clock, do):
    """The last sleep is cut to the deadline; the error carries the last status."""
    with pytest.raises(TimeoutError, match=r"job j had not ended after 1 s: it is RUNNING") as caught:
        do(AsyncJobClient.job_wait_for_job, "j", 5, 1)
    assert clock.sleeps == [1]
    assert isinstance(caught.value, WaitTimeoutError)
    assert caught.value.last_status is not None
    assert caught.value.last_status.state is JobState.RUNNING


def test_wait_returns_a_finished_answer_that_comes_at_the_deadline(service, clock, do):
    """A job that ended during the last sleep is returned, though time is up."""
    clock.at(0.7, lambda: service.set_state("j", "SUCCEEDED"))
    assert do(AsyncJobClient.job_wait_for_job, "j", 2, 1).state is JobState.SUCCEEDED


def test_wait_without_time_asks_once(service, clock, do):
    """A timeout of zero is one question."""
    with pytest.raises(WaitTimeoutError):
        do(AsyncJobClient.job_wait_for_job, "j", 5, 0)
    assert service.calls == [("get_job", "j")]
    service.set_state("j", "SUCCEEDED")
    assert do(AsyncJobClient.job_wait_for_job, "j", 5, 0).state is JobState.SUCCEEDED


def test_wait_goes_on_through_faults_that_pass(service, clock, do):
    """Faults after a first answer are waited out for a minute; then the real error is raised."""
    service.before_next("get_job", lambda: None, lambda: service.fail_next("get_job", DOWN, ProtocolError("HTML")))
    clock.at(20, lambda: service.set_state("j", "SUCCEEDED"))
    assert do(AsyncJobClient.job_wait_for_job, "j").state is JobState.SUCCEEDED

    service.add_job("k")
    service.before_next("get_job", lambda: None, lambda: service.fail_next("get_job", *[DOWN] * 100))
    with pytest.raises(ServiceUnavailableError, match="maintenance"):
        do(AsyncJobClient.job_wait_for_job, "k")
    assert 60 <= sum(clock.sleeps) - 20 <= 75


def test_wait_says_why_the_last_request_failed(service, clock, do):
    """The timeout error of a service that is down has the error text of the service."""
    service.before_next("get_job", lambda: None, lambda: service.fail_next("get_job", *[DOWN] * 9))
    with pytest.raises(WaitTimeoutError, match="the last request failed: the service says: maintenance"):
        do(AsyncJobClient.job_wait_for_job, "j", 1, 3)


def test_a_first_request_that_fails_is_the_answer(service, do, follow):
    """Nothing is waited for when the service never answered: an unknown job, no credentials, no service."""
    for error in (DOWN, AuthError("no token"), JobNotFoundError("no such job")):
        service.fail_next("get_job", error, error)
        with pytest.raises(type(error)):
            do(AsyncJobClient.job_wait_for_job, "j")
        with pytest.raises(type(error)):
            follow("j")


class Hung(FakeService):
    """A service whose status never comes."""

    async def get_job(self, job_id):
        await anyio.sleep_forever()


class HungLog(FakeService):
    """A service whose log request never comes back."""

    async def read_logs(self, job_id, cursor=None, *, since_ms=None, late_window_s=10.0) -> AsyncIterator:
        await anyio.sleep_forever()
        yield


def test_timeouts_hold_when_the_service_hangs():
    """A request that is never answered does not keep wait or tail beyond the timeout."""
    hung, hung_log = Hung(), HungLog()
    hung_log.add_job("j")

    async def run():
        client = AsyncJobClient()
        with anyio.fail_after(20):
            with pytest.raises(WaitTimeoutError, match="its status was not answered"):
                await client.job_wait_for_job("j", 5, 0.05, service=hung)
            await client.job_tail_logs("j", timeout=0.05, service=hung)
            await client.job_tail_logs("j", timeout=0.05, service=hung_log)

    anyio.run(run)


def test_follow_yields_every_line_once_and_ends_with_the_job(service, clock, follow):
    """Lines that come while it follows, and the last ones, are all there; the last update is complete."""
    service.add_lines("j", "1", timestamp_ms=1)
    clock.at(1.5, lambda: service.add_lines("j", "2", "3", timestamp_ms=1))
    clock.at(3.5, lambda: service.add_lines("j", "4 ERROR", timestamp_ms=2))
    clock.at(4.5, lambda: service.add_lines("j", "5", timestamp_ms=2))
    clock.at(4.5, lambda: service.set_state("j", "SUCCEEDED"))
    updates = follow("j")
    assert texts(updates) == ["1", "2", "3", "4 ERROR", "5"]
    assert [update.complete for update in updates] == [False] * (len(updates) - 1) + [True]
    assert clock.sleeps[:3] == pytest.approx([1, 1, 1])


def test_follow_waits_for_late_lines_unless_the_log_is_marked_complete(service, clock, follow):
    """Settling takes ten seconds by default, else `settle_seconds`."""
    service.set_state("j", "SUCCEEDED", logs_complete=None, finished_at=datetime.fromtimestamp(clock.wall_s(), UTC))
    clock.at(8, lambda: service.add_lines("j", "late"))
    assert texts(follow("j")) == ["late"]
    assert 10 <= clock.monotonic_s() <= 16
    service.add_job("k", state="SUCCEEDED", logs_complete=None, finished_at=datetime.fromtimestamp(clock.wall_s(), UTC))
    before = clock.monotonic_s()
    follow("k", settle_seconds=0)
    assert clock.monotonic_s() - before < 3


def test_follow_samples_the_newest_line_of_each_look(do, service, clock, follow):
    """With sample_logs, one line a refresh and the number of the others."""
    service = FakeService(page_lines=2)
    service.add_job("j")
    service.add_lines("j", "1", "2", "3", "4", "newest", timestamp_ms=10)
    service.add_lines("j", "older", timestamp_ms=9)
    clock.at(1.5, lambda: service.set_state("j", "SUCCEEDED"))
    updates = [update for update in follow("j", sample_logs=True, service=service) if update.messages]
    assert [(texts([update]), update.left_out) for update in updates] == [(["newest"], 5)]


def test_tail_says_what_was_left_out_and_what_is_gone(service, clock, do):
    """Remarks stand between the lines: a sample, and a gap in the service's own log."""
    service.add_lines("j", "1", "2", "3", timestamp_ms=1)
    service.before_next(
        "read_logs",
        lambda: None,
        lambda: (service.add_lines("j", "4", "5", "6", timestamp_ms=2), service.expire("j", 5)),
    )
    clock.at(2.5, lambda: service.set_state("j", "SUCCEEDED"))
    out = io.StringIO()
    do(AsyncJobClient.job_tail_logs, "j", file=out)
    assert out.getvalue().splitlines() == [
        "[tailspan] 2 lines left out",
        "3",
        "[tailspan] lines before these are gone at the service",
        "6",
    ]


def test_tail_of_a_job_that_fails_without_a_line_says_so(service, clock, do):
    """Pending, then failed: the end is noticed and explained."""
    service.add_job("p", state="PENDING")
    clock.at(3.5, lambda: service.set_state("p", "FAILED", exit_code=137, error="the image could not be pulled"))
    out = io.StringIO()
    do(AsyncJobClient.job_tail_logs, "p", file=out)
    assert out.getvalue() == ("[tailspan] job p failed: the image could not be pulled, without a line\n")


def test_tail_returns_on_timeout(service, clock, do):
    """A timeout is not an error, and no sleep goes past it."""
    service.add_lines("j", "so far", timestamp_ms=1)
    out = io.StringIO()
    do(AsyncJobClient.job_tail_logs, "j", timeout=2.5, file=out)
    assert out.getvalue() == "so far\n"
    assert clock.monotonic_s() == pytest.approx(2.5)


def test_log_requests_are_tried_again_as_often_as_asked(service, clock, follow):
    """One more try by default, then the real error; what was read before is not repeated."""
    service.add_lines("j", "1", timestamp_ms=1)
    service.fail_next("read_logs", DOWN)
    clock.at(2, lambda: service.add_lines("j", "2", timestamp_ms=2))
    clock.at(2, lambda: service.fail_next("read_logs", ProtocolError("cut off")))
    clock.at(5, lambda: service.set_state("j", "SUCCEEDED"))
    assert texts(follow("j")) == ["1", "2"]

    service.add_job("k")
    service.fail_next("read_logs", DOWN, DOWN, DOWN)
    with pytest.raises(ServiceUnavailableError, match="maintenance"):
        follow("k", get_logs_retries=2)
    service.fail_next("read_logs", DOWN)
    with pytest.raises(ServiceUnavailableError, match="maintenance"):
        follow("k", get_logs_retries=0)


def test_a_log_request_that_cannot_succeed_is_not_tried_again(service, follow):
    """A refusal is raised at once, however many tries there are."""
    service.fail_next("read_logs", AuthError("expired"))
    with pytest.raises(AuthError, match="expired"):
        follow("j", get_logs_retries=9)


def test_retries_wait_as_long_as_the_service_asks(service, clock, follow):
    """Retry-After is the least delay, with up to a tenth more; a delay past the deadline ends the tail instead."""
    service.fail_next("read_logs", ServiceUnavailableError("busy", retry_after_s=7))
    clock.at(6, lambda: service.set_state("j", "SUCCEEDED"))
    follow("j")
    assert any(7 <= slept <= 7.7 for slept in clock.sleeps)
    service.add_job("k")
    service.fail_next("read_logs", ServiceUnavailableError("busy", retry_after_s=7))
    before = clock.monotonic_s()
    assert texts(follow("k", timeout=5)) == []
    assert clock.monotonic_s() - before <= 5


def test_status_faults_do_not_end_a_tail(service, clock, follow):
    """Updates are stale while status requests fail; lines still come."""
    service.before_next("get_job", lambda: None, lambda: service.fail_next("get_job", DOWN, DOWN))
    clock.at(1.5, lambda: service.add_lines("j", "meanwhile", timestamp_ms=1))
    clock.at(5, lambda: service.set_state("j", "SUCCEEDED"))
    updates = follow("j")
    assert texts(updates) == ["meanwhile"]
    assert [update.status.stale for update in updates][:5] == [False, True, True, True, False]


def test_list_is_newest_first_limited_and_filtered(do):
    """Limits and filters hold across pages; names that the list lacks are requested."""
    service = FakeService(page_lines=2)
    for number in range(7):
        service.add_job(f"j{number}", state="FAILED" if number % 2 else "RUNNING", job_name=f"etl-{number}")
    ids = [row.job_id for row in do(AsyncJobClient.job_list, service=service)]
    assert ids == [f"j{number}" for number in reversed(range(7))]
    assert [row.job_id for row in do(AsyncJobClient.job_list, 3, service=service)] == ids[:3]
    assert [row.job_id for row in do(AsyncJobClient.job_list, 2, state="failed", service=service)] == ["j5", "j3"]
    assert [row.job_id for row in do(AsyncJobClient.job_list, name="*-[46]", service=service)] == ["j6", "j4"]
    with pytest.raises(ConfigError, match="'done' is not a job state; there is: PENDING"):
        do(AsyncJobClient.job_list, state="done", service=service)


class Nameless(FakeService):
    """A service whose list has no names, as that of Fused."""

    async def list_jobs(self):
        async for rows in super().list_jobs():
            yield [dataclasses.replace(row, job_name=None) for row in rows]


def test_names_that_the_list_lacks_are_requested_only_when_needed(do):
    """A name filter costs a status request a row; a plain list costs none."""
    service = Nameless()
    for number in range(3):
        service.add_job(f"j{number}", job_name=f"etl-{number}")
    assert len(do(AsyncJobClient.job_list, service=service)) == 3
    assert service.calls == [("list_jobs", "")]
    assert [row.job_name for row in do(AsyncJobClient.job_list, name="etl-1", service=service)] == ["etl-1"]


def test_submit_takes_a_list_or_a_shell_line(service, do):
    """A string goes to /bin/sh -c; a list is run as it is; everything else is passed on."""
    do(AsyncJobClient.job_submit, "echo a | wc", name="n", attributes={"team": "geo"}, timeout=5, cwd=Path("/tmp"))
    do(AsyncJobClient.job_submit, ["echo", "a b"], env={"A": "1"})
    assert service.submitted == [
        {
            "command": ["/bin/sh", "-c", "echo a | wc"],
            "name": "n",
            "timeout_s": 5,
            "cwd": "/tmp",
            "env": {},
            "attributes": {"team": "geo"},
        },
        {"command": ["echo", "a b"], "name": None, "timeout_s": None, "cwd": None, "env": {"A": "1"}, "attributes": {}},
    ]


def test_a_shell_line_is_called_after_its_program(service, do):
    """Not after the shell; a list keeps the service's own name."""
    do(AsyncJobClient.job_submit, "echo hi")
    do(AsyncJobClient.job_submit, "for i in 1 2; do echo; done")
    do(AsyncJobClient.job_submit, ["echo", "hi"])
    assert [one["name"] for one in service.submitted] == ["echo", None, None]


@pytest.mark.parametrize("command", ["", []])
def test_submit_needs_a_command(command, do):
    """An empty command is rejected before any request."""
    with pytest.raises(ConfigError, match="there is no command to run"):
        do(AsyncJobClient.job_submit, command)


class ReadOnly(FakeService):
    """A service that takes no jobs."""

    submit = None  # type: ignore[assignment]


def test_bad_arguments_are_named(do, service):
    """Wrong seconds, wrong jobs and services that do not exist are configuration errors that name them."""
    for verb, args, words in (
        (AsyncJobClient.job_wait_for_job, ("j", 0), "poll_interval_seconds is 0"),
        (AsyncJobClient.job_wait_for_job, ("j", float("nan")), "poll_interval_seconds is nan"),
        (AsyncJobClient.job_tail_logs, ("j", -1), "refresh_seconds is -1"),
        (AsyncJobClient.job_get_status, (5,), "job is of type int: expected a job id"),
        (AsyncJobClient.job_get_status, ("",), "is not a job id"),
        (AsyncJobClient.job_get_status, ("a\nb",), "is not a job id"),
        (AsyncJobClient.job_get_status, ("a\udc80",), "is not a job id"),
    ):
        with pytest.raises(ConfigError, match=words):
            do(verb, *args)
    with pytest.raises(ConfigError, match="no service named 'nope'"):
        do(AsyncJobClient.job_get_status, "j", service="nope")


def test_named_services_are_opened_once_and_closed_with_the_client(monkeypatch, tmp_path):
    """A configured service is kept between calls; a service object of the caller's is not closed."""
    own = FakeService()
    own.add_job("j")

    async def run() -> tuple[JobService, JobService]:
        async with AsyncJobClient(load_settings()) as client:
            await client.job_get_status("j", service=own)
            return client.service("local"), client.service()

    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path))
    first, second = anyio.run(run)
    assert first is second
    assert ("aclose", "") not in own.calls


def test_a_status_of_another_client_is_asked_for_through_our_own_service(monkeypatch, tmp_path):
    """What another client opened by name belongs to its loop: the same name is opened here instead."""
    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path))

    async def run() -> tuple[JobService, JobService]:
        async with AsyncJobClient() as one:
            theirs = one.service("local")
            status = FakeService().add_job("j")
            async with AsyncJobClient() as two:
                found, _ = two._opened.find(dataclasses.replace(status, _origin=theirs), None)
                return theirs, found

    theirs, found = anyio.run(run)
    assert found is not theirs
    assert found.identity == theirs.identity


def test_a_changed_environment_is_noticed(monkeypatch, tmp_path):
    """A notebook that sets TAILSPAN_CONFIG after its first call gets the new configuration."""
    config = tmp_path / "config.toml"
    config.write_text('default_service = "other"\n[services.other]\ntype = "local"\n')
    client = AsyncJobClient()
    assert client.settings.default_service == "local"
    monkeypatch.setenv("TAILSPAN_CONFIG", str(config))
    assert client.settings.default_service == "other"
