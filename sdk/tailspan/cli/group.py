"""The command group: finds commands when they are called, and ends a failed one as `tailspan.cli.exit_codes` says.

Nothing here imports what only some commands need: ``tailspan --help`` and shell completion must feel instant.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from tailspan._version import __version__
from tailspan.cli.exit_codes import explain
from tailspan.errors import ConfigError, TailspanError

__all__ = ["SuggestingGroup", "main"]


class _Lazy(NamedTuple):
    module: str
    attribute: str
    help: str


_COMMANDS = {
    "run": _Lazy("tailspan.cli.run", "run", "Run a command as a local job."),
    "jobs": _Lazy("tailspan.cli.jobs", "jobs", "List jobs, newest first; prune ended ones."),
    "top": _Lazy("tailspan.cli.top", "top", "Show a live table of jobs; follow, cancel and open them."),
    "logs": _Lazy("tailspan.cli.read", "logs", "Print a job's lines."),
    "tail": _Lazy("tailspan.cli.read", "tail", "Print a job's lines as they come, until it has ended."),
    "tasks": _Lazy("tailspan.cli.watch", "tasks", "List a job's tasks."),
    "status": _Lazy("tailspan.cli.watch", "status", "Show a job's status."),
    "open": _Lazy("tailspan.cli.watch", "open_job", "Open a job in the browser."),
    "retry": _Lazy("tailspan.cli.watch", "retry", "Start a local job again in the background, as its next attempt."),
    "cancel": _Lazy("tailspan.cli.watch", "cancel", "Cancel a job."),
    "wait": _Lazy("tailspan.cli.watch", "wait", "Wait until a job has ended."),
    "exec-time": _Lazy("tailspan.cli.read", "exec_time", "Print the time from a job's first to its last line."),
    "serve": _Lazy("tailspan.cli.serve", "serve", "Serve jobs over HTTP."),
    "agent": _Lazy("tailspan_agent.cli", "agent", "Relay jobs' logs, status and run time as OTLP."),
    "doctor": _Lazy(
        "tailspan_agent.commands.doctor.command", "doctor", "Print diagnostics for a bug report (secrets removed)."
    ),
    "demo": _Lazy("tailspan_agent.commands.demo", "demo", "See it work: sample pipelines, agent and page, no set-up."),
    "completion": _Lazy("tailspan.cli.completion", "completion", "Print the completion script of a shell."),
}
_AGENT_HINT = "it needs the agent's packages ({missing} is missing): pip install 'tailspan[agent]'"


class SuggestingGroup(click.Group):
    """Suggests the commands that a wrong one resembles."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command.

        Raises:
            UsageError: There is no such command; names similar ones.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a newcomer needs them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command.

        Raises:
            ConfigError: What it needs is not installed.
        """
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        try:
            command = getattr(importlib.import_module(entry.module), entry.attribute)
        except ModuleNotFoundError as error:
            if not entry.module.startswith("tailspan_agent"):
                raise
            hint = _AGENT_HINT.format(missing=error.name)
            raise ConfigError(f"'tailspan {cmd_name}' cannot run: {hint}") from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names without importing them."""
        names = [
            CompletionItem(name, help=entry.help) for name, entry in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print an error in one line."""
        try:
            return super().invoke(ctx)
        except (TailspanError, KeyboardInterrupt, ModuleNotFoundError, OSError) as error:
            # click itself ends quietly when the reader of its output has gone.
            ctx.exit(explain(error, ctx.invoked_subcommand))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 2 usage or configuration, 3 service unreachable, 4 no such job; others at each command.",
)
@click.option("--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help="Configuration file.")
@click.version_option(__version__, prog_name="tailspan", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, config_path: Path | None) -> None:
    """See every batch job: run, read, follow, wait for and cancel jobs of any job service.

    \b
    Example:
      tailspan run -- python etl.py     # in one terminal
      tailspan jobs                     # in another
      tailspan tail JOB
    """  # noqa: D301 - click wants the backspace character itself
    if config_path is not None:
        _set_for(ctx, "TAILSPAN_CONFIG", str(config_path))


def _set_for(ctx: click.Context, variable: str, value: str) -> None:
    before = os.environ.get(variable)

    def restore() -> None:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before

    # Every command, also those of other packages, reads this variable when it is given no --config of its own.
    os.environ[variable] = value
    ctx.call_on_close(restore)
