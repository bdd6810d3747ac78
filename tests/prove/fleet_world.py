"""A fleet: several agents as processes, one PostgreSQL, one job service, and one OTLP receiver."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tailspan_agent.fleet.shards import METRICS_LEASE, SHARDS, job_uuid
from tests.fakes.postgres import Postgres
from tests.fakes.tcp_proxy import TcpProxy
from tests.patience import Patience
from tests.prove.found import Found
from tests.prove.jobs import Job
from tests.prove.world import PATIENCE_S, TAILSPAN, Settings, World, lines_in

LEASE_S = 3.0


@dataclass
class FleetAgent:
    """One agent of the fleet.

    Attributes:
        name: Its name, and that of its directory.
        dsn: How it reaches the database; None: directly.
        proxy: What is between it and the database; None: nothing.
        process: Its process; None while it does not run.
    """

    name: str
    dsn: str | None = None
    proxy: TcpProxy | None = None
    process: subprocess.Popen[bytes] | None = None


class FleetWorld(World):
    """See the module. The single agent of `World` is not used.

    Args:
        seed: Reproduces the world's choices.
        agents: How many agents there are; `start_all` starts them.
        settings: What differs between worlds.
        lease_s: ``fleet.lease``.
        durable: Whether a killed server keeps what it has committed.
    """

    def __init__(
        self,
        seed: int | str,
        agents: int = 3,
        settings: Settings | None = None,
        *,
        lease_s: float = LEASE_S,
        durable: bool = False,
    ) -> None:
        super().__init__(seed, settings)
        self.agents = [FleetAgent(f"agent-{number}") for number in range(agents)]
        self.lease_s = lease_s
        self.senders: defaultdict[str, list[str]] = defaultdict(list)
        self._durable = durable

    def __enter__(self) -> FleetWorld:
        super().__enter__()
        self.postgres = self._stack.enter_context(Postgres(durable=self._durable))
        self._stack.callback(self._end_agents)
        return self

    @property
    def log(self) -> str:
        """The logs of all agents."""
        return "\n".join(self.log_of(agent) for agent in self.agents)

    def log_of(self, agent: FleetAgent) -> str:
        """Return the log of one agent."""
        path = self.home / f"{agent.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_agent(self, agent: FleetAgent) -> None:
        """Start an agent that does not run."""
        settings = self.settings
        dsn = agent.dsn or self.postgres.dsn
        config = self.home / f"{agent.name}.toml"
        config.write_text(f"""
[services.fused]
base_url = "{self.api.base_url}"
requests_per_second = 1000
token_file = "{self.home}/token"
{settings.fused}
[agent]
state_dir = "{self.home / agent.name}"
max_pipeline_names = 2000
listen = "unix:{self.home / agent.name}.sock"
drain_timeout = "20s"
[fleet]
dsn = "{dsn}"
lease = {self.lease_s}
[[agent.watch]]
service = "fused"
discover = true
settle = "0.3s"
{settings.watch}
[otlp]
endpoint = "{self.collector.http_url}"
headers = {{ X-Agent = "{agent.name}" }}
{settings.otlp}
""")
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_"))}
        env |= {"OTEL_METRIC_EXPORT_INTERVAL": "1000", "HOME": str(self.home)}
        if settings.path is not None:
            env["PYTHONPATH"] = str(settings.path)
        with (self.home / f"{agent.name}.log").open("ab") as log:
            agent.process = subprocess.Popen(
                [TAILSPAN, "agent", "run", "--no-token", "--config", str(config)],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.home,
            )  # fmt: skip

    def put_proxy_before(self, agent: FleetAgent) -> None:
        """Let an agent reach the database only through a proxy."""
        agent.proxy = self._stack.enter_context(TcpProxy(self.postgres.socket))
        agent.dsn = f"host=127.0.0.1 port={agent.proxy.port} user=postgres dbname=postgres"

    def start_all(self) -> None:
        """Start every agent that does not run, and wait until all shards are owned fairly."""
        for agent in self.agents:
            if agent.process is None:
                self.start_agent(agent)
        self.until(self.is_balanced, "a fair share for each agent")

    def signal_agent(self, agent: FleetAgent, number: signal.Signals) -> None:
        """Send a signal to an agent that runs."""
        assert agent.process is not None
        agent.process.send_signal(number)

    def memory(self) -> dict[str, int]:
        """Return the resident memory of each agent that runs, in bytes, by its name."""
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            agent.name: int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * page
            for agent in self.agents
            if agent.process is not None
        }

    def stop_agent(self, agent: FleetAgent) -> int:
        """Stop an agent with its drain; return its exit code."""
        assert agent.process is not None
        agent.process.terminate()
        code = agent.process.wait(60)
        agent.process = None
        return code

    def kill_agent(self, agent: FleetAgent) -> None:
        """Kill an agent, and note what was acknowledged before: that must not come again."""
        assert agent.process is not None
        self.note_acked()
        agent.process.kill()
        agent.process.wait()
        agent.process = None

    def fold(self) -> None:
        """Count what has arrived since the last call, and note which agent sent lines of which job."""
        for request in self.collector.requests:
            if request.signal == "logs":
                sender = request.headers.get("x-agent", "")
                for name in {name for name, _, _, _ in lines_in(request.message)}:
                    self.senders[name].append(sender)
        super().fold()

    def note_acked(self) -> None:
        """Note what the database has as acknowledged: from now on, those lines must not come again."""
        acked = self.all_acked()
        self.fold()
        for job in self.jobs:
            job.restarted(acked.get(job.job_id, 0), strict=False)

    def query(self, text: str, *values: object) -> list[Any]:
        """Return rows of the fleet's tables: ``$`` stands for the schema; none while the database is away."""
        try:
            return self.postgres.execute(text.replace("$", "tailspan_default."), *values)
        except psycopg.errors.UndefinedTable:
            return []  # no agent has been there

    @contextlib.contextmanager
    def checkpoints_held(self) -> Iterator[None]:
        """Let no agent commit a checkpoint until the block ends: what is acknowledged meanwhile waits in its memory."""
        with psycopg.connect(self.postgres.dsn) as connection:
            connection.execute("LOCK TABLE tailspan_default.jobs IN SHARE ROW EXCLUSIVE MODE")
            yield
            connection.rollback()

    def all_acked(self) -> dict[str, int]:
        """Return the number of acknowledged lines of each job that the database has."""
        return {
            job_id: json.loads(ledger)["lines"] for job_id, ledger in self.query("SELECT job_id, ledger FROM $jobs")
        }

    def acked(self, job: Job, state_dir: Path | None = None) -> int:
        """Return how many lines of a job the database has as acked."""
        rows = self.query("SELECT ledger FROM $jobs WHERE id = %s", job_uuid(job.identity, job.job_id))
        return int(json.loads(rows[0][0])["lines"]) if rows else 0

    def all_done(self) -> bool:
        """Whether the database says that nothing is left to do for any job, nor a span to be sent."""
        rows = self.query("SELECT count(*) FROM $jobs WHERE ended AND logs_complete")
        return bool(rows) and rows[0][0] == len(self.jobs) and not self.unsent_spans()

    def unsent_spans(self) -> int:
        """Return how many spans the database has that are not acked."""
        return int(self.query("SELECT count(*) FROM $spans WHERE NOT acked")[0][0])

    def shares(self) -> dict[int, int]:
        """Return the number of shards that each agent owns."""
        return dict(
            self.query(
                "SELECT owner, count(*) FROM $leases WHERE shard < %s AND expires_at > clock_timestamp()"
                " GROUP BY owner",
                METRICS_LEASE,
            )
        )

    def is_balanced(self) -> bool:
        """Whether the agents that run own all shards, and each one the same number, plus or minus one."""
        running = sum(agent.process is not None for agent in self.agents)
        shares = sorted(self.shares().values())
        return len(shares) == running and sum(shares) == SHARDS and shares[-1] - shares[0] <= 1

    def patience(self, limit_s: float) -> Patience:
        """Return a time limit that does not count the waits of the agents and of this process for a processor."""
        return Patience(
            limit_s, lambda: [os.getpid(), *(agent.process.pid for agent in self.agents if agent.process is not None)]
        )

    def until(self, holds: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Return the first true value; fail if none comes in time, or if an agent ends."""
        patience = self.patience(timeout_s)
        while not (value := holds()):
            for agent in self.agents:
                if agent.process is not None and agent.process.poll() is not None:
                    raise AssertionError(
                        f"{agent.name} ended with {agent.process.returncode}: {self.log_of(agent)[-2000:]}"
                    )
            if patience.is_over():
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; the agents say: {self.log[-3000:]}")
            time.sleep(0.05)
        return value

    def finish(self, timeout_s: float = PATIENCE_S) -> Found:
        """End all jobs, wait until everything of them is relayed, stop the agents, and count."""
        for job in self.jobs:
            if not job.ended:
                job.end()
        if all(agent.process is None for agent in self.agents):
            self.start_all()
        problem = None
        try:
            self.until(self.all_done, "the end of all jobs", timeout_s)
        except TimeoutError as error:
            problem = str(error)
        self.note_acked()
        codes = [self.stop_agent(agent) for agent in self.agents if agent.process is not None]
        found = self.count(max(codes, key=abs))
        if problem is not None:
            found.wrong_runs.append(problem)
        counted = self.query("SELECT pipeline, buckets FROM $runs")
        totals = {pipeline: sum(json.loads(buckets)["counts"].values()) for pipeline, buckets in counted}
        found.wrong_runs += [
            f"{job.name}: {totals.get(job.name, 0)} runs in the database instead of 1"
            for job in self.jobs
            if totals.get(job.name, 0) != 1
        ]
        return found

    def _end_agents(self) -> None:
        for agent in self.agents:
            if agent.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    agent.process.send_signal(signal.SIGCONT)
                agent.process.kill()
                agent.process.wait()
