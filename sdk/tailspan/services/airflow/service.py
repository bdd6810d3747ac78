"""`AirflowService`: DAG runs of Airflow 3 as jobs, their task instances as tasks.

An attempt of a task is a try. Airflow has a log for each; it reads the whole log at each request, and a line that is
written late can stay behind the position of a reader (see `log`), so the agent reads all logs once more at the end.

Source: the REST API of Airflow 3.3.2, as measured; airflow.apache.org, "Stable REST API".
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec

from tailspan.errors import AuthError, ConfigError, JobNotFoundError, RequestRejectedError
from tailspan.logs.page import NANOS_PER_MS, LogPage, TaskRef
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
from tailspan.services._requests import Authorization, Authorizer, Params, ServiceRequests, Tls, path_segment
from tailspan.services.airflow.log import AttemptLog, unix_nano
from tailspan.services.airflow.reader import AttemptReader, merged

__all__ = ["AirflowService"]

_PAGE = 100  # `maximum_page_limit` of the server; a larger limit is cut without an error
_FRESH_S = 1.0
_UPSTREAM_FRESH_S = 300.0
_NO_EVENT_LOG_S = 600.0
_MAX_KNOWN = 10_000
# How long after the end of a try its last line is written, at most.
_LAST_LINES_NS = 60_000_000_000
_MAX_EVENT_PAGES = 10
_CANCEL_TAKES = timedelta(seconds=5)
_EPOCH, _FAR = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)

_STATES: Mapping[str, JobState] = {
    "queued": JobState.PENDING,
    "running": JobState.RUNNING,
    "success": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
}
_RESULTS: Mapping[str | None, str] = {
    "success": "success",
    "failed": "failure",
    "up_for_retry": "failure",
    "skipped": "skip",
    "upstream_failed": "skip",
    "removed": "skip",
}
_WAITING = (None, "scheduled", "queued")
# States of a first try that may not be the first one.
_MAY_HAVE_EARLIER = (None, "up_for_retry", "skipped", "upstream_failed", "removed")

T = TypeVar("T")


class _Run(msgspec.Struct):
    dag_id: str
    dag_run_id: str
    state: str
    queued_at: datetime | None = None
    run_after: datetime | None = None
    start_date: datetime | None = None
    end_date: datetime | None = None
    run_type: str | None = None
    note: str | None = None

    @property
    def job_id(self) -> str:
        return f"{self.dag_id}/{self.dag_run_id}"

    @property
    def submitted_at(self) -> datetime | None:
        return self.queued_at or self.run_after


class _Runs(msgspec.Struct):
    dag_runs: list[_Run]
    total_entries: int | None = None


class _TaskRow(msgspec.Struct):
    """A task instance, or one of its earlier tries."""

    task_id: str
    map_index: int | None = None
    try_number: int | None = None
    state: str | None = None
    id: str | None = None
    start_date: datetime | None = None
    end_date: datetime | None = None
    queued_when: datetime | None = None
    scheduled_when: datetime | None = None
    hostname: str | None = None

    @property
    def is_mapped(self) -> bool:
        return self.map_index is not None and self.map_index >= 0

    @property
    def key(self) -> str:
        return f"{self.task_id}[{self.map_index}]" if self.is_mapped else self.task_id

    @property
    def has_log(self) -> bool:
        """Whether the try began: for one that did not, Airflow answers with a text of its own, or 404."""
        return bool(self.try_number) and self.state not in _WAITING


class _TaskRows(msgspec.Struct):
    task_instances: list[_TaskRow]
    total_entries: int | None = None


class _DagTask(msgspec.Struct):
    task_id: str | None = None
    downstream_task_ids: list[str] | None = None


class _DagTasks(msgspec.Struct):
    tasks: list[_DagTask] = []


class _Event(msgspec.Struct):
    when: datetime
    dag_id: str | None = None
    run_id: str | None = None
    extra: str | None = None


class _Events(msgspec.Struct):
    event_logs: list[_Event] = []


class _Attempt(NamedTuple):
    """A try with its place in the API."""

    run: TaskRun
    row: _TaskRow


class _KnownTasks(NamedTuple):
    """The attempts of a job, as last requested; the time is that of the monotonic clock."""

    at_s: float
    attempts: tuple[_Attempt, ...]


class _Upstream(NamedTuple):
    at_s: float
    tasks: Mapping[str, tuple[str, ...]]


class _Anonymous(Authorizer):
    async def authorization(self) -> Authorization:
        return Authorization("", "nowhere")

    async def renew(self, refused: Authorization) -> Authorization | None:
        return None


class AirflowService(HttpService, TaskService, SubmitService):
    """The DAG runs of one Airflow; ``base_url`` is that of its API server. A job's id is ``DAG/RUN``."""

    final_read = True
    poll_min_s = 3.0  # for each read of a log, the server reads all of it
    renew_on = (401, 403)  # 403 "Invalid JWT token" after the server's secret has changed

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(name, options, environ=environ)
        self._tasks: dict[str, _KnownTasks] = {}
        # By job and task: the id of the task instance, which changes with each try, and the tries before it.
        self._tries: dict[tuple[str, str], tuple[object, list[_TaskRow]]] = {}
        self._upstream: dict[str, _Upstream] = {}
        self._canceled: dict[tuple[str, datetime | None], bool] = {}
        self._no_event_log_until_s = 0.0
        # By job and attempt: the position at the end of a log that was read to its end.
        self._whole: dict[str, dict[str, object]] = {}

    def make_credentials(self, environ: Mapping[str, str]) -> Authorizer:
        """Return the credentials: a login with user and password, else a bearer token."""
        if self.options.user is None:
            return Token(self.name, self.options, variable="AIRFLOW_CLI_TOKEN", environ=environ)
        return Login(self.name, self.options, self._log_in)

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of a DAG run."""
        run = await self._get(self._path(job_id), None, _Run, job_id)
        tasks = await self._list(job_id, fresh=True)
        canceled = await self._canceled_of([run])
        return self._status(run, [attempt.run for attempt in tasks.attempts], canceled=run.job_id in canceled)

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return every try of the task instances of a DAG run."""
        return [attempt.run for attempt in (await self._list(job_id)).attempts]

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of all tries that have begun, merged by time."""
        positions = unpack_cursor(cursor, service=self.name, job_id=job_id)
        known = {} if cursor is None else self._whole.get(job_id, {})
        # The last lines of a try are written after its end.
        final_before = datetime.now(UTC) - timedelta(seconds=late_window_s)
        first_ns = (since_ms or 0) * NANOS_PER_MS
        readers: dict[str, AttemptReader] = {}
        for attempt in (await self._list(job_id, fresh=cursor is None)).attempts:
            key = f"{attempt.run.task_id}\0{attempt.run.attempt}"
            end_ns = unix_nano(attempt.run.finished_at)
            is_earlier = end_ns is not None and end_ns + _LAST_LINES_NS < first_ns
            if attempt.row.has_log and not is_earlier and (key not in positions or positions[key] is not None):
                reader = self._reader(job_id, attempt, positions.get(key), final_before)
                # A log that was read to its end is not requested at each poll, also if no page has come since.
                if known.get(key) == reader.log.pack():
                    positions[key] = None
                else:
                    readers[key] = reader

        def packed() -> bytes:
            current = {key: None if one.is_read else one.log.pack() for key, one in readers.items()}
            return pack_cursor(positions | current)

        async with aclosing(merged(list(readers.values()), first_ns)) as pages:
            async for lines in pages:
                yield LogPage.from_lines(lines, cursor=packed(), identity=self.identity, job_id=job_id)
        whole = {key: one.log.pack() for key, one in readers.items() if one.is_read}
        self._whole[job_id] = self._whole.pop(job_id, {}) | whole
        drop_oldest(self._whole, _MAX_KNOWN)

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the DAG runs of all DAGs, newest first."""
        seen: set[str] = set()
        created_at: datetime | None = None
        offset = 0
        while True:
            # In the order of their creation: `run_after` may lie in the past, and `queued_at` changes.
            params: Params = {"order_by": "-id", "limit": _PAGE, "offset": offset}
            page = await self._get("/api/v2/dags/~/dagRuns", params, _Runs)
            canceled = await self._canceled_of(page.dag_runs)
            rows: list[ListedJob] = []
            for run in page.dag_runs:
                # A new run moves all others back by one.
                if run.job_id in seen:
                    continue
                seen.add(run.job_id)
                # A run that was cleared is queued again; it was created before the one after it.
                known = [one for one in (created_at, run.submitted_at) if one is not None]
                created_at = min(known, default=None)
                rows.append(self._listed(run, created_at, canceled=run.job_id in canceled))
            if rows:
                yield rows
            offset += len(page.dag_runs)
            if not page.dag_runs or offset >= (page.total_entries or 0):
                return

    async def cancel(self, job_id: str) -> JobStatus:
        """Set a DAG run to failed, which ends its tasks; an ended one stays as it is."""
        status = await self.get_job(job_id)
        if not status.state.is_terminal:
            await self.http.send_json("PATCH", self._path(job_id), {"state": "failed"}, job_id=job_id)
            status = await self.get_job(job_id)
        return status

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
        """Trigger a DAG.

        Args:
            command: The DAG's id, then ``KEY=VALUE`` for the run's configuration; a value may be JSON.
            name: The id of the run; Airflow allows letters, digits and ``_.~:+-``.
            attributes: Become the note of the run.
            timeout_s: Not possible: a DAG has its own.
            cwd: Not possible.
            env: Not possible.

        Raises:
            ConfigError: The command does not have this form, or an argument is not possible.
            JobNotFoundError: There is no such DAG.
        """
        dag, *pairs = command
        if timeout_s is not None or cwd is not None or env:
            raise ConfigError("Airflow takes neither timeout nor cwd nor environment variables: set them in the DAG")
        if not all("=" in pair for pair in pairs):
            raise ConfigError("the command of an Airflow job is the DAG's id, then KEY=VALUE for each parameter")
        note = ", ".join(f"{key}={value}" for key, value in (attributes or {}).items())
        body: dict[str, Any] = {"logical_date": None, "conf": read_parameters(pairs)}
        body |= {"dag_run_id": name} if name else {}
        body |= {"note": note} if note else {}
        path = f"/api/v2/dags/{path_segment(dag)}/dagRuns"
        reply = await self.http.send_json("POST", path, body, job_id=dag)
        try:
            run = msgspec.convert(reply, _Run)
        except msgspec.ValidationError as error:
            raise self.http.protocol_error(f"POST {path}: the reply is not a DAG run: {error}", dag) from None
        return self._status(run, (), canceled=False)

    async def _log_in(self, user: str, password: str) -> str:
        options = self.options
        requests = ServiceRequests(
            self.name,
            self.identity,
            _Anonymous(),
            timeout_s=options.timeout,
            tls=Tls(options.ca_file, options.client_cert, options.client_key),
        )
        try:
            reply = await requests.send_json("POST", "/auth/token", {"username": user, "password": password})
        except AuthError as error:
            text = f"services.{self.name}.user: Airflow refuses user {user!r} with this password ({error})"
            raise AuthError(text, service=self.name) from None
        finally:
            await requests.aclose()
        token = reply.get("access_token") if isinstance(reply, dict) else None
        if not isinstance(token, str):
            raise self.http.protocol_error("POST /auth/token: the reply has no access_token", None)
        return token

    async def _get(self, path: str, params: Params | None, kind: type[T], job_id: str | None = None) -> T:
        body = await self.http.get(path, params, job_id=job_id)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.http.protocol_error(f"GET {path}: the reply is not that of Airflow: {error}", job_id) from None

    def _path(self, job_id: str) -> str:
        dag, slash, run = job_id.partition("/")
        if not slash or not run or dag in ("", "~") or run == "~":  # "~" means all of them
            text = f"{job_id!r} is not a job of Airflow: its id is DAG/RUN"
            raise JobNotFoundError(text, service=self.name, job_id=job_id)
        return f"/api/v2/dags/{path_segment(dag)}/dagRuns/{path_segment(run)}"

    def _url(self, job_id: str) -> str:
        dag, _, run = job_id.partition("/")
        return f"{self.identity}/dags/{path_segment(dag)}/runs/{path_segment(run)}"

    def _status(self, run: _Run, tasks: Sequence[TaskRun], *, canceled: bool) -> JobStatus:
        state = JobState.CANCELED if canceled else _STATES.get(run.state, JobState.UNKNOWN)
        newest = {task.task_id: task for task in tasks}
        details = {"airflow.run_type": run.run_type, "airflow.note": run.note}
        return self.make_status(
            run.job_id,
            state,
            job_name=run.dag_id,
            submitted_at=run.submitted_at,
            started_at=run.start_date,
            finished_at=run.end_date if state.is_terminal else None,
            job_status=run.state,
            error=_failure(newest.values()) if state is JobState.FAILED else None,
            details={key: value for key, value in details.items() if value},
            url=self._url(run.job_id),
            total_tasks=len(newest),
            finished_tasks=sum(task.ended for task in newest.values()),
        )

    def _listed(self, run: _Run, created_at: datetime | None, *, canceled: bool) -> ListedJob:
        return ListedJob(
            job_id=run.job_id,
            job_name=run.dag_id,
            state=JobState.CANCELED if canceled else _STATES.get(run.state, JobState.UNKNOWN),
            created_at=created_at,
            state_since=run.end_date or run.start_date,
            service=self.name,
        )

    async def _canceled_of(self, runs: Sequence[_Run]) -> set[str]:
        """Return the ids of runs that a user has set to failed: Airflow has no state of its own for that."""
        failed = [run for run in runs if run.state == "failed"]
        unknown = [run for run in failed if (run.job_id, run.end_date) not in self._canceled]
        if unknown and time.monotonic() >= self._no_event_log_until_s:
            events = await self._cancel_events(unknown)
            for run in unknown:
                ended_at = run.end_date or datetime.now(UTC)
                began_at = run.submitted_at or run.start_date or ended_at
                self._canceled[run.job_id, run.end_date] = any(
                    (event.dag_id, event.run_id) == (run.dag_id, run.dag_run_id)
                    and began_at <= event.when <= ended_at + _CANCEL_TAKES
                    for event in events
                )
            drop_oldest(self._canceled, _MAX_KNOWN)
        return {run.job_id for run in failed if self._canceled.get((run.job_id, run.end_date))}

    async def _cancel_events(self, runs: Sequence[_Run]) -> list[_Event]:
        """Return the events in which users have set runs to failed, since the first of these runs."""
        since = min((run.submitted_at or run.start_date or _EPOCH for run in runs), default=_EPOCH)
        params: dict[str, int | str] = {"event": "patch_dag_run", "order_by": "-event_log_id", "limit": _PAGE}
        params["after"] = (since - _CANCEL_TAKES).isoformat()
        if len(runs) == 1:
            params |= {"dag_id": runs[0].dag_id, "run_id": runs[0].dag_run_id}
        found: list[_Event] = []
        for page in range(_MAX_EVENT_PAGES):
            try:
                reply = await self._get("/api/v2/eventLogs", params | {"offset": page * _PAGE}, _Events)
            except (AuthError, RequestRejectedError):
                # The user may not read the event log; the next job must not cost a refused request, too.
                self._no_event_log_until_s = time.monotonic() + _NO_EVENT_LOG_S
                return []
            found += [event for event in reply.event_logs if _sets_failed(event)]
            if len(reply.event_logs) < _PAGE:
                break
        return found

    async def _list(self, job_id: str, *, fresh: bool = False) -> _KnownTasks:
        """Return the job's tries; not older than a second, or requested now."""
        known = self._tasks.get(job_id)
        if known is not None and not fresh and time.monotonic() - known.at_s < _FRESH_S:
            return known
        rows: dict[str, _TaskRow] = {}
        offset = 0
        while True:
            params: Params = {"limit": _PAGE, "offset": offset, "order_by": "id"}
            page = await self._get(f"{self._path(job_id)}/taskInstances", params, _TaskRows, job_id)
            rows |= {row.key: row for row in page.task_instances}
            offset += len(page.task_instances)
            if not page.task_instances or offset >= (page.total_entries or 0):
                break
        keys: dict[str, list[str]] = {}
        for row in rows.values():
            keys.setdefault(row.task_id, []).append(row.key)
        upstream = await self._upstream_of(job_id)
        after = {task: tuple(key for one in before for key in keys.get(one, ())) for task, before in upstream.items()}
        attempts: list[_Attempt] = []
        for row in rows.values():
            tries = await self._tries_of(job_id, row)
            attempts += [self._attempt(job_id, one, number, after) for number, one in tries.items()]
        attempts.sort(key=_began_at)
        self._tasks.pop(job_id, None)
        self._tasks[job_id] = listed = _KnownTasks(time.monotonic(), tuple(attempts))
        drop_oldest(self._tasks, _MAX_KNOWN)
        return listed

    async def _tries_of(self, job_id: str, row: _TaskRow) -> Mapping[int, _TaskRow]:
        """Return the tries of a task instance by number; the instance itself is the last one only."""
        number = row.try_number or 0
        if number == 0 or (number == 1 and row.state not in _MAY_HAVE_EARLIER):
            return {1: row}
        key, version = (job_id, row.key), (row.id, number, row.state)
        if self._tries.get(key, (None,))[0] != version:
            index = f"/{row.map_index}" if row.is_mapped else ""
            path = f"{self._path(job_id)}/taskInstances/{path_segment(row.task_id)}{index}/tries"
            try:
                found = (await self._get(path, None, _TaskRows, job_id)).task_instances
            except JobNotFoundError:
                found = []  # the task was removed since the list
            same = [one for one in found if one.try_number == number]
            # The last one is the instance itself, except while it waits for its next try.
            ended = same if row.state == "up_for_retry" else same[:-1]
            self._tries.pop(key, None)
            self._tries[key] = version, [one for one in found if 0 < (one.try_number or 0) < number] + ended
            drop_oldest(self._tries, _MAX_KNOWN)
        tries = {one.try_number or 0: one for one in self._tries[key][1]}
        if row.state == "up_for_retry":
            row = msgspec.structs.replace(row, state=None, end_date=None)
            number += 1
        elif number in tries:
            # It was cleared, or skipped before its next try.
            row = msgspec.structs.replace(row, try_number=0)
            number += 1
        return {**tries, number: row}

    async def _upstream_of(self, job_id: str) -> Mapping[str, tuple[str, ...]]:
        """Return the tasks that each task of the DAG waits for."""
        dag = job_id.partition("/")[0]
        known = self._upstream.get(dag)
        if known is None or time.monotonic() - known.at_s > _UPSTREAM_FRESH_S:
            upstream: dict[str, tuple[str, ...]] = {}
            try:
                reply = await self._get(f"/api/v2/dags/{path_segment(dag)}/tasks", None, _DagTasks, job_id)
            except (AuthError, JobNotFoundError, RequestRejectedError):
                reply = _DagTasks()  # the DAG was removed, or the user may not see it: its runs are shown without links
            for task in reply.tasks:
                for after in task.downstream_task_ids or ():
                    upstream[after] = (*upstream.get(after, ()), task.task_id or "")
            self._upstream[dag] = known = _Upstream(time.monotonic(), upstream)
            drop_oldest(self._upstream, _MAX_KNOWN)
        return known.tasks

    def _attempt(self, job_id: str, row: _TaskRow, number: int, after: Mapping[str, tuple[str, ...]]) -> _Attempt:
        result = _RESULTS.get(row.state)
        index = f"/mapped/{row.map_index}" if row.is_mapped else ""
        run = TaskRun(
            task_id=row.key,
            name=row.task_id,
            attempt=number,
            result=result,
            submitted_at=row.queued_when or row.scheduled_when,
            started_at=row.start_date if row.has_log else None,
            finished_at=row.end_date if result else None,
            error="a task before it failed" if row.state == "upstream_failed" else None,
            instance_id=row.hostname or None,
            url=f"{self._url(job_id)}/tasks/{path_segment(row.task_id)}{index}?try_number={number}",
            after=after.get(row.task_id, ()),
        )
        return _Attempt(run, row)

    def _reader(self, job_id: str, attempt: _Attempt, packed: object, final_before: datetime) -> AttemptReader:
        """Return a reader of the log of a try, from a position of a cursor on.

        Raises:
            ConfigError: It is not a position.
        """
        row, run = attempt.row, attempt.run
        begins_ns = unix_nano(row.queued_when or row.start_date or row.end_date) or 0
        try:
            log = AttemptLog(TaskRef(run.task_id, run.name, run.attempt), begins_ns, packed)
        except (TypeError, ValueError):
            text = f"{packed!r:.40} is not part of a cursor of this service"
            raise ConfigError(text, service=self.name, job_id=job_id) from None
        path = f"{self._path(job_id)}/taskInstances/{path_segment(row.task_id)}/logs/{row.try_number}"
        params: dict[str, int | str] = {"full_content": "false"}
        if row.is_mapped:
            params["map_index"] = row.map_index or 0
        is_final = run.ended and (row.end_date or final_before) <= final_before
        return AttemptReader(self.http, path, params, log, job_id=job_id, is_final=is_final)


def _began_at(attempt: _Attempt) -> tuple[datetime, int]:
    """Return what attempts are ordered by: those that wait come last."""
    run = attempt.run
    return run.submitted_at or run.started_at or run.finished_at or _FAR, run.attempt


def _sets_failed(event: _Event) -> bool:
    try:
        extra = msgspec.json.decode(event.extra or "")
    except msgspec.DecodeError:
        return False
    return isinstance(extra, dict) and extra.get("state") == "failed"


def _failure(tasks: Iterable[TaskRun]) -> str | None:
    failed = [task.task_id for task in tasks if task.failed]
    if not failed:
        return None
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"failed: {', '.join(failed[:3])}{more}"
