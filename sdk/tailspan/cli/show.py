"""What commands print: JSON for programs, tables for people, plain columns for pipes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tailspan.logs.clean import printable
from tailspan.logs.printing import LinePrinter, end_text, is_terminal
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun

__all__ = [
    "ended",
    "jobs_table",
    "json_line",
    "json_lines",
    "json_of",
    "seconds_text",
    "status_fields",
    "tasks_table",
    "write",
]

_COLOURS = {
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.TIMED_OUT: "red",
    JobState.LOST: "red",
    JobState.CANCELED: "yellow",
    JobState.RUNNING: "cyan",
}
_TASK_COLOURS = {
    "success": "green",
    "failure": "red",
    "error": "red",
    "timeout": "red",
    "cancellation": "yellow",
    "running": "cyan",
}


def write(text: str) -> None:
    """Write a line of data to standard output, without control characters."""
    LinePrinter(sys.stdout).write(_safe(text) + "\n")


def json_of(answer: JobStatus | ListedJob | TaskRun) -> dict[str, Any]:
    """Return every field of a status, a row or a task by its own name; times as ISO 8601, durations in seconds."""
    fields = {
        field.name: _plain(getattr(answer, field.name))
        for field in dataclasses.fields(answer)
        if not field.name.startswith("_")
    }
    if isinstance(answer, JobStatus | TaskRun):
        fields["duration_s"] = answer.duration.total_seconds() if answer.duration is not None else None
    return fields


def json_line(value: Any) -> None:
    """Write a value as one line of JSON (ASCII, so that no encoding can harm it)."""
    json_lines([value])


def json_lines(values: Iterable[Any]) -> None:
    """Write each value as one line of JSON, all at once."""
    text = "".join(f"{json.dumps(value)}\n" for value in values)
    if text:
        LinePrinter(sys.stdout).write(text)


def ended(status: JobStatus) -> None:
    """Print how a job ended."""
    took = f", after {seconds_text(status.duration)}" if status.duration is not None else ""
    write(_safe(end_text(status)) + took)


def seconds_text(duration: timedelta) -> str:
    """Return a duration for people: ``0.4 s``, ``12 s``, ``1:02:03``."""
    seconds = duration.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def status_fields(status: JobStatus, links: Mapping[str, str]) -> None:
    """Show a status, one field a line.

    Args:
        status: What to show.
        links: URLs of it by label.
    """
    shown: list[tuple[str, str | None]] = [
        ("job", status.job_id),
        ("name", status.job_name),
        ("state", status.state + (" (not answered now)" if status.stale else "")),
        ("exit code", None if status.exit_code is None else str(status.exit_code)),
        ("error", status.error),
        ("tasks", f"{status.finished_tasks} of {status.total_tasks}" if status.total_tasks else None),
        ("submitted", _time_text(status.submitted_at)),
        ("started", _time_text(status.started_at)),
        ("finished", _time_text(status.finished_at)),
        ("duration", None if status.duration is None else seconds_text(status.duration)),
        ("instance", " ".join(part for part in (status.instance_id, status.instance_type) if part) or None),
        ("attributes", " ".join(f"{key}={value}" for key, value in status.attributes.items()) or None),
        ("service", status.service),
        ("trace id", status.trace_id),
        *links.items(),
        ("page", status.url),
    ]
    rows = [(name, _safe(value)) for name, value in shown if value]
    if not is_terminal(sys.stdout):
        for name, value in rows:
            write(f"{name + ':':<12}{value}")
        return
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value, style=_COLOURS.get(status.state, "") if name == "state" else ""))
    _rich_print(Panel(grid, expand=False, border_style=_COLOURS.get(status.state, "none")))


def jobs_table(rows: Sequence[ListedJob]) -> None:
    """Show a list of jobs."""
    head = ("JOB", "STATE", "CREATED", "LINES", "NAME")
    cells = [
        (
            _safe(row.job_id),
            str(row.state),
            _when_text(row.created_at),
            "-" if row.lines is None else str(row.lines),
            _safe(row.job_name or "-"),
        )
        for row in rows
    ]
    _table(head, cells, [_COLOURS.get(row.state, "") for row in rows])


def tasks_table(rows: Sequence[TaskRun]) -> None:
    """Show a list of task attempts."""
    head = ("STATE", "ATTEMPT", "STARTED", "DURATION", "ID", "TASK")
    states = [row.result or ("running" if row.started_at else "waiting") for row in rows]
    cells = [
        (
            _safe(state),
            str(row.attempt),
            _when_text(row.started_at),
            "-" if row.duration is None else seconds_text(row.duration),
            _safe(row.task_id),
            _safe(row.name + (f": {row.error}" if row.error else "")),
        )
        for row, state in zip(rows, states, strict=True)
    ]
    _table(head, cells, [_TASK_COLOURS.get(state, "") for state in states])


def _table(head: tuple[str, ...], cells: Sequence[tuple[str, ...]], colours: Sequence[str]) -> None:
    """Show rows: aligned text in a pipe; at a terminal, the column STATE of each row in its colour.

    Args:
        head: The names of the columns. The last one takes what is left of the line, since it alone may have spaces.
        cells: The rows.
        colours: The colour of each row's state.
    """
    if not is_terminal(sys.stdout):
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for line in (head, *cells):
            write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name in ("LINES", "ATTEMPT") else "left", no_wrap=name != head[-1])
    for row, colour in zip(cells, colours, strict=True):
        pairs = zip(head, row, strict=True)
        table.add_row(*(Text(cell, style=colour if name == "STATE" else "") for name, cell in pairs))
    _rich_print(table)


def _when_text(time: datetime | None) -> str:
    return (_age_text(time) if is_terminal(sys.stdout) else _time_text(time)) or "-"


def _rich_print(renderable: Any) -> None:
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(renderable)


def _safe(text: str) -> str:
    """Return remote text as one line that cannot act on a terminal."""
    return printable(" ".join(text.splitlines()), colours=False).replace("\t", " ")


def _time_text(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age_text(time: datetime | None) -> str | None:
    if time is None:
        return None
    seconds = max(0.0, (datetime.now(UTC) - time).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
