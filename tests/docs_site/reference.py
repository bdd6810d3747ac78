"""The reference pages, generated from the code: commands, configuration keys, and the Python API."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import click
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

import tailspan
import tailspan.services
import tailspan.testing
from tailspan.cli import main
from tailspan.config import Options, Settings

__all__ = ["PAGES", "commands", "keys", "python"]

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
# Keys that the example names only beside others.
_IN_PLACE = {
    "token": "the token itself, instead of `token_file`",
    "password": "the password itself, instead of `password_file`",
    "type": "what the other keys are",
}
# Modules of the API, with what a reader finds there.
MODULES = {
    "tailspan": "The verbs, clients, and the results that they return.",
    "tailspan.services": "What a job service of your own implements.",
    "tailspan.testing": "Fakes, and the conformance kit for a job service.",
}


@cache
def commands() -> str:
    """Return the page of commands: usage, text and options of each, as `--help` prints them."""
    parts = [
        "# Commands",
        "What each command takes, from the program itself. For what they do together: [Command line](../cli.md).",
    ]
    for path, command in _commands(main, ("tailspan",)):
        name = " ".join(path)
        context = click.Context(command, info_name=name, help_option_names=["-h", "--help"], max_content_width=100)
        context.terminal_width = 100
        parts.append(f"## {name}")
        parts.append(f"```text\n{command.get_help(context).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not command.hidden:
        yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, name
            yield from _commands(inner, (*path, name))


@cache
def keys() -> str:
    """Return the page of configuration keys: type, default and meaning of each, from the settings."""
    parts = [
        "# Configuration keys",
        "Every key, from the settings themselves. How they work together: [Configuration](../configuration.md). "
        "Each key has a variable: `agent.state_dir` is `TAILSPAN_AGENT__STATE_DIR`.",
    ]
    rows = [
        _row(name, field, _meanings(Settings))
        for name, field in Settings.model_fields.items()
        if name == "default_service"
    ]
    parts += ["## General", _table(rows)]
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += _tables(name, field.annotation)
    parts.append("## services.NAME")
    parts.append("`type` chooses what the other keys are; its default is the section's name.")
    for kind, model in sorted(service_tables().items()):
        parts += [
            f'### type = "{kind}"',
            _table([_row(*item, _meanings(model)) for item in model.model_fields.items()]),
        ]
    parts += ['### type = "local"', _table(list(_example_rows("services.local")))]
    return "\n\n".join(parts) + "\n"


def service_tables() -> dict[str, type[BaseModel]]:
    """Return the options of each built-in service type, except `local`, which has them in its own way."""
    for module in pkgutil.walk_packages(tailspan.services.__path__, "tailspan.services."):
        importlib.import_module(module.name)
    found = {}
    for model in _subclasses(Options):
        named = re.search(r"of type ``(\w+)``", model.__doc__ or "")
        if named:
            found[named[1]] = model
    return {**found, "airflow": importlib.import_module("tailspan.services._http_options").LoginOptions}


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in model.__subclasses__():
        yield each
        yield from _subclasses(each)


def _tables(path: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the tables of a section, those inside it after it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for name, field in model.model_fields.items():
        nested = [
            each
            for each in (field.annotation, *get_args(field.annotation))
            if isinstance(each, type) and issubclass(each, BaseModel)
        ]
        if nested:
            inner.append((f"{path}.{name}", nested[0]))
        else:
            rows.append(_row(name, field, _meanings(model)))
    yield f"## {path}"
    yield (inspect.getdoc(model) or "").splitlines()[0].replace("``", "`")
    yield _table(rows)
    for name, each in inner:
        yield from _tables(name, each)


def _row(name: str, field: Any, meanings: Mapping[str, str]) -> tuple[str, str, str, str]:
    kind = _type(field.annotation)
    return (
        name,
        _unit(field) if kind == "number" else kind,
        _default(field),
        meanings.get(name) or _example_meaning(name),
    )


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {default} | {meaning} |" for name, kind, default, meaning in rows]
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    """Return what a reader writes for a type."""
    plain: Mapping[Any, str] = {
        bool: "true or false",
        int: "number",
        float: "number",
        str: "text",
        Path: "path",
        SecretStr: "text",
    }
    if annotation in plain:
        return plain[annotation]
    arguments = [each for each in get_args(annotation) if each is not type(None)]
    origin = get_origin(annotation)
    if origin is list:
        return "list"
    if origin is dict:
        return "table"
    if arguments and all(isinstance(each, str) for each in arguments):
        return " or ".join(f'`"{each}"`' for each in arguments)
    return _type(arguments[0]) if arguments else "text"


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        if field.default_factory is None:
            return "required"
        value = field.default_factory()
    if isinstance(value, Path):
        return "the platform's"
    if value is None or value in ("", [], {}, ()):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return ", ".join(f"`{each}`" for each in value)
    if isinstance(value, float) and _unit(field) == "duration":
        return f"`{_duration(value)}`"
    if _unit(field) == "size" and not value % 2**20:
        return f"`{value // 2**20}MiB`" if value % 2**30 else f"`{value // 2**30}GiB`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _unit(field: Any) -> str:
    """Return what a number is: a duration, a size, or a number."""
    text = repr(field)
    return "duration" if "parse_duration_s" in text else "size" if "parse_size_bytes" in text else "number"


def _duration(seconds: float) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)) if not seconds % size
    )
    return f"{seconds / size:g}{unit}"


def _meanings(model: type) -> dict[str, str]:
    """Return the text of each attribute in the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        section = re.search(
            r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(each.__doc__ or ""), re.MULTILINE | re.DOTALL
        )
        for name, text in re.findall(
            r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL
        ):
            found[name] = " ".join(text.split()).replace("``", "`").replace("|", r"\|")
    return found


def _example_meaning(name: str) -> str:
    """Return what config.example.toml says of a key of a service."""
    text = EXAMPLE.read_text(encoding="utf-8").partition("[agent]")[0]
    found = re.search(rf"^#{name} = .*?# (?:default|example)(?:; (.*)|: (.*))$", text, re.MULTILINE)
    if found:
        return found[1] or f"by default {found[2]}"
    return _IN_PLACE.get(name, "")


def _example_rows(table: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield the keys of a table from config.example.toml."""
    (text,) = re.findall(
        rf"^\[{re.escape(table)}\]\n(.*?)^$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for name, value, meaning in re.findall(r"^#(\w+) = (\S+)\s+# (.*)$", text, re.MULTILINE):
        is_default, _, rest = meaning.partition(";")
        default = (
            f"`{value}`"
            if is_default.startswith("default") and ":" not in is_default
            else is_default.removeprefix("default: ")
        )
        yield name, "text", default.replace("example", "none"), rest.strip() or _IN_PLACE.get(name, "")


@cache
def python() -> str:
    """Return the page of the Python API: signatures and docstrings of all public names."""
    parts = ["# Python reference", "Signatures and docstrings, from the code. How to use them: [Python](../python.md)."]
    for module, summary in MODULES.items():
        found = importlib.import_module(module)
        parts += [f"## {module}", summary]
        for name in found.__all__:
            value = getattr(found, name)
            if module != "tailspan" and name in tailspan.__all__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                parts += _documented(f"### {name}", name, value)
    return "\n\n".join(parts) + "\n"


def _documented(heading: str, name: str, value: Any) -> Iterator[str]:
    yield heading
    is_exception = inspect.isclass(value) and issubclass(value, BaseException)
    if not is_exception:
        yield f"```python\n{_signature(name, value)}\n```"
    yield _docstring(value)
    if inspect.isclass(value) and not is_exception:
        for inner, member in value.__dict__.items():
            plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if not inner.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
                yield f"**`{_signature(inner, plain).removeprefix('async ')}`**"
                yield _docstring(plain)


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f"class {name}"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    prefix = "async " if inspect.iscoroutinefunction(value) else ""
    return f"{prefix}{name}{found}".replace("'", "")


def _docstring(value: Any) -> str:
    """Return a docstring in Google style as Markdown."""
    text = inspect.getdoc(value) or ""
    lines = []
    in_section = in_example = False
    for line in text.replace("``", "`").splitlines():
        section = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        if in_example and not line.startswith("    "):
            in_example = False
            lines.append("```")
        if line == "Example:":
            in_example = True
            lines += ["", "```python"]
        elif in_example:
            lines.append(line[4:])
        elif section:
            in_section = True
            lines += ["", f"*{section[1]}*", ""]
        elif in_section and (entry := re.fullmatch(r"    (\*{0,2}\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith("    "):
            lines.append(("  " if lines and lines[-1].startswith(("- ", "  ")) else "") + line.strip())
        elif line and not line.startswith(" "):
            in_section = False
            lines.append(line)
        else:
            lines.append(line)
    return "\n".join(lines + ["```"] * in_example)


PAGES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "reference/commands.md": ("Commands", commands),
    "reference/keys.md": ("Configuration keys", keys),
    "reference/python.md": ("Python reference", python),
}
"""The generated pages: title and text by path."""
