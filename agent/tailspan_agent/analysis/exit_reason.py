"""Why a job ended without success, in one of few words. Pure."""

from __future__ import annotations

import re
import signal

from tailspan.models import JobState, RunResponse
from tailspan_agent.analysis.failure import Digest

__all__ = ["error_type", "exit_reason", "out_of_memory_line"]

_SIGNALLED = 128
_BY_STATE = {JobState.LOST: "lost", JobState.TIMED_OUT: "timeout", JobState.CANCELED: "canceled"}
_OUT_OF_MEMORY = re.compile(
    r"(?i)\bout of memory\b|\bOutOfMemory|\bMemoryError\b|\boom[- ]?kill|\bcannot allocate memory\b|\bstd::bad_alloc\b"
)


def error_type(job: RunResponse, digest: Digest | None) -> str | None:
    """Return the ``error.type`` of a job that failed, of low cardinality; None for all others.

    ``lost``, else the exception's type, else ``SIGKILL`` and the like, else ``exit 3``, else ``_OTHER``.
    """
    if job.state is JobState.LOST:
        return "lost"
    if job.state is not JobState.FAILED:
        return None
    if digest and digest.exception_type:
        return digest.exception_type
    if job.exit_code is None:
        return "_OTHER"
    return _signal_name(job.exit_code) or f"exit {job.exit_code}"


def exit_reason(job: RunResponse, digest: Digest | None) -> str | None:
    """Return why a job ended: None if it succeeded or has not ended.

    ``lost``, ``timeout``, ``canceled``; of one that failed ``out_of_memory`` (where log or service say so; a SIGKILL
    alone proves nothing), ``exception``, ``signal``, ``exit_code`` or ``unknown``.
    """
    if job.state is not JobState.FAILED:
        return _BY_STATE.get(job.state)
    if out_of_memory_line(job, digest) is not None:
        return "out_of_memory"
    if digest and digest.exception_type:
        return "exception"
    if job.exit_code is None:
        return "unknown"
    return "signal" if _signal_name(job.exit_code) else "exit_code"


def out_of_memory_line(job: RunResponse, digest: Digest | None) -> str | None:
    """Return what says that memory ran out: the exception, a last line, or the service; None where nothing does."""
    said = [job.error or ""]
    if digest is not None:
        said += [digest.exception_type or "", digest.message, *reversed(digest.last_lines)]
    return next((text for text in said if _OUT_OF_MEMORY.search(text)), None)


def _signal_name(exit_code: int) -> str | None:
    try:
        return signal.Signals(exit_code - _SIGNALLED).name
    except ValueError:
        return None
