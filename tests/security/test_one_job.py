"""One job may spoil only itself: what it claims does not stop the logs, spans and metrics of others."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import sqlite3
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tailspan.logs.clean import clean
from tailspan.logs.page import CLEAN, LogPage, TaskRef
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan_agent.analysis.run_totals import COLUMNS, MAX_ERROR_TYPES, RunTotals
from tailspan_agent.analysis.stack_traces import last_stack
from tailspan_agent.checkpoint.store import Ack, OutboxSpan, SqliteStore
from tailspan_agent.errors import ValueRefusedError
from tailspan_agent.job.bounds import DROPPED_ATTRIBUTES
from tailspan_agent.otlp.json_lines import decode_line
from tailspan_agent.pipeline.job_pipeline import JobPipeline
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.receiver import discovery, source, tailer
from tests.fakes.agents import PATIENCE_S, Bench, looped, until
from tests.fakes.collector import Reply

RUNS = "cicd.pipeline.run.duration"
NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
SURROGATE = "\udcff"

POISON: dict[str, dict[str, Any]] = {
    "ended in 9999": {"finished_at": NEVER, "job_status_date": NEVER},
    "failed in 2263": {"state": "FAILED", "finished_at": datetime(2263, 1, 1, tzinfo=UTC)},
    "started in 9999": {"started_at": NEVER, "finished_at": NEVER},
    "began in year 1": {"submitted_at": datetime(1, 1, 1, tzinfo=UTC), "started_at": datetime(1, 1, 1, tzinfo=UTC)},
    "exit code of 80 bits": {"state": "FAILED", "exit_code": 1 << 80},
    "many tasks": {"total_tasks": 1 << 90, "finished_tasks": -(1 << 90)},
    "half a character": {"state": "FAILED", "error": SURROGATE, "url": SURROGATE, "attributes": {SURROGATE: SURROGATE}},
    "no trace": {"trace_id": ""},
    "types": {"exit_code": "1", "attributes": None, "details": 5, "started_at": "now", "error": b"x"},
    "large": {"attributes": {f"k{n}": "v" * 100_000 for n in range(200)}, "error": "\U0001f600" * 100_000},
}


def add(bench: Bench, job_id: str, poison: dict[str, Any]) -> None:
    """Add an ended job with a line, whose status has some other values."""
    fields = {"state": "SUCCEEDED", **poison}
    bench.fake.add_job(job_id, state=fields.pop("state"))
    bench.fake._jobs[job_id].fields.update(fields)
    bench.fake.add_lines(job_id, f"of {job_id}")


@pytest.fixture
def poisoned(bench: Bench) -> Bench:
    """A job of each kind of poison, and between them good ones."""
    for number, (name, poison) in enumerate(POISON.items()):
        add(bench, f"bad {name}", poison)
        add(bench, f"good {number}", {})
    return bench


def test_poison_is_relayed_and_stops_nothing(poisoned: Bench) -> None:
    """All lines, all runs in the metrics, also after a restart; a trace for each job."""
    ids = {*(f"bad {name}" for name in POISON), *(f"good {number}" for number in range(len(POISON)))}
    for _ in range(2):
        result = poisoned.once()
        assert (result.delivered, result.rejected, result.failures) == (True, 0, ())
        assert sorted(poisoned.bodies()) == sorted(f"of {job_id}" for job_id in ids)
        counted = {
            row.attributes["cicd.pipeline.name"]: row.value.count
            for row in poisoned.collector.metrics()
            if row.name == RUNS
        }
        assert counted == dict.fromkeys(ids, 1)
    roots = [span for span in poisoned.collector.spans() if span.name.startswith("RUN ")]
    assert sorted(span.resource["cicd.pipeline.run.id"] for span in roots) == sorted(ids)
    assert len({span.trace_id for span in roots}) == len(ids)


def test_a_job_cannot_claim_to_be_another(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Reserved attributes stay the agent's; the number of those that were dropped is on the telemetry and counted."""
    claims = {"service.instance.id": "x", "cicd.pipeline.run.id": "y", "host_name": "z", "": "empty", "team": "geo"}
    add(bench, "j", {"attributes": claims, "details": {"tailspan.records.rejected": "9"}})
    assert bench.once().delivered
    (row,) = bench.lines()
    assert row.resource["cicd.pipeline.run.id"] == "j"
    assert (row.resource["team"], row.resource[DROPPED_ATTRIBUTES]) == ("geo", "4")
    assert not {"service.instance.id", "host_name", ""} & row.resource.keys()
    assert bench.spans()["run"].attributes["tailspan.records.rejected"] == 0
    assert bench.metric("tailspan.agent.attributes.dropped", service="fake") == 4
    assert [record.message for record in caplog.records if "changed or dropped" in record.message]


def test_rows_and_pages_of_any_kind_stop_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may list ids that are not text, and give lines tasks, streams and times that cannot be."""
    add(bench, "good", {})
    listed, read = bench.fake.list_jobs, bench.fake.read_logs

    async def list_jobs() -> AsyncGenerator[Any, None]:
        yield [ListedJob(job_id=job_id) for job_id in (5, None, [], b"x", SURROGATE, "", "x" * 2000)]  # type: ignore[arg-type]
        yield [ListedJob(job_id="bad", job_name=5, state="?", lines=SURROGATE)]  # type: ignore[arg-type]
        async for rows in listed():
            yield rows

    async def read_logs(job_id: str, *args: Any, **options: Any) -> AsyncGenerator[LogPage, None]:
        async for page in read(job_id, *args, **options):
            if job_id == "bad":
                page.tasks = (TaskRef(SURROGATE, "\U0001f600" * 9999, 1 << 80),)
                page.runs = [
                    run._replace(time_unix_nano=float("nan"), stream=9, task=number, severity=-1)
                    for number, run in enumerate(page.runs)
                ]
            yield page

    monkeypatch.setattr(bench.fake, "list_jobs", list_jobs)
    monkeypatch.setattr(bench.fake, "read_logs", read_logs)
    add(bench, "bad", {})
    bench.fake.add_lines("bad", "another")
    result = bench.once()
    assert (result.delivered, result.rejected) == (True, 0)
    assert sorted(bench.bodies()) == ["another", "of bad", "of good"]


FORGED = {
    "not UTF-8": b"a\xff\xfe",
    "escapes": b"a\x1b]0;title\x07",
    "C1": b"a\xc2\x9b31m",
    "half": b"a\xe2\x82",
    "CR": b"b\ra",
}


def forge(bench: Bench, monkeypatch: pytest.MonkeyPatch, line: bytes, *, as_text: bool) -> None:
    """Add a good job, and one whose pages have this line and claim that it is clean, as an index or a plugin can."""
    read = bench.fake.read_logs

    async def read_logs(job_id: str, *args: Any, **options: Any) -> AsyncGenerator[LogPage, None]:
        async for page in read(job_id, *args, **options):
            if job_id == "bad":
                runs = [run._replace(flags=CLEAN) for run in page.runs]
                lines = None if as_text else [line]
                page = LogPage(lines, runs, page.cursor, page.digests, line + b"\n" if as_text else b"")
            yield page

    monkeypatch.setattr(bench.fake, "read_logs", read_logs)
    add(bench, "good", {})
    add(bench, "bad", {"state": "FAILED"})


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("line", FORGED.values(), ids=FORGED)
def test_lines_that_only_claim_to_be_clean_are_cleaned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, line: bytes, as_text: bool
) -> None:
    """Bytes that are not UTF-8 make a request unreadable, with the lines of all other jobs in it."""
    forge(bench, monkeypatch, line, as_text=as_text)
    result = bench.once()
    assert (result.delivered, result.rejected) == (True, 0)
    assert sorted(bench.bodies()) == sorted([clean(line), "of good"])


def test_a_record_that_is_not_valid_stops_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its reason: the endpoint rejects the request, the lines of other jobs arrive, and it is kept."""
    forge(bench, monkeypatch, FORGED["not UTF-8"], as_text=False)
    monkeypatch.setattr(source, "bounded_page", lambda page: page)
    result = bench.once()
    assert (result.delivered, result.rejected) == (True, 1)
    assert bench.bodies() == ["of good"]
    (line,) = (bench.state_dir / "dead-letter" / "logs.jsonl").read_text().splitlines()
    assert FORGED["not UTF-8"] in base64.b64decode(json.loads(line)["undecodable"])
    assert decode_line(line.encode()) == ("logs", b"")


@pytest.mark.parametrize(
    "exemplar",
    [
        ["ab" * 16, "cd" * 8, 1.0, 253_402_300_799_000_000_000],  # the year 9999
        ["ab" * 16, "cd" * 8, 1.0, 4_102_444_800_000_000_000],  # 2100
        ["ab" * 16, "cd" * 8, 1.0, -1],
        ["ab" * 16, "cd" * 8, 1.0, "today"],
        ["no trace", "cd" * 8, 1.0, 1],
        ["ab" * 16, "cd" * 8, float("nan"), 1],
        ["ab" * 16],
    ],
)
def test_stored_poison_is_healed(bench: Bench, exemplar: list[Any]) -> None:
    """An exemplar that an earlier agent stored does not stop the metrics any more, and its runs still count."""
    add(bench, "good", {})
    assert bench.once().delivered
    with closing(sqlite3.connect(bench.state_dir / "checkpoints.db")) as db, db:
        (row,) = db.execute(f"SELECT {', '.join(COLUMNS)} FROM runs").fetchall()
        db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", ("old", *row[1:5], json.dumps([exemplar])))
        facts = db.execute("SELECT facts FROM history").fetchone()[0]
        changed = {**json.loads(facts), "pipeline": "old", "ended_unix_nano": 253_402_300_799_000_000_000}
        db.execute("INSERT INTO history (pipeline, facts) VALUES ('old', ?)", (json.dumps(changed),))
    bench.collector.drain()
    assert bench.once().delivered
    counts = {row.attributes["cicd.pipeline.name"] for row in bench.collector.metrics() if row.name == RUNS}
    assert counts >= {"good"}
    assert ("old" in counts) == (len(exemplar) == 4)


def test_a_ledger_of_impossible_times_starts_empty(bench: Bench) -> None:
    """Its cursor is kept, so that no line comes again."""
    bench.fake.add_job("j")
    bench.fake.add_lines("j", "one")
    assert bench.once().delivered
    with closing(sqlite3.connect(bench.state_dir / "checkpoints.db")) as db, db:
        db.execute("UPDATE jobs SET facts = ?", (json.dumps({"first_seen_ns": 1, "last_line_ns": 10**25}),))
    bench.fake.add_lines("j", "two")
    bench.fake.set_state("j", JobState.FAILED)
    assert bench.once().delivered
    assert bench.bodies() == ["one", "two"]


def test_an_ack_that_cannot_be_stored_spoils_no_other(tmp_path: Path) -> None:
    """One transaction has the acks of many jobs; the store stays usable."""
    with closing(SqliteStore(tmp_path)) as store:
        keys = [store.add_job("id", name, name, stream=0, ledger="{}").key for name in "abc"]
        acks = [Ack(key, b"cursor", "{}") for key in keys]
        acks[1] = Ack(keys[1], b"cursor", "{}", {1 << 70: (1, 1)})
        store.ack(acks)
        found = [store.job("id", name) for name in "abc"]
        assert [job and job.cursor for job in found] == [b"cursor", None, b"cursor"]
        with pytest.raises(ValueRefusedError):
            store.add_spans(keys[0], [OutboxSpan(keys[0], SURROGATE, b"", b"")])
        with pytest.raises(ValueRefusedError):
            store.add_job("id", "d", "d", stream=1 << 64, ledger="{}")
        with pytest.raises(ValueRefusedError):
            store.add_job("id", SURROGATE, "d", stream=0, ledger="{}")
        assert not store.write_failed


def test_error_types_of_logs_make_a_limited_number_of_series(bench: Bench) -> None:
    """Each run of a pipeline may print an exception of its own; spans have them all."""
    for number in range(MAX_ERROR_TYPES + 5):
        bench.fake.add_job(f"j{number:02d}", job_name="etl", state="FAILED")
        bench.fake.add_lines(f"j{number:02d}", HEADER, FRAME, f"Error{number:02d}: x")
    for _ in range(2):
        assert bench.once().delivered
    counts = {
        row.attributes["error.type"]: row.value
        for row in bench.collector.metrics()
        if row.name == "cicd.pipeline.run.errors"
    }
    assert len(counts) == MAX_ERROR_TYPES + 1
    assert counts["_OTHER"] == 5
    roots = [span for span in bench.collector.spans() if span.name.startswith("RUN ")]
    assert len({span.attributes["error.type"] for span in roots}) == MAX_ERROR_TYPES + 5


def test_spans_are_read_up_to_a_size(tmp_path: Path) -> None:
    """Hundreds of failed jobs have megabytes of stack traces: they are not all in memory for one request."""
    with closing(SqliteStore(tmp_path)) as store:
        key = store.add_job("id", "a", "a", stream=0, ledger="{}").key
        store.add_spans(key, [OutboxSpan(key, f"s{number}", b"r", bytes(1000)) for number in range(10)])
        assert [len(store.unsent_spans(9, max_bytes)) for max_bytes in (1, 2500, 1 << 30)] == [1, 2, 9]


def test_a_point_that_cannot_be_encoded_spoils_no_other(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its reason: the other points of its metric, and all other metrics, are exported."""
    add(bench, "good", {})
    agent = bench.agent()
    bad = RunTotals("bad", "success").add(1.0, trace_id="ab" * 16, span_id="cd" * 8, time_unix_nano=1 << 80)
    agent.store.totals[bad.key] = bad
    assert asyncio.run(agent.run_once(PATIENCE_S)).delivered
    assert {row.attributes["cicd.pipeline.name"] for row in bench.collector.metrics() if row.name == RUNS} == {"good"}
    assert any("left out cicd.pipeline.run.duration" in record.message for record in caplog.records)


class Lines(list[str]):
    """Lines that count how often one of them is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


HEADER = "Traceback (most recent call last):"
GROUP = "  + Exception Group Traceback (most recent call last):"
FRAME = '  File "a.py", line 1, in f'
HOSTILE = {
    "groups without an exception": [GROUP, "  | " + FRAME],
    "groups behind a prefix": ["w1 " + GROUP, "w1   | " + FRAME],
    "headers": [HEADER],
    "headers behind a prefix": ["w1 " + HEADER],
    "frames without an exception": ["w1 " + HEADER, "w1 " + FRAME],
    "Java": ["java.lang.Error: x", "\tat a", "Caused by: x"],
    "panics": ["thread 'a' panicked at x:", "x"],
}


@pytest.mark.parametrize("block", HOSTILE.values(), ids=HOSTILE)
def test_a_search_for_stack_traces_is_linear(block: Sequence[str]) -> None:
    """Nested and broken traces: twice the lines cost at most about twice the reads."""
    short, long = (Lines(block * (size // len(block))) for size in (2000, 8000))
    for lines in (short, long):
        last_stack(lines)
    assert long.reads < 6 * short.reads + 10_000


def test_the_last_lines_of_a_failed_job_are_cut_while_they_are_read(bench: Bench) -> None:
    """A character may take four bytes in memory: three hundred lines of a MiB each would take a GiB."""
    bench.fake.add_job("j", state="FAILED")
    bench.fake._page_lines = 1
    bench.fake.add_lines(
        "j", "x" * ((1 << 20) - 4) + "\U0001f600", "\U0001f600" * (1 << 17), "\x1b[1m" * 10_000 + "y" * 9999
    )
    assert most_held(bench) < 3 * 20_000


def most_held(bench: Bench) -> int:
    """Relay all, and return how much memory the last lines took."""
    sizes: list[int] = []
    real = tailer.last_lines

    async def measured(*args: Any) -> list[str]:
        lines = await real(*args)
        sizes.append(sum(map(sys.getsizeof, lines)))
        return lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tailer, "last_lines", measured)
        assert bench.once().delivered
    (size,) = sizes
    return size


def test_a_crowd_of_ended_jobs_is_opened_a_few_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are relayed, whatever their number; the agent never holds more than a few tailers."""
    monkeypatch.setattr(discovery, "_FIRST_TURNS", 5)
    for number in range(60):
        add(bench, f"j{number:02d}", {})
    agent, most = bench.agent(), 0

    async def run() -> None:
        nonlocal most
        once = asyncio.create_task(agent.run_once(PATIENCE_S))
        while not once.done():
            most = max(most, len(agent.tailers))
            await asyncio.sleep(0)
        assert (await once).delivered

    asyncio.run(run())
    assert 0 < most <= 10  # a tailer whose first turn is over may not have ended yet
    assert len(bench.bodies()) == 60


def test_a_relayed_job_takes_no_memory(bench: Bench) -> None:
    """Its objects know each other, but none waits for the garbage collector, which runs rarely."""
    add(bench, "freed", {})
    gc.collect()
    gc.disable()
    try:
        agent = bench.agent()
        assert asyncio.run(agent.run_once(PATIENCE_S)).delivered
        tailers = [one for one in gc.get_objects() if isinstance(one, tailer.Tailer) and one.job_id == "freed"]
        pipelines = [one for one in gc.get_objects() if isinstance(one, JobPipeline) and one.status.job_id == "freed"]
    finally:
        gc.enable()
    assert (tailers, pipelines) == ([], [])


@looped
async def test_a_crowd_of_running_jobs_leaves_the_loop_free(bench: Bench) -> None:
    """However many jobs wake at one moment: between two passes of the loop, only a few take their turn."""
    polled = 0
    real = bench.fake.get_job

    async def counted(job_id: str) -> JobStatus:
        nonlocal polled
        polled += 1
        return await real(job_id)

    bench.fake.get_job = counted  # type: ignore[method-assign]
    for number in range(200):
        bench.fake.add_job(f"j{number}")
    most = before = 0
    async with bench.running() as agent:
        while len([one for one in agent.tailers if one.followed]) < 200 or polled < 200:
            await asyncio.sleep(0)
            most, before = max(most, polled - before), polled
    assert most <= 40


@looped
async def test_a_stop_does_not_wait_for_the_crowd(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that wait for their turn are left to the next start, which relays them."""
    monkeypatch.setattr(discovery, "_FIRST_TURNS", 2)
    for number in range(30):
        add(bench, f"j{number:02d}", {})
    bench.collector.always("logs", Reply(503))
    async with bench.running() as agent:
        await until(lambda: agent.discoveries and len(agent.discoveries[0].backlog) >= 20)
    assert len(agent.discoveries[0].backlog) == 0
    assert agent.tailers == []


@looped
async def test_a_crowd_that_waits_takes_no_more_memory_with_each_list(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs that wait are listed again every minute, for as long as their endpoint needs for those before them."""
    monkeypatch.setattr(discovery, "_FIRST_TURNS", 2)
    for number in range(30):
        add(bench, f"j{number:02d}", {})
    bench.collector.always("logs", Reply(503))
    async with bench.running() as agent:
        await until(lambda: agent.discoveries and len(agent.discoveries[0].backlog) == 28)
        (found,) = agent.discoveries
        for _ in range(3):
            found._full_scan_at_s = float("-inf")
            await found.scan()
        waiting = found.backlog._pipelines.values()
        assert sum(1 if isinstance(each, str) else len(each) for each in waiting) == 28


@looped
async def test_the_order_of_a_large_stream_costs_little() -> None:
    """Ten thousand jobs of one pipeline leave one by one: each step wakes those that may go on, and no other."""
    order, woken = StreamOrder(), 0
    hour_ns = 3600 * 10**9

    async def member(number: int) -> None:
        nonlocal woken
        order.join("etl", number, number * hour_ns)
        await order.turn("etl", number)
        woken += 1
        order.leave("etl", number)

    count = 2000
    for number in range(count):
        order.join("etl", number, number * hour_ns)
    tasks = [asyncio.create_task(member(number)) for number in range(count)]
    passes = 0
    while woken < count:
        await asyncio.sleep(0)
        passes += 1
    await asyncio.gather(*tasks)
    assert passes < 4 * count
