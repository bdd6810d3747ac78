"""What the tests of all orchestrators share: a server in an environment of its own, a proxy before it, and the agent.

The agent's records pass through a real OpenTelemetry Collector where one is built (`tests/stores/build.sh`, or
``COLLECTOR_BIN``), and end in the tests' own, which is compared with what the server's API says.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest

from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import LogRow, SpanRow
from tests.stores import programs

__all__ = ["ListedLine", "Orchestrator", "Proxy", "Relay", "by_task", "programs_of", "results", "texts"]

ListedLine = tuple[int, str, int, str]
"""Time in us, text, severity and task of a line."""

_READY_S = 600.0
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


def programs_of(name: str, program: str) -> Path:
    """Return where the programs of a service's environment are; skip the test if it is not installed."""
    found = Path(os.environ.get(f"{name.upper()}_ENVIRONMENT") or Path(sys.prefix) / name) / "bin"
    if not (found / program).exists():
        pytest.skip(f"{name} is not installed in {found}: make test-services SERVICES={name}")
    return found


class Orchestrator:
    """A real server and the programs of its environment, with a directory of its own. A context manager.

    Attributes:
        directory: Where all its files are.
        env: Environment of its programs.
    """

    def __init__(self, name: str, directory: Path, env: Mapping[str, str], *, program: str = "") -> None:
        self.directory = directory
        self._programs = programs_of(name, program or name)
        path = f"{self._programs}:{os.environ.get('PATH', os.defpath)}"
        self.env = {**os.environ, "HOME": str(directory), "PATH": path, **env}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program of the environment, in a process group that ends with this server."""
        with (self.directory / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [self._programs / program, *arguments],
                env=self.env,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def wait_until(self, holds: Callable[[], object], what: str, timeout_s: float = _READY_S) -> None:
        """Wait for a condition; the failure shows the end of the server's log."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if holds():
                    return
            log = (self.directory / "server.log").read_text(errors="replace")
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s: {log[-3000:]}"
            time.sleep(0.5)


class Proxy:
    """Passes requests on to a server, except those that it refuses: 429 now and then, and tokens that expire.

    Attributes:
        url: Where it listens.
        refused: How many requests it has refused, by status.
        tunnels: How many WebSockets it has passed on.
    """

    def __init__(
        self, target: str, *, busy_each: int = 0, expire_each: int = 0, token_file: Path | None = None
    ) -> None:
        """Start.

        Args:
            target: The server's URL, without a path.
            busy_each: Each such request is answered by 429 with ``Retry-After: 1``; 0: none.
            expire_each: After this many requests with a token, the token is not accepted any more; 0: never.
            token_file: Has the present token; another one before a request with an expired token is refused.
        """
        self.refused: Counter[int] = Counter()
        self.tunnels = 0
        self._requests = 0
        self._uses: Counter[str] = Counter()
        self._token_file = token_file
        self._tokens = 0
        self._write_token()
        self._busy_each, self._expire_each = busy_each, expire_each
        self._lock = threading.Lock()
        host = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.headers.get("upgrade") == "websocket":
                    proxy._tunnel(self, host)
                else:
                    self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            def do_PATCH(self) -> None:
                self._pass_on()

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                token = self.headers.get("authorization", "")
                status = proxy._refusal(token)
                if status:
                    self._send(status, {"retry-after": "1"}, b'{"detail": "refused by the proxy"}')
                    return
                server = http.client.HTTPConnection(host, timeout=120)
                with contextlib.closing(server):
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                    server.request(self.command, self.path, body, headers)
                    answer = server.getresponse()
                    own = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
                    self._send(answer.status, own, answer.read())

            def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent was killed
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _refusal(self, token: str) -> int:
        """Return the status by which a request is refused; 0 for one that is not."""
        with self._lock:
            self._requests += 1
            self._uses[token] += 1
            status = 0
            if token and self._expire_each and self._uses[token] > self._expire_each:
                status = 401
                if token.endswith(f" token-{self._tokens}"):
                    self._write_token()
            elif self._busy_each and self._requests % self._busy_each == 0:
                status = 429
            self.refused[status] += 1
            return status

    def _write_token(self) -> None:
        self._tokens += 1
        if self._token_file is not None:
            self._token_file.write_text(f"token-{self._tokens}")

    def _tunnel(self, request: BaseHTTPRequestHandler, host: str) -> None:
        """Pass a WebSocket on, until one side ends it."""
        request.close_connection = True
        name, _, port = host.partition(":")
        headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items() if name.lower() != "host")
        with socket.create_connection((name, int(port))) as server:
            server.sendall(f"GET {request.path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode())
            self.tunnels += 1
            back = threading.Thread(target=_copy, args=(server, request.connection), daemon=True)
            back.start()
            _copy(request.connection, server)
            back.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until one side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Relay:
    """Agents that follow all jobs of a service, one after the other. A context manager.

    Attributes:
        config: Their configuration file.
        collector: Where their records arrive in the end.
    """

    def __init__(self, name: str, section: str, collector: Collector, directory: Path) -> None:
        """Write the configuration.

        Args:
            name: The service's configured name.
            section: The keys of its section.
            collector: As the attribute.
            directory: For the agents' files.
        """
        self.collector = collector
        self.config = directory / "config.toml"
        self._agent: subprocess.Popen[bytes] | None = None
        self._log = directory / "agent.log"
        self._stack = contextlib.ExitStack()
        endpoint = collector.http_url
        built = Path(programs.__file__).parents[2] / ".venv" / "stores" / "bin" / "collector"
        if os.environ.get("COLLECTOR_BIN") or shutil.which(built):
            gateway = self._stack.enter_context(programs.Collector(directory / "gateway", collector.http_url))
            endpoint = gateway.otlp_url
        self.config.write_text(
            f'[services.{name}]\n{section}\n[agent]\nstate_dir = "{directory}/agent"\nlisten = ""\n'
            f'[[agent.watch]]\nservice = "{name}"\ndiscover = true\nlookback = "1d"\n[otlp]\nendpoint = "{endpoint}"\n'
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
        self._stack.close()

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start an agent."""
        program = "from tailspan.cli import main; main()"
        with self._log.open("ab") as log:
            self._agent = subprocess.Popen(
                [sys.executable, "-c", program, "agent", "run", *options, "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self._agent

    def interrupt(self, number: signal.Signals, *, after_lines: int = 5) -> None:
        """Run an agent until some more lines have arrived, then end it by a signal."""
        agent = self.start()
        seen = len(self.collector.log_records())
        deadline = time.monotonic() + _READY_S
        while len(self.collector.log_records()) < seen + after_lines:
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            assert agent.poll() is None, self._log.read_text()[-2000:]
            time.sleep(0.1)
        agent.send_signal(number)
        agent.wait()

    def finish(self) -> None:
        """Relay what is left of ended jobs."""
        assert self.start("--once", "--timeout", "300").wait() == 0, self._log.read_text()[-3000:]

    def lines(self) -> Counter[ListedLine]:
        """Return the lines that arrived, each uid once."""
        return _line_counts(self.collector)

    def wait_for(self, expected: Counter[ListedLine]) -> None:
        """Wait until the expected lines are there; fail if other ones are."""
        with contextlib.suppress(TimeoutError, AssertionError):
            self.collector.wait_until(lambda: self.lines() == expected, 60)
        found = self.lines()
        missing, extra = expected - found, found - expected
        assert (list(missing)[:20], list(extra)[:20]) == ([], []), f"{missing.total()} missing, {extra.total()} extra"

    def spans(self, *, runs: int, attempts: int) -> dict[str, SpanRow]:
        """Wait for the spans of a number of runs and attempts of tasks, and return all that arrived.

        A real Collector forwards spans apart from lines. A span that came again must be the same.
        """

        def are_there() -> bool:
            found = {span.span_id: span for span in self.collector.spans()}
            of_tasks = sum("tailspan.task.id" in span.attributes for span in found.values())
            return len(results(found)) >= runs and of_tasks >= attempts

        with contextlib.suppress(TimeoutError):
            self.collector.wait_until(are_there, 60)
        found: dict[str, SpanRow] = {}
        for span in self.collector.spans():
            assert found.setdefault(span.span_id, span) == span
        return found


def _line_counts(collector: Collector) -> Counter[ListedLine]:
    """Return time, text, severity and task of the lines that arrived, each uid once."""
    rows: dict[Any, LogRow] = {}
    for row in collector.log_records():
        if not row.event_name:
            rows[row.attributes["log.record.uid"]] = row
    return Counter(
        (
            row.time_unix_nano // 1000,
            row.body,
            row.severity_number,
            row.attributes.get("cicd.pipeline.task.name", ""),
        )
        for row in rows.values()
    )


def texts(collector: Collector) -> Counter[tuple[str, str]]:
    """Return job name and text of the lines that arrived, each uid once: for services whose lines have no times."""
    rows = {
        row.attributes["log.record.uid"]: (row.resource["service.name"], row.body)
        for row in collector.log_records()
        if not row.event_name
    }
    return Counter(rows.values())


def by_task(spans: Mapping[str, SpanRow]) -> dict[tuple[str, str, int], SpanRow]:
    """Return the spans of tasks by run, task id and attempt; an attempt has one span."""
    found: dict[tuple[str, str, int], SpanRow] = {}
    for span in spans.values():
        if "tailspan.task.id" in span.attributes:
            key = (
                span.attributes["cicd.pipeline.run.id"],
                span.attributes["tailspan.task.id"],
                span.attributes["tailspan.task.attempt"],
            )
            assert key not in found
            found[key] = span
    return found


def results(spans: Mapping[str, SpanRow]) -> dict[str, str]:
    """Return the result of each run by its id."""
    roots = [span for span in spans.values() if span.name.startswith("RUN ")]
    return {span.attributes["cicd.pipeline.run.id"]: span.attributes["cicd.pipeline.result"] for span in roots}
