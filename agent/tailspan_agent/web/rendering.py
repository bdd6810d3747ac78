"""`PageRenderer`: templates rendered as pages, with what every page shows."""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from tailspan._plural import plural
from tailspan_agent.web import formatting
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.session import Session

__all__ = ["PAGE_HEADERS", "PageRenderer"]

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # with no-referrer a browser sends our own forms with the origin "null", and we would reject them
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


class PageRenderer:
    """Renders templates.

    Args:
        view: The data of the agent, for the banner of every page.
        session: Knows the path below which a proxy has the page, and whether a token is required.
    """

    def __init__(self, view: AgentView, session: Session) -> None:
        self._view = view
        self._session = session
        self._templates = _templates()

    def render(self, template: str, **values: Any) -> str:
        """Return a part of a page as HTML."""
        shared = {"now": time.time_ns(), "root": self._session.root, "fleet": self._view.fleet}
        return self._templates.get_template(template).render(**shared, **values)

    def banner(self) -> str:
        """Return the problems of the agent as HTML; empty without one."""
        return self.render("_banner.html", troubles=self._view.troubles, recovered=self._view.store.recovered)

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a whole page."""
        text = self.render(
            template,
            troubles=self._view.troubles,
            recovered=self._view.store.recovered,
            token=self._session.needs_token,
            **values,
        )
        # Tags, commands and errors may contain lone surrogates, which strict encoding rejects.
        return HTMLResponse(text.encode(errors="replace"), status, headers=PAGE_HEADERS)

    def error(self, status: int, title: str, text: str, back: str = "/") -> Response:
        """Return the page of an error."""
        return self.page("error.html", status, tab="", title=title, text=self._view.redact(text), back=back)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("tailspan_agent.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ago": formatting.ago,
        "bars": formatting.bars,
        "count": formatting.count,
        "duration": formatting.duration,
        "exact": formatting.exact,
        "marked": formatting.marked,
        "plural": plural,
        "quoted": partial(quote, safe="", errors="replace"),
        "size": formatting.size,
        "time": formatting.time_tag,
        "visible": formatting.visible,
        "visible_block": formatting.visible_block,
    }
    environment.globals["job_path"] = job_path
    return environment
