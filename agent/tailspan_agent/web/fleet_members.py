"""The agents of the fleet as rows of the agent's page. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailspan_agent.fleet.leases import FleetAgent
    from tailspan_agent.fleet.overview import FleetOverview

__all__ = ["Member", "follower_of", "members_of", "page_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One agent of the fleet.

    Attributes:
        number: Its number; an agent that joined later has a larger one.
        host: Its host's name.
        pid: Its process id.
        version: Its version of Tailspan.
        page: The URL of its page; empty if it is not known.
        is_this: Whether it is the agent whose page this is.
        shards: The number of its shards.
        exports_metrics: Whether it exports what the whole fleet counts.
        draining: Whether it hands over everything.
        renewed_s: How long ago it renewed its leases, in seconds.
        is_silent: Whether it has not renewed them in time.
        jobs: The number of jobs that it follows; None if it has not reported them.
        lag_s: The age of its newest acknowledged record, in seconds; None without one.
        problems: What keeps it from relaying, and the last errors of its services and endpoints.
    """

    number: int
    host: str
    pid: int
    version: str
    page: str
    is_this: bool
    shards: int
    exports_metrics: bool
    draining: bool
    renewed_s: float
    is_silent: bool
    jobs: int | None
    lag_s: float | None
    problems: Sequence[str]


def members_of(fleet: FleetOverview) -> list[Member]:
    """Return the agents of the fleet in the order in which they joined."""
    return [_member(agent, fleet) for agent in fleet.agents.values()]


def _member(agent: FleetAgent, fleet: FleetOverview) -> Member:
    # Another version of the agent may report other values.
    jobs, lag_s = agent.health.get("jobs"), agent.health.get("lag_s")
    return Member(
        number=agent.id,
        host=agent.info.host,
        pid=agent.info.pid,
        version=agent.info.version,
        page=page_of(agent),
        is_this=agent.id == fleet.agent,
        shards=agent.shards,
        exports_metrics=agent.has_metrics,
        draining=agent.draining,
        renewed_s=max(0.0, fleet.lease_s - agent.left_s),
        is_silent=agent.left_s <= 0,
        jobs=jobs if isinstance(jobs, int) else None,
        lag_s=lag_s if isinstance(lag_s, int | float) else None,
        problems=[*_texts(agent.health.get("problems")), *_texts(agent.health.get("errors"))],
    )


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def follower_of(fleet: FleetOverview | None, agent: int | None) -> FleetAgent | None:
    """Return an agent of the fleet; None if it is not known or has not renewed its leases in time."""
    known = fleet.agents.get(agent) if fleet is not None and agent is not None else None
    return known if known is not None and known.left_s > 0 else None


def page_of(agent: FleetAgent) -> str:
    """Return the URL of an agent's page, without a slash at the end; empty if it is not known."""
    # A URL from the database must not be a script (javascript:).
    return agent.info.page.rstrip("/") if agent.info.page.startswith(("http://", "https://")) else ""
