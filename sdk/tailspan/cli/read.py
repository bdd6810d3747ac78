"""The commands that read a job's log: ``logs``, ``tail``, ``exec-time``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan._plural import plural
from tailspan.cli.group import EXIT_TIMEOUT
from tailspan.cli.options import config_option, job_argument, json_option, service_option, with_client

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient
    from tailspan.logs.follow import TailUpdate
    from tailspan.logs.page import Message, OpenLine

__all__ = ["exec_time", "logs", "tail"]


@click.command()
@job_argument
@click.option("--since-ms", type=int, metavar="MS", help="Only lines at or after this time, in ms since the epoch.")
@click.option("--task", metavar="TASK", help="Only lines of the task with this name or id.")
@service_option
@config_option
@json_option
def logs(
    job: str, since_ms: int | None, task: str | None, service: str | None, config_path: Path | None, as_json: bool
) -> None:
    """Print a job's lines, all that are readable now.

    \b
    Example:
      tailspan logs 01J8ZK --since-ms 1700000000000 | grep ERROR
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.logs.printing import LinePrinter

    printer = LinePrinter(sys.stdout)

    async def use(client: AsyncJobClient) -> None:
        printer.shows_tasks = task is None and not as_json and await client.has_tasks(job)
        async for messages in client.iter_logs(job, since_ms, task=task):
            if as_json:
                _json_lines(messages)
            else:
                printer.messages(messages)
        open_line = await client.open_line(job) if task is None else None
        if as_json:
            _json_open(open_line)
        else:
            printer.open_line(open_line)

    with_client(config_path, service, use, only_reads=True)


@click.command()
@job_argument
@click.option("--sample", is_flag=True, help="Print only the newest line per refresh.")
@click.option("--refresh", default=1.0, show_default=True, metavar="S", help="Poll interval in seconds.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Stop after S seconds, with exit code 124.")
@service_option
@config_option
@json_option
@click.pass_context
def tail(
    ctx: click.Context,
    job: str,
    sample: bool,
    refresh: float,
    timeout: float | None,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Print a job's lines as they come, until it has ended and its last line was read.

    Ctrl-C stops the command; the job continues. Exit codes: 0 succeeded, 1 failed, canceled or lost, 124 timeout.

    \b
    Example:
      tailspan tail 01J8ZK
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.live import StateLine
    from tailspan.cli.watch import exit_code_for, say
    from tailspan.logs.printing import LinePrinter, end_text

    printer = LinePrinter(sys.stdout)

    async def use(client: AsyncJobClient) -> TailUpdate | None:
        last: TailUpdate | None = None
        silent = True
        with StateLine() as line:
            async for update in client.follow_logs(job, refresh, sample, timeout):
                if update.open_line is not None and not as_json:
                    line.hide()
                with line.paused():
                    if update.gap or update.left_out:
                        printer.close()
                    if update.gap:
                        say("lines before these are gone at the service")
                    if update.left_out:
                        say(f"{update.left_out} {plural(update.left_out, 'line')} left out")
                    if as_json:
                        _json_lines(update.messages)
                        if last is None or update.open_line != last.open_line:
                            _json_open(update.open_line)
                    else:
                        printer.shows_tasks = update.status.total_tasks > 1
                        printer.messages(update.messages)
                        printer.open_line(update.open_line)
                silent = silent and not update.messages
                if not update.complete and not printer.has_open:
                    line.show(update.status)
                last = update
            printer.close()
        if last is not None and last.complete:
            say(end_text(last.status) + (", without a line" if silent else ""))
        return last

    last = with_client(config_path, service, use)
    if last is None or not last.complete:
        say(f"job {job} has not ended after {timeout:g} s; it continues")
        ctx.exit(EXIT_TIMEOUT)
    ctx.exit(exit_code_for(last.status))


@click.command("exec-time")
@job_argument
@service_option
@config_option
@json_option
def exec_time(job: str, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Print the time from a job's first to its last line.

    For a running job, print the time so far and a warning.

    \b
    Example:
      tailspan exec-time 01J8ZK --json
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan._verbs import in_progress_text
    from tailspan.cli.show import json_line, write
    from tailspan.cli.watch import say

    took, status = with_client(config_path, service, lambda client: client.exec_time_and_status(job), only_reads=True)
    running = not status.state.is_terminal
    if running:
        say(in_progress_text(status))
    if as_json:
        json_line({"job_id": status.job_id, "exec_time_s": took.total_seconds(), "in_progress": running})
    else:
        write(str(took))


def _json_open(line: OpenLine | None) -> None:
    from tailspan.cli.show import json_lines
    from tailspan.logs.page import NANOS_PER_MS

    if line is not None:
        json_lines([{"message": line.message, "timestamp": line.time_unix_nano // NANOS_PER_MS, "open": True}])


def _json_lines(messages: Sequence[Message]) -> None:
    from tailspan.cli.show import json_lines

    json_lines(messages)
