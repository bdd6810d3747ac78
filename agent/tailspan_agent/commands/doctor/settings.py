"""The configuration as a bug report may show it: what is known to be no secret, each with where it was written.

Two lines of defence. `shown_settings` lets through only what it knows; and `secrets_of` collects every secret that this
process can know, for a `Redactor` that searches the whole report, whatever wrote it.
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

__all__ = ["secrets_of", "secrets_of_broken", "shown_settings"]

_SECRET_NAME = re.compile(r"token|secret|passw|key|credential|auth|headers|cookie", re.IGNORECASE)
_OURS = ("TAILSPAN_", "OTEL_", "FUSED_")
# Whatever people write below these stays here.
_NEVER = {"token", "headers", "attributes", "resource", "literal", "regex"}
_FILES = {"token_file", "ca_file", "client_cert", "client_key", "files"}
_OF_SERVICES = {"type", "base_url", "state_dir", "group", "keep_finished", "scheme", "requests_per_second", "timeout"}
# Guesses need more length than what is known to be a secret: they must not blot out the report.
_GUESS_CHARS = 8
_BROKEN_CHARS = 6
_FILE_BYTES = 64 * 1024

Loc = tuple[str | int, ...]


def shown_settings(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return each key that was set, with its value and place; secrets, and what may be one, as ``[REDACTED]``.

    Args:
        settings: The loaded configuration. Keys that have their default are left out.
        environ: Tells which names of variables are such.
    """
    shown = {}
    for loc, value in _leaves((), settings):
        if value is not None and (source := settings.source_of(*loc)):
            shown[_key(loc)] = f"{_shown(loc, value, environ)}  ({source})"
    return shown


def _plain_url(text: str) -> str:
    """Return text that may be a URL without the credentials, query and fragment that it may carry."""
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


def _shown(loc: Loc, value: object, environ: Mapping[str, str]) -> str:
    name = loc[-1]
    if isinstance(value, list):
        return "[" + ", ".join(_shown(loc, item, environ) for item in value) + "]"
    if _NEVER & set(loc) or (loc[0] == "services" and name not in _OF_SERVICES | _FILES):
        return REDACTED
    if name in _FILES and isinstance(value, str | Path):
        # Who writes the secret itself where its file belongs must not find it in the report.
        return str(value) if _exists(Path(value)) else f"{REDACTED} (there is no such file)"
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


def secrets_of(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the secrets of a configuration and of the environment by where they come from, for a `Redactor`.

    Args:
        settings: The loaded configuration; files that it names are read where they can be.
        environ: The environment; values of variables that sound like secrets count too.
    """
    found: dict[str, str] = {}
    for loc, value in _leaves((), settings):
        key = _key(loc)
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{key} {number}"
            if isinstance(item, SecretStr):
                found[place] = item.get_secret_value()
                # An error may quote a header's credentials without the word before them.
                found[f"{place} credentials"] = item.get_secret_value().rpartition(" ")[2]
            elif loc[0] == "services" and loc[-1] not in _OF_SERVICES | _FILES:
                found[place] = str(item)
            if loc[-1] in _FILES and item:
                found[place] = _content(Path(str(item))) if _exists(Path(str(item))) else str(item)
            elif isinstance(item, str):
                found |= {f"{place} {part}": text for part, text in _parts_of_url(item).items()}
    for name in settings.redact.env:
        found[f"redact.env {name}"] = environ.get(name, name)
    return {**found, **_secrets_of_environment(environ)}


def secrets_of_broken(path: Path | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what may be a secret where the configuration cannot be loaded: every text in it.

    Args:
        path: The file; None: there is none.
        environ: The environment; of our own variables every value counts.
    """
    table: dict[str, Any] = {}
    if path is not None:
        with suppress(OSError, ValueError, RecursionError):
            table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    texts = {_key(loc): str(value) for loc, value in _leaves((), _without_lists(table))}
    texts |= {name: value for name, value in environ.items() if name.upper().startswith(_OURS)}
    texts = {place: text for place, text in texts.items() if len(text) >= _BROKEN_CHARS and text != str(path)}
    return {**texts, **_secrets_of_environment(environ)}


def _without_lists(value: object) -> object:
    if isinstance(value, list):
        return {str(number): _without_lists(item) for number, item in enumerate(value)}
    return {name: _without_lists(item) for name, item in value.items()} if isinstance(value, dict) else value


def _secrets_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
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
    # a device has no end, and a pipe may have no beginning
    if not path.expanduser().is_file():
        return ""
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
