"""Reads log streams of CloudWatch Logs: many streams of many jobs with one request, each event once.

FilterLogEvents is the only call that returns ids of events, and it takes 100 streams. GetLogEvents takes one stream,
and its token skips what becomes visible late. An event has the time of its host and becomes visible seconds later, so
a read goes back by the late window and drops the ids that it had.

Source: the model of CloudWatch Logs in botocore 1.44.8.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, NamedTuple

from tailspan.errors import ConfigError, JobNotFoundError
from tailspan.logs.page import DIGEST_BYTES, MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, Line, LogPage, TaskRef
from tailspan.services._gathering import Gathering, Waiting
from tailspan.services._http_service import drop_oldest, pack_cursor, unpack_cursor
from tailspan.services.aws.requests import AwsReply, AwsRequests

__all__ = ["CloudWatchReader", "EventPosition", "LogStream"]

_MOST_STREAMS = 100
_GATHER_S = 1.0
_MOST_IDS = 5_000
# A merged read is for what came since the last one; what is more has a request of its own.
_MERGED_S = 120.0
_MERGED_PAGES = 3
# Without a time to begin at, CloudWatch Logs returns many empty pages; lines are hardly older than their job.
_BEFORE_START_MS = 86_400_000
# A host sends its lines in batches, and the date of a reply has no fractions of a second.
_SENT_LATE_MS = 20_000
_MISSING_S = 60.0
_WRITES_ON_MS = 300_000
_MOST_KNOWN = 10_000


class LogStream(NamedTuple):
    """Where the lines of an attempt of a task are.

    Attributes:
        region: The region of the log group.
        group: The name of the log group.
        name: The name of the stream.
        task: The attempt.
        began_ms: When it began, or a time before that, in ms since the epoch.
        ended_ms: When it ended, in ms since the epoch; None while it runs.
    """

    region: str
    group: str
    name: str
    task: TaskRef | None = None
    began_ms: int = 0
    ended_ms: int | None = None

    @property
    def place(self) -> tuple[str, str]:
        """What one request can read: streams of one region and group."""
        return self.region, self.group


class EventPosition:
    """How far the streams of a job were read: the newest time, and the ids of the events of the late window before it.

    Attributes:
        newest_ms: The time of the newest event, at most the time when it was ingested; -1 without one.
    """

    def __init__(self, newest_ms: int, floor_ms: int, ids: dict[bytes, int]) -> None:
        self.newest_ms = newest_ms
        self._floor_ms = floor_ms
        self._ids = ids
        self._in_ms = Counter(ids.values())

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> EventPosition:
        """Return the position of a cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        try:
            times, ids = list(map(int, parts.get("t", []))), bytes(parts.get("i", b""))
            found = [ids[start : start + DIGEST_BYTES] for start in range(0, len(ids), DIGEST_BYTES)]
            return cls(int(parts.get("n", -1)), int(parts.get("f", 0)), dict(zip(found, times, strict=True)))
        except (TypeError, ValueError):
            text = f"{(cursor or b'')[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None

    def start_ms(self, late_window_s: float) -> int:
        """Return the time from which the next read begins."""
        return max(self._floor_ms, self.newest_ms - int(late_window_s * 1000), 0)

    def take(self, event: Mapping[str, Any]) -> int | None:
        """Note an event as read; return its number among those of its millisecond, None if it was read before."""
        ms, one = int(event["timestamp"]), _short(event["eventId"])
        if one in self._ids or ms < self._floor_ms:
            return None
        # A program can give an event a time up to two hours ahead; reads after that would miss all others.
        self.newest_ms = max(self.newest_ms, min(ms, int(event.get("ingestionTime") or ms)))
        self._ids[one] = ms
        number = self._in_ms[ms]
        self._in_ms[ms] += 1
        return number

    def forget(self, late_window_s: float) -> None:
        """Drop the ids that no later read will see; of very many, the oldest, which are then not read again."""
        first = self.start_ms(late_window_s)
        if len(self._ids) > _MOST_IDS:
            kept = sorted(self._ids.values())[-_MOST_IDS]
            first = self._floor_ms = max(first, min(kept, self.newest_ms))
        if first > min(self._in_ms, default=first):
            self._ids = {one: ms for one, ms in self._ids.items() if ms >= first}
            self._in_ms = Counter(self._ids.values())

    def pack(self) -> bytes:
        """Return the cursor."""
        parts = {"n": self.newest_ms, "f": self._floor_ms, "t": list(self._ids.values()), "i": b"".join(self._ids)}
        return pack_cursor(parts)


class _StreamRead(NamedTuple):
    """A read of a few streams of one place that has few lines before it."""

    streams: Sequence[LogStream]
    start_ms: int

    @property
    def kind(self) -> tuple[str, str, int]:
        """What reads of one request have in common: the place, and about how long ago they begin.

        A silent job begins long ago: a busy one must not have its lines read again from there.
        """
        age_s = max(time.time() - self.start_ms / 1000, 0.0)
        return (*self.streams[0].place, int(age_s / _MERGED_S).bit_length())


class _Found(NamedTuple):
    """The answer to a read.

    Attributes:
        events: Those of its streams, oldest first.
        complete: Whether these are all.
        at_ms: When, by the server's clock.
    """

    events: list[Mapping[str, Any]]
    complete: bool
    at_ms: int


class CloudWatchReader:
    """Reads the lines of jobs. Reads near the end of a log share requests."""

    def __init__(self, service: str, identity: str, requests_of: Callable[[str], Awaitable[AwsRequests]]) -> None:
        """Send nothing yet.

        Args:
            service: The name of the configured service.
            identity: Its identity.
            requests_of: Returns the requests to CloudWatch Logs of a region.
        """
        self._service = service
        self._identity = identity
        self._requests_of = requests_of
        self._merged: Gathering[_StreamRead, _Found] = Gathering(
            _fitting, self._answer, _GATHER_S, lambda read: read.streams[0].name
        )
        # By job: until when its log was read, in ms by the server's clock, the cursor after that, and its streams.
        self._read_until: dict[str, tuple[int, bytes | None, frozenset[str]]] = {}
        # Streams and groups that do not exist: until when not to ask for them.
        self._missing: dict[tuple[str, ...], float] = {}

    @property
    def gather_s(self) -> float:
        """How long a read waits for others at present, in seconds."""
        return self._merged.gather_s

    async def read(
        self,
        job_id: str,
        streams: Sequence[LogStream],
        cursor: bytes | None,
        *,
        since_ms: int | None,
        late_window_s: float,
        long_reads: AbstractAsyncContextManager[object],
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of a job's streams after a cursor; see `tailspan.services.MergingService.read_logs`.

        Args:
            job_id: The job.
            streams: Its streams.
            cursor: See there.
            since_ms: See there.
            late_window_s: See there.
            long_reads: See there.
        """
        position = EventPosition.read(cursor, service=self._service, job_id=job_id)
        if cursor is not None:
            start_ms = position.start_ms(late_window_s)
        else:
            began_ms = min((stream.began_ms for stream in streams), default=0)
            start_ms = max(began_ms - _BEFORE_START_MS, since_ms or 0, 0)
        names = frozenset(stream.name for stream in streams)
        until_ms, known, before = self._read_until.get(job_id, (0, b"", names))
        if since_ms is None and known == cursor and names <= before:
            start_ms = max(start_ms, until_ms - _SENT_LATE_MS - int(late_window_s * 1000))
        wanted = [one for one in streams if one.ended_ms is None or one.ended_ms + _WRITES_ON_MS >= start_ms]
        if not wanted:
            return
        at_ms, complete = 0, False
        is_short = cursor is not None or start_ms >= (time.time() - _MERGED_S) * 1000
        if since_ms is None and is_short and _fit_together(wanted):
            found = await self._merged.ask(_StreamRead(wanted, start_ms))
            at_ms, complete = found.at_ms, found.complete
            for page in self._pages(job_id, found.events, wanted, position, late_window_s):
                cursor = page.cursor
                yield page
        if not complete:
            async with long_reads:
                begin_ms = max(start_ms, position.start_ms(late_window_s)) if at_ms else start_ms
                async with aclosing(self._all_events(wanted, begin_ms)) as replies:
                    async for events, replied_ms in replies:
                        at_ms = replied_ms
                        for page in self._pages(job_id, events, wanted, position, late_window_s):
                            cursor = page.cursor
                            yield page
        if since_ms is None and at_ms:
            self._read_until.pop(job_id, None)
            self._read_until[job_id] = at_ms, cursor, names
            drop_oldest(self._read_until, _MOST_KNOWN)

    def _pages(
        self,
        job_id: str,
        events: Iterable[Mapping[str, Any]],
        streams: Sequence[LogStream],
        position: EventPosition,
        late_window_s: float,
    ) -> Iterator[LogPage]:
        tasks = {stream.name: stream.task for stream in streams}
        lines: list[Line] = []
        size = 0

        def page() -> LogPage:
            position.forget(late_window_s)
            return LogPage.from_lines(lines, cursor=position.pack(), identity=self._identity, job_id=job_id)

        for event in events:
            number = position.take(event)
            if number is None:
                continue
            lines += _lines(event, number, tasks.get(event.get("logStreamName") or ""))
            size += len(event.get("message") or "")
            if len(lines) >= MAX_PAGE_LINES or size >= MAX_PAGE_BYTES:
                yield page()
                lines, size = [], 0
        if lines:
            yield page()

    async def _all_events(
        self, streams: Sequence[LogStream], start_ms: int
    ) -> AsyncGenerator[tuple[list[Mapping[str, Any]], int], None]:
        """Yield all events of streams since a time, reply by reply, and when the server replied."""
        for place in dict.fromkeys(stream.place for stream in streams):
            names = [stream.name for stream in streams if stream.place == place]
            for start in range(0, len(names), _MOST_STREAMS):
                replies = self._events(place, names[start : start + _MOST_STREAMS], start_ms)
                async with aclosing(replies):
                    async for reply in replies:
                        yield _events_of(reply), reply.at_ms

    async def _events(self, place: tuple[str, str], names: list[str], start_ms: int) -> AsyncGenerator[AwsReply, None]:
        """Yield the replies for at most 100 streams of one place; nothing for streams that do not exist.

        One missing stream refuses the request for all, so halves are requested then.
        """
        region, group = place
        body: dict[str, Any] = {"logGroupName": group, "logStreamNames": names, "startTime": start_ms}
        requests = await self._requests_of(region)
        try:
            while True:
                reply = await requests.call("FilterLogEvents", body)
                yield reply
                # An empty or partly full page is not the end: only the missing token is.
                token = reply.body.get("nextToken")
                if not token or token == body.get("nextToken"):
                    return
                body["nextToken"] = token
        except JobNotFoundError as error:
            if "nextToken" in body:
                raise
            missing = (*place,) if "log group" in str(error) else (*place, names[0])
            if len(names) == 1 or len(missing) == len(place):
                self._missing.pop(missing, None)
                self._missing[missing] = time.monotonic() + _MISSING_S
                drop_oldest(self._missing, _MOST_KNOWN)
                return
        middle = len(names) // 2
        for half in (names[:middle], names[middle:]):
            async with aclosing(self._events(place, half, start_ms)) as replies:
                async for reply in replies:
                    yield reply

    async def _answer(self, batch: list[Waiting[_StreamRead, _Found]]) -> None:
        """Answer reads of one place with one request, or with a few if there is much."""
        place = batch[0].question.streams[0].place
        owners: dict[Any, Waiting[_StreamRead, _Found]] = {
            stream.name: one for one in batch for stream in one.question.streams
        }
        names = [name for name in owners if not self._is_missing(place, name)]
        found: dict[Waiting[_StreamRead, _Found], list[Mapping[str, Any]]] = {one: [] for one in batch}
        at_ms, pages, complete = int(time.time() * 1000), 0, True
        if names:
            start_ms = min(one.question.start_ms for one in batch)
            async with aclosing(self._events(place, names, start_ms)) as replies:
                async for reply in replies:
                    at_ms = reply.at_ms
                    for event in _events_of(reply):
                        owner = owners.get(event.get("logStreamName"))
                        if owner is not None and event["timestamp"] >= owner.question.start_ms:
                            found[owner].append(event)
                    pages += 1
                    if pages >= _MERGED_PAGES and reply.body.get("nextToken"):
                        complete = False
                        break
        for one in batch:
            one.answer = _Found(found[one], complete, at_ms)

    def _is_missing(self, place: tuple[str, str], name: str) -> bool:
        now_s = time.monotonic()
        return self._missing.get(place, 0.0) > now_s or self._missing.get((*place, name), 0.0) > now_s


def _fit_together(streams: Sequence[LogStream]) -> bool:
    """Return whether one request can read these streams."""
    return len({stream.place for stream in streams}) == 1 and len(streams) <= _MOST_STREAMS


def _fitting(
    first: Waiting[_StreamRead, _Found], others: Sequence[Waiting[_StreamRead, _Found]]
) -> list[Waiting[_StreamRead, _Found]]:
    """Return reads of the kind of the first one, of at most 100 streams together."""
    kind, batch = first.question.kind, [first]
    room = _MOST_STREAMS - len(first.question.streams)
    for one in others:
        if one.question.kind == kind and len(one.question.streams) <= room:
            batch.append(one)
            room -= len(one.question.streams)
    return batch


def _events_of(reply: AwsReply) -> list[Mapping[str, Any]]:
    """Return the events of a reply that have what an event needs."""
    events = reply.body.get("events")
    return [
        event
        for event in (events if isinstance(events, list) else ())
        if isinstance(event, dict) and isinstance(event.get("timestamp"), int) and isinstance(event.get("eventId"), str)
    ]


def _lines(event: Mapping[str, Any], number: int, task: TaskRef | None) -> list[Line]:
    """Return the lines of an event, whose message may have several."""
    nano = int(event["timestamp"]) * NANOS_PER_MS + min(number, 999) * 1000
    texts = str(event.get("message") or "").removesuffix("\n").split("\n")
    return [
        Line(nano + min(place, 999), text, "", task, 0, f"{event['eventId']}.{place}")
        for place, text in enumerate(texts)
    ]


def _short(event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=DIGEST_BYTES).digest()
