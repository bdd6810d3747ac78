"""AWS Batch, CloudWatch Logs and ECS as far as Tailspan's services use them, at one address.

Signatures are verified. What differs from moto, and is as the models of botocore describe it: quotas, tokens that
expire, events that become visible late, empty pages that are not the end, streams that do not exist, and lists that
have all states only with a filter.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.json_api import FakeJsonApi

__all__ = ["REGION", "FakeAws", "use_credentials", "write_credentials"]

REGION = "eu-west-1"
_MOST_IDS, _MOST_STREAMS = 100, 100
_GROUP = "/aws/batch/job"
_QUEUE = f"arn:aws:batch:{REGION}:123456789012:job-queue/"
_DEFINITION = f"arn:aws:batch:{REGION}:123456789012:job-definition/"


def use_credentials(monkeypatch: pytest.MonkeyPatch, directory: Path, token: str = "token-1") -> Path:
    """Let botocore find these credentials and no others; return the file that has them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    file = directory / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(directory / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    write_credentials(file, token)
    return file


def write_credentials(file: Path, token: str) -> None:
    """Write credentials with a session token."""
    file.write_text(
        f"[default]\naws_access_key_id = AKID\naws_secret_access_key = secret-key-1\naws_session_token = {token}\n"
    )


class FakeAws(FakeJsonApi):
    """The server. A context manager.

    Attributes:
        start_ms: When it began; jobs are created then.
        session_token: The token that is valid.
        quota: Requests a second of each API; more are throttled. 0: no limit.
        throttle_next: By API (``batch``, ``logs``, ``ecs``): how many of its next requests are throttled.
        throttled: How many requests were throttled.
        page_events: The most events of a page.
        calls: The operation of each request so far, and its parameters.
        jobs: What DescribeJobs returns, by id.
        missing: Streams that are named and do not exist.
        denied: Operations that the policy of the user does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start_ms = int(time.time() * 1000)
        self.session_token = "token-1"
        self.quota = 0
        self.throttle_next: dict[str, int] = {}
        self.throttled = 0
        self.page_events = 1000
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.ecs_tasks: dict[str, dict[str, Any]] = {}
        self.definitions: dict[str, dict[str, Any]] = {}
        self.missing: set[str] = set()
        self.denied: set[str] = set()
        self._events: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
        self._recent: dict[str, deque[float]] = {}
        self._last_event = 0

    @property
    def section(self) -> str:
        """The keys by which the configuration finds this server."""
        return f'endpoint_url = "{self.url}"\nregion = "{REGION}"'

    def add_job(
        self,
        status: str = "RUNNING",
        *,
        name: str = "nightly",
        at_ms: int | None = None,
        queue: str = "queue",
        **more: Any,
    ) -> str:
        """Add a job with one attempt that has not ended, and return its id; see `end`."""
        at_ms = self.start_ms if at_ms is None else at_ms
        job_id = more.pop("job_id", None) or str(uuid.UUID(int=0xA0000 + len(self.jobs)))
        stream = f"{name}/default/{job_id[-12:]}.1"
        self.jobs[job_id] = {
            "jobId": job_id,
            "jobArn": f"arn:aws:batch:{REGION}:123456789012:job/{job_id}",
            "jobName": name,
            "jobQueue": _QUEUE + queue,
            "jobDefinition": f"{_DEFINITION}{name}-definition:3",
            "status": status,
            "createdAt": at_ms,
            "attempts": [],
            "container": {"logStreamName": stream, "environment": []},
            "tags": {},
            "dependsOn": [],
            **more,
        }
        if status == "RUNNING":
            self.jobs[job_id]["startedAt"] = at_ms + 1000
        return job_id

    def stream_of(self, job_id: str) -> str:
        """Return the log stream of the job's newest attempt."""
        name: str = self.jobs[job_id]["container"]["logStreamName"]
        return name

    def end_attempt(self, job_id: str, code: int | None, reason: str = "", *, at_ms: int) -> None:
        """End the attempt that runs."""
        job = self.jobs[job_id]
        container = {"logStreamName": self.stream_of(job_id)} | ({} if code is None else {"exitCode": code})
        attempt = {"container": container, "startedAt": job.get("startedAt", at_ms), "stoppedAt": at_ms}
        job["attempts"].append(attempt | {"statusReason": reason or "Essential container in task exited"})
        job["status"] = "RUNNABLE"

    def start_attempt(self, job_id: str, *, at_ms: int) -> None:
        """Start the next attempt."""
        job = self.jobs[job_id]
        number = len(job["attempts"]) + 1
        stream = f"{job['jobName']}/default/{job_id[-12:]}.{number}"
        job |= {"status": "RUNNING", "startedAt": at_ms, "container": {**job["container"], "logStreamName": stream}}

    def end(
        self, job_id: str, status: str = "SUCCEEDED", code: int | None = 0, reason: str = "", *, at_ms: int, **more: Any
    ) -> None:
        """End a job and its attempt."""
        if self.jobs[job_id]["status"] == "RUNNING":
            self.end_attempt(job_id, code, reason, at_ms=at_ms)
        job = self.jobs[job_id]
        job |= {"status": status, "stoppedAt": at_ms, "statusReason": reason or "Essential container in task exited"}
        job |= {"container": {**job["container"], **({} if code is None else {"exitCode": code})}, **more}

    def log(
        self, stream: str, text: str, at_ms: int, *, group: str = _GROUP, visible_after_s: float = 0.0, late_ms: int = 0
    ) -> None:
        """Add an event, which becomes visible after some seconds."""
        self._last_event += 1
        # The time is in the upper bits of an id.
        event_id = f"{(at_ms << 144) + self._last_event:056d}"
        event = {"logStreamName": stream, "timestamp": at_ms, "message": text, "eventId": event_id}
        event |= {"ingestionTime": at_ms + 50 + late_ms + int(visible_after_s * 1000)}
        self._events.setdefault((group, stream), []).append((time.monotonic() + visible_after_s, event))

    def refuse(self, path: str, authorization: str) -> tuple[int, object] | None:
        """Refuse what is not signed with the valid credentials, and what is above the quota."""
        _, _, fields = authorization.partition(" ")
        parts = dict(part.strip().partition("=")[::2] for part in fields.split(","))
        scope = parts.get("Credential", "").split("/")
        if len(scope) != 5 or scope[2] != REGION:
            return 403, {"__type": "MissingAuthenticationTokenException", "message": "Missing Authentication Token"}
        if self.headers.get("x-amz-security-token") != self.session_token:
            text = "The security token included in the request is expired"
            return 403, {"__type": "ExpiredTokenException", "message": text}
        if parts.get("Signature") != self._signature(path, parts, scope):
            return 403, {"__type": "InvalidSignatureException", "message": "The request signature does not match"}
        if self.throttle_next.get(scope[3]):
            self.throttle_next[scope[3]] -= 1
            return self._throttle()
        recent, now_s = self._recent.setdefault(scope[3], deque()), time.monotonic()
        while recent and recent[0] < now_s - 1.0:
            recent.popleft()
        if self.quota and len(recent) >= self.quota:
            return self._throttle()
        recent.append(now_s)
        return None

    def _throttle(self) -> tuple[int, object]:
        self.throttled += 1
        return 400, {"__type": "com.amazonaws#ThrottlingException", "message": "Rate exceeded"}

    def _signature(self, path: str, parts: dict[str, str], scope: list[str]) -> str:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        auth = SigV4Auth(Credentials("AKID", "secret-key-1", self.session_token), scope[3], REGION)
        names = parts["SignedHeaders"].split(";")
        signed = "\n".join(f"{name}:{' '.join(self.headers.get(name, '').split())}" for name in names)
        digest = hashlib.sha256(self.content).hexdigest()
        canonical = "\n".join(("POST", path, "", signed, "", parts["SignedHeaders"], digest))
        request = AWSRequest("POST", self.address + path)
        request.context["timestamp"] = self.headers["x-amz-date"]
        return str(auth.signature(auth.string_to_sign(request, canonical), request))

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the reply to a request; see the module."""
        target = self.headers.get("x-amz-target", "").rpartition(".")[2]
        operation = target or path.removeprefix("/v1/")
        self.calls.append((operation, body))
        if operation in self.denied:
            return 403, {"message": f"User: arn:aws:iam::123456789012:user/x is not authorized to perform: {operation}"}
        answer = getattr(self, f"_do_{operation.lower()}", None)
        return answer(body) if answer else (404, {"__type": "UnknownOperationException"})

    def _do_describejobs(self, body: dict[str, Any]) -> tuple[int, object]:
        if len(body["jobs"]) > _MOST_IDS:
            return 400, {"message": "Error executing request, Exception : at most 100 jobs"}
        return 200, {"jobs": [self.jobs[one] for one in body["jobs"] if one in self.jobs]}

    def _do_describejobqueues(self, body: dict[str, Any]) -> tuple[int, object]:
        names = sorted({job["jobQueue"].rpartition("/")[2] for job in self.jobs.values()})
        first = int(body.get("nextToken", 0))
        more = {"nextToken": str(first + 1)} if first + 1 < len(names) else {}
        return 200, {"jobQueues": [{"jobQueueName": name} for name in names[first : first + 1]], **more}

    def _do_listjobs(self, body: dict[str, Any]) -> tuple[int, object]:
        array, filters = body.get("arrayJobId"), body.get("filters")
        if (array is None) == ("jobQueue" not in body) or len(filters or []) > 1 or (array and filters):
            return 400, {"message": "Error executing request, Exception : one of jobQueue, arrayJobId"}
        jobs = [job for job in self.jobs.values() if "#" not in job["jobId"]]
        if array is not None:
            jobs = [job for job in jobs if job["jobId"].startswith(f"{array}:")]
        else:
            jobs = [
                job
                for job in jobs
                if job["jobQueue"].rpartition("/")[2] == body["jobQueue"] and ":" not in job["jobId"]
            ]
        if filters:
            after_ms = int(filters[0]["values"][0])
            jobs = sorted((job for job in jobs if job["createdAt"] > after_ms), key=lambda job: -job["createdAt"])
        else:
            jobs = [job for job in jobs if job["status"] == body.get("jobStatus", "RUNNING")]
        first, count = int(body.get("nextToken", 0)), min(body.get("maxResults", 100), 100 if filters else 1000)
        more = {"nextToken": str(first + count)} if first + count < len(jobs) else {}
        keys = ("jobId", "jobName", "status", "statusReason", "createdAt", "startedAt", "stoppedAt", "jobDefinition")
        keys += ("arrayProperties", "isTerminated", "isCancelled")
        rows = [{key: job[key] for key in keys if key in job} for job in jobs[first : first + count]]
        return 200, {"jobSummaryList": rows, **more}

    def _do_terminatejob(self, body: dict[str, Any]) -> tuple[int, object]:
        now_ms = int(time.time() * 1000)
        if body["jobId"] in self.jobs:
            self.end(body["jobId"], "FAILED", 137, body["reason"], at_ms=now_ms, isTerminated=True, isCancelled=True)
        return 200, {}

    def _do_submitjob(self, body: dict[str, Any]) -> tuple[int, object]:
        queue = body["jobQueue"].rpartition("/")[2]
        overrides = body.get("containerOverrides", {})
        job_id = self.add_job("SUBMITTED", name=body["jobName"], queue=queue, at_ms=int(time.time() * 1000))
        self.jobs[job_id] |= {"tags": body.get("tags", {}), "timeout": body.get("timeout")}
        self.jobs[job_id]["container"] = {"command": overrides.get("command", [])}
        self.jobs[job_id]["container"]["environment"] = overrides.get("environment", [])
        return 200, {"jobId": job_id, "jobName": body["jobName"], "jobArn": self.jobs[job_id]["jobArn"]}

    def _do_filterlogevents(self, body: dict[str, Any]) -> tuple[int, object]:
        group, names = body["logGroupName"], body["logStreamNames"]
        if len(names) > _MOST_STREAMS or not names:
            return 400, {"__type": "InvalidParameterException", "message": "1 to 100 stream names"}
        if group not in {one for one, _ in self._events} and group != _GROUP:
            return 400, {"__type": "ResourceNotFoundException", "message": "The specified log group does not exist."}
        if self.missing.intersection(names):
            return 400, {"__type": "ResourceNotFoundException", "message": "The specified log stream does not exist."}
        now_s = time.monotonic()
        events = [
            event
            for name in names
            for visible_s, event in self._events.get((group, name), ())
            if visible_s <= now_s and event["timestamp"] >= body["startTime"]
        ]
        events.sort(key=_order)
        after, is_empty = json.loads(body["nextToken"]) if "nextToken" in body else ([0, 0, ""], False)
        rest = [event for event in events if _order(event) > tuple(after)]
        if is_empty:
            return 200, {"events": [], "nextToken": json.dumps([after, False])}
        page = rest[: self.page_events]
        # A page with more behind it is followed by an empty one, which has a token.
        more = {"nextToken": json.dumps([_order(page[-1]), True])} if len(rest) > len(page) else {}
        return 200, {"events": page, "searchedLogStreams": [], **more}

    def _do_listclusters(self, body: dict[str, Any]) -> tuple[int, object]:
        return 200, {"clusterArns": sorted({task["clusterArn"] for task in self.ecs_tasks.values()})}

    def _do_listtasks(self, body: dict[str, Any]) -> tuple[int, object]:
        stopped = body["desiredStatus"] == "STOPPED"
        tasks = [
            arn
            for arn, task in self.ecs_tasks.items()
            if task["clusterArn"].endswith(body["cluster"].rpartition("/")[2])
            and (task["lastStatus"] == "STOPPED") is stopped
        ]
        return 200, {"taskArns": tasks}

    def _do_describetasks(self, body: dict[str, Any]) -> tuple[int, object]:
        wanted = {one.rpartition("/")[2] for one in body["tasks"]}
        found = [task for arn, task in self.ecs_tasks.items() if arn.rpartition("/")[2] in wanted]
        return 200, {"tasks": found, "failures": []}

    def _do_describetaskdefinition(self, body: dict[str, Any]) -> tuple[int, object]:
        return 200, {"taskDefinition": self.definitions[body["taskDefinition"]]}

    def _do_stoptask(self, body: dict[str, Any]) -> tuple[int, object]:
        task = next(task for arn, task in self.ecs_tasks.items() if arn.endswith(body["task"]))
        task |= {"lastStatus": "STOPPED", "stopCode": "UserInitiated", "stoppedReason": body["reason"]}
        task |= {"stoppedAt": time.time(), "containers": [{**task["containers"][0], "exitCode": 143}]}
        return 200, {"task": task}


def _order(event: dict[str, Any]) -> tuple[int, int, str]:
    return event["timestamp"], event["ingestionTime"], event["eventId"]
