"""Services over HTTP whose server is not the one that they expect, or has another version: each error says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest

from tailspan.errors import JobNotFoundError, ServiceError
from tailspan.services import JobService
from tailspan.services.aws import BatchService, EcsService
from tailspan.services.aws.batch import BatchOptions
from tailspan.services.aws.ecs import EcsOptions
from tailspan.services.docker import DockerService
from tailspan.services.docker.service import DockerOptions
from tailspan.services.kubernetes import KubernetesService
from tailspan.services.kubernetes.options import KubernetesOptions
from tailspan.services.ray import RayOptions, RayService
from tests.fakes.aws import REGION, use_credentials

_KEYS = ("items", "metadata", "jobs", "jobSummaryList", "jobQueues", "events", "tasks", "taskArns", "clusterArns")
_KEYS += ("State", "Config", "taskDefinition", "status", "spec")
REPLIES = [
    b"<html><body>It works!</body></html>",
    b"",
    b"null",
    b"[1, null]",
    b'[{"Id": 5, "type": 5, "submission_id": 5}]',
    b"{}",
    b'{"jobs": [{"jobId": "x", "status": ',
    b"[" * 10_000,
    *(json.dumps(dict.fromkeys(_KEYS, value)).encode() for value in (None, "abc", [1], [{}])),
    b'{"type": "SUBMISSION", "submission_id": "x", "status": {"a": 1}, "start_time": 1e30}',
    b'{"Id": "x", "State": {"Status": "exited", "ExitCode": "many"}}',
    b'{"jobs": [{"jobId": "x", "status": 5, "createdAt": "today", "container": []}]}',
    b'{"tasks": [{"taskArn": 5}], "clusterArns": ["c"], "taskArns": ["t"]}',
    b'{"metadata": {"name": "x", "uid": "u", "creationTimestamp": "today"}, "spec": {}, "status": {}}',
]


class Server:
    """A server that gives every request the same reply."""

    def __init__(self) -> None:
        self.reply = b""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                self.send_response(200)
                self.send_header("content-length", str(len(server.reply)))
                self.end_headers()
                self.wfile.write(server.reply)

            do_GET = do_POST  # noqa: N815 - the name that the base class calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server."""
    server = Server()
    yield server
    server.close()


def _kubernetes(url: str, directory: Path) -> JobService:
    kubeconfig = directory / "kubeconfig"
    context = {"name": "x", "context": {"cluster": "c"}}
    clusters = [{"name": "c", "cluster": {"server": url}}]
    kubeconfig.write_text(json.dumps({"clusters": clusters, "contexts": [context], "current-context": "x"}))
    return KubernetesService("k", KubernetesOptions(kubeconfig=kubeconfig, requests_per_second=1e5), environ={})


def _batch(url: str, _: Path) -> JobService:
    return BatchService("b", BatchOptions(endpoint_url=url, requests_per_second=1e5), region=REGION, environ={})


def _ecs(url: str, _: Path) -> JobService:
    return EcsService("e", EcsOptions(endpoint_url=url, requests_per_second=1e5), region=REGION, environ={})


def _ray(url: str, _: Path) -> JobService:
    return RayService("r", RayOptions(base_url=url, requests_per_second=1e5, timeout=2))


def _docker(url: str, _: Path) -> JobService:
    return DockerService("d", DockerOptions(host=url))


@pytest.mark.parametrize(
    ("make", "job_id"), [(_kubernetes, "n/x:u"), (_batch, "x"), (_ecs, "c/x"), (_ray, "x"), (_docker, "x")]
)
def test_every_reply_of_another_form_is_an_error_of_services(
    server: Server,
    make: Callable[[str, Path], JobService],
    job_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page of a proxy, half a reply, other types: no error of Python, and no job that is said to be missing."""
    use_credentials(monkeypatch, tmp_path)

    async def run() -> None:
        async with aclosing(make(server.url, tmp_path)) as service:
            service.tries = 1
            calls: list[Callable[[], Any]] = [lambda: service.get_job(job_id), service.find_problems]
            calls += [lambda: first_of(service.list_jobs()), lambda: first_of(service.read_logs(job_id))]
            for server.reply in REPLIES:
                for call in calls:
                    try:
                        await call()
                    except JobNotFoundError:
                        assert server.reply.startswith(b"{"), server.reply
                    except ServiceError:
                        pass

    anyio.run(run)


async def first_of(pages: Any) -> None:
    """Read the first page."""
    async with aclosing(pages) as found:
        await anext(found, None)
