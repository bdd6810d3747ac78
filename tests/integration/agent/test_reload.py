"""A reload applies the difference: whatever a changed file leaves unchanged is not disturbed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile

import pytest

from tailspan.config import Settings, load_settings
from tailspan.errors import ConfigError
from tailspan.local.agent_page import page_of
from tailspan.models import JobStatus
from tailspan.services import JobService
from tailspan.services.registry import PluginError
from tailspan.testing import FakeService
from tailspan_agent.process.reload import reload_on_hangup
from tests.fakes.agents import Bench, OddService, looped, until
from tests.fakes.collector import Collector, Reply


async def relayed(bench: Bench, *bodies: str) -> None:
    await bench.received(lambda: bench.bodies() == list(bodies))


@looped
async def test_a_changed_watch_keeps_its_jobs(bench: Bench) -> None:
    """Severity, attributes and settle time change for the next lines; tailer, cursor and lines in flight stay."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "[INFO] a")
    async with bench.running() as agent:
        await relayed(bench, "[INFO] a")
        before = agent.tailers
        await agent.reload(bench.settings({"discover": True, "min_severity": "ERROR", "attributes": {"team": "geo"}}))
        assert agent.tailers == before
        bench.fake.add_lines("j1", "[INFO] b", "[ERROR] c")
        await relayed(bench, "[INFO] a", "[ERROR] c")
    assert [row.resource.get("team") for row in bench.lines()] == [None, "geo"]


@looped
async def test_a_renamed_service_keeps_its_cursors(bench: Bench) -> None:
    """Checkpoints are keyed by the service's identity, never by the section's name."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running() as agent:
        await relayed(bench, "a")
        renamed = FakeService("renamed", identity="fake")
        renamed.add_job("j1")
        renamed.add_lines("j1", "a", "b")
        bench.services["renamed"] = renamed
        await agent.reload(bench.settings({"service": "renamed", "discover": True}))
        await relayed(bench, "a", "b")
        assert [discovery.name for discovery in agent.discoveries] == ["renamed"]
        renamed.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans())
    assert bench.lines()[-1].resource["service.namespace"] == "renamed"
    assert ("aclose", "") in bench.fake.calls


@looped
async def test_a_changed_endpoint_gets_the_unacknowledged_batch(bench: Bench) -> None:
    """A batch in flight to an endpoint that hangs is sent to the new one, byte for byte."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.collector.always("logs", Reply(hang=True))
    with Collector() as second:
        async with bench.running() as agent:
            await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
            await agent.reload(bench.settings(otlp={"endpoint": second.http_url}))
            await asyncio.to_thread(second.wait_until, lambda: len(second.log_records()) == 1)
            bench.fake.add_lines("j1", "b")
            await asyncio.to_thread(second.wait_until, lambda: len(second.log_records()) == 2)
        first = [request.payload for request in bench.collector.requests if request.signal == "logs"]
        assert first == [next(request.payload for request in second.requests if request.signal == "logs")]
        assert second.metrics() != []


@looped
async def test_a_watch_that_is_removed_and_added_again(bench: Bench) -> None:
    """Lines that were in flight are not read again: the job resumes behind them."""
    bench.services["other"] = FakeService("other", identity="other")
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a", "b")
    bench.collector.always("logs", Reply(503))
    everything = ({"discover": True}, {"service": "other", "discover": True})
    async with bench.running(*everything) as agent:
        await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
        await agent.reload(bench.settings({"service": "other", "discover": True}))
        assert agent.tailers == []
        bench.fake.add_lines("j1", "c")
        await agent.reload(bench.settings(*everything))
        await until(lambda: agent.tailers)
        bench.collector.always("logs", Reply())
        await relayed(bench, "a", "b", "c")
        await asyncio.sleep(0.1)
    assert bench.bodies() == ["a", "b", "c"]


@looped
async def test_a_full_queue_and_a_reload(bench: Bench) -> None:
    """A tailer that ends while it waits for room in the queue has not sent its page: the next one sends it, once."""
    bench.services["other"] = FakeService("other", identity="other")
    bench.services["fake"] = FakeService("fake", page_lines=500)
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *[f"{number} {'x' * 1500}" for number in range(6000)])
    bench.collector.always("logs", Reply(503))
    everything = ({"discover": True}, {"service": "other", "discover": True})
    async with bench.running(*everything) as agent:
        await bench.received(lambda: any(request.signal == "logs" for request in bench.collector.requests))
        await agent.reload(bench.settings({"service": "other", "discover": True}))
        await agent.reload(bench.settings(*everything))
        bench.collector.always("logs", Reply())
        await bench.received(lambda: len(bench.bodies()) >= 6000)
        await asyncio.sleep(0.1)
    assert [int(body.split()[0]) for body in bench.bodies()] == list(range(6000))


@looped
async def test_a_watch_that_no_longer_matches(bench: Bench) -> None:
    """Its jobs are no longer followed, the others stay; a wider watch follows them again."""
    for name in ("etl", "web"):
        bench.fake.add_job(name)
        bench.fake.add_lines(name, f"{name} 1")
    async with bench.running({"discover": True, "name": "etl"}) as agent:
        await relayed(bench, "etl 1")
        await agent.reload(bench.settings({"discover": True, "name": "web"}))
        await bench.received(lambda: bench.bodies("web") == ["web 1"])
        assert [tailer.job_id for tailer in agent.tailers] == ["web"]
        bench.fake.add_lines("etl", "etl 2")
        await agent.reload(bench.settings({"discover": True}))
        await bench.received(lambda: bench.bodies("etl") == ["etl 1", "etl 2"])
    assert bench.bodies("web") == ["web 1"]


@looped
async def test_secrets_are_redacted_from_the_reload_on(bench: Bench) -> None:
    """A missing pattern is added without a restart."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "token=abc")
    async with bench.running() as agent:
        await relayed(bench, "token=abc")
        more = '[redact]\npatterns = [{ literal = "token=", regex = "token=\\\\w+" }]'
        await agent.reload(bench.settings(more=more))
        bench.fake.add_lines("j1", "token=def")
        await bench.received(lambda: len(bench.bodies()) == 2)
    assert "def" not in bench.bodies()[1]


@pytest.mark.parametrize("fault", ["identity", "service", "endpoint"])
@looped
async def test_an_invalid_configuration_changes_nothing(bench: Bench, fault: str) -> None:
    """The old one stays in force: same discoveries, same endpoint, and new lines still arrive."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    async with bench.running() as agent:
        await relayed(bench, "a")
        discoveries, settings = agent.discoveries, agent.settings
        bench.services["twin"] = FakeService("twin", identity="fake" if fault == "identity" else "twin")
        otlp = {"ca_file": str(bench.directory / "missing.pem")} if fault == "endpoint" else {}
        changed = bench.settings({"discover": True}, {"service": "twin", "discover": True}, otlp=otlp)
        if fault == "service":
            del bench.services["twin"]
        with pytest.raises((ConfigError, KeyError)):
            await agent.reload(changed)
        assert (agent.discoveries, agent.settings) == (discoveries, settings)
        bench.fake.add_lines("j1", "b")
        await relayed(bench, "a", "b")


@looped
async def test_hangup_reads_the_file_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """SIGHUP applies a changed file; an invalid file is logged and changes nothing; every signal counts."""
    caplog.set_level("INFO")
    bench.fake.add_job("j1")
    path = bench.config()
    async with bench.running() as agent:
        with reload_on_hangup(agent, path):
            good = path.read_text()
            path.write_text("what = ")
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "was not reloaded" in caplog.text)
            path.write_text(good.replace("settle = 0", "settle = 7"))
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "the configuration was reloaded" in caplog.text)
            assert [watch.settle for watch in agent.settings.agent.watch] == [7.0]
        await asyncio.sleep(0)


@looped
async def test_systemd_is_notified_when_a_reload_starts_and_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it fails: `systemctl reload` waits for the end, and the agent keeps running in any case."""
    # tmp_path can be longer than the address of a socket
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"{directory}/notify")
        end.setblocking(False)
        async with bench.running() as agent:
            monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
            path = bench.config()
            path.write_text("what = ")
            with reload_on_hangup(agent, path):
                os.kill(os.getpid(), signal.SIGHUP)
                begun = await asyncio.get_running_loop().sock_recv(end, 100)
                ended = await asyncio.get_running_loop().sock_recv(end, 100)
            await asyncio.sleep(0)
    assert begun.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert ended == b"READY=1"


@looped
async def test_keys_that_need_a_restart_are_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The log names keys that a running agent cannot apply."""
    async with bench.running() as agent:
        await agent.reload(bench.settings(listen="127.0.0.1:0", otlp={"signals": ["logs"]}))
    assert "agent.listen changed" in caplog.text
    assert "otlp.signals changed" in caplog.text


@looped
async def test_nothing_changed(bench: Bench) -> None:
    """The same file again changes no tailer, no service and no endpoint."""
    bench.fake.add_job("j1")
    async with bench.running() as agent:
        await until(lambda: agent.tailers)
        endpoint = agent.endpoints.get("logs")
        assert endpoint is not None
        before = (agent.tailers, agent.discoveries, endpoint.exporter)
        await agent.reload(load_settings(bench.directory / "config.toml"))
        assert (agent.tailers, agent.discoveries, endpoint.exporter) == before
    assert bench.fake.calls.count(("aclose", "")) == 1


@looped
async def test_a_reload_while_the_agent_starts_or_stops_follows_nothing_twice(bench: Bench) -> None:
    """It waits for the start, and does nothing after the stop: one tailer relays each line."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    agent = bench.agent()
    early = asyncio.create_task(agent.reload(bench.settings()))
    await asyncio.sleep(0)
    running = asyncio.create_task(agent.run())
    await early
    await bench.received(lambda: bench.bodies() == ["a"])
    assert len(agent.tailers) == 1
    agent.stop()
    await agent.reload(bench.settings())
    await running
    assert bench.bodies() == ["a"]


@looped
async def test_a_reload_during_a_scan_applies_to_the_jobs_of_the_scan(bench: Bench) -> None:
    """A job that was listed under the old watches, but not started yet, is matched by the new ones."""
    service = bench.services["fake"] = SlowToName()
    for job_id in ("j1", "j2"):
        service.add_job(job_id)
    async with bench.running() as agent:
        await service.asked.wait()
        await agent.reload(bench.settings({"discover": True, "name": "none"}))
        service.answers.set()
        await until(lambda: agent.discoveries[0].has_scanned)
        assert agent.tailers == []


class SlowToName(OddService):
    """A service whose list has no names, and that delays the status of one job."""

    def __init__(self) -> None:
        super().__init__("fake", poll_max_s=30.0, polls_are_free=False)
        self.lists_names = False
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def get_job(self, job_id: str) -> JobStatus:
        """Return a status; for ``j1`` only once the test allows it."""
        if job_id == "j1":
            self.asked.set()
            await self.answers.wait()
        return await super().get_job(job_id)


@looped
async def test_a_broken_plugin_does_not_stop_the_others(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """At start and reload it is logged and reported, the other services are followed; alone it is an error."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    fake_open, broken = bench.open, PluginError("services.acme: the plugin acme failed")

    def opener(name: str, settings: Settings) -> JobService:
        if name == "acme":
            raise broken
        return fake_open(name, settings)

    bench.services["acme"] = FakeService("acme")
    caplog.set_level("INFO")
    bench.open = opener  # type: ignore[method-assign]
    watches = {"discover": True}, {"service": "acme", "discover": True}
    async with bench.running(*watches, listen="127.0.0.1:0") as agent:
        await relayed(bench, "a")
        assert agent.server is not None
        assert page_of(str(bench.state_dir)) == agent.server.url.rstrip("/")
        assert agent.problems() == ["service_acme_unreachable"]
        result = await agent.reload(bench.settings({**watches[0], "settle": 7}, watches[1], listen="127.0.0.1:0"))
        assert (result.changed, result.problems) == (("agent.watch",), (str(broken),))
        bench.fake.add_lines("j1", "b")
        await relayed(bench, "a", "b")
    assert page_of(str(bench.state_dir)) is None
    assert f"the configuration is {bench.directory / 'config.toml'}" in caplog.text
    assert f"logs go to {bench.collector.http_url}/v1/logs" in caplog.text
    assert "services.acme: the plugin acme failed; the other services are followed" in caplog.text
    with pytest.raises(PluginError):
        await bench.agent(watches[1]).run()
