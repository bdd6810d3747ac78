"""A world: a job service, real local jobs, an OTLP receiver, and the real agent as a process between them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tailspan_agent.checkpoint.store import Checkpoint, read_checkpoint
from tests.fakes.collector import Collector, Reply, Request
from tests.fakes.job_api import FakeJobApi
from tests.fakes.json_api import FakeJsonApi
from tests.fakes.local_jobs import LocalJobs
from tests.fakes.otlp_rows import metric_rows, parse_json, plain_attributes
from tests.fakes.scripted_service import serving
from tests.patience import Patience
from tests.ports import free_port
from tests.prove.found import Found
from tests.prove.jobs import Job, LocalNumberedJob, NumberedJob
from tests.prove.tally import Span, count_spans

TAILSPAN = os.environ.get("PROVE_TAILSPAN") or str(Path(sys.executable).with_name("tailspan"))
PATIENCE_S = 60.0
_SETTLE_S = 600.0
_RELOADED = "the configuration was"
_HIGH_WATER = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_RUN_DURATION = "cicd.pipeline.run.duration"

Service = TypeVar("Service", bound=FakeJsonApi)
Part = TypeVar("Part", bound=contextlib.AbstractContextManager[Any])


@dataclass
class Settings:
    """What differs between worlds.

    Attributes:
        protocol: Of the endpoint: ``http/protobuf`` or ``grpc``.
        otlp: More lines of the section ``[otlp]``. The default is a timeout that no answer exceeds on a busy machine: a
            request that times out may have arrived, and its lines come again.
        fused: More lines of the section ``[services.fused]``.
        watch: More lines of each ``[[agent.watch]]``.
        path: A directory with another ``tailspan_agent``; None: the project's own.
        page: Whether the agent serves its page, from which /metrics are read.
        endpoint: Where to send instead of the receiver.
        served: Whether the agent is elsewhere: the jobs of this machine reach it by the job API, as log pages.
    """

    protocol: str = "http/protobuf"
    otlp: str = 'timeout = "120s"'
    fused: str = ""
    watch: str = ""
    path: Path | None = None
    page: bool = False
    endpoint: str | None = None
    served: bool = False


class World:
    """See the module. A context manager: ends every process and thread.

    Attributes:
        random: The world's own source of randomness, from the seed.
        collector: The receiver.
        api: The job service.
        jobs: All jobs of this world.
        agent: The agent's process; None while no agent runs.
    """

    def __init__(self, seed: int | str, settings: Settings | None = None) -> None:
        self.random = random.Random(seed)
        self.settings = settings or Settings()
        self.jobs: list[Job] = []
        self.agent: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self._services: dict[str, FakeJsonApi] = {}
        self._sections: dict[str, str] = {}
        self._peak_rss = 0
        self._refused: list[Any] = []
        self._spans: list[Span] = []
        self._runs: dict[str, int] = {}
        self._stack = contextlib.ExitStack()
        self._page_port = 0
        self._folded_dead: Counter[Path] = Counter()
        self.dead_lettered = 0

    def __enter__(self) -> World:
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="prove-")))
        self.collector = self._stack.enter_context(Collector(http_port=free_port(), grpc_port=free_port()))
        self.api = self._stack.enter_context(FakeJobApi())
        self.local = self._stack.enter_context(LocalJobs(self.home / "jobs"))
        if self.settings.served:
            self._job_api = self._stack.enter_context(serving(self.local.service)).url
        self._stack.callback(self._end_agent)
        (self.home / "token").write_text("old\n")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def state_dir(self) -> Path:
        """The agent's directory."""
        return self.home / "agent"

    @property
    def database(self) -> Path:
        """The checkpoint store's file."""
        return self.state_dir / "checkpoints.db"

    @property
    def page_url(self) -> str:
        """Where the agent's page is."""
        return f"http://127.0.0.1:{self._page_port}"

    @property
    def log(self) -> str:
        """The log of the agents of this world."""
        path = self.home / "agent.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def fused_job(self, name: str, **options: Any) -> NumberedJob:
        """Add a job to the job service."""
        job = NumberedJob(self.api, name, **options)
        self.jobs.append(job)
        return job

    def local_job(self, name: str, **options: Any) -> LocalNumberedJob:
        """Start a real job on this machine."""
        job = LocalNumberedJob(self.local, name, **options)
        self.jobs.append(job)
        return job

    def add_service(self, name: str, api: Service) -> Service:
        """Start another job service, whose type is its name, and return it; the agent follows all of its jobs."""
        self._services[name] = self._stack.enter_context(api)
        return api

    def enter(self, part: Part) -> Part:
        """Start a context manager that ends with the world, and return it."""
        self._stack.enter_context(part)
        return part

    def follow(self, kind: str, section: str) -> None:
        """Let the agent follow all jobs of a service that has no server: its type, and the keys of its section."""
        self._sections[kind] = section

    @property
    def services(self) -> list[FakeJsonApi]:
        """The job services that were added."""
        return list(self._services.values())

    def configure(self, change: Callable[[str], str] = str) -> None:
        """Write the configuration as the settings say, with a change to its text."""
        (self.home / "config.toml").write_text(change(self._config()))

    def reload(self, change: Callable[[str], str] = str) -> None:
        """Write the configuration with a change, and let the running agent reload it."""
        assert self.agent is not None
        said = self.log.count(_RELOADED)
        self.configure(change)
        self.agent.send_signal(signal.SIGHUP)
        self.until(lambda: self.log.count(_RELOADED) > said, "the reload")

    def _config(self) -> str:
        settings = self.settings
        if settings.page and not self._page_port:
            self._page_port = free_port()
        endpoint = settings.endpoint or (
            self.collector.grpc_url if settings.protocol == "grpc" else self.collector.http_url
        )
        local = f'state_dir = "{self.home}/jobs"'
        if settings.served:
            local = f'type = "fused"\nbase_url = "{self._job_api}"\nrequests_per_second = 1000'
        watch = f'discover = true\nsettle = "0.3s"\n{settings.watch}\n'
        sections = {name: f"{api.section}\nrequests_per_second = 1000" for name, api in self._services.items()}
        sections |= self._sections
        others = "".join(f"[services.{name}]\n{section}\n" for name, section in sections.items())
        watches = "".join(f'[[agent.watch]]\nservice = "{name}"\n{watch}' for name in sections)
        return f"""
[services.local]
{local}
[services.fused]
base_url = "{self.api.base_url}"
requests_per_second = 1000
token_file = "{self.home}/token"
{settings.fused}
{others}
[agent]
state_dir = "{self.state_dir}"
max_pipeline_names = 2000
listen = "{f"127.0.0.1:{self._page_port}" if settings.page else ""}"
[[agent.watch]]
service = "local"
{watch}
[[agent.watch]]
service = "fused"
{watch}
{watches}
[otlp]
endpoint = "{endpoint}"
protocol = "{settings.protocol}"
{settings.otlp}
"""

    def start(self, *, strict: bool = False) -> None:
        """Start the agent; what comes from now on counts as coming after a restart.

        Args:
            strict: Whether until the next restart no line may come twice.
        """
        self.settle_receiver()
        self.fold()
        for job in self.jobs:
            job.restarted(self.acked(job), strict=strict)
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_"))}
        env |= {"OTEL_METRIC_EXPORT_INTERVAL": "1000", "HOME": str(self.home)}
        if self.settings.path is not None:
            env["PYTHONPATH"] = str(self.settings.path)
        with (self.home / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [TAILSPAN, "agent", "run", "--config", str(self.home / "config.toml")],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.home,
            )  # fmt: skip
        self.restarts += 1

    def kill(self) -> None:
        """Kill the agent at once. Does not wait for its end."""
        agent = self.agent
        if agent is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGKILL)

    def ended(self) -> int:
        """Wait until the agent has ended; return its exit code, negative for a signal."""
        assert self.agent is not None
        if self.agent.returncode is None:
            self.agent.wait()
        code, self.agent = self.agent.returncode, None
        return code

    def _note_memory(self) -> None:
        # Not the ru_maxrss of wait4: it has the memory of the process that forked it, which is ours.
        status = Path(f"/proc/{self.agent.pid}/status") if self.agent is not None else None
        if status is not None and status.exists() and (found := _HIGH_WATER.search(status.read_text())):
            self._peak_rss = max(self._peak_rss, int(found[1]) * 1024)

    def terminate(self) -> None:
        """Stop the agent with its drain."""
        assert self.agent is not None
        self._note_memory()
        self.agent.send_signal(signal.SIGTERM)

    def patience(self, limit_s: float) -> Patience:
        """Return a time limit that does not count the waits of the agent and of this process for a processor."""
        return Patience(limit_s, lambda: [os.getpid()] if self.agent is None else [os.getpid(), self.agent.pid])

    def until(self, holds: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Return the first true value; fail if none comes in time, or if the agent ends."""
        patience, pause_s = self.patience(timeout_s), 0.02
        while not (value := holds()):
            if self.agent is not None and self.agent.poll() is not None:
                raise AssertionError(f"the agent ended with {self.agent.returncode}: {self.log[-1500:]}")
            if patience.is_over():
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; the agent says: {self.log[-1500:]}")
            time.sleep(pause_s)
            pause_s = min(0.25, pause_s * 1.5)  # `holds` often reads the whole store, beside the agent
        return value

    def checkpoint(self, job: Job, state_dir: Path | None = None) -> Checkpoint | None:
        """Return what the store has of a job."""
        served = self.settings.served and isinstance(job, LocalNumberedJob)
        return read_checkpoint(state_dir or self.state_dir, self._job_api if served else job.identity, job.job_id)

    def acked(self, job: Job, state_dir: Path | None = None) -> int:
        """Return how many lines of a job the store has as acked."""
        found = self.checkpoint(job, state_dir)
        return int(json.loads(found.ledger)["lines"]) if found is not None else 0

    def all_done(self) -> bool:
        """Whether the store says that nothing is left to do for any job, nor a span to be sent."""
        found = (
            self.checkpoint(job) for job in self.jobs
        )  # each reads the store: the first that is not done is enough
        return all(item is not None and item.ended and item.logs_complete for item in found) and not self.unsent_spans()

    def unsent_spans(self) -> int:
        """Return how many spans the store has that are not acked."""
        with contextlib.closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True)) as db:
            (count,) = db.execute("SELECT count(*) FROM spans WHERE acked = 0").fetchone()
            return int(count)

    def settle_receiver(self) -> None:
        """Wait until the receiver has dealt with everything that was sent."""
        self.collector.wait_until(lambda: not self.collector.open_requests, _SETTLE_S)

    def refuse(self, request: Request, reply: Reply) -> Reply:
        """Return an answer by which the receiver keeps nothing of a request, whatever its status says."""
        self._refused.append(request.message)
        return reply

    def away(self, seconds: float, what: AbstractContextManager[object] | None = None) -> None:
        """Take the receiver away for a time, in seconds; something else may be at its address meanwhile."""
        port = self.collector.http_port
        self.collector.stop()
        self.fold()
        with what or contextlib.nullcontext():
            time.sleep(seconds)
        self.use(Collector(http_port=port))

    def use(self, collector: Collector) -> None:
        """Switch to another receiver."""
        self.collector = self._stack.enter_context(collector)

    def finish(self, timeout_s: float = PATIENCE_S) -> Found:
        """End all jobs, wait until everything of them is relayed, stop the agent, and count."""
        for job in self.jobs:
            if not job.ended:
                job.end()
        if self.agent is None:
            self.start()
        problem = None
        try:
            self.until(self.all_done, "the end of all jobs", timeout_s)
        except TimeoutError as error:
            problem = str(error)
        self.terminate()
        found = self.count(self.ended())
        if problem is not None:
            found.wrong_runs.append(problem)
        return found

    def count(self, exit_code: int | None = None) -> Found:
        """Count what has arrived up to now."""
        self.settle_receiver()
        self.fold()
        found = Found(len(self.jobs), dead_lettered=self.dead_lettered, exit_code=exit_code, peak_rss=self._peak_rss)
        for job in self.jobs:
            found.lines += job.tally.count(job.written)
        found.spans = count_spans(self._spans, {job.trace_id: job.spans for job in self.jobs if job.ended})
        expected = Counter(job.name for job in self.jobs if job.ended)
        found.wrong_runs = [
            f"{name}: {self._runs.get(name, 0)} runs instead of {expected[name]}"
            for name in {*expected, *self._runs}
            if self._runs.get(name, 0) != expected[name]
        ]
        return found

    def fold(self) -> None:
        """Count what has arrived since the last call, and drop it to save memory."""
        self._note_memory()
        for request in self.collector.drain():
            if request.taken and not any(message is request.message for message in self._refused):
                self._take(request.signal, request.message)
        for path in sorted(self.state_dir.glob("dead-letter/*.jsonl")):
            entries = path.read_bytes().splitlines()
            for line in entries[self._folded_dead[path] :]:
                entry = json.loads(line)
                note = entry.pop("tailspan")
                self.dead_lettered += note["rejected"]
                signal_ = "logs" if "resourceLogs" in entry else "traces"
                self._take(signal_, parse_json(signal_, json.dumps(entry)), in_order=False)
            self._folded_dead[path] = len(entries)

    def _take(self, signal_: str, message: Any, *, in_order: bool = True) -> None:
        tallies = {job.name: job.tally for job in self.jobs}
        if signal_ == "logs":
            for name, text, nanos, uid in lines_in(message):
                # Some jobs share one name: their lines begin with their own.
                tally = tallies.get(name) or tallies[text.partition(" ")[0]]
                tally.take(text, nanos, uid, in_order=in_order)
        elif signal_ == "traces":
            self._spans += spans_in(message)
        else:
            points = [row for row in metric_rows(message) if row.name == _RUN_DURATION]
            if points:
                self._runs = Counter()
                for row in points:
                    self._runs[row.attributes["cicd.pipeline.name"]] += row.value.count

    def _end_agent(self) -> None:
        if self.agent is not None:
            self.kill()
            self.ended()


def lines_in(message: Any) -> Iterator[tuple[str, str, int, str]]:
    """Yield the pipeline's name, the text, the time and the uid of each record that is a line."""
    for group in message.resource_logs:
        name = plain_attributes(group.resource.attributes)["cicd.pipeline.name"]
        for scope in group.scope_logs:
            for record in scope.log_records:
                if not record.event_name:
                    uids = [item.value.string_value for item in record.attributes if item.key == "log.record.uid"]
                    yield name, record.body.string_value, record.time_unix_nano, "".join(uids)


def spans_in(message: Any) -> Iterator[Span]:
    """Yield the spans of a request with all of their bytes."""
    for group in message.resource_spans:
        resource = plain_attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                name = "RUN" if span.name == f"RUN {resource['cicd.pipeline.name']}" else span.name
                yield Span(span.trace_id.hex(), name, span.span_id.hex(), span.SerializeToString(deterministic=True))


def copy_store(state_dir: Path, to: Path) -> Path:
    """Copy the checkpoint store of a dead agent, so that reading it changes nothing."""
    target = to / "store"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in state_dir.glob("checkpoints.db*"):
        shutil.copy(path, target)
    return target
