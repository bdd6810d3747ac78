"""Bytes sent to the job API over real local jobs: an HTTP answer or a closed connection, no other file, never 500."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.services.local import LocalService
from tests.fakes.scripted_service import RunningServer, serving
from tests.property.effort import fuzz

JOB = "20260101-000000000-aaaaaa"
SECRET = b"not for you"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The job API over a store with one job, beside files that are none of its business."""
    home = tmp_path_factory.mktemp("home")
    for path in ("secret", "state/secret", "state/jobs/secret", "state/jobs/x/job.json", "state/jobs/x/log"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(SECRET)
    job = home / "state" / "jobs" / JOB
    job.mkdir()
    (job / "job.json").write_text('{"name": "etl"}')
    with serving(LocalService(state_dir=home / "state")) as running:
        yield running


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Another client of the server."""
    with httpx.Client(trust_env=False, verify=False) as opened:
        yield opened


SEGMENTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "%2e%2e",
        "%2E.",
        "..%2f..",
        "%2fetc%2fpasswd",
        "..%5c..",
        "x",
        JOB,
        f"{JOB}%00",
        f"{JOB}/../x",
        "secret",
        "%",
        "%ff",
        "%c0%ae",
    ]
) | st.text(max_size=8)
PREFIXES = [
    "/server/v1/run/by-id/",
    "/server/v1/logs/",
    "/server/v1/job/self",
    "/server/v1/",
    "/",
    "*",
    "http://x/server/v1/logs/",
]
QUERIES = [
    "",
    "?since_ms=1",
    "?since_ms=-9e9",
    "?since_ms=%00",
    "?skip=99999999999&limit=-1",
    "?since_ms=1&since_ms=2",
    "?" + "a" * 5000,
]
HEADERS = [
    b"Host: localhost",
    b"Host: evil.example",
    b"Host:",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 1e3",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Expect: 100-continue",
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Origin: null",
    b"Authorization: Bearer \xff",
    b"Range: bytes=0-",
    b"X: " + b"y" * 9000,
    b": x",
    b"Accept-Encoding: gzip",
    b"X-Forwarded-For: 127.0.0.1",
]
METHODS = [b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"get", b"G\0T"]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    path = draw(st.sampled_from(PREFIXES)) + "/".join(draw(st.lists(SEGMENTS, max_size=3)))
    target = (path + draw(st.sampled_from(["", "/cancel"])) + draw(st.sampled_from(QUERIES))).encode()
    headers = [*draw(st.lists(st.sampled_from(HEADERS), max_size=3)), b"Connection: close"]
    if draw(st.booleans()):
        headers.insert(0, b"Host: localhost")
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b""]))
    line = draw(st.sampled_from(METHODS)) + b" " + target + b" " + version
    return b"\r\n".join([line, *headers, b"", draw(st.binary(max_size=20))])


def answer(port: int, sent: bytes) -> bytes:
    """Send bytes, and the end of the stream where it is half a request; return what comes back."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(ConnectionError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(65536):
            received += data
    return received


@fuzz(150)
@given(sent=requests() | st.binary(min_size=1, max_size=200))
@example(sent=f"GET /server/v1/logs/{JOB}%2f..%2fx HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
@example(sent=b"GET /server/v1/logs/%2e%2e%2fsecret HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
@example(sent=b"GET /server/v1/logs/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
def test_any_bytes(server: RunningServer, client: httpx.Client, sent: bytes) -> None:
    """Nothing that is sent gets a file, a bug's answer, or permission for web pages; and the next client is served."""
    received = answer(server.port, sent)
    assert SECRET not in received
    assert received == b"" or re.match(rb"HTTP/1\.1 [1-4][0-9][0-9] ", received), received[:200]
    assert b"access-control" not in received.lower()
    assert client.get(f"{server.url}/run/by-id/{JOB}").json()["job_name"] == "etl"


@pytest.mark.parametrize(
    "path", ["run/by-id/x", "logs/x", "run/by-id/secret", "logs/..%2f..%2fsecret", f"logs/{JOB}%2f..%2fx"]
)
def test_other_directories_are_no_jobs(server: RunningServer, path: str) -> None:
    """What stands beside the jobs is not one, whatever it contains."""
    assert httpx.get(f"{server.url}/{path}").status_code == 404


def test_command_line_cannot_leave_the_store(tmp_path: Path) -> None:
    """The same ids from the command line's side; every method is shown in tests/unit/sdk/local/test_store.py."""
    from click.testing import CliRunner

    from tailspan.cli import main

    (tmp_path / "state" / "jobs" / "x").mkdir(parents=True)
    (tmp_path / "state" / "jobs" / "x" / "log").write_bytes(SECRET)
    env = {"TAILSPAN_SERVICES__LOCAL__STATE_DIR": str(tmp_path / "state")}
    for job_id in ("x", "../jobs/x", "..", str(tmp_path / "state" / "jobs" / "x")):
        for command in ("logs", "status", "cancel"):
            done = CliRunner().invoke(main, [command, job_id], env=env)
            assert done.exit_code == 4, done.output
            assert SECRET.decode() not in done.output
