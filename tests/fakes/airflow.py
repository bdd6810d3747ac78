"""An Airflow API as far as `AirflowService` uses it, with what was measured of the real one (3.3.2).

The log of a try is sorted by time, and a token is the number of entries before it: an entry that is written late stays
behind the token, and entries before the token come again. The first reply begins with a header. While a task does not
run, its log has no token. A limit above 100 is cut without an error.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

from tests.fakes.json_api import FakeJsonApi

__all__ = ["FakeAirflow", "FakeTask"]

START = datetime(2024, 11, 29, 10, tzinfo=UTC)
_MOST = 100
_ENDED = ("success", "failed", "skipped", "upstream_failed", "removed")


class FakeTask:
    """A task instance of a DAG run.

    Attributes:
        row: The instance as the API returns it.
        history: The tries that have ended before the current one.
        logs: The entries of each try, with the monotonic time from which they are visible.
    """

    def __init__(self, dag: str, run: str, task: str, map_index: int) -> None:
        self.row: dict[str, Any] = {
            "id": f"{task}-{map_index}-0",
            "task_id": task,
            "dag_id": dag,
            "dag_run_id": run,
            "map_index": map_index,
            "try_number": 0,
            "state": None,
            "start_date": None,
            "end_date": None,
            "queued_when": None,
            "scheduled_when": None,
            "hostname": "",
        }
        self.history: list[dict[str, Any]] = []
        self.logs: dict[int, list[tuple[float, dict[str, Any]]]] = {}

    def start(self, at: float | datetime) -> None:
        """Begin the next try."""
        self._next_try()
        when = iso(at)
        self.row |= {"state": "running", "start_date": when, "end_date": None, "queued_when": when, "hostname": "vm"}

    def end(self, at: float | datetime, state: str = "success") -> None:
        """End the try; ``up_for_retry`` moves it to the history at once, as Airflow does."""
        self.row |= {"state": state, "end_date": iso(at)}
        if state == "up_for_retry":
            self.history.append(self.row | {"state": "failed"})
            self.row |= {"id": self.row["id"] + "+", "start_date": None}

    def clear(self) -> None:
        """Let the task run again."""
        self.history.append(dict(self.row))
        self.row |= {"id": self.row["id"] + "+", "state": None, "start_date": None, "end_date": None}

    def skip(self, at: float | datetime, state: str = "skipped") -> None:
        """End without a try."""
        self.row |= {"state": state, "start_date": iso(at), "end_date": iso(at)}

    def log(self, text: str, at: float | datetime | None, *, visible_after_s: float = 0.0, **fields: Any) -> None:
        """Write an entry; fields replace those of the entry."""
        entry = {
            "timestamp": None if at is None else iso(at),
            "event": text,
            "level": "info",
            "logger": "etl",
            **fields,
        }
        entries = self.logs.setdefault(self.row["try_number"], [])
        entries.append((time.monotonic() + visible_after_s, entry))

    def _next_try(self) -> None:
        self.row["try_number"] += 1


class FakeAirflow(FakeJsonApi):
    """The server. A context manager.

    Attributes:
        password: Of the user ``admin``.
        secret: Signs the tokens of logs.
        events: The event log, oldest first.
        may_read_events: Whether the user may read it.
        most: The server's ``maximum_page_limit``.
        dags: The tasks that follow each task, by DAG.
    """

    def __init__(self) -> None:
        super().__init__()
        self.password = ""
        self.secret = b"secret"
        self.events: list[dict[str, Any]] = []
        self.may_read_events = True
        self.most = _MOST
        self.dags: dict[str, dict[str, list[str]]] = {}
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.tasks: dict[tuple[str, str], list[FakeTask]] = {}
        self._logins = 0

    def add_run(self, dag: str = "nightly", run: str = "manual__1+00:00", *, start: float | datetime = 0.0) -> str:
        """Add a running DAG run and return the job's id."""
        self.dags.setdefault(dag, {})
        self.runs[dag, run] = {
            "dag_id": dag,
            "dag_run_id": run,
            "state": "running",
            "queued_at": iso(start),
            "run_after": iso(start),
            "start_date": iso(start),
            "end_date": None,
            "run_type": "manual",
            "note": None,
        }
        self.tasks[dag, run] = []
        return f"{dag}/{run}"

    def add_task(self, job_id: str, task: str, map_index: int = -1) -> FakeTask:
        """Add a task instance that waits."""
        dag, _, run = job_id.partition("/")
        added = FakeTask(dag, run, task, map_index)
        self.tasks[dag, run].append(added)
        return added

    def set_state(self, job_id: str, state: str, at: float | datetime) -> None:
        """Change the state of a run."""
        dag, _, run = job_id.partition("/")
        self.runs[dag, run] |= {"state": state, "end_date": iso(at) if state in _ENDED else None}

    def expire_logins(self) -> None:
        """Let the token that the last login returned expire."""
        self._logins += 1
        self.token = f"jwt-{self._logins}"

    def refuse(self, path: str, authorization: str) -> tuple[int, object] | None:
        """Return 401 without a token, and 403 for one that is not valid, as after a change of the server's secret."""
        if path == "/auth/token" or not (self.token or self.password) or authorization == f"Bearer {self.token}":
            return None
        return (403, {"detail": "Invalid JWT token"}) if authorization else (401, {"detail": "Not authenticated"})

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the reply to a request; see the module."""
        match [unquote(one) for one in path.strip("/").split("/")]:
            case ["auth", "token"]:
                if body != {"username": "admin", "password": self.password}:
                    return 401, {"detail": "Invalid credentials"}
                self.expire_logins()
                return 201, {"access_token": self.token}
            case ["api", "v2", "eventLogs"]:
                return self._event_logs(query)
            case ["api", "v2", "dags", "~", "dagRuns"]:
                runs = list(reversed(self.runs.values()))
                return 200, {"dag_runs": self._page(runs, query), "total_entries": len(runs)}
            case ["api", "v2", "dags", dag, *rest] if dag in self.dags:
                return self._of_dag(method, dag, rest, body, query)
        return 404, {"detail": "Not Found"}

    def _of_dag(
        self, method: str, dag: str, rest: list[str], body: dict[str, Any], query: dict[str, str]
    ) -> tuple[int, object]:
        match rest:
            case ["tasks"]:
                tasks = [{"task_id": task, "downstream_task_ids": after} for task, after in self.dags[dag].items()]
                return 200, {"tasks": tasks, "total_entries": len(tasks)}
            case ["dagRuns"] if method == "POST":
                job_id = self.add_run(dag, body.get("dag_run_id") or f"manual__{len(self.runs)}")
                run = self.runs[dag, job_id.partition("/")[2]]
                run |= {"state": "queued", "start_date": None, "conf": body["conf"], "note": body.get("note")}
                return 200, run
            case ["dagRuns", run, *of_run] if (dag, run) in self.runs:
                return self._of_run(method, (dag, run), of_run, body, query)
        return 404, {"detail": f"The DagRun of `{dag}` was not found"}

    def _of_run(
        self, method: str, run: tuple[str, str], rest: list[str], body: dict[str, Any], query: dict[str, str]
    ) -> tuple[int, object]:
        tasks = self.tasks[run]
        match rest:
            case [] if method == "PATCH":
                self._cancel(run, body)
                return 200, self.runs[run]
            case []:
                return 200, self.runs[run]
            case ["taskInstances"]:
                rows = [task.row for task in tasks]
                return 200, {"task_instances": self._page(rows, query), "total_entries": len(rows)}
            case ["taskInstances", task_id, *index, "tries"]:
                found = _find(tasks, task_id, int(index[0]) if index else -1)
                if found is not None:
                    current = [] if found.row["state"] == "up_for_retry" else [found.row]
                    return 200, {"task_instances": [*found.history, *current]}
            case ["taskInstances", task_id, "logs", number]:
                found = _find(tasks, task_id, int(query.get("map_index", -1)))
                if found is not None:
                    return self._log(found, int(number), query.get("token"))
        return 404, {"detail": "TaskInstance not found"}

    def _cancel(self, run: tuple[str, str], body: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        extra = json.dumps({**body, "method": "PATCH"})
        self.add_event("/".join(run), now, extra=extra)
        self.runs[run] |= {"state": body["state"], "end_date": iso(now)}
        for task in self.tasks[run]:
            if task.row["state"] == "running":
                task.end(now, "failed")
            elif task.row["state"] not in _ENDED:
                task.skip(now)

    def add_event(self, job_id: str, at: float | datetime, *, extra: str, event: str = "patch_dag_run") -> None:
        """Add an event of a run to the event log."""
        dag, _, run = job_id.partition("/")
        when = {"event_log_id": len(self.events), "when": iso(at)}
        self.events.append({**when, "dag_id": dag, "run_id": run, "event": event, "extra": extra})

    def _event_logs(self, query: dict[str, str]) -> tuple[int, object]:
        if not self.may_read_events:
            return 403, {"detail": "Forbidden"}
        after = datetime.fromisoformat(query["after"])
        found = [
            event
            for event in reversed(self.events)
            if datetime.fromisoformat(event["when"]) > after
            and all(query.get(key, event[key]) == event[key] for key in ("dag_id", "run_id", "event"))
        ]
        return 200, {"event_logs": self._page(found, query), "total_entries": len(found)}

    def _page(self, rows: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
        first = int(query.get("offset", 0))
        return rows[first : first + min(int(query.get("limit", 50)), self.most)]

    def _log(self, task: FakeTask, number: int, token: str | None) -> tuple[int, object]:
        tries = [*task.history, task.row]
        if number not in [one["try_number"] for one in tries]:
            return 404, {"detail": "TaskInstance not found"}
        if number == 0:
            text = "Task did not run because upstream task(s) failed."
            return 200, {"content": [*_header(), {"timestamp": iso(0.0), "event": text}], "continuation_token": None}
        place = self._unsign(token) if token else None
        if token and place is None:
            return 400, {"detail": "Bad Signature. Please use only the tokens provided by the API."}
        now_s = time.monotonic()
        entries = _sorted([entry for visible_s, entry in task.logs.get(number, []) if visible_s <= now_s])
        content = [*_header(), *entries] if place is None else entries[place:]
        runs = task.row["try_number"] == number and task.row["state"] in ("running", "deferred")
        self.on_log(task, number, len(entries))
        return 200, {"content": content, "continuation_token": self._sign(len(entries)) if runs else None}

    def on_log(self, task: FakeTask, number: int, entries: int) -> None:
        """Note that a log was read up to a number of entries."""

    def _sign(self, place: int) -> str:
        text = base64.urlsafe_b64encode(json.dumps({"end_of_log": False, "log_pos": place}).encode()).decode()
        return f"{text}.{hmac.digest(self.secret, text.encode(), hashlib.sha1).hex()}"

    def _unsign(self, token: str) -> int | None:
        text, _, signature = token.partition(".")
        if signature != hmac.digest(self.secret, text.encode(), hashlib.sha1).hex():
            return None
        return int(json.loads(base64.urlsafe_b64decode(text))["log_pos"])


def iso(at: float | datetime) -> str:
    """Return a time as Airflow writes it: a time, or seconds since the start."""
    when = at if isinstance(at, datetime) else START + timedelta(seconds=at)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _find(tasks: list[FakeTask], task_id: str, map_index: int) -> FakeTask | None:
    return next((one for one in tasks if (one.row["task_id"], one.row["map_index"]) == (task_id, map_index)), None)


def _header() -> list[dict[str, Any]]:
    texts = ("::group::Log message source details", "/srv/airflow/logs/attempt=1.log", "::endgroup::")
    return [{"timestamp": None, "event": text} for text in texts]


def _sorted(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries by ms, as the server sorts them; equal neighbours are one, and those without a time follow."""
    keyed: list[tuple[int, int, dict[str, Any]]] = []
    newest_ms = 0
    for place, entry in enumerate(entries):
        if entry["timestamp"] is not None:
            newest_ms = int(datetime.fromisoformat(entry["timestamp"]).timestamp() * 1000)
        keyed.append((newest_ms, place, entry))
    keyed.sort(key=lambda one: one[:2])
    found: list[dict[str, Any]] = []
    for _, _, entry in keyed:
        if not found or entry != found[-1] or entry["timestamp"] is None:
            found.append(entry)
    return found
