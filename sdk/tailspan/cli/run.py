"""The command ``run``: a command as a local job."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from tailspan.cli.exit_codes import exit_code_of, report
from tailspan.cli.options import (
    DurationType,
    attributes_of,
    config_option,
    json_option,
    service_option,
    settings_for,
    with_client,
)
from tailspan.cli.run_job import RunOptions, run_command
from tailspan.errors import ConfigError, TailspanError

__all__ = ["report_failure", "run"]

EXIT_OUR_ERROR = 125


def _complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a file: the command is not ours."""
    return [CompletionItem(incomplete, type="file")]


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--name", metavar="N", help="The job's name: what its runs have in common. [default: from the command]")
@click.option(
    "--attr",
    "attributes",
    metavar="K=V",
    multiple=True,
    callback=attributes_of,
    help="Put a text on the job's logs and spans; repeatable.",
)
@click.option(
    "--timeout",
    type=DurationType(),
    metavar="D",
    help="End the command after this time, such as 90s or 30m, with exit code 124.",
)
@click.option("--detach", is_flag=True, help="Print the job's id and return; the job runs on.")
@click.option("--strict", is_flag=True, help="Do not run the command if it cannot be captured; exit with 125 or 2.")
@click.option("--no-tty", is_flag=True, help="Give the command pipes also at a terminal.")
@click.option("--encoding", metavar="E", help="Encoding of the command's output, such as cp1252. [default: UTF-8]")
@service_option
@config_option
@json_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, shell_complete=_complete_file)
@click.pass_context
def run(
    ctx: click.Context,
    name: str | None,
    attributes: dict[str, str],
    timeout: float | None,
    detach: bool,
    strict: bool,
    no_tty: bool,
    encoding: str | None,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Run a command as a local job. Its input, output, directory and environment are those of this terminal.

    The exit code is the command's own: 128 + n after signal n, 124 after --timeout, 125 when the supervisor was
    killed. If Tailspan cannot capture the command, it runs all the same, and one line on standard error says why.

    \b
    Example:
      tailspan run --name nightly-etl --attr team=geo -- python etl.py --date today
      JOB=$(tailspan run --detach -- ./long-job.sh)
    """  # noqa: D301 - click wants the backspace character itself
    if not command:
        raise click.UsageError("there is no command to run: tailspan run -- COMMAND", ctx)
    if as_json and not detach:
        raise click.UsageError("--json needs --detach: without it the output is the command's own", ctx)
    options = RunOptions(
        command=command,
        name=name,
        attributes=attributes,
        timeout_s=timeout,
        detach=detach,
        service=service,
        config=None if config_path is None else str(config_path),
        strict=strict,
        terminal=not no_tty,
        encoding=encoding,
        as_json=as_json,
    )
    try:
        if detach and service is not None and not _is_local(service, config_path):
            _submit(options, config_path)
        else:
            # A test runner calls this within its own process.
            ctx.exit(run_command(options, own_process=sys.stdout is sys.__stdout__))
    except (TailspanError, OSError) as error:
        ctx.exit(report_failure(error))


def report_failure(error: Exception) -> int:
    """Print why the command did not run, and return the exit code.

    Args:
        error: A `TailspanError`, or an `OSError`; others are raised again.
    """
    if isinstance(error, TailspanError):
        # A script must distinguish our failure from the command's own exit code; wrong usage stays 2.
        report(error)
        return exit_code_of(error) if isinstance(error, ConfigError) else EXIT_OUR_ERROR
    if isinstance(error, OSError):
        click.echo(f"tailspan: {error}", err=True)
        return EXIT_OUR_ERROR
    raise error


def _is_local(service: str, config_path: Path | None) -> bool:
    settings = settings_for(config_path)
    return bool(settings.services.get(service, {}).get("type", service) == "local")


def _submit(options: RunOptions, config_path: Path | None) -> None:
    from tailspan.cli.show import json_line, json_of, write

    status = with_client(
        config_path,
        options.service,
        lambda client: client.job_submit(
            options.command, name=options.name, attributes=options.attributes, timeout=options.timeout_s
        ),
    )
    if options.as_json:
        json_line(json_of(status))
    else:
        write(status.job_id)
