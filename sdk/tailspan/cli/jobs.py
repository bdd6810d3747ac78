"""The command ``jobs``: list them, and prune ended ones."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan._plural import plural
from tailspan.cli.group import SuggestingGroup
from tailspan.cli.moments import MOMENT
from tailspan.cli.options import attributes_of, config_option, json_option, service_option, with_client
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient, RunResponse
    from tailspan.models import ListedJob

    Rows = list[tuple[ListedJob, RunResponse | None]]

__all__ = ["jobs"]

_WATCH_S = 2.0

_STATES = ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED", "TIMED_OUT", "LOST", "UNKNOWN")


@click.group(cls=SuggestingGroup, invoke_without_command=True)
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1), metavar="N", help="Maximum number of jobs."
)
@click.option("--all", "all_jobs", is_flag=True, help="All jobs, whatever --limit is.")
@click.option("--name", metavar="GLOB", help="Only jobs whose name matches, for example 'etl-*'.")
@click.option("--state", type=click.Choice(_STATES, case_sensitive=False), help="Only jobs in this state.")
@click.option(
    "--since", type=MOMENT, metavar="T", help="Only jobs submitted since then: an age such as 24h, or a time."
)
@click.option(
    "--attr",
    "attributes",
    metavar="K=V",
    multiple=True,
    callback=attributes_of,
    help="Only jobs with this attribute; repeatable.",
)
@click.option("--watch", is_flag=True, help="Show the list again every 2 s, until Ctrl-C.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the ids, one on each line, for scripts.")
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
    since: datetime | None,
    attributes: dict[str, str],
    watch: bool,
    quiet: bool,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """List jobs, newest first, with progress and how they ended.

    \b
    Example:
      tailspan jobs --state FAILED --name 'etl-*' --since 24h
      tailspan jobs --attr team=geo --watch
      tailspan jobs -q --state RUNNING | xargs -n 1 tailspan wait
      tailspan jobs prune --older-than 30d
    """  # noqa: D301 - click wants the backspace character itself
    if ctx.invoked_subcommand is not None:
        return
    if watch + quiet + as_json > 1:
        raise click.UsageError("--watch, --quiet and --json exclude each other.")

    async def rows_of(client: AsyncJobClient) -> Rows:
        # One more than is shown, to find out whether there are more.
        asked = None if all_jobs else limit + 1
        return await client.list_with_status(asked, name=name, state=state, since=since, attributes=attributes)

    if watch:
        with_client(config_path, service, lambda client: _watch(client, rows_of, None if all_jobs else limit))
        return
    from tailspan.cli.show import job_row, jobs_table, json_line, show, write_ids
    from tailspan.cli.watch import say

    rows = with_client(config_path, service, rows_of, only_reads=True)
    shown = rows if all_jobs else rows[:limit]
    if as_json:
        json_line([job_row(row, status) for row, status in shown])
        return
    if quiet:
        write_ids(shown)
        return
    show(jobs_table(shown))
    if not rows:
        filtered = name or state or since or attributes
        say("no jobs" + (" match" if filtered else " yet: start one with 'tailspan run -- COMMAND'"))
    elif len(rows) > len(shown):
        say(f"these are the newest {limit}; --all shows the others")


async def _watch(
    client: AsyncJobClient, rows_of: Callable[[AsyncJobClient], Awaitable[Rows]], limit: int | None
) -> None:
    """Show the list until Ctrl-C: in place at a terminal, one after the other in a pipe."""
    import anyio
    from rich.console import Console, Group
    from rich.live import Live

    from tailspan.cli.show import jobs_table, show
    from tailspan.logs.printing import is_terminal

    if not is_terminal(sys.stdout):
        while True:
            show(jobs_table((await rows_of(client))[:limit]))
            await anyio.sleep(_WATCH_S)
    console = Console(file=sys.stdout, highlight=False)
    with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        while True:
            rows = (await rows_of(client))[:limit]
            live.update(Group(jobs_table(rows), "" if rows else "no jobs"), refresh=True)
            await anyio.sleep(_WATCH_S)


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
