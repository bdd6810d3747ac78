"""What commands print: JSON for programs, tables for people, plain columns for pipes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tailspan._durations import duration_text
from tailspan.cli.moments import clock_text, moment_text, with_age, zone_name
from tailspan.logs.clean import printable
from tailspan.logs.printing import LinePrinter, end_text, is_terminal, progress_text, result_text
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun

__all__ = [
    "ended",
    "job_row",
    "jobs_table",
    "json_line",
    "json_lines",
    "json_of",
    "show",
    "status_fields",
    "table",
    "tasks_table",
    "write",
    "write_ids",
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


def job_row(row: ListedJob, status: JobStatus | None) -> dict[str, Any]:
    """Return every field of a row and of its job's status, for JSON; the status's where both have it."""
    fields = json_of(row)
    if status is not None:
        fields |= json_of(status)
        fields["progress"] = status.finished_tasks / status.total_tasks if status.total_tasks else None
    return fields


def ended(status: JobStatus) -> None:
    """Print how a job ended."""
    took = f", after {_took_text(status)}" if status.duration is not None else ""
    write(_safe(end_text(status)) + took)


def status_fields(status: JobStatus, links: Mapping[str, str], reason: str | None = None) -> None:
    """Show a status, one field a line.

    Args:
        status: What to show.
        links: URLs of it by label.
        reason: Why it failed, as the agent knows it.
    """
    shown: list[tuple[str, str | None]] = [
        ("job", status.job_id),
        ("name", status.job_name),
        ("state", status.state + (" (not answered now)" if status.stale else "")),
        ("exit code", None if status.exit_code is None else str(status.exit_code)),
        ("error", status.error),
        ("reason", reason),
        ("attempt", None if status.attempt == 1 else str(status.attempt)),
        ("retry of", status.retry_of),
        ("tasks", f"{status.finished_tasks} of {status.total_tasks}" if status.total_tasks else None),
        ("submitted", _time_text(status.submitted_at)),
        ("started", _time_text(status.started_at)),
        ("finished", _time_text(status.finished_at)),
        ("duration", None if status.duration is None else _took_text(status)),
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
    show(Panel(grid, expand=False, border_style=_COLOURS.get(status.state, "none")))


def jobs_table(rows: Sequence[tuple[ListedJob, JobStatus | None]], selected: int | None = None) -> Any:
    """Return a list of jobs as `table` does.

    Args:
        rows: Jobs, each with its status where this user may read it.
        selected: The index of a row to mark.
    """
    head: tuple[str, ...] = ("STATE", "NAME", "ID", _time_head("STARTED"), "DURATION", "PROGRESS", "RESULT")
    cells = [_job_cells(row, status) for row, status in rows]
    if is_terminal(sys.stdout) and all(row[5] == "-" for row in cells):
        # 80 characters are few.
        head, cells = (*head[:5], *head[6:]), [(*row[:5], *row[6:]) for row in cells]
    colours = [_COLOURS.get(status.state if status else row.state, "") for row, status in rows]
    return table(head, cells, colours, selected)


def write_ids(rows: Sequence[tuple[ListedJob, JobStatus | None]]) -> None:
    """Print the ids of jobs, one on each line."""
    for row, _ in rows:
        write(_safe(row.job_id))


def _job_cells(row: ListedJob, status: JobStatus | None) -> tuple[str, ...]:
    name = (status.job_name if status else row.job_name) or "-"
    if status is None:
        return str(row.state), _safe(name), _safe(row.job_id), _when_text(row.created_at), "-", "-", "-"
    return (
        status.state + ("?" if status.stale else ""),
        _safe(name),
        _safe(status.job_id),
        _when_text(status.started_at or status.submitted_at or row.created_at),
        _took_text(status),
        progress_text(status) or "-",
        _safe(result_text(status) or "-"),
    )


def _took_text(one: JobStatus | TaskRun) -> str:
    return "-" if one.duration is None else duration_text(one.duration.total_seconds())


def tasks_table(rows: Sequence[TaskRun]) -> None:
    """Show a list of task attempts."""
    head = ("STATE", "ATTEMPT", _time_head("STARTED"), "DURATION", "ID", "TASK")
    states = [row.result or ("running" if row.started_at else "waiting") for row in rows]
    cells = [
        (
            _safe(state),
            str(row.attempt),
            _when_text(row.started_at),
            _took_text(row),
            _safe(row.task_id),
            _safe(row.name + (f": {row.error}" if row.error else "")),
        )
        for row, state in zip(rows, states, strict=True)
    ]
    show(table(head, cells, [_TASK_COLOURS.get(state, "") for state in states]))


def table(
    head: tuple[str, ...], cells: Sequence[tuple[str, ...]], colours: Sequence[str], selected: int | None = None
) -> Any:
    """Return rows for `show`: aligned text in a pipe; at a terminal, the column STATE of each row in its colour.

    Args:
        head: The names of the columns. At a terminal the last one takes what is left of the line.
        cells: The rows.
        colours: The colour of each row's state.
        selected: The index of a row to mark at a terminal.
    """
    if not is_terminal(sys.stdout):
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *cells)
        )
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        right, free = name in ("ATTEMPT", "DURATION"), name in ("NAME", "TASK", "RESULT")
        grid.add_column(name, justify="right" if right else "left", no_wrap=True, min_width=8 if free else len(name))
    for number, (row, colour) in enumerate(zip(cells, colours, strict=True)):
        texts = [Text(cell, style=colour if name == "STATE" else "") for name, cell in zip(head, row, strict=True)]
        grid.add_row(*texts, style="reverse" if number == selected else "")
    return grid


def show(renderable: Any) -> None:
    """Print what `table` returned, or something else that rich can print."""
    if isinstance(renderable, str):
        for line in renderable.split("\n"):
            write(line)
        return
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(renderable)


def _time_head(name: str) -> str:
    """Return the head of a column of times; with the zone where they are local."""
    return f"{name} ({zone_name(datetime.now(UTC))})" if is_terminal(sys.stdout) else name


def _when_text(time: datetime | None) -> str:
    if time is None:
        return "-"
    return clock_text(time, datetime.now(UTC)) if is_terminal(sys.stdout) else moment_text(time, local=False)


def _safe(text: str) -> str:
    """Return remote text as one line that cannot act on a terminal."""
    return printable(" ".join(text.splitlines()), colours=False).replace("\t", " ")


def _time_text(time: datetime | None) -> str | None:
    if time is None:
        return None
    return with_age(time, datetime.now(UTC)) if is_terminal(sys.stdout) else moment_text(time, local=False)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat() if value.tzinfo else value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
