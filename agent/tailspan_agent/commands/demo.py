"""The command ``tailspan demo``: four small real pipelines as local jobs, relayed by an agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailspan._durations import duration_text
from tailspan._private_dirs import make_private
from tailspan.cli.options import DURATION, DurationType
from tailspan.errors import ConfigError, ServiceUnavailableError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tailspan.config import Settings
    from tailspan.models import JobStatus
    from tailspan.services.local import LocalService
    from tailspan_agent.agent import Agent

__all__ = ["demo"]

_PIPELINES = {
    "weather-etl": "weather_etl",
    "invoice-import": "invoice_import",
    "tile-render": "tile_render",
    "backfill-year": "backfill_year",
}
_CANCELED = "backfill-year"
_CANCEL_AFTER_S = 3.0
_REFRESH_S = 0.2
_STAY_S = 600.0
_COLOURS = {
    None: "cyan",
    "success": "green",
    "cancellation": "yellow",
    "failure": "red",
    "timeout": "red",
    "error": "red",
}
_LISTEN = ("127.0.0.1", 8797)


@click.command()
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for its jobs and telemetry. [default: 'demo' in the platform's state directory]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=DurationType(minimum_s=1.0),
    default="1m",
    show_default=True,
    metavar="D",
    help="Time limit, such as 90s or 5m.",
)
@click.option(
    "--stay",
    "stay_s",
    metavar="D",
    type=DURATION,
    help="How long the page stays available afterwards. [default: 10m in a terminal, otherwise 0]",
)
def demo(directory: Path | None, timeout_s: float, stay_s: float | None) -> None:
    """Run sample pipelines and the agent, and show what it sends. Needs no set-up.

    Runs four small programs as local jobs: one succeeds, one fails with a traceback, one shows progress and prints
    many lines, and one is cancelled. The agent relays them to OTEL_EXPORTER_OTLP_ENDPOINT if that is set, otherwise
    to files of OTLP JSON lines that can be sent to any collector later. The agent's page shows the jobs live.

    \b
    Example:
      tailspan demo
      OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 tailspan demo
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.config import load_settings, platform_state_dir

    home = (directory or platform_state_dir() / "demo").absolute()
    settings = load_settings(_write_config(home, _free_address()))
    if stay_s is None:
        stay_s = _STAY_S if sys.stdout.isatty() else 0
    asyncio.run(_demo(settings, home, timeout_s, stay_s))


def _write_config(home: Path, listen: str) -> Path:
    """Write the demo's configuration to a file that the user can keep using."""
    path = home / "config.toml"
    try:
        make_private(home)
        path.touch(mode=0o600)
        path.write_text(
            f"# Written by 'tailspan demo'.\n"
            f"[services.local]\n"
            f'type = "local"\n'
            f"state_dir = {_toml(home / 'jobs')}\n\n"
            f"[agent]\n"
            f"state_dir = {_toml(home / 'agent')}\n"
            f'listen = "{listen}"\n\n'
            f"[[agent.watch]]\n"
            f'service = "local"\n'
            f"discover = true\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise ConfigError(
            f"the demo cannot write {path}: {error.strerror}; choose another directory with --dir"
        ) from error
    return path


def _toml(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _free_address() -> str:
    host, port = _LISTEN
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            port = 0
    return f"{host}:{port}"


@dataclass(slots=True)
class _Sample:
    """One sample job and its state."""

    job: JobStatus
    lines: int = 0
    relayed: bool = False
    why: str | None = None


async def _demo(settings: Settings, home: Path, timeout_s: float, stay_s: float) -> None:
    from rich.console import Console

    import tailspan_agent.agent  # noqa: F401 - where something is not installed, that is the only line
    from tailspan.services.local import LocalService
    from tailspan_agent.process.logging_setup import set_up_logging

    set_up_logging("error")
    console = Console(highlight=False)
    console.print("Four small pipelines run as jobs on this machine, and the agent relays them.\n")
    async with aclosing(LocalService.from_options("local", settings.services["local"], settings)) as service:
        agent, running = await _start_agent(settings, home)
        samples: dict[str, _Sample] = {}
        submitted: list[asyncio.Task[JobStatus]] = []
        try:
            if agent.server is not None:
                console.print(f"Watch them while they run: {agent.server.link}\n", soft_wrap=True)
            for name, module in _PIPELINES.items():
                submitted.append(asyncio.create_task(_submit(service, name, module)))
                samples[name] = _Sample(await asyncio.shield(submitted[-1]))
            await _follow(service, agent, running, samples, console, time.monotonic() + timeout_s)
            _raise_failure(running)
        finally:
            # The long one would run for an hour after the demo was stopped, even if it was stopped while it submitted.
            for task in submitted:
                await service.cancel((await task).job_id)
        console.print(_table(samples))
        console.print(_summary(settings, home, agent, samples), soft_wrap=True, markup=False)
        if stay_s and agent.server is not None and not running.done():
            console.print(
                f"\nThe page stays available for {duration_text(stay_s)} at {agent.server.link} ; Ctrl-C ends it.",
                soft_wrap=True,
            )
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running], timeout=stay_s)
        agent.stop()
        await running
    late = [name for name, sample in samples.items() if not sample.relayed]
    if late:
        target = ", ".join(sorted(set(agent.endpoints.targets.values())))
        raise ServiceUnavailableError(
            f"{target} did not accept all telemetry of {', '.join(late)} within {duration_text(timeout_s)};"
            " nothing is lost."
            f" To send the rest: tailspan agent run --config {shlex.quote(str(home / 'config.toml'))} --once"
        )


async def _start_agent(settings: Settings, home: Path) -> tuple[Agent, asyncio.Task[None]]:
    """Start the agent; return it and its task once it follows jobs."""
    from tailspan.config import load_settings

    agent, running = await _start(settings)
    failure = running.exception() if running.done() else None
    if isinstance(failure, ConfigError) and failure.key == "agent.listen":
        # The port was free a moment ago: another demo that started at the same time has taken it.
        agent, running = await _start(load_settings(_write_config(home, f"{_LISTEN[0]}:0")))
    _raise_failure(running)
    return agent, running


def _raise_failure(running: asyncio.Task[None]) -> None:
    """Raise the error that ended the agent, if one did."""
    if running.done():
        running.result()


async def _start(settings: Settings) -> tuple[Agent, asyncio.Task[None]]:
    from tailspan_agent.agent import Agent
    from tailspan_agent.tasks import cancelled

    agent, ready = Agent(settings), asyncio.Event()
    running = asyncio.create_task(agent.run(on_ready=ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
    await cancelled(waiting)
    return agent, running


async def _follow(
    service: LocalService,
    agent: Agent,
    running: asyncio.Task[None],
    samples: Mapping[str, _Sample],
    console: Console,
    deadline_s: float,
) -> None:
    """Show the jobs until all are relayed, the time is up or the agent has ended; cancel the long one."""
    from rich.live import Live

    with Live(_table(samples), console=console, transient=True, auto_refresh=False) as live:
        while not all(sample.relayed for sample in samples.values()):
            if running.done() or time.monotonic() > deadline_s:
                return
            await asyncio.sleep(_REFRESH_S)
            await _refresh(service, agent, samples)
            live.update(_table(samples), refresh=console.is_terminal)
            canceled = samples[_CANCELED].job
            if not canceled.state.is_terminal and _others_ended(samples):
                started = canceled.started_at or canceled.submitted_at
                if started is None or time.time() - started.timestamp() > _CANCEL_AFTER_S:
                    await service.cancel(canceled.job_id)


async def _submit(service: LocalService, name: str, module: str) -> JobStatus:
    command = [sys.executable, "-m", f"tailspan_agent.commands.demo_pipelines.{module}"]
    submitting = asyncio.ensure_future(
        service.submit(command, name=name, attributes={"demo": "true"}, env={"PYTHONUNBUFFERED": "1"})
    )
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        # Interrupted during the submission: no other code has the id of this job.
        await service.cancel((await submitting).job_id)
        raise


async def _refresh(service: LocalService, agent: Agent, samples: Mapping[str, _Sample]) -> None:
    from tailspan_agent.job.ledger import JobLedger
    from tailspan_agent.job.mapping import failure_text

    logs, traces = agent.endpoints.get("logs"), agent.endpoints.get("traces")
    spans_wait = traces is not None and bool(agent.store.unsent_spans(1))  # the summary has their number
    for sample in samples.values():
        sample.job = await service.get_job(sample.job.job_id)
        checkpoint = agent.store.job(service.identity, sample.job.job_id)
        if checkpoint is not None:
            ledger = JobLedger.from_json(checkpoint.ledger)
            sample.lines = ledger.lines
            sample.why = failure_text(sample.job, ledger.failure) if sample.job.state.result == "failure" else None
            sample.relayed = checkpoint.ended and (checkpoint.logs_complete or logs is None) and not spans_wait


def _others_ended(samples: Mapping[str, _Sample]) -> bool:
    return all(sample.job.state.is_terminal for name, sample in samples.items() if name != _CANCELED)


def _table(samples: Mapping[str, _Sample]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("PIPELINE", "STATE", "TIME", "LINES", "TRACE"):
        table.add_column(heading, justify="right" if heading == "LINES" else "left", no_wrap=True)
    for name, sample in samples.items():
        job = sample.job
        took = duration_text(job.duration.total_seconds()) if job.duration is not None else ""
        state = f"[{_COLOURS[job.state.result]}]{job.state}[/]"
        table.add_row(name, state, took, f"{sample.lines:,}", job.trace_id)
    return table


def _program() -> str:
    """Return how to call this program: by name if it is on the PATH, otherwise by path."""
    return "tailspan" if shutil.which("tailspan") else shlex.quote(os.path.relpath(sys.argv[0]))


def _summary(settings: Settings, home: Path, agent: Agent, samples: Mapping[str, _Sample]) -> str:
    """Return what was exported to which endpoint, and commands to try next."""
    targets = agent.endpoints.targets
    counts = {"logs": "log records", "traces": "spans", "metrics": "data points"}
    lines = [f"\n{name} failed: {sample.why}" for name, sample in samples.items() if sample.why]
    lines += ["", "Exported:"]
    for signal, target in targets.items():
        endpoint = agent.endpoints.get(signal)
        count = endpoint.delivered if endpoint is not None else agent.metrics_reader.metrics_request()[1]
        lines.append(f"  {count:6,} {counts[signal]:12} to {target}")
    program = _program()
    config = f"TAILSPAN_CONFIG={shlex.quote(str(home / 'config.toml'))}"
    failed = next((sample.job for sample in samples.values() if sample.job.state.result == "failure"), None)
    if failed is not None:
        lines += ["", "Inspect the failed job:"]
        lines += [f"  {config} {program} status {failed.job_id}", f"  {config} {program} logs {failed.job_id}"]
    if settings.otlp.for_signal("logs") is not None and agent.endpoints.kept_in_files:
        files = shlex.quote(str(home / "agent" / "otlp")) + "/*.jsonl"
        lines += ["", "Send the files to a collector that listens on port 4318:"]
        lines += [f"  {program} agent replay {files} --endpoint http://localhost:4318"]
    lines += [
        "",
        "See it in Grafana (logs, traces and metrics) at http://localhost:3000:",
        "  docker run --rm -d -p 3000:3000 -p 4317:4317 -p 4318:4318 grafana/otel-lgtm",
        f"  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 {program} demo",
        "",
        "See it in Jaeger (traces) at http://localhost:16686:",
        "  docker run --rm -d -p 16686:16686 -p 4318:4318 jaegertracing/jaeger:latest",
        f"  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 TAILSPAN_OTLP__SIGNALS=traces {program} demo",
        "",
        "Run your own job and relay it:",
        f"  {config} {program} run -- python3 -m compileall .",
        f"  {config} {program} agent run --once",
    ]
    return "\n".join(lines)
