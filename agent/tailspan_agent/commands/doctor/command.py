"""The command ``tailspan doctor``: diagnostics for a bug report, without secrets.

problems   everything that was found to be wrong
versions, clock, limits, variables (names only), configuration (keys that were set, and where)
reach      the findings of ``agent check``: services, endpoint; the running agent's own health
state      checkpoints, dead letter, disks, the agent's last warnings and errors
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tailspan._net import host_port
from tailspan._plural import plural
from tailspan._secrets import mask, mask_and_cut
from tailspan.cli.options import config_option, json_option
from tailspan.config import Settings, load_settings, platform_state_dir
from tailspan.errors import ConfigError, TailspanError
from tailspan.http.client import BROKEN, HttpClient
from tailspan.logs.clean import printable
from tailspan_agent.commands.doctor import machine
from tailspan_agent.commands.doctor.settings import known_secrets, possible_secrets, safe_settings
from tailspan_agent.process.logging_setup import read_last_errors
from tailspan_agent.records.redact import Redactor

__all__ = ["DiagnosticsReport", "diagnose", "doctor"]

_PROBE_TIMEOUT_S = 3.0
_MAX_HEALTH_BYTES = 64 << 10
_UNREACHABLE, _CONFIG, _ERROR = 3, 2, 1
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - replaced, not listened on


class DiagnosticsReport:
    """The findings, section by section. All text has passed the redactor.

    Args:
        redactor: Knows the secrets.

    Attributes:
        sections: Text, lists and tables of text, by section.
        exit_code: 0 without a problem; otherwise that of the first problem, as in ``agent check``.
    """

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self.sections: dict[str, Any] = {"problems": []}
        self.exit_code = 0

    def add_problem(self, text: str, exit_code: int = _ERROR) -> None:
        """Report a problem."""
        self.sections["problems"].append(self._safe(text))
        self.exit_code = self.exit_code or exit_code

    def add(self, section: str, find: Callable[[], Any]) -> None:
        """Add a section. An error of its function becomes a problem, and the other sections are still made.

        Args:
            section: The section's name.
            find: Returns text, or lists or tables of text, or yields pairs of text.
        """
        content: Any = {}
        pairs: dict[str, list[str]] = {}
        try:
            content = find()
            if isinstance(content, Iterator):
                for name, value in content:
                    pairs.setdefault(name, []).append(value)
        except ModuleNotFoundError as missing:
            content = f"needs the agent's packages ({missing.name} is missing): pip install 'tailspan[agent]'"
        except Exception as error:
            # A service plugin may raise anything, and the rest of the report is still needed.
            self.add_problem(f"{section}: {error}" if isinstance(error, TailspanError) else f"{section}: {error!r}")
        if isinstance(content, Iterator):  # with an error: the pairs before it
            content = {name: values if len(values) > 1 else values[0] for name, values in pairs.items()}
        self.sections[section] = self._safe(content)

    def text(self) -> str:
        """Return the report as text."""
        return "\n".join(_lines(self.sections, "")) + "\n"

    def _safe(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._safe(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._safe(inner) for inner in value]
        lines = (self._redactor.redact(line)[0] for line in str(value).splitlines())
        return printable(mask(" ".join(lines)), colours=False)


def _lines(value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str):
                yield f"{indent}{name}: {inner}"
            else:
                yield f"{indent}{name}:{'' if inner else ' none'}"
                yield from _lines(inner, indent + "  ")
    elif isinstance(value, list):
        for inner in value:
            yield f"{indent}- {inner}"
    else:
        yield f"{indent}{value}"


def diagnose(config_path: Path | None) -> DiagnosticsReport:
    """Collect all sections.

    Args:
        config_path: The configuration file; None takes it from the environment.
    """
    if config_path is None and os.environ.get("TAILSPAN_CONFIG"):
        config_path = Path(os.environ["TAILSPAN_CONFIG"])
    settings: Settings | None = None
    failure: ConfigError | None = None
    redactor = Redactor(possible_secrets(config_path))
    try:
        settings = load_settings(config_path)
        own = Redactor.from_settings(settings.redact.model_copy(update={"files": []}))
        redactor = Redactor(known_secrets(settings), own.patterns if own else ())
    except ConfigError as error:
        failure = error
    report = DiagnosticsReport(redactor)
    if failure is not None:
        # The quoted value is escaped and shortened, so that the redactor would not find a secret in it.
        report.add_problem(re.sub(r", got .*", "", str(failure)), _CONFIG)
    report.sections["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    report.add("versions", machine.versions)
    report.add("clock", machine.clock)
    report.add("limits", machine.limits)
    report.add("variables", machine.variables)
    state_dir = platform_state_dir() / "agent"
    if settings is not None:
        state_dir = settings.agent.state_dir
        report.add("configuration", lambda: _configuration(settings))
        report.add("reach", lambda: asyncio.run(_reach(settings, report)))
        report.add("running agent", lambda: asyncio.run(_health(settings)))
    report.add("disk", lambda: [machine.disk(path) for path in (state_dir, *_local_dirs(settings))])
    report.add("store", lambda: machine.store(state_dir))
    report.add("dead letter", lambda: _dead_letter(state_dir))
    report.add("last errors", lambda: read_last_errors(state_dir))
    if report.sections["store"].get("integrity", "ok") != "ok":
        report.add_problem(f"the checkpoint store is damaged: {report.sections['store']['integrity']}")
    return report


def _configuration(settings: Settings) -> dict[str, str]:
    return {"file": str(settings.path or "none"), **safe_settings(settings)}


def _local_dirs(settings: Settings | None) -> list[Path]:
    if settings is None:
        return [platform_state_dir()]
    tables = [table for table in settings.services.values() if table["type"] == "local"]
    return [Path(str(table.get("state_dir") or platform_state_dir())).expanduser() for table in tables]


async def _reach(settings: Settings, report: DiagnosticsReport) -> dict[str, str]:
    from tailspan_agent.commands.check import RUNNING_AGENT, check

    found: dict[str, str] = {}
    async for finding in check(settings):
        earlier = f"{found[finding.subject]}; " if finding.subject in found else ""
        found[finding.subject] = f"{earlier}{finding.text}"
        if finding.exit_code:
            report.add_problem(f"{finding.subject}: {finding.text}", finding.exit_code)
        elif finding.warning and finding.subject == RUNNING_AGENT:
            report.add_problem(f"{finding.subject}: {finding.text}", _UNREACHABLE)
    return found


async def _health(settings: Settings) -> dict[str, str]:
    """Request the health of the agent that listens on ``agent.listen``, if there is one."""
    address = settings.agent.listen_address
    if address is None or address[1] == 0:
        return {}
    host = _ANY_ADDRESS.get(address[0], address[0])
    url = f"http://{host_port(host, address[1])}"
    client = HttpClient(
        url, key="agent.listen", headers={}, timeout_s=_PROBE_TIMEOUT_S, keep_alive_s=0.0, max_idle=0, uses_proxy=False
    )
    found = {}
    try:
        for path in ("/healthz", "/readyz"):
            try:
                reply, body = await client.fetch("GET", path, max_bytes=_MAX_HEALTH_BYTES)
            except (*BROKEN, zlib.error) as error:
                found[path] = f"{url}: {str(error) or type(error).__name__}"
            else:
                found[path] = f"{reply.status} {mask_and_cut(' '.join(body.decode('utf-8', 'replace').split()), 500)}"
    finally:
        await client.aclose()
    return found


def _dead_letter(state_dir: Path) -> list[str]:
    from tailspan_agent.exporter.dead_letter import summarize

    return [
        f"{group.signal}: {group.rejected} of {group.records} {plural(group.records, 'record')},"
        f" {group.first} to {group.last}: {group.kind}: {group.reason}"
        for group in summarize(state_dir / "dead-letter")
    ]


@click.command()
@config_option
@json_option
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write to this file (mode 0600) instead of standard output.",
)
def doctor(config_path: Path | None, as_json: bool, output: Path | None) -> None:
    """Print diagnostics for a bug report: versions, configuration, reachability, last errors; secrets removed.

    Secrets, credentials in URLs, headers, attributes and matches of [redact] are removed. Paths and the names of hosts,
    jobs and services are not. Read the report before you publish it.

    \b
    Exit codes: 0 no problem, 1 a problem of the state directory, 2 configuration, 3 a service or the endpoint cannot be
    reached, 4 no such job. The report is written in any case.

    Example:
      tailspan doctor --config config.toml --output report.txt
    """  # noqa: D301 - click wants the backspace character itself
    report = diagnose(config_path)
    text = mask(json.dumps(report.sections, indent=2) + "\n" if as_json else report.text())
    if output is None:
        click.echo(text, nl=False)
    else:
        _write_private(output, text)
        click.echo(f"written to {output}; read it before you publish it", err=True)
    sys.exit(report.exit_code)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
