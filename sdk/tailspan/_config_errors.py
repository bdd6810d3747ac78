"""One boundary where pydantic's errors become `ConfigError`s that name the key, its place and what is expected."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, ValidationError

from tailspan.errors import ConfigError

__all__ = ["Loc", "OptionsTable", "Where", "config_error", "key_text"]

Loc: TypeAlias = tuple[str | int, ...]
Where: TypeAlias = Callable[[Loc], str | None]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SECRET = re.compile(r"token|secret|passw|headers|credential|auth", re.IGNORECASE)
_MAX_SHOWN = 60
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text in quotes",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
    "path": "a path in quotes",
}


class OptionsTable(dict[str, Any]):
    """A service's raw options, which also know where each was written. Its repr shows no values: some are secret.

    Attributes:
        where: Tells the place of a key of this table, for error messages.
    """

    def __init__(self, options: Mapping[str, Any], where: Where) -> None:
        super().__init__(options)
        self.where = where

    def __repr__(self) -> str:
        return f"<options {', '.join(self)}>"


def key_text(loc: Loc) -> str:
    """Return a key's path as one writes it in TOML, with the place in an array in brackets, from 0."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if _BARE.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            text += f".{shown}" if text else shown
    return text


def config_error(error: ValidationError, model: type[BaseModel], prefix: Loc, where: Where) -> ConfigError:
    """Return pydantic's findings as one error: a sentence for each key at fault.

    Args:
        error: What pydantic found.
        model: The model that was validated; its keys are suggested for unknown ones.
        prefix: Path of the table that was validated.
        where: Tells the place of a key (``config.toml:12`` or the name of an environment variable).
    """
    sentences: list[str] = []
    first: str | None = None
    for item in error.errors(include_url=False):
        loc = prefix + item["loc"]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError) and cause.key is not None:
            key, text = cause.key, str(cause)
            place = where(tuple(key.split(".")))
        else:
            key, text = key_text(loc), _sentence(item["type"], item, model, loc)
            place = where(loc)
        first = first or key
        sentences.append(": ".join(part for part in (place, key, text) if part))
    return ConfigError("\n".join(sentences), key=first)


def _sentence(kind: str, item: Mapping[str, Any], model: type[BaseModel], loc: Loc) -> str:
    if kind == "extra_forbidden":
        return _unknown(str(loc[-1]), sorted(_keys_at(model, item["loc"][:-1])))
    if kind == "missing":
        return "is missing"
    context = item.get("ctx", {})
    if kind == "value_error":
        text = str(context["error"])
    elif kind in {"literal_error", "enum"}:
        text = f"expected {context['expected']}"
    elif kind in {"greater_than_equal", "less_than_equal"}:
        text = f"expected a number of {context.get('ge', context.get('le'))} or {'more' if 'ge' in context else 'less'}"
    elif kind.split("_")[0] in _EXPECTED:
        text = f"expected {_EXPECTED[kind.split('_')[0]]}"
    else:
        text = str(item["msg"])
    return text + _shown(item["input"], loc)


def _shown(value: object, loc: Loc) -> str:
    if any(isinstance(part, str) and _SECRET.search(part) for part in loc) or loc[:1] == ("services",) == loc[:-1]:
        return ""
    if isinstance(value, dict):
        return ", got a table"
    if isinstance(value, list):
        return ", got a list"
    if isinstance(value, bool):
        return f", got {str(value).lower()}"
    shown = repr(value) if isinstance(value, str | int | float) else str(value)
    return f", got {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '...'}"


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return "there is no such key" + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")


def _keys_at(model: type[BaseModel], loc: Loc) -> Iterator[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = next(_models_in(field.annotation), None) if field else None
        if inner is None:
            return
        model = inner
    yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
