"""Whether what a unit or a manifest says to Tailspan is understood by it: command lines and variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import pytest

from tailspan.cli import main
from tailspan.config import Settings, load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"


def understood(words: Sequence[str]) -> click.Context:
    """Return the context of a parsed command line; nothing is run.

    Args:
        words: Without the program's own name.

    Raises:
        click.UsageError: Tailspan would refuse it.
    """
    command: click.Command | None = main
    rest = list(words)
    name = "tailspan"
    while isinstance(command, click.Group):
        name = rest.pop(0)
        command = command.get_command(click.Context(command), name)
    assert command is not None, f"there is no command {name}"
    return command.make_context(name, rest)


def settings_of(environ: Mapping[str, str], config: Path | None = None) -> Settings:
    """Return the configuration that a process with these variables has."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return load_settings(config)
