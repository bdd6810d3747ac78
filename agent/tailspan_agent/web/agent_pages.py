"""The page of the agent itself: endpoints, backlog, dead letter, services, versions; with live updates."""

from __future__ import annotations

import asyncio
import platform
import shlex
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tailspan import __version__
from tailspan_agent.web.agent_health import Health, health_of
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.event_stream import KEEP_ALIVE, EventStreams, format_event
from tailspan_agent.web.fleet_members import members_of
from tailspan_agent.web.rendering import PAGE_HEADERS, PageRenderer
from tailspan_agent.web.troubles import Trouble

__all__ = ["AgentPages"]

_REFRESH_S = 2.0
_PACKAGES = ("opentelemetry-proto", "h11", "uvicorn")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """The endpoint of a signal.

    Attributes:
        signal: The signal.
        target: Where it is, without credentials.
        trouble: Why it does not accept the signal now; None if it does.
        delivered: Number of records that it accepted; None for metrics, which are not counted.
        retries: Number of requests that were sent again; None for metrics, which are not retried.
        last_ns: When records were last delivered, in ns since the epoch; None: not since the start.
    """

    signal: str
    target: str
    trouble: Trouble | None
    delivered: int | None
    retries: int | None
    last_ns: int | None


class AgentPages:
    """The page and its live updates.

    Args:
        view: The data of the agent.
        pages: Renders templates.
        streams: Limits the live updates.
    """

    def __init__(self, view: AgentView, pages: PageRenderer, streams: EventStreams) -> None:
        self._view = view
        self._pages = pages
        self._streams = streams

    async def show(self, _: Request) -> Response:
        """Answer with the page."""
        return self._pages.page("agent.html", tab="agent", **await self._values())

    async def stream(self, _: Request) -> Response:
        """Answer with the changes of the page as they occur."""

        async def events() -> AsyncGenerator[str, None]:
            sent = banner = ""
            while True:
                values = await self._values()
                new = self._pages.render("_agent.html", troubles=self._view.troubles, **values)
                yield format_event("agent", {"html": new}) if new != sent else KEEP_ALIVE
                if (new_banner := self._pages.banner()) != banner:
                    yield format_event("banner", {"html": new_banner})
                sent, banner = new, new_banner
                await asyncio.sleep(_REFRESH_S)

        return self._streams.respond(events, PAGE_HEADERS)

    async def _values(self) -> dict[str, Any]:
        view = self._view
        if view.fleet is not None:
            await view.fleet.refresh()
        troubles = view.troubles  # first, because it also notes outages, from which lag counts
        health, settings = health_of(view.context.health.collect()), view.settings()
        dead_letter = view.endpoints.dead_letter
        config = f" --config {shlex.quote(str(settings.path))}" if settings.path is not None else ""
        return {
            "health": health,
            "backlog_s": _backlog_s(health),
            "endpoints": self._endpoints(troubles),
            "dead_letter": dead_letter,
            "dead_letter_bytes": await asyncio.to_thread(dead_letter.total_bytes),
            "dead_letter_max": settings.otlp.dead_letter_max,
            "config": config,
            "failures": view.receiver.failures,
            "services": {name: type(service).__name__ for name, service in sorted(view.services.items())},
            "settings": settings,
            "versions": _versions(),
            "checkpoint_ns": int(view.store.acked_at_s * 1e9),
            "instance_id": view.store.instance_id,
            "since_ns": view.store.start_unix_nano,
            "members": members_of(view.fleet) if view.fleet is not None else None,
        }

    def _endpoints(self, troubles: Sequence[Trouble]) -> list[EndpointRow]:
        by_signal = {trouble.subject: trouble for trouble in troubles if trouble.state}
        found = []
        for signal, target in self._view.endpoints.targets.items():
            endpoint = self._view.endpoints.get(signal)
            exporter = endpoint.exporter if endpoint is not None else None
            last_s = exporter.last_delivered if exporter is not None else None
            found.append(
                EndpointRow(
                    signal=signal,
                    target=target,
                    trouble=by_signal.get(signal),
                    delivered=exporter.delivered if exporter is not None else None,
                    retries=exporter.retries if exporter is not None else None,
                    last_ns=int(last_s * 1e9) if last_s is not None else None,
                )
            )
        return found


def _backlog_s(health: Health) -> float | None:
    """Return the age of the newest delivered line of the service that is furthest behind; None if nothing waits."""
    waits = [values for values in health.services.values() if values.get("records.in_flight", 0) > 0]
    return max((values["lag"] for values in waits if "lag" in values), default=None)


def _versions() -> list[tuple[str, str]]:
    found = [("tailspan", __version__), ("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
