"""Durations, sizes and the state directory: values as people write them. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from tailspan._durations import parse_duration_s
from tailspan.errors import ConfigError

__all__ = ["parse_duration_s", "parse_size_bytes", "platform_state_dir", "serve_token_file"]

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]?i?)b?", re.IGNORECASE)
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size_bytes(value: object) -> int:
    """Return a size in bytes.

    Args:
        value: Text such as ``100MiB``, ``10GiB`` (powers of 1024) or ``3MB`` (powers of 1000), in any case; a whole
            number, or text without a unit, is in bytes.

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


def serve_token_file() -> Path:
    """Return the file with the token that `tailspan serve` makes for this user.

    Raises:
        ConfigError: The home directory is not known.
    """
    return platform_state_dir() / "serve-token"
