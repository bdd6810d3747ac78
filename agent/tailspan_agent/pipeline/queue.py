"""`LogQueue` and `SpanQueue`: bounded queues between the tailers and the endpoint, and the acks that come back.

All chunks of a job go through one queue, and a queue has one request in flight, so the order of a job's lines holds.
A full queue pauses its tailers (backpressure): nothing is dropped, and memory stays bounded.

    LogQueue   log chunks of the jobs hashed onto it -> batch -> endpoint -> ack in the checkpoint store
    SpanQueue  finished spans from the store         -> batch -> endpoint -> ack in the checkpoint store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.checkpoint.rows import Ack, OutboxSpan
from tailspan_agent.errors import CheckpointError, LeaseLostError
from tailspan_agent.exporter.endpoints import Endpoint
from tailspan_agent.exporter.retry import SHORTENED, DeliveryResult, Rejection
from tailspan_agent.job.ledger import ChunkResult
from tailspan_agent.otlp.requests import logs_request, traces_request
from tailspan_agent.pipeline.store_streams import WINDOW_NS
from tailspan_agent.tasks import Flag, Signal

__all__ = ["BATCH_BYTES", "Chunk", "Fence", "LogQueue", "SpanQueue", "copied_bytes", "until_usable"]

BATCH_BYTES = 3 << 20
"""A collector's gRPC server takes 4 MiB by default; the envelope is small."""
_STORED_BYTES = 4 << 20
"""The most that a batch may take in a store that copies the resource to each line, as Loki does: its distributor sends
a batch to an ingester in one gRPC message, of 4 MiB at most by default."""
_COPIED_BYTES = 100
"""What Loki adds to each line, less the labels: ids in hexadecimal, observed time, scope, level."""
_QUEUE_BYTES = 3 << 20
_LINGER_S = 0.05
_SPANS_LINGER_S = 0.1
_LINGER_LINES = 500
_RETRY_STORE_S = 1.0
_SPANS_A_REQUEST = 500
_CHUNK_BYTES = 1024  # of the object itself: a chunk whose lines were all dropped takes room too

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Fence(NamedTuple):
    """When another agent follows a job from now on, what was read of it here must not be sent any more.

    Attributes:
        is_void: Returns whether the chunk must not be sent.
        on_void: Called once if it was not sent.
    """

    is_void: Callable[[], bool]
    on_void: Callable[[], None]


class Chunk(msgspec.Struct):
    """Encoded records of one page of one job.

    Attributes:
        resource: The job's encoded resource.
        pieces: Framed log records and their number, for each piece that is still to be sent: a batch has whole pieces.
            At least one, without records if every line of the page was dropped by configuration.
        on_result: Called once with the outcome of all records; returns what to store, if anything.
        on_stored: Called once after that was stored.
        alone: Whether no request may mix it with other resources: a store may reject some of its lines, and Loki
            reports only what it rejects of the last stream of a request.
        stream: What the store sees as one stream; empty if its times do not matter.
        oldest_ns: The time of its oldest record, in ns since the epoch; only with `stream`.
        newest_ns: The time of its newest record.
        on_send: Called before its first records are sent, which wait until what it stores is on disk.
        fence: What may make the chunk void before it is sent; None: nothing.
        result: The outcome of the records that were sent.
        is_dropped: Whether a part of it was void: then the rest is, too, even if the job comes back to this agent.
    """

    resource: bytes
    pieces: deque[tuple[bytes, int]]
    on_result: Callable[[ChunkResult], Ack | None]
    on_stored: Callable[[], None]
    alone: bool = False
    stream: str = ""
    oldest_ns: int = 0
    newest_ns: int = 0
    on_send: Callable[[], None] | None = None
    fence: Fence | None = None
    result: ChunkResult = msgspec.field(default_factory=ChunkResult)
    is_dropped: bool = False

    @property
    def count(self) -> int:
        """The number of records that are still to be sent."""
        return sum([count for _, count in self.pieces])

    @property
    def is_void(self) -> bool:
        """Whether the chunk must not be sent."""
        return self.is_dropped or (self.fence is not None and self.fence.is_void())

    def on_void(self) -> None:
        """Note, once, that the chunk or a part of it was not sent."""
        if self.fence is not None and not self.is_dropped:
            self.is_dropped = True
            self.fence.on_void()

    @property
    def size(self) -> int:
        """The room that the chunk takes in the queue, in bytes."""
        return sum([len(records) for records, _ in self.pieces]) + _CHUNK_BYTES


class _Piece(msgspec.Struct):
    """A piece of a chunk in a batch.

    Attributes:
        chunk: The chunk.
        records: Its framed records.
        count: The number of records.
        is_last: Whether no piece of the chunk is left.
    """

    chunk: Chunk
    records: bytes
    count: int
    is_last: bool


def copied_bytes(resource: bytes) -> int:
    """Return about how many bytes a store adds to each line of a job that has this resource."""
    return len(resource) + _COPIED_BYTES


class _StreamTimes:
    """The times of the streams in one batch: a store must accept it again if it has it already."""

    def __init__(self) -> None:
        self._times_ns: dict[str, tuple[int, int]] = {}

    def fits(self, chunk: Chunk) -> bool:
        """Add a chunk, unless its stream then has times too far apart."""
        if not chunk.stream:
            return True
        known = self._times_ns.get(chunk.stream)
        oldest_ns, newest_ns = known or (chunk.oldest_ns, chunk.newest_ns)
        oldest_ns, newest_ns = min(oldest_ns, chunk.oldest_ns), max(newest_ns, chunk.newest_ns)
        if known and newest_ns - oldest_ns > WINDOW_NS:
            return False
        self._times_ns[chunk.stream] = oldest_ns, newest_ns
        return True


async def _until_stored(use_store: Callable[[], T], what: str) -> T:
    """Retry until the store works: to give up would repeat lines, to continue would skip them."""
    logged = False
    while True:
        try:
            return use_store()
        except LeaseLostError:
            raise  # no wait brings the job back
        except CheckpointError as error:
            if not logged:
                _log.error("%s: waiting until the disk is usable: %s", what, error)
                logged = True
            await asyncio.sleep(_RETRY_STORE_S)


async def until_usable(store: CheckpointStore) -> None:
    """Wait until the store can be written again."""
    while True:
        await asyncio.sleep(_RETRY_STORE_S)
        if store.is_writable():
            return


class LogQueue:
    """A bounded, ordered queue of chunks with one request in flight.

    Args:
        store: The store for the acks.
        endpoint: The logs endpoint.
    """

    def __init__(self, store: CheckpointStore, endpoint: Endpoint) -> None:
        self._store = store
        self._endpoint = endpoint
        self._queue: deque[Chunk] = deque()
        self._queued_bytes = self._queued_lines = 0
        self._filled, self._left = Signal(), Signal()
        self._busy = False
        self._sending: asyncio.Task[DeliveryResult] | None = None
        self._in_flight: list[_Piece] = []
        self._lingers = True

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        return not self._queue and not self._busy

    async def room(self) -> None:
        """Wait while the queue is full; call it before encoding, because a page is smaller than its records."""
        if not self._has_room():
            await self._left.wait_for(self._has_room)

    def _has_room(self) -> bool:
        return self._queued_bytes < _QUEUE_BYTES

    async def put(self, chunk: Chunk) -> None:
        """Queue a chunk; wait while the queue is full."""
        await self.room()
        self._queue.append(chunk)
        self._queued_bytes += chunk.size
        self._queued_lines += chunk.count
        self._filled.notify()

    async def flush(self) -> None:
        """Wait until nothing is queued or in flight."""
        self._lingers = False
        self._filled.notify()
        await self._left.wait_for(lambda: self.idle)

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            try:
                # No name for the batch: it would keep the last jobs in memory until the next one.
                await self._deliver(await self._next_batch())
            finally:
                self._busy = False
            self._left.notify()

    async def _next_batch(self) -> list[_Piece]:
        await self._filled.wait_for(lambda: bool(self._queue))
        if not self._worth_sending():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_S):
                    await self._filled.wait_for(self._worth_sending)
        batch = self._take_batch()
        self._busy = True
        self._left.notify()
        return batch

    def _take_batch(self) -> list[_Piece]:
        batch: list[_Piece] = []
        size = stored = 0
        alone = mixed = False
        times = _StreamTimes()
        while self._queue:
            chunk = self._queue[0]
            if chunk.fence is not None and chunk.is_void:
                self._queue.popleft()
                self._void(chunk)
                continue
            alone = alone or chunk.alone
            mixed = mixed or (bool(batch) and chunk.resource != batch[0].chunk.resource)
            if (alone and mixed) or not times.fits(chunk):
                break
            records, count = chunk.pieces[0]
            size += len(records)
            stored += len(records) + count * copied_bytes(chunk.resource)
            if batch and (size > BATCH_BYTES or stored > _STORED_BYTES):
                break
            chunk.pieces.popleft()
            self._queued_bytes -= len(records)
            self._queued_lines -= count
            batch.append(_Piece(chunk, records, count, is_last=not chunk.pieces))
            if not chunk.pieces:
                self._queue.popleft()
                self._queued_bytes -= _CHUNK_BYTES
        return batch

    def _void(self, chunk: Chunk) -> None:
        """Count a chunk as left that is not sent."""
        self._queued_bytes -= chunk.size
        self._queued_lines -= chunk.count
        chunk.on_void()

    def _worth_sending(self) -> bool:
        return not self._lingers or self._queued_lines >= _LINGER_LINES

    async def _deliver(self, batch: list[_Piece]) -> None:
        result = DeliveryResult(0)
        if any(piece.count for piece in batch):
            with contextlib.suppress(LeaseLostError):
                await self._store_sent(batch)
            if batch[0].chunk.fence is not None:
                batch = _without_void(batch)
        count = sum(piece.count for piece in batch)
        if count:
            payload = logs_request(
                _by_resource((piece.chunk.resource, piece.records) for piece in batch if piece.count)
            )
            for piece in batch:
                piece.records = b""  # megabytes that the payload has now
            sent = await self._send(batch, payload, count)
            if sent is None:
                for piece in batch:
                    piece.chunk.on_void()
                return
            result = sent
        if result.rejections or result.retries:
            for piece, outcome in zip(batch, _results(batch, result), strict=True):
                piece.chunk.result += outcome
        done = [piece.chunk for piece in batch if piece.is_last]
        if done:
            acks = _acks(done)
            await _until_stored(lambda: self._store.ack(acks), "the checkpoint of sent lines")
        for chunk in done:
            chunk.on_stored()

    async def _store_sent(self, batch: list[_Piece]) -> None:
        """Store what the endpoint may have from now on, and wait until it is on disk."""
        new = [piece.chunk.on_send for piece in batch if piece.chunk.on_send is not None]
        if not new:
            return

        def store() -> None:
            with self._store.together():
                for on_send in new:
                    on_send()

        await _until_stored(store, "the newest lines of log streams")
        await self._store.written()
        for piece in batch:
            piece.chunk.on_send = None

    async def _send(self, batch: list[_Piece], payload: bytes, count: int) -> DeliveryResult | None:
        """Send a batch until its outcome is final; None if it was cut, because all of it is void."""
        if batch[0].chunk.fence is None:
            return await self._endpoint.deliver(payload, count)
        self._in_flight = batch
        self._sending = asyncio.create_task(self._endpoint.deliver(payload, count))
        try:
            await asyncio.wait([self._sending])
            if not self._sending.cancelled():
                return self._sending.result()
        finally:
            self._sending.cancel()
            self._sending, self._in_flight = None, []
        return None

    async def abandon(self, *, cut: bool) -> None:
        """Drop the chunks that are void.

        Args:
            cut: Whether to cut the request in flight, too, if all of it is void.
        """
        if cut and self._sending is not None and all(piece.chunk.is_void for piece in self._in_flight):
            self._sending.cancel()
        queued, self._queue = self._queue, deque()
        for chunk in queued:
            if chunk.is_void:
                self._void(chunk)
            else:
                self._queue.append(chunk)
        self._left.notify()


def _acks(done: Iterable[Chunk]) -> list[Ack]:
    """Return the acks of chunks that are delivered."""
    acks = []
    for chunk in done:
        try:
            ack = chunk.on_result(chunk.result)
        except Exception:
            # The lines are delivered. Without this ack they are sent again after a restart: only this job's.
            _log.exception("an ack of one job cannot be stored (please report); those of other jobs are")
            continue
        if ack is not None:
            acks.append(ack)
    return acks


def _without_void(batch: Sequence[_Piece]) -> list[_Piece]:
    """Return the pieces of chunks that are not void; only those of jobs that another agent follows are dropped."""
    kept = []
    for piece in batch:
        if piece.chunk.is_void:
            piece.chunk.on_void()
        else:
            kept.append(piece)
    return kept


def _results(batch: Sequence[_Piece], result: DeliveryResult) -> Iterator[ChunkResult]:
    """Yield the outcome of each piece of a batch."""
    starts, position = {}, 0
    for group in _grouped((piece.chunk.resource, piece) for piece in batch).values():
        for piece in group:
            starts[id(piece)] = position
            position += piece.count
    for piece in batch:
        rejected, shortened, kind, reason, identified = 0, 0, "", "", True
        for part in result.rejections:
            first, last = starts[id(piece)], starts[id(piece)] + piece.count
            shared = min(last, part.start + part.count) - max(first, part.start)
            if shared <= 0:
                continue
            if part.kind == SHORTENED:
                shortened += shared
                continue
            kind, reason = part.kind, part.reason
            if part.rejected == part.count:
                rejected += shared
                continue
            # The endpoint has reported only a number of records: the first ones of the part stand for them.
            rejected += max(0, min(last, part.start + part.rejected) - max(first, part.start))
            identified = identified and _is_of_one_job(batch, starts, part)
        resent = piece.count * result.retries
        if not rejected:
            kind = reason = ""
        yield ChunkResult(rejected, kind, identified, resent, shortened=shortened, reason=reason)


def _is_of_one_job(batch: Sequence[_Piece], starts: Mapping[int, int], part: Rejection) -> bool:
    end = part.start + part.count
    resources = {
        piece.chunk.resource
        for piece in batch
        if starts[id(piece)] < end and starts[id(piece)] + piece.count > part.start
    }
    return len(resources) == 1


class SpanQueue:
    """Sends finished spans from the store to the traces endpoint.

    Args:
        store: Holds the spans, exactly as first written, until they are acknowledged.
        endpoint: The traces endpoint.
    """

    def __init__(self, store: CheckpointStore, endpoint: Endpoint) -> None:
        self._store = store
        self._endpoint = endpoint
        self._has_spans = asyncio.Event()
        self._idle = asyncio.Event()
        self._hurry = asyncio.Event()
        self._sending: asyncio.Task[DeliveryResult] | None = None
        self._settled = Flag(is_set=True)
        self._has_spans.set()

    def wake(self) -> None:
        """Send the spans that were written to the store."""
        self._idle.clear()
        self._has_spans.set()

    async def flush(self) -> None:
        """Wait until every span in the store is acknowledged, and that is on disk."""
        self._hurry.set()
        self.wake()
        await self._idle.wait()
        await self._store.written()

    async def run(self) -> None:
        """Send spans until cancelled."""
        while True:
            await self._has_spans.wait()
            # Jobs write their spans one by one, and a request costs as much as a thousand lines: gather them.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SPANS_LINGER_S):
                    await self._hurry.wait()
            self._has_spans.clear()
            # Sent before it is written, a span could be made again after a crash, and not be equal.
            await self._store.written()
            while spans := await _until_stored(self._unsent, "reading the spans to send"):
                self._settled.clear()
                try:
                    await self._send(spans)
                finally:
                    self._settled.set()
            if not self._has_spans.is_set():
                self._idle.set()

    async def _send(self, spans: list[OutboxSpan]) -> None:
        payload = traces_request(_by_resource((span.resource, span.span) for span in spans))
        self._sending = asyncio.create_task(self._endpoint.deliver(payload, len(spans)))
        try:
            await asyncio.wait([self._sending])
            if self._sending.cancelled():
                return
            self._sending.result()
        finally:
            self._sending.cancel()
        await _until_stored(partial(self._store.ack_spans, spans), "the checkpoint of sent spans")

    async def nothing_in_flight(self) -> None:
        """Wait until no request is on its way, and the spans of the last one are acknowledged in the store."""
        await self._settled.wait()

    def abandon(self) -> None:
        """Cut the request in flight; its spans are sent again by the agent that has their job."""
        if self._sending is not None:
            self._sending.cancel()

    def _unsent(self) -> list[OutboxSpan]:
        return self._store.unsent_spans(_SPANS_A_REQUEST, BATCH_BYTES)


def _by_resource(items: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, list[bytes]]]:
    """Group by resource, keeping the order in which each first came and the order within each."""
    return list(_grouped(items).items())


def _grouped(items: Iterable[tuple[bytes, T]]) -> dict[bytes, list[T]]:
    groups: dict[bytes, list[T]] = {}
    for resource, item in items:
        groups.setdefault(resource, []).append(item)
    return groups
