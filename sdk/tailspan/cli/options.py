"""What all commands share: options, the job argument, and how they reach a service."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from tailspan.local.run_settings import is_plain

if TYPE_CHECKING:
    from tailspan.client import AsyncJobClient
    from tailspan.config import Settings
    from tailspan.models import JobStatus

__all__ = [
    "config_option",
    "job_argument",
    "json_option",
    "links_of",
    "service_option",
    "settings_for",
    "with_client",
]

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_COMPLETED_JOBS = 50
_COMPLETION_S = 2.0


def settings_for(config_path: Path | None, *, telemetry: bool = False) -> Settings:
    """Load the configuration of a command; ``OTEL_*`` variables apply only to commands that send telemetry."""
    from tailspan.config import load_settings

    return load_settings(config_path, telemetry=telemetry)


def links_of(config_path: Path | None, job: JobStatus) -> dict[str, str]:
    """Return the configured links of a job."""
    return {} if config_path is None and is_plain(os.environ) else settings_for(config_path).links.of(job)


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

    if only_reads and config_path is None:
        from tailspan._direct import run_directly

        # It holds nothing open.
        client = AsyncJobClient(service=service)
        if client.reads_directly():
            return run_directly(use(client))
    import anyio

    async def run() -> T:
        # Without a file the client loads the configuration itself, if it needs more of it than its defaults.
        settings = None if config_path is None else settings_for(config_path)
        async with AsyncJobClient(settings, service=service) as client:
            return await use(client)

    return anyio.run(run)


def _complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    async def ids(client: AsyncJobClient) -> list[CompletionItem]:
        import anyio

        from tailspan.logs.clean import printable

        with anyio.move_on_after(_COMPLETION_S):
            rows = await client.job_list(_COMPLETED_JOBS)
            return [
                CompletionItem(row.job_id, help=printable(f"{row.state} {row.job_name or ''}".strip(), colours=False))
                for row in rows
                if row.job_id.startswith(incomplete) and row.job_id.isprintable()
            ]
        return []

    try:
        return with_client(ctx.params.get("config_path"), ctx.params.get("service"), ids)
    except Exception:
        # A completion must not print an error into a half-typed command line.
        return []


def _complete_service(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        names = sorted(settings_for(ctx.params.get("config_path")).services)
    except Exception:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def job_argument(command: Command) -> Command:
    """Add the argument JOB."""
    return click.argument("job", shell_complete=_complete_job)(command)


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
