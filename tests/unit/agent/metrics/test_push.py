"""The periodic export of metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tailspan.errors import ConfigError
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry, TooLarge
from tailspan_agent.metrics import push as push_module
from tailspan_agent.metrics.push import MetricsPush, export_interval_s
from tests.unit.agent.metrics.test_snapshot import running
from tests.unit.agent.metrics.world import World


class ScriptedExporter:
    """An exporter with scripted outcomes, then success; it records the payloads."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.sent: list[tuple[bytes, int]] = []
        self.called = asyncio.Event()

    async def export(self, payload: bytes, count: int) -> Outcome:
        """Export one payload several times with one exporter."""
        self.sent.append((payload, count))
        self.called.set()
        return self.outcomes.pop(0) if self.outcomes else Delivered()


def exported(world: World, outcomes: Sequence[Outcome]) -> list[bool]:
    """Export once per outcome."""

    async def main() -> list[bool]:
        push = MetricsPush(world.reader, world.agent, ScriptedExporter(*outcomes))
        return [await push.export() for _ in outcomes]

    return asyncio.run(main())


def test_export_counts_failures_and_logs_each_change_once(caplog):
    """A failure is counted by kind, and logged when it starts and ends, not at each interval."""
    caplog.set_level("INFO")
    world = World()
    down = Retry("connection refused")
    outcomes = [Delivered(), down, down, EndpointFault("HTTP 404"), Rejected(3, "odd"), TooLarge("413"), Delivered()]
    assert exported(world, outcomes) == [True, False, False, False, False, False, True]
    assert world.values("tailspan.agent.export.errors") == {
        ("unavailable", "metrics"): 2,
        ("endpoint_fault", "metrics"): 1,
        ("invalid", "metrics"): 1,
        ("too_large", "metrics"): 1,
    }
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "connection refused",
        "HTTP 404",
        "odd",
        "413",
        "export of metrics works again",
    ]


@pytest.mark.parametrize(
    ("outcome", "up"),
    [(Delivered("hm"), 1), (Rejected(1, "odd"), 1), (Retry("no"), 0), (EndpointFault("HTTP 404"), 0)],
)
def test_endpoint_up_follows_the_last_export(outcome, up):
    """An endpoint that rejects a batch is up; one that is unreachable or does not accept metrics is not."""
    world = World()
    exported(world, [outcome])
    assert world.values("tailspan.agent.endpoint.up") == {("metrics",): up}


def test_metrics_that_cannot_be_encoded_do_not_stop_the_agent():
    """A failing store costs one export, and is reported."""
    world = World()

    class Broken(list):
        def __iter__(self):
            raise ValueError("disk on fire")

    world.runs = Broken()

    async def main() -> tuple[bool, str | None]:
        push = MetricsPush(world.reader, world.agent, ScriptedExporter())
        return await push.export(), push.problem

    delivered, problem = asyncio.run(main())
    assert not delivered
    assert "disk on fire" in (problem or "")


def test_run_exports_at_once_at_intervals_and_at_the_end():
    """The last export has the changes since the one before."""
    world = World()

    async def main() -> list[tuple[bytes, int]]:
        exporter, stop = ScriptedExporter(), asyncio.Event()
        push = MetricsPush(world.reader, world.agent, exporter, interval_s=0.001)
        task = asyncio.create_task(push.run(stop))
        while len(exporter.sent) < 3:
            exporter.called.clear()
            await exporter.called.wait()
        world.agent.records_read("local", 41)
        stop.set()
        await task
        return exporter.sent

    sent = asyncio.run(main())
    last = ExportMetricsServiceRequest.FromString(sent[-1][0])
    assert "tailspan.agent.records.read" in str(last)
    assert all(count > 0 for _, count in sent)


@pytest.mark.parametrize(
    ("cost_s", "given_s", "interval_s"), [(0.001, None, 15), (0.03, None, 20), (3, None, 60), (3, 7, 7)]
)
def test_exports_are_rarer_the_more_they_cost(cost_s, given_s, interval_s):
    """Metrics of thousands of jobs cost little; an interval that the user has set stays."""
    world = World()
    push = MetricsPush(world.reader, world.agent, ScriptedExporter(), interval_s=given_s)
    world.reader.cost_s = cost_s
    assert push.interval_s == pytest.approx(interval_s)


def test_the_cost_of_a_request_is_its_own_cpu_time():
    """Work of other tasks between its steps does not count."""
    world = World()

    async def busy(stop: asyncio.Event) -> None:
        while not stop.is_set():
            sum(range(100_000))
            await asyncio.sleep(0)

    async def main() -> tuple[float, float]:
        stop = asyncio.Event()
        other = asyncio.create_task(busy(stop))
        await asyncio.sleep(0)
        begun_s = time.thread_time()
        await world.reader.metrics_request_in_steps()
        stop.set()
        await other
        return world.reader.cost_s, time.thread_time() - begun_s

    cost_s, with_others_s = asyncio.run(main())
    assert 0 < cost_s < with_others_s / 2


def sent_within(world: World, change_s: float, outcomes: Sequence[Outcome] = (), interval_s: float = 600) -> int:
    """Return how many exports there are within some time after two changes of runs in a row."""

    async def main() -> int:
        exporter, stop = ScriptedExporter(*outcomes), asyncio.Event()
        task = asyncio.create_task(MetricsPush(world.reader, world.agent, exporter, interval_s=interval_s).run(stop))
        await exporter.called.wait()
        for _ in range(2):
            await asyncio.sleep(0.01)
            world.agent.run_changes.set()
        await asyncio.sleep(change_s)
        sent = len(exporter.sent)
        task.cancel()
        return sent

    return asyncio.run(main())


def test_a_run_is_exported_soon_and_only_once_for_a_burst(monkeypatch):
    """A run that is shorter than the interval is seen while it is active; a burst of runs goes with one export."""
    monkeypatch.setattr(push_module, "_RUN_GAP_S", 0.05)
    assert sent_within(World(), 2.0) == 2


def test_exports_for_runs_are_limited_to_one_in_a_gap():
    """Changes do not make an export before 5 s have passed since the last one."""
    assert sent_within(World(), 1.0) == 1


def test_a_change_of_runs_does_not_bother_an_endpoint_that_fails(monkeypatch):
    """While exports fail, the interval alone decides."""
    monkeypatch.setattr(push_module, "_RUN_GAP_S", 0.05)
    assert sent_within(World(), 1.0, [Retry("down")]) == 1


def test_the_end_of_a_series_survives_a_failed_export():
    """Only an export that the endpoint accepted ends the matter."""
    world = World()
    world.jobs = [running()]
    exported(world, [Delivered()])
    world.jobs = []
    exported(world, [Retry("down")])
    assert "tailspan.job.progress" in world.ended()
    exported(world, [Delivered()])
    assert world.ended() == {}


def test_replace_exporter():
    """After a reload, the next export goes to the new endpoint."""
    world = World()

    async def main() -> tuple[int, int]:
        old, new = ScriptedExporter(), ScriptedExporter()
        push = MetricsPush(world.reader, world.agent, old)
        await push.export()
        push.replace_exporter(new)
        await push.export()
        return len(old.sent), len(new.sent)

    assert asyncio.run(main()) == (1, 1)


@pytest.mark.parametrize(("text", "seconds"), [("", None), ("1000", 1.0), (" 60000 ", 60.0), ("1", 0.001)])
def test_export_interval_is_in_milliseconds(text, seconds):
    """The variable has the meaning of the specification."""
    assert export_interval_s({"OTEL_METRIC_EXPORT_INTERVAL": text}) == seconds


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1.5", "²"])
def test_an_invalid_export_interval_is_an_error(text):
    """An invalid interval is an error with its name."""
    with pytest.raises(ConfigError, match="OTEL_METRIC_EXPORT_INTERVAL") as caught:
        export_interval_s({"OTEL_METRIC_EXPORT_INTERVAL": text})
    assert caught.value.key == "OTEL_METRIC_EXPORT_INTERVAL"
