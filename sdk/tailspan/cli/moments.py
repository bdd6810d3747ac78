"""Times on the command line: what a user may type, and what a terminal or a pipe shows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from tailspan._durations import age_text, parse_duration_s
from tailspan.errors import ConfigError

__all__ = ["MOMENT", "MomentType", "clock_text", "moment_text", "with_age", "zone_name"]


if TYPE_CHECKING:
    _ParamType = click.ParamType[datetime]
else:
    _ParamType = click.ParamType


class MomentType(_ParamType):
    """A moment: how long ago (``10m``), or a time (``2026-11-29T10:00``), which is local unless it has a zone."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the moment (aware UTC)."""
        if isinstance(value, datetime):
            return value
        try:
            return datetime.fromtimestamp(datetime.now(UTC).timestamp() - parse_duration_s(value), UTC)
        except (ConfigError, OverflowError, ValueError, OSError):
            pass
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError, OSError):
            self.fail(f"{value!r} is neither an age such as 10m or 24h nor a time such as 2026-11-29T10:00", param, ctx)


MOMENT = MomentType()


def moment_text(time: datetime, *, local: bool, milliseconds: bool = False) -> str:
    """Return a time: local with its zone for people, UTC as ISO 8601 for programs.

    Args:
        time: An aware time.
        local: Whether people read it.
        milliseconds: Whether to show them.
    """
    part = f".{time.microsecond // 1000:03}" if milliseconds else ""
    if not local:
        return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%S}{part}Z"
    here = time.astimezone()
    return f"{here:%Y-%m-%d %H:%M:%S}{part} {here:%Z}"


def clock_text(time: datetime, now: datetime) -> str:
    """Return a local time in as few characters as its age allows; `zone_name` goes into the column's head.

    Args:
        time: An aware time.
        now: The present.
    """
    here, today = time.astimezone(), now.astimezone()
    if here.date() == today.date():
        return f"{here:%H:%M:%S}"
    return f"{here:%m-%d %H:%M}" if here.year == today.year else f"{here:%Y-%m-%d}"


def zone_name(now: datetime) -> str:
    """Return the name of the local time zone."""
    return f"{now.astimezone():%Z}"


def with_age(time: datetime, now: datetime) -> str:
    """Return a local time with its age: ``2026-11-29 21:12:40 CET (3m ago)``."""
    return f"{moment_text(time, local=True)} ({age_text((now - time).total_seconds())})"
