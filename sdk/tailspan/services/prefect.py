"""`PrefectService`: flow runs of a Prefect 3 server or Prefect Cloud as jobs, their task runs as tasks.

A job is a flow run that no other flow run started; its sub flows are part of it, below the task run that calls them.
Lines are ordered by time, and lines of one time in any order, so a read goes back by the late window and drops the ids
that it had. A line's id makes its uid.

Source: the REST API of Prefect 3.9.1, as measured; docs.prefect.io, "REST API".
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import quote

from tailspan._times import time_of
from tailspan.errors import ConfigError, RequestRejectedError
from tailspan.logs.page import Line, LogPage, TaskRef
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, SubmitService, TaskService
from tailspan.services._http_options import LoginOptions
from tailspan.services._http_service import (
    HttpService,
    Login,
    Token,
    drop_oldest,
    pack_cursor,
    read_parameters,
    unpack_cursor,
)
from tailspan.services._requests import Authorizer, path_segment

__all__ = ["PrefectOptions", "PrefectService"]

_PAGE = 200  # a larger limit is status 422
_ID_BYTES = 8
_MAX_NAMES = 10_000
_MAX_FLOW_RUNS = 1_000
_FRESH_S = 1.0

_STATES: Mapping[str, JobState] = {
    "SCHEDULED": JobState.PENDING,
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "PAUSED": JobState.RUNNING,
    "CANCELLING": JobState.RUNNING,
    "COMPLETED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "CANCELLED": JobState.CANCELED,
    "CRASHED": JobState.LOST,
}
_RESULTS: Mapping[str, str] = {
    "COMPLETED": "success",
    "FAILED": "failure",
    "CANCELLED": "cancellation",
    "CRASHED": "error",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_AHEAD = timedelta(days=1)


class PrefectOptions(LoginOptions):
    """The table ``services.NAME`` of type ``prefect``.

    Attributes:
        ui_url: Where people see the runs; found from ``base_url`` if it is missing.
    """

    ui_url: str | None = None


class _Tasks(NamedTuple):
    """The tasks of a job, as last requested.

    Attributes:
        at_s: When, by the monotonic clock.
        runs: Every attempt of every task.
        flow_runs: The job and its sub flows: id of the flow run, and of the task run that called it.
    """

    at_s: float
    runs: tuple[TaskRun, ...]
    flow_runs: Mapping[str, str | None]


class PrefectService(HttpService, TaskService, SubmitService):
    """The flow runs of one Prefect API; see the module."""

    Options = PrefectOptions
    final_read = True  # lines become visible up to 2 s late, in the order of their arrival
    poll_min_s = 2.0

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, environ=environ)
        self._names: dict[str, str] = {}
        self._tasks: dict[str, _Tasks] = {}
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
        position = _Position.read(cursor, service=self.name, job_id=job_id)
        after = _EPOCH if since_ms is None else _EPOCH + timedelta(milliseconds=since_ms)
        if cursor is not None:
            after = position.newest - timedelta(seconds=late_window_s)
        if job_id not in self._tasks:
            await self._flow_run(job_id)
        tasks = await self._list(job_id)
        offset = 0
        while True:
            entries = await self._entries(job_id, list(tasks.flow_runs), after, offset)
            new = sorted((one for one in _whole_times(entries) if not position.has(one)), key=_order)
            if new:
                tasks = await self._tasks_of(job_id, new, tasks)
                for entry in new:
                    position.add(entry)
                position.forget(late_window_s)
                lines = [line for entry in new for line in _lines(entry, tasks)]
                yield LogPage.from_lines(lines, cursor=position.pack(), identity=self.identity, job_id=job_id)
            if len(entries) < _PAGE:
                return
            # By time; the offset is only for more entries of one time than a page has.
            last = max(after, _moment(entries[-1]))
            offset = offset + _PAGE if last == after else 0
            after = last

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the flow runs that were due to start, newest first, without sub flows."""
        offset = 0
        before = datetime.now(UTC) + timedelta(minutes=1)
        while True:
            wanted = {"parent_task_run_id": {"is_null_": True}, "expected_start_time": {"before_": before.isoformat()}}
            body = {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_DESC", "limit": _PAGE, "offset": offset}
            runs = await self.http.send_json("POST", "/flow_runs/filter", body, reads=True)
            names = await self._flow_names([run["flow_id"] for run in runs])
            if runs:
                yield [self._row(run, names) for run in runs if isinstance(run.get("id"), str)]
            if len(runs) < _PAGE:
                return
            offset += _PAGE

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
            body = {"flows": {"id": {"any_": unknown}}, "limit": _PAGE}
            for flow in await self.http.send_json("POST", "/flows/filter", body, reads=True):
                self._names[flow["id"]] = flow["name"]
        return self._names

    def _status(self, run: Mapping[str, Any], names: Mapping[str, str], tasks: Sequence[TaskRun]) -> JobStatus:
        state, details = run.get("state") or {}, {"prefect.flow_run.name": run.get("name")}
        details |= {"prefect.deployment.id": run.get("deployment_id"), "prefect.tags": ",".join(run.get("tags") or ())}
        ours = _state(run)
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
            total_tasks=len(tasks),
            finished_tasks=sum(task.ended for task in tasks),
        )

    def _row(self, run: Mapping[str, Any], names: Mapping[str, str]) -> ListedJob:
        return ListedJob(
            job_id=run["id"],
            job_name=names.get(run["flow_id"]) or run.get("name"),
            state=_state(run),
            created_at=time_of(run.get("expected_start_time") or run.get("created")),
            state_since=time_of((run.get("state") or {}).get("timestamp")),
            service=self.name,
        )

    async def _list(self, job_id: str, *, fresh: bool = False) -> _Tasks:
        """Return the job's tasks; not older than a second, or requested now."""
        known = self._tasks.get(job_id)
        if known is not None and not fresh and time.monotonic() - known.at_s < _FRESH_S:
            return known
        flow_runs: dict[str, str | None] = {job_id: None}
        rows: list[dict[str, Any]] = []
        asked: set[str] = set()
        while wanted := [one for one in flow_runs if one not in asked][:_PAGE]:
            asked.update(wanted)
            found = await self._task_runs(job_id, wanted)
            rows += found
            for row in found:
                child = ((row.get("state") or {}).get("state_details") or {}).get("child_flow_run_id")
                if child and len(flow_runs) < _MAX_FLOW_RUNS:
                    flow_runs.setdefault(child, row["id"])
        runs = [run for row in rows for run in await self._attempts_of(row, flow_runs)]
        runs.sort(key=lambda run: (run.submitted_at or _EPOCH, run.attempt))
        self._tasks[job_id] = listed = _Tasks(time.monotonic(), tuple(runs), flow_runs)
        drop_oldest(self._tasks, _MAX_FLOW_RUNS)
        return listed

    async def _task_runs(self, job_id: str, flow_runs: Sequence[str]) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        offset = 0
        while True:
            wanted = {"id": {"any_": list(flow_runs)}}
            body = {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_ASC", "limit": _PAGE, "offset": offset}
            found = await self.http.send_json("POST", "/task_runs/filter", body, job_id=job_id, reads=True)
            rows |= {row["id"]: row for row in found}
            if len(found) < _PAGE:
                return list(rows.values())
            offset += _PAGE

    async def _attempts_of(self, row: Mapping[str, Any], flow_runs: Mapping[str, str | None]) -> tuple[TaskRun, ...]:
        """Return the attempts of a task run; the times of several are in the history of its states."""
        parent = flow_runs.get(row["flow_run_id"])
        if (row.get("run_count") or 0) <= 1:
            return (_only_attempt(row, parent, self._url("task-run", row["id"])),)
        known = self._attempts.get(row["id"])
        if known is not None and known[0] == row["state_id"]:
            return known[1]
        path = "/task_run_states/"
        states = await self.http.get_json(path, {"task_run_id": row["id"]}, job_id=row["flow_run_id"])
        attempts = _attempts(row, states, parent, self._url("task-run", row["id"]))
        if len(self._attempts) > _MAX_NAMES:
            self._attempts.clear()
        self._attempts[row["id"]] = row["state_id"], attempts
        return attempts

    async def _entries(
        self, job_id: str, flow_runs: Sequence[str], after: datetime, offset: int
    ) -> list[dict[str, Any]]:
        wanted = {"flow_run_id": {"any_": list(flow_runs)}, "timestamp": {"after_": after.isoformat()}}
        body = {"logs": wanted, "sort": "TIMESTAMP_ASC", "limit": _PAGE, "offset": offset}
        entries: list[dict[str, Any]] = await self.http.send_json(
            "POST", "/logs/filter", body, job_id=job_id, reads=True
        )
        return entries

    async def _tasks_of(self, job_id: str, entries: Sequence[Mapping[str, Any]], known: _Tasks) -> _Tasks:
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


class _Position:
    """How far a log was read: the newest time, and the ids of the lines of the late window before it."""

    def __init__(self, newest: datetime, ids: dict[bytes, int]) -> None:
        self.newest = newest
        self._ids = ids

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> _Position:
        """Return the position of a cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        try:
            times, ids = parts.get("t", []), parts.get("i", b"")
            found = [ids[start : start + _ID_BYTES] for start in range(0, len(ids), _ID_BYTES)]
            newest = _EPOCH + timedelta(microseconds=parts.get("n", 0))
            return cls(newest, dict(zip(found, times, strict=True)))
        except (TypeError, ValueError, OverflowError):
            text = f"{(cursor or b'')[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Return whether the line was read."""
        return _short(entry["id"]) in self._ids

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note a line as read."""
        moment = _moment(entry)
        # After a time that cannot be (the year 9999), later reads would ask for no line that comes.
        if moment <= datetime.now(UTC) + _MAX_AHEAD:
            self.newest = max(self.newest, moment)
        self._ids[_short(entry["id"])] = _micros(moment)

    def forget(self, window_s: float) -> None:
        """Drop the ids that no later read will see."""
        first = _micros(self.newest) - int(window_s * 1e6) - 1
        self._ids = {one: at for one, at in self._ids.items() if at >= first}

    def pack(self) -> bytes:
        """Return the cursor."""
        return pack_cursor({"n": _micros(self.newest), "t": list(self._ids.values()), "i": b"".join(self._ids)})


def _short(entry_id: str) -> bytes:
    return hashlib.blake2b(entry_id.encode(), digest_size=_ID_BYTES).digest()


def _micros(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(entry: Mapping[str, Any]) -> datetime:
    """Return the time of a log entry; 1970 for what is not a time: one such entry must not hide the others."""
    return time_of(entry["timestamp"]) or _EPOCH


def _state(run: Mapping[str, Any]) -> JobState:
    if run.get("state_type") == "FAILED" and run.get("state_name") == "TimedOut":
        return JobState.TIMED_OUT
    return _STATES.get(run.get("state_type") or "", JobState.UNKNOWN)


def _result(state_type: str | None, state_name: str | None) -> str | None:
    if state_type == "FAILED" and state_name == "TimedOut":
        return "timeout"
    if state_type == "COMPLETED" and state_name in ("Skipped", "NotReady"):
        return "skip"
    return _RESULTS.get(state_type or "")


def _task_name(row: Mapping[str, Any]) -> str:
    # The run's own name ends with a random part, and may be anything.
    name: str = (row.get("task_key") or "").rpartition("-")[0].rpartition(".")[2] or row["name"]
    return name


def _after(row: Mapping[str, Any]) -> tuple[str, ...]:
    inputs = (one for group in (row.get("task_inputs") or {}).values() for one in group)
    return tuple(dict.fromkeys(one["id"] for one in inputs if one.get("input_type") == "task_run" and one.get("id")))


def _only_attempt(row: Mapping[str, Any], parent: str | None, url: str) -> TaskRun:
    result = _result(row.get("state_type"), row.get("state_name"))
    message = (row.get("state") or {}).get("message")
    return TaskRun(
        task_id=row["id"],
        name=_task_name(row),
        result=result,
        submitted_at=time_of(row.get("expected_start_time")),
        started_at=time_of(row.get("start_time")),
        finished_at=time_of(row.get("end_time") or (row.get("state") or {}).get("timestamp")) if result else None,
        error=(message or None) if result not in (None, "success", "skip") else None,
        url=url,
        parent=parent,
        after=_after(row),
    )


def _attempts(
    row: Mapping[str, Any], states: Sequence[Mapping[str, Any]], parent: str | None, url: str
) -> tuple[TaskRun, ...]:
    """Return an attempt for each state RUNNING, which the next state ends."""
    ordered = sorted(states, key=lambda state: state["timestamp"])
    last = _only_attempt(row, parent, url)
    found: list[TaskRun] = []
    submitted = last.submitted_at
    for state, following in zip(ordered, [*ordered[1:], None], strict=True):
        if state["type"] != "RUNNING":
            submitted = time_of(state["timestamp"]) if found else submitted
            continue
        result = None if following is None else _result(following["type"], following["name"]) or "failure"
        if following is not None and following["type"] in ("RUNNING", "PAUSED", "CANCELLING"):
            result = "failure" if following["type"] == "RUNNING" else None
        failed = result not in (None, "success", "skip")
        found.append(
            TaskRun(
                task_id=row["id"],
                name=last.name,
                attempt=len(found) + 1,
                result=result,
                submitted_at=submitted,
                started_at=time_of(state["timestamp"]),
                finished_at=time_of(following["timestamp"]) if result and following else None,
                error=(following or {}).get("message") or None if failed else None,
                url=url,
                parent=parent,
                after=last.after,
            )
        )
    return tuple(found) or (last,)


def _lines(entry: Mapping[str, Any], tasks: _Tasks) -> list[Line]:
    """Return the lines of a log entry, whose message may have several."""
    moment = _moment(entry)
    task = _task_at(entry.get("task_run_id") or tasks.flow_runs.get(entry["flow_run_id"]), moment, tasks)
    severity = _severity(entry.get("level") or 0)
    texts = str(entry.get("message") or "").split("\n")
    nano = _nano(entry)
    return [Line(nano, text, "", task, severity, f"{entry['id']}.{place}") for place, text in enumerate(texts)]


def _order(entry: Mapping[str, Any]) -> tuple[int, str]:
    return _nano(entry), entry["id"]


def _whole_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of a page without those of its last time: the next page may have more."""
    if len(entries) < _PAGE or entries[0]["timestamp"] == entries[-1]["timestamp"]:
        return entries
    last = entries[-1]["timestamp"]
    return [entry for entry in entries if entry["timestamp"] != last]


def _nano(entry: Mapping[str, Any]) -> int:
    """Return the time of an entry, in ns since the epoch; of those of one microsecond each has its own, from its id."""
    return _micros(_moment(entry)) * 1000 + int.from_bytes(_short(entry["id"])) % 900


def _task_at(task_id: str | None, moment: datetime, tasks: _Tasks) -> TaskRef | None:
    """Return the attempt that ran at a time; the first one for an earlier time."""
    attempts = [task for task in tasks.runs if task.task_id == task_id]
    if task_id is None or not attempts:
        return None if task_id is None else TaskRef(task_id, task_id)
    began = [task for task in attempts if task.started_at is not None and task.started_at <= moment]
    chosen = (began or attempts[:1])[-1]
    return TaskRef(chosen.task_id, chosen.name, chosen.attempt)


def _severity(level: int) -> int:
    """Return the OTLP severity number of a level of Python's logging."""
    return 0 if level <= 0 else (5, 9, 13, 17, 21)[min(max(level // 10, 1), 5) - 1]


def _command(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the deployment and the parameters of a command.

    Raises:
        ConfigError: It does not have the form of `PrefectService.submit`.
    """
    deployment, *pairs = command
    if deployment.count("/") != 1 or not all("=" in pair for pair in pairs):
        raise ConfigError("the command of a Prefect job is FLOW/DEPLOYMENT, then KEY=VALUE for each parameter")
    return deployment, read_parameters(pairs)
