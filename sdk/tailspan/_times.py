"""Times and durations as callers and services may give them, in the units that others take. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TypeAlias, overload

from tailspan.errors import ConfigError

__all__ = ["Seconds", "Since", "moment_of", "seconds_of", "since_ms_of", "time_of", "time_of_ms"]

_LATEST_NS = 253_402_214_400 * 10**9
"""The last day of the year 9999."""

Since: TypeAlias = int | datetime | timedelta
"""A moment: ms since the epoch, an aware datetime, or how long ago."""

Seconds: TypeAlias = float | timedelta
"""A duration: seconds, or a timedelta."""


def since_ms_of(since: Since | None, now_s: float) -> int | None:
    """Return a moment in ms since the epoch; None stays None.

    Args:
        since: The moment.
        now_s: The present moment, in seconds since the epoch: what a timedelta counts back from.

    Raises:
        ConfigError: A datetime without a time zone.
    """
    if isinstance(since, timedelta):
        return int((now_s - since.total_seconds()) * 1000)
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ConfigError(
                f"since_ms is {since.isoformat()}, which has no time zone: use an aware datetime", key="since_ms"
            )
        return int(since.timestamp() * 1000)
    return since


@overload
def seconds_of(duration: Seconds) -> float: ...
@overload
def seconds_of(duration: Seconds | None) -> float | None: ...
def seconds_of(duration: Seconds | None) -> float | None:
    """Return a duration in seconds; None stays None."""
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def time_of(text: object) -> datetime | None:
    """Return the time (aware UTC) of an ISO 8601 text, without a zone in UTC; None for what is not a time."""
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
        if time is None or time.tzinfo is UTC:
            return time
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def moment_of(nanos: int) -> datetime:
    """Return the time (aware UTC) of ns since the epoch, or the nearest one that there is: a file may have any time."""
    return datetime.fromtimestamp(min(max(nanos, 0), _LATEST_NS) / 1e9, UTC)


def time_of_ms(ms: object) -> datetime | None:
    """Return the time (aware UTC) of ms since the epoch; None for what is not a time after it."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC) if isinstance(ms, int | float) and ms > 0 else None
    except (ValueError, OverflowError, OSError):
        return None
