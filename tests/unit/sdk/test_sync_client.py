"""`Client` and `RunResponse`: the verbs with settings of their own, as methods and as iterators."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
import threading
import warnings
from datetime import UTC, datetime, timedelta

import pytest

import tailspan
from tailspan import Client, InProgressWarning, JobState, RunResponse, client, jobs
from tailspan.config import load_settings
from tailspan.errors import ConfigError, ServiceUnavailableError, TailspanError
from tailspan.models import JobStatus, ListedJob
from tailspan.testing import FakeClock, FakeService


@pytest.fixture
def service():
    """Return a service in memory with one ended job, ``j``, of three lines."""
    service = FakeService(page_lines=2)
    service.add_job("j", job_name="etl")
    service.add_lines("j", "one", "two", "three", timestamp_ms=1000, step_ms=250)
    service.set_state("j", "SUCCEEDED")
    return service


@pytest.fixture
def one(service):
    """Return a client of that service."""
    with Client(service=service) as one:
        yield one


def texts(messages):
    """Return the lines."""
    return [message["message"] for message in messages]


def test_a_client_has_every_verb(one, capsys):
    """Jobs are found, submitted and listed by `jobs`; every verb is a method with a short name."""
    job = one.jobs.get("j")
    assert (type(job), job.state) == (RunResponse, JobState.SUCCEEDED)
    job.tail_logs(0.01, sample_logs=False)
    one.print_logs("j")
    assert capsys.readouterr().out == "one\ntwo\nthree\n" * 2
    new = one.jobs.submit(["true"], name="new")
    assert one.cancel(new).state is JobState.CANCELED
    assert [row.job_id for row in one.jobs.list()] == [row.job_id for row in one.list_jobs()] == [new.job_id, "j"]
    assert texts(one.get_logs("j")) == texts(one.iter_logs("j")) == ["one", "two", "three"]
    assert one.get_exec_time("j") == timedelta(milliseconds=500)
    assert one.wait_for_job("j") == one.get_status("j") == job


def test_a_client_has_settings_of_its_own(tmp_path, monkeypatch):
    """Two clients in one process read two configurations; the functions read the one of the process."""
    configs = []
    for name in ("a", "b"):
        config = tmp_path / f"{name}.toml"
        config.write_text(
            f'default_service = "{name}"\n[services.{name}]\ntype = "local"\nstate_dir = "{tmp_path / name}"\n'
        )
        configs.append(load_settings(config))
    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path / "process"))
    seen = []
    with Client(configs[0]) as a, Client(configs[1]) as b:
        for get in (a.jobs.get, b.jobs.get, tailspan.job_get_status):
            with pytest.raises(tailspan.JobNotFoundError) as caught:
                get("x")
            seen.append(caught.value.service)
    assert seen == ["a", "b", "local"]


def test_a_status_uses_the_client_that_returned_it(service, monkeypatch):
    """The methods of a handle go to its own client, which names the service; they need no global settings."""
    monkeypatch.setenv("TAILSPAN_CONFIG", "/nowhere/config.toml")
    with Client(service=service) as one:
        job = one.jobs.get("j")
        plain = pickle.loads(pickle.dumps(job))
        assert job.get_status() == job
        assert texts(job.iter_logs(1250)) == ["two", "three"]
        assert [update.complete for update in job.follow_logs(0.01)][-1]
        with pytest.raises(ConfigError):
            plain.get_status()


def test_a_closed_client_opens_again():
    """Closing ends the thread and the services; the next call begins again, and no thread is left."""
    before = threading.active_count()
    service = FakeService()
    service.add_job("j")
    with Client(service=service) as one:
        job = one.jobs.get("j")
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert job.get_status().job_id == "j"
    one.close()
    assert threading.active_count() == before
    assert ("aclose", "") not in service.calls


def test_iterators_hold_few_lines_and_may_stop_early(one, service):
    """A caller that takes two lines of a long log has at most the next page fetched."""
    service.add_job("long")
    service.add_lines("long", *map(str, range(1000)), timestamp_ms=1)
    read = []
    original = service.read_messages

    async def counting(job_id, since_ms=None):
        async for page in original(job_id, since_ms):
            read.append(len(page))
            yield page

    service.read_messages = counting
    lines = one.iter_logs("long")
    assert [next(lines)["message"] for _ in range(2)] == ["0", "1"]
    assert len(read) <= 2
    lines.close()
    for update in one.follow_logs("long", 0.01):
        assert update.messages
        break
    assert one.get_status("j").job_id == "j"


def test_iterators_raise_the_errors_of_the_service(one, service):
    """The error reaches the loop that iterates."""
    service.fail_next("read_messages", ServiceUnavailableError("down"))
    with pytest.raises(ServiceUnavailableError, match="down"):
        list(one.iter_logs("j"))
    with pytest.raises(tailspan.JobNotFoundError):
        list(one.follow_logs("k"))


def test_times_may_be_numbers_or_objects(service):
    """A moment is ms, an aware datetime or how long ago; a duration is seconds or a timedelta."""
    clock = FakeClock(2.0)
    with Client(service=service, clock=clock) as one:
        job = one.jobs.get("j")
        for since in (1250, datetime.fromtimestamp(1.25, UTC), timedelta(milliseconds=750)):
            assert texts(job.get_logs(since)) == texts(one.iter_logs(job, since)) == ["two", "three"]
        with pytest.raises(ConfigError, match="has no time zone"):
            job.get_logs(datetime(2026, 3, 1))  # noqa: DTZ001 - the wrong kind
        service.add_job("r")
        with pytest.raises(TimeoutError, match="after 1 s"):
            one.jobs.get("r").wait_for_job(timedelta(seconds=2), timedelta(seconds=1))
        assert clock.sleeps == [1.0]


@pytest.mark.parametrize("name", [name.removeprefix("job_") for name in jobs.__all__])
def test_methods_take_the_options_of_the_functions(name):
    """A client's method has the parameters of the function; a status's method all but the job."""
    function = list(inspect.signature(getattr(jobs, f"job_{name}")).parameters.values())
    method = list(inspect.signature(getattr(Client, "list_jobs" if name == "list" else name)).parameters.values())[1:]
    assert [(one.name, one.kind, one.default) for one in method] == [
        (one.name, one.kind, one.default) for one in function
    ]
    if function[0].name == "job":
        handle = list(inspect.signature(getattr(RunResponse, name)).parameters.values())[1:]
        assert [(one.name, one.kind, one.default) for one in handle] == [
            (one.name, one.kind, one.default) for one in function[1:]
        ]


def test_options_reach_the_verb(service, capsys):
    """A handle's method prints to the given file and reads from the given service."""
    out = io.StringIO()
    other = FakeService("other")
    other.add_job("j")
    with Client(service=service) as one:
        job = one.jobs.get("j")
        job.tail_logs(0.01, False, file=out, settle_seconds=0)
        assert job.get_status(service=other).service == "other"
        job.print_logs(file=out, service=other)
    assert out.getvalue() == "one\ntwo\nthree\n"
    assert capsys.readouterr().out == ""


def test_warnings_point_at_the_caller(service):
    """Of the function, of the client's method and of the status's method alike."""
    service.add_job("r")
    with Client(service=service) as one, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one.get_exec_time("r")
        one.jobs.get("r").get_exec_time()
        jobs.job_get_exec_time("r", service=service)
    assert [(one.category, one.filename) for one in caught] == [(InProgressWarning, __file__)] * 3


def test_a_status_is_a_key_and_a_value(one, service):
    """Two answers about one job have one hash; they are equal only while all fields are."""
    first = one.jobs.get("j")
    again = service.set_state("j", "SUCCEEDED", finished_at=first.finished_at)
    assert type(again) is JobStatus
    assert (first == again, hash(first) == hash(again)) == (True, True)
    changed = service.set_state("j", "FAILED", finished_at=first.finished_at)
    assert (first == changed, hash(first) == hash(changed)) == (False, True)
    assert len({first, again, changed}) == 2
    for twin in (copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert (type(twin), twin) == (RunResponse, first)
    assert first != "j"


def test_a_repr_shows_what_is_set(service):
    """One short line without what the state implies and what only the agent uses."""
    status = JobStatus.from_state(
        JobState.RUNNING, job_id="j", job_name="etl", identity="i", trace_id="0" * 32, started_at=datetime.now(UTC)
    )
    assert repr(status).startswith("JobStatus(job_id='j', job_name='etl', state=RUNNING, started_at='20")
    assert len(repr(status)) < 200
    assert repr(ListedJob(job_id="j", lines=3)) == "ListedJob(job_id='j', lines=3)"


def test_only_an_error_that_may_pass_is_retryable():
    """Every error of the tree has the attribute, so a caller needs no class."""
    assert TailspanError("x").retryable is False
    assert tailspan.JobNotFoundError("x").retryable is False
    assert ServiceUnavailableError("x").retryable is True


def test_the_examples_of_the_verbs_run(monkeypatch):
    """Each docstring's example prints what it shows, on a service in memory."""
    service = FakeService()
    service.add_job("nightly-42", job_name="nightly")
    service.add_lines("nightly-42", "started", "done", timestamp_ms=1000, step_ms=2500)
    service.set_state("nightly-42", "SUCCEEDED")
    service.add_job("nightly-43")
    with Client(service=service) as one:
        monkeypatch.setattr(client, "_process_client", one)
        tests = [test for test in doctest.DocTestFinder(recurse=True).find(jobs) if test.examples]
        assert {test.name.rpartition(".")[2] for test in tests} == set(jobs.__all__)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        for test in tests:
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
