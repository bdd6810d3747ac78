"""The promises of a job service, and checks that find out which ones a service breaks, and where.

`tailspan.testing.check_service` and `tailspan.testing.ServiceConformance` are the public side.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import anyio

from tailspan._plural import plural
from tailspan.errors import JobNotFoundError, TailspanError
from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LogPage
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import JobService

__all__ = ["PROMISES", "BrokenPromise", "find_broken_promises"]

T = TypeVar("T")

_TIMEOUT_S = 60.0
_MAX_CURSORS = 20
_MAX_LISTED = 10_000
_ODD_IDS = ("../j", "a/b?c=d#e", "snow\u2603man", "%2e%2e")


@dataclass(frozen=True)
class BrokenPromise:
    """A promise that a service does not keep.

    Attributes:
        promise: Its name, a key of `PROMISES`.
        text: What the check saw.
        method: The method at fault.
        file: The source file of that method, if it has one.
        line: The line in it where the method begins.
    """

    promise: str
    text: str
    method: str
    file: str | None
    line: int | None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file else ""
        return f"{place}{self.method}: {self.text} (promise {self.promise!r}: {PROMISES[self.promise].text})"


def find_broken_promises(
    service: JobService | Callable[[], JobService], *, job_id: str | None, promises: Sequence[str]
) -> list[BrokenPromise]:
    """Return the promises that a service breaks; see `tailspan.testing.check_service`."""
    return anyio.run(functools.partial(_find, service, job_id, promises))


class _Broken(Exception):
    def __init__(self, method: str, text: str, promise: str | None = None) -> None:
        super().__init__(text)
        self.method = method
        self.text = text
        self.promise = promise


class _Row(NamedTuple):
    uid: str
    time_unix_nano: int
    line: bytes


@dataclass
class _Subject:
    """The service under test, with what its methods return for one ended job."""

    service: JobService
    make: Callable[[], JobService] | None
    job_id: str = ""
    was_listed: bool = False
    status: JobStatus | None = None
    pages: list[LogPage] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Await a method; an error outside our tree breaks a promise."""
        with _own_errors(method):
            return await getattr(self.service, method)(*args, **kwargs)

    async def all_of(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Return all that a method yields."""
        found: list[Any] = []
        with _own_errors(method):
            async with aclosing(self.generator(method, *args, **kwargs)) as items:
                async for item in items:
                    found.append(item)
                    if method == "list_jobs" and sum(map(len, found)) > _MAX_LISTED:
                        break
        return found

    def generator(self, method: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        with _own_errors(method):
            items = getattr(self.service, method)(*args, **kwargs)
        for needed in ("__aiter__", "__anext__", "aclose"):
            if not hasattr(items, needed):
                raise _Broken(method, f"returns {type(items).__name__}, not an async generator (no {needed})")
        return items  # type: ignore[no-any-return]  # it has the methods of one

    async def read_rows(self, cursor: bytes | None = None, **options: Any) -> list[_Row]:
        return _rows(await self.all_of("read_logs", self.job_id, cursor, **options))


class _Promise(NamedTuple):
    method: str
    text: str
    check: Callable[[_Subject], Awaitable[None]]
    needs_job: bool = True


@contextmanager
def _own_errors(method: str) -> Iterator[None]:
    try:
        yield
    except (TailspanError, _Broken):
        raise
    except Exception as error:
        raise _Broken(
            method, f"raises {type(error).__name__} ({error}), which is not a TailspanError", "errors"
        ) from error


async def _find(
    service: JobService | Callable[[], JobService], job_id: str | None, promises: Sequence[str]
) -> list[BrokenPromise]:
    make = None if isinstance(service, JobService) or not callable(service) else service
    made: Any = make() if make is not None else service
    subject = _Subject(made, make)
    if not isinstance(made, JobService):
        return [
            _broken(subject, "base_class", _Broken("__init__", "is not a subclass of tailspan.services.JobService"))
        ]
    found: list[BrokenPromise] = []
    if any(PROMISES[name].needs_job for name in promises):
        with _collected(subject, "get_job", found):
            await _observe(subject, job_id)
    for name, promise in PROMISES.items():
        # Without a job, what follows from it would only repeat the first finding.
        if name not in promises or (promise.needs_job and subject.status is None):
            continue
        with _collected(subject, name, found):
            with anyio.move_on_after(_TIMEOUT_S) as scope:
                await promise.check(subject)
            if scope.cancelled_caught:
                raise _Broken(promise.method, f"did not end within {_TIMEOUT_S:g} s")
    if "aclose" not in promises:
        await subject.service.aclose()
    return found


@contextmanager
def _collected(subject: _Subject, name: str, found: list[BrokenPromise]) -> Iterator[None]:
    try:
        yield
    except _Broken as broken:
        found.append(_broken(subject, broken.promise or name, broken))
    except TailspanError as error:
        text = f"raises {type(error).__name__}: {error}"
        found.append(_broken(subject, name, _Broken(PROMISES[name].method, text)))


def _broken(subject: _Subject, name: str, broken: _Broken) -> BrokenPromise:
    kind = type(subject.service)
    found: Any = inspect.getattr_static(subject.service, broken.method, None)
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    elif not inspect.isroutine(found):
        found = kind.__init__  # an attribute: the constructor sets it
    found = inspect.unwrap(getattr(found, "__func__", found))
    code = getattr(found, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else _place_of(kind)
    return BrokenPromise(name, broken.text, f"{kind.__qualname__}.{broken.method}", file, line)


def _place_of(kind: type) -> tuple[str | None, int | None]:
    try:
        return inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):
        return None, None


async def _observe(subject: _Subject, job_id: str | None) -> None:
    """Choose an ended job with at least two lines, and read it."""
    if job_id is not None:
        candidates = [job_id]
    else:
        listed: list[Sequence[ListedJob]] = await subject.all_of("list_jobs")
        candidates = [row.job_id for page in listed for row in page]
        subject.was_listed = True
    for candidate in candidates:
        status = await subject.call("get_job", candidate)
        if not isinstance(status, JobStatus):
            raise _Broken("get_job", f"returns {type(status).__name__}, not a JobStatus")
        if not status.state.is_terminal:
            continue
        pages = await subject.all_of("read_logs", candidate)
        if sum(page.line_count for page in pages) >= 2:
            subject.job_id, subject.status, subject.pages, subject.rows = candidate, status, pages, _rows(pages)
            return
    text = "has no ended job with at least two lines, which the checks need: make one, or pass job_id"
    raise _Broken("list_jobs" if job_id is None else "get_job", text)


def _rows(pages: Sequence[LogPage]) -> list[_Row]:
    return [
        _Row(*row)
        for page in pages
        for row in zip(page.uids(), page.times_unix_nano(), page.lines, strict=False)  # `pages` checks the numbers
    ]


# The checks, in the order of PROMISES.


async def _check_constructor(subject: _Subject) -> None:
    if subject.make is None:
        return
    with _recorded_io() as events:
        extra = subject.make()
    with _own_errors("aclose"):
        await extra.aclose()
    if events:
        raise _Broken("__init__", f"does I/O: {', '.join(events[:3])}")


async def _check_identity(subject: _Subject) -> None:
    service = subject.service
    for name in ("name", "identity"):
        with _own_errors(name):
            try:
                value = getattr(service, name)
            except AttributeError:
                raise _Broken(name, "is not set") from None
        if not isinstance(value, str) or not value:
            raise _Broken(name, f"is {value!r}, not a text")
    before = service.identity
    if subject.make is not None:
        with _own_errors("__init__"):
            extra = subject.make()
        other = extra.identity
        await extra.aclose()
        if other != before:
            raise _Broken("identity", f"is {before!r}, and {other!r} for a second object with the same options")
    if service.identity != before:
        raise _Broken("identity", f"changes from {before!r} to {service.identity!r}")


async def _check_status(subject: _Subject) -> None:
    status = subject.status
    assert status is not None
    if status.job_id != subject.job_id:
        raise _Broken("get_job", f"returns job_id {status.job_id!r} for job {subject.job_id!r}")
    if not isinstance(status.state, JobState):
        raise _Broken("get_job", f"returns state {status.state!r}, not a JobState")
    if len(status.trace_id) != 32 or not set(status.trace_id) <= set("0123456789abcdef"):
        raise _Broken("get_job", f"returns trace_id {status.trace_id!r}, not 32 lower-case hexadecimal digits")
    again: JobStatus = await subject.call("get_job", subject.job_id)
    if (again.trace_id, again.identity, again.state) != (status.trace_id, status.identity, status.state):
        raise _Broken("get_job", "returns another trace_id, identity or state for an ended job the second time")


async def _check_unknown_jobs(subject: _Subject) -> None:
    unknown = f"no-such-job-{uuid.uuid4().hex}"
    for method in ("get_job", "cancel", "log_times_ms", "read_logs", "read_messages"):
        generates = method.startswith("read_")
        try:
            await (subject.all_of(method, unknown) if generates else subject.call(method, unknown))
        except JobNotFoundError:
            continue
        except TailspanError as error:
            raise _Broken(method, f"raises {type(error).__name__} for an unknown job, not JobNotFoundError") from error
        raise _Broken(method, "raises nothing for an unknown job, not JobNotFoundError")


async def _check_errors(subject: _Subject) -> None:
    for job_id in _ODD_IDS:
        for method in ("get_job", "read_logs"):
            try:
                await (subject.all_of(method, job_id) if method == "read_logs" else subject.call(method, job_id))
            except TailspanError:
                continue


async def _check_pages(subject: _Subject) -> None:
    for number, page in enumerate(subject.pages, 1):
        fault = _fault_of(page)
        if fault:
            raise _Broken("read_logs", f"page {number} {fault}")
    uids = [row.uid for row in subject.rows]
    if len(set(uids)) < len(uids):
        repeated = next(uid for uid in uids if uids.count(uid) > 1)
        raise _Broken("read_logs", f"two lines have the uid {repeated}")
    times = [row.time_unix_nano // NANOS_PER_MS for row in subject.rows]
    for index, (one, other) in enumerate(itertools.pairwise(times), 2):
        if other < one:
            raise _Broken("read_logs", f"line {index} is older than the line before it")
    if await subject.read_rows() != subject.rows:
        raise _Broken("read_logs", "yields other lines, times or uids the second time")


def _fault_of(page: LogPage) -> str | None:
    count = page.line_count
    faults = {
        "is empty": not count,
        f"has over {MAX_PAGE_LINES} lines: {count}": count > MAX_PAGE_LINES,
        f"has over {MAX_PAGE_BYTES} bytes and more than one line": count > 1 and _size(page) > MAX_PAGE_BYTES,
        "has runs of another number of lines": sum(run.lines for run in page.runs) != len(page.lines),
        f"has a cursor of type {type(page.cursor).__name__}, not bytes": not isinstance(page.cursor, bytes),
        "has digests of another number of lines": bool(page.digests) and len(page.digests) != DIGEST_BYTES * count,
        "has neither digests nor uid prefixes": not page.digests and not all(run.uid_prefix for run in page.runs),
    }
    return next((text for text, is_so in faults.items() if is_so), None)


def _size(page: LogPage) -> int:
    return sum(map(len, page.lines))


async def _check_resume(subject: _Subject) -> None:
    step = max(1, len(subject.pages) // _MAX_CURSORS)
    read = 0
    for number, page in enumerate(subject.pages, 1):
        read += page.line_count
        if number % step and number < len(subject.pages):
            continue
        found, expected = await subject.read_rows(page.cursor), subject.rows[read:]
        if found != expected:
            raise _Broken("read_logs", _difference(f"after the cursor of page {number}", found, expected))


def _difference(when: str, found: Sequence[_Row], expected: Sequence[_Row]) -> str:
    if [row.line for row in found] == [row.line for row in expected]:
        return f"{when} yields the right lines with other times or uids"
    missing, extra = len(set(expected) - set(found)), len(set(found) - set(expected))
    text = f"{when} yields {len(found)} {plural(len(found), 'line')} instead of {len(expected)}"
    return f"{text}: {missing} missing, {extra} that do not belong there, {len(found) - len(set(found))} repeated"


async def _check_early_close(subject: _Subject) -> None:
    for method, args in (("read_logs", (subject.job_id,)), ("read_messages", (subject.job_id,)), ("list_jobs", ())):
        items = subject.generator(method, *args)
        try:
            await anext(items, None)
            await items.aclose()
        except TailspanError:
            raise
        except Exception as error:
            raise _Broken(method, f"raises {type(error).__name__} ({error}) when it is closed early") from error
    if await subject.read_rows() != subject.rows:
        raise _Broken("read_logs", "yields other lines after an earlier read was closed early")


async def _check_since(subject: _Subject) -> None:
    middle_ms = subject.rows[len(subject.rows) // 2].time_unix_nano // NANOS_PER_MS
    last_ms = max(row.time_unix_nano for row in subject.rows) // NANOS_PER_MS
    for since_ms in (middle_ms, last_ms + 1):
        expected = [row for row in subject.rows if row.time_unix_nano >= since_ms * NANOS_PER_MS]
        found = await subject.read_rows(since_ms=since_ms)
        if found != expected:
            raise _Broken("read_logs", _difference(f"with since_ms={since_ms}", found, expected))
        messages = await subject.all_of("read_messages", subject.job_id, since_ms)
        if sum(map(len, messages)) != len(expected):
            count = sum(map(len, messages))
            yielded = f"{count} {plural(count, 'line')}"
            raise _Broken("read_messages", f"with since_ms={since_ms} yields {yielded} instead of {len(expected)}")


async def _check_messages(subject: _Subject) -> None:
    found = [message for page in await subject.all_of("read_messages", subject.job_id) for message in page]
    for message in found:
        if not isinstance(message.get("message"), str) or not isinstance(message.get("timestamp"), int):
            raise _Broken("read_messages", f"yields {message!r} without a text `message` and a whole `timestamp`")
    times = [message["timestamp"] for message in found]
    if times != sorted(times):
        raise _Broken("read_messages", "does not yield the oldest lines first")
    texts = sorted((message["timestamp"], message["message"]) for message in found)
    expected = [(row.time_unix_nano // NANOS_PER_MS, row.line.decode("utf-8", "replace")) for row in subject.rows]
    if texts != sorted(expected):
        yielded = f"{len(texts)} {plural(len(texts), 'line')}"
        raise _Broken("read_messages", f"yields {yielded}, not the {len(expected)} of read_logs")


async def _check_log_times(subject: _Subject) -> None:
    times = [row.time_unix_nano // NANOS_PER_MS for row in subject.rows]
    expected = (min(times), max(times))
    found = await subject.call("log_times_ms", subject.job_id)
    if found != expected:
        raise _Broken("log_times_ms", f"returns {found!r}; the first and the last line are of {expected!r}")


async def _check_list(subject: _Subject) -> None:
    rows: list[ListedJob] = [row for page in await subject.all_of("list_jobs") for row in page]
    ids = [row.job_id for row in rows]
    repeated = next((job_id for job_id in ids if ids.count(job_id) > 1), None) if len(set(ids)) < len(ids) else None
    if repeated is not None:
        raise _Broken("list_jobs", f"yields job {repeated!r} more than once")
    made = [(row.created_at, row.job_id) for row in rows if row.created_at is not None]
    for (newer, one), (older, other) in itertools.pairwise(made):
        if older > newer:
            raise _Broken("list_jobs", f"yields job {one!r} before {other!r}, which is newer")
    again = [row.job_id for page in await subject.all_of("list_jobs") for row in page]
    if not set(ids) <= set(again):
        raise _Broken("list_jobs", f"does not yield job {min(set(ids) - set(again))!r} the second time")


async def _check_cancel(subject: _Subject) -> None:
    before = subject.status
    assert before is not None
    answer = await subject.call("cancel", subject.job_id)
    if not isinstance(answer, JobStatus):
        raise _Broken("cancel", f"returns {type(answer).__name__}, not a JobStatus")
    after = await subject.call("get_job", subject.job_id)
    for text, state in (("returns", answer.state), ("leaves the job", after.state)):
        if state is not before.state:
            raise _Broken("cancel", f"of a job that is {before.state} {text} {state}")
    if await subject.read_rows() != subject.rows:
        raise _Broken("cancel", "of an ended job changes its log")


async def _check_aclose(subject: _Subject) -> None:
    for times in ("once", "twice"):
        try:
            await subject.service.aclose()
        except Exception as error:
            raise _Broken("aclose", f"called {times} raises {type(error).__name__} ({error})") from error


async def _check_base_class(subject: _Subject) -> None:
    """Checked before all others: without the base class, there is nothing to call."""


PROMISES: Mapping[str, _Promise] = {
    "base_class": _Promise("__init__", "is a subclass of tailspan.services.JobService", _check_base_class, False),
    "constructor": _Promise("__init__", "is made without reading, writing or connecting", _check_constructor, False),
    "identity": _Promise("identity", "has a name and an identity that never change", _check_identity, False),
    "unknown_jobs": _Promise(
        "get_job", "raises JobNotFoundError for a job it does not have", _check_unknown_jobs, False
    ),
    "errors": _Promise("get_job", "raises only errors of tailspan.errors", _check_errors, False),
    "get_job": _Promise("get_job", "reports a whole status, the same for an ended job", _check_status),
    "pages": _Promise("read_logs", "yields full pages within the limits, in order, with unique uids", _check_pages),
    "resume": _Promise("read_logs", "continues at every cursor with the rest, each line once", _check_resume),
    "early_close": _Promise("read_logs", "may be closed at any page", _check_early_close),
    "since_ms": _Promise("read_logs", "yields the lines at or after since_ms", _check_since),
    "messages": _Promise("read_messages", "yields the lines of read_logs, oldest first", _check_messages),
    "log_times": _Promise("log_times_ms", "agrees with the lines", _check_log_times),
    "list_jobs": _Promise("list_jobs", "lists each job once, newest first", _check_list, False),
    "cancel": _Promise("cancel", "changes nothing about an ended job", _check_cancel),
    "aclose": _Promise("aclose", "may be closed twice", _check_aclose, False),
}


_IO_EVENTS = {
    "open",
    "os.chmod",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.scandir",
    "os.symlink",
    "os.system",
    "shutil.copyfile",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "sqlite3.connect",
    "subprocess.Popen",
}
_recording = threading.local()


@contextmanager
def _recorded_io() -> Iterator[list[str]]:
    """Record what this thread reads, writes and connects to; imports do not count."""
    _install_hook()
    _recording.events = events = list[str]()
    try:
        yield events
    finally:
        _recording.events = None


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_record)  # there is no way to remove one


def _record(event: str, args: tuple[Any, ...]) -> None:
    events = getattr(_recording, "events", None)
    if events is None or event not in _IO_EVENTS:
        return
    what = args[0] if args and isinstance(args[0], str | bytes | os.PathLike) else args[1] if len(args) > 1 else ""
    if event == "open" and str(what).endswith((".py", ".pyc", ".so")):
        return
    events.append(f"{event} {what!s}".strip())
