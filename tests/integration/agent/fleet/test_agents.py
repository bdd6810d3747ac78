"""Whole agents of one fleet in one process: what any page shows, and what all scrapes together count."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from tailspan.cli import main
from tailspan.models import JobState
from tailspan.services import JobService
from tailspan.services.kubernetes.service import KubernetesOptions, KubernetesService
from tailspan.testing import FakeService
from tailspan_agent.agent import Agent
from tailspan_agent.errors import CheckpointError
from tailspan_agent.fleet.shards import SHARDS
from tailspan_agent.tasks import cancelled
from tests.fakes.agents import Bench, looped, until
from tests.fakes.collector import Collector
from tests.fakes.kubernetes import FakeKubernetes
from tests.fakes.postgres import Postgres

JOBS = [f"job-{number}" for number in range(12)]
ENDED = 4


class World:
    """Two agents, one service, one collector, one database.

    Attributes:
        service: The service that both agents watch.
        open_service: Returns the service as an agent has it.
        agents: The agents by host.
        clients: A browser at the page of each agent.
    """

    def __init__(self, directory: Path, collector: Collector, postgres: Postgres, fleet: str) -> None:
        self.service = FakeService("fake", polls_are_free=False)
        self.open_service: Callable[[], JobService] = lambda: self.service
        self.agents: dict[str, Agent] = {}
        self.clients: dict[str, httpx.AsyncClient] = {}
        self._directory = directory
        self._collector = collector
        self._fleet = f'[fleet]\ndsn = "{postgres.dsn}"\nname = "{fleet}"\nlease = 12\n'
        self._stacks: dict[str, AsyncExitStack] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def start(self, host: str) -> None:
        """Start an agent; the URL of its page has its name."""
        bench = Bench(self._directory / host, self._collector)
        bench.directory.mkdir(exist_ok=True)
        settings = bench.settings(
            listen="127.0.0.1:0",
            public_url=f"https://{host}.example",
            otlp={"headers": {"X-Agent": host}},
            more=self._fleet,
        )
        agent = self.agents[host] = Agent(settings, lambda *_: self.open_service(), needs_page_token=False)
        ready = asyncio.Event()
        self._running[host] = asyncio.create_task(agent.run(on_ready=ready.set))
        await ready.wait()
        assert agent.server is not None
        stack = self._stacks[host] = AsyncExitStack()
        self.clients[host] = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=agent.server.url, trust_env=False, verify=False, headers={"accept": "text/html"}, timeout=20
            )
        )

    async def stop(self, host: str) -> None:
        """Stop an agent with its drain."""
        del self.clients[host]
        await self._stacks.pop(host).aclose()
        self.agents.pop(host).stop()
        await self._running.pop(host)

    async def kill(self, host: str) -> None:
        """End an agent without its drain: it writes nothing more, and keeps its leases."""
        del self.clients[host], self.agents[host]
        await self._stacks.pop(host).aclose()
        await cancelled(self._running.pop(host))

    async def balanced(self) -> None:
        """Wait until each agent has its share of the shards."""
        share = SHARDS // len(self.agents)
        await until(lambda: all(agent._member and agent._member.shards == share for agent in self.agents.values()))

    async def command(self, host: str, *words: str) -> Result:
        """Run a command of ``tailspan agent`` on a host."""
        config = self._directory / host / "config.toml"
        return await asyncio.to_thread(CliRunner().invoke, main, ["agent", *words, "--config", str(config)])

    def follower(self, job_id: str) -> str:
        """Return the host of the agent that follows a job."""
        (host,) = (host for host, one in self.agents.items() if one._member and one._member.owns("fake", job_id))
        return host

    def end(self, job_id: str) -> None:
        """Let a job end, with a line more."""
        self.service.add_lines(job_id, "the end")
        self.service.set_state(job_id, JobState.SUCCEEDED)

    async def scrape(self) -> tuple[Counter[str], Counter[str]]:
        """Scrape all agents; return sums by name of the sample, and how many agents had the fleet's totals."""
        sums: Counter[str] = Counter()
        exporters: Counter[str] = Counter()
        for host, client in self.clients.items():
            text = (await client.get("/metrics")).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    sums[sample.name] += sample.value
                    if sample.labels.get("instance"):
                        exporters[host] = 1
        return sums, exporters


@pytest.fixture
def world(tmp_path: Path, collector: Collector, postgres: Postgres, fleet_name: str) -> World:
    """No agent runs yet."""
    return World(tmp_path, collector, postgres, fleet_name)


@asynccontextmanager
async def two_agents(world: World) -> AsyncIterator[None]:
    """Run the agents a and b with their shares of the jobs."""
    try:
        await world.start("a")
        await world.start("b")
        await world.balanced()
        yield
    finally:
        for host in list(world.agents):
            await world.stop(host)


async def database_away(*_: object, **__: object) -> None:
    """Fail as a connection to a server that is away."""
    raise CheckpointError("the fleet's database: away")


def table_of(text: str) -> dict[str, str]:
    """Return the cell with the agent of each job in a table of jobs."""
    rows = re.findall(r'<tr data-key.*?class="id" title="([^"]*)".*?<td class="agent">(.*?)</td>', text, re.DOTALL)
    return {html.unescape(job_id): cell for job_id, cell in rows}


@looped
async def test_any_page_shows_the_whole_fleet_and_scrapes_add_up(world: World, collector: Collector) -> None:
    """Jobs of the other agent are listed with a link to its page; counts of runs are exported once."""
    for job_id in JOBS:
        world.service.add_job(job_id, job_name="etl")
        world.service.add_lines(job_id, f"a line of {job_id}")
    async with two_agents(world):
        for job_id in JOBS[:ENDED]:
            world.end(job_id)
        while (await world.scrape())[0]["cicd_pipeline_run_duration_seconds_count"] < ENDED:
            await asyncio.sleep(0.05)
        others = {host: [job for job in JOBS[ENDED:] if world.follower(job) != host] for host in "ab"}
        assert all(others.values())
        for host, other in (("a", "b"), ("b", "a")):
            await check_pages(world.clients[host], other, others[host])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.agents["a"]._overview._store.reader, "run", database_away)
            while "fleet's database does not answer" not in (text := (await world.clients["a"].get("/")).text):
                await asyncio.sleep(0.1)
            assert set(table_of(text)) == set(JOBS)
        sums, exporters = await world.scrape()
        assert sums["cicd_pipeline_run_duration_seconds_count"] == ENDED
        assert sums["cicd_pipeline_run_active"] == len(JOBS) - ENDED
        assert sums["tailspan_fleet_shards"] == SHARDS
        assert sums["tailspan_agent_jobs_followed"] == len(JOBS) - ENDED
        (exporter,) = exporters
        before = await fleet_series(world.clients[exporter])
        shown = await world.command(exporter, "fleet", "--json")
        assert [(one["shards"], one["page"], one["draining"]) for one in json.loads(shown.stdout)] == [
            (SHARDS // 2, f"https://{host}.example", False) for host in "ab"
        ]
        assert f"{SHARDS // 2} shards, exports the fleet's metrics" in (await world.command(exporter, "fleet")).stdout
        drained = await world.command(exporter, "drain", "--timeout", "60")
        assert drained.exit_code == 0
        assert "has handed over everything" in drained.stderr
        await until(lambda: max(agent._member.shards for agent in world.agents.values() if agent._member) == SHARDS)
        await world.stop(exporter)
        await world.balanced()
        (left,) = world.clients
        assert await fleet_series(world.clients[left]) == before
        world.end(JOBS[ENDED])
        while (await world.scrape())[0]["cicd_pipeline_run_duration_seconds_count"] < ENDED + 1:
            await asyncio.sleep(0.05)


async def check_pages(client: httpx.AsyncClient, other: str, jobs: list[str]) -> None:
    """Check what the pages of an agent show of the other one and of its running jobs."""
    while set(cells := table_of((await client.get("/")).text)) != set(JOBS):
        await asyncio.sleep(0.1)
    linked = {job for job, cell in cells.items() if f'href="https://{other}.example/job?' in cell}
    assert linked == set(jobs)
    page = (await client.get("/job", params={"service": "fake", "id": jobs[0]})).text
    assert f"https://{other}.example/job?" in page
    assert f"a line of {jobs[0]}" in page
    agent_page = (await client.get("/agent")).text
    assert f'href="https://{other}.example/agent"' in agent_page
    assert agent_page.count("this one") == 1
    assert agent_page.count(f'<td class="num">{SHARDS // 2}</td>') == 2
    counts = r'"Runs" class="num">4</td>\s*<td data-label="Active" class="num">8</td>'
    while not re.search(counts, (await client.get("/pipelines")).text):
        await asyncio.sleep(0.1)
    delivered = await client.get("/delivery", params={"identity": "fake", "job_id": jobs[0]})
    assert delivered.json()["known"] is True


async def fleet_series(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the series that the fleet has counted, by their name and labels."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "instance" in sample.labels and not sample.name.endswith("_age_seconds")
    }


@looped
async def test_pods_of_one_cluster_are_relayed_by_one_agent_each(
    world: World, collector: Collector, tmp_path: Path
) -> None:
    """Two agents follow one cluster; when one dies, the other goes on with its pods, and no line is lost."""
    with FakeKubernetes() as cluster:
        options = KubernetesOptions(kubeconfig=cluster.kubeconfig(tmp_path), requests_per_second=1000)
        world.open_service = lambda: KubernetesService("fake", options, environ={})
        jobs = {job.job_id: job for job in (cluster.add_job(f"etl-{number}") for number in range(12))}
        for job in jobs.values():
            job.add_pod().main.write("line 0")
        async with two_agents(world):
            for number in (1, 2):
                for job in jobs.values():
                    job.pods[0].main.write(f"line {number}")
                await received(collector, dict.fromkeys(jobs, number + 1))
            followers = {
                job_id: {
                    host for host, agent in world.agents.items() if job_id in {one.job_id for one in agent.tailers}
                }
                for job_id in jobs
            }
            assert all(len(hosts) == 1 for hosts in followers.values())
            assert {job_id: senders(collector, job_id, "line 2") for job_id in jobs} == followers
            await world.kill("a")
            for job in jobs.values():
                job.pods[0].main.write("line 3")
                job.finish()
            await received(collector, dict.fromkeys(jobs, 4))
            await until(lambda: len(run_spans(collector)) == len(jobs))
        for job_id in jobs:
            lines = lines_of(collector, job_id)
            assert set(lines) == {f"line {number}" for number in range(4)}
            assert all(len(uids) == 1 for uids in lines.values())
            assert senders(collector, job_id, "line 3") == {"b"}
            assert senders(collector, job_id, "line 2") >= followers[job_id]
        assert all(len(ids) == 1 for ids in run_spans(collector).values())


async def received(collector: Collector, counts: dict[str, int]) -> None:
    """Wait until the collector has this many different lines of each job."""
    await asyncio.to_thread(
        collector.wait_until,
        lambda: all(len(lines_of(collector, job_id)) >= count for job_id, count in counts.items()),
    )


def lines_of(collector: Collector, job_id: str) -> dict[str, set[str]]:
    """Return the uids of each line of a job."""
    found: dict[str, set[str]] = {}
    for row in collector.log_records():
        if not row.event_name and row.resource["cicd.pipeline.run.id"] == job_id:
            found.setdefault(row.body, set()).add(row.attributes["log.record.uid"])
    return found


def senders(collector: Collector, job_id: str, line: str) -> set[str]:
    """Return the hosts of the agents that sent a line of a job."""
    return {
        request.headers["x-agent"]
        for request in collector.requests
        if request.signal == "logs"
        for row in request.log_rows
        if row.body == line and row.resource["cicd.pipeline.run.id"] == job_id
    }


def run_spans(collector: Collector) -> dict[str, set[str]]:
    """Return the ids of the run spans of each job."""
    found: dict[str, set[str]] = {}
    for span in collector.spans():
        if span.name.startswith("RUN "):
            found.setdefault(span.resource["cicd.pipeline.run.id"], set()).add(span.span_id)
    return found
