"""The program ``tailspan``: runs ``tailspan run`` at once, and all else through the command group.

``tailspan run`` stands before every cron line, so it is parsed here without click, whose import costs as much as all
the rest of it. Whatever this parser does not know, `tailspan.cli.run` parses, explains and rejects.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tailspan.cli.run_job import RunOptions

__all__ = ["main", "parse_run"]

_GARBAGE_OBJECTS = 50_000
_PLUGINS = "pydantic.plugin._loader"
_USAGE = 2
_OUR_ERROR = 125
_INTERRUPTED = 130
_VALUES = ("--name", "--attr", "--timeout", "--service", "--config", "--encoding")
_FLAGS = ("--detach", "--strict", "--no-tty")


def main() -> None:
    """Run the command line of this process, and exit."""
    options = parse_run(sys.argv[1:])
    if options is None:
        _run_group()
        return
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


def _run_group() -> None:
    # What is imported lives until the end: a search for garbage every 700 objects takes a fifteenth of a short command.
    gc.set_threshold(_GARBAGE_OBJECTS, 10, 10)
    _use_no_plugins()
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
    given: dict[str, str] = {}
    attributes: dict[str, str] = {}
    flags: set[str] = set()
    rest = list(arguments[1:])
    while rest and rest[0].startswith("-") and rest[0] != "--":
        option, equals, value = rest.pop(0).partition("=")
        if option in _FLAGS and not equals:
            flags.add(option)
            continue
        if option not in _VALUES or (not equals and not rest):
            return None
        if not equals:
            value = rest.pop(0)
        if option == "--attr":
            key, _, text = value.partition("=")
            if not key or "=" not in value:
                return None
            attributes[key] = text
        else:
            given[option] = value
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
