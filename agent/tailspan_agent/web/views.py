"""The pages, and their live updates over server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tailspan._plural import plural
from tailspan.errors import CursorExpiredError, JobNotFoundError, ServiceError, TailspanError
from tailspan.services import TaskService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.errors import CheckpointError
from tailspan_agent.web import formatting
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.agent_health import health_of
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.ended_jobs import EndedJobs
from tailspan_agent.web.event_stream import KEEP_ALIVE, REFRESH_S, EventStreams, format_event
from tailspan_agent.web.fleet_members import members_of, page_of
from tailspan_agent.web.job_events import job_events, job_paths, read_tail
from tailspan_agent.web.job_filter import PAGE_ROWS, STATE_GROUPS, JobEntry, JobFilter, JobListing, list_jobs
from tailspan_agent.web.job_rows import JobRow, ended_entry, followed_entry, job_path, job_row
from tailspan_agent.web.job_view import JobView, load_job_view
from tailspan_agent.web.log_window import WINDOW_LINES, LogLine, LogWindow, LogWindowReader
from tailspan_agent.web.session import Session, local_path
from tailspan_agent.web.shared_jobs import SharedJobs

__all__ = ["PageRoutes"]

_LISTING_S = 0.8
# Transactions of several agents end in any order, so a job may become visible behind newer ones.
_LATE_KEYS = 100
_SERVICE_TIMEOUT_S = 10.0
_WRONG_TOKEN_S = 0.5
_MAX_FORM_BYTES = 4096
# As long as the id of a task may be (`bounded_tasks`).
_MAX_TASK_CHARS = 1024
_MAX_FORM_FIELDS = 20
_MAX_WRONG_TOKENS = 10
_MAX_DOWNLOADS = 4
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # with no-referrer a browser sends our own forms with the origin "null", and we would reject them
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


class PageRoutes:
    """The routes of the page and their endpoints.

    Args:
        view: The data of the agent.
        session: Logs browsers in.
    """

    def __init__(self, view: AgentView, session: Session) -> None:
        self._view = view
        self._session = session
        self._ended = [EndedJobs(view.store.ledgers)]
        if view.shared is not None:
            self._ended.append(EndedJobs(view.shared.store.ledgers, late_keys=_LATE_KEYS))
        self._shared = SharedJobs(view.fleet) if view.fleet is not None else None
        self._logs = LogWindowReader(view.redact, view.redact_open)
        self._streams = EventStreams()
        self._entries: list[JobEntry] = []
        self._entries_at_s = float("-inf")
        self._refreshing = asyncio.Lock()
        self._wrong_tokens = 0
        self._downloads = 0
        self._templates = _templates()

    def routes(self, access: AccessControl) -> list[BaseRoute]:
        """Return the routes of the page, behind access control."""
        protect = access.require_token
        return [
            Route("/", protect(self._jobs)),
            Route("/events/jobs", protect(self._jobs_events)),
            Route("/job", protect(self._job)),
            Route("/events/job", protect(self._job_events)),
            Route("/log", protect(self._download)),
            Route("/cancel", protect(self._cancel), methods=["POST"]),
            Route("/pipelines", protect(self._pipelines)),
            Route("/agent", protect(self._agent)),
            Route("/login", access.require_known_host(self._login), methods=["GET", "POST"]),
            Mount("/static", _Files(directory=Path(__file__).with_name("static"))),
        ]

    async def _listing(self, job_filter: JobFilter) -> JobListing:
        async with self._refreshing:
            # All browsers share one refresh.
            if time.monotonic() - self._entries_at_s > _LISTING_S:
                self._entries = await self._read_entries()
                self._entries_at_s = time.monotonic()
        return list_jobs(self._entries, job_filter)

    async def _read_entries(self) -> list[JobEntry]:
        names = self._view.service_names
        elsewhere = await self._followed_elsewhere(names)
        # Afterwards, so that a job that has just come from another agent is shown once, as followed by this one.
        followed = self._view.followed
        known = {(job.identity, job.status.job_id) for job in followed}
        entries = [followed_entry(job, self._follower(job)) for job in followed]
        for job, agent in elsewhere:
            if (job.identity, job.status.job_id) not in known:
                known.add((job.identity, job.status.job_id))
                entries.append(followed_entry(job, agent))
        for ended in self._ended:
            with contextlib.suppress(CheckpointError):
                await ended.refresh(known)
            entries += [
                ended_entry(job, names[job.identity])
                for job in ended.newest
                if job.identity in names and (job.identity, job.job_id) not in known
            ]
        return entries

    async def _followed_elsewhere(self, names: Mapping[str, str]) -> list[tuple[JobSnapshot, int | None]]:
        if self._view.fleet is None or self._shared is None:
            return []
        await self._view.fleet.refresh()
        return await self._shared.snapshots(names)

    def _follower(self, job: JobSnapshot) -> int | None:
        """Return the number of this agent, for a job of its fleet."""
        fleet, service = self._view.fleet, self._view.services.get(job.service)
        return None if fleet is None or service is None or service.polls_are_free else fleet.agent

    def _rows(self, listing: JobListing) -> list[JobRow]:
        now_ns = time.time_ns()
        return [
            self._with_agent(job_row(entry, self._view.history(entry.name), now_ns), entry.agent)
            for entry in listing.entries
        ]

    def _with_agent(self, row: JobRow, number: int | None) -> JobRow:
        fleet = self._view.fleet
        agent = fleet.agents.get(number) if fleet is not None and number is not None else None
        if fleet is None or agent is None:
            return row
        page = page_of(agent) if agent.id != fleet.agent else ""
        return replace(row, agent=agent.info.host, agent_path=f"{page}{row.path}" if page else "")

    async def _jobs(self, request: Request) -> Response:
        job_filter = JobFilter.from_query(request.query_params)
        listing = await self._listing(job_filter)
        return self._html(
            "jobs.html",
            tab="jobs",
            job_filter=job_filter,
            listing=listing,
            rows=self._rows(listing),
            groups=list(STATE_GROUPS),
            services=sorted(self._view.services),
            page_rows=PAGE_ROWS,
        )

    async def _jobs_events(self, request: Request) -> Response:
        job_filter = JobFilter.from_query(request.query_params)

        async def events() -> AsyncGenerator[str, None]:
            sent: dict[str, str] = {}
            order: list[str] = []
            head = banner = ""
            while True:
                listing = await self._listing(job_filter)
                rendered = {row.key: self._render("_row.html", row=row) for row in self._rows(listing)}
                changed = {key: html for key, html in rendered.items() if sent.get(key) != html}
                new_head = self._render(
                    "_jobs_head.html",
                    job_filter=job_filter,
                    listing=listing,
                    groups=list(STATE_GROUPS),
                    page_rows=PAGE_ROWS,
                )
                if changed or list(rendered) != order or new_head != head:
                    data: dict[str, Any] = {"order": list(rendered), "rows": changed}
                    if new_head != head:
                        data["head"] = new_head
                    yield format_event("jobs", data)
                    sent, order, head = rendered, list(rendered), new_head
                else:
                    yield KEEP_ALIVE
                if (new_banner := self._banner()) != banner:
                    yield format_event("banner", {"html": new_banner})
                    banner = new_banner
                await asyncio.sleep(REFRESH_S)

        return self._streams.respond(events, _HEADERS)

    async def _load_job(self, request: Request, *, requests_tasks: bool = False) -> JobView:
        query = request.query_params
        service = self._view.services.get(query.get("service", ""))
        if service is None:
            raise JobNotFoundError("no service with this name is watched", service=query.get("service", ""))
        return await load_job_view(
            self._view, service, query.get("id", ""), timeout_s=_SERVICE_TIMEOUT_S, requests_tasks=requests_tasks
        )

    async def _job(self, request: Request) -> Response:
        try:
            job = await self._load_job(request, requests_tasks=True)
        except JobNotFoundError as error:
            return self._error(404, "No such job", str(error))
        except TailspanError as error:
            return self._error(502, "The service does not answer", str(error))
        query = request.query_params
        first = _number(query.get("from", ""))
        text, task = query.get("q", "")[:200], _task_of(query)
        until = _number(query.get("until", "")) if task and first is None and not text else None
        if query.get("jump") == "error":
            return await self._jump_to_error(job, first or 1, task)
        follows = first is None and until is None and not text and not job.status.state.is_terminal
        problem, window, open_lines = None, LogWindow(), list[LogLine]()
        try:
            async with asyncio.timeout(_SERVICE_TIMEOUT_S):
                window = await self._window(job, first, until, text, task)
                if follows and not task:
                    open_lines = await self._logs.open_line(job.service, job.status.job_id)
        except CursorExpiredError as error:
            problem = f"The service no longer has these lines: {error}"
        except ServiceError as error:
            problem = f"The log cannot be read now: {error}"
        except TimeoutError:
            problem = f"The log cannot be read now: its service did not answer within {_SERVICE_TIMEOUT_S:g} s."
        return self._html(
            "job.html",
            tab="jobs",
            job=job,
            window=window,
            problem=problem,
            first=first,
            until=until,
            text=text,
            open_lines=open_lines,
            follows=follows,
            earlier=_earlier_path(job_paths(job, task), window, first, task),
            form_token=self._session.form_token,
            may_cancel=self._view.settings().agent.allow_cancel and not job.status.state.is_terminal,
            path=job_paths(job, task),
            task=task,
            task_name=next((one.name for one in job.tasks if one.task_id == task), task),
            chart=job.task_chart(task),
            has_tasks=bool(job.tasks) or (follows and isinstance(job.service, TaskService)),
        )

    async def _window(self, job: JobView, first: int | None, until: int | None, text: str, task: str) -> LogWindow:
        service, job_id = job.service, job.status.job_id
        if text:
            return await self._logs.search(service, job_id, text, first or 1, task=task)
        if first is not None:
            return await self._logs.window(service, job_id, first, task=task)
        if until is not None:
            return await self._logs.until(service, job_id, until, task=task)
        return await read_tail(self._logs, job, task)

    async def _jump_to_error(self, job: JobView, first: int, task: str) -> Response:
        """Redirect to the first error line, or continue a search that ran out of time."""
        try:
            async with asyncio.timeout(_SERVICE_TIMEOUT_S):
                found = await self._logs.first_error(job.service, job.status.job_id, first, task=task)
        except (ServiceError, CursorExpiredError, TimeoutError) as error:
            return self._error(502, "The log cannot be read now", str(error) or "its service did not answer in time")
        path = job_paths(job, task)
        if found.lines and (number := found.lines[0].number):
            return RedirectResponse(f"{self._session.root}{path(**{'from': max(1, number - 20)})}#L{number}", 303)
        if found.reached is not None:
            # Browsers limit the number of redirects, and a long log would need too many.
            onward = path(**{"from": found.reached + 1, "jump": "error"})
            response = self._html("error_search.html", tab="", reached=found.reached, onward=onward, back=path())
            response.headers["refresh"] = f"0; url={self._session.root}{onward}"
            return response
        return self._error(
            404,
            "No error in this log",
            "No line has an error level, and there is no traceback."
            if not task
            else "No line of this task has an error level, and there is no traceback.",
            back=path(),
        )

    async def _job_events(self, request: Request) -> Response:
        try:
            job = await self._load_job(request)
        except TailspanError as error:
            return PlainTextResponse(f"{error}\n", 404)
        reload = partial(load_job_view, self._view, job.service, job.status.job_id, timeout_s=_SERVICE_TIMEOUT_S)
        task = _task_of(request.query_params)
        events = partial(
            job_events,
            self._logs,
            job,
            reload,
            self._render,
            banner=self._banner,
            timeout_s=_SERVICE_TIMEOUT_S,
            task=task,
        )
        return self._streams.respond(events, _HEADERS)

    async def _download(self, request: Request) -> Response:
        try:
            job = await self._load_job(request)
        except TailspanError as error:
            return PlainTextResponse(f"{error}\n", 404)
        if self._downloads >= _MAX_DOWNLOADS:
            return PlainTextResponse("too many logs are being downloaded: try again later\n", 503)
        lines = self._logs.text(job.service, job.status.job_id, task=_task_of(request.query_params))
        headers = {**_HEADERS, "content-disposition": f'attachment; filename="{_file_name(job.name)}.log"'}
        return StreamingResponse(self._counted(lines), headers=headers, media_type="text/plain; charset=utf-8")

    async def _counted(self, lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        self._downloads += 1
        try:
            async with aclosing(lines):
                async for part in lines:
                    yield part
        finally:
            self._downloads -= 1

    async def _cancel(self, request: Request) -> Response:
        form = await _form(request)
        if not self._view.settings().agent.allow_cancel:
            return self._error(
                403, "Cancelling is disabled", "agent.allow_cancel is not set in the agent's configuration."
            )
        if not self._session.sent_by_us(request.headers, form.get("form_token", "")):
            return self._error(403, "This form was not sent by this page", "Reload the job's page and cancel again.")
        service = self._view.services.get(form.get("service", ""))
        if service is None:
            return self._error(404, "No such service", "The agent does not watch this job's service.")
        try:
            async with asyncio.timeout(_SERVICE_TIMEOUT_S):
                await service.cancel(form.get("id", ""))
        except JobNotFoundError as error:
            return self._error(404, "No such job", str(error))
        except (TailspanError, TimeoutError) as error:
            return self._error(502, "The job was not cancelled", str(error) or "its service did not answer in time")
        return RedirectResponse(self._session.root + job_path(service.name, form.get("id", "")), 303)

    async def _pipelines(self, _: Request) -> Response:
        now_ns = time.time_ns()
        runs: dict[str, int] = {}
        for total in self._view.totals:
            runs[total.pipeline] = runs.get(total.pipeline, 0) + total.count
        active: dict[str, int] = {}
        elsewhere = await self._followed_elsewhere(self._view.service_names)
        followed = {(job.identity, job.status.job_id): job for job, _ in elsewhere}
        followed |= {(job.identity, job.status.job_id): job for job in self._view.followed}
        for job in followed.values():
            if not job.status.state.is_terminal:
                name = self._view.label(job.status.job_name)
                active[name] = active.get(name, 0) + 1
        histories = self._view.histories
        names = sorted({*runs, *active, *histories}, key=str.lower)
        pipelines = [(name, runs.get(name, 0), active.get(name, 0), histories.of(name)) for name in names]
        missing = [name for name, is_missing in self._view.context.pipeline_stats.missing.items() if is_missing]
        return self._html(
            "pipelines.html",
            tab="pipelines",
            pipelines=pipelines,
            missing=missing,
            now_ns=now_ns,
            other=OTHER_PIPELINES,
        )

    async def _agent(self, _: Request) -> Response:
        fleet = self._view.fleet
        if fleet is not None:
            await fleet.refresh()
        return self._html(
            "agent.html",
            tab="agent",
            health=health_of(self._view.context.health.collect()),
            failures=self._view.receiver.failures,
            targets=self._view.endpoints.targets,
            services=sorted(self._view.services),
            checkpoint_ns=int(self._view.store.acked_at_s * 1e9),
            instance_id=self._view.store.instance_id,
            since_ns=self._view.store.start_unix_nano,
            members=members_of(fleet) if fleet is not None else None,
        )

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            target = local_path(request.query_params.get("next", "/"))
            return self._html("login.html", tab="", target=target, wrong=False)
        form = await _form(request)
        target = local_path(form.get("next", "/"))
        if not self._session.knows_token(form.get("token", "")):
            if self._wrong_tokens >= _MAX_WRONG_TOKENS:
                return PlainTextResponse("too many wrong tokens: try again later\n", 429)
            self._wrong_tokens += 1
            try:
                await asyncio.sleep(_WRONG_TOKEN_S)
            finally:
                self._wrong_tokens -= 1
            return self._html("login.html", 401, tab="", target=target, wrong=True)
        response = RedirectResponse(self._session.root + target, 303)
        self._session.open(response)
        return response

    def end_streams(self, *, for_good: bool = False) -> None:
        """End all live updates now.

        Args:
            for_good: Whether no further ones may start.
        """
        self._streams.end(for_good=for_good)

    def login_redirect(self, request: Request) -> Response | None:
        """Return a redirect to the login for a browser that requests a page; None for any other client."""
        if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
            return None
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{self._session.root}/login?{urlencode({'next': target})}", 303)

    def _render(self, template: str, **values: Any) -> str:
        shared = {"now": time.time_ns(), "root": self._session.root, "fleet": self._view.fleet}
        return self._templates.get_template(template).render(**shared, **values)

    def _banner(self) -> str:
        return self._render("_banner.html", troubles=self._view.troubles, recovered=self._view.store.recovered)

    def _html(self, template: str, status: int = 200, **values: Any) -> Response:
        text = self._render(
            template,
            troubles=self._view.troubles,
            recovered=self._view.store.recovered,
            token=self._session.needs_token,
            **values,
        )
        # Tags, commands and errors may contain lone surrogates, which strict encoding rejects.
        return HTMLResponse(text.encode(errors="replace"), status, headers=_HEADERS)

    def _error(self, status: int, title: str, text: str, back: str = "/") -> Response:
        return self._html("error.html", status, tab="", title=title, text=self._view.redact(text), back=back)


class _Files(StaticFiles):
    def file_response(self, *args: Any, **keys: Any) -> Response:
        # Without this a browser may use the script of the previous version for days.
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
        "ago": formatting.ago,
        "bars": formatting.bars,
        "count": formatting.count,
        "duration": formatting.duration,
        "exact": formatting.exact,
        "marked": formatting.marked,
        "plural": plural,
        "quoted": partial(quote, safe="", errors="replace"),
        "time": formatting.time_tag,
        "visible": formatting.visible,
        "visible_block": formatting.visible_block,
    }
    environment.globals["job_path"] = job_path
    return environment


def _task_of(query: QueryParams) -> str:
    return query.get("task", "")[:_MAX_TASK_CHARS]


def _earlier_path(path: Callable[..., str], window: LogWindow, first: int | None, task: str) -> str:
    """Return the path of the lines before a window; empty if their numbers are not known."""
    if not task:
        return path(**{"from": max(1, first - WINDOW_LINES)}) if first else ""
    # The lines of a task are among others, so that only their last number is known.
    number = window.lines[0].number if window.lines else first
    return path(until=number - 1) if number and number > 1 else ""


def _file_name(job_name: str) -> str:
    """Return a name for a file of a job's log, which is safe in a header and in every file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", job_name).strip("-.")[:80] or "job"


def _number(text: str) -> int | None:
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 16 else None


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form; empty if the form is too large or has too many fields."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM_BYTES:
            return {}
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=_MAX_FORM_FIELDS))
    except ValueError:
        return {}
