"""The conformance kit: good services pass it, and of each promise it finds a service that breaks it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tailspan._conformance import PROMISES
from tailspan.errors import ConfigError, JobNotFoundError
from tailspan.logs.page import LogPage
from tailspan.models import JobState
from tailspan.services import JobService
from tailspan.testing import FakeService, ServiceConformance, check_service


class Good(FakeService):
    """A fake service with an ended job of seven lines in three pages, and another ended job."""

    def __init__(self) -> None:
        super().__init__(page_lines=3)
        for job_id in ("older", "j"):
            self.add_job(job_id)
            self.add_lines(job_id, *"abcdefg", timestamp_ms=1_000, step_ms=10)
            self.set_state(job_id, JobState.SUCCEEDED)


class TestFakeService(ServiceConformance):
    """The fake keeps all promises, each as a test of its own."""

    def make_service(self) -> JobService:
        """Return the fake."""
        return Good()


class TestOneJob(ServiceConformance):
    """A service whose list is empty is checked by the job that is named."""

    job_id = "older"

    def make_service(self) -> JobService:
        """Return a fake that lists nothing."""
        return Unlisted()


class Unlisted(Good):
    async def list_jobs(self):
        for page in ():
            yield page


class NoBase:
    name, identity = "x", "y"


class ReadsAtOnce(Good):
    def __init__(self) -> None:
        super().__init__()
        Path(os.devnull).read_bytes()


class NewIdentity(Good):
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.identity = f"fake-{next(self.numbers)}"


class WrongStatus(Good):
    async def get_job(self, job_id):
        return dataclasses.replace(await super().get_job(job_id), job_id="other")


class KnowsEverything(Good):
    async def get_job(self, job_id):
        return self._status("j")


class KeyErrors(Good):
    async def get_job(self, job_id):
        try:
            return await super().get_job(job_id)
        except JobNotFoundError:
            raise KeyError(job_id) from None


class Empty(Good):
    async def read_logs(self, job_id, cursor=None, **options):
        async for page in super().read_logs(job_id, cursor, **options):
            yield page
        yield LogPage([], [], b"7")


class Unordered(Good):
    def __init__(self) -> None:
        super().__init__()
        self.add_lines("j", "old", timestamp_ms=1)


class SameUids(Good):
    async def read_logs(self, job_id, cursor=None, **options):
        async for page in super().read_logs(job_id, cursor, **options):
            yield LogPage(page.lines, page.runs, page.cursor, b"12345678" * page.line_count)


class RepeatsLines(Good):
    async def read_logs(self, job_id, cursor=None, **options):
        earlier = None if cursor is None else b"%d" % max(0, int(cursor) - 1)
        async for page in super().read_logs(job_id, earlier, **options):
            yield page


class LosesLines(Good):
    async def read_logs(self, job_id, cursor=None, **options):
        later = None if cursor is None else b"%d" % (int(cursor) + 1)
        async for page in super().read_logs(job_id, later, **options):
            yield page


class CannotClose(Good):
    async def read_logs(self, job_id, cursor=None, **options):
        async for page in super().read_logs(job_id, cursor, **options):
            try:
                yield page
            except GeneratorExit:
                yield page


class ListOfPages(Good):
    def read_logs(self, job_id, cursor=None, **options):
        return iter(())


class IgnoresSince(Good):
    async def read_logs(self, job_id, cursor=None, *, since_ms=None, **options):
        async for page in super().read_logs(job_id, cursor, **options):
            yield page


class MessagesBackwards(Good):
    async def read_messages(self, job_id, since_ms=None):
        found = [message async for page in super().read_messages(job_id, since_ms) for message in page]
        yield found[::-1]


class WrongTimes(Good):
    async def log_times_ms(self, job_id):
        first, last = await super().log_times_ms(job_id)
        return first, last + 1


class ListsTwice(Good):
    async def list_jobs(self):
        async for page in super().list_jobs():
            yield [*page, page[0]]


class OldestFirst(Good):
    async def list_jobs(self):
        async for page in super().list_jobs():
            yield page[::-1]


class CancelsEnded(Good):
    async def cancel(self, job_id):
        self._job(job_id)
        return self.set_state(job_id, JobState.CANCELED)


class ClosesOnce(Good):
    async def aclose(self):
        if ("aclose", "") in self.calls:
            raise RuntimeError("closed already")
        await super().aclose()


BROKEN = [
    ("base_class", NoBase, "__init__", "not a subclass of tailspan.services.JobService"),
    ("constructor", ReadsAtOnce, "__init__", f"does I/O: open {os.devnull}"),
    ("identity", NewIdentity, "identity", "for a second object with the same options"),
    ("unknown_jobs", KnowsEverything, "get_job", "raises nothing for an unknown job"),
    ("errors", KeyErrors, "get_job", "raises KeyError"),
    ("get_job", WrongStatus, "get_job", "returns job_id 'other' for job 'j'"),
    ("pages", Empty, "read_logs", "page 4 is empty"),
    ("pages", Unordered, "read_logs", "line 8 is older than the line before it"),
    ("pages", SameUids, "read_logs", "two lines have the uid 3132333435363738"),
    ("pages", ListOfPages, "read_logs", "not an async generator"),
    ("resume", RepeatsLines, "read_logs", "after the cursor of page 1 yields 5 lines instead of 4"),
    ("resume", LosesLines, "read_logs", "after the cursor of page 1 yields 3 lines instead of 4: 1 missing"),
    ("early_close", CannotClose, "read_logs", "async generator ignored GeneratorExit"),
    ("since_ms", IgnoresSince, "read_logs", "with since_ms=1030 yields 7 lines instead of 4"),
    ("messages", MessagesBackwards, "read_messages", "does not yield the oldest lines first"),
    ("log_times", WrongTimes, "log_times_ms", r"returns \(1000, 1061\)"),
    ("list_jobs", ListsTwice, "list_jobs", "yields job 'j' more than once"),
    ("list_jobs", OldestFirst, "list_jobs", "yields job 'older' before 'j', which is newer"),
    ("cancel", CancelsEnded, "cancel", "of a job that is SUCCEEDED returns CANCELED"),
    ("aclose", ClosesOnce, "aclose", "called twice raises RuntimeError"),
]


def test_each_promise_has_a_service_that_breaks_it():
    """No promise is untested, and each has a test in the class for pytest."""
    assert {promise for promise, *_ in BROKEN} == set(PROMISES)
    tests = {name.removeprefix("test_") for name in vars(ServiceConformance) if name.startswith("test_")}
    assert tests == set(PROMISES)


@pytest.mark.parametrize(("promise", "kind", "method", "text"), BROKEN, ids=[kind.__name__ for _, kind, _, _ in BROKEN])
def test_a_broken_promise_is_found_with_its_place(promise, kind, method, text):
    """The message has the promise, what the method did, and the file and line where the method begins."""
    with pytest.raises(AssertionError, match=text) as caught:
        check_service(kind)
    (first, *_) = [
        line for line in str(caught.value).splitlines() if f"(promise {promise!r}" in line or promise == "pages"
    ]
    fault = getattr(kind, method) if method in vars(kind) else vars(kind).get("__init__", kind)
    if kind is Unordered:  # it adds a line, and inherits the method
        fault = FakeService.read_logs
    line = inspect.getsourcelines(fault)[1]
    assert first.startswith(f"{inspect.getsourcefile(fault)}:{line}: {kind.__name__}.{method}: ")


def test_a_good_service_object_passes_and_is_closed():
    """Without a function that makes services, all but the constructor is checked."""
    service = Good()
    check_service(service)
    assert service.calls.count(("aclose", "")) == 2


def test_the_kit_says_what_it_needs():
    """A service without a log to read is not passed silently, and an unknown promise is named."""
    with pytest.raises(AssertionError, match="no ended job with at least two lines"):
        check_service(FakeService())
    with pytest.raises(ConfigError, match="there is no promise 'speed'; there is: base_class"):
        check_service(Good, promises=["speed"])


def test_a_method_that_hangs_is_ended(monkeypatch):
    """The kit does not wait for ever."""

    class Hangs(Good):
        async def log_times_ms(self, job_id):
            await anyio.sleep_forever()

    monkeypatch.setattr("tailspan._conformance._TIMEOUT_S", 0.05)
    with pytest.raises(AssertionError, match=r"log_times_ms: did not end within 0.05 s"):
        check_service(Hangs, promises=["log_times"])


def test_the_kit_needs_no_pytest():
    """A program that uses the fakes does not import a test framework."""
    code = "import sys, tailspan.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
