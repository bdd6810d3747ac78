"""Ids that any program can compute from a job's id, so that a job has one trace however it is reached.

The rules are part of the contract: docs/traces.md publishes a test vector.
"""

from __future__ import annotations

from tailspan.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["check_job_id", "is_trace_id", "job_hash", "span_id", "trace_id"]

_VERSION = "tailspan/1"
_MAX_JOB_ID_CHARS = 512
_HEX = frozenset("0123456789abcdef")
_TRACE_ID_CHARS = 32


def _sha256() -> Callable[[bytes], Any]:
    # The interpreter's own: `hashlib` loads OpenSSL, which costs `tailspan run` 4 ms.
    for module in ("_sha2", "_sha256"):
        try:
            function: Callable[[bytes], Any] = __import__(module).sha256
        except ImportError:
            continue
        return function
    import hashlib

    return hashlib.sha256


_hash = _sha256()


def _digest(*parts: str) -> bytes:
    return bytes(_hash("\0".join((_VERSION, *parts)).encode("utf-8", "surrogatepass")).digest())


def trace_id(identity: str, job_id: str, attempt: int = 1) -> str:
    """Return the id of a job's trace.

    Args:
        identity: The service's identity (a UUID for local, the normalised base URL for Fused).
        job_id: The job's id at that service.
        attempt: 1 unless the service reports retries of one job.

    Returns:
        32 lower-case hexadecimal digits: the first 16 bytes of sha256 over ``tailspan/1``, identity, job id and
        attempt, joined by NUL.
    """
    return _digest(identity, job_id, str(attempt))[:16].hex()


def span_id(identity: str, job_id: str, kind: str, attempt: int = 1) -> str:
    """Return the id of one of a job's spans.

    Args:
        identity: The service's identity.
        job_id: The job's id at that service.
        kind: Which span: ``run``, ``queued``, ``executing`` or ``submitted``.
        attempt: 1 unless the service reports retries of one job.

    Returns:
        16 lower-case hexadecimal digits: the first 8 bytes of the same hash with ``kind`` as a further part.
    """
    return _digest(identity, job_id, str(attempt), kind)[:8].hex()


def is_trace_id(text: str) -> bool:
    """Return whether a text is a valid W3C trace id: 32 lower-case hexadecimal digits, not all zero."""
    return len(text) == _TRACE_ID_CHARS and _HEX.issuperset(text) and bool(text.strip("0"))


def job_hash(identity: str, job_id: str) -> str:
    """Return the 16 hexadecimal digits that every ``log.record.uid`` of a job of an offset service starts with."""
    return _digest(identity, job_id, "log")[:8].hex()


def _is_no_text(char: str) -> bool:
    return char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff"


def check_job_id(job_id: str) -> str:
    """Return the id if it can be one; services escape it, so any printable text is allowed.

    Raises:
        ConfigError: The id is empty, too long, or has control characters or half of a surrogate pair, as an argument
            of a command has that is not UTF-8.
    """
    if not job_id or len(job_id) > _MAX_JOB_ID_CHARS or any(map(_is_no_text, job_id)):
        shown = repr(job_id[:60])
        raise ConfigError(
            f"{shown} is not a job id: expected 1 to {_MAX_JOB_ID_CHARS} printable characters", job_id=job_id
        )
    return job_id
