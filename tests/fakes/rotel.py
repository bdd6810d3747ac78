"""A real OpenTelemetry collector (rotel) as a process, forwarding everything to our own receiver.

    with Collector() as behind, Rotel(behind) as rotel:
        ...                                  # send to rotel.http_url or rotel.grpc_url (no /v1/...)
        behind.wait_until(lambda: len(behind.log_records()) == 5)

Rotel answers 200 even when what is behind it is dead, so refusals are tested against `tests.fakes.collector` instead.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from tests.fakes.collector import Collector
from tests.ports import free_port

_READY_TIMEOUT_S = 30.0


@cache
def rotel_binary() -> Path | None:
    """Return the installed collector, or None where there is no wheel for this platform or its program cannot start.

    The program needs the shared library of its Python, which some builds of Python do not have.
    """
    found = importlib.util.find_spec("rotel")
    binary = Path(found.origin).with_name("rotel-agent") if found and found.origin else None
    if binary is None or not binary.exists():
        return None
    return binary if subprocess.run([binary, "--version"], capture_output=True).returncode == 0 else None


class Rotel:
    """See the module's docstring. Killed when the ``with`` is left.

    Attributes:
        http_url: Base URL of its OTLP/HTTP receiver.
        grpc_url: Base URL of its OTLP/gRPC receiver.
    """

    def __init__(self, behind: Collector) -> None:
        self._behind = behind
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="rotel-")
        self.http_url = ""
        self.grpc_url = ""

    def __enter__(self) -> Rotel:
        # Another process may take a free port before rotel binds it; then rotel exits, and we try other ports.
        for _ in range(5):
            if self._start():
                return self
        output = Path(self._directory.name, "output").read_text(errors="replace")
        self.__exit__()
        raise RuntimeError(f"rotel did not start: {output[-2000:]}")

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._directory.cleanup()

    def _start(self) -> bool:
        binary = rotel_binary()
        assert binary is not None, "rotel is not installed"
        http, grpc = free_port(), free_port()
        self.http_url, self.grpc_url = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{grpc}"
        with Path(self._directory.name, "output").open("wb") as output:
            self._process = subprocess.Popen(
                [
                    binary, "start",
                    "--otlp-http-endpoint", f"127.0.0.1:{http}",
                    "--otlp-grpc-endpoint", f"127.0.0.1:{grpc}",
                    "--exporter", "otlp",
                    "--otlp-exporter-protocol", "http",
                    "--otlp-exporter-endpoint", self._behind.http_url,
                    "--batch-timeout", "100ms",
                    "--pid-file", str(Path(self._directory.name, "pid")),
                    "--log-file", str(Path(self._directory.name, "log")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory.name,
                env={name: value for name, value in os.environ.items() if not name.startswith(("ROTEL_", "OTEL_"))},
            )  # fmt: skip
        deadline = time.monotonic() + _READY_TIMEOUT_S
        waiting = [http, grpc]
        while waiting and time.monotonic() < deadline:
            if _listens(waiting[0]):
                waiting.pop(0)
                continue
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            return False
        if waiting:
            self._process.kill()
            self._process.wait()
        return not waiting


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
