"""What all commands share: options, the job argument, and how they reach a service."""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from tailspan._durations import parse_duration_s
from tailspan.errors import ConfigError
from tailspan.local.run_settings import default_agent_dir, is_plain

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient
    from tailspan.config import Settings
    from tailspan.models import JobStatus, ListedJob

__all__ = [
    "DURATION",
    "POSITIVE_DURATION",
    "DurationType",
    "agent_dir_of",
    "attributes_of",
    "config_option",
    "job_argument",
    "json_option",
    "links_of",
    "page_of_job",
    "reason_of",
    "service_option",
    "settings_for",
    "with_client",
]

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_COMPLETED_JOBS = 50
_COMPLETION_S = 2.0


if TYPE_CHECKING:
    _ParamType = click.ParamType[float]
else:
    _ParamType = click.ParamType  # takes no argument in click 8.1


class DurationType(_ParamType):
    """A duration as the configuration has them, such as ``30m`` or ``1h30m``; a number is in seconds."""

    name = "duration"

    def __init__(self, *, minimum_s: float | None = None, exclusive: bool = False) -> None:
        """Accept durations.

        Args:
            minimum_s: The shortest one in seconds; None: any number, as `tailspan run` passes it on.
            exclusive: Whether the shortest one itself is too short.
        """
        self._minimum_s = minimum_s
        self._exclusive = exclusive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the duration in seconds."""
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = parse_duration_s(value)
            except ConfigError as error:
                self.fail(f"{value!r}: {error}", param, ctx)
        least = self._minimum_s
        if least is not None and not (seconds > least or (seconds == least and not self._exclusive)):
            self.fail(
                f"{value!r} is too short: expected {'more than' if self._exclusive else 'at least'} {least:g} s",
                param,
                ctx,
            )
        return seconds


DURATION = DurationType(minimum_s=0.0)
POSITIVE_DURATION = DurationType(minimum_s=0.0, exclusive=True)


def settings_for(config_path: Path | None, *, telemetry: bool = False) -> Settings:
    """Load the configuration of a command; ``OTEL_*`` variables apply only to commands that send telemetry."""
    from tailspan.config import load_settings

    return load_settings(config_path, telemetry=telemetry)


def links_of(config_path: Path | None, job: JobStatus) -> dict[str, str]:
    """Return the configured links of a job."""
    return {} if config_path is None and is_plain(os.environ) else settings_for(config_path).links.of(job)


def agent_dir_of(config_path: Path | None) -> Path:
    """Return the state directory of the agent on this machine."""
    if config_path is None and is_plain(os.environ):
        return Path(default_agent_dir(os.environ))
    return settings_for(config_path).agent.state_dir


def page_of_job(config_path: Path | None, job: JobStatus) -> str | None:
    """Return the address of a job on the page of the agent that runs here; None without one."""
    from tailspan.local.agent_page import job_page, page_of

    page = page_of(str(agent_dir_of(config_path)))
    return None if page is None else job_page(page, job.service or "local", job.job_id)


def reason_of(config_path: Path | None, job: JobStatus) -> str | None:
    """Return why a job failed, as the agent on this machine knows it; None without one."""
    if job.state.result not in ("failure", "error", "timeout"):
        return None
    directory = agent_dir_of(config_path)
    if not (directory / "checkpoints.db").exists():
        return None
    try:
        from tailspan_agent.commands.reason import known_reason
    except ModuleNotFoundError:
        return None  # the agent is another installation's, with the extra that this one lacks

    return known_reason(directory, job)


def with_client(
    config_path: Path | None,
    service: str | None,
    use: Callable[[AsyncJobClient], Awaitable[T]],
    *,
    only_reads: bool = False,
) -> T:
    """Run async code with a client, to its end.

    Args:
        config_path: The configuration file; None: the one that ``TAILSPAN_CONFIG`` names, if any.
        service: The service's name; None: the default one.
        use: What to run.
        only_reads: Whether it only calls verbs that read a job or list all, once: over local files these need no event
            loop, whose import costs as much as the rest of the command.
    """
    from tailspan.client import AsyncJobClient

    # Without a file the client loads the configuration itself, if it needs more of it than its defaults.
    settings = None if config_path is None else settings_for(config_path)
    if only_reads:
        from tailspan._direct import run_directly

        # It holds nothing open.
        client = AsyncJobClient(settings, service=service)
        if client.reads_directly():
            return run_directly(use(client))
    import anyio

    async def run() -> T:
        async with AsyncJobClient(settings, service=service) as client:
            return await use(client)

    return anyio.run(run)


def _complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    async def items(client: AsyncJobClient) -> list[CompletionItem]:
        import anyio

        with anyio.move_on_after(_COMPLETION_S):
            return _job_items(await client.job_list(_COMPLETED_JOBS), incomplete)
        return []

    try:
        return with_client(ctx.params.get("config_path"), ctx.params.get("service"), items)
    except Exception:
        # A completion must not print an error into a half-typed command line.
        return []


def _job_items(rows: list[ListedJob], incomplete: str) -> list[CompletionItem]:
    """Return the ids that begin like this, newest first, then the names."""
    from tailspan.logs.clean import printable

    found: dict[str, str] = {}
    for row in rows:
        if row.job_id.startswith(incomplete):
            found[row.job_id] = f"{row.state} {row.job_name or ''}".strip()
    for row in rows:
        if row.job_name and row.job_name.startswith(incomplete):
            found.setdefault(row.job_name, f"newest run: {row.job_id}")
    return [
        CompletionItem(text, help=printable(note, colours=False)) for text, note in found.items() if text.isprintable()
    ]


def _complete_service(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        names = sorted(settings_for(ctx.params.get("config_path")).services)
    except Exception:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def job_argument(command: Command) -> Command:
    """Add the argument JOB and ``--last``; the command's parameter ``job`` is None for the newest job.

    `tailspan.AsyncJobClient.find_job` makes a job of it.
    """

    @functools.wraps(command)
    def checked(*args: Any, job: str | None, last: bool, **kwargs: Any) -> Any:
        if job is None and not last:
            raise click.UsageError("Missing argument 'JOB': an id, its beginning, a name, or -1 for the newest job.")
        if job is not None and last:
            raise click.UsageError(f"-1 and JOB ({job!r}) exclude each other.")
        return command(*args, job=job, **kwargs)

    last = click.option("-1", "--last", "last", is_flag=True, help="The newest job, instead of JOB.")
    return click.argument("job", required=False, shell_complete=_complete_job)(last(checked))  # type: ignore[return-value]


def attributes_of(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Return the attributes of options such as ``--attr team=geo``; a callback of click."""
    attributes = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{one!r} is not KEY=VALUE", ctx=ctx, param=param)
        attributes[key] = value
    return attributes


def service_option(command: Command) -> Command:
    """Add ``--service``."""
    return click.option(
        "--service",
        metavar="NAME",
        shell_complete=_complete_service,
        help="Name of a configured service. [default: default_service]",
    )(command)


config_option = click.option(
    "--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help="Configuration file."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
