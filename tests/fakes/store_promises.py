"""The promises of `CheckpointStore` as tests: a subclass opens one kind of store and inherits them all."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st

from tailspan_agent.analysis.baseline import KEPT_RUNS, PastRun
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.history import KEPT_FAILURES
from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.checkpoint.rows import Ack, Checkpoint, OutboxSpan
from tailspan_agent.errors import ValueRefusedError
from tests.fakes.agents import looped

LEDGER = '{"first_seen_ns":1}'
_MOD = 1 << 64


def add(store: CheckpointStore, job_id: str = "j1", identity: str = "id", ledger: str = LEDGER) -> Checkpoint:
    """Add a job of the pipeline ``etl``."""
    return store.add_job(identity, job_id, "etl", stream=0, ledger=ledger)


def key_of(store: CheckpointStore, job_id: str = "j1") -> int:
    """Return the store's number for a job, which may differ after a restart."""
    found = store.job("id", job_id)
    assert found is not None
    return found.key


def span(key: int, number: int, data: bytes = b"span") -> OutboxSpan:
    """Return a span of a job."""
    return OutboxSpan(key, f"{number:016x}", b"resource", data)


def past_run(number: int = 0, **fields: Any) -> PastRun:
    """Return an ended run of the pipeline ``etl``."""
    known = {"pipeline": "etl", "result": "success", **fields}
    return PastRun(
        job_id=f"j{number}",
        identity="id",
        trace_id="0a" * 16,
        started_unix_nano=1,
        ended_unix_nano=10**9 * (number + 1),
        duration_s=float(number),
        **known,
    )


def end(store: CheckpointStore, job_id: str, **fields: Any) -> bool:
    """Add a job and end it; return whether it was counted."""
    run = fields.get("run")
    pipeline = run.pipeline if run is not None else "etl"
    return store.end_job(add(store, job_id).key, [], RunTotals(pipeline, "success").add(1.0), **fields)


@dataclass
class _Job:
    """What a store must know of one job."""

    stream: int = 0
    cursor: bytes | None = None
    ledger: str = LEDGER
    complete: bool = False
    late: bool = False
    ended: bool = False
    seconds: dict[int, tuple[int, int]] = field(default_factory=dict)
    spans: dict[str, tuple[bytes, bool]] = field(default_factory=dict)


@dataclass
class _Model:
    """What a store must know after some steps."""

    jobs: dict[str, _Job] = field(default_factory=dict)
    counted: int = 0

    async def equals(self, store: CheckpointStore) -> bool:
        """Return whether a store knows the same."""
        found = _Model(counted=sum(total.count for total in store.totals.values()))
        unsent = {(one.job, one.span_id): one.span for one in store.unsent_spans(1000)}
        for job_id in ("a", "b", "c"):
            known = store.job("id", job_id)
            if known is None:
                continue
            job = found.jobs[job_id] = _Job(known.stream, known.cursor, known.ledger, known.logs_complete, known.late)
            job.ended, job.seconds = known.ended, await store.seconds(known.key)
            job.spans = {span_id: (data, False) for (key, span_id), data in unsent.items() if key == known.key}
        wanted = copy.deepcopy(self)
        for job in wanted.jobs.values():
            job.spans = {span_id: sent for span_id, sent in job.spans.items() if not sent[1]}
        return wanted == found

    def apply(self, store: CheckpointStore, step: tuple[Any, ...]) -> None:
        """Do one step with the store, and note what must follow from it."""
        kind, job_id, value = step
        known = store.job("id", job_id)
        assert (known is not None) == (job_id in self.jobs)
        if known is None:
            add(store, job_id)
            self.jobs[job_id] = _Job()
            return
        job, key = self.jobs[job_id], known.key
        match kind:
            case "ack":
                cursor = b"cursor %d" % value if value % 3 else None
                count = value % 5
                store.ack([Ack(key, cursor, f'{{"first_seen_ns":{value}}}', {value % 3: (count, _MOD - value)})])
                job.cursor, job.ledger = cursor or job.cursor, f'{{"first_seen_ns":{value}}}'
                lines, uid_sum = job.seconds.get(value % 3, (0, 0))
                job.seconds[value % 3] = (lines + count, (uid_sum - value) % _MOD)
            case "ledger":
                store.update_ledger(key, f'{{"first_seen_ns":{value}}}')
                job.ledger = f'{{"first_seen_ns":{value}}}'
            case "stream":
                store.update_stream(key, value)
                job.stream = value
            case "complete":
                late = bool(value % 2)
                store.complete_logs(key, late=late)
                job.complete, job.late = True, late
                job.seconds = job.seconds if late else {}
            case "span":
                new = store.add_spans(key, [span(key, value % 3, b"%d" % value)])
                assert bool(new) == (f"{value % 3:016x}" not in job.spans)
                job.spans.setdefault(f"{value % 3:016x}", (b"%d" % value, False))
            case "end":
                counted = store.end_job(key, [span(key, 9, b"run")], RunTotals("etl", "success").add(1.0))
                assert counted == (not job.ended)
                if counted:
                    job.ended, self.counted = True, self.counted + 1
                    job.spans.setdefault(f"{9:016x}", (b"run", False))
            case "sent":
                sent = [one for one in store.unsent_spans(1000) if one.job == key]
                store.ack_spans(sent)
                for one in sent:
                    job.spans[one.span_id] = one.span, True


STEPS = st.tuples(
    st.sampled_from(("ack", "ack", "ack", "ledger", "stream", "complete", "span", "span", "end", "sent")),
    st.sampled_from("abc"),
    st.integers(1, 30),
)


class StorePromises:
    """Tests of every promise. A subclass says how to open a store."""

    def opened(self, home: Path, *, crash: bool = False) -> AbstractAsyncContextManager[CheckpointStore]:
        """Open the store at a place, the same one each time.

        Args:
            home: The place.
            crash: Whether the store ends like the store of a killed process.
        """
        raise NotImplementedError

    @looped
    async def test_acks_survive(self, tmp_path: Path) -> None:
        """Cursor, ledger, sums and the start of counting are the same after a restart."""
        async with self.opened(tmp_path) as store:
            key = add(store).key
            store.ack([Ack(key, b"1", LEDGER, {5: (2, _MOD - 1)}), Ack(key, b"2", '{"first_seen_ns":2}', {5: (1, 2)})])
            store.update_stream(key, 3)
            started = store.start_unix_nano
        async with self.opened(tmp_path) as store:
            job = store.job("id", "j1")
            assert job is not None
            assert (job.name, job.stream, job.cursor, job.ledger) == ("etl", 3, b"2", '{"first_seen_ns":2}')
            assert await store.seconds(job.key) == {5: (3, 1)}
            assert (store.start_unix_nano, store.recovered, store.write_failed) == (started, None, False)
            assert time.time() - store.acked_at_s < 3600

    @looped
    async def test_what_is_written_survives_a_kill(self, tmp_path: Path) -> None:
        """After `written`, nothing of what came before is lost."""
        async with self.opened(tmp_path, crash=True) as store:
            key = add(store).key
            store.ack([Ack(key, b"here", LEDGER, {7: (1, 1)})])
            store.add_spans(key, [span(key, 1)])
            store.end_job(key, [span(key, 2)], RunTotals("etl", "success").add(1.0), run=past_run())
            await store.written()
        async with self.opened(tmp_path) as store:
            job = store.job("id", "j1")
            assert job is not None
            assert (job.cursor, job.ended, await store.seconds(job.key)) == (b"here", True, {7: (1, 1)})
            assert [one.span_id for one in store.unsent_spans(9)] == [f"{1:016x}", f"{2:016x}"]
            assert [totals.count for totals in store.totals.values()] == [1]
            assert [run.job_id for run in store.history.past_runs()] == ["j0"]

    @looped
    async def test_a_job_is_known_by_identity_and_id(self, tmp_path: Path) -> None:
        """Equal ids at two services are two jobs; adding a known job changes nothing."""
        async with self.opened(tmp_path) as store:
            one, other = add(store), add(store, identity="other")
            assert one.key != other.key
            store.ack([Ack(one.key, b"x", LEDGER)])
            assert store.add_job("id", "j1", "renamed", stream=1, ledger="{}") == store.job("id", "j1")
            assert store.job("id", "j2") is None

    @looped
    async def test_an_ack_without_cursor_leaves_it(self, tmp_path: Path) -> None:
        """Late lines are before the cursor: their ack stores only ledger and sums, and may take lines back."""
        async with self.opened(tmp_path) as store:
            key = add(store).key
            store.ack([Ack(key, b"here", LEDGER, {5: (3, 9)})])
            store.ack([Ack(key, None, '{"first_seen_ns":9}', {5: (-1, _MOD - 2)})])
            job = store.job("id", "j1")
            assert job is not None
            assert (job.cursor, job.ledger) == (b"here", '{"first_seen_ns":9}')
            assert await store.seconds(key) == {5: (2, 7)}

    @looped
    @pytest.mark.parametrize("late", [False, True])
    async def test_the_last_ack_completes_the_log(self, tmp_path: Path, late: bool) -> None:
        """An ack may say that the log is complete; the sums by second stay only if lines may still come."""
        async with self.opened(tmp_path) as store:
            key = add(store).key
            store.ack([Ack(key, b"here", LEDGER, {5: (3, 9)})])
            store.ack([Ack(key, None, '{"first_seen_ns":9}', completes=late)])
            job = store.job("id", "j1")
            assert job is not None
            assert (job.cursor, job.ledger, job.logs_complete, job.late) == (b"here", '{"first_seen_ns":9}', True, late)
            assert await store.seconds(key) == ({5: (3, 9)} if late else {})

    @looped
    async def test_acks_are_one_transaction(self, tmp_path: Path) -> None:
        """Acks that cannot be read to their end are not stored: no cursor is ahead of its sums."""
        async with self.opened(tmp_path) as store:
            key = add(store).key
            with pytest.raises(ZeroDivisionError):
                store.ack(ack for ack in [Ack(key, b"1", LEDGER, {5: (1, 1)}), 1 / 0])  # type: ignore[list-item]
            job = store.job("id", "j1")
            assert job is not None
            assert (job.cursor, await store.seconds(key)) == (None, {})

    @looped
    async def test_a_refused_value_affects_its_own_job(self, tmp_path: Path) -> None:
        """One transaction has the acks of many jobs; one that cannot be stored leaves the others and the store."""
        async with self.opened(tmp_path) as store:
            keys = [add(store, name).key for name in "abc"]
            acks = [Ack(key, b"cursor", "{}") for key in keys]
            acks[1] = Ack(keys[1], b"cursor", "{}", {1 << 70: (1, 1)})
            store.ack(acks)
            await store.written()
            with pytest.raises(ValueRefusedError):
                add(store, "\ud800")
            with pytest.raises(ValueRefusedError):
                store.add_job("id", "d", "d", stream=1 << 64, ledger="{}")
            assert not store.write_failed
        async with self.opened(tmp_path) as store:
            cursors = {name: getattr(store.job("id", name), "cursor", None) for name in "abc"}
            assert cursors == {"a": b"cursor", "b": None, "c": b"cursor"}
            assert store.job("id", "d") is None

    @looped
    async def test_any_name_is_stored(self, tmp_path: Path) -> None:
        """A name of a job may have any character; what no text can have becomes ``?``."""
        async with self.opened(tmp_path) as store:
            for number, name in enumerate(("\ud800", "a\0b", "\N{SNOWMAN}", "")):
                store.add_job("id", f"j{number}", name, stream=0, ledger=LEDGER)
                store.add_name("id", f"j{number}", name)
        async with self.opened(tmp_path) as store:
            assert all(store.job("id", f"j{number}") is not None for number in range(4))
            assert store.names("id")["j2"] == "\N{SNOWMAN}"

    @looped
    async def test_a_span_stays_as_it_was_first_written(self, tmp_path: Path) -> None:
        """Written twice, it keeps its first bytes; acknowledged, it is not sent again, nor made again."""
        async with self.opened(tmp_path) as store:
            first, second = add(store, "first").key, add(store, "second").key
            store.add_spans(second, [span(second, 1)])
            store.add_spans(first, [span(first, 1), span(first, 2)])
            assert store.add_spans(first, [span(first, 2, b"other"), span(first, 3, b"other")]) == {f"{3:016x}"}
            await store.written()
            unsent = store.unsent_spans(10)
            assert sorted((one.job, one.span_id, one.span) for one in unsent) == [
                (first, f"{1:016x}", b"span"),
                (first, f"{2:016x}", b"span"),
                (first, f"{3:016x}", b"other"),
                (second, f"{1:016x}", b"span"),
            ]
            store.ack_spans(one for one in unsent if one.span_id != f"{3:016x}")
        async with self.opened(tmp_path) as store:
            first, second = key_of(store, "first"), key_of(store, "second")
            assert [(one.job, one.span_id, one.span) for one in store.unsent_spans(10)] == [
                (first, f"{3:016x}", b"other")
            ]
            assert store.add_spans(second, [span(second, 1, b"again")]) == set()
            assert store.add_spans(first, [span(first, 3, b"again")]) == set()
            await store.written()
            assert [one.span for one in store.unsent_spans(10)] == [b"other"]

    @looped
    async def test_spans_are_read_up_to_a_size(self, tmp_path: Path) -> None:
        """Hundreds of failed jobs have megabytes of stack traces: one request has a part of them."""
        async with self.opened(tmp_path) as store:
            key = add(store).key
            store.add_spans(key, [OutboxSpan(key, f"{number:016x}", b"r", bytes(1000)) for number in range(10)])
            await store.written()
            assert [len(store.unsent_spans(9, max_bytes)) for max_bytes in (1, 2500, 1 << 30)] == [1, 2, 9]

    @looped
    async def test_a_run_counts_once(self, tmp_path: Path) -> None:
        """The end of a job writes spans and totals together, only once, also across restarts."""
        totals = RunTotals("etl", "failure", "exit 3").add(12.0, trace_id="0a" * 16, span_id="0b" * 8, time_unix_nano=5)
        async with self.opened(tmp_path) as store:
            key = add(store).key
            assert store.end_job(key, [span(key, 1)], totals)
            assert list(store.totals.values()) == [totals]
            assert not store.end_job(key, [span(key, 1), span(key, 2)], totals)
        async with self.opened(tmp_path) as store:
            key = key_of(store)
            assert not store.end_job(key, [span(key, 1), span(key, 2)], totals)
            assert list(store.totals.values()) == [totals]
            assert [one.span_id for one in store.unsent_spans(9)] == [f"{1:016x}"]
            key = add(store, "j2").key
            assert store.end_job(key, [], totals)
            assert list(store.totals.values()) == [totals.merge(totals)]
        async with self.opened(tmp_path) as store:
            assert list(store.totals.values()) == [totals.merge(totals)]

    @looped
    async def test_unfinished_jobs_are_those_with_work_left(self, tmp_path: Path) -> None:
        """A job is finished when its run is counted, its log is complete, and no late line is expected."""
        async with self.opened(tmp_path) as store:
            keys = {name: add(store, name).key for name in ("new", "ended", "read", "late", "done")}
            for name in ("ended", "late", "done"):
                store.end_job(keys[name], [], RunTotals("etl", "success"))
            for name in ("read", "late", "done"):
                store.ack([Ack(keys[name], b"x", LEDGER, {1: (1, 1)})])
                store.complete_logs(keys[name], late=name == "late")
            assert await store.seconds(keys["late"]) == {1: (1, 1)}
            assert await store.seconds(keys["done"]) == {}
        async with self.opened(tmp_path) as store:
            assert [job_id for job_id, _ in chain.from_iterable(store.unfinished_jobs("id"))] == [
                "new",
                "ended",
                "read",
                "late",
            ]
            assert (store.finished_jobs("id"), store.finished_jobs("other")) == ({"done"}, set())
            store.complete_logs(key_of(store, "late"))
            assert store.finished_jobs("id") == {"late", "done"}

    @looped
    async def test_names_are_cached(self, tmp_path: Path) -> None:
        """Names are stored for each service; the last one counts."""
        async with self.opened(tmp_path) as store:
            store.add_name("id", "j1", "old")
            store.add_name("id", "j1", "new")
            store.add_name("other", "j2", "x")
            assert store.names("id") == {"j1": "new"}
        async with self.opened(tmp_path) as store:
            assert (store.names("id"), store.names("other"), store.names("none")) == ({"j1": "new"}, {"j2": "x"}, {})

    @looped
    async def test_old_jobs_are_forgotten(self, tmp_path: Path) -> None:
        """Jobs without a change for long are deleted with their rows; run totals stay."""
        async with self.opened(tmp_path) as store:
            key = add(store, "old").key
            store.ack([Ack(key, b"1", LEDGER, {5: (1, 1)})])
            store.add_name("id", "old", "etl")
            store.add_spans(key, [span(key, 1)])
            store.end_job(key, [], RunTotals("etl", "success").add(1.0))
            await store.written()
            assert await store.forget(3600) == 0
            assert await store.forget(-1) == 0, "an unsent span keeps its job"
            store.ack_spans(store.unsent_spans(9))
            await store.written()
            assert await store.forget(-1, keep={"old"}) == 0, "a job that is followed is kept however silent it is"
            assert await store.forget(-1) == 1
            assert (store.job("id", "old"), store.names("id"), store.finished_jobs("id")) == (None, {}, set())
        async with self.opened(tmp_path) as store:
            assert (store.job("id", "old"), store.names("id")) == (None, {})
            assert [total.count for total in store.totals.values()] == [1]
            assert await store.seconds(add(store, "old").key) == {}

    @looped
    async def test_many_old_jobs_are_forgotten(self, tmp_path: Path) -> None:
        """However many they are; without traces, unsent spans keep none of them."""
        async with self.opened(tmp_path) as store:
            with store.together():
                for number in range(1200):
                    key = add(store, f"j{number}").key
                    if not number % 100:
                        store.add_spans(key, [span(key, 1)])
            await store.written()
            assert await store.forget(-1, keep={"j7"}, keep_unsent=False) == 1199
            assert store.unsent_spans(9) == []
            assert [job_id for job_id, _ in chain.from_iterable(store.unfinished_jobs("id"))] == ["j7"]

    @looped
    async def test_a_clock_that_jumps_forgets_nothing(self, tmp_path: Path) -> None:
        """After a step of the clock, nothing is forgotten before the clock was steady for long."""
        day_s = 86400.0
        async with self.opened(tmp_path) as store:
            now_s = time.time()
            for _ in range(3):
                await store.may_forget(now_s, 30 * day_s)
                now_s += day_s
            assert not await store.may_forget(now_s + 400 * day_s, 30 * day_s)

    @looped
    async def test_history_survives_and_stays_bounded(self, tmp_path: Path) -> None:
        """The newest runs of each pipeline are there after a restart; names that share a label have none."""
        async with self.opened(tmp_path) as store:
            for number in range(KEPT_RUNS + 5):
                end(store, f"j{number}", run=past_run(number))
            end(store, "x", run=past_run(1, pipeline="other", too_fast=True))
            end(store, "y", run=past_run(2, pipeline=OTHER_PIPELINES, too_fast=True))
        async with self.opened(tmp_path) as store:
            runs = store.history.past_runs()
            assert [run.duration_s for run in runs if run.pipeline == "etl"] == list(range(5, KEPT_RUNS + 5))
            assert [run.job_id for run in runs if run.pipeline != "etl"] == ["j1"]
            assert store.history.too_fast() == {"other": 1, OTHER_PIPELINES: 1}

    @looped
    async def test_failures_are_counted_by_fingerprint(self, tmp_path: Path) -> None:
        """A repeated failure of a pipeline is recognized; beyond the limit, the oldest failures are deleted."""
        async with self.opened(tmp_path) as store:
            assert store.history.earlier_failures("etl", "f") == (0, None)
            end(store, "a", run=past_run(5), fingerprint="f")
            end(store, "b", run=past_run(2), fingerprint="f")
            assert store.history.earlier_failures("etl", "f") == (2, 3 * 10**9)
            assert store.history.earlier_failures("other", "f") == (0, None)
        async with self.opened(tmp_path) as store:
            assert store.history.earlier_failures("etl", "f") == (2, 3 * 10**9)
            for number in range(KEPT_FAILURES):
                end(store, f"c{number}", run=past_run(10 + number), fingerprint=f"g{number}")
            await store.written()
            assert store.history.earlier_failures("etl", "g0")[0] == 1
        async with self.opened(tmp_path) as store:
            assert store.history.earlier_failures("etl", "f") == (0, None)

    @looped
    async def test_the_newest_line_of_each_stream(self, tmp_path: Path) -> None:
        """Streams behind the main one are known with the time of their newest line, also if its job has left them."""
        async with self.opened(tmp_path) as store:
            for number, streams in enumerate(("", '"1":5', '"1":2,"12":3', '"2":"bad"')):
                store.add_job(
                    "id", f"j{number}", "etl", stream=0, ledger=f'{{"first_seen_ns":1,"log_streams":{{{streams}}}}}'
                )
            store.add_job("id", "bad", "etl", stream=4, ledger="not JSON")
            assert store.newest_by_stream("etl") == {1: 5, 12: 3}
            assert store.newest_by_stream("other") == {}

    @looped
    async def test_the_page_reads_ledgers(self, tmp_path: Path) -> None:
        """Ledgers are read in the order of their numbers, in parts, and by number."""
        async with self.opened(tmp_path) as store:
            assert await store.ledgers.newest_key() == 0
            for name in "abc":
                add(store, name, ledger=f'{{"first_seen_ns":{ord(name)}}}')
            end(store, "c")
            await store.written()
            rows = await store.ledgers.after(0, 2)
            rows += await store.ledgers.after(rows[-1].key, 2)
            assert [(row.job_id, row.ended) for row in rows] == [("a", False), ("b", False), ("c", True)]
            assert await store.ledgers.newest_key() == rows[-1].key
            assert [row.job_id for row in await store.ledgers.by_key([rows[2].key, 10**9])] == ["c"]
            assert (rows[0].identity, rows[0].name, rows[0].ledger) == ("id", "etl", '{"first_seen_ns":97}')

    def check_steps(self, steps: Sequence[tuple[Any, ...]], written_after: int, crash: bool) -> None:
        """After any writes and a restart the store is the same; after a kill it is as it was at one moment before."""

        @looped
        async def scenario() -> None:
            with TemporaryDirectory() as home:
                model, written, moments = _Model(), 0, [_Model()]
                async with self.opened(Path(home), crash=crash) as store:
                    for number, step in enumerate(steps):
                        model.apply(store, step)
                        moments.append(copy.deepcopy(model))
                        if number == written_after:
                            await store.written()
                            written = len(moments) - 1
                    if not crash:
                        await store.written()
                        assert await model.equals(store), (model, steps)
                        written = len(moments) - 1
                async with self.opened(Path(home)) as store:
                    assert any([await moment.equals(store) for moment in moments[written:]]), (model, steps)

        scenario()
