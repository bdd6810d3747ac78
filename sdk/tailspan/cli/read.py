"""The commands that read a job's log: ``logs``, ``tail``, ``exec-time``."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan._durations import duration_text
from tailspan._plural import plural
from tailspan.cli.exit_codes import EXIT_TIMEOUT
from tailspan.cli.lines import LineChoice, line_options, line_printer
from tailspan.cli.moments import MOMENT
from tailspan.cli.options import (
    DURATION,
    POSITIVE_DURATION,
    config_option,
    job_argument,
    json_option,
    service_option,
    with_client,
)

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient, RunResponse
    from tailspan.logs.follow import TailUpdate
    from tailspan.logs.page import Message, OpenLine

__all__ = ["exec_time", "logs", "tail"]


@click.command()
@job_argument
@click.option("--since", type=MOMENT, metavar="T", help="Only lines since then: an age such as 10m, or a time.")
@click.option("--since-ms", type=int, metavar="MS", help="Only lines at or after this time, in ms since the epoch.")
@click.option("-n", "--tail", "lines", type=click.IntRange(0), metavar="N", help="Only the last N of these lines.")
@click.option("--task", metavar="TASK", help="Only lines of the task with this name or id.")
@line_options
@service_option
@config_option
@json_option
def logs(
    job: str | None,
    since: datetime | None,
    since_ms: int | None,
    lines: int | None,
    task: str | None,
    choice: LineChoice,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Print a job's lines, all that are readable now. At a terminal, errors are red and warnings yellow.

    \b
    Example:
      tailspan logs etl --since 10m --grep 'ERROR|WARN' -t
      tailspan logs -1 --tail 100 --stream stderr
    """  # noqa: D301 - click wants the backspace character itself
    if since is not None:
        if since_ms is not None:
            raise click.UsageError("--since and --since-ms exclude each other.")
        since_ms = int(since.timestamp() * 1000)
    printer = line_printer(choice)
    write = _json_lines if as_json else printer.messages

    async def use(client: AsyncJobClient) -> None:
        found = await client.find_job(job)
        printer.shows_tasks = task is None and not as_json and await client.has_tasks(found)
        newest: deque[Message] = deque(maxlen=lines)
        async for messages in client.iter_logs(found, since_ms, task=task):
            chosen = choice.of(messages)
            if lines is None:
                write(chosen)
            else:
                newest.extend(chosen)
        write(list(newest))
        open_line = choice.of_open(await client.open_line(found)) if task is None and lines != 0 else None
        if as_json:
            _json_open(open_line)
        else:
            printer.open_line(open_line)

    with_client(config_path, service, use, only_reads=True)


@click.command()
@job_argument
@click.option("-n", "--lines", "lines", type=click.IntRange(0), metavar="N", help="Begin with the last N lines.")
@line_options
@click.option("--sample", is_flag=True, help="Print only the newest line per refresh.")
@click.option("--refresh", default="1s", type=POSITIVE_DURATION, show_default=True, metavar="D", help="Poll interval.")
@click.option("--timeout", type=DURATION, metavar="D", help="Stop after this time, such as 30m, with exit code 124.")
@service_option
@config_option
@json_option
@click.pass_context
def tail(
    ctx: click.Context,
    job: str | None,
    lines: int | None,
    choice: LineChoice,
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
      tailspan tail etl -n 20
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.live import StateLine
    from tailspan.cli.watch import exit_code_for, say
    from tailspan.logs.printing import end_text

    if sample and lines is not None:
        raise click.UsageError("--sample and -n exclude each other.")
    output = _TailOutput(choice, as_json=as_json)
    job_id = ""

    async def use(client: AsyncJobClient) -> TailUpdate | None:
        nonlocal job_id
        found = await client.find_job(job)
        job_id = found.job_id
        end: TailUpdate | None = None
        silent = True
        with StateLine() as line:
            updates = client.follow_logs(found, refresh, sample, timeout)
            async for update in updates if lines is None else _from_the_last(updates, lines, choice):
                if update.open_line is not None and not as_json:
                    line.hide()
                with line.paused():
                    output.write(update)
                silent = silent and not update.messages
                if not update.complete and not output.has_open:
                    line.show(update.status)
                end = update
            output.close()
        if end is not None and end.complete:
            say(end_text(end.status) + (", without a line" if silent and lines is None else ""))
        return end

    end = with_client(config_path, service, use)
    if end is None or not end.complete:
        say(f"job {job_id} has not ended after {duration_text(timeout or 0.0)}; it continues")
        ctx.exit(EXIT_TIMEOUT)
    ctx.exit(exit_code_for(end.status))


class _TailOutput:
    """Prints the updates of `tail`."""

    def __init__(self, choice: LineChoice, *, as_json: bool) -> None:
        self._choice = choice
        self._as_json = as_json
        self._printer = line_printer(choice)
        self._open: OpenLine | None = None

    @property
    def has_open(self) -> bool:
        """Whether the last line printed has no newline yet."""
        return self._printer.has_open

    def write(self, update: TailUpdate) -> None:
        """Print its lines, and notes about lines that are gone or left out."""
        from tailspan.cli.watch import say

        if update.gap or update.left_out:
            self._printer.close()
        if update.gap:
            say("lines before these are gone at the service")
        if update.left_out:
            say(f"{update.left_out} {plural(update.left_out, 'line')} left out")
        messages, open_line = self._choice.of(update.messages), self._choice.of_open(update.open_line)
        if self._as_json:
            _json_lines(messages)
            if open_line != self._open:
                _json_open(open_line)
            self._open = open_line
        else:
            self._printer.shows_tasks = update.status.total_tasks > 1
            self._printer.messages(messages)
            self._printer.open_line(open_line)

    def close(self) -> None:
        """End the line that is open."""
        self._printer.close()


async def _from_the_last(
    updates: AsyncGenerator[TailUpdate, None], lines: int, choice: LineChoice
) -> AsyncGenerator[TailUpdate, None]:
    """Yield the updates; of what the log has at the start only the last lines."""
    newest: deque[Message] = deque(maxlen=lines)
    started = False
    async with aclosing(updates):
        async for update in updates:
            if not started:
                newest.extend(choice.of(update.messages))
                # The update at the end of a read has no lines.
                started = not update.messages
                if not started:
                    continue
                update = replace(update, messages=tuple(newest))
            yield update


@click.command("exec-time")
@job_argument
@service_option
@config_option
@json_option
def exec_time(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Print the time from a job's first to its last line.

    For a running job, print the time so far and a warning.

    \b
    Example:
      tailspan exec-time 01J8ZK --json
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan._verbs import in_progress_text
    from tailspan.cli.show import json_line, write
    from tailspan.cli.watch import say

    async def use(client: AsyncJobClient) -> tuple[timedelta, RunResponse]:
        return await client.exec_time_and_status(await client.find_job(job))

    took, status = with_client(config_path, service, use, only_reads=True)
    running = not status.state.is_terminal
    if running:
        say(in_progress_text(status))
    if as_json:
        json_line({"job_id": status.job_id, "exec_time_s": took.total_seconds(), "in_progress": running})
    else:
        write(duration_text(took.total_seconds()))


def _json_open(line: OpenLine | None) -> None:
    from tailspan.cli.show import json_lines
    from tailspan.logs.page import NANOS_PER_MS

    if line is not None:
        json_lines([{"message": line.message, "timestamp": line.time_unix_nano // NANOS_PER_MS, "open": True}])


def _json_lines(messages: Sequence[Message]) -> None:
    from tailspan.cli.show import json_lines

    json_lines(messages)
