"""Jobs into a Loki with its default limits: every line is stored, whatever the sizes, overlaps and ages."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tailspan_agent.exporter.dead_letter import summarize
from tests.fakes.agents import Bench
from tests.fakes.collector import Collector, Reply, Request
from tests.fakes.loki import MIB, Limits, Loki


@pytest.fixture
def loki(collector: Collector) -> Loki:
    """A Loki behind the collector's address, with a rate that no test has to wait for."""
    loki = Loki(Limits(rate_bytes_s=1000 * MIB))
    collector.always("logs", loki)
    return loki


def add_job(bench: Bench, job_id: str, lines: list[str], *, start: datetime, step_ms: int = 10, name: str = "") -> None:
    """Add an ended job whose lines are `step_ms` apart."""
    end = start + timedelta(milliseconds=step_ms * len(lines))
    times = {"submitted_at": start, "started_at": start}
    bench.fake.add_job(job_id, job_name=name or job_id, **times)
    bench.fake.add_lines(job_id, *lines, timestamp_ms=int(start.timestamp() * 1000), step_ms=step_ms)
    bench.fake.set_state(job_id, "SUCCEEDED", finished_at=end, job_status_date=end)


def own_lines(loki: Loki, name: str) -> list[str]:
    """Return the stored lines of a pipeline without receipts and failures."""
    return [line for line in loki.lines(service_name=name) if line.startswith("line ")]


def an_hour_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


@pytest.mark.parametrize(
    ("jobs", "lines", "attributes"),
    [(1, 6_000, 0), (5, 2_000, 0), (1, 5_000, 12)],
    ids=["one long job", "several jobs at once", "many attributes"],
)
def test_a_burst_passes(bench: Bench, loki: Loki, jobs: int, lines: int, attributes: int) -> None:
    """More lines than fit into one message of the distributor: each batch has as many as it accepts."""
    expected = [f"line {number} of a job that {'prints quite a lot of text, ' * 50}at once" for number in range(lines)]
    for number in range(jobs):
        add_job(bench, f"job{number}", expected, start=an_hour_ago(), step_ms=1, name=f"burst{number}")
    watch = {"discover": True, "attributes": {f"attribute.{number}": "v" * 150 for number in range(attributes)}}
    result = bench.once(watch, timeout_s=300, otlp={"timeout": "120s"})  # on a busy machine the double is slow
    assert (result.delivered, result.rejected) == (True, 0)
    assert loki.rejected == {}
    for number in range(jobs):
        assert own_lines(loki, f"burst{number}") == expected


@pytest.mark.parametrize("apart_s", [0, 2400], ids=["at the same time", "40 minutes apart"])
def test_overlapping_jobs_of_one_name_after_an_absence(bench: Bench, loki: Loki, apart_s: int) -> None:
    """Three runs of two hours each, read one after the other: none is too far behind another."""
    start = datetime.now(UTC) - timedelta(hours=4)
    for number in range(3):
        lines = [f"line {step} of run {number}" for step in range(240)]
        add_job(
            bench, f"run{number}", lines, start=start + timedelta(seconds=number * apart_s), step_ms=30_000, name="etl"
        )
    result = bench.once({"discover": True, "lookback": "24h"}, timeout_s=300)
    assert (result.delivered, result.rejected) == (True, 0)
    assert sorted(own_lines(loki, "etl")) == sorted(
        f"line {step} of run {number}" for step in range(240) for number in range(3)
    )


def test_a_job_of_long_lines_with_wide_metadata(bench: Bench, loki: Loki) -> None:
    """Lines of 200 KB, of which a batch of our size would be above the burst of a default Loki."""
    expected = [f"line {number} " + "x" * 200_000 for number in range(60)]
    add_job(bench, "wide", expected, start=an_hour_ago())
    result = bench.once(timeout_s=300)
    assert (result.delivered, result.rejected) == (True, 0)
    assert own_lines(loki, "wide") == expected


def test_one_refused_line_costs_no_other_job_its_receipt(bench: Bench, loki: Loki) -> None:
    """A line that the store does not accept is rejected alone; other jobs of its batch are complete."""
    week = datetime.now(UTC) - timedelta(days=8)
    add_job(bench, "old", ["line too old"], start=week, name="old")
    for number in range(3):
        add_job(bench, f"new{number}", [f"line {number}"], start=an_hour_ago(), name=f"new{number}")
    result = bench.once({"discover": True, "lookback": "30d"}, timeout_s=300)
    assert (result.delivered, result.rejected) == (True, 2)  # its line and its receipt
    assert [line for number in range(3) for line in own_lines(loki, f"new{number}")] == ["line 0", "line 1", "line 2"]
    receipts = [line for line in loki.lines() if " read, " in line]
    assert sorted(receipts) == [f"new{number}: 1 line read, 1 record acked, 0 rejected" for number in range(3)]


@pytest.mark.parametrize("ago", [timedelta(seconds=5), timedelta(hours=5)], ids=["now", "long ago"])
def test_a_failure_is_in_a_stream_of_events(bench: Bench, loki: Loki, ago: timedelta) -> None:
    """Apart from the lines, so that a query for failures reads none of them; the receipt stays with the lines."""
    for number in range(2):
        add_job(bench, f"job{number}", [f"line {number}"] * 50, start=datetime.now(UTC) - ago, name="etl")
    bench.fake.set_state("job1", "FAILED")
    assert bench.once({"discover": True}, timeout_s=300).rejected == 0
    streams = {dict(labels).get("service_instance_id", ""): entries for labels, entries in loki.streams.items()}
    events = [entry.line for name, entries in streams.items() if name.startswith("events") for entry in entries]
    assert [line.partition("\n")[0] for line in events] == ["etl: line 1"]
    assert len(own_lines(loki, "etl")) == 100
    assert len(streams) == 2


@pytest.mark.parametrize("jobs", [1, 4])
def test_two_agents_do_not_share_a_stream_of_old_lines(bench: Bench, loki: Loki, tmp_path: Path, jobs: int) -> None:
    """Two hosts that backfill overlapping jobs of one name: no line is too far behind the newest of others."""

    async def backfill(host: Bench, hours: int) -> int:
        host.directory.mkdir()
        for number in range(jobs):
            start = datetime.now(UTC) - timedelta(hours=hours, minutes=number)
            lines = [f"line {step} of job {number}, {hours} h ago" for step in range(50)]
            add_job(host, f"job{number}", lines, start=start, step_ms=300_000, name="etl")
        return (await host.agent({"discover": True, "lookback": "30d"}).run_once(300)).rejected

    async def run() -> list[int]:
        hosts = {hours: Bench(tmp_path / f"host{hours}", bench.collector) for hours in (30, 33)}
        return await asyncio.gather(*(backfill(host, hours) for hours, host in hosts.items()))

    assert asyncio.run(run()) == [0, 0]
    assert len(own_lines(loki, "etl")) == 100 * jobs


@pytest.mark.parametrize(
    ("days", "behind_h", "setting"),
    [
        (8, 0, "raise limits_config.reject_old_samples_max_age"),
        (1, 5, "time_sharding_enabled"),
        (-0.04, 0, "correct the clock that the lines' times come from"),
    ],
    ids=["too old", "behind the first line", "an hour in the future"],
)
def test_lines_of_a_rejected_age_are_reported(
    bench: Bench, loki: Loki, caplog: pytest.LogCaptureFixture, days: float, behind_h: int, setting: str
) -> None:
    """The agent's log names the job, how many of its lines, and the setting of Loki that accepts them."""
    start = datetime.now(UTC) - timedelta(days=days)
    add_job(bench, "old", ["line 0"] if behind_h else [], start=start)
    old_ms = int((start - timedelta(hours=behind_h)).timestamp() * 1000)
    bench.fake.add_lines("old", *(f"line {number}" for number in range(40)), timestamp_ms=old_ms, step_ms=1)
    add_job(bench, "new", ["line 0"], start=an_hour_ago())
    with caplog.at_level("WARNING"):
        bench.once({"discover": True, "lookback": "30d"}, timeout_s=300)
    (message,) = (text for text in caplog.messages if text.startswith("job old "))
    assert message.startswith("job old (old) of service fake: 40 lines rejected because of age")
    assert setting in message
    assert not any(text.startswith("job new ") for text in caplog.messages)
    assert own_lines(loki, "new") == ["line 0"]


@pytest.mark.parametrize("size", [255 * 1024, 256 * 1024, 256 * 1024 + 1, 257 * 1024])
def test_a_line_around_the_largest_size(bench: Bench, loki: Loki, size: int) -> None:
    """No record is above the limit of a default Loki: a longer line is two records."""
    add_job(bench, "long", ["line 0", "line 1 ".ljust(size, "x"), "line 2"], start=an_hour_ago())
    assert bench.once(timeout_s=300).rejected == 0
    stored = [line for line in loki.lines("long") if " read, " not in line]
    assert [line[:6] for line in stored] == [
        "line 0",
        "line 1",
        *["xxxxxx"[: size - 256 * 1024]][: size > 256 * 1024],
        "line 2",
    ]
    assert sum(map(len, stored)) == size + len("line 0line 2")


def test_a_line_above_the_stores_limit_arrives_shortened(bench: Bench, loki: Loki) -> None:
    """Its receipt says so: the line is not lost, and nothing of the job is rejected."""
    loki.limits = Limits(rate_bytes_s=1000 * MIB, line_bytes=100_000)
    add_job(bench, "long", ["line 0", "line 1 ".ljust(200_000, "x"), "line 2"], start=an_hour_ago())
    assert bench.once(timeout_s=300).rejected == 0
    assert [len(line) > 60_000 for line in own_lines(loki, "long")] == [False, True, False]
    (receipt,) = (entry.line for stream in loki.streams.values() for entry in stream if " read, " in entry.line)
    assert receipt == "long: 3 lines read, 3 records acked, 0 rejected, 1 shortened"
    (kept,) = summarize(bench.state_dir / "dead-letter")
    assert (kept.kind, kept.rejected) == ("too_large", 1)


def test_more_names_than_the_store_has_streams_for(bench: Bench, loki: Loki) -> None:
    """Further names share a stream instead of stopping all logs; the metric counts them, the name stays readable."""
    loki.limits = Limits(rate_bytes_s=1000 * MIB, streams=6)
    for number in range(12):
        add_job(bench, f"job{number}", [f"line {number}"], start=datetime.now(UTC) - timedelta(minutes=1))
    result = bench.once(timeout_s=300, max_log_names=5)
    assert (result.delivered, result.rejected) == (True, 0)
    assert len(loki.streams) == 6
    stored = {line for line in loki.lines() if line.startswith("line ")}
    assert stored == {f"line {number}" for number in range(12)}
    assert loki.lines("#other#", cicd_pipeline_name="job11") or loki.lines("job11")
    assert bench.metric("tailspan.agent.log_names.shared") == 7


def test_names_with_lines_of_now_and_of_the_past(bench: Bench, loki: Loki) -> None:
    """Each stream counts, not each name: a name with a backfill has two."""
    loki.limits = Limits(rate_bytes_s=1000 * MIB, streams=12)
    for number in range(9):
        lines = [f"line {step} of the past" for step in range(3)]
        add_job(bench, f"old{number}", lines, start=datetime.now(UTC) - timedelta(hours=5), name=f"name{number}")
        add_job(bench, f"new{number}", ["line of now"], start=datetime.now(UTC), name=f"name{number}")
    result = bench.once({"discover": True, "lookback": "24h"}, timeout_s=300, max_log_names=10)
    assert (result.delivered, result.rejected, loki.rejected) == (True, 0, {})
    assert sum(line.startswith("line ") for line in loki.lines()) == 36


def test_jobs_of_one_name_do_not_overtake_each_other(bench: Bench, loki: Loki) -> None:
    """The receipt of a job, and the lines of the next one, may be newer by more than Loki allows."""
    begin = datetime.now(UTC) - timedelta(hours=5)
    runs = ((28, 1, 6), (13, 1, 46), (58, 1, 68), (32, 2000, 98), (17, 1, 132), (61, 17, 117), (49, 17, 165))
    for run, (minute, number, minutes) in enumerate(runs):
        lines = [f"line {step} of run {run}" for step in range(number)]
        start = begin + timedelta(minutes=minute)
        add_job(bench, f"run{run}", lines, start=start, step_ms=minutes * 60_000 // number, name="etl")
    result = bench.once({"discover": True, "lookback": "24h"}, timeout_s=300)
    assert (result.delivered, result.rejected, loki.rejected) == (True, 0, {})
    assert len(own_lines(loki, "etl")) == sum(number for _, number, _ in runs)


def test_lines_sent_again_are_equal(bench: Bench, loki: Loki, collector: Collector) -> None:
    """A batch that was stored but not acknowledged is sent again, and a store that drops equal entries drops it."""
    lost = iter([True, True, False, True])
    collector.always("logs", lambda request: Reply(cut="answer") if loki(request) and next(lost, False) else Reply(204))
    lines = [f"line {number}" for number in range(50)]
    add_job(bench, "again", lines, start=datetime.now(UTC) - timedelta(hours=6), step_ms=240_000)
    result = bench.once({"discover": True}, timeout_s=300)
    assert (result.rejected, loki.rejected) == (0, {})
    assert own_lines(loki, "again") == lines


def test_an_agent_that_stops_among_overlapping_jobs(bench: Bench, loki: Loki, collector: Collector) -> None:
    """The next agent does not know what the store has of the last requests, and puts no line too far behind them."""

    def answer(request: Request) -> Reply:
        reply = loki(request)
        return Reply(cut="answer") if request.count > 20 else reply

    collector.always("logs", answer)
    watch, numbers = {"discover": True, "lookback": "24h"}, (1, 300, 17, 200, 100, 2)
    for run, (number, minutes) in enumerate(zip(numbers, (180, 48, 96, 150, 18, 120), strict=True)):
        start = datetime.now(UTC) - timedelta(hours=5) + timedelta(minutes=11 * run % 40)
        lines = [f"line {step} of run {run}" for step in range(number)]
        add_job(bench, f"run{run}", lines, start=start, step_ms=minutes * 60_000 // number, name="etl")
    for more in (3, 2, 2):
        goal = loki.requests + more
        bench.once_until(lambda goal=goal: loki.requests >= goal, watch)
    collector.always("logs", loki)
    result = bench.once(watch, timeout_s=300)
    assert (result.delivered, result.rejected, loki.rejected) == (True, 0, {})
    assert len(set(own_lines(loki, "etl"))) == sum(numbers)
