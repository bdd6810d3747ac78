"""The command group ``tailspan agent``."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailspan._durations import duration_text
from tailspan._plural import plural
from tailspan.cli.group import SuggestingGroup
from tailspan.cli.options import (
    POSITIVE_DURATION,
    config_option,
    job_argument,
    json_option,
    service_option,
    settings_for,
)
from tailspan.cli.show import write
from tailspan.cli.watch import say
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = ["agent"]

_RELOAD_POLL_S = 0.05


@click.group(cls=SuggestingGroup)
def agent() -> None:
    """Relay jobs' logs, status and run time as OTLP.

    \b
    Example:
      tailspan agent check --config config.toml
      tailspan agent run --config config.toml
    """  # noqa: D301 - click wants the backspace character itself


@agent.command()
@config_option
@click.option("--once", is_flag=True, help="Relay what is readable now, wait until it is acknowledged, and exit.")
@click.option(
    "--timeout",
    "timeout_s",
    type=POSITIVE_DURATION,
    default="5m",
    show_default=True,
    metavar="D",
    help="With --once: time limit, such as 90s or 5m.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
    help="Lowest level of the agent's own log, on stderr.",
)
@click.option(
    "--no-token",
    is_flag=True,
    help="Serve the page without a token: every user of this machine can then read all logs (and cancel jobs, with "
    "agent.allow_cancel).",
)
def run(config_path: Path | None, once: bool, timeout_s: float, log_level: str, no_token: bool) -> None:
    """Run the agent until SIGTERM or Ctrl-C. It drains first; a second signal skips the drain. SIGHUP reloads the file.

    Without an endpoint the telemetry goes to files of OTLP JSON lines under agent.state_dir, for a later replay.

    \b
    Exit codes of --once: 0 everything is acknowledged; 1 something was rejected, see the dead letter; 3 not delivered
    in time, or a service could not be reached; 4 a configured job does not exist.

    Example:
      tailspan agent run --config config.toml --once --timeout 60
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan_agent.commands.run import run_agent

    code = run_agent(config_path=config_path, once=once, timeout_s=timeout_s, log_level=log_level, no_token=no_token)
    sys.exit(code)


@agent.command()
@config_option
@json_option
def check(config_path: Path | None, as_json: bool) -> None:
    """Validate the file, connect to services and endpoint, and report problems.

    \b
    Exit codes: 0 no problem, 2 configuration, 3 a service or the endpoint cannot be reached, 4 no such job.

    Example:
      tailspan agent check --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    import asyncio

    settings = settings_for(config_path, telemetry=True)

    # What the agent needs must be installed; it is loaded before the first finding, so that its lack is the only line.
    import tailspan_agent.agent  # noqa: F401
    from tailspan_agent.commands.check import check as findings_of

    async def run_checks() -> int:
        code = 0
        async for finding in findings_of(settings):
            code = code or finding.exit_code
            if as_json:
                click.echo(json.dumps(asdict(finding)))
            else:
                label = "problem" if finding.exit_code else "warning" if finding.warning else "ok"
                write(f"{label:8}{finding.subject}: {finding.text}")
        return code

    sys.exit(asyncio.run(run_checks()))


@agent.command()
@config_option
@json_option
@click.option(
    "--timeout",
    "timeout_s",
    type=POSITIVE_DURATION,
    default="30s",
    show_default=True,
    metavar="D",
    help="How long to wait for the result.",
)
def reload(config_path: Path | None, as_json: bool, timeout_s: float) -> None:
    """Make the running agent load its configuration again, and print what changed.

    Jobs that are still watched are not disturbed.

    \b
    Exit codes: 0 reloaded, 1 no result in time, 2 not reloaded: the old configuration stays in force; or a service
    could not be opened.

    Example:
      tailspan agent reload --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan_agent.checkpoint.database import lock_holder

    settings = settings_for(config_path)
    pid = lock_holder(settings.agent.state_dir)
    if pid is None:
        raise ConfigError(
            f"no agent runs on agent.state_dir {settings.agent.state_dir}; start one: tailspan agent run",
            key="agent.state_dir",
        )
    from tailspan_agent.process.reload import read_answer

    before = read_answer(settings.agent.state_dir)
    try:
        os.kill(pid, signal.SIGHUP)
    except PermissionError as error:
        raise ConfigError(f"agent pid {pid} belongs to another user: reload it as that user") from error
    except ProcessLookupError as error:
        raise ConfigError(f"agent pid {pid} has just ended; start it again: tailspan agent run") from error
    deadline_s = time.monotonic() + timeout_s
    while (answer := read_answer(settings.agent.state_dir)) == before or answer is None:
        if time.monotonic() > deadline_s or lock_holder(settings.agent.state_dir) != pid:
            say(f"agent pid {pid} reported no result within {duration_text(timeout_s)}; see its log")
            sys.exit(1)
        time.sleep(_RELOAD_POLL_S)
    if as_json:
        click.echo(json.dumps(answer))
    sys.exit(_report_reload(pid, answer, quiet=as_json))


def _report_reload(pid: int, answer: Mapping[str, Any], *, quiet: bool) -> int:
    """Print the result of a reload, and return the exit code."""
    problems = [answer["error"]] if "error" in answer else list(answer.get("problems", ()))
    if quiet:
        return 2 if problems else 0
    if "error" in answer:
        say(f"agent pid {pid} did not reload; the old configuration stays in force: {answer['error']}")
        return 2
    changed = ", ".join(answer.get("changed", ())) or "nothing"
    write(f"agent pid {pid} reloaded its configuration; changed: {changed}")
    for key in answer.get("needs_restart", ()):
        write(f"restart the agent to apply {key}")
    for problem in problems:
        say(problem)
    return 2 if problems else 0


@agent.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--endpoint", metavar="URL", help="Endpoint to send to. [default: otlp.endpoint]")
@click.option("--protocol", type=click.Choice(["http/protobuf", "grpc"]), help="[default: otlp.protocol]")
@config_option
@json_option
def replay(
    files: tuple[Path, ...], endpoint: str | None, protocol: str | None, config_path: Path | None, as_json: bool
) -> None:
    """Send files of OTLP JSON lines (the agent's own, or its dead letter) in the given order.

    The files are not changed. Replaying twice is safe: repeated records carry the same log.record.uid.

    \b
    Exit codes: 0 everything delivered, 1 something was rejected or unreadable, 3 the endpoint cannot be reached.

    Example:
      tailspan agent replay logs.jsonl traces.jsonl --endpoint http://localhost:4318
    """  # noqa: D301 - click wants the backspace character itself
    import asyncio

    from tailspan.config import load_settings

    overrides = {key: value for key, value in (("endpoint", endpoint), ("protocol", protocol)) if value is not None}
    settings = load_settings(config_path, overrides={"otlp": overrides} if overrides else None)
    sys.exit(asyncio.run(_replay(files, settings, as_json)))


async def _replay(files: tuple[Path, ...], settings: Settings, as_json: bool) -> int:
    from tailspan.config.signals import SIGNALS, Signal
    from tailspan_agent.commands.replay import replay as send_files
    from tailspan_agent.exporter.factory import make_exporter
    from tailspan_agent.exporter.protocol import Exporter

    async with AsyncExitStack() as stack:
        exporters: dict[Signal, Exporter] = {}
        for name in SIGNALS:
            keys = settings.otlp.for_signal(name)
            if keys is None:
                continue
            if keys.url is None:
                raise ConfigError("replay needs an endpoint: pass --endpoint URL", key="otlp.endpoint")
            exporters[name] = make_exporter(name, keys, state_dir=settings.agent.state_dir, files=settings.files)
            stack.push_async_callback(exporters[name].aclose)
        result = await send_files(files, exporters)
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return 0 if result.ok else 1
    for problem in result.problems:
        say(problem)
    click.echo(
        f"{result.lines} {plural(result.lines, 'line')} in {result.files} {plural(result.files, 'file')}:"
        f" {result.delivered} {plural(result.delivered, 'record')} delivered,"
        f" {result.rejected} rejected, {result.skipped} skipped,"
        f" {result.bad_lines} {plural(result.bad_lines, 'line')} unreadable"
    )
    return 0 if result.ok else 1


@agent.command("dead-letter")
@config_option
@json_option
def dead_letter(config_path: Path | None, as_json: bool) -> None:
    """Show what the endpoint rejected, by reason, and how to send it again.

    \b
    Example:
      tailspan agent dead-letter --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan_agent.exporter.dead_letter import summarize

    directory = settings_for(config_path).agent.state_dir / "dead-letter"
    groups = summarize(directory)
    if as_json:
        from msgspec.structs import asdict as fields_of

        click.echo(json.dumps([fields_of(group) for group in groups]))
        return
    if not groups:
        click.echo(f"nothing was rejected ({directory} is empty)")
        return
    for group in groups:
        write(
            f"{group.signal}: {group.rejected} of {group.records} {plural(group.records, 'record')}"
            f" in {group.batches} {plural(group.batches, 'batch', 'batches')}"
            f" ({group.first} to {group.last}): {group.kind}: {group.reason}"
        )
    click.echo(f"send it again: tailspan agent replay {shlex.quote(str(directory))}/*.jsonl --endpoint URL")


@agent.command()
@job_argument
@service_option
@config_option
@json_option
def verify(job: str | None, service: str | None, config_path: Path | None, as_json: bool) -> None:
    """Read a job's log again and compare it with what the agent relayed.

    \b
    Exit codes: 0 equal, 1 different, not relayed, or not complete yet.

    Example:
      tailspan agent verify JOB --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    import asyncio

    from tailspan_agent.commands.verify import verify as compare

    settings = settings_for(config_path)
    report = asyncio.run(compare(settings, service or settings.default_service, job))
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        write(f"{report.verdict}: {report.text}")
    sys.exit(0 if report.verdict == "verified" else 1)


@agent.command()
@config_option
@json_option
def fleet(config_path: Path | None, as_json: bool) -> None:
    """Show the agents that share jobs through [fleet]: shards, leases, health.

    \b
    Example:
      tailspan agent fleet --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan_agent.commands.fleet import fleet_report, line_of

    reports = fleet_report(settings_for(config_path))
    if as_json:
        click.echo(json.dumps([asdict(report) for report in reports]))
        return
    for report in reports:
        write(line_of(report))
    if not reports:
        click.echo("no agent is in the fleet")


@agent.command()
@config_option
@click.option(
    "--timeout",
    "timeout_s",
    type=POSITIVE_DURATION,
    default="1m",
    show_default=True,
    metavar="D",
    help="Time limit, such as 90s or 5m.",
)
def drain(config_path: Path | None, timeout_s: float) -> None:
    """Let this machine's agent hand over all of its shared jobs to the other agents of [fleet], and wait for it.

    The agent keeps running, without shared jobs, until it is stopped.

    \b
    Exit codes: 0 everything is handed over, 2 it still has jobs when the time is up.

    Example:
      tailspan agent drain --config config.toml
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan_agent.commands.fleet import drain as hand_over

    hand_over(settings_for(config_path), timeout_s, say=lambda text: click.echo(text, err=True))
