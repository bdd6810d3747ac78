"""The pages, and their live updates over server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tailspan.errors import CursorExpiredError, JobNotFoundError, ServiceError, TailspanError
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.web import formatting as present
from tailspan_agent.web.agent_health import health_of
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.ended_jobs import EndedJobs
from tailspan_agent.web.event_stream import ALIVE, REFRESH_S, Streams, event
from tailspan_agent.web.job_events import follow_job, tail_of
from tailspan_agent.web.job_filter import PAGE_ROWS, STATE_GROUPS, Entry, Filter, JobFilter, select
from tailspan_agent.web.job_rows import entry_of_ended, entry_of_followed, job_path, row_of
from tailspan_agent.web.job_view import JobView, view_of
from tailspan_agent.web.log_window import WINDOW_LINES, LogReader, Window
from tailspan_agent.web.session import Session, local_path

__all__ = ["Page"]

_BOARD_S = 0.8
_ASK_S = 10.0
_WRONG_TOKEN_S = 0.5
_MAX_FORM_BYTES = 4096
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # with no-referrer a browser sends our own forms with the origin "null", and we would refuse them
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}

_Protect = Callable[[Callable[[Request], Awaitable[Response]]], Callable[[Request], Awaitable[Response]]]


class Page:
    """All that people see of the agent.

    Args:
        shown: What may be seen.
        session: Who may see it.
    """

    def __init__(self, shown: AgentView, session: Session) -> None:
        self._shown = shown
        self._session = session
        self._ended = EndedJobs(shown.store.ledgers)
        self._logs = LogReader(shown.redact)
        self._streams = Streams()
        self._entries: list[Entry] = []
        self._entries_at_s = float("-inf")
        self._looking = asyncio.Lock()
        self._templates = _templates()

    def routes(self, protect: _Protect, only_us: _Protect) -> list[BaseRoute]:
        """Return the routes of the page.

        Args:
            protect: Puts an endpoint behind the token.
            only_us: Lets an endpoint be asked without token, by a name of ours.
        """
        return [
            Route("/", protect(self._jobs)),
            Route("/events/jobs", protect(self._jobs_events)),
            Route("/job", protect(self._job)),
            Route("/events/job", protect(self._job_events)),
            Route("/cancel", protect(self._cancel), methods=["POST"]),
            Route("/pipelines", protect(self._pipelines)),
            Route("/agent", protect(self._agent)),
            Route("/login", only_us(self._login), methods=["GET", "POST"]),
            Mount("/static", _Files(directory=Path(__file__).with_name("static"))),
        ]

    async def _board(self, wanted: Filter) -> JobFilter:
        async with self._looking:
            # All who look share one look.
            if time.monotonic() - self._entries_at_s > _BOARD_S:
                followed = self._shown.followed
                known = {(job.identity, job.status.job_id) for job in followed}
                names = {service.identity: name for name, service in self._shown.services.items()}
                ended = await self._ended.refresh(known)
                self._entries = [entry_of_followed(job) for job in followed]
                self._entries += [
                    entry_of_ended(job, names[job.identity])
                    for job in ended
                    if job.identity in names and (job.identity, job.job_id) not in known
                ]
                self._entries_at_s = time.monotonic()
        return select(self._entries, wanted)

    def _rows(self, board: JobFilter) -> list[Any]:
        now_ns = time.time_ns()
        return [row_of(entry, self._shown.history(entry.name), now_ns) for entry in board.entries]

    async def _jobs(self, request: Request) -> Response:
        wanted = Filter.from_query(request.query_params)
        board = await self._board(wanted)
        return self._html(
            "jobs.html",
            tab="jobs",
            wanted=wanted,
            board=board,
            rows=self._rows(board),
            groups=list(STATE_GROUPS),
            services=sorted(self._shown.services),
            page_rows=PAGE_ROWS,
        )

    async def _jobs_events(self, request: Request) -> Response:
        wanted = Filter.from_query(request.query_params)

        async def events() -> AsyncGenerator[str, None]:
            sent: dict[str, str] = {}
            order: list[str] = []
            head = ""
            while True:
                board = await self._board(wanted)
                rendered = {row.key: self._render("_row.html", row=row) for row in self._rows(board)}
                changed = {key: html for key, html in rendered.items() if sent.get(key) != html}
                new_head = self._render(
                    "_jobs_head.html", wanted=wanted, board=board, groups=list(STATE_GROUPS), page_rows=PAGE_ROWS
                )
                if changed or list(rendered) != order or new_head != head:
                    data: dict[str, Any] = {"order": list(rendered), "rows": changed}
                    if new_head != head:
                        data["head"] = new_head
                    yield event("jobs", data)
                    sent, order, head = rendered, list(rendered), new_head
                else:
                    yield ALIVE
                await asyncio.sleep(REFRESH_S)

        return self._streams.answer(events, _HEADERS)

    async def _view(self, request: Request) -> JobView:
        asked = request.query_params
        service = self._shown.services.get(asked.get("service", ""))
        if service is None:
            raise JobNotFoundError("there is no such service", service=asked.get("service", ""))
        return await view_of(self._shown, service, asked.get("id", ""), timeout_s=_ASK_S)

    async def _job(self, request: Request) -> Response:
        try:
            view = await self._view(request)
        except JobNotFoundError as error:
            return self._error(404, "No such job", str(error))
        except TailspanError as error:
            return self._error(502, "The service does not answer", str(error))
        asked = request.query_params
        first = _number(asked.get("from", ""))
        text = asked.get("q", "")[:200]
        if asked.get("jump") == "error":
            return await self._jump(view, first or 1)
        problem, window = None, Window()
        try:
            async with asyncio.timeout(_ASK_S):
                window = await self._window(view, first, text)
        except CursorExpiredError as error:
            problem = f"Lines are gone at their source: {error}"
        except ServiceError as error:
            problem = f"The log cannot be read now: {error}"
        except TimeoutError:
            problem = f"The log cannot be read now: its service did not answer within {_ASK_S:g} s."
        return self._html(
            "job.html",
            tab="jobs",
            view=view,
            window=window,
            problem=problem,
            first=first,
            text=text,
            follows=first is None and not text and not view.status.state.is_terminal,
            lines_a_window=WINDOW_LINES,
            form_token=self._session.form_token,
            may_cancel=self._shown.settings().agent.allow_cancel and not view.status.state.is_terminal,
            path=partial(job_path, view.service.name, view.status.job_id),
        )

    async def _window(self, view: JobView, first: int | None, text: str) -> Window:
        service, job_id = view.service, view.status.job_id
        if text:
            return await self._logs.search(service, job_id, text, first or 1)
        if first is not None:
            return await self._logs.window(service, job_id, first)
        return await tail_of(self._logs, view)

    async def _jump(self, view: JobView, first: int) -> Response:
        """Go to the first line that is an error, or on from where the search for one had to stop."""
        try:
            async with asyncio.timeout(_ASK_S):
                found = await self._logs.first_error(view.service, view.status.job_id, first)
        except (ServiceError, CursorExpiredError, TimeoutError) as error:
            return self._error(502, "The log cannot be read now", str(error) or "its service did not answer in time")
        path = partial(job_path, view.service.name, view.status.job_id)
        if found.lines and (number := found.lines[0].number):
            return RedirectResponse(f"{path(**{'from': max(1, number - 20)})}#L{number}", 303)
        if found.reached is not None:
            # A redirect for each part of a long log would be more of them than browsers follow.
            onward = path(**{"from": found.reached + 1, "jump": "error"})
            answer = self._html("looking.html", tab="", reached=found.reached, onward=onward, back=path())
            answer.headers["refresh"] = f"0; url={onward}"
            return answer
        return self._error(
            404,
            "No error in this log",
            "No line says of itself that it is an error, and there is no traceback.",
            back=path(),
        )

    async def _job_events(self, request: Request) -> Response:
        try:
            view = await self._view(request)
        except TailspanError as error:
            return PlainTextResponse(f"{error}\n", 404)
        look = partial(view_of, self._shown, view.service, view.status.job_id, timeout_s=_ASK_S)
        events = partial(follow_job, self._logs, view, look, self._render, timeout_s=_ASK_S)
        return self._streams.answer(events, _HEADERS)

    async def _cancel(self, request: Request) -> Response:
        form = await _form(request)
        if not self._shown.settings().agent.allow_cancel:
            return self._error(403, "Cancelling is off", "agent.allow_cancel is not set in the agent's configuration.")
        if not self._session.sent_by_us(request.headers, form.get("form_token", "")):
            return self._error(403, "This form is not ours", "Load the job's page again, and cancel from there.")
        service = self._shown.services.get(form.get("service", ""))
        if service is None:
            return self._error(404, "No such service", "The job's service is not among those that are watched.")
        try:
            async with asyncio.timeout(_ASK_S):
                await service.cancel(form.get("id", ""))
        except JobNotFoundError as error:
            return self._error(404, "No such job", str(error))
        except (TailspanError, TimeoutError) as error:
            return self._error(502, "The job was not canceled", str(error) or "its service did not answer in time")
        return RedirectResponse(job_path(service.name, form.get("id", "")), 303)

    async def _pipelines(self, _: Request) -> Response:
        now_ns = time.time_ns()
        runs: dict[str, int] = {}
        for total in self._shown.totals:
            runs[total.pipeline] = runs.get(total.pipeline, 0) + total.count
        active: dict[str, int] = {}
        for job in self._shown.followed:
            if not job.status.state.is_terminal:
                name = self._shown.label(job.status.job_name)
                active[name] = active.get(name, 0) + 1
        histories = self._shown.histories
        names = sorted({*runs, *active, *histories}, key=str.lower)
        pipelines = [(name, runs.get(name, 0), active.get(name, 0), histories.of(name)) for name in names]
        missing = [name for name, is_missing in self._shown.context.pipeline_stats.missing.items() if is_missing]
        return self._html(
            "pipelines.html",
            tab="pipelines",
            pipelines=pipelines,
            missing=missing,
            now_ns=now_ns,
            other=OTHER_PIPELINES,
        )

    async def _agent(self, _: Request) -> Response:
        return self._html(
            "agent.html",
            tab="agent",
            health=health_of(self._shown.context.health.collect()),
            failures=self._shown.receiver.failures,
            targets=self._shown.endpoints.targets,
            services=sorted(self._shown.services),
            checkpoint_ns=int(self._shown.store.acked_at_s * 1e9),
            instance_id=self._shown.store.instance_id,
            since_ns=self._shown.store.start_unix_nano,
        )

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            target = local_path(request.query_params.get("next", "/"))
            return self._html("login.html", tab="", target=target, wrong=False)
        form = await _form(request)
        target = local_path(form.get("next", "/"))
        if not self._session.knows_token(form.get("token", "")):
            await asyncio.sleep(_WRONG_TOKEN_S)
            return self._html("login.html", 401, tab="", target=target, wrong=True)
        answer = RedirectResponse(target, 303)
        answer.set_cookie(self._session.cookie_name, self._session.cookie, httponly=True, samesite="strict", path="/")
        return answer

    def end_streams(self) -> None:
        """End all live updates now; the pages stay as they are."""
        self._streams.end()

    def login_redirect(self, request: Request) -> Response | None:
        """Return the way to the login, for a browser that asks for a page; None for a program."""
        if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
            return None
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?{urlencode({'next': target})}", 303)

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(now=time.time_ns(), **values)

    def _html(self, template: str, status: int = 200, **values: Any) -> Response:
        problems, store = self._shown.problems(), self._shown.store
        text = self._render(
            template, problems=problems, recovered=store.recovered, token=self._session.needs_token, **values
        )
        # Tags, commands and errors may hold lone surrogates, which a strict encoder refuses.
        return HTMLResponse(text.encode(errors="replace"), status, headers=_HEADERS)

    def _error(self, status: int, title: str, text: str, back: str = "/") -> Response:
        return self._html("error.html", status, tab="", title=title, text=self._shown.redact(text), back=back)


class _Files(StaticFiles):
    def file_response(self, *args: Any, **keys: Any) -> Response:
        # Without it a browser goes on with the script of the version before for days.
        response = super().file_response(*args, **keys)
        response.headers["cache-control"] = "no-cache"
        response.headers["x-content-type-options"] = "nosniff"
        return response


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("tailspan_agent.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ago": present.ago,
        "bars": present.bars,
        "count": present.count,
        "duration": present.duration,
        "exact": present.exact,
        "quoted": partial(quote, safe="", errors="replace"),
        "visible": present.visible,
        "visible_block": present.visible_block,
    }
    environment.globals["job_path"] = job_path
    return environment


def _number(text: str) -> int | None:
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 16 else None


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a small form; of a large one none."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM_BYTES:
            return {}
    return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=20))
