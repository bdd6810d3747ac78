"""The command ``run``: a command as a local job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan.cli.group import exit_code_of, report
from tailspan.cli.options import config_option, json_option, service_option, settings_for, with_client
from tailspan.errors import ConfigError, TailspanError

if TYPE_CHECKING:
    from tailspan.models import JobStatus

__all__ = ["run"]

EXIT_OUR_ERROR = 125


def _attributes(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    attributes = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{one!r} is not KEY=VALUE", ctx=ctx, param=param)
        attributes[key] = value
    return attributes


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--name", metavar="N", help="The job's name: what its runs have in common. [default: from the command]")
@click.option(
    "--attr",
    "attributes",
    metavar="K=V",
    multiple=True,
    callback=_attributes,
    help="Put a text on the job's logs and spans; repeatable.",
)
@click.option("--timeout", type=float, metavar="S", help="End the command after S seconds, with exit code 124.")
@click.option("--detach", is_flag=True, help="Print the job's id and return; the job runs on.")
@service_option
@config_option
@json_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    name: str | None,
    attributes: dict[str, str],
    timeout: float | None,
    detach: bool,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Run a command as a local job. Its input, output, directory and environment are those of this terminal.

    Ctrl-C cancels the job. The exit code is the command's own: 128 + n after signal n, 124 after --timeout, 125 when
    Tailspan itself failed.

    \b
    Example:
      tailspan run --name nightly-etl --attr team=geo -- python etl.py --date today
      JOB=$(tailspan run --detach -- ./long-job.sh)
    """  # noqa: D301 - click wants the backspace character itself
    if not command:
        raise click.UsageError("there is no command to run: tailspan run -- COMMAND", ctx)
    if as_json and not detach:
        raise click.UsageError("--json needs --detach: without it the output is the command's own", ctx)
    try:
        if detach:
            _submit(config_path, service, command, name, attributes, timeout, as_json)
        else:
            ctx.exit(_attached(config_path, service, command, name, attributes, timeout))
    except TailspanError as error:
        # A script must distinguish our failure from the command's own exit code; wrong usage stays 2.
        report(error)
        ctx.exit(exit_code_of(error) if isinstance(error, ConfigError) else EXIT_OUR_ERROR)


def _submit(
    config_path: Path | None,
    service: str | None,
    command: tuple[str, ...],
    name: str | None,
    attributes: dict[str, str],
    timeout: float | None,
    as_json: bool,
) -> None:
    from tailspan.cli.show import json_line, json_of, write

    status = with_client(
        config_path,
        service or "local",
        lambda client: client.job_submit(command, name=name, attributes=attributes, timeout=timeout),
    )
    if as_json:
        json_line(json_of(status))
    else:
        write(status.job_id)


def _attached(
    config_path: Path | None,
    service: str | None,
    command: tuple[str, ...],
    name: str | None,
    attributes: dict[str, str],
    timeout: float | None,
) -> int:
    import sys

    from tailspan.local import attached
    from tailspan.logs.printing import is_terminal
    from tailspan.services.local import LocalService
    from tailspan.services.registry import open_service

    chosen = open_service(service or "local", settings_for(config_path))
    if not isinstance(chosen, LocalService):
        raise ConfigError(f"the service {chosen.name!r} is not on this machine: add --detach to submit a job to it")

    def say(status: JobStatus) -> None:
        # Under cron every word on standard error is a mail.
        if is_terminal(sys.stderr):
            click.echo(f"tailspan: this is job {status.job_id}", err=True)

    status = attached.run_attached(chosen, command, name=name, attributes=attributes, timeout_s=timeout, on_start=say)
    return attached.exit_code_of(status)
