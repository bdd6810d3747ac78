"""Durations, sizes and lists as people write them in the configuration and in environment variables."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tailspan.errors import ConfigError

__all__ = [
    "Duration",
    "JsonList",
    "PositiveDuration",
    "Size",
    "StrList",
    "StrTable",
    "UserPath",
    "parse_duration_s",
    "parse_size_bytes",
    "platform_state_dir",
]

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|[smhdw])")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
_NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]?i?)b?", re.IGNORECASE)
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_duration_s(value: object) -> float:
    """Return a duration in seconds.

    Args:
        value: Text such as ``10s``, ``500ms``, ``24h``, ``30d``, ``1h30m``; a number, or text without a unit, is
            seconds.

    Raises:
        ConfigError: The value is not a duration, or it is negative.
    """
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            return float(text)
        if _DURATION.fullmatch(text):
            return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15 and math.isfinite(value):
        return float(value)
    raise ConfigError('expected a duration such as "10s", "500ms", "24h", "30d" or "1h30m", or a number of seconds')


def parse_size_bytes(value: object) -> int:
    """Return a size in bytes.

    Args:
        value: Text such as ``100MiB``, ``10GiB`` (powers of 1024) or ``3MB`` (powers of 1000), in any case; a whole
            number, or text without a unit, is bytes.

    Raises:
        ConfigError: The value is not a size, or it is negative.
    """
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.strip())
        if found and found[2].lower() in _BYTES:
            scale = _BYTES[found[2].lower()]
            return int(found[1]) * scale if found[1].isdigit() else int(float(found[1]) * scale)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ConfigError('expected a size such as "100MiB", "10GiB" or "3MB", or a whole number of bytes')


def _json_list(value: object) -> object:
    """Read text from an environment variable as JSON; a value from TOML stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ConfigError("expected a list (in an environment variable: a JSON array)") from None


def _str_list(value: object) -> object:
    """Read text from an environment variable as a JSON array, or as words with commas between them."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return [word.strip() for word in value.split(",") if word.strip()]
    return _json_list(value)


def _str_table(value: object) -> object:
    """Telemetry attributes are text: let people write ``shard = 3``."""
    if not isinstance(value, dict):
        return value
    return {key: _scalar_text(item) for key, item in value.items()}


def _scalar_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _user_path(value: object) -> object:
    if not isinstance(value, str | Path):
        return value
    if not str(value) or "\0" in str(value):
        raise ConfigError("expected the path of a file or directory")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ConfigError("the home directory of ~ is not known; write the whole path") from None


def platform_state_dir() -> Path:
    """Return the directory for state of this user on this platform; it need not exist.

    Source: XDG Base Directory Specification 0.8; Apple's File System Programming Guide.

    Raises:
        ConfigError: The home directory is not known.
    """
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "tailspan"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tailspan"
        xdg = os.environ.get("XDG_STATE_HOME", "")
        return (Path(xdg) if xdg.startswith("/") else Path.home() / ".local" / "state") / "tailspan"
    except RuntimeError:
        raise ConfigError("the home directory is not known: set HOME, or a state_dir in the configuration") from None


Duration = Annotated[float, BeforeValidator(parse_duration_s)]
PositiveDuration = Annotated[float, Field(gt=0), BeforeValidator(parse_duration_s)]
Size = Annotated[int, BeforeValidator(parse_size_bytes)]
StrList = Annotated[list[str], BeforeValidator(_str_list)]
StrTable = Annotated[dict[str, str], BeforeValidator(_str_table)]
UserPath = Annotated[Path, BeforeValidator(_user_path)]
JsonList = BeforeValidator(_json_list)
