"""Tokens that a server makes at its first start: other users of the machine must not read jobs over loopback."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tailspan._listeners import listening_users
from tailspan._private_dirs import make_private
from tailspan.errors import ConfigError

__all__ = ["own_token", "read_own_token"]

_MAX_BYTES = 1024


def own_token(path: Path, *, instead: str) -> str:
    """Return the token in a file, which is made with mode 0600 if it is missing.

    Args:
        path: The file.
        instead: What to set if the file cannot be used, for errors.

    Raises:
        ConfigError: The file cannot be made, or other users can read or write it.
    """
    try:
        make_private(path.parent)
        made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) if path.exists() else -1
        if fd < 0:
            with open(made, "x", opener=_open_private, encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
            try:
                os.link(made, path)  # fails where a second process was quicker: the first token is the one
            except FileExistsError:
                pass
            finally:
                made.unlink()
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        text = _read_private(fd)
    except OSError as error:
        raise ConfigError(f"cannot use {path} for a token: {error.strerror}; set {instead}", key=instead) from error
    if not text:
        raise ConfigError(f"{path} is open to other users, or has no token: delete it, or set {instead}", key=instead)
    return text


def read_own_token(path: Path, port: int) -> str | None:
    """Return the token of this user's server on a port of this machine, if it has one.

    None also if the port belongs to another user, who would receive the token, and where this is not known.

    Args:
        path: The token file.
        port: The TCP port that the token would be sent to.
    """
    try:
        text = _read_private(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        return None
    return text if text and listening_users(port) == {os.geteuid()} else None


def _read_private(fd: int) -> str:
    """Return the text of a file that only we can read and write; empty for another file."""
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return ""
        text = file.read(_MAX_BYTES).decode("ascii", "replace").strip()
    return text if text.isprintable() else ""


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
