"""The pages, and their live updates over server-sent events."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tailspan.errors import CursorExpiredError, JobNotFoundError, ServiceError, TailspanError
from tailspan.services import TaskService
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.agent_pages import AgentPages
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.event_stream import EventStreams
from tailspan_agent.web.job_events import job_events, job_paths, read_tail
from tailspan_agent.web.job_list_pages import JobListPages
from tailspan_agent.web.job_rows import job_path
from tailspan_agent.web.job_view import JobView, load_job_view
from tailspan_agent.web.log_window import WINDOW_LINES, LogLine, LogWindow, LogWindowReader
from tailspan_agent.web.rendering import PAGE_HEADERS, PageRenderer
from tailspan_agent.web.session import Session, local_path

__all__ = ["PageRoutes"]

_SERVICE_TIMEOUT_S = 10.0
_WRONG_TOKEN_S = 0.5
_MAX_FORM_BYTES = 4096
# As long as the id of a task may be (`bounded_tasks`).
_MAX_TASK_CHARS = 1024
_MAX_FORM_FIELDS = 20
_MAX_WRONG_TOKENS = 10
_MAX_DOWNLOADS = 4


class PageRoutes:
    """The routes of the page and their endpoints.

    Args:
        view: The data of the agent.
        session: Logs browsers in.
    """

    def __init__(self, view: AgentView, session: Session) -> None:
        self._view = view
        self._session = session
        self._logs = LogWindowReader(view.redact, view.redact_open)
        self._streams = EventStreams()
        self._pages = PageRenderer(view, session)
        self._job_list = JobListPages(view, self._pages, self._streams)
        self._agent = AgentPages(view, self._pages, self._streams)
        self._wrong_tokens = 0
        self._downloads = 0

    def routes(self, access: AccessControl) -> list[BaseRoute]:
        """Return the routes of the page, behind access control."""
        protect = access.require_token
        return [
            Route("/", protect(self._job_list.show)),
            Route("/events/jobs", protect(self._job_list.stream)),
            Route("/job", protect(self._job)),
            Route("/events/job", protect(self._job_events)),
            Route("/log", protect(self._download)),
            Route("/cancel", protect(self._cancel), methods=["POST"]),
            Route("/pipelines", protect(self._pipelines)),
            Route("/agent", protect(self._agent.show)),
            Route("/events/agent", protect(self._agent.stream)),
            Route("/login", access.require_known_host(self._login), methods=["GET", "POST"]),
            Mount("/static", _Files(directory=Path(__file__).with_name("static"))),
        ]

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
            return self._pages.error(404, "No such job", str(error))
        except TailspanError as error:
            return self._pages.error(502, "The service does not answer", str(error))
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
        return self._pages.page(
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
            has_trace=job.times is not None or bool(job.tasks) or (follows and isinstance(job.service, TaskService)),
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
            return self._pages.error(
                502, "The log cannot be read now", str(error) or "its service did not answer in time"
            )
        path = job_paths(job, task)
        if found.lines and (number := found.lines[0].number):
            return RedirectResponse(f"{self._session.root}{path(**{'from': max(1, number - 20)})}#L{number}", 303)
        if found.reached is not None:
            # Browsers limit the number of redirects, and a long log would need too many.
            onward = path(**{"from": found.reached + 1, "jump": "error"})
            response = self._pages.page("error_search.html", tab="", reached=found.reached, onward=onward, back=path())
            response.headers["refresh"] = f"0; url={self._session.root}{onward}"
            return response
        return self._pages.error(
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
            self._pages.render,
            banner=self._pages.banner,
            timeout_s=_SERVICE_TIMEOUT_S,
            task=task,
        )
        return self._streams.respond(events, PAGE_HEADERS)

    async def _download(self, request: Request) -> Response:
        try:
            job = await self._load_job(request)
        except TailspanError as error:
            return PlainTextResponse(f"{error}\n", 404)
        if self._downloads >= _MAX_DOWNLOADS:
            return PlainTextResponse("too many logs are being downloaded: try again later\n", 503)
        lines = self._logs.text(job.service, job.status.job_id, task=_task_of(request.query_params))
        headers = {**PAGE_HEADERS, "content-disposition": f'attachment; filename="{_file_name(job.name)}.log"'}
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
            return self._pages.error(
                403, "Cancelling is disabled", "agent.allow_cancel is not set in the agent's configuration."
            )
        if not self._session.sent_by_us(request.headers, form.get("form_token", "")):
            return self._pages.error(
                403, "This form was not sent by this page", "Reload the job's page and cancel again."
            )
        service = self._view.services.get(form.get("service", ""))
        if service is None:
            return self._pages.error(404, "No such service", "The agent does not watch this job's service.")
        try:
            async with asyncio.timeout(_SERVICE_TIMEOUT_S):
                await service.cancel(form.get("id", ""))
        except JobNotFoundError as error:
            return self._pages.error(404, "No such job", str(error))
        except (TailspanError, TimeoutError) as error:
            return self._pages.error(
                502, "The job was not cancelled", str(error) or "its service did not answer in time"
            )
        return RedirectResponse(self._session.root + job_path(service.name, form.get("id", "")), 303)

    async def _pipelines(self, _: Request) -> Response:
        now_ns = time.time_ns()
        runs: dict[str, int] = {}
        for total in self._view.totals:
            runs[total.pipeline] = runs.get(total.pipeline, 0) + total.count
        active: dict[str, int] = {}
        elsewhere = await self._job_list.followed_elsewhere(self._view.service_names)
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
        return self._pages.page(
            "pipelines.html",
            tab="pipelines",
            pipelines=pipelines,
            missing=missing,
            now_ns=now_ns,
            other=OTHER_PIPELINES,
        )

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            target = local_path(request.query_params.get("next", "/"))
            return self._pages.page("login.html", tab="", target=target, wrong=False)
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
            return self._pages.page("login.html", 401, tab="", target=target, wrong=True)
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


class _Files(StaticFiles):
    def file_response(self, *args: Any, **keys: Any) -> Response:
        # Without this a browser may use the script of the previous version for days.
        response = super().file_response(*args, **keys)
        response.headers["cache-control"] = "no-cache"
        response.headers["x-content-type-options"] = "nosniff"
        return response


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
