"""A Prefect API as far as `PrefectService` uses it, with what was measured of the real one (3.9.1).

Logs are sorted by time only: lines of one time come in another order at each request. ``after_`` is inclusive, a limit
above 200 is status 422, and an unknown id is 404. A change of a state is an event on the WebSocket ``/events/out``; a
filter without ``until`` ends at the present, so that no event of the future matches.
"""

from __future__ import annotations

import random
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.fakes.json_api import FakeJsonApi, FakeSocket

__all__ = ["FakePrefect"]

START = datetime(2026, 11, 29, 10, tzinfo=UTC)
_MOST = 200


class FakePrefect(FakeJsonApi):
    """The server. A context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.url = f"{self.address}/api"
        self.flow_runs: dict[str, dict[str, Any]] = {}
        self.task_runs: dict[str, dict[str, Any]] = {}
        self.task_states: dict[str, list[dict[str, Any]]] = {}
        self.logs: list[dict[str, Any]] = []
        self.subscribers: list[FakeSocket] = []
        self._visible_s: dict[str, float] = {}
        self._random = random.Random(1)

    def add_flow_run(
        self, state: str = "RUNNING", *, parent: str | None = None, start_s: float = 0, flow: str = "nightly"
    ) -> str:
        """Add a run of a flow and return its id; with a parent, a sub flow of that task run."""
        run_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        self.flow_runs[run_id] = {
            "id": run_id,
            "flow_id": f"id of {flow}",
            "name": "nebulous-adder",
            "parent_task_run_id": parent,
            "expected_start_time": _iso(start_s),
            "created": _iso(start_s),
            "start_time": _iso(start_s + 0.1),
            "labels": {},
            "tags": ["a", "b"],
            "deployment_id": None,
        }
        self.set_state(run_id, state, start_s + 0.1)
        return run_id

    def set_state(self, run_id: str, state: str, at_s: float, name: str = "", message: str | None = None) -> None:
        """Change the state of a flow run."""
        run = self.flow_runs[run_id]
        ended = state in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        run |= {"state_type": state, "state_name": name or state.title(), "state_id": f"{run_id}-{state}"}
        run |= {"state": {"type": state, "name": run["state_name"], "timestamp": _iso(at_s), "message": message}}
        run |= {"end_time": _iso(at_s) if ended else None}
        related = [("task-run", f"prefect.task-run.{run['parent_task_run_id']}")] if run["parent_task_run_id"] else []
        self.notify(f"prefect.flow-run.{run['state_name']}", f"prefect.flow-run.{run_id}", *related)

    def add_task_run(self, run_id: str, name: str, *states: tuple[str, str, float], child: str | None = None) -> str:
        """Add a task run with its history of states: type, message and seconds since the start."""
        task_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        kind, message, at_s = states[-1]
        ended = kind in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        details = {"child_flow_run_id": child}
        self.task_runs[task_id] = {
            "id": task_id,
            "name": f"{name}-{task_id[:3]}",
            "flow_run_id": run_id,
            "task_key": f"{name}-adadc7dd",
            "dynamic_key": task_id,
            "state_id": f"{task_id}-{len(states)}",
            "task_inputs": {},
            "state_type": kind,
            "state_name": kind.title(),
            "run_count": sum(state[0] == "RUNNING" for state in states),
            "expected_start_time": _iso(states[0][2] - 0.1),
            "start_time": _iso(states[0][2]),
            "end_time": _iso(at_s) if ended else None,
            "state": {"type": kind, "timestamp": _iso(at_s), "message": message, "state_details": details},
        }
        self.task_states[task_id] = [
            {"type": kind, "name": kind.title(), "timestamp": _iso(at_s), "message": message or None}
            for kind, message, at_s in states
        ]
        self.notify(
            f"prefect.task-run.{kind.title()}",
            f"prefect.task-run.{task_id}",
            ("flow-run", f"prefect.flow-run.{run_id}"),
        )
        return task_id

    def notify(self, event: str, resource: str, *related: tuple[str, str]) -> None:
        """Send an event to all that have subscribed."""
        roles = [{"prefect.resource.role": role, "prefect.resource.id": one} for role, one in related]
        message = {"event": event, "resource": {"prefect.resource.id": resource}, "related": roles}
        for one in self.subscribers:
            one.send({"type": "event", "event": message})

    def serve_socket(self, path: str, socket: FakeSocket) -> None:
        """Serve events; see the module."""
        if path != "/api/events/out":
            socket.close(1008, "no such path")
            return
        if (socket.receive() or {}).get("token") != (self.token or None):
            socket.close(1008, "Invalid token")
            return
        socket.send({"type": "auth_success"})
        wanted = (socket.receive() or {}).get("filter", {})
        if wanted.get("occurred", {}).get("until", "") > datetime.now(UTC).isoformat():
            self.subscribers.append(socket)
        while socket.receive() is not None:
            pass
        with suppress(ValueError):
            self.subscribers.remove(socket)

    def log(
        self,
        run_id: str,
        text: str,
        at_s: float,
        *,
        level: int = 20,
        task: str | None = None,
        visible_after_s: float = 0.0,
    ) -> None:
        """Add a line, which becomes visible after some seconds."""
        entry = {"id": str(uuid.UUID(int=self._random.getrandbits(128))), "level": level, "message": text}
        self.logs.append(entry | {"timestamp": _iso(at_s), "flow_run_id": run_id, "task_run_id": task})
        self._visible_s[entry["id"]] = time.monotonic() + visible_after_s

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the reply to a request; see the module."""
        path = path.removeprefix("/api")
        if body.get("limit", 0) > _MOST:
            return 422, {"detail": "Invalid limit: must be less than or equal to 200."}
        first = body.get("offset", 0)
        page = slice(first, first + body.get("limit", _MOST))
        match path.strip("/").split("/"):
            case ["flow_runs", "filter"]:
                runs = [run for run in self.flow_runs.values() if run["parent_task_run_id"] is None]
                return 200, sorted(runs, key=lambda run: run["expected_start_time"], reverse=True)[page]
            case ["flow_runs", run_id] if method == "GET":
                found = self.flow_runs.get(run_id)
                return (200, found) if found else (404, {"detail": "Flow run not found"})
            case ["flows", "filter"]:
                return 200, [{"id": one, "name": one.removeprefix("id of ")} for one in body["flows"]["id"]["any_"]]
            case ["task_runs", "filter"]:
                wanted = body["flow_runs"]["id"]["any_"]
                return 200, [row for row in self.task_runs.values() if row["flow_run_id"] in wanted][page]
            case ["task_run_states"]:
                return 200, self.task_states[query["task_run_id"]]
            case ["logs", "filter"]:
                logs = body.get("logs") or {"flow_run_id": {"any_": list(self.flow_runs)}}
                after = datetime.fromisoformat(logs.get("timestamp", {}).get("after_", "1970-01-01T00:00:00Z"))
                now_s, newest_first = time.monotonic(), body["sort"] == "TIMESTAMP_DESC"
                found_logs = [
                    entry
                    for entry in self.logs
                    if entry["flow_run_id"] in logs["flow_run_id"]["any_"]
                    and datetime.fromisoformat(entry["timestamp"]) >= after
                    and self._visible_s[entry["id"]] <= now_s
                ]
                self._random.shuffle(found_logs)
                return 200, sorted(found_logs, key=lambda entry: entry["timestamp"], reverse=newest_first)[page]
            case ["flow_runs", run_id, "set_state"]:
                self.set_state(run_id, "CANCELLED", 99)
                return 201, {"status": "ACCEPT", "details": {}}
        return 404, {"detail": "Not Found"}


def _iso(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat(timespec="microseconds").replace("+00:00", "Z")
