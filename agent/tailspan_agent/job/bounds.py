"""Bring what a job service returns into range before it enters the agent. Pure.

A service, or a file that any program can write, may report anything: an end in the year 9999, an exit code of 300
digits, half of a surrogate pair, a megabyte of attributes. SQLite and OTLP have 64 bits and UTF-8. So `Source` passes
each status, row and page through these functions, and all other code may rely on the ranges.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Any

from tailspan._identity import is_trace_id, trace_id
from tailspan.logs.clean import is_clean
from tailspan.logs.page import CLEAN, MAX_PAGE_LINES, LineRun, LogPage, OpenLine, Stream, TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan_agent.otlp.text import shorten_middle

__all__ = [
    "DROPPED_ATTRIBUTES",
    "LATEST_NS",
    "MAX_AHEAD",
    "MAX_ATTRIBUTES",
    "MAX_ATTRIBUTE_BYTES",
    "MAX_KEY_BYTES",
    "MAX_TASKS_BYTES",
    "MAX_TASK_RUNS",
    "MAX_VALUE_BYTES",
    "bounded_open_line",
    "bounded_page",
    "bounded_row",
    "bounded_status",
    "bounded_tasks",
    "is_reserved",
]

DROPPED_ATTRIBUTES = "tailspan.attributes.dropped"
"""The attribute that counts the attributes of a job that were dropped or cut."""

MAX_ATTRIBUTES = 64
MAX_KEY_BYTES = 128
"""VictoriaLogs takes no longer name of a field."""
MAX_VALUE_BYTES = 2048
MAX_ATTRIBUTE_BYTES = 16 * 1024
"""Limit of a job's attributes together: stores copy them to each line, and Loki takes 64 KB with it."""

MAX_TASK_RUNS = 10_000
"""Each attempt that has ended is a span, and all are requested with each status."""

MAX_TASKS_BYTES = 8 << 20
"""Limit of the texts of a job's task runs together, without their ids and names, in bytes."""

MAX_AHEAD = timedelta(days=1)
"""How far a time may be in the future: clocks and time zones differ. Later times mean "not known" (the year 9999)."""

LATEST_NS = (1 << 63) - 1 - MAX_PAGE_LINES
"""The latest time of a line, in ns since the epoch (the year 2262); the lines after it in a run still fit 64 bits."""

_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
# A machine without a battery starts in 1970 and gets the time later: until then, no time is too late.
_EARLIEST_NOW = datetime(2026, 1, 1, tzinfo=UTC)

_MAX_COUNT = 1 << 53
_MAX_ATTEMPT = 1 << 31
_EXIT_CODES = range(-(1 << 31), 1 << 32)
_MAX_NAME_BYTES = 1024
_MAX_TEXT_BYTES = 8192
_SHORT_ERROR_BYTES = 256
_MAX_AFTER = 128
_STREAMS = frozenset(range(len(Stream.NAMES)))
_SEVERITIES = frozenset(range(25))
_DETAILS_SCALE = 4
"""Details are on one span only, and a command line may be long."""

_RESERVED = re.compile(
    r"(?:cicd|tailspan|host|telemetry|exception)(?:_.*)?|service_(?:name|namespace|instance_id)|log_record_uid|log_iostream"
    r"|error_type",
    re.DOTALL,
)
_RESERVED_DETAILS = re.compile(
    r"(?:cicd|tailspan|telemetry|exception|service|log)(?:_.*)?|error_type|process_exit_code", re.DOTALL
)
_NO_WORD = re.compile(r"[^a-z0-9]+")


def is_reserved(key: str) -> bool:
    """Return whether a job may not set an attribute, in any spelling that a store makes equal to it.

    Args:
        key: The key. Loki and Prometheus write ``service.instance.id`` as ``service_instance_id``.
    """
    return _RESERVED.fullmatch(_spelling(key)) is not None


def bounded_status(status: JobStatus, job_id: str, *, identity: str, now: datetime) -> tuple[JobStatus, list[str], int]:
    """Return a status whose values are in range.

    Args:
        status: The status as the service returned it.
        job_id: The job that was requested.
        identity: The identity of the service.
        now: The present (aware), for times in the future.

    Returns:
        The status itself if all of it is in range, else a changed one; what was changed, for the log; and the number of
        attributes that were dropped or cut.
    """
    bounds = _Bounds(now)
    fields: dict[str, Any] = {
        "job_id": job_id,
        "job_name": bounds.text("job_name", status.job_name, _MAX_NAME_BYTES) or "",
        "state": _state(status.state),
        "identity": bounds.text("identity", status.identity, _MAX_NAME_BYTES) or identity,
        "attempt": bounds.count("attempt", status.attempt, _MAX_ATTEMPT) or 1,
        "exit_code": bounds.exit_code(status.exit_code),
        "status": bounds.text("status", status.status, _MAX_TEXT_BYTES) or "",
        "total_tasks": bounds.count("total_tasks", status.total_tasks, _MAX_COUNT),
        "finished_tasks": bounds.count("finished_tasks", status.finished_tasks, _MAX_COUNT),
    }
    for name, moment in zip(_TIMES, _times_of(status), strict=True):
        if moment is not None:
            fields[name] = bounds.time(name, moment)
    for (name, most), text in zip(_TEXTS.items(), _texts_of(status), strict=True):
        if text is not None:
            fields[name] = bounds.text(name, text, most)
    fields["attributes"], dropped = bounds.attributes("attributes", status.attributes, _RESERVED)
    fields["details"], _ = bounds.attributes("details", status.details, _RESERVED_DETAILS, scale=_DETAILS_SCALE)
    if dropped:
        fields["attributes"] = {**fields["attributes"], DROPPED_ATTRIBUTES: str(dropped)}
    if not (isinstance(status.trace_id, str) and is_trace_id(status.trace_id)):
        fields["trace_id"] = trace_id(fields["identity"], job_id, fields["attempt"])
    changed = {name: value for name, value in fields.items() if value is not getattr(status, name)}
    if not changed:
        return status, [], 0
    return dataclasses.replace(status, **changed), bounds.notes, dropped


def bounded_row(row: ListedJob, *, now: datetime) -> ListedJob:
    """Return a row of a list whose values are in range; its id stays as it is.

    Args:
        row: The row as the service returned it.
        now: The present (aware), for times in the future.
    """
    bounds = _Bounds(now)
    fields: dict[str, Any] = {
        "job_name": bounds.text("job_name", row.job_name, _MAX_NAME_BYTES),
        "state": _state(row.state),
        "created_at": bounds.time("created_at", row.created_at),
        "state_since": bounds.time("state_since", row.state_since),
        "instance_id": bounds.text("instance_id", row.instance_id, MAX_VALUE_BYTES),
        "instance_type": bounds.text("instance_type", row.instance_type, MAX_VALUE_BYTES),
        "lines": None if row.lines is None else bounds.count("lines", row.lines, _MAX_COUNT),
    }
    changed = {name: value for name, value in fields.items() if value is not getattr(row, name)}
    return dataclasses.replace(row, **changed) if changed else row


def bounded_tasks(tasks: Sequence[TaskRun], *, now: datetime) -> list[TaskRun]:
    """Return at most `MAX_TASK_RUNS` task runs of a job, with values in range; those without an id are dropped.

    Args:
        tasks: The runs as the service returned them.
        now: The present (aware), for times in the future.
    """
    found: list[TaskRun] = []
    room = MAX_TASKS_BYTES
    for task in tasks[:MAX_TASK_RUNS]:
        if (bounded := _bounded_task(task, now)) is not None:
            room -= _details_size(bounded)
            found.append(bounded if room >= 0 else _without_details(bounded))
    return found


def _details_size(task: TaskRun) -> int:
    """Return about how many bytes the texts of a task run take that it can do without."""
    texts = (task.error, task.url, task.instance_id, *task.after)
    return sum(len(text) for text in texts if text is not None)


def _without_details(task: TaskRun) -> TaskRun:
    """Return a task run with short texts only."""
    error = None if task.error is None else shorten_middle(task.error, _SHORT_ERROR_BYTES)
    return dataclasses.replace(task, error=error, url=None, instance_id=None, after=())


def _bounded_task(task: TaskRun, now: datetime) -> TaskRun | None:
    bounds = _Bounds(now)
    if not isinstance(task.task_id, str) or not task.task_id:
        return None
    fields: dict[str, Any] = {
        "task_id": _task_id(task.task_id),
        "name": bounds.text("name", task.name, _MAX_NAME_BYTES) or "",
        "attempt": bounds.count("attempt", task.attempt, _MAX_ATTEMPT) or 1,
        "result": bounds.text("result", task.result, _MAX_NAME_BYTES),
        "exit_code": bounds.exit_code(task.exit_code),
        "error": bounds.text("error", task.error, _MAX_TEXT_BYTES),
        "url": bounds.text("url", task.url, MAX_VALUE_BYTES),
        "instance_id": bounds.text("instance_id", task.instance_id, MAX_VALUE_BYTES),
        "parent": _task_id(task.parent) if isinstance(task.parent, str) else None,
    }
    for name in ("submitted_at", "started_at", "finished_at"):
        fields[name] = bounds.time(name, getattr(task, name))
    after = task.after if isinstance(task.after, tuple) else ()
    if after is not task.after or len(after) > _MAX_AFTER or not all(_task_id(one) == one for one in after):
        fields["after"] = tuple(found for one in after[:_MAX_AFTER] if (found := _task_id(one)))
    changed = {name: value for name, value in fields.items() if value is not getattr(task, name)}
    return dataclasses.replace(task, **changed) if changed else task


def bounded_page(page: LogPage) -> LogPage:
    """Return a page whose lines have times, streams, severities, tasks and flags in range; texts and uids stay."""
    if _is_bounded(page):
        return page
    flags = CLEAN if _is_clean(page) else 0
    runs = [_bounded_run(run, len(page.tasks), flags) for run in page.runs]
    tasks = tuple(map(_bounded_ref, page.tasks))
    if page.text:
        return LogPage(None, runs, page.cursor, page.digests, page.text, tasks=tasks)
    return LogPage(page.lines, runs, page.cursor, page.digests, tasks=tasks)


def bounded_open_line(line: OpenLine) -> OpenLine:
    """Return an open line with a time in range: it may be that of a file, which any program can set."""
    return line._replace(time_unix_nano=_nanos(line.time_unix_nano))


def _is_bounded(page: LogPage) -> bool:
    if not page.runs:
        return not page.tasks
    if len(page.runs) == 1 and not page.tasks:
        return _is_bounded_run(page.runs[0]) and (not page.runs[0].flags & CLEAN or _is_clean(page))
    # By column, and by different values: a page may have five thousand runs.
    _, times, streams, flags, prefixes, tasks, severities = zip(*page.runs, strict=True)
    try:
        if any(flag & CLEAN for flag in {*flags}) and not _is_clean(page):
            return False
        numbers = {*streams}, {*tasks}, {*severities}
        return (
            {*map(type, times)} == {int}
            and min(times) >= 0
            and max(times) <= LATEST_NS
            and all(type(number) is int for one in numbers for number in one)
            and numbers[0] <= _STREAMS
            and min(numbers[1]) >= 0
            and max(numbers[1]) <= len(page.tasks)
            and numbers[2] <= _SEVERITIES
            and all(isinstance(prefix, str) and prefix.isascii() for prefix in {*prefixes})
            and all(_bounded_ref(task) == task for task in page.tasks)
        )
    except TypeError:  # not hashable
        return False


def _is_bounded_run(run: LineRun) -> bool:
    """Return what `_is_bounded` does of the only run of a page without tasks, as each line of a slow job has."""
    _, time_ns, stream, flags, prefix, task, severity = run
    return (
        type(time_ns) is type(stream) is type(flags) is type(task) is type(severity) is int
        and 0 <= time_ns <= LATEST_NS
        and stream in _STREAMS
        and task == 0
        and severity in _SEVERITIES
        and isinstance(prefix, str)
        and prefix.isascii()
    )


def _is_clean(page: LogPage) -> bool:
    """Return whether the lines of a page are what the flag `CLEAN` says.

    Any program can write a job's index and its log. Bytes that are not UTF-8 make a whole request unreadable.
    """
    return is_clean(page.text or b"\n".join(page.lines))


def _bounded_run(run: LineRun, tasks: int, flags: int) -> LineRun:
    return run._replace(
        flags=run.flags & flags if isinstance(run.flags, int) else 0,
        time_unix_nano=_nanos(run.time_unix_nano),
        stream=run.stream if _is_number(run.stream, _STREAMS) else Stream.NONE,
        uid_prefix=_utf8(run.uid_prefix) if isinstance(run.uid_prefix, str) else "",
        task=run.task if _is_number(run.task, range(tasks + 1)) else 0,
        severity=run.severity if _is_number(run.severity, _SEVERITIES) else 0,
    )


def _bounded_ref(task: TaskRef) -> TaskRef:
    attempt = task.attempt if _is_number(task.attempt, range(1, _MAX_ATTEMPT + 1)) else 1
    return TaskRef(_task_id(task.task_id), _short(task.name), attempt)


def _task_id(text: Any) -> str:
    """Return the id of a task; of a long one, the start and a hash: without the middle, it could be that of another."""
    kept = _utf8(text) if isinstance(text, str) else ""
    if len(kept) <= _MAX_NAME_BYTES // 4 or len(data := kept.encode()) <= _MAX_NAME_BYTES:
        return kept
    found = f"#{hashlib.blake2b(data, digest_size=8).hexdigest()}"
    return data[: _MAX_NAME_BYTES - len(found)].decode("utf-8", "ignore") + found


def _short(text: Any) -> str:
    return shorten_middle(_utf8(text), _MAX_NAME_BYTES) if isinstance(text, str) else ""


def _is_number(value: Any, possible: Container[int]) -> bool:
    return type(value) is int and value in possible


def _nanos(value: Any) -> int:
    """Return the nearest time of a line in ns since the epoch; 0 for what is not a number."""
    if not isinstance(value, int | float) or value != value:  # NaN
        return 0
    return int(min(max(value, 0), LATEST_NS))


_TIMES = ("last_heartbeat", "job_status_date", "submitted_at", "started_at", "finished_at")
_TEXTS = {
    **dict.fromkeys(("job_status", "error"), _MAX_TEXT_BYTES),
    **dict.fromkeys(("instance_id", "instance_type", "url", "parent", "retry_of", "service"), MAX_VALUE_BYTES),
}
_times_of, _texts_of = attrgetter(*_TIMES), attrgetter(*_TEXTS)


class _Bounds:
    """Brings values into range, and notes what it changed."""

    def __init__(self, now: datetime) -> None:
        self.notes: list[str] = []
        self._latest = now + MAX_AHEAD if now >= _EARLIEST_NOW else None

    def time(self, name: str, value: Any) -> datetime | None:
        if value is None:
            return None
        if not isinstance(value, datetime):
            self._note(name, "is not a time")
            return None
        try:
            moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            is_known = moment > _EARLIEST and (self._latest is None or moment <= self._latest)
        except OverflowError:  # near the ends of the calendar, some offsets have no time in UTC
            is_known = False
        if not is_known:
            self._note(name, f"is {value.isoformat()}, which cannot be its time")
            return None
        return moment

    def count(self, name: str, value: Any, highest: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self._note(name, "is not a number")
            return 0
        if 0 <= value <= highest:
            return value
        self._note(name, "is out of range")
        return min(max(value, 0), highest)

    def exit_code(self, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value in _EXIT_CODES:
            return value
        self._note("exit_code", "is out of range")
        return None

    def text(self, name: str, value: Any, max_bytes: int) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            self._note(name, "is not text")
            return None
        if len(value) <= max_bytes and value.isascii():
            return value
        kept = _utf8(value)
        if kept is not value:
            self._note(name, "is not valid Unicode")
        if len(kept) > max_bytes // 4 and len(kept.encode()) > max_bytes:
            self._note(name, f"is longer than {max_bytes} bytes")
            return shorten_middle(kept, max_bytes)
        return kept

    def attributes(
        self, name: str, value: Any, reserved: re.Pattern[str], scale: int = 1
    ) -> tuple[Mapping[str, str], int]:
        """Return the attributes in range, and the number of those that were dropped or cut."""
        if not isinstance(value, Mapping):
            self._note(name, "are not attributes")
            return {}, 1
        most_bytes, most_value_bytes = scale * MAX_ATTRIBUTE_BYTES, scale * MAX_VALUE_BYTES
        if _are_bounded(value, reserved, most_value_bytes, most_bytes):
            return value, 0
        kept: dict[str, str] = {}
        cut = size = 0
        for key, text in value.items():
            bounded = _attribute(key, text, reserved, most_value_bytes) if len(kept) < MAX_ATTRIBUTES else None
            added = _size(bounded[0]) + _size(bounded[1]) if bounded is not None else 0
            if bounded is None or size + added > most_bytes:
                cut += 1
                continue
            cut += bounded[1] != text
            kept[bounded[0]] = bounded[1]
            size += added
        if not cut and len(kept) == len(value):
            return value, 0
        # Two keys may become one.
        cut = max(cut, len(value) - len(kept))
        self._note(name, f"are reserved, empty or too large in {cut} cases")
        return kept, cut

    def _note(self, name: str, text: str) -> None:
        self.notes.append(f"{name} {text}")


def _are_bounded(value: Mapping[Any, Any], reserved: re.Pattern[str], most_value_bytes: int, most_bytes: int) -> bool:
    """Return whether attributes are in range, as nearly all are; False also for some that only seem not to be."""
    left = most_bytes
    for key, text in value.items():
        if not (type(key) is type(text) is str and key.isascii() and text.isascii() and len(text) <= most_value_bytes):
            return False
        if len(key) > MAX_KEY_BYTES or _key(key, reserved) is None:
            return False
        left -= len(key) + len(text)
    return left >= 0 and len(value) <= MAX_ATTRIBUTES


def _attribute(key: Any, value: Any, reserved: re.Pattern[str], max_bytes: int) -> tuple[str, str] | None:
    """Return a key and a value in range; None if the attribute cannot be kept."""
    if not isinstance(key, str) or not isinstance(value, str):
        return None
    # The cache must not hold longer keys: any user of a job service can make them.
    kept = _key(key, reserved) if len(key) <= MAX_KEY_BYTES else None
    if kept is None:
        return None
    if len(value) <= max_bytes and value.isascii():
        return kept, value
    return kept, shorten_middle(_utf8(value), max_bytes)


@lru_cache(maxsize=1024)  # the jobs of a service have the same keys
def _key(key: str, reserved: re.Pattern[str]) -> str | None:
    kept = _utf8(key)
    if not kept.strip() or len(kept.encode()) > MAX_KEY_BYTES or reserved.fullmatch(_spelling(kept)):
        return None
    return kept


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _spelling(key: str) -> str:
    """Return a key as stores spell names: in lower case, with an underscore for all but letters and digits."""
    return _NO_WORD.sub("_", key.lower()).strip("_")


def _utf8(text: str) -> str:
    """Return a text with a question mark for each lone surrogate, which UTF-8 cannot encode."""
    return text if text.isascii() else _replaced(text)


def _replaced(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _state(state: Any) -> JobState:
    if isinstance(state, JobState):
        return state
    return JobState(state) if isinstance(state, str) and state in JobState.__members__ else JobState.UNKNOWN
