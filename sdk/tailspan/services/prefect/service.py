"""`PrefectService`: flow runs of a Prefect 3 server or Prefect Cloud as jobs, their task runs as tasks.

A job is a flow run that no other flow run started; its sub flows are part of it, below the task run that calls them.
Lines are ordered by time, and lines of one time in any order, so a read goes back by the late window and drops the ids
that it had. A line's id makes its uid.

Source: the REST API of Prefect 3.9.1, as measured; docs.prefect.io, "REST API".
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from tailspan._times import time_of
from tailspan.errors import ConfigError, RequestRejectedError
from tailspan.logs.page import LogPage
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, ChangeFeedService, Problem, SubmitService, TaskService
from tailspan.services._http_options import LoginOptions
from tailspan.services._http_service import HttpService, Login, Token, drop_oldest, read_parameters
from tailspan.services._requests import Authorizer, path_segment
from tailspan.services.prefect.changes import PrefectChanges
from tailspan.services.prefect.rows import (
    EPOCH,
    PAGE,
    SeenEntries,
    Tasks,
    attempts_of,
    lines_of,
    moment_of,
    only_attempt,
    order_of,
    state_of,
    whole_times,
)

__all__ = ["PrefectOptions", "PrefectService"]

_MAX_NAMES = 10_000
_MAX_FLOW_RUNS = 1_000
_FRESH_S = 1.0


class PrefectOptions(LoginOptions):
    """The table ``services.NAME`` of type ``prefect``.

    Attributes:
        ui_url: Where people see the runs; found from ``base_url`` if it is missing.
    """

    ui_url: str | None = None


class PrefectService(HttpService, TaskService, SubmitService, ChangeFeedService):
    """The flow runs of one Prefect API; see the module."""

    Options = PrefectOptions
    final_read = True  # lines become visible up to 2 s late, in the order of their arrival
    poll_min_s = 2.0

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, environ=environ)
        self._names: dict[str, str] = {}
        self._tasks: dict[str, Tasks] = {}
        # By task run: the state that it was requested for, and its attempts.
        self._attempts: dict[str, tuple[str, tuple[TaskRun, ...]]] = {}

    def make_credentials(self, environ: Mapping[str, str]) -> Authorizer:
        """Return the credentials: user and password (``PREFECT_API_AUTH_STRING`` of the server), or an API key."""
        if self.options.user is not None:
            return Login(self.name, self.options)
        return Token(self.name, self.options, variable="PREFECT_API_KEY", environ=environ)

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of a flow run."""
        run = await self._flow_run(job_id)
        tasks = await self._list(job_id, fresh=True)
        newest = {task.task_id: task for task in tasks.runs}
        return self._status(run, await self._flow_names([run["flow_id"]]), list(newest.values()))

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return the task runs of a flow run and of its sub flows, each attempt."""
        return (await self._list(job_id)).runs

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of a flow run and of its sub flows."""
        position = SeenEntries.read(cursor, service=self.name, job_id=job_id)
        after = EPOCH if since_ms is None else EPOCH + timedelta(milliseconds=since_ms)
        if cursor is not None:
            after = position.newest - timedelta(seconds=late_window_s)
        if job_id not in self._tasks:
            await self._flow_run(job_id)
        tasks = await self._list(job_id)
        flow_runs = list(tasks.flow_runs)
        async with aclosing(self._new_entries(flow_runs, position, after, job_id=job_id)) as pages:
            async for new in pages:
                tasks = await self._tasks_of(job_id, new, tasks)
                flow_runs[:] = tasks.flow_runs  # a sub flow may have begun
                for entry in new:
                    position.add(entry)
                position.forget(late_window_s)
                lines = [line for entry in new for line in lines_of(entry, tasks)]
                yield LogPage.from_lines(lines, cursor=position.pack(), identity=self.identity, job_id=job_id)

    def open_changes(self) -> PrefectChanges:
        """Open the feed of the server's events, and of jobs with new lines."""
        return PrefectChanges(self.http, self._flow_runs_of, self._new_entries)

    async def find_problems(self) -> Sequence[Problem]:
        """Return why the server sends no events, if so."""
        return await self.open_changes().find_problems()

    def _flow_runs_of(self, job_id: str) -> Collection[str]:
        """Return the ids of a job and of its sub flows, as far as they are known."""
        known = self._tasks.get(job_id)
        return (job_id,) if known is None else known.flow_runs.keys()

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the flow runs that were due to start, newest first, without sub flows."""
        offset = 0
        before = datetime.now(UTC) + timedelta(minutes=1)
        while True:
            wanted = {"parent_task_run_id": {"is_null_": True}, "expected_start_time": {"before_": before.isoformat()}}
            body = {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_DESC", "limit": PAGE, "offset": offset}
            runs = await self.http.send_json("POST", "/flow_runs/filter", body, reads=True)
            names = await self._flow_names([run["flow_id"] for run in runs])
            if runs:
                yield [self._row(run, names) for run in runs if isinstance(run.get("id"), str)]
            if len(runs) < PAGE:
                return
            offset += PAGE

    async def cancel(self, job_id: str) -> JobStatus:
        """Ask Prefect to cancel a flow run; an ended one stays as it is.

        Raises:
            RequestRejectedError: Nothing can cancel it: it runs in a process of its own, without a worker.
        """
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        if "prefect.deployment.id" not in status.details:
            raise RequestRejectedError(
                f"flow run {job_id} was started without a deployment, so no worker can cancel it: end its process",
                service=self.name,
                job_id=job_id,
            )
        state = {"type": "CANCELLING", "name": "Cancelling", "message": "by tailspan"}
        body = {"state": state, "force": False}
        path = f"/flow_runs/{path_segment(job_id)}/set_state"
        reply = await self.http.send_json("POST", path, body, job_id=job_id)
        if reply.get("status") != "ACCEPT":
            why = reply.get("details", {}).get("reason") or reply.get("status")
            raise RequestRejectedError(f"Prefect did not cancel the flow run: {why}", service=self.name, job_id=job_id)
        return await self.get_job(job_id)

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Start a run of a deployment.

        Args:
            command: ``FLOW/DEPLOYMENT``, then parameters as ``KEY=VALUE``; a value may be JSON.
            name: The name of the run.
            attributes: Become tags ``KEY:VALUE``.
            timeout_s: Not possible: a flow has its own.
            cwd: Not possible: a deployment has its own.
            env: Become job variables of the run.

        Raises:
            ConfigError: The command does not have this form, or an argument is not possible.
            JobNotFoundError: There is no such deployment.
        """
        deployment, parameters = _command(command)
        if timeout_s is not None or cwd is not None:
            raise ConfigError("Prefect takes neither timeout nor cwd: set them in the flow or its deployment")
        found = await self.http.get_json(f"/deployments/name/{quote(deployment)}", job_id=deployment)
        body: dict[str, Any] = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        body |= {"name": name} if name else {}
        body |= {"tags": [f"{key}:{value}" for key, value in attributes.items()]} if attributes else {}
        body |= {"job_variables": {"env": dict(env)}} if env else {}
        run = await self.http.send_json("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return self._status(run, await self._flow_names([run["flow_id"]]), [])

    async def _flow_run(self, job_id: str) -> dict[str, Any]:
        run = await self.http.get_json(f"/flow_runs/{path_segment(job_id)}", job_id=job_id)
        if not isinstance(run, dict) or "state_type" not in run:
            raise self.http.protocol_error("the reply is not a flow run", job_id)
        return run

    async def _flow_names(self, flow_ids: Sequence[str]) -> Mapping[str, str]:
        """Return the names of flows; they never change, so each is requested once."""
        unknown = sorted({one for one in flow_ids if one not in self._names})
        if unknown:
            if len(self._names) > _MAX_NAMES:
                self._names.clear()
            body = {"flows": {"id": {"any_": unknown}}, "limit": PAGE}
            for flow in await self.http.send_json("POST", "/flows/filter", body, reads=True):
                self._names[flow["id"]] = flow["name"]
        return self._names

    def _status(self, run: Mapping[str, Any], names: Mapping[str, str], tasks: Sequence[TaskRun]) -> JobStatus:
        state, details = run.get("state") or {}, {"prefect.flow_run.name": run.get("name")}
        details |= {"prefect.deployment.id": run.get("deployment_id"), "prefect.tags": ",".join(run.get("tags") or ())}
        ours = state_of(run)
        message = state.get("message")
        return self.make_status(
            run["id"],
            ours,
            job_name=names.get(run["flow_id"]) or run["name"],
            submitted_at=time_of(run.get("expected_start_time") or run.get("created")),
            started_at=time_of(run.get("start_time")),
            finished_at=time_of(run.get("end_time") or state.get("timestamp")) if ours.is_terminal else None,
            job_status=state.get("name"),
            error=message if ours.is_terminal and ours is not JobState.SUCCEEDED else None,
            details={key: value for key, value in details.items() if value},
            parent=(run.get("labels") or {}).get("__OTEL_TRACEPARENT"),
            url=self._url("flow-run", run["id"]),
            # Before the end, Prefect does not know how many tasks will follow: all known ones may have ended.
            total_tasks=len(tasks) if ours.is_terminal else 0,
            finished_tasks=sum(task.ended for task in tasks) if ours.is_terminal else 0,
        )

    def _row(self, run: Mapping[str, Any], names: Mapping[str, str]) -> ListedJob:
        return ListedJob(
            job_id=run["id"],
            job_name=names.get(run["flow_id"]) or run.get("name"),
            state=state_of(run),
            created_at=time_of(run.get("expected_start_time") or run.get("created")),
            state_since=time_of((run.get("state") or {}).get("timestamp")),
            service=self.name,
        )

    async def _list(self, job_id: str, *, fresh: bool = False) -> Tasks:
        """Return the job's tasks; not older than a second, or requested now."""
        known = self._tasks.get(job_id)
        if known is not None and not fresh and time.monotonic() - known.at_s < _FRESH_S:
            return known
        flow_runs: dict[str, str | None] = {job_id: None}
        rows: list[dict[str, Any]] = []
        asked: set[str] = set()
        while wanted := [one for one in flow_runs if one not in asked][:PAGE]:
            asked.update(wanted)
            found = await self._task_runs(job_id, wanted)
            rows += found
            for row in found:
                child = ((row.get("state") or {}).get("state_details") or {}).get("child_flow_run_id")
                if child and len(flow_runs) < _MAX_FLOW_RUNS:
                    flow_runs.setdefault(child, row["id"])
        runs = [run for row in rows for run in await self._attempts_of(row, flow_runs)]
        runs.sort(key=lambda run: (run.submitted_at or EPOCH, run.attempt))
        self._tasks[job_id] = listed = Tasks(time.monotonic(), tuple(runs), flow_runs)
        drop_oldest(self._tasks, _MAX_FLOW_RUNS)
        return listed

    async def _task_runs(self, job_id: str, flow_runs: Sequence[str]) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        offset = 0
        while True:
            wanted = {"id": {"any_": list(flow_runs)}}
            body = {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_ASC", "limit": PAGE, "offset": offset}
            found = await self.http.send_json("POST", "/task_runs/filter", body, job_id=job_id, reads=True)
            rows |= {row["id"]: row for row in found}
            if len(found) < PAGE:
                return list(rows.values())
            offset += PAGE

    async def _attempts_of(self, row: Mapping[str, Any], flow_runs: Mapping[str, str | None]) -> tuple[TaskRun, ...]:
        """Return the attempts of a task run; the times of several are in the history of its states."""
        parent = flow_runs.get(row["flow_run_id"])
        if (row.get("run_count") or 0) <= 1:
            return (only_attempt(row, parent, self._url("task-run", row["id"])),)
        known = self._attempts.get(row["id"])
        if known is not None and known[0] == row["state_id"]:
            return known[1]
        path = "/task_run_states/"
        states = await self.http.get_json(path, {"task_run_id": row["id"]}, job_id=row["flow_run_id"])
        attempts = attempts_of(row, states, parent, self._url("task-run", row["id"]))
        if len(self._attempts) > _MAX_NAMES:
            self._attempts.clear()
        self._attempts[row["id"]] = row["state_id"], attempts
        return attempts

    async def _new_entries(
        self, flow_runs: Sequence[str], position: SeenEntries, after: datetime, *, job_id: str | None = None
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Yield the log entries since a time that a position does not have yet, page by page; the caller adds them.

        Each page is of the flow runs that the sequence has then.
        """
        offset = 0
        while True:
            wanted = {"flow_run_id": {"any_": list(flow_runs)}, "timestamp": {"after_": after.isoformat()}}
            body = {"logs": wanted, "sort": "TIMESTAMP_ASC", "limit": PAGE, "offset": offset}
            entries = await self.http.send_json("POST", "/logs/filter", body, job_id=job_id, reads=True)
            if new := sorted((one for one in whole_times(entries) if not position.has(one)), key=order_of):
                yield new
            if len(entries) < PAGE:
                return
            # By time; the offset is only for more entries of one time than a page has.
            last = max(after, moment_of(entries[-1]))
            offset = offset + PAGE if last == after else 0
            after = last

    async def _tasks_of(self, job_id: str, entries: Sequence[Mapping[str, Any]], known: Tasks) -> Tasks:
        """Return tasks that include those of the lines: a task may have begun since they were listed."""
        ids = {task.task_id for task in known.runs}
        if all(entry.get("task_run_id") in (None, *ids) for entry in entries):
            return known
        return await self._list(job_id, fresh=True)

    def _url(self, kind: str, run_id: str) -> str:
        assert isinstance(self.options, PrefectOptions)
        base = self.options.ui_url
        if base is None:
            base = self.identity.removesuffix("/api")
            if "api.prefect.cloud/api/accounts/" in base:
                base = base.replace("api.prefect.cloud/api/accounts/", "app.prefect.cloud/account/")
                base = base.replace("/workspaces/", "/workspace/")
        return f"{base.rstrip('/')}/runs/{kind}/{run_id}"


def _command(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the deployment and the parameters of a command.

    Raises:
        ConfigError: It does not have the form of `PrefectService.submit`.
    """
    deployment, *pairs = command
    if deployment.count("/") != 1 or not all("=" in pair for pair in pairs):
        raise ConfigError("the command of a Prefect job is FLOW/DEPLOYMENT, then KEY=VALUE for each parameter")
    return deployment, read_parameters(pairs)
