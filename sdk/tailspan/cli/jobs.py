"""The command ``jobs``: list them, and prune ended ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan._plural import plural
from tailspan.cli.options import config_option, json_option, service_option, with_client
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient

__all__ = ["jobs"]

_STATES = ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED", "TIMED_OUT", "LOST", "UNKNOWN")


@click.group(invoke_without_command=True)
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1), metavar="N", help="Maximum number of jobs."
)
@click.option("--all", "all_jobs", is_flag=True, help="All jobs, whatever --limit is.")
@click.option("--name", metavar="GLOB", help="Only jobs whose name matches, for example 'etl-*'.")
@click.option("--state", type=click.Choice(_STATES, case_sensitive=False), help="Only jobs in this state.")
@service_option
@config_option
@json_option
@click.pass_context
def jobs(
    ctx: click.Context,
    limit: int,
    all_jobs: bool,
    name: str | None,
    state: str | None,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """List jobs, newest first.

    \b
    Example:
      tailspan jobs --state FAILED --name 'etl-*'
      tailspan jobs prune --older-than 30d
    """  # noqa: D301 - click wants the backspace character itself
    if ctx.invoked_subcommand is not None:
        return
    from tailspan.cli.show import jobs_table, json_line, json_of
    from tailspan.cli.watch import say

    # One more than is shown, to find out whether there are more.
    asked = None if all_jobs else limit + 1
    rows = with_client(
        config_path, service, lambda client: client.job_list(asked, name=name, state=state), only_reads=True
    )
    shown = rows if all_jobs else rows[:limit]
    if as_json:
        json_line([json_of(row) for row in shown])
        return
    jobs_table(shown)
    if not rows:
        say("no jobs" + (" match" if name or state else " yet: start one with 'tailspan run -- COMMAND'"))
    elif len(rows) > len(shown):
        say(f"these are the newest {limit}; --all shows the others")


@jobs.command()
@click.option("--older-than", required=True, metavar="D", help="Age of the end, for example 30d, 12h or 0s.")
@service_option
@config_option
@json_option
@click.pass_context
def prune(ctx: click.Context, older_than: str, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Remove jobs that ended longer ago than that, with their logs. Jobs that run are never touched.

    \b
    Example:
      tailspan jobs prune --older-than 30d
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import json_line, write
    from tailspan.config import parse_duration_s
    from tailspan.services.local import LocalService

    assert ctx.parent is not None
    above = ctx.parent.params
    try:
        age_s = parse_duration_s(older_than)
    except ConfigError as error:
        raise click.BadParameter(f"{older_than!r}: {error}", param_hint="--older-than") from None

    async def use(client: AsyncJobClient) -> list[str]:
        chosen = client.service(service or above["service"])
        if not isinstance(chosen, LocalService):
            raise ConfigError(f"the service {chosen.name!r} keeps its jobs itself: only local jobs can be pruned")
        return chosen.prune(age_s)

    pruned = with_client(config_path or above["config_path"], None, use)
    if as_json or above["as_json"]:
        json_line({"pruned": pruned})
    else:
        write(f"removed {len(pruned)} {plural(len(pruned), 'job')}")
