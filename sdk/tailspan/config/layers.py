"""The layers of the configuration, and the place of each key in its layer. Standard library only.

A layer is a table shaped like the TOML file. Upper layers win key by key; `below` resolves different keys that set the
same thing.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tailspan._config_file import read_config_text
from tailspan.config.signals import SIGNALS
from tailspan.errors import ConfigError

__all__ = ["Layer", "Loc", "below", "environment_layer", "file_layer", "merged", "parse_pairs", "set_in"]

Loc: TypeAlias = tuple[str | int, ...]
"""The path of a key, such as ``("agent", "watch", 0, "name")``."""

_PREFIX = "TAILSPAN_"
_HEADER = re.compile(r"""\s*(\[\[?)((?:[^\]"'#]|"[^"]*"|'[^']*')+)\]""")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings.

    Attributes:
        table: The settings, shaped like the TOML file.
        places: Where each key was written, as ``FILE:LINE`` or a variable's name; a nested key without a place of
            its own has that of the key around it.
    """

    table: dict[str, Any]
    places: Mapping[Loc, str]

    def where(self, loc: Loc) -> str | None:
        """Return the place of a key, or of the nearest key around it; None when this layer does not set the key."""
        inner: Any = self.table
        for part in loc:
            if isinstance(inner, str):
                break  # one variable sets a whole list: it is the place of every element
            try:
                inner = inner[part]
            except (LookupError, TypeError):
                return None
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.places:
                return self.places[loc[:length]]
        return None


def set_in(table: dict[str, Any], path: Sequence[str], value: object) -> bool:
    """Set a key in nested tables, which are made as needed; return False if a key on the way is not a table."""
    inner: Any = table
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
    inner[path[-1]] = value
    return True


def merged(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all layers as one table; the first one is the uppermost."""
    result: dict[str, Any] = {}
    for table in tables:
        result = _over(result, below(result, table))
    return result


def _over(upper: dict[str, Any], lower: dict[str, Any]) -> dict[str, Any]:
    """Return both tables as one; where both have a key, a table goes into the table, and any other value wins."""
    result = dict(lower)
    for key, value in upper.items():
        under = result.get(key)
        result[key] = _over(value, under) if isinstance(value, dict) and isinstance(under, dict) else value
    return result


def below(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lower layer without the keys that the upper one overrides under another name.

    A general OTLP key of an upper layer beats the same key for one signal in a lower one; headers are one value, so
    that no header goes to an endpoint it was not meant for; a token beats a token file, and the other way round.
    """
    result: dict[str, Any] = copy.deepcopy(dict(lower))
    high, low = _table(upper.get("otlp")), _table(result.get("otlp"))
    if "headers" in high:
        low.pop("headers", None)
    for signal in SIGNALS:
        own = _table(low.get(signal))
        for key in high:
            own.pop(key, None)
        if "headers" in _table(high.get(signal)):
            own.pop("headers", None)
    services = _table(upper.get("services"))
    pairs = [(upper.get("agent"), result.get("agent"))]
    pairs += [(services.get(name), options) for name, options in _table(result.get("services")).items()]
    for above, under in pairs:
        if _table(above).keys() & {"token", "token_file"}:
            _table(under).pop("token", None)
            _table(under).pop("token_file", None)
    return result


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def parse_pairs(text: str, *, variable: str) -> dict[str, str]:
    """Return the pairs of ``key=value,key2=value2``, percent-decoded.

    Source: OpenTelemetry specification, OTLP exporter, "Specifying headers via environment variables" and Resource
    SDK, "Specifying resource information via an environment variable".

    Raises:
        ConfigError: A pair has no key or no ``=``; the message contains no value.
    """
    from urllib.parse import unquote

    pairs: dict[str, str] = {}
    for number, pair in enumerate(text.split(","), 1):
        key, equals, value = pair.partition("=")
        if not pair.strip():
            continue
        if not equals or not key.strip():
            raise ConfigError(f"{variable}: pair {number} is not key=value (write , and = in values as %2C and %3D)")
        pairs[unquote(key.strip())] = unquote(value.strip())
    return pairs


def environment_layer(environ: Mapping[str, str], known: Sequence[str], service_names: Sequence[str]) -> Layer:
    """Return the settings of the ``TAILSPAN_*`` variables; an empty variable counts as unset.

    Args:
        environ: The environment.
        known: The top-level keys of the file; a nested variable below any other name is an error.
        service_names: Names of configured services, to restore the case that upper-case variables have lost.
    """
    table: dict[str, Any] = {}
    places: dict[Loc, str] = {}
    case = {name.lower(): name for name in service_names}
    for variable, value in sorted(environ.items()):
        if not variable.upper().startswith(_PREFIX) or not value:
            continue
        path = variable[len(_PREFIX) :].lower().split("__")
        if path == ["state_dir"]:
            path = ["services", "local", "state_dir"]
            if environ.get("TAILSPAN_SERVICES__LOCAL__STATE_DIR"):
                continue
        if path[0] not in known:
            if len(path) > 1:
                raise ConfigError(f"{variable}: there is no key {path[0]!r}; known: {', '.join(known)}", key=path[0])
            continue
        if path[0] == "services" and len(path) > 1:
            path[1] = case.get(path[1], path[1])
        pairs = path[0] == "otlp" and path[-1] in {"headers", "resource"}
        if not set_in(table, path, parse_pairs(value, variable=variable) if pairs else value):
            outer = _PREFIX + "__".join(path[:-1]).upper()
            raise ConfigError(f"{variable} and {outer} are both set: keep one of them", key=".".join(path))
        places[tuple(path)] = variable
    return Layer(table, places)


def file_layer(path: Path | None) -> Layer:
    """Return the settings of the TOML file; without a file, an empty layer.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or is not TOML.
    """
    if path is None:
        return Layer({}, {})
    text = read_config_text(str(path))
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_toml(path, text, error) from None
    return Layer(table, {loc: f"{path}:{line}" for loc, line in _key_lines(text)})


def _broken_toml(path: Path, text: str, error: Exception) -> ConfigError:
    if isinstance(error, RecursionError):
        return ConfigError(f"{path}: broken TOML: too deeply nested")
    message = str(error)
    found = _TOML_PLACE.search(message)
    if found is None:
        return ConfigError(f"{path}: broken TOML: {message}")
    lines = text.split("\n")
    line, column = (found[1], found[2]) if found[1] else (len(lines), len(lines[-1]) + 1)
    return ConfigError(f"{path}:{line}:{column}: broken TOML: {message[: found.start()]}")


def _key_lines(text: str) -> Iterator[tuple[Loc, int]]:
    """Yield the path and line of each table and key, by patterns: exact enough for error messages."""
    table: Loc = ()
    counts: dict[Loc, int] = {}
    quote: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if quote is not None:
            quote = None if line.count(quote) % 2 else quote
            continue
        if header := _HEADER.match(line):
            table = _inside(_parts(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            yield table, number
        elif key := _KEY.match(line):
            yield table + _parts(key[1]), number
        quote = next((mark for mark in ('"""', "'''") if line.count(mark) % 2), None)


def _parts(dotted: str) -> Loc:
    return tuple(part.strip("\"'") for part in _KEY_PART.findall(dotted))


def _inside(names: Loc, counts: Mapping[Loc, int]) -> Loc:
    """Return a header's path, with the index of the array element that it extends."""
    path: Loc = ()
    for position, name in enumerate(names):
        path = (*path, name)
        if path in counts and position < len(names) - 1:
            path = (*path, counts[path])
    return path
