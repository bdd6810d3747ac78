"""The command ``tailspan completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, job ids and service names in a shell.

    \b
    Example:
      tailspan completion bash >> ~/.bashrc
      tailspan completion zsh > "${fpath[1]}/_tailspan"
      tailspan completion fish > ~/.config/fish/completions/tailspan.fish
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.group import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "tailspan", "_TAILSPAN_COMPLETE").source())
