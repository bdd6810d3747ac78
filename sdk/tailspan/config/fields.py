"""The types of configuration fields: how pydantic reads what people write in TOML and in environment variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tailspan.config.units import parse_duration_s, parse_size_bytes
from tailspan.errors import ConfigError

__all__ = ["Duration", "JsonList", "PositiveDuration", "Size", "StrList", "StrTable", "UserPath"]


def _json_list(value: object) -> object:
    """Parse the text of an environment variable as JSON; return a value from TOML unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ConfigError("expected a list (in an environment variable: a JSON array)") from None


def _str_list(value: object) -> object:
    """Parse the text of an environment variable as a JSON array or as comma-separated words."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return [word.strip() for word in value.split(",") if word.strip()]
    return _json_list(value)


def _str_table(value: object) -> object:
    """Turn numbers and booleans into text: attributes are text, and people write ``shard = 3``."""
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
        raise ConfigError("the home directory of ~ is not known; write the full path") from None


Duration = Annotated[float, BeforeValidator(parse_duration_s)]
PositiveDuration = Annotated[float, Field(gt=0), BeforeValidator(parse_duration_s)]
Size = Annotated[int, BeforeValidator(parse_size_bytes)]
StrList = Annotated[list[str], BeforeValidator(_str_list)]
StrTable = Annotated[dict[str, str], BeforeValidator(_str_table)]
UserPath = Annotated[Path, BeforeValidator(_user_path)]
JsonList = BeforeValidator(_json_list)
