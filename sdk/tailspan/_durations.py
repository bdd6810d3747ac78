"""Durations as people write and read them: one form for the command line, the page, the SDK and the configuration.

Standard library only, and little of it: `tailspan run` imports this.
"""

from __future__ import annotations

from tailspan.errors import ConfigError

__all__ = ["age_text", "duration_text", "parse_duration_s"]

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_PART = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|[smhdw])"
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_TOO_LONG_S = 1e15


def duration_text(seconds: float) -> str:
    """Return a duration in at most two units: ``850 ms``, ``12.3 s``, ``4m 05s``, ``3h 20m``."""
    if (whole_ms := round(seconds * 1000)) < 1000:
        return f"{whole_ms} ms"
    if seconds < 59.95:
        # A duration that was given, not measured, is often a whole number.
        return f"{seconds:.0f} s" if seconds == int(seconds) else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"


def age_text(seconds: float) -> str:
    """Return an age in one unit: ``now``, ``12s ago``, ``3h ago``; ``in 5m`` for the future.

    Args:
        seconds: The age; negative for the future.
    """
    size = abs(seconds)
    if size < 1:
        return "now"
    text = next(f"{size // unit:.0f}{name}" for unit, name in _AGES if size >= unit)
    return f"{text} ago" if seconds > 0 else f"in {text}"


def parse_duration_s(value: object) -> float:
    """Return a duration in seconds.

    Args:
        value: Text such as ``10s``, ``500ms``, ``24h``, ``30d``, ``1h30m``; a number, or text without a unit, is in
            seconds.

    Raises:
        ConfigError: The value is not a duration, or it is negative.
    """
    if isinstance(value, str):
        import re  # takes milliseconds, and most commands parse no duration

        text = value.strip()
        if re.fullmatch(_NUMBER, text):
            return float(text)
        if re.fullmatch(rf"(?:{_PART})+", text):
            return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text))
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _TOO_LONG_S:
        return float(value)
    raise ConfigError('expected a duration such as "10s", "500ms", "24h", "30d" or "1h30m", or a number of seconds')
