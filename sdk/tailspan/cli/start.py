"""The program ``tailspan``: runs ``tailspan run`` and ``tailspan agent run`` at once, and all else through the group.

``tailspan run`` stands before every cron line, so it is parsed here without click, whose import costs as much as all
the rest of it; in an agent click would stay, 2 MiB that are used once. Whatever these parsers do not know,
`tailspan.cli.run` and `tailspan_agent.cli` parse, explain and reject.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any, NoReturn

    from tailspan.cli.run_job import RunOptions

__all__ = ["main", "parse_agent_run", "parse_run"]

_GARBAGE_OBJECTS = 50_000
_PLUGINS = "pydantic.plugin._loader"
_USAGE = 2
_OUR_ERROR = 125
_INTERRUPTED = 130
_VALUES = ("--name", "--attr", "--timeout", "--service", "--config", "--encoding")
_FLAGS = ("--detach", "--strict", "--no-tty")
_AGENT_VALUES = ("--config", "--timeout", "--log-level")
_AGENT_FLAGS = ("--once", "--no-token")
_LOG_LEVELS = ("debug", "info", "warning", "error")


def main() -> None:
    """Run the command line of this process, and exit."""
    options = parse_run(sys.argv[1:])
    if options is not None:
        _run_job(options)
    # What is imported lives until the end: a search for garbage every 700 objects takes a fifteenth of a short command.
    gc.set_threshold(_GARBAGE_OBJECTS, 10, 10)
    _use_no_plugins()
    agent_options = parse_agent_run(sys.argv[1:])
    if agent_options is not None:
        _run_agent(agent_options)
    _run_group()


def _run_job(options: RunOptions) -> NoReturn:
    # What is made here lives until the end.
    gc.disable()
    from tailspan.cli.run_job import run_command, say
    from tailspan.errors import ConfigError, TailspanError

    try:
        code = run_command(options, own_process=True)
    except (TailspanError, OSError) as error:
        say(" ".join(str(error).split()))
        code = _USAGE if isinstance(error, ConfigError) else _OUR_ERROR
    # All is written: taking the interpreter down would cost a tenth of the whole run.
    os._exit(code)


def _run_agent(options: dict[str, Any]) -> NoReturn:
    try:
        from tailspan_agent.commands.run import run_agent

        code = run_agent(**options)
    except (Exception, KeyboardInterrupt) as error:
        from tailspan.cli.exit_codes import explain

        code = explain(error, "agent")
    sys.exit(code)


def _run_group() -> None:
    try:
        from tailspan.cli.group import main as group

        group(prog_name="tailspan")
    except KeyboardInterrupt:
        # The group handles it, too, once it is imported.
        sys.exit(_INTERRUPTED)
    except SystemExit as end:
        # Such a command has no event loop, and so no threads and connections that must be closed. Taking the
        # interpreter down would cost a fifth of the whole command.
        if "asyncio" not in sys.modules and isinstance(end.code, int) and _flush():
            os._exit(end.code)
        raise


def _use_no_plugins() -> None:
    """Let pydantic look for no plugins in the installed packages: that takes 15 ms and 1.8 MiB of an agent's start.

    Source: the module of pydantic 2.7 to 2.14, which has this one function.
    """
    loader = type(sys)(_PLUGINS)
    vars(loader).update(get_plugins=tuple, __getattr__=_of_the_real_loader)
    sys.modules[_PLUGINS] = loader


def _of_the_real_loader(name: str) -> object:
    """Return what another version of pydantic may need, which then looks for plugins."""
    if name.startswith("__"):  # the import system asks for these
        raise AttributeError(name)
    import importlib

    del sys.modules[_PLUGINS]
    return getattr(importlib.import_module(_PLUGINS), name)


def _flush() -> bool:
    """Write what is left of the output; False where that fails, which the interpreter's own end reports."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return False
    return True


def parse_run(arguments: Sequence[str]) -> RunOptions | None:
    """Return the options of ``tailspan run``; None for anything else, and for what needs an explanation.

    Args:
        arguments: The command line without the program.
    """
    if not arguments or arguments[0] != "run":
        return None
    scanned = _scan(arguments[1:], _VALUES, _FLAGS)
    if scanned is None:
        return None
    options, flags, rest = scanned
    attributes: dict[str, str] = {}
    for text in [text for option, text in options if option == "--attr"]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            return None
        attributes[key] = value
    given = {option: text for option, text in options if option != "--attr"}
    command = rest[1:] if rest[:1] == ["--"] else rest
    timeout = _seconds(given.get("--timeout"))
    if not command or timeout == 0 or "" in given.values():
        return None
    from tailspan.cli.run_job import RunOptions

    return (
        RunOptions(
            command=command,
            name=given.get("--name"),
            attributes=attributes,
            timeout_s=timeout,
            detach="--detach" in flags,
            service=given.get("--service"),
            config=given.get("--config"),
            strict="--strict" in flags,
            terminal="--no-tty" not in flags,
            encoding=given.get("--encoding"),
        )
        if _is_local(given, flags)
        else None
    )


def parse_agent_run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return the arguments of `run_agent` that ``tailspan agent run`` names; None for all that click must see.

    Args:
        arguments: The command line without the program.
    """
    scanned = _scan(arguments[2:], _AGENT_VALUES, _AGENT_FLAGS) if list(arguments[:2]) == ["agent", "run"] else None
    if scanned is None:
        return None
    options, flags, rest = scanned
    given = dict(options)
    timeout_s = _seconds(given.get("--timeout", "5m"))
    log_level = given.get("--log-level", "info").lower()
    if rest or "" in given.values() or log_level not in _LOG_LEVELS or timeout_s is None or not timeout_s > 0:
        return None
    from pathlib import Path

    return {
        "config_path": Path(given["--config"]) if "--config" in given else None,
        "once": "--once" in flags,
        "timeout_s": timeout_s,
        "log_level": log_level,
        "no_token": "--no-token" in flags,
    }


def _scan(
    arguments: Sequence[str], values: Collection[str], flags: Collection[str]
) -> tuple[list[tuple[str, str]], set[str], list[str]] | None:
    """Return options with their values, flags, and the arguments after them; None if one of them is not known."""
    options: list[tuple[str, str]] = []
    found: set[str] = set()
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        option, equals, value = rest.pop(0).partition("=")
        if option in flags and not equals:
            found.add(option)
        elif option in values and (equals or rest):
            options.append((option, value if equals else rest.pop(0)))
        else:
            return None
    return options, found, rest


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    from tailspan._durations import parse_duration_s
    from tailspan.errors import ConfigError

    try:
        return parse_duration_s(text)
    except ConfigError:
        return 0


def _is_local(given: dict[str, str], flags: set[str]) -> bool:
    # A job for a remote service is submitted through its client.
    return "--detach" not in flags or given.get("--service", "local") == "local"
