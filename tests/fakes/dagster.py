"""A Dagster API as far as `DagsterService` uses it, with what was measured of the real one (1.13.28).

Errors have HTTP status 200 and a type of their own, except for documents and cursors that are not valid. Events come in
the order of their insertion, with a cursor for each page and no ids of their own. What processes print comes by byte
offset: ``limit`` is in bytes, and what is not UTF-8 there becomes U+FFFD, a character at the limit as well.
"""

from __future__ import annotations

import base64
import json
import random
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.json_api import FakeJsonApi

__all__ = ["START_S", "FakeDagster", "error"]

START_S = 1_795_000_000.0
_MISSING = {"__typename": "RunNotFoundError", "message": "Pipeline run could not be found."}
_ATTEMPT_ENDS = {
    "STEP_SUCCESS": "SUCCESS",
    "STEP_FAILURE": "FAILURE",
    "STEP_SKIPPED": "SKIPPED",
    "STEP_UP_FOR_RETRY": "IN_PROGRESS",
}


@dataclass
class _Run:
    fields: dict[str, Any]
    plan: list[dict[str, Any]]
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    printed: dict[str, list[bytes]] = field(default_factory=dict)


class FakeDagster(FakeJsonApi):
    """The server. A context manager.

    Attributes:
        url: The base URL of the API.
        jobs: The jobs that can be launched, as location, repository and name.
        launched: The parameters of each launch so far.
        documents: The name of each document so far.
        page: Events in a reply, at most.
        keeps_output: Whether output can be read: not with `NoOpComputeLogManager`.
        busy: Names of documents that get status 503, once each.
        unknown_fields: By the name of a document, a field that this version does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url = self.address
        self.jobs = [("defs.py", "__repository__", "nightly")]
        self.launched: list[dict[str, Any]] = []
        self.documents: list[str] = []
        self.page = 1000
        self.keeps_output = True
        self.busy: list[str] = []
        self.unknown_fields: dict[str, str] = {}
        self._runs: dict[str, _Run] = {}
        self._random = random.Random(1)
        self._last_id = 0

    def add_run(
        self, status: str = "STARTED", *, plan: dict[str, list[str]] | None = None, at_s: float = 0, **fields: object
    ) -> str:
        """Add a run of the job ``nightly``, with the steps of its plan, and return its id."""
        run_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        own = {"runId": run_id, "jobName": "nightly", "status": status, "creationTime": START_S + at_s}
        times = {"startTime": START_S + at_s + 1, "endTime": None, "updateTime": START_S + at_s + 1}
        steps = [
            {"key": step, "inputs": [{"dependsOn": [{"key": one}]} for one in before]}
            for step, before in (plan or {}).items()
        ]
        self._runs[run_id] = _Run({**own, **times, "parentRunId": None, "tags": [], **fields}, steps)
        return run_id

    def load(self, file: Path) -> str:
        """Add a run that was recorded at a real server, and return its id."""
        found = json.loads(file.read_text())
        run = found["run"]
        self._runs[run["runId"]] = loaded = _Run(run, run["executionPlan"]["steps"])
        for event in found["events"]:
            loaded.events.append((self._next_id(), event))
        for key, streams in found["printed"].items():
            loaded.printed[key] = [base64.b64decode(one) for one in streams]
        run_id: str = run["runId"]
        return run_id

    def event(
        self, run_id: str, kind: str | None, at_s: float, *, message: str = "", hidden: bool = False, **fields: object
    ) -> dict[str, Any]:
        """Add an event at a time in seconds since the start; a hidden one has an id, and is to be seen later."""
        with self.lock:
            event = {"timestamp": str(round((START_S + at_s) * 1000)), "level": "DEBUG", "stepKey": None}
            event |= {"eventType": kind, "message": message, **fields, "hidden": hidden}
            self._runs[run_id].events.append((self._next_id(), event))
            return event

    def log(self, run_id: str, text: str, at_s: float, *, step: str, level: str = "INFO") -> None:
        """Add a message of a step."""
        self.event(run_id, None, at_s, message=text, stepKey=step, level=level)

    def capture(self, run_id: str, key: str, at_s: float, *steps: str) -> None:
        """Begin to capture what the process of steps prints."""
        message = "Capturing logs for process (pid: 7)."
        self.event(run_id, "LOGS_CAPTURED", at_s, message=message, fileKey=key, stepKeys=list(steps))

    def write(self, run_id: str, key: str, stdout: bytes = b"", stderr: bytes = b"") -> None:
        """Add what a process prints."""
        with self.lock:
            printed = self._runs[run_id].printed.setdefault(key, [b"", b""])
            printed[0] += stdout
            printed[1] += stderr

    def end(self, run_id: str, status: str, at_s: float, message: str = "") -> None:
        """End a run, with its event."""
        self._runs[run_id].fields |= {"status": status, "endTime": START_S + at_s, "updateTime": START_S + at_s}
        self.event(run_id, f"RUN_{status}", at_s, message=message or f"Run ended: {status}", level="ERROR")

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the reply to a request; see the module."""
        if (method, path) != ("POST", "/graphql"):
            return 404, {"detail": "Not Found"}
        document = body["query"]
        name = document.split("(")[0].split("{")[0].split()[-1]
        if name in self.busy:
            self.busy.remove(name)
            return 503, {"detail": "busy"}
        self.documents.append(name)
        if name in self.unknown_fields:
            text = f"Cannot query field '{self.unknown_fields[name]}' on type 'Run'."
            return 400, {"data": None, "errors": [{"message": text}]}
        try:
            return 200, {"data": dict(self._fields(name, document, body["variables"]))}
        except ValueError as wrong:
            return 500, {"data": None, "errors": [{"message": str(wrong)}]}

    def _fields(self, name: str, document: str, variables: dict[str, Any]) -> Iterable[tuple[str, object]]:
        run = self._runs.get(variables.get("id", ""))
        page = {"after": variables.get("after"), "limit": variables.get("limit")}
        match name:
            case "Runs":
                yield "runsOrError", {"__typename": "Runs", "results": self._listed(**variables)}
            case "Run":
                yield "runOrError", self._run(run, plan=variables["plan"]) if run else _MISSING
            case "Notes":
                yield "logsForRun", self._page(run, **page) if run else _MISSING
            case "Log":
                for place in re.findall(r"piece(\d+): ", document):
                    key, start = variables[f"key{place}"], variables[f"from{place}"]
                    yield f"piece{place}", self._printed(key, start, variables["bytes"])
                if "logsForRun" in document:
                    yield "logsForRun", self._page(run, **page) if run else _MISSING
            case "Jobs":
                nodes = [
                    {"location": {"name": location}, "name": repository, "jobs": [{"name": job}]}
                    for location, repository, job in self.jobs
                ]
                yield "repositoriesOrError", {"__typename": "RepositoryConnection", "nodes": nodes}
            case "Launch":
                yield "launchRun", self._launch(variables["params"])
            case "Terminate":
                yield "terminateRun", self._terminate(run) if run else _MISSING

    def _run(self, run: _Run, *, plan: bool) -> dict[str, Any]:
        steps = {"executionPlan": {"steps": run.plan}} if plan else {}
        return {"__typename": "Run", **run.fields, "stepStats": _step_stats(run.events), **steps}

    def _launch(self, params: dict[str, Any]) -> dict[str, Any]:
        self.launched.append(params)
        if "wrong" in params["runConfigData"]:
            errors = [{"message": "Received unexpected config entry wrong"}]
            return {"__typename": "RunConfigValidationInvalid", "errors": errors}
        run_id = self.add_run("QUEUED", tags=params["executionMetadata"]["tags"])
        return {"__typename": "LaunchRunSuccess", "run": {"runId": run_id}}

    def _terminate(self, run: _Run) -> dict[str, Any]:
        status = run.fields["status"]
        if status == "STARTED":
            run.fields["status"] = "CANCELING"
            return {"__typename": "TerminateRunSuccess"}
        text = f"Run could not be terminated due to having status {status}."
        return {"__typename": "TerminateRunFailure", "message": text}

    def _listed(self, cursor: str | None, limit: int) -> list[dict[str, Any]]:
        runs = sorted(self._runs.values(), key=lambda run: run.fields["creationTime"], reverse=True)
        ids = [run.fields["runId"] for run in runs]
        if cursor is not None and cursor not in ids:
            return []  # as for a run that was deleted
        first = 0 if cursor is None else ids.index(cursor) + 1
        return [run.fields for run in runs[first : first + limit]]

    def _page(self, run: _Run, after: str | None, limit: int) -> dict[str, Any]:
        first = json.loads(base64.b64decode(after, validate=True))["value"] if after else 0
        later = [(number, one) for number, one in sorted(run.events, key=_number) if number > first]
        seen = [(number, one) for number, one in later if not one.get("hidden")]
        page = seen[: min(limit, self.page)]
        last = page[-1][0] if page else first
        cursor = base64.b64encode(json.dumps({"type": "STORAGE_ID", "value": last}).encode()).decode()
        events = [{key: value for key, value in one.items() if key != "hidden"} for _, one in page]
        return {"__typename": "EventConnection", "cursor": cursor, "hasMore": len(seen) > len(page), "events": events}

    def _printed(self, key: list[str], start: str, limit: int) -> dict[str, Any]:
        if not self.keeps_output:
            return {"stdout": None, "stderr": None, "cursor": "0:0"}
        files = self._runs[key[0]].printed.get(key[2], [b"", b""])
        offsets = [int(one) for one in start.split(":")]
        pieces = [one[offset : offset + limit] for one, offset in zip(files, offsets, strict=True)]
        ends = [offset + len(piece) for piece, offset in zip(pieces, offsets, strict=True)]
        texts = [piece.decode("utf-8", "replace") if piece else None for piece in pieces]
        return {"stdout": texts[0], "stderr": texts[1], "cursor": f"{ends[0]}:{ends[1]}"}

    def _next_id(self) -> int:
        # With PostgreSQL all runs share the ids.
        self._last_id += self._random.randint(1, 9)
        return self._last_id


def error(name: str, message: str, *causes: dict[str, Any], stack: list[str] | None = None) -> dict[str, Any]:
    """Return an error as the API has it, with its causes."""
    chain = [{"error": one} for one in causes]
    return {"className": name, "message": f"{name}: {message}\n", "stack": stack or [], "errorChain": chain}


def _number(event: tuple[int, dict[str, Any]]) -> int:
    return event[0]


def _step_stats(events: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what the real server makes of events: an attempt that runs is not among the attempts."""
    found: dict[str, dict[str, Any]] = {}
    opened: dict[str, float | None] = {}
    for _, event in sorted(events, key=_number):
        kind, step, at_s = event["eventType"], event["stepKey"], int(event["timestamp"]) / 1000
        if not step or not kind or event.get("hidden"):
            continue
        stats = found.setdefault(
            step, {"stepKey": step, "status": None, "startTime": None, "endTime": None, "attempts": [], "markers": []}
        )
        if kind == "STEP_WORKER_STARTING":
            stats["markers"].append({"startTime": at_s, "endTime": None})
        elif kind == "STEP_START":
            stats |= {"status": "IN_PROGRESS", "startTime": at_s}
            opened[step] = at_s
        elif kind == "STEP_RESTARTED":
            opened[step] = at_s
        elif kind in _ATTEMPT_ENDS:
            started = opened.pop(step, None)
            stats["attempts"].append({"startTime": at_s if started is None else started, "endTime": at_s})
            stats["status"] = _ATTEMPT_ENDS[kind]
            if kind != "STEP_UP_FOR_RETRY":
                stats["endTime"] = at_s
    return list(found.values())
