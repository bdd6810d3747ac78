"""The real stores as child processes, on free ports of loopback, with their data in a directory.

with Jaeger(tmp_path) as jaeger:
    ...                 # send to jaeger.otlp_url
    jaeger.restart()    # SIGKILL, then a new process with the same ports and data
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from tests.fakes.collector import Reply, Request
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".venv" / "stores" / "bin"
"""Where ``make stores`` puts what it builds."""
_READY_S = 60.0
_ANSWER_S = 120.0
_FIRST_PAGE, _MAX_PAGE, _PAGE_BYTES = 10, 1_000, 2 << 20


def program(name: str) -> str:
    """Return the path of a store's program; skip the test if it is not there.

    Args:
        name: Its name. A variable such as ``JAEGER_BIN`` overrides what ``tests/stores/build.sh`` has built.
    """
    found = built(name)
    if found is None:
        pytest.skip(f"{name} is not built: run tests/stores/build.sh, or set {_variable(name)}")
    return found


def built(name: str) -> str | None:
    """Return the path of a store's program, or None if it is not there; see `program`."""
    return os.environ.get(_variable(name)) or shutil.which(str(BUILT / name))


def _variable(name: str) -> str:
    return name.upper().replace("-", "_") + "_BIN"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = _READY_S) -> None:
    """Wait until a condition holds.

    Args:
        condition: Checked every 100 ms.
        what: What is expected, for the failure.
        timeout_s: Most seconds to wait.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def fetch(url: str, data: dict[str, str] | None = None) -> str:
    """Return the body of an answer; the text of an error if the server answers with one."""
    body = urllib.parse.urlencode(data).encode() if data is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=_ANSWER_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return str(error.read().decode())


class Program:
    """A store that runs until the block ends.

    Args:
        home: Directory of its data and its log.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.command = self.prepare()
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> Sequence[str]:
        """Write the configuration; return the command."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Return whether the program answers requests."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the program and wait until it is ready."""
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environ())
        wait_for(self._answers, f"{self.command[0]} is ready; see {self.home / 'log'}")

    def environ(self) -> dict[str, str]:
        """Return the environment of the program."""
        return dict(os.environ)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "log").read_text()[-3000:]
        try:
            return self.ready()
        except OSError:
            return False

    def kill(self) -> None:
        """End the program with SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill the program and start it again with the same ports and data."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()


class Jaeger(Program):
    """Jaeger v2 with its memory store: a restart loses everything.

    Attributes:
        otlp_url: OTLP over HTTP.
    """

    def prepare(self) -> Sequence[str]:
        """See `Program`."""
        self._otlp, self._query = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.otlp_url = f"http://{self._otlp}"
        config = {
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
            "extensions": {
                "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 10_000}}}},
                "jaeger_query": {
                    "storage": {"traces": "memory"},
                    "http": {"endpoint": self._query},
                    "grpc": {"endpoint": f"127.0.0.1:{free_port()}"},
                },
            },
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": self._otlp}}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
        }
        path = self.home / "jaeger.yaml"
        path.write_text(yaml.safe_dump(config))
        return [program("jaeger"), "--config", str(path)]

    def ready(self) -> bool:
        """See `Program`."""
        return "data" in json.loads(self.get("services"))

    def get(self, path: str, **parameters: str) -> str:
        """Return an answer of the query API."""
        return fetch(f"http://{self._query}/api/{path}?{urllib.parse.urlencode(parameters)}")

    def traces(self, service: str, **parameters: str) -> list[dict[str, Any]]:
        """Return the traces that a search finds."""
        found = json.loads(self.get("traces", service=service, lookback="1h", limit="100", **parameters))
        return list(found["data"] or ())

    def trace(self, trace_id: str) -> dict[str, Any]:
        """Return one trace; empty if Jaeger does not have it."""
        data = json.loads(self.get(f"traces/{trace_id}"))["data"]
        return dict(data[0]) if data else {}


class VictoriaLogs(Program):
    """VictoriaLogs, one node.

    Attributes:
        logs_url: The OTLP endpoint for logs.
    """

    def prepare(self) -> Sequence[str]:
        """See `Program`."""
        self._address = f"127.0.0.1:{free_port()}"
        self.logs_url = f"http://{self._address}/insert/opentelemetry/v1/logs"
        data = f"-storageDataPath={self.home / 'data'}"
        listen = f"-httpListenAddr={self._address}"
        return [program("victoria-logs"), data, listen, "-retentionPeriod=30d", "-inmemoryDataFlushInterval=1s"]

    def ready(self) -> bool:
        """See `Program`."""
        return fetch(f"http://{self._address}/health") == "OK"

    def query(self, text: str) -> list[dict[str, str]]:
        """Return the rows of a LogsQL query."""
        answer = fetch(f"http://{self._address}/select/logsql/query", {"query": text})
        return [json.loads(line) for line in answer.splitlines()]


class Loki(Program):
    """Loki in one process, with its default limits for what it takes.

    Called with a request of a test's collector, it stores the request and returns its own answer, so that the cases of
    the double `tests.fakes.loki.Loki` run with it, too.

    Attributes:
        rejected: Number of requests that were not fully accepted, by status; without those that only had to wait.
    """

    def prepare(self) -> Sequence[str]:
        """See `Program`."""
        self.rejected = Counter[str]()
        self._address = f"127.0.0.1:{free_port()}"
        config = yaml.safe_load((ROOT / "deploy" / "stores" / "loki.yaml").read_text())
        config["server"] = {
            "http_listen_address": "127.0.0.1",
            "http_listen_port": int(self._address.rpartition(":")[2]),
            "grpc_listen_address": "127.0.0.1",
            "grpc_listen_port": free_port(),
        }
        config["common"] |= {"path_prefix": str(self.home), "instance_addr": "127.0.0.1"}
        config["common"]["storage"]["filesystem"] = {
            "chunks_directory": str(self.home / "chunks"),
            "rules_directory": str(self.home / "rules"),
        }
        config["compactor"]["working_directory"] = str(self.home / "compactor")
        config["limits_config"] = {"allow_structured_metadata": True, "split_queries_by_interval": "0s"}
        config["query_range"] = {"parallelise_shardable_queries": False}
        config["compactor"].pop("retention_enabled")
        path = self.home / "loki.yaml"
        path.write_text(yaml.safe_dump(config))
        return [program("loki"), f"-config.file={path}"]

    def ready(self) -> bool:
        """See `Program`."""
        return fetch(f"http://{self._address}/ready").strip() == "ready"

    def __call__(self, request: Request) -> Reply:
        """Send a request on to Loki, and return Loki's answer."""
        headers = {"content-type": "application/x-protobuf"}
        own = urllib.request.Request(f"http://{self._address}/otlp/v1/logs", request.payload, headers)
        try:
            with urllib.request.urlopen(own, timeout=_ANSWER_S) as answer:
                return Reply(answer.status, body=answer.read())
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.TOO_MANY_REQUESTS:
                self.rejected[str(error.code)] += 1
            return Reply(error.code, body=error.read())

    def lines(self, service_name: str = "", **labels: str) -> list[str]:
        """Return the stored lines in order of time; see `tests.fakes.loki.Loki.lines`."""
        text = f'{{service_name="{service_name}"}}' if service_name else '{service_name=~".+"}'
        text += "".join(f' | {key}="{value}"' for key, value in labels.items())
        found: list[tuple[int, str]] = []
        start_ns, limit = int((time.time() - 20 * 86400) * 1e9), _FIRST_PAGE
        while page := self._page(text, start_ns, limit):
            if len(page) < limit:
                return [line for _, line in found + page]
            # Of the last moment, the page may lack lines: the next page begins with it.
            start_ns = page[-1][0]
            found += [entry for entry in page if entry[0] < start_ns]
            limit = max(_FIRST_PAGE, min(_MAX_PAGE, _PAGE_BYTES // max(len(line) for _, line in page)))
        return [line for _, line in found]

    def query(self, text: str) -> list[str]:
        """Return the first lines of the last days that a query finds."""
        return [line for _, line in self._page(text, int((time.time() - 20 * 86400) * 1e9), _FIRST_PAGE)]

    def count(self, text: str) -> float:
        """Return how many lines of the last hour a query finds, or the sum of a metric's values."""
        span = {"start": str(int(time.time()) - 3600), "end": str(int(time.time()) + 60), "step": "60", "limit": "1000"}
        parameters = urllib.parse.urlencode({"query": text, **span})
        answer = fetch(f"http://{self._address}/loki/api/v1/query_range?{parameters}")
        assert answer.startswith("{"), f"{text}: {answer}"
        data = json.loads(answer)["data"]
        values = [value for one in data["result"] for value in one["values"]]
        return sum(float(value) for _, value in values) if data["resultType"] == "matrix" else len(values)

    def _page(self, text: str, start_ns: int, limit: int) -> list[tuple[int, str]]:
        """Return lines with their times: an answer has to fit into 4 MiB between Loki's parts, too."""
        span = {"start": str(start_ns), "end": str(int(time.time()) + 60)}
        query = {"query": text, "limit": str(limit), "direction": "forward", **span}
        answer = fetch(f"http://{self._address}/loki/api/v1/query_range?{urllib.parse.urlencode(query)}")
        streams = json.loads(answer)["data"]["result"]
        return sorted(((int(entry[0]), entry[1]) for stream in streams for entry in stream["values"]), key=_moment)


def _moment(entry: tuple[int, str]) -> int:
    return entry[0]


class Tempo(Program):
    """Tempo in one process.

    Attributes:
        otlp_url: OTLP over HTTP.
    """

    def prepare(self) -> Sequence[str]:
        """See `Program`."""
        self._address, otlp, grpc, own = (f"127.0.0.1:{free_port()}" for _ in range(4))
        self.otlp_url = f"http://{otlp}"
        text = (ROOT / "deploy" / "stores" / os.environ.get("TEMPO_CONFIG", "tempo-3.yaml")).read_text()
        text = text.replace("0.0.0.0:4318", otlp).replace("0.0.0.0:4317", grpc)
        config = yaml.safe_load(text.replace("/var/tempo", str(self.home)))
        config["server"] = {
            "http_listen_address": "127.0.0.1",
            "http_listen_port": int(self._address.rpartition(":")[2]),
            "grpc_listen_address": "127.0.0.1",
            "grpc_listen_port": int(own.rpartition(":")[2]),
        }
        config["distributor"].pop("max_attribute_bytes", None)  # the default cuts at 2,048 bytes
        path = self.home / "tempo.yaml"
        path.write_text(yaml.safe_dump(config))
        return [program("tempo"), f"-config.file={path}"]

    def ready(self) -> bool:
        """See `Program`."""
        return fetch(f"http://{self._address}/ready").strip() == "ready"

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """Return an answer of the query API; empty for an error."""
        answer = fetch(f"http://{self._address}/api/{path}?{urllib.parse.urlencode(parameters)}")
        try:
            return dict(json.loads(answer))
        except ValueError:
            return {}

    def spans(self, trace_id: str) -> dict[str, dict[str, Any]]:
        """Return the spans of a trace by name."""
        trace = self.get(f"v2/traces/{trace_id}").get("trace", {})
        groups = [scope for resource in trace.get("resourceSpans", ()) for scope in resource["scopeSpans"]]
        return {span["name"]: span for scope in groups for span in scope["spans"]}


class Collector(Program):
    """An OpenTelemetry Collector with the project's gateway configuration.

    Args:
        home: Directory of its data and its log.
        backend_url: Where it sends.

    Attributes:
        otlp_url: OTLP over HTTP.
    """

    def __init__(self, home: Path, backend_url: str) -> None:
        self._backend_url = backend_url
        super().__init__(home)

    def prepare(self) -> Sequence[str]:
        """See `Program`."""
        self._health, otlp, grpc = (f"127.0.0.1:{free_port()}" for _ in range(3))
        self.otlp_url = f"http://{otlp}"
        text = (ROOT / "deploy" / "collector" / "gateway.yaml").read_text()
        text = text.replace("0.0.0.0:13133", self._health)
        text = text.replace("0.0.0.0:4317", grpc).replace("0.0.0.0:4318", otlp)
        text += "  telemetry:\n    metrics:\n      level: none\n"
        path = self.home / "gateway.yaml"
        path.write_text(text)
        return [program("collector"), "--config", str(path)]

    def environ(self) -> dict[str, str]:
        """See `Program`."""
        gateway = {"BACKEND_ENDPOINT": self._backend_url, "BACKEND_AUTHORIZATION": "Bearer x"}
        return dict(os.environ) | gateway | {"QUEUE_DIRECTORY": str(self.home / "queue")}

    def ready(self) -> bool:
        """See `Program`."""
        return "available" in fetch(f"http://{self._health}/").lower()
