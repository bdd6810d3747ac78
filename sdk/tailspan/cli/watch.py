"""The commands about a job's state: ``status``, ``tasks``, ``wait``, ``cancel``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan.cli.exit_codes import EXIT_ERROR, EXIT_TIMEOUT
from tailspan.cli.options import (
    DURATION,
    POSITIVE_DURATION,
    config_option,
    job_argument,
    json_option,
    links_of,
    page_of_job,
    reason_of,
    service_option,
    with_client,
)
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient
    from tailspan.models import JobStatus, TaskRun

__all__ = ["address_of", "cancel", "exit_code_for", "open_job", "retry", "say", "status", "tasks", "wait"]


@click.command()
@job_argument
@service_option
@config_option
@json_option
def status(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Show a job's status: why it failed, as far as the agent on this machine knows it, and where to see it.

    \b
    Example:
      tailspan status 01J8ZK --json
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import json_line, json_of, status_fields

    answer = with_client(config_path, service, lambda client: client.find_job(job), only_reads=True)
    links, reason = links_of(config_path, answer), reason_of(config_path, answer)
    if page := page_of_job(config_path, answer):
        links["agent page"] = page
    if as_json:
        json_line({**json_of(answer), "reason": reason, "links": links})
    else:
        status_fields(answer, links, reason)


@click.command()
@job_argument
@service_option
@config_option
@json_option
def tasks(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """List a job's tasks, each attempt, oldest first.

    \b
    Example:
      tailspan tasks 0197f2a4-6c1e-7d0b-9a53-2f1f6f8f0c11 --service prefect
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import json_line, json_of, tasks_table

    async def use(client: AsyncJobClient) -> list[TaskRun]:
        return await client.job_get_tasks(await client.find_job(job))

    rows = with_client(config_path, service, use, only_reads=True)
    if as_json:
        json_line([json_of(row) for row in rows])
        return
    tasks_table(rows)
    if not rows:
        say("this job has no tasks")


@click.command()
@job_argument
@service_option
@config_option
@json_option
def cancel(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Cancel a job. An ended job stays as it is; that is not an error.

    \b
    Example:
      tailspan cancel 01J8ZK && tailspan wait 01J8ZK
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import ended, json_line, json_of, write

    async def use(client: AsyncJobClient) -> JobStatus:
        return await client.job_cancel(await client.find_job(job))

    answer = with_client(config_path, service, use)
    if as_json:
        json_line(json_of(answer))
    elif answer.state.is_terminal:
        ended(answer)
    else:
        write(f"job {answer.job_id} is being canceled; it is {answer.state}")


@click.command()
@job_argument
@service_option
@config_option
@json_option
def retry(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Start a local job again in the background, and print the new job's id.

    It has the same command, directory, name and attributes, and is linked as the next attempt. Its environment is the
    present one.

    \b
    Example:
      tailspan retry nightly-etl && tailspan tail -1
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import json_line, json_of, write
    from tailspan.services.local import LocalService

    async def use(client: AsyncJobClient) -> JobStatus:
        chosen = client.service(service)
        if not isinstance(chosen, LocalService):
            raise ConfigError(f"the service {chosen.name!r} runs its jobs itself: only local jobs can be retried")
        return await chosen.retry((await client.find_job(job)).job_id)

    answer = with_client(config_path, service, use)
    if as_json:
        json_line(json_of(answer))
    else:
        write(answer.job_id)


@click.command("open")
@job_argument
@click.option("--trace", is_flag=True, help="Open the job's trace (links.trace).")
@click.option("--print", "only_print", is_flag=True, help="Print the address instead.")
@service_option
@config_option
def open_job(job: str | None, trace: bool, only_print: bool, service: str | None, config_path: Path | None) -> None:
    """Open a job in the browser: on the agent's page if an agent runs here, else on the page of its service.

    \b
    Example:
      tailspan open -1
      tailspan open nightly-etl --trace
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.show import write

    answer = with_client(config_path, service, lambda client: client.find_job(job), only_reads=True)
    url = address_of(config_path, answer, trace=trace)
    if only_print:
        write(url)
    elif click.launch(url) != 0:
        say(f"no browser could be started; open {url}")


def address_of(config_path: Path | None, job: JobStatus, *, trace: bool = False) -> str:
    """Return where to see a job in a browser.

    Args:
        config_path: The configuration file; None: the one of the environment.
        job: The job.
        trace: Whether its trace is wanted.

    Raises:
        ConfigError: There is no such place.
    """
    links = links_of(config_path, job)
    if trace:
        if "trace" not in links:
            raise ConfigError("no link to traces is configured: set links.trace", key="links.trace")
        return links["trace"]
    address = page_of_job(config_path, job) or job.url or links.get("trace") or links.get("logs")
    if address is None:
        raise ConfigError(
            f"no page has job {job.job_id}: start the agent here (tailspan agent run), or set links.trace"
        )
    return address


@click.command()
@job_argument
@click.option("--poll", default="1s", type=POSITIVE_DURATION, show_default=True, metavar="D", help="Poll interval.")
@click.option("--timeout", type=DURATION, metavar="D", help="Stop after this time, such as 30m, with exit code 124.")
@click.option("--delivered", is_flag=True, help="Wait also until the agent has acknowledged the job's last line.")
@service_option
@config_option
@json_option
@click.pass_context
def wait(
    ctx: click.Context,
    job: str | None,
    poll: float,
    timeout: float | None,
    delivered: bool,
    service: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Wait until a job has ended, and print how.

    Ctrl-C stops the command; the job continues. Exit codes: 0 succeeded, 1 failed, canceled or lost, 124 timeout.

    \b
    Example:
      tailspan wait 01J8ZK --timeout 1h && ./next-step
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.cli.live import StateLine
    from tailspan.cli.show import ended, json_line, json_of

    async def use(client: AsyncJobClient) -> JobStatus:
        chosen = await client.find_job(job)
        with StateLine() as line:
            return await client.job_wait_for_job(chosen, poll, timeout, delivered=delivered, on_status=line.show)

    answer = with_client(config_path, service, use)
    if as_json:
        json_line(json_of(answer))
    else:
        ended(answer)
    ctx.exit(exit_code_for(answer))


def exit_code_for(status: JobStatus) -> int:
    """Return what ``wait`` and ``tail`` exit with for a job that ended like this."""
    from tailspan.models import JobState

    return {JobState.SUCCEEDED: 0, JobState.TIMED_OUT: EXIT_TIMEOUT}.get(status.state, EXIT_ERROR)


def say(text: str) -> None:
    """Print a note on standard error, apart from the data."""
    from tailspan.logs.clean import printable

    click.echo(f"tailspan: {printable(' '.join(text.splitlines()), colours=False)}", err=True)
