"""Delays before retries. Pure: the caller brings the clock and the random numbers."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

__all__ = ["MAX_RETRY_AFTER_S", "backoff_s", "parse_retry_after_s"]

MAX_RETRY_AFTER_S = 3600.0
"""The longest delay that a server can demand, in seconds: a wrong header must not stop a caller for years."""

_DELTA_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


def backoff_s(
    attempt: int,
    jitter: float,
    *,
    first_s: float = 0.5,
    max_s: float = 30.0,
    retry_after_s: float | None = None,
) -> float:
    """Return how long to wait after a failed attempt.

    Args:
        attempt: How many attempts failed before this one; 0 after the first.
        jitter: A random number in [0, 1): spreads callers that failed at one moment.
        first_s: Longest delay after the first attempt, in seconds; it doubles with each further one.
        max_s: Where doubling stops, in seconds.
        retry_after_s: Delay that the server demands, in seconds, if it does: the result is never less, up to
            `MAX_RETRY_AFTER_S`, and up to a tenth more, so that callers with the same demand do not all retry at the
            same moment.

    Returns:
        Seconds: between half of the delay and the whole of it.
    """
    # 2.0**1024 overflows, and a caller may try for ever.
    longest_s = min(max_s, first_s * 2.0 ** min(attempt, 64))
    delay_s = longest_s * (0.5 + 0.5 * jitter)
    if retry_after_s is None:
        return delay_s
    return max(delay_s, min(retry_after_s, MAX_RETRY_AFTER_S) * (1.0 + 0.1 * jitter))


def parse_retry_after_s(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a ``Retry-After`` header demands.

    Args:
        value: The header: seconds, or an HTTP date.
        now: The present moment (aware), which a date is compared with.

    Returns:
        Seconds, from 0 to `MAX_RETRY_AFTER_S`; None without a valid header.

    Source: RFC 9110, section 10.2.3; fractions are not in it, but gateways send them.
    """
    text = (value or "").strip()
    if _DELTA_SECONDS.fullmatch(text):
        return min(float(text), MAX_RETRY_AFTER_S)
    from email.utils import parsedate_to_datetime  # slow to import, and rarely needed

    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - now).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None
