"""What Prefect's API says of runs, task runs and lines, as jobs, tasks and lines. Pure, apart from the clock.

Source: the REST API of Prefect 3.9.1, as measured; docs.prefect.io, "REST API".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from tailspan._times import time_of
from tailspan.errors import ConfigError
from tailspan.logs.page import Line, TaskRef
from tailspan.models import JobState, TaskRun
from tailspan.services._http_service import pack_cursor, unpack_cursor

__all__ = [
    "EPOCH",
    "PAGE",
    "SeenEntries",
    "Tasks",
    "attempts_of",
    "lines_of",
    "moment_of",
    "only_attempt",
    "order_of",
    "state_of",
    "whole_times",
]

PAGE = 200
"""Rows of a reply: a larger limit is status 422."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_ID_BYTES = 8
_MAX_AHEAD = timedelta(days=1)

_STATES: Mapping[str, JobState] = {
    "SCHEDULED": JobState.PENDING,
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "PAUSED": JobState.RUNNING,
    "CANCELLING": JobState.RUNNING,
    "COMPLETED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "CANCELLED": JobState.CANCELED,
    "CRASHED": JobState.LOST,
}
_RESULTS: Mapping[str, str] = {
    "COMPLETED": "success",
    "FAILED": "failure",
    "CANCELLED": "cancellation",
    "CRASHED": "error",
}


class Tasks(NamedTuple):
    """The tasks of a job, as last requested.

    Attributes:
        at_s: When, by the monotonic clock.
        runs: Every attempt of every task.
        flow_runs: The job and its sub flows: id of the flow run, and of the task run that called it.
    """

    at_s: float
    runs: tuple[TaskRun, ...]
    flow_runs: Mapping[str, str | None]


class SeenEntries:
    """How far a log was read: the newest time, and the ids of the lines of the late window before it."""

    def __init__(self, newest: datetime, ids: dict[bytes, int]) -> None:
        self.newest = newest
        self._ids = ids

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> SeenEntries:
        """Return the position of a cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        try:
            times, ids = parts.get("t", []), parts.get("i", b"")
            found = [ids[start : start + _ID_BYTES] for start in range(0, len(ids), _ID_BYTES)]
            newest = EPOCH + timedelta(microseconds=parts.get("n", 0))
            return cls(newest, dict(zip(found, times, strict=True)))
        except (TypeError, ValueError, OverflowError):
            text = f"{(cursor or b'')[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Return whether the line was read."""
        return _short(entry["id"]) in self._ids

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note a line as read."""
        moment = moment_of(entry)
        # After a time that cannot be (the year 9999), later reads would ask for no line that comes.
        if moment <= datetime.now(UTC) + _MAX_AHEAD:
            self.newest = max(self.newest, moment)
        self._ids[_short(entry["id"])] = _micros(moment)

    def forget(self, window_s: float) -> None:
        """Drop the ids that no later read will see."""
        first = _micros(self.newest) - int(window_s * 1e6) - 1
        self._ids = {one: at for one, at in self._ids.items() if at >= first}

    def pack(self) -> bytes:
        """Return the cursor."""
        return pack_cursor({"n": _micros(self.newest), "t": list(self._ids.values()), "i": b"".join(self._ids)})


def _short(entry_id: str) -> bytes:
    return hashlib.blake2b(entry_id.encode(), digest_size=_ID_BYTES).digest()


def _micros(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


def moment_of(entry: Mapping[str, Any]) -> datetime:
    """Return the time of a log entry; 1970 for what is not a time: one such entry must not hide the others."""
    return time_of(entry["timestamp"]) or EPOCH


def state_of(run: Mapping[str, Any]) -> JobState:
    """Return the state of a flow run."""
    if run.get("state_type") == "FAILED" and run.get("state_name") == "TimedOut":
        return JobState.TIMED_OUT
    return _STATES.get(run.get("state_type") or "", JobState.UNKNOWN)


def _result(state_type: str | None, state_name: str | None) -> str | None:
    if state_type == "FAILED" and state_name == "TimedOut":
        return "timeout"
    if state_type == "COMPLETED" and state_name in ("Skipped", "NotReady"):
        return "skip"
    return _RESULTS.get(state_type or "")


def _task_name(row: Mapping[str, Any]) -> str:
    # The run's own name ends with a random part, and may be anything.
    name: str = (row.get("task_key") or "").rpartition("-")[0].rpartition(".")[2] or row["name"]
    return name


def _after(row: Mapping[str, Any]) -> tuple[str, ...]:
    inputs = (one for group in (row.get("task_inputs") or {}).values() for one in group)
    return tuple(dict.fromkeys(one["id"] for one in inputs if one.get("input_type") == "task_run" and one.get("id")))


def only_attempt(row: Mapping[str, Any], parent: str | None, url: str) -> TaskRun:
    """Return the attempt of a task run that ran once at most."""
    result = _result(row.get("state_type"), row.get("state_name"))
    message = (row.get("state") or {}).get("message")
    return TaskRun(
        task_id=row["id"],
        name=_task_name(row),
        result=result,
        submitted_at=time_of(row.get("expected_start_time")),
        started_at=time_of(row.get("start_time")),
        finished_at=time_of(row.get("end_time") or (row.get("state") or {}).get("timestamp")) if result else None,
        error=(message or None) if result not in (None, "success", "skip") else None,
        url=url,
        parent=parent,
        after=_after(row),
    )


def attempts_of(
    row: Mapping[str, Any], states: Sequence[Mapping[str, Any]], parent: str | None, url: str
) -> tuple[TaskRun, ...]:
    """Return an attempt for each state RUNNING, which the next state ends."""
    ordered = sorted(states, key=lambda state: state["timestamp"])
    last = only_attempt(row, parent, url)
    found: list[TaskRun] = []
    submitted = last.submitted_at
    for state, following in zip(ordered, [*ordered[1:], None], strict=True):
        if state["type"] != "RUNNING":
            submitted = time_of(state["timestamp"]) if found else submitted
            continue
        result = None if following is None else _result(following["type"], following["name"]) or "failure"
        if following is not None and following["type"] in ("RUNNING", "PAUSED", "CANCELLING"):
            result = "failure" if following["type"] == "RUNNING" else None
        failed = result not in (None, "success", "skip")
        found.append(
            TaskRun(
                task_id=row["id"],
                name=last.name,
                attempt=len(found) + 1,
                result=result,
                submitted_at=submitted,
                started_at=time_of(state["timestamp"]),
                finished_at=time_of(following["timestamp"]) if result and following else None,
                error=(following or {}).get("message") or None if failed else None,
                url=url,
                parent=parent,
                after=last.after,
            )
        )
    return tuple(found) or (last,)


def lines_of(entry: Mapping[str, Any], tasks: Tasks) -> list[Line]:
    """Return the lines of a log entry, whose message may have several."""
    moment = moment_of(entry)
    task = _task_at(entry.get("task_run_id") or tasks.flow_runs.get(entry["flow_run_id"]), moment, tasks)
    severity = _severity(entry.get("level") or 0)
    texts = str(entry.get("message") or "").split("\n")
    nano = _nano(entry)
    return [Line(nano, text, "", task, severity, f"{entry['id']}.{place}") for place, text in enumerate(texts)]


def order_of(entry: Mapping[str, Any]) -> tuple[int, str]:
    """Return the place of an entry in the order of a log: by time, entries of one time by their ids."""
    return _nano(entry), entry["id"]


def whole_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of a page without those of its last time: the next page may have more."""
    if len(entries) < PAGE or entries[0]["timestamp"] == entries[-1]["timestamp"]:
        return entries
    last = entries[-1]["timestamp"]
    return [entry for entry in entries if entry["timestamp"] != last]


def _nano(entry: Mapping[str, Any]) -> int:
    """Return the time of an entry, in ns since the epoch; of those of one microsecond each has its own, from its id."""
    return _micros(moment_of(entry)) * 1000 + int.from_bytes(_short(entry["id"])) % 900


def _task_at(task_id: str | None, moment: datetime, tasks: Tasks) -> TaskRef | None:
    """Return the attempt that ran at a time; the first one for an earlier time."""
    attempts = [task for task in tasks.runs if task.task_id == task_id]
    if task_id is None or not attempts:
        return None if task_id is None else TaskRef(task_id, task_id)
    began = [task for task in attempts if task.started_at is not None and task.started_at <= moment]
    chosen = (began or attempts[:1])[-1]
    return TaskRef(chosen.task_id, chosen.name, chosen.attempt)


def _severity(level: int) -> int:
    """Return the OTLP severity number of a level of Python's logging."""
    return 0 if level <= 0 else (5, 9, 13, 17, 21)[min(max(level // 10, 1), 5) - 1]
