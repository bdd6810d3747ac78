"""The configuration in a bug report, without secrets.

There are two lines of defence. `safe_settings` shows only values of keys that are known to hold no secret. And because
an error message or a log line may quote anything, `known_secrets` collects every secret that this process can know;
a `Redactor` with these searches the whole report.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from tailspan.config import Settings
from tailspan_agent.records.redact import REDACTED

__all__ = ["known_secrets", "possible_secrets", "safe_settings"]

_SECRET_NAME = re.compile(r"token|secret|passw|key|credential|auth|headers|cookie", re.IGNORECASE)
_OURS = ("TAILSPAN_", "OTEL_", "FUSED_")
# Values below these keys are never shown.
_NEVER = {"token", "headers", "attributes", "resource", "literal", "regex"}
_FILES = {"token_file", "ca_file", "client_cert", "client_key", "files"}
_OF_SERVICES = {"type", "base_url", "state_dir", "group", "keep_finished", "scheme", "requests_per_second", "timeout"}
# Guessed secrets need a minimum length: redacting short words would make the report unreadable.
_GUESS_CHARS = 8
_BROKEN_CHARS = 6
_FILE_BYTES = 64 * 1024

Loc = tuple[str | int, ...]


def safe_settings(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return each key that was set, with value and source; values that may be secret as ``[REDACTED]``.

    Args:
        settings: The loaded configuration. Keys with their default are left out.
        environ: A name in ``redact.env`` is shown if it is a variable here; otherwise it may be the secret itself.
    """
    safe = {}
    for loc, value in _leaves((), settings):
        if value is not None and (source := settings.source_of(*loc)):
            safe[_key(loc)] = f"{_safe_value(loc, value, environ)}  ({source})"
    return safe


def _plain_url(text: str) -> str:
    """Return text without the credentials, query and fragment that it has if it is a URL."""
    head, at, rest = text.rpartition("@")
    if at:
        scheme, separator, _ = head.partition("://")
        text = f"{scheme}{separator}{REDACTED}@{rest}" if separator else f"{REDACTED}@{rest}"
    if "://" not in text:
        return text
    plain = re.split(r"[?#]", text, maxsplit=1)[0]
    return plain if plain == text else f"{plain}?{REDACTED}"


def _leaves(loc: Loc, value: object) -> Iterator[tuple[Loc, object]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves((*loc, name), getattr(value, name))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves((*loc, str(name)), inner)
    elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        for number, item in enumerate(value):
            yield from _leaves((*loc, number), item)
    else:
        yield loc, value


def _key(loc: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _safe_value(loc: Loc, value: object, environ: Mapping[str, str]) -> str:
    name = loc[-1]
    if isinstance(value, list):
        return "[" + ", ".join(_safe_value(loc, item, environ) for item in value) + "]"
    if _NEVER & set(loc) or (loc[0] == "services" and name not in _OF_SERVICES | _FILES):
        return REDACTED
    if name in _FILES and isinstance(value, str | Path):
        # The value may be the secret itself, written in place of its file.
        return str(value) if _exists(Path(value)) else f"{REDACTED} (no such file)"
    if loc == ("redact", "env"):
        return str(value) if value in environ else f"{REDACTED} (no such variable)"
    if isinstance(value, bool | int | float | Path):
        return str(value)
    return _plain_url(value) if isinstance(value, str) else REDACTED


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def known_secrets(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the secrets of a configuration and the environment by their source, for a `Redactor`.

    Args:
        settings: The loaded configuration; files that it names are read if possible.
        environ: The environment; variables whose name suggests a secret count too.
    """
    secrets: dict[str, str] = {}
    for loc, value in _leaves((), settings):
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            source = f"{_key(loc)} {number}"
            secrets |= {f"{source} {part}".rstrip(): text for part, text in _secrets_of_value(loc, item)}
    for name in settings.redact.env:
        secrets[f"redact.env {name}"] = environ.get(name, name)
    return {**secrets, **_environment_secrets(environ)}


def _secrets_of_value(loc: Loc, value: object) -> Iterator[tuple[str, str]]:
    """Yield the secrets in one value of the configuration, each with the part that it is."""
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        yield "", secret
        # an error may quote the credentials of a header without their scheme
        yield "credentials", secret.rpartition(" ")[2]
    elif loc[-1] in _FILES and value:
        path = Path(str(value))
        yield "", _content(path) if _exists(path) else str(value)
    else:
        if loc[0] == "services" and loc[-1] not in _OF_SERVICES | _FILES:
            yield "", str(value)
        if isinstance(value, str):
            yield from _parts_of_url(value).items()


def possible_secrets(path: Path | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return every text of a configuration that cannot be loaded: each may be a secret.

    Args:
        path: The file; None without one.
        environ: The environment; every value of our own variables counts.
    """
    table: dict[str, Any] = {}
    if path is not None:
        with suppress(OSError, ValueError, RecursionError):
            table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    texts = {_key(loc): str(value) for loc, value in _leaves((), _without_lists(table))}
    texts |= {name: value for name, value in environ.items() if name.upper().startswith(_OURS)}
    texts = {place: text for place, text in texts.items() if len(text) >= _BROKEN_CHARS and text != str(path)}
    return {**texts, **_environment_secrets(environ)}


def _without_lists(value: object) -> object:
    if isinstance(value, list):
        return {str(number): _without_lists(item) for number, item in enumerate(value)}
    return {name: _without_lists(item) for name, item in value.items()} if isinstance(value, dict) else value


def _environment_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, value in environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _GUESS_CHARS and not name.upper().endswith("_FILE"):
            found[name] = value
        found |= {f"{name} {part}": text for part, text in _parts_of_url(value).items()}
    return found


def _parts_of_url(text: str) -> dict[str, str]:
    if "://" not in text:
        return {}
    try:
        parts = urlsplit(text)
    except ValueError:
        return {}
    user, at, _ = text.partition("://")[2].rpartition("@")
    texts = {"user": user.partition(":")[2] or user if at else ""}
    texts |= {f"query {number}": pair.partition("=")[2] for number, pair in enumerate(parts.query.split("&"))}
    return {f"{name} {way.__name__}": way(value) for name, value in texts.items() for way in (str, unquote) if value}


def _content(path: Path) -> str:
    # reading a device may never end, and reading a pipe may never start
    if not path.expanduser().is_file():
        return ""
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
