"""`LogQueue` and `SpanQueue`: batches in order, one in flight, a bounded queue, and acks after delivery only."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

import pytest

from tailspan_agent.checkpoint.store import Ack, OutboxSpan, SqliteStore
from tailspan_agent.exporter.endpoints import Endpoint
from tailspan_agent.exporter.outcome import Delivered, Outcome, Rejected, Retry
from tailspan_agent.exporter.retry import RetryingExporter
from tailspan_agent.job.ledger import ChunkResult
from tailspan_agent.otlp.log_record import LogRecordData, encode_log_record
from tailspan_agent.otlp.requests import encode_resource
from tailspan_agent.pipeline.queue import BATCH_BYTES, Chunk, Fence, LogQueue, SpanQueue
from tests.fakes.agents import looped, until
from tests.fakes.otlp_rows import REQUESTS, log_rows

KIB = 1024


class FakeEndpoint:
    """An exporter that the test holds in its hands.

    Attributes:
        payloads: Every request, in order.
        outcomes: What to answer next, one each; then Delivered.
        most_at_once: The most requests that were in flight at one time.
    """

    endpoint = "memory"

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.outcomes: list[Outcome] = []
        self.open = asyncio.Event()
        self.open.set()
        self.most_at_once = 0
        self.closed = False
        self._now = 0

    async def export(self, payload: bytes, count: int) -> Outcome:
        assert not self.closed
        self.payloads.append(payload)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await self.open.wait()
        finally:
            self._now -= 1
        return self.outcomes.pop(0) if self.outcomes else Delivered()

    async def aclose(self) -> None:
        self.closed = True

    def bodies(self) -> list[list[str]]:
        return [[row.body for row in log_rows(REQUESTS["logs"].FromString(payload))] for payload in self.payloads]


class DeadLetter:
    async def add(self, signal: str, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Keep nothing."""


def sender(fake: FakeEndpoint) -> RetryingExporter:
    return RetryingExporter("logs", fake, DeadLetter(), jitter=lambda: 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """An open store."""
    store = SqliteStore(tmp_path)
    yield store
    store.close()


class Job:
    """A job whose chunks have their position in the cursor.

    Attributes:
        results: What `Chunk.on_result` was called with, in order.
        stored: How many chunks are stored.
    """

    def __init__(self, store: SqliteStore, name: str) -> None:
        self.name = name
        self.key = store.add_job("id", name, name, stream=0, ledger="{}").key
        self.results: list[ChunkResult] = []
        self.stored = 0
        self._store = store

    def chunk(self, number: int, *, count: int = 1, size: int = 0) -> Chunk:
        record = LogRecordData(
            time_unix_nano=1, body=f"{self.name} {number}" + "x" * size, trace_id=b"t" * 16,
            span_id=b"s" * 8,
        )  # fmt: skip
        return self._chunk([(encode_log_record(record), 1)] * count, b"%d" % number)

    def empty(self) -> Chunk:
        """Return a page whose lines were all dropped."""
        return self._chunk([(b"", 0)], None)

    def _chunk(self, pieces: list[tuple[bytes, int]], cursor: bytes | None) -> Chunk:
        def on_result(result: ChunkResult) -> Ack:
            self.results.append(result)
            return Ack(self.key, cursor, "{}")

        def on_stored() -> None:
            self.stored += 1

        return Chunk(encode_resource({"service.name": self.name}), deque(pieces), on_result, on_stored)

    @property
    def cursor(self) -> bytes | None:
        job = self._store.job("id", self.name)
        assert job is not None
        return job.cursor


@asynccontextmanager
async def running(queue: LogQueue | SpanQueue) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@looped
async def test_chunks_arrive_in_order_one_request_at_a_time(store: SqliteStore) -> None:
    """Also of several jobs; the checkpoint is that of the last chunk."""
    fake = FakeEndpoint()
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    async with running(queue):
        for number in range(50):
            for job in jobs:
                await queue.put(job.chunk(number))
            await asyncio.sleep(0)
        await queue.flush()
    bodies = [body for batch in fake.bodies() for body in batch]
    for job in jobs:
        assert [body for body in bodies if body.startswith(job.name)] == [f"{job.name} {n}" for n in range(50)]
        assert (job.cursor, job.stored) == (b"49", 50)
    assert fake.most_at_once == 1
    assert queue.idle


@looped
async def test_nothing_is_acked_before_the_endpoint_has_it(store: SqliteStore) -> None:
    """A chunk in flight has no checkpoint; a retry sends the same bytes."""
    fake = FakeEndpoint()
    fake.open.clear()
    fake.outcomes = [Retry("later", 0.01)]
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    async with running(queue):
        await queue.put(job.chunk(1))
        await until(lambda: fake.payloads)
        assert (job.cursor, job.stored, queue.idle) == (None, 0, False)
        fake.open.set()
        await queue.flush()
    assert job.cursor == b"1"
    assert fake.payloads == [fake.payloads[0]] * 2


@looped
async def test_a_full_queue_makes_its_tailers_wait(store: SqliteStore) -> None:
    """While the endpoint hangs, the queue is bounded; empty chunks count too; cancelled ones leave nothing behind."""
    fake = FakeEndpoint()
    fake.open.clear()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    put: list[int] = []

    async def feed() -> None:
        for number in range(1000):
            await queue.put(job.chunk(number, size=100 * KIB) if number % 2 else job.empty())
            put.append(number)

    async with running(queue):
        feeding = asyncio.create_task(feed())
        await until(lambda: len(put) > 20)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(put) * 50 * KIB < 6 << 20
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        fake.open.set()
        await queue.flush()
    assert [body.split("x")[0] for batch in fake.bodies() for body in batch] == [f"a {n}" for n in put if n % 2]


@looped
async def test_chunks_without_lines_are_not_endless(store: SqliteStore) -> None:
    """Pages whose lines were all dropped wait behind a batch that hangs, in a bounded queue."""
    fake = FakeEndpoint()
    fake.open.clear()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    async with running(queue):
        await queue.put(job.chunk(1))
        await until(lambda: fake.payloads)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_feed(queue, [job.empty() for _ in range(10_000)]), 0.5)
        fake.open.set()
        await queue.flush()
    assert len(fake.payloads) == 1


async def _feed(queue: LogQueue, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        await queue.put(chunk)


@looped
async def test_batches_stay_below_what_collectors_take(store: SqliteStore) -> None:
    """Several chunks in one request, up to 3 MiB; one chunk that is larger goes alone."""
    fake = FakeEndpoint()
    fake.open.clear()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")

    async def feed() -> None:
        for number, size in enumerate([1, *[700] * 8, 4000, 1]):
            await queue.put(job.chunk(number, size=size * KIB))

    async with running(queue):
        feeding = asyncio.create_task(feed())
        await until(lambda: fake.payloads)
        fake.open.set()
        await feeding
        await queue.flush()
    sizes = [len(payload) for payload in fake.payloads]
    assert sum(size > BATCH_BYTES + 10 * KIB for size in sizes) == 1
    assert len(sizes) < 11
    assert job.cursor == b"10"


@looped
async def test_a_chunk_that_does_not_fit_is_sent_in_pieces(store: SqliteStore) -> None:
    """Each batch is full, lines stay in order, and the chunk is acknowledged once, when all of it is delivered."""
    fake = FakeEndpoint()
    fake.outcomes = [Delivered(), Rejected(2, "too old", "too_old")]
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    async with running(queue):
        for number, job in enumerate(jobs):
            await queue.put(job.chunk(number, count=500, size=8 * KIB))
        await queue.flush()
    sizes = [len(payload) for payload in fake.payloads]
    assert len(sizes) == 3
    assert all(BATCH_BYTES * 15 // 16 < size < BATCH_BYTES + 10 * KIB for size in sizes[:-1])
    assert [body.split("x")[0] for batch in fake.bodies() for body in batch] == ["a 0"] * 500 + ["b 1"] * 500
    assert [[result.rejected for result in job.results] for job in jobs] == [[2], [0]]
    assert [(job.cursor, job.stored) for job in jobs] == [(b"0", 1), (b"1", 1)]


@looped
async def test_a_chunk_of_which_a_piece_was_cut_is_dropped_whole(store: SqliteStore) -> None:
    """Else an agent that has a job again would acknowledge lines that it has not sent."""
    fake, void, dropped = FakeEndpoint(), [False], []
    fake.open.clear()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    chunk = job.chunk(0, count=500, size=8 * KIB)
    chunk.fence = Fence(lambda: void[0], lambda: dropped.append(1))
    async with running(queue):
        await queue.put(chunk)
        await until(lambda: fake.payloads)
        void[0] = True
        await queue.abandon(cut=True)
        await until(lambda: dropped)
        void[0] = False
        fake.open.set()
        await queue.flush()
    assert (len(fake.payloads), dropped, job.results, job.cursor) == (1, [1], [], None)


@looped
async def test_few_lines_linger_for_more(store: SqliteStore) -> None:
    """Lines that come one by one are sent together."""
    fake = FakeEndpoint()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    async with running(queue):
        for number in range(5):
            await queue.put(job.chunk(number))
            await asyncio.sleep(0)  # the queue runs, and waits for more
        await until(lambda: job.cursor == b"4")
    assert len(fake.payloads) == 1


@looped
async def test_lines_that_a_store_may_reject_travel_apart_from_other_jobs(store: SqliteStore) -> None:
    """Loki reports only what it rejects of the last stream of a request; chunks of one job still go together."""
    fake = FakeEndpoint()
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    for name, alone in ("aa", False), ("ba", False), ("ab", False), ("ac", True), ("bb", False), ("bc", True):
        chunk = jobs["ab".index(name[0])].chunk("abc".index(name[1]))
        chunk.alone = alone
        await queue.put(chunk)
    async with running(queue):
        await queue.flush()
    assert fake.bodies() == [["a 0", "a 1", "b 0"], ["a 2"], ["b 1", "b 2"]]


@looped
async def test_old_lines_of_one_request_are_close_in_time(store: SqliteStore) -> None:
    """A store that has them already accepts them again; other streams, and lines of now, do not matter."""
    fake, minute_ns, noted = FakeEndpoint(), 60 * 10**9, []
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    for name, number, minute in ("a", 0, 0), ("b", 0, 90), ("a", 1, 20), ("b", 1, 0), ("a", 2, 29), ("a", 3, 31):
        chunk = jobs["ab".index(name)].chunk(number)
        chunk.stream = "" if name == "b" else name
        chunk.oldest_ns = chunk.newest_ns = minute * minute_ns
        chunk.on_send = partial(noted.append, (len(fake.payloads), minute))
        await queue.put(chunk)
    async with running(queue):
        await queue.flush()
    assert fake.bodies() == [["a 0", "a 1", "a 2", "b 0", "b 1"], ["a 3"]]
    assert len(noted) == 6


@looped
async def test_rejected_records_are_done(store: SqliteStore) -> None:
    """They are acknowledged, and counted with a short reason."""
    fake = FakeEndpoint()
    fake.outcomes = [Rejected(3, "line 17 of job x is too old", "partial")]
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    await queue.put(job.chunk(1, count=2))
    await queue.put(job.chunk(2, count=2))
    async with running(queue):
        await queue.flush()
    assert [(result.rejected, result.kind, result.identified) for result in job.results] == [
        (2, "partial", True),
        (1, "partial", True),
    ]
    assert (job.cursor, job.stored) == (b"2", 2)


@looped
async def test_a_partly_refused_batch_of_two_jobs(store: SqliteStore) -> None:
    """The count is correct, but the jobs of the records are unknown: the receipts of both jobs must say so."""
    fake = FakeEndpoint()
    fake.outcomes = [Rejected(1, "too old", "partial")]
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    for job in jobs:
        await queue.put(job.chunk(1))
    async with running(queue):
        await queue.flush()
    results = [result for job in jobs for result in job.results]
    assert sum(result.rejected for result in results) == 1
    assert [result.identified for result in results] == [False, False]


@looped
async def test_a_disk_that_refuses_is_waited_for(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    """Lines are neither skipped nor sent again: the ack is written when the disk accepts it."""
    fake = FakeEndpoint()
    queue, job = LogQueue(store, Endpoint(sender(fake))), Job(store, "a")
    await store.written()
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with running(queue):
            await queue.put(job.chunk(1))
            await until(lambda: "waiting until the disk is usable" in caplog.text)
            assert job.stored == 0
            other.execute("ROLLBACK")
            await queue.flush()
    assert (job.cursor, len(fake.payloads)) == (b"1", 1)


@looped
async def test_another_sender_takes_over_what_is_in_flight(store: SqliteStore) -> None:
    """Reload while a batch hangs: the same bytes go to the new endpoint, and the old one is closed."""
    old, new = FakeEndpoint(), FakeEndpoint()
    old.open.clear()
    endpoint = Endpoint(sender(old))
    queue, job = LogQueue(store, endpoint), Job(store, "a")
    async with running(queue):
        await queue.put(job.chunk(1))
        await until(lambda: old.payloads)
        await endpoint.replace_exporter(sender(new))
        await queue.flush()
    assert new.payloads == old.payloads
    assert (old.closed, endpoint.delivered) == (True, 1)


@looped
async def test_an_outlet_that_is_ended_while_it_changes_hands_ends() -> None:
    """Cancelled and exchanged at the same moment: the cancellation wins, or the agent would never stop."""
    old, new = FakeEndpoint(), FakeEndpoint()
    old.open.clear()
    new.open.clear()
    endpoint = Endpoint(sender(old))
    sending = asyncio.create_task(endpoint.deliver(b"x", 1))
    await until(lambda: old.payloads)
    using = asyncio.create_task(endpoint.replace_exporter(sender(new)))
    await asyncio.sleep(0)
    sending.cancel()
    await asyncio.wait([sending])
    assert sending.cancelled()
    await using
    assert new.payloads == []


@looped
async def test_spans_are_sent_as_they_were_written_and_once(store: SqliteStore) -> None:
    """Sent from the store, in requests of bounded size, and acknowledged there."""
    fake = FakeEndpoint()
    key = Job(store, "a").key
    spans = [OutboxSpan(key, f"{number:016x}", b"", bytes([18, 4]) + b"%04d" % number) for number in range(1200)]
    store.add_spans(key, spans)
    queue = SpanQueue(store, Endpoint(sender(fake)))
    async with running(queue):
        await queue.flush()
        assert store.unsent_spans(1) == []
        sent = len(fake.payloads)
        assert 3 <= sent < 10
        await queue.flush()
        assert len(fake.payloads) == sent
        store.add_spans(key, [OutboxSpan(key, "f" * 16, b"", b"\x12\x04more")])
        queue.wake()
        await queue.flush()
    assert b"".join(fake.payloads).count(b"\x12\x04") >= 1201
    assert b"more" in fake.payloads[-1]


@looped
async def test_spans_that_are_not_taken_stay(store: SqliteStore) -> None:
    """Stopped while the endpoint hangs: the next process sends the same bytes."""
    fake = FakeEndpoint()
    fake.open.clear()
    key = Job(store, "a").key
    store.add_spans(key, [OutboxSpan(key, "1" * 16, b"", b"\x12\x04span")])
    async with running(SpanQueue(store, Endpoint(sender(fake)))):
        await until(lambda: fake.payloads)
    assert len(store.unsent_spans(9)) == 1
    second = FakeEndpoint()
    queue = SpanQueue(store, Endpoint(sender(second)))
    async with running(queue):
        await queue.flush()
    assert second.payloads == fake.payloads


@looped
async def test_a_void_chunk_takes_no_other_job_with_it(store: SqliteStore) -> None:
    """A batch has lines of several jobs; those of a job that this agent still follows are sent."""
    fake, void, dropped = FakeEndpoint(), [False], []
    queue, jobs = LogQueue(store, Endpoint(sender(fake))), [Job(store, "a"), Job(store, "b")]
    chunks = [job.chunk(number) for number, job in enumerate(jobs)]
    chunks[0].fence = Fence(lambda: void[0], lambda: dropped.append("a"))
    chunks[0].on_send = lambda: void.__setitem__(0, True)  # while what is sent is stored
    chunks[1].fence = Fence(lambda: False, lambda: dropped.append("b"))
    for chunk in chunks:
        await queue.put(chunk)
    async with running(queue):
        await queue.flush()
    assert (fake.bodies(), dropped) == ([["b 1"]], ["a"])
    assert [job.cursor for job in jobs] == [None, b"1"]
