"""The Fused wire format as values: URLs, a status reply, a row of the list, an error's text. Pure.

Source: measured on the published ``fused`` clients 1.1.2 to 2.9.5, whose models are strict about the types of the
twelve fields and ignore any other key. `tailspan serve` adds keys of ours. They are used only if their values make
sense, because another server may use the same names for other things.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from tailspan._identity import is_trace_id, trace_id
from tailspan.models import JobState, JobStatus, ListedJob, fused_state

__all__ = [
    "DEFAULT_BASE_URL",
    "decode_row",
    "decode_status",
    "line_times",
]

DEFAULT_BASE_URL = "https://www.fused.io/server/v1"


class _Status(msgspec.Struct, kw_only=True):
    """The twelve fields, with the types that the published clients require, except for times and counts.

    A time or a count that is not one counts as not known: the job's log and end can be relayed all the same.
    """

    job_id: str
    job_name: str
    instance_id: str | None = None
    instance_type: str | None = None
    status: str
    terminal_status: bool
    job_status: str | None = None
    finished_job_status: bool | None = None
    total_tasks: Any
    finished_tasks: Any


def decode_status(reply: Mapping[str, Any], *, service: str, identity: str) -> JobStatus:
    """Return the status in a reply.

    Args:
        reply: The decoded JSON object.
        service: Name of the configured service.
        identity: The job's ids are hashed from it, unless the reply has the identity of the job's own service.

    Raises:
        msgspec.ValidationError: A required field is missing, or a field has another type.
    """
    wire = msgspec.convert(reply, _Status)
    own_state = _own_state(reply)
    state = own_state or fused_state(wire.status, wire.terminal_status, wire.job_status, wire.finished_job_status)
    identity = _text(reply, "identity") or identity
    attempt = _number(reply, "attempt") or 1
    own_trace_id = _text(reply, "trace_id") or ""
    status_date = _moment(reply, "job_status_date")
    finished_at = _moment(reply, "finished_at")
    if finished_at is None and state.is_terminal and own_state is None:
        finished_at = status_date
    return JobStatus(
        job_id=wire.job_id,
        job_name=wire.job_name,
        instance_id=wire.instance_id,
        instance_type=wire.instance_type,
        status=wire.status,
        terminal_status=wire.terminal_status,
        last_heartbeat=_moment(reply, "last_heartbeat"),
        job_status=wire.job_status,
        job_status_date=status_date,
        finished_job_status=wire.finished_job_status,
        total_tasks=_number(reply, "total_tasks") or 0,
        finished_tasks=_number(reply, "finished_tasks") or 0,
        state=state,
        submitted_at=_moment(reply, "submitted_at"),
        started_at=_moment(reply, "started_at"),
        finished_at=finished_at,
        exit_code=_integer(reply, "exit_code"),
        error=_text(reply, "error"),
        attributes=_texts(reply, "attributes"),
        details=_texts(reply, "details"),
        parent=_text(reply, "parent"),
        url=_text(reply, "url"),
        service=service,
        identity=identity,
        attempt=attempt,
        retry_of=_text(reply, "retry_of"),
        trace_id=own_trace_id if is_trace_id(own_trace_id) else trace_id(identity, wire.job_id, attempt),
        logs_complete=_boolean(reply, "logs_complete"),
    )


def line_times(reply: Mapping[str, Any]) -> tuple[bool, tuple[int, int] | None]:
    """Return whether a status reply reports the times of the first and last line, and these times in ms, if any."""
    if "first_line_ms" not in reply or "last_line_ms" not in reply:
        return False, None
    first, last = _number(reply, "first_line_ms"), _number(reply, "last_line_ms")
    # Our server sends null without lines, and also if finding the times would be expensive.
    return (False, None) if first is None or last is None else (True, (first, max(first, last)))


def decode_row(row: Any, *, service: str) -> ListedJob | None:
    """Return a row of the list; None if it has no id."""
    job_id = _text(row, "id") if isinstance(row, dict) else None
    if not job_id:
        return None
    job_status = _text(row, "job_status")
    return ListedJob(
        job_id=job_id,
        job_name=_text(row, "job_name") or _text(row, "name"),
        state=_own_state(row) or fused_state("", False, job_status, None),
        created_at=_moment(row, "creation_date"),
        state_since=_moment(row, "job_status_date"),
        instance_id=_text(row, "instance_id"),
        instance_type=_text(row, "instance_type"),
        service=service,
        lines=_number(row, "lines"),
    )


def _own_state(reply: Mapping[str, Any]) -> JobState | None:
    value = reply.get("state")
    return JobState(value) if isinstance(value, str) and value in JobState.__members__ else None


def _aware(moment: datetime | None) -> datetime | None:
    # Python servers write naive UTC.
    try:
        if moment is None or moment.tzinfo is UTC:
            return moment
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        # Near the ends of the calendar, some offsets have no time in UTC.
        return None


def _moment(reply: Mapping[str, Any], key: str) -> datetime | None:
    value = reply.get(key)
    try:
        if isinstance(value, str) and value[10:11] == "T":
            # A list has thousands of times, and this is ten times as fast.
            return _aware(datetime.fromisoformat(value))
    except ValueError:
        pass  # for example, Python 3.11 reads no fraction of more than six digits
    try:
        return _aware(msgspec.convert(value, datetime | None))
    except msgspec.ValidationError:
        return None


def _text(reply: Mapping[str, Any], key: str) -> str | None:
    value = reply.get(key)
    return value if isinstance(value, str) else None


def _integer(reply: Mapping[str, Any], key: str) -> int | None:
    value = reply.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(reply: Mapping[str, Any], key: str) -> int | None:
    value = _integer(reply, key)
    return value if value is not None and value >= 0 else None


def _boolean(reply: Mapping[str, Any], key: str) -> bool | None:
    value = reply.get(key)
    return value if isinstance(value, bool) else None


def _texts(reply: Mapping[str, Any], key: str) -> Mapping[str, str]:
    value = reply.get(key)
    return {name: text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
