"""`Rows`: what verbs return as a list, ready for pandas and for a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, SupportsIndex, TypeVar, overload

from tailspan._durations import duration_text
from tailspan._plural import plural
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun

__all__ = ["Rows"]

T = TypeVar("T")

_EPOCH = datetime.fromtimestamp(0, UTC)
_SHOWN_ROWS = 100


class Rows(list[T]):
    """A list of jobs, tasks or lines. A notebook shows it as a table."""

    __slots__ = ()

    @overload
    def __getitem__(self, place: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Rows[T]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> T | Rows[T]:
        if isinstance(place, slice):
            return Rows(super().__getitem__(place))
        return super().__getitem__(place)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return each row as a dict, for example for ``pandas.DataFrame``.

        Returns:
            Of a job or a task its fields, with times as aware UTC datetimes, and its ``duration`` where it has one. Of
            a line ``time`` (aware UTC datetime), ``stream``, ``severity`` and ``text``, and what its service adds.
            ``stream`` is None where the service does not report it; ``severity`` is that of the service, else that in
            the text, such as ``ERROR``, else None.
        """
        return [_dict_of(row) for row in self]

    def _repr_html_(self) -> str:
        from tailspan._notebook import table

        if not self:
            return table((), (), "(no rows)")
        kind = type(self[0])
        noun, head, cells = next(
            (shape for one, shape in _SHAPES.items() if issubclass(kind, one)), ("row", ("value",), _value_cells)
        )
        # Jobs come newest first, lines oldest first.
        shown = self[-_SHOWN_ROWS:] if noun == "line" else self[:_SHOWN_ROWS]
        left_out = len(self) - len(shown)
        which = "earlier" if noun == "line" else "more"
        note = f"and {left_out} {which} {plural(left_out, noun)}" if left_out else ""
        return table(head, [cells(row) for row in shown], note)


def _dict_of(row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return _line(row)
    if not dataclasses.is_dataclass(row):
        raise TypeError(f"{type(row).__name__} is not a row of a verb: expected a job, a task or a line")
    fields = {
        one.name: _plain(getattr(row, one.name)) for one in dataclasses.fields(row) if not one.name.startswith("_")
    }
    if isinstance(row, JobStatus | TaskRun):
        fields["duration"] = row.duration
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, JobState):
        return str(value)
    return dict(value) if isinstance(value, Mapping) else value


def _line(message: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in message.items() if key not in ("message", "timestamp", "stream", "level")}
    return {
        "time": _moment(message["timestamp"]),
        "stream": message.get("stream"),
        "severity": message.get("level") or _level_in(message["message"]),
        "text": message["message"],
        **own,
    }


def _level_in(text: str) -> str | None:
    from tailspan.logs.clean import printable
    from tailspan.logs.page import level_name
    from tailspan.logs.severity import LEVELS, find_level

    number, _ = LEVELS[find_level(printable(text, colours=False).encode("utf-8", "replace"))]
    return level_name(number) if number else None


def _moment(ms: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(milliseconds=ms)
    except OverflowError:
        return None


def _job_cells(row: ListedJob) -> Sequence[str | None]:
    from tailspan._notebook import time_text

    return (
        str(row.state),
        row.job_name,
        row.job_id,
        time_text(row.created_at),
        time_text(row.state_since),
        None if row.lines is None else str(row.lines),
        row.instance_id,
        row.service,
    )


def _status_cells(row: JobStatus) -> Sequence[str | None]:
    from tailspan._notebook import time_text
    from tailspan.logs.printing import progress_text, result_text

    return (
        str(row.state),
        row.job_name,
        row.job_id,
        time_text(row.started_at or row.submitted_at),
        None if row.duration is None else duration_text(row.duration.total_seconds()),
        progress_text(row),
        result_text(row),
        row.service,
    )


def _task_cells(row: TaskRun) -> Sequence[str | None]:
    from tailspan._notebook import time_text

    return (
        row.result or ("running" if row.started_at else "waiting"),
        row.name,
        str(row.attempt),
        time_text(row.started_at),
        None if row.duration is None else duration_text(row.duration.total_seconds()),
        None if row.exit_code is None else str(row.exit_code),
        row.error,
    )


def _line_cells(row: Mapping[str, Any]) -> Sequence[str | None]:
    line = _line(row)
    time = line["time"]
    return (
        None if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}.{time.microsecond // 1000:03}",
        line["stream"],
        line["severity"],
        line.get("task"),
        line["text"],
    )


def _value_cells(row: Any) -> Sequence[str | None]:
    return (str(row),)


_SHAPES: Mapping[type, tuple[str, Sequence[str], Callable[[Any], Sequence[str | None]]]] = {
    ListedJob: (
        "job",
        ("state", "name", "job", "created", "in this state since", "lines", "machine", "service"),
        _job_cells,
    ),
    JobStatus: ("job", ("state", "name", "job", "started", "duration", "progress", "result", "service"), _status_cells),
    TaskRun: ("task", ("result", "task", "attempt", "started", "duration", "exit code", "error"), _task_cells),
    dict: ("line", ("time", "stream", "severity", "task", "text"), _line_cells),
}
