"""Containers of a real Podman, relayed by a real agent: equal to what the containers wrote.

As root, with podman and runc of the system; the image consists of the system's busybox, since no registry is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailspan import Client, load_settings
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import SpanRow
from tests.orchestrators.harness import Relay

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

APPLETS = ("sh", "echo", "sleep", "cat", "seq", "head", "tr", "printf", "kill", "true", "[")
CONFIG = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "none"
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
WORK = "for i in $(seq $0); do echo out $i; echo err $i >&2; sleep 0.05; done; printf 'no newline'; exit $1"
# The lines come just before the removal, once the log is followed.
SHORT = (
    "echo ready $0; until [ -e /mnt/go ]; do sleep 0.1; done; "
    "for i in $(seq 30); do echo $0 $i; done; printf 'end of %s' $0; exit $1"
)
REMOVED = 20


class Podman:
    """A Podman with its service, in a directory of its own. A context manager."""

    def __init__(self, directory: Path) -> None:
        programs = {name: shutil.which(name) for name in ("podman", "runc", "busybox")}
        missing = [name for name, found in programs.items() if found is None]
        if missing or os.geteuid() != 0:
            pytest.skip(f"a real Podman needs root and {', '.join(missing) or 'nothing else'}")
        self._directory = directory
        self._busybox = str(programs["busybox"])
        self.socket = directory / "api.sock"
        self._config = directory / "containers.conf"
        self._config.write_text(CONFIG)
        self._service: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Podman:
        image = self._directory / "image.tar"
        with tarfile.open(image, "w") as tar:
            tar.add(Path(self._busybox).resolve(), "bin/busybox")
            for name in APPLETS:
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        self.run("import", str(image), "localhost/box:1")
        log = (self._directory / "service.log").open("wb")
        with log:
            self._service = subprocess.Popen(
                [*self._command(), "system", "service", "--time=0", f"unix://{self.socket}"],
                env=self._env(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            assert time.monotonic() < deadline, (self._directory / "service.log").read_text()
            time.sleep(0.05)
        try:
            self.run("run", "--rm", "localhost/box:1", "true")
        except AssertionError as error:
            self.__exit__()
            pytest.skip(f"containers do not run here: {str(error)[-300:]}")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError):
            self.run("rm", "--all", "--force", "--time=0")
        if self._service is not None:
            self._service.kill()
            self._service.wait()

    def run(self, *arguments: str) -> str:
        """Run a command of podman and return what it printed."""
        command = [*self._command(), *arguments]
        ended = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, f"{command}: {ended.stderr[-2000:]}"
        return ended.stdout.strip()

    def start(self, *command: str, name: str, remove: bool = False, options: tuple[str, ...] = ()) -> str:
        """Start a container and return its id."""
        rest = ("--rm",) if remove else ()
        return self.run(
            "run", "--detach", f"--name={name}", "--label=job", *rest, *options, "localhost/box:1", *command
        )

    def start_removed(self, shared: Path) -> dict[str, int]:
        """Start containers that are removed at their end; return their numbers by id."""
        mount = (f"--volume={shared}:/mnt",)
        found = {}
        for number in range(REMOVED):
            arguments = "sh", "-c", SHORT, str(number), str(number % 3)
            found[self.start(*arguments, name=f"removed-{number}", remove=True, options=mount)] = number
        return found

    def written(self, container_id: str) -> Counter[tuple[str, str, str]]:
        """Return id, stream and text of the lines in the container's own log file, parts of one line joined."""
        path = self.run("inspect", "--format", "{{.HostConfig.LogConfig.Path}}", container_id)
        found: Counter[tuple[str, str, str]] = Counter()
        parts: dict[str, str] = {}
        for line in Path(path).read_text().splitlines():
            _, stream, flag, text = line.split(" ", 3)
            whole = parts.pop(stream, "") + text
            if flag == "F":
                found[container_id, stream, whole] += 1
            else:
                parts[stream] = whole
        for stream, rest in parts.items():
            found[container_id, stream, rest] += 1
        return found

    def _command(self) -> list[str]:
        place = self._directory
        folders = [f"--root={place}/root", f"--runroot={place}/run", f"--tmpdir={place}/tmp"]
        return ["podman", *folders, "--storage-driver=vfs"]

    def _env(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self._config)}


@pytest.fixture
def podman() -> Iterator[Podman]:
    """A Podman; it takes no directory of more than 50 characters."""
    with tempfile.TemporaryDirectory(prefix="tailspan-") as directory, Podman(Path(directory)) as podman:
        yield podman


def relayed(collector: Collector) -> Counter[tuple[str, str, str]]:
    """Return id, stream and text of the lines that arrived, each uid once."""
    rows = {row.attributes["log.record.uid"]: row for row in collector.log_records() if not row.event_name}
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows.values():
        run = row.attributes.get("cicd.pipeline.run.id") or row.resource["cicd.pipeline.run.id"]
        found[run, row.attributes.get("log.iostream", ""), row.body] += 1
    return found


def run_spans(collector: Collector) -> dict[str, SpanRow]:
    """Return the newest run span of each job."""
    spans = [span for span in collector.spans() if span.name.startswith("RUN ")]
    return {span.attributes["cicd.pipeline.run.id"]: span for span in spans}


def expected_lines(podman: Podman, ids: dict[str, str], removed: dict[str, int]) -> Counter[tuple[str, str, str]]:
    """Return the lines of the containers that are left, by their own files, and of the removed ones."""
    expected = Counter({(ids["terminal"], "", text): 1 for text in ("one", "two")})
    for name, container_id in ids.items():
        if name != "terminal":
            expected += podman.written(container_id)
    for container_id, number in removed.items():
        expected += Counter({(container_id, "stdout", f"{number} {line}"): 1 for line in range(1, 31)})
        expected[container_id, "stdout", f"end of {number}"] += 1
        expected[container_id, "stdout", f"ready {number}"] += 1
    return expected


def test_all_lines_states_and_attempts(podman, tmp_path):
    """Agents that are stopped and killed in between, containers that are removed at their end: each line once."""
    shared = tmp_path / "shared"
    shared.mkdir()
    section = f'host = "unix://{podman.socket}"\nlabels = ["job"]'
    with Collector() as collector, Relay("docker", section, collector, tmp_path) as relay:
        ids = {"work": podman.start("sh", "-c", WORK, "100", "3", name="work")}
        relay.interrupt(signal.SIGTERM)
        many = "for i in $(seq 20000); do echo many $i; done; head -c 50000 /dev/zero | tr '\\0' y; echo; echo after"
        ids["many"] = podman.start("sh", "-c", many, name="many")
        relay.interrupt(signal.SIGKILL, after_lines=500)
        agent = relay.start()
        endless = "while echo on; do sleep 0.2; done"
        ids["stopped"] = podman.start("sh", "-c", f"trap 'exit 143' TERM; {endless}", name="stopped")
        collector.wait_until(lambda: any(row.body == "on" for row in collector.log_records()), 60)
        again = ("--restart=on-failure:2",)
        ids["again"] = podman.start("sh", "-c", "echo try; exit 4", name="again", options=again)
        ids["terminal"] = podman.start("sh", "-c", "echo one; echo two", name="terminal", options=("--tty",))
        removed = podman.start_removed(shared)
        collector.wait_until(lambda: sum(text.startswith("ready") for _, _, text in relayed(collector)) == REMOVED, 120)
        (shared / "go").touch()
        podman.run("stop", "stopped")
        collector.wait_until(lambda: len(run_spans(collector)) == len(ids) + REMOVED, 180)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait() == 0
        relay.finish()
        expected = expected_lines(podman, ids, removed)
        with contextlib.suppress(TimeoutError):
            collector.wait_until(lambda: relayed(collector) == expected, 60)
        found = relayed(collector)
        assert (list((expected - found).items())[:10], list((found - expected).items())[:10]) == ([], [])
        spans = run_spans(collector)
    results = {job_id: span.attributes["cicd.pipeline.result"] for job_id, span in spans.items()}
    names = {"work": "failure", "many": "success", "stopped": "cancellation", "again": "failure", "terminal": "success"}
    assert {name: results[container_id] for name, container_id in ids.items()} == names
    assert {results[one] for one, number in removed.items() if number % 3} == {"failure"}
    assert {results[one] for one, number in removed.items() if not number % 3} == {"success"}
    assert spans[ids["work"]].attributes["process.exit.code"] == 3
    assert {spans[one].attributes["process.exit.code"] for one in removed} == {0, 1, 2}
    with Client(load_settings(relay.config)) as client:
        assert client.get_status(ids["again"], service="docker").attempt == 3
    shown = podman.run(
        "inspect", "--format", "{{.State.StartedAt.UnixNano}} {{.State.FinishedAt.UnixNano}}", ids["work"]
    )
    started_ns, finished_ns = map(int, shown.split())
    span = spans[ids["work"]]
    assert abs(span.end_unix_nano - finished_ns) < 1_000_000_000
    assert span.start_unix_nano <= started_ns + 1_000


def test_a_container_is_stopped_by_cancel(podman, tmp_path):
    """The verb stops the container; an ended one stays as it is."""
    config = tmp_path / "config.toml"
    config.write_text(f'[services.docker]\nhost = "unix://{podman.socket}"\nnames = ["end*"]\n')
    podman.start("sh", "-c", "trap 'exit 0' TERM; while echo on; do sleep 0.2; done", name="endless")
    with Client(load_settings(config)) as client:
        job = next(iter(client.list_jobs(service="docker")))
        assert client.cancel(job).state == "CANCELED"
        assert client.cancel(job).error == "the container was stopped"
