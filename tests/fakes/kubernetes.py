"""An API server of Kubernetes as far as `KubernetesService` uses it, with what was measured of the real one (1.36).

A log is followed over rotations to its last line, also while its pod is being deleted; a plain read has the current
file only, and 404 once the pod is gone. ``sinceTime`` is cut to the second. ``previous`` may answer 200 with a
sentence in place of the log. A watch from an old version gets an ERROR event. Status and log change apart, as the
test says.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import copy
import json
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

__all__ = ["FakeContainer", "FakeJob", "FakeKubernetes", "FakePod"]

TOKEN = "token-of-the-fake-cluster"
_NANOS = 1_000_000_000


@dataclass(eq=False)
class _Log:
    """What one run of a container wrote: files of lines. A plain read has the last one only."""

    files: list[list[tuple[int, bytes]]] = field(default_factory=lambda: [[]])
    ended: bool = False
    readable: bool = True
    waiters: dict[asyncio.Event, asyncio.StreamReader] = field(default_factory=dict)

    def lines_from(self, file: int, index: int) -> tuple[list[tuple[int, bytes]], int, int]:
        """Return all lines from a place on, and the place after them."""
        found = self.files[file][index:] + [line for later in self.files[file + 1 :] for line in later]
        return found, len(self.files) - 1, len(self.files[-1])


class FakeContainer:
    """A container of a pod."""

    def __init__(self, pod: FakePod, name: str) -> None:
        self.pod = pod
        self.name = name
        self.logs: list[_Log] = []
        self.status: dict[str, Any] = {
            "name": name,
            "state": {"waiting": {"reason": "ContainerCreating"}},
            "lastState": {},
            "restartCount": 0,
        }

    def start(self, *, publish: bool = True) -> Self:
        """Begin to run, or to run again."""
        with self.pod.api.lock:
            state = self.status["state"]
            if self.logs:
                self.status["restartCount"] += 1
                if "terminated" in state:
                    self.status["lastState"] = {"terminated": state["terminated"]}
            self.logs.append(_Log())
            self.status["state"] = {"running": {"startedAt": self.pod.api.now()}}
            self.pod.phase = "Running"
            if publish:
                self.pod.publish()
        return self

    def write(self, *lines: str | bytes, time_ns: int | None = None, newline: bool = True) -> None:
        """Write lines, each with a time of its own, or all with the given one."""
        with self.pod.api.lock:
            log = self.logs[-1]
            for line in lines:
                text = line if isinstance(line, bytes) else line.encode()
                log.files[-1].append((time_ns or self.pod.api.tick(), text + (b"\n" if newline else b"")))
        self.pod.api.wake(log.waiters)

    @property
    def is_followed(self) -> bool:
        """Whether a client follows the log of its present run."""
        return any(not reader.at_eof() for reader in tuple(self.logs[-1].waiters.values()))

    def rotate(self) -> None:
        """Begin another file: plain reads do not have the lines before it any more."""
        with self.pod.api.lock:
            self.logs[-1].files.append([])

    def end(self, code: int = 0, reason: str | None = None, *, publish: bool = True) -> None:
        """End; the log ends at once, the status may follow later."""
        with self.pod.api.lock:
            started = self.status["state"].get("running", {}).get("startedAt", self.pod.api.now())
            ended = {"exitCode": code, "reason": reason or ("Error" if code else "Completed")}
            self.status["state"] = {"terminated": {**ended, "startedAt": started, "finishedAt": self.pod.api.now()}}
            log = self.logs[-1]
            log.ended = True
            if publish:
                self.pod.publish()
        self.pod.api.wake(log.waiters)

    def back_off(self) -> None:
        """Wait for the next run, as ``CrashLoopBackOff``."""
        with self.pod.api.lock:
            self.status["lastState"] = self.status["state"]
            self.status["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
            self.pod.publish()


class FakePod:
    """A pod of a job."""

    def __init__(self, job: FakeJob, name: str, containers: tuple[str, ...], init: tuple[str, ...]) -> None:
        self.job = job
        self.api = job.api
        self.name = name
        self.uid = str(uuid.uuid4())
        self.phase = "Pending"
        self.extra: dict[str, Any] = {}
        self.labels = {"batch.kubernetes.io/job-name": job.name, "batch.kubernetes.io/controller-uid": job.uid}
        self.annotations: dict[str, str] = {}
        self.owners = [{"kind": "Job", "name": job.name, "uid": job.uid, "controller": True}]
        self.made = self.api.now()
        self.deleting: str | None = None
        self.init = {one: FakeContainer(self, one) for one in init}
        self.containers = {one: FakeContainer(self, one) for one in containers}

    @property
    def main(self) -> FakeContainer:
        """Its first container."""
        return next(iter(self.containers.values()))

    def find(self, name: str) -> FakeContainer | None:
        """Return a container, or None."""
        return self.containers.get(name) or self.init.get(name)

    def publish(self, kind: str = "MODIFIED") -> None:
        """Show the present status to watches and lists."""
        spec: dict[str, Any] = {"containers": [{"name": one} for one in self.containers], "nodeName": "node1"}
        spec |= {"initContainers": [{"name": one} for one in self.init]} if self.init else {}
        meta: dict[str, Any] = {
            "name": self.name,
            "namespace": self.job.namespace,
            "uid": self.uid,
            "creationTimestamp": self.made,
            "labels": self.labels,
            "annotations": self.annotations,
            "ownerReferences": self.owners,
        }
        meta |= {"deletionTimestamp": self.deleting} if self.deleting else {}
        status = {
            "phase": self.phase,
            "initContainerStatuses": [copy.deepcopy(one.status) for one in self.init.values()],
            "containerStatuses": [copy.deepcopy(one.status) for one in self.containers.values()],
            **self.extra,
        }
        self.api.publish("pods", kind, {"metadata": meta, "spec": spec, "status": status})

    def end(self, phase: str = "Succeeded") -> None:
        """Reach a phase in which no container runs."""
        with self.api.lock:
            self.phase = phase
            self.publish()

    def delete(self) -> None:
        """Begin to be deleted: containers still run."""
        with self.api.lock:
            self.deleting = self.api.now()
            self.publish()

    def vanish(self) -> None:
        """Be gone: logs that are followed end, other reads are 404."""
        with self.api.lock:
            for one in (*self.init.values(), *self.containers.values()):
                for log in one.logs:
                    log.ended = True
                    self.api.wake(log.waiters)
            self.api.pods.pop((self.job.namespace, self.name), None)
            self.publish("DELETED")


class FakeJob:
    """A Job."""

    def __init__(
        self, api: FakeKubernetes, namespace: str, name: str, spec: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        self.api = api
        self.namespace = namespace
        self.name = name
        self.uid = str(uuid.uuid4())
        self.spec = {"parallelism": 1, "completions": 1, **spec}
        self.meta = meta
        self.made = meta.pop("creationTimestamp", None) or self.api.now()
        self.status: dict[str, Any] = {"startTime": self.made}
        self.pods: list[FakePod] = []

    @property
    def job_id(self) -> str:
        """The id that the service gives it."""
        return f"{self.namespace}/{self.name}:{self.uid}"

    def add_pod(
        self, *containers: str, name: str = "", init: tuple[str, ...] = (), index: int | None = None, start: bool = True
    ) -> FakePod:
        """Add a pod, whose containers run unless ``start`` is False."""
        with self.api.lock:
            pod_name = name or f"{self.name}-{len(self.pods)}{uuid.uuid4().hex[:4]}"
            pod = FakePod(self, pod_name, containers or ("main",), init)
            if index is not None:
                pod.labels["batch.kubernetes.io/job-completion-index"] = str(index)
            self.pods.append(pod)
            self.api.pods[self.namespace, pod.name] = pod
            if start:
                for one in pod.containers.values():
                    one.start(publish=False)
            pod.publish("ADDED")
        return pod

    def condition(self, kind: str, reason: str = "", message: str = "") -> None:
        """Add a condition."""
        with self.api.lock:
            found = {"type": kind, "status": "True", "lastTransitionTime": self.api.now()}
            self.status.setdefault("conditions", []).append({**found, "reason": reason, "message": message})
            if kind == "Complete":
                self.status |= {"completionTime": self.api.now(), "succeeded": self.spec["completions"] or 1}
            self.publish()

    def finish(self, code: int = 0) -> None:
        """End all containers and the job."""
        for pod in self.pods:
            for one in pod.containers.values():
                if "running" in one.status["state"]:
                    one.end(code, publish=False)
            pod.end("Failed" if code else "Succeeded")
        if code:
            self.status["failed"] = len(self.pods)
            self.condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        else:
            self.condition("Complete", "CompletionsReached", "Reached expected number of succeeded pods")

    def delete(self) -> None:
        """Delete the job; its pods are deleted by the test."""
        with self.api.lock:
            self.api.jobs.pop((self.namespace, self.name), None)
            self.publish("DELETED")

    def publish(self, kind: str = "MODIFIED") -> None:
        """Show the present status to watches and lists."""
        meta = {"name": self.name, "namespace": self.namespace, "uid": self.uid, "creationTimestamp": self.made}
        self.api.publish("jobs", kind, {"metadata": meta | self.meta, "spec": self.spec, "status": self.status})


class FakeKubernetes:
    """The server, on loopback and a thread of its own. A context manager.

    Attributes:
        token: What ``Authorization: Bearer`` must have.
        requests: Method and path of each request so far, streams included.
        sent_bytes: Bytes of bodies sent so far.
        refusals: Statuses of the next replies; 0: the right one.
        on_refusal: Called before each other one.
        denied: ``VERB RESOURCE`` for which an access review says no.
        minor: The minor version.
        broken_previous: Whether ``previous`` answers with a sentence.
        watch_s: The longest time of a watch.
        offset_s: What the clocks of the cluster are ahead of this machine's, in seconds.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen nowhere yet.

        Args:
            tls: Speak TLS with this context. A client with a certificate needs no token.
        """
        self.lock = threading.RLock()
        self.token = TOKEN
        self._tls = tls
        self.requests: list[str] = []
        self.sent_bytes = 0
        self.refusals: list[int] = []
        self.on_refusal: Callable[[], object] = int
        self.denied: set[str] = set()
        self.minor = "36"
        self.broken_previous = False
        self.watch_s = 600.0
        self.offset_s = 0.0
        self.jobs: dict[tuple[str, str], FakeJob] = {}
        self.pods: dict[tuple[str, str], FakePod] = {}
        self.events: list[dict[str, Any]] = []
        self.cron_jobs: dict[tuple[str, str], dict[str, Any]] = {}
        self._objects: dict[str, dict[str, dict[str, Any]]] = {"jobs": {}, "pods": {}}
        self._history: list[tuple[int, str, str, bytes]] = []
        # The last list, which is requested in chunks.
        self._listed: tuple[object, list[dict[str, Any]]] = (None, [])
        self._version = 100
        self._oldest = 100
        self._last_ns = 0
        self._watchers: set[asyncio.Event] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._readers: dict[asyncio.Task[None], asyncio.StreamReader] = {}
        self._streams: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._directory = tempfile.TemporaryDirectory(prefix="kubeconfig-")

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._directory.cleanup()

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}"

    @property
    def section(self) -> str:
        """The keys by which the configuration finds this server."""
        return f'kubeconfig = "{self.kubeconfig(Path(self._directory.name))}"'

    @property
    def away(self) -> bool:
        """Whether it does not listen."""
        return self._server is None

    @away.setter
    def away(self, away: bool) -> None:
        if away:
            self.stop()
        else:
            self.start()

    def start(self) -> None:
        """Listen, on the port of the time before."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, backlog=1024, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Stop listening, and cut all connections."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut_now()
        me = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def cut(self) -> None:
        """Cut all connections, as a proxy that restarts does."""
        self._loop.call_soon_threadsafe(self.cut_now)

    def cut_now(self) -> None:
        """See `cut`; on the thread of the server."""
        for writer in self._writers:
            writer.transport.abort()

    def open_streams(self, kind: str = "log") -> int:
        """Return how many followed logs (or watches) are open."""
        return self._streams[kind]

    def kubeconfig(self, directory: Path, *, cluster: dict[str, Any] | None = None, **user: Any) -> Path:
        """Write a kubeconfig; by default its user has the token."""
        path = directory / "kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url, **(cluster or {})}}],
            "users": [{"name": "u", "user": user or {"token": self.token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(content))
        return path

    def add_job(
        self, name: str = "etl", *, namespace: str = "default", cron_job: str = "", publish: bool = True, **spec: Any
    ) -> FakeJob:
        """Add a job. Keys of ``spec``: those of a Job's, and ``labels``, ``annotations``, ``generateName``."""
        meta = {
            key: spec.pop(key) for key in ("labels", "annotations", "generateName", "creationTimestamp") if key in spec
        }
        if cron_job:
            meta["ownerReferences"] = [{"kind": "CronJob", "name": cron_job, "uid": "c", "controller": True}]
        with self.lock:
            job = FakeJob(self, namespace, name, spec, meta)
            self.jobs[namespace, name] = job
            if publish:
                job.publish("ADDED")
        return job

    def add_event(self, uid: str, kind: str, reason: str, message: str) -> None:
        """Add a warning about an object."""
        about = {"uid": uid, "kind": kind}
        self.events.append(
            {
                "involvedObject": about,
                "type": "Warning",
                "reason": reason,
                "message": message,
                "lastTimestamp": self.now(),
            }
        )

    def compact(self) -> None:
        """Forget all versions so far: watches and continued lists from them are expired."""
        with self.lock:
            self._oldest = self._version
            self._history.clear()

    def tick(self) -> int:
        """Return the time of the next line: the present, later than the last one."""
        self._last_ns = max(self._last_ns + 1000, time.time_ns() + int(self.offset_s * _NANOS))
        return self._last_ns

    def now(self) -> str:
        """Return the present as the API shows it."""
        return (datetime.now(UTC) + timedelta(seconds=self.offset_s)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def wake(self, waiters: Collection[asyncio.Event]) -> None:
        """Wake what waits on the server's thread."""
        for event in tuple(waiters):
            self._loop.call_soon_threadsafe(event.set)

    def publish(self, resource: str, kind: str, found: dict[str, Any]) -> None:
        """Add an event to the history, and to the lists."""
        with self.lock:
            self._version += 1
            meta = {**found["metadata"], "resourceVersion": str(self._version)}
            shown = copy.deepcopy({**found, "metadata": meta})
            if kind == "DELETED":
                self._objects[resource].pop(meta["uid"], None)
            else:
                self._objects[resource][meta["uid"]] = shown
            line = json.dumps({"type": kind, "object": shown}).encode() + b"\n"
            self._history.append((self._version, resource, meta["namespace"], line))
        self.wake(self._watchers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._readers[task] = reader
        # What a client does not read waits here, and not in the kernel.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request, *fields = head.decode().split("\r\n")
                method, target, _ = request.split(" ")
                headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in fields)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(writer, method, target, headers, json.loads(body) if body else {})
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self._readers.pop(task, None)
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, target: str, headers: dict[str, str], body: dict[str, Any]
    ) -> None:
        parts = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.requests.append(f"{method} {target}")
        reply: Any
        if self.refusals and (code := self.refusals.pop(0)):
            self.on_refusal()
            reply = code, _status(code, "refused")
        elif headers.get("authorization") != f"Bearer {self.token}" and not writer.get_extra_info("peercert"):
            reply = 401, _status(401, "Unauthorized")
        else:
            reply = self._reply(method, parts.path, query, body)
        if isinstance(reply, tuple):
            code, content = reply
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            kind = "text/plain" if isinstance(content, bytes) else "application/json"
            writer.write(f"HTTP/1.1 {code} x\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n".encode())
            writer.write(data)
            self.sent_bytes += len(data)
            await writer.drain()
            return
        name = "watch" if "watch" in query else "log"
        self._streams[name] += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            async for piece in reply:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.sent_bytes += len(piece)
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self._streams[name] -= 1

    def _reply(self, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> Any:
        parts = path.strip("/").split("/")
        match parts:
            case ["apis", "batch", "v1", *rest] if rest[-1] == "jobs" or rest == ["jobs"]:
                if method == "POST":
                    return self._create(rest[1], body)
                return self._collection("jobs", rest[1] if len(rest) == 3 else None, query)
            case ["apis", "batch", "v1", "namespaces", namespace, "jobs", name]:
                return self._job(method, namespace, name, body)
            case ["apis", "batch", "v1", "namespaces", namespace, "cronjobs", name]:
                found = self.cron_jobs.get((namespace, name))
                return (200, found) if found else (404, _status(404, f'cronjobs.batch "{name}" not found'))
            case ["api", "v1", "pods"]:
                return self._collection("pods", None, query)
            case ["api", "v1", "namespaces", namespace, "pods"]:
                return self._collection("pods", namespace, query)
            case ["api", "v1", "namespaces", namespace, "pods", name, "log"]:
                return self._log(namespace, name, query)
            case ["api", "v1", "namespaces", _, "events"]:
                wanted = dict(one.split("=") for one in query.get("fieldSelector", "").split(",") if one)
                uid = wanted.get("involvedObject.uid")
                return 200, {"items": [one for one in self.events if one["involvedObject"]["uid"] == uid]}
            case ["version"]:
                return 200, {"major": "1", "minor": self.minor, "gitVersion": f"v1.{self.minor}.0"}
            case ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
                wanted = body["spec"]["resourceAttributes"]
                named = "/".join(one for one in (wanted["resource"], wanted["subresource"]) if one)
                return 201, {"status": {"allowed": f"{wanted['verb']} {named}" not in self.denied}}
        return 404, _status(404, "the server could not find the requested resource")

    def _create(self, namespace: str, body: dict[str, Any]) -> Any:
        meta = dict(body["metadata"])
        name = meta.pop("name", "") or f"{meta['generateName']}{uuid.uuid4().hex[:5]}"
        job = self.add_job(name, namespace=namespace, publish=False, **body.get("spec", {}))
        job.meta = {key: value for key, value in meta.items() if key != "namespace"}
        job.publish("ADDED")
        return 201, self._objects["jobs"][job.uid]

    def _job(self, method: str, namespace: str, name: str, body: dict[str, Any]) -> Any:
        job = self.jobs.get((namespace, name))
        if job is None:
            return 404, _status(404, f'jobs.batch "{name}" not found', "NotFound")
        if method == "DELETE":
            if body.get("preconditions", {}).get("uid", job.uid) != job.uid:
                return 409, _status(409, "the UID in the precondition does not match")
            job.delete()
            return 200, {"kind": "Status", "status": "Success"}
        return 200, self._objects["jobs"][job.uid]

    def _collection(self, resource: str, namespace: str | None, query: dict[str, str]) -> Any:
        if "watch" in query:
            return self._watch(resource, namespace, query)
        with self.lock:
            selector = query.get("labelSelector", "")
            key = resource, namespace, selector, self._version
            if self._listed[0] != key:
                found = [
                    one
                    for one in self._objects[resource].values()
                    if namespace in (None, one["metadata"]["namespace"]) and _selected(one, selector)
                ]
                found.sort(key=lambda one: (one["metadata"]["namespace"], one["metadata"]["name"]))
                self._listed = key, found
            found = self._listed[1]
            version, start = str(self._version), 0
            if token := query.get("continue"):
                version, _, offset = token.partition(":")
                start = int(offset)
                if int(version) < self._oldest:
                    return 410, _status(410, "The provided continue parameter is too old", "Expired")
            end = start + int(query.get("limit", "500"))
            meta = {"resourceVersion": version} | ({"continue": f"{version}:{end}"} if end < len(found) else {})
            return 200, {"kind": "List", "metadata": meta, "items": found[start:end]}

    async def _watch(self, resource: str, namespace: str | None, query: dict[str, str]) -> AsyncIterator[bytes]:
        version = int(query.get("resourceVersion") or 0)
        selector = query.get("labelSelector", "")
        deadline_s = time.monotonic() + min(self.watch_s, float(query.get("timeoutSeconds", "600")))
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                with self.lock:
                    if version < self._oldest:
                        text = f"too old resource version: {version} ({self._oldest})"
                        yield json.dumps({"type": "ERROR", "object": _status(410, text, "Expired")}).encode() + b"\n"
                        return
                    new = self._history[bisect.bisect(self._history, version, key=lambda entry: entry[0]) :]
                    event.clear()
                for number, kind, place, line in new:
                    version = number
                    here = kind == resource and namespace in (None, place)
                    if here and (not selector or _selected(json.loads(line)["object"], selector)):
                        yield line
                if not new:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(left_s, 60)):
                            await event.wait()
                    if not event.is_set() and query.get("allowWatchBookmarks"):
                        mark = {"kind": "Job", "metadata": {"resourceVersion": str(version)}}
                        yield json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n"
        finally:
            self._watchers.discard(event)

    def _log(self, namespace: str, name: str, query: dict[str, str]) -> Any:
        with self.lock:
            pod = self.pods.get((namespace, name))
            if pod is None:
                return 404, _status(404, f'pods "{name}" not found', "NotFound")
            names = [*pod.init, *pod.containers]
            wanted = query.get("container", names[0] if len(names) == 1 else "")
            container = pod.find(wanted)
            if container is None:
                text = f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]"
                return 400, _status(400, text, "BadRequest")
            if query.get("previous") == "true":
                if len(container.logs) < 2:
                    text = f'previous terminated container "{wanted}" in pod "{name}" not found'
                    return 400, _status(400, text, "BadRequest")
                if self.broken_previous or not container.logs[-2].readable:
                    return 200, b"unable to retrieve container logs for containerd://145c2bb7bff8eaeaa5812701fc"
                log = container.logs[-2]
            elif not container.logs:
                reason = container.status["state"].get("waiting", {}).get("reason", "ContainerCreating")
                text = f'container "{wanted}" in pod "{name}" is waiting to start: {reason}'
                return 400, _status(400, text, "BadRequest")
            else:
                log = container.logs[-1]
            since_ns = 0
            if since := query.get("sinceTime"):
                since_ns = int(datetime.fromisoformat(since).timestamp()) * _NANOS
            if query.get("follow") == "true":
                return self._follow(log, since_ns)
            return 200, b"".join(_shown(line, since_ns) for line in log.files[-1])

    async def _follow(self, log: _Log, since_ns: int) -> AsyncIterator[bytes]:
        event = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        log.waiters[event] = self._readers[task]
        file, index = len(log.files) - 1, 0
        try:
            while True:
                with self.lock:
                    event.clear()
                    lines, file, index = log.lines_from(file, index)
                    ended = log.ended
                if data := b"".join(_shown(line, since_ns) for line in lines):
                    for start in range(0, len(data), 32 << 10):
                        yield data[start : start + (32 << 10)]
                elif ended:
                    return
                else:
                    await event.wait()
        finally:
            log.waiters.pop(event, None)


def _shown(line: tuple[int, bytes], since_ns: int) -> bytes:
    time_ns, text = line
    if time_ns < since_ns:
        return b""
    second, nanos = divmod(time_ns, _NANOS)
    stamp = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{stamp}.{nanos:09d}Z ".encode() + text


def _selected(found: dict[str, Any], selector: str) -> bool:
    labels = found["metadata"].get("labels") or {}
    for one in filter(None, selector.split(",")):
        key, equals, value = one.partition("=")
        if key.endswith("!"):
            if labels.get(key[:-1]) == value:
                return False
        elif key not in labels or (equals and labels[key] != value):
            return False
    return True


def _status(code: int, message: str, reason: str = "") -> dict[str, Any]:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return status | {"message": message, "reason": reason or message, "code": code}
