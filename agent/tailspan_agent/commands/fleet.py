"""Shows the agents of a fleet, and drains one: what the commands ``tailspan agent fleet`` and ``drain`` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tailspan._plural import plural
from tailspan.config import Settings
from tailspan.errors import ConfigError
from tailspan_agent.checkpoint.store import read_instance_id
from tailspan_agent.errors import AgentError

if TYPE_CHECKING:
    from tailspan_agent.fleet.database import DatabaseThread, Tables
    from tailspan_agent.fleet.leases import FleetAgent

__all__ = ["AgentReport", "drain", "fleet_report", "line_of"]

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class AgentReport:
    """One agent of the fleet.

    Attributes:
        agent: Its number; an agent that joined later has a larger one.
        instance: The UUID of its state directory: ``service.instance.id`` of its metrics.
        host: Its host's name.
        pid: Its process id.
        version: Its version of Tailspan.
        page: The URL of its page; empty if it is not known.
        shards: The number of its shards.
        exports_metrics: Whether it exports what the whole fleet counts.
        draining: Whether it hands over everything.
        lease_left_s: How long its leases last without a renewal, in seconds; negative after their end.
        health: What it reports: followed jobs, age of the last lines in seconds, problems.
    """

    agent: int
    instance: str
    host: str
    pid: int
    version: str
    page: str
    shards: int
    exports_metrics: bool
    draining: bool
    lease_left_s: float
    health: dict[str, Any]


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[DatabaseThread, Tables]]:
    if not settings.fleet.is_used:
        raise ConfigError("the agent belongs to no fleet: set fleet.dsn_file or fleet.dsn", key="fleet")
    try:
        from tailspan_agent.fleet.database import DatabaseThread, Tables
    except ImportError as error:
        raise ConfigError(f"a fleet needs psycopg: pip install 'tailspan[fleet]' ({error})", key="fleet") from error
    with closing(DatabaseThread(settings.fleet.read_dsn(), f"{settings.fleet.name} command")) as database:
        yield database, Tables(settings.fleet.name)


def fleet_report(settings: Settings) -> list[AgentReport]:
    """Return the agents of the configured fleet, in the order in which they joined.

    Raises:
        ConfigError: No fleet is configured.
        CheckpointError: The database cannot be reached.
    """
    with _opened(settings) as (database, tables):
        from tailspan_agent.fleet.leases import read_agents

        agents = database.run_now(lambda connection: read_agents(connection, tables))
    return [_report(agent) for agent in agents]


def _report(agent: FleetAgent) -> AgentReport:
    return AgentReport(
        agent=agent.id,
        **agent.info._asdict(),
        shards=agent.shards,
        exports_metrics=agent.has_metrics,
        draining=agent.draining,
        lease_left_s=round(agent.left_s, 1),
        health=dict(agent.health),
    )


def line_of(report: AgentReport) -> str:
    """Return one agent as a line of text."""
    notes = ["exports the fleet's metrics"] if report.exports_metrics else []
    notes += ["draining"] if report.draining else []
    left_s = report.lease_left_s
    notes.append(f"lease {left_s:.0f} s" if left_s > 0 else f"silent: its lease ended {-left_s:.0f} s ago")
    health = report.health
    if "jobs" in health:
        notes.append(f"{health['jobs']} {plural(health['jobs'], 'job')}")
    if health.get("lag_s") is not None:
        notes.append(f"lag {health['lag_s']:.0f} s")
    notes += health.get("problems", [])
    shards = f"{report.shards} {plural(report.shards, 'shard')}"
    return f"agent {report.agent} on {report.host} (pid {report.pid}, {report.version}): {shards}, {', '.join(notes)}"


def drain(settings: Settings, timeout_s: float, *, say: Callable[[str], object] = lambda _: None) -> None:
    """Let the agent of this state directory hand over everything, and wait until it has.

    Args:
        settings: The agent's configuration.
        timeout_s: Time limit in seconds.
        say: Called with what happens.

    Raises:
        ConfigError: No fleet is configured, or no agent of this state directory belongs to it.
        AgentError: The agent still has shards when the time is up.
        CheckpointError: The database cannot be reached.
    """
    instance = read_instance_id(settings.agent.state_dir)
    with _opened(settings) as (database, tables):
        from tailspan_agent.fleet.leases import leases_of, request_drain

        agent = database.run_now(lambda connection: request_drain(connection, tables, instance or ""))
        if agent is None:
            raise ConfigError(
                f"no agent of agent.state_dir {settings.agent.state_dir} is in the fleet", key="agent.state_dir"
            )
        until_s = time.monotonic() + timeout_s
        while left := database.run_now(lambda connection: leases_of(connection, tables, agent)):
            if time.monotonic() > until_s:
                raise AgentError(f"agent {agent} still has {left} {plural(left, 'lease')} after {timeout_s:g} s")
            time.sleep(_POLL_S)
        say(f"agent {agent} has handed over everything")
