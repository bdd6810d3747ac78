"""Why a job failed: stack trace or last lines of its log, error type, exit reason, fingerprint. Pure."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Sequence

import msgspec

from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.stack_traces import last_stack
from tailspan_agent.otlp.text import shorten_stack

__all__ = [
    "MAX_LINE_CHARS",
    "Failure",
    "error_type",
    "exit_reason",
    "failure_of",
    "fingerprint_of",
    "out_of_memory_line",
]

_MAX_TYPE_CHARS = 200
_MAX_MESSAGE_CHARS = 2000
MAX_LINE_CHARS = 4000
"""How much of a line is searched."""
_MAX_LINES = 2000
_LAST_LINES = 20
_LAST_LINE_CHARS = 1000
# Loki rejects a record whose attributes have more than 64 KB in total.
_MAX_STACK_BYTES = 48 * 1024

_NAMES_A_PLACE = re.compile(r'File "|at |\d++: |Caused by: |\[cause\]: ')
_FOLDERS = re.compile(r"""(?<![\w/.@~+-])(?:[\w.@~+-]*+/)++(?=[^/\s])""")
_ID = re.compile(r"(?i)\b(?:0x)?(?=[a-f]*+\d)[0-9a-f]{8,}+(?:-[0-9a-f]++)*+\b")
_NUMBER = re.compile(r"\d++")

_SIGNALLED = 128
_BY_STATE = {JobState.LOST: "lost", JobState.TIMED_OUT: "timeout", JobState.CANCELED: "canceled"}
_OUT_OF_MEMORY = re.compile(
    r"(?i)\bout of memory\b|\bOutOfMemory|\bMemoryError\b|\boom[- ]?kill|\bcannot allocate memory\b|\bstd::bad_alloc\b"
)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed, from its log.

    Attributes:
        exception_type: The type of the exception in the last stack trace; None without one.
        message: The message of the exception, or the last line that is not empty.
        stacktrace: The stack trace with the traces that it is chained to, at most 48 KB; None without one.
        last_lines: The last lines that are not empty, at most 20, oldest first.
    """

    exception_type: str | None
    message: str
    stacktrace: str | None
    last_lines: tuple[str, ...]


def failure_of(lines: Sequence[str]) -> Failure | None:
    """Return why a job failed.

    A stack trace must have a frame and an exception. Its lines may have a prefix of constant width (a worker's name,
    with lines of other workers between), and its first line any prefix (a logger's).

    Args:
        lines: The last lines of its log, cleaned, oldest first; a few hundred are enough.

    Returns:
        The failure; None if all lines are empty.
    """
    lines = [line[:MAX_LINE_CHARS] for line in lines[-_MAX_LINES:]]
    last_lines = tuple(line[:_LAST_LINE_CHARS] for line in lines if line.strip())[-_LAST_LINES:]
    if not last_lines:
        return None
    found = last_stack(lines)
    if found is None:
        return Failure(
            exception_type=None, message=last_lines[-1][:_MAX_MESSAGE_CHARS], stacktrace=None, last_lines=last_lines
        )
    return Failure(
        exception_type=found.exception_type[:_MAX_TYPE_CHARS],
        message=found.message[:_MAX_MESSAGE_CHARS],
        stacktrace=shorten_stack("\n".join(found.lines), _MAX_STACK_BYTES),
        last_lines=last_lines,
    )


def fingerprint_of(error_type: str, message: str, failure: Failure | None) -> str:
    """Return 16 hexadecimal digits that are equal for the same failure in another run.

    They depend on the types and functions of the stack trace, or else on the message, but not on line numbers,
    addresses, ids, counts and folders: edits of other lines, another host or other data do not change them.

    Args:
        error_type: The ``error.type``.
        message: Why the job failed.
        failure: The failure from its log, if any.
    """
    stack = failure.stacktrace if failure is not None else None
    parts = [error_type]
    for line in stack.split("\n") if stack else ():
        line = line.lstrip(" |+\t")
        if _NAMES_A_PLACE.match(line):
            parts.append(_stable(line))
    if len(parts) == 1:
        parts.append(_stable(message.split("\n")[0]))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


def error_type(job: JobStatus, failure: Failure | None) -> str | None:
    """Return the ``error.type`` of a failed job, None for other jobs.

    It is ``lost``, the exception's type, the signal (``SIGKILL``), the exit code (``exit 3``) or ``_OTHER``: the first
    that is known.
    """
    if job.state is JobState.LOST:
        return "lost"
    if job.state is not JobState.FAILED:
        return None
    if failure and failure.exception_type:
        return failure.exception_type
    if job.exit_code is None:
        return "_OTHER"
    return _signal_name(job.exit_code) or f"exit {job.exit_code}"


def exit_reason(job: JobStatus, failure: Failure | None) -> str | None:
    """Return why a job ended without success; None if it succeeded or has not ended.

    It is ``lost``, ``timeout`` or ``canceled``; for a failed job ``out_of_memory`` (if the log or the service reports
    it; a SIGKILL alone is no proof), ``exception``, ``signal``, ``exit_code`` or ``unknown``.
    """
    if job.state is not JobState.FAILED:
        return _BY_STATE.get(job.state)
    if out_of_memory_line(job, failure) is not None:
        return "out_of_memory"
    if failure and failure.exception_type:
        return "exception"
    if job.exit_code is None:
        return "unknown"
    return "signal" if _signal_name(job.exit_code) else "exit_code"


def out_of_memory_line(job: JobStatus, failure: Failure | None) -> str | None:
    """Return the text that reports out of memory: the service's, the exception or a last line; None without one."""
    texts = [job.error or ""]
    if failure is not None:
        texts += [failure.exception_type or "", failure.message, *reversed(failure.last_lines)]
    return next((text for text in texts if _OUT_OF_MEMORY.search(text)), None)


def _stable(text: str) -> str:
    return _NUMBER.sub("0", _ID.sub("0", _FOLDERS.sub("", text[:MAX_LINE_CHARS])))


def _signal_name(exit_code: int) -> str | None:
    try:
        return signal.Signals(exit_code - _SIGNALLED).name
    except ValueError:
        return None
