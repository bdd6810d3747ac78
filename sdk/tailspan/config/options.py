"""Tables of the configuration, and one boundary where pydantic's errors become `ConfigError`s."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tailspan.config.layers import Loc
from tailspan.errors import ConfigError

__all__ = ["Options", "OptionsTable", "Where", "config_error", "key_text", "validate_options"]

Where: TypeAlias = Callable[[Loc], str | None]

Model = TypeVar("Model", bound=BaseModel)

_KEY_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
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


class Options(BaseModel):
    """Base of every table of the configuration: unknown keys are errors, loaded values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)


class OptionsTable(dict[str, Any]):
    """A service's raw options with the place of each key. Its repr shows no values, because some are secret.

    Attributes:
        loc: Path of the table.
        where: Returns the place of a key, for error messages.
    """

    def __init__(self, options: Mapping[str, Any], loc: Loc, where: Where) -> None:
        super().__init__(options)
        self.loc = loc
        self.where = where

    def __repr__(self) -> str:
        return f"<options {', '.join(self)}>"


def validate_options(model: type[Model], key_prefix: str, table: Mapping[str, Any]) -> Model:
    """Validate one service's table, so that errors name ``KEY_PREFIX.KEY`` and where it was written.

    Args:
        model: The model of the service type's options, usually a subclass of `Options`; ``type`` is optional there.
        key_prefix: Path of the table, such as ``services.fused``.
        table: The raw options, as in `Settings.services`.

    Raises:
        ConfigError: A key is unknown or a value does not fit.
    """
    where: Where = table.where if isinstance(table, OptionsTable) else _nowhere
    prefix: Loc = table.loc if isinstance(table, OptionsTable) else tuple(key_prefix.split("."))
    options = {key: value for key, value in table.items() if key != "type" or "type" in model.model_fields}
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise config_error(error, model, prefix, where) from None


def _nowhere(_loc: Loc) -> str | None:
    return None


def key_text(loc: Loc) -> str:
    """Return a key's path as in TOML, with array indexes (from 0) in brackets."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if _BARE.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            text += f".{shown}" if text else shown
    return text


def config_error(error: ValidationError, model: type[BaseModel], prefix: Loc, where: Where) -> ConfigError:
    """Return pydantic's errors as one `ConfigError`, with one line for each wrong key.

    Args:
        error: From pydantic.
        model: The validated model; its keys are suggested in place of unknown ones.
        prefix: Path of the validated table.
        where: Returns the place of a key (``config.toml:12`` or the name of an environment variable).
    """
    sentences: list[str] = []
    first: str | None = None
    for item in error.errors(include_url=False):
        loc = prefix + item["loc"]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError) and cause.key is not None:
            key, text = cause.key, str(cause)
            place = where(_loc_of(key))
        else:
            key, text = key_text(loc), _sentence(item["type"], item, model, loc)
            place = where(loc)
        first = first or key
        sentences.append(": ".join(part for part in (place, key, text) if part))
    return ConfigError("\n".join(sentences), key=first)


def _loc_of(key: str) -> Loc:
    return tuple(int(index) if index else name for name, index in _KEY_PART.findall(key))


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
    elif kind == "greater_than":
        text = f"expected more than {context['gt']:g}"
    elif kind == "too_short":
        text = "expected at least one"
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
    import difflib

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
