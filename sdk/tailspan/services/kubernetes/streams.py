"""`FollowedLogs`: the logs of running containers, each followed over a connection of its own.

A log that is only polled loses what the kubelet rotates away between two reads, and all that a pod writes before it is
deleted. A stream that is open gets both. It holds what has arrived until a reader's cursor has passed it, and reads no
further while its buffer is full.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing

from tailspan._backoff import backoff_s
from tailspan.errors import (
    AuthError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceError,
    TailspanError,
)
from tailspan.services._requests import Params, path_segment
from tailspan.services.kubernetes.log import START, LineCutter, LinePosition, TimedLine, since_time
from tailspan.services.kubernetes.record import Instance, JobRecord
from tailspan.services.kubernetes.requests import KubernetesRequests

__all__ = ["FollowedLog", "FollowedLogs", "log_request", "retry_s"]

# A stream reads no further while it holds this much, or while all of them hold that much.
_MAX_BYTES = 1 << 20
_MAX_BYTES_OF_ALL = 64 << 20
_ENTRY_BYTES = 150
_TAIL_LINES, _TAIL_LINE_BYTES = 100, 2 << 10
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.2, 15.0
# How long after its end of a log the status of the container may say that it runs.
_STATUS_LAG_S = 5.0
_NOT_YET = 400
_MISSING_S = 60.0
# Files and connections of the rest of the process.
_OTHER_FILES = 256

_log = logging.getLogger(__name__)


def log_request(instance: Instance, after: LinePosition, *, follow: bool, previous: bool = False) -> tuple[str, Params]:
    """Return path and query of the log of a container.

    Args:
        instance: The run of the container.
        after: Only lines from about this position on.
        follow: Whether the reply goes on until the container ends.
        previous: Whether the container has been restarted since.
    """
    meta = instance.pod.pod.metadata
    query: dict[str, int | str] = {"container": instance.container, "timestamps": "true"}
    query |= {"follow": "true"} if follow else {}
    query |= {"previous": "true"} if previous else {}
    since = since_time(after)
    query |= {"sinceTime": since} if since else {}
    return f"/api/v1/namespaces/{path_segment(meta.namespace)}/pods/{path_segment(meta.name)}/log", query


def streams_allowed(wanted: int) -> int:
    """Return how many connections this process can hold, and raise its limit of open files for them if it may.

    Args:
        wanted: How many connections are wanted.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    # The usual soft limit of 1,024 is for programs that use select(); this one does not.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < needed:
        text = "the limit of open files (%d) allows %d followed logs at a time: raise it, for example by LimitNOFILE"
        _log.warning(text, hard, max(0, most - _OTHER_FILES))
    return max(0, most - _OTHER_FILES)


def retry_s(failures: int) -> float:
    """Return the delay before a reply without an end is opened again, in seconds: a proxy that restarts cuts many.

    Args:
        failures: How often it failed since it was good.
    """
    first = _FIRST_RETRY_S * (0.5 + random.random())
    return min(backoff_s(failures - 1, random.random()), _LONGEST_RETRY_S) if failures > 1 else first


class FollowedLog:
    """The log of one run of a container, as it arrives.

    Attributes:
        instance: The run of the container.
        job: Its job.
        base: The buffer begins after this position.
        newest: The last line that arrived; at first the position to begin after.
        is_over: Whether the log was read to its end.
        failure: Why the log cannot be read, if retries do not help: a right is missing.
        notes: Sentences of the kubelet in place of the log.
        tail: The last lines that left the buffer.
    """

    def __init__(self, streams: FollowedLogs, job: JobRecord, instance: Instance, after: LinePosition) -> None:
        """Open nothing yet.

        Args:
            streams: All of them.
            job: As the attribute.
            instance: As the attribute.
            after: Begin after this position.
        """
        self.instance = instance
        self.job = job
        self.base = self.newest = after
        self.is_over = False
        self.failure: ServiceError | None = None
        self.notes: list[str] = []
        self.tail: deque[TimedLine] = deque(maxlen=_TAIL_LINES)
        self.opened_s = time.monotonic()
        self._streams = streams
        self._entries: deque[TimedLine] = deque()
        self._bytes = 0
        self._first: TimedLine | None = None
        self._begins_at_start = after == START
        self._was_followed = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._run())

    @property
    def waits(self) -> bool:
        """Whether lines are in the buffer."""
        return bool(self._entries)

    def covers(self, position: LinePosition) -> bool:
        """Return whether all lines after a position are in the buffer, or have not arrived."""
        return position in (self.base, self.newest) or any(entry.position == position for entry in self._entries)

    def trim(self, position: LinePosition) -> None:
        """Drop the lines up to a position that is covered: a cursor has passed them."""
        if position == self.base:
            return
        while self._entries:
            entry = self._entries.popleft()
            self._count(-len(entry.text) - _ENTRY_BYTES)
            self.base = entry.position
            if len(entry.text) < _TAIL_LINE_BYTES:
                self.tail.append(entry)
            if entry.position == position:
                break
        self._room.set()
        self._streams.room.set()

    def entries(self) -> list[TimedLine]:
        """Return the lines in the buffer."""
        return list(self._entries)

    def after(self, position: LinePosition) -> list[TimedLine]:
        """Return the lines in the buffer after a position that is covered."""
        found = self.entries()
        if position == self.base:
            return found
        return found[next((index for index, one in enumerate(found, 1) if one.position == position), 0) :]

    def on_change(self) -> None:
        """Note that the status of the pod has changed."""
        if not self._was_followed and not self.is_over and self._has_next_run():
            # The kubelet was ahead of the status: these are lines of the next run, which gets a stream of its own.
            self._was_followed = True
            self.task.cancel()
            self.task = asyncio.get_running_loop().create_task(self._run())
        self._changed.set()

    def _has_next_run(self) -> bool:
        """Return whether the lines are those of the next run of the container, by their times."""
        following = self.instance.pod.instance(self.instance.container, self.instance.number + 1)
        return (
            following is not None
            and following.begins_ns > self.instance.begins_ns
            and self._first is not None
            and self._first.time_ns >= following.begins_ns
        )

    def close(self) -> None:
        """Stop following, and drop the buffer."""
        self.task.cancel()
        self._count(-self._bytes)
        self._entries.clear()
        self._streams.room.set()

    def _count(self, size: int) -> None:
        self._bytes += size
        self._streams.held_bytes += size

    async def _run(self) -> None:
        failures, missing_since_s = 0, None
        while True:
            opened_s, before = time.monotonic(), self.newest
            try:
                if await self._step():
                    break
                failures, missing_since_s = 0, None
            except TailspanError as error:
                if isinstance(error, JobNotFoundError):
                    missing_since_s = missing_since_s or opened_s
                if isinstance(error, AuthError | ProtocolError):
                    self.failure = error
                    self._streams.on_lines(self)
                if self._is_final(error, time.monotonic() - (missing_since_s or time.monotonic())):
                    break
                _log.debug("log of %s: %s", self.instance.key, error)
                # A connection that brought lines, or was good for a while, begins a new series of failures.
                was_good = self.newest != before or time.monotonic() - opened_s > _LONGEST_RETRY_S
                failures = 1 if was_good else failures + 1
                await self._wait(retry_s(failures))
        self.is_over = True
        self._streams.on_end(self)

    async def _step(self) -> bool:
        """Read one reply; return whether that was the last one."""
        ahead = self._number_now() - self.instance.number
        if ahead > 1:
            # Only the log of the run before the present one is kept.
            return True
        if self._was_followed and not ahead and self._may_run_again():
            # The kubelet may return the next run already: `previous`, or the end of the pod, is unambiguous.
            await self._wait(_LONGEST_RETRY_S)
            return False
        if self._was_followed or ahead:
            return await self._read_rest(previous=ahead > 0)
        async with aclosing(self._replies(LineCutter(self.newest), self.newest, follow=True)) as replies:
            async for entries in replies:
                await self._add(entries)
        # A kubelet that stops ends the replies of running containers, too.
        self._was_followed = await self._has_ended()
        return self._was_followed and self.instance.pod.gone_at is not None

    def _may_run_again(self) -> bool:
        pod, found = self.instance.pod, self.instance.pod.instance(self.instance.container, self.instance.number)
        ended = found.terminated if found is not None else None
        policy = pod.restart_policy(self.instance.container)
        return not pod.is_over and policy != "Never" and not (policy == "OnFailure" and ended and not ended.exit_code)

    async def _read_rest(self, *, previous: bool) -> bool:
        """Read what the follower of the kubelet has left out; return whether that was of this run for sure."""
        number = self._number_now()
        before_ns = None
        if previous and self._first is not None and self._begins_at_start and self._has_next_run():
            before_ns = self._first.time_ns
        reader = LineCutter(self.newest, before_ns=before_ns)
        after = self.newest if before_ns is None else START
        held: list[TimedLine] = []
        async with aclosing(self._replies(reader, after, follow=False, previous=previous)) as replies:
            async for entries in replies:
                held += entries
                if sum(len(entry.text) for entry in held) > _MAX_BYTES:
                    await self._add(held)
                    held = []
        if self._number_now() != number:
            return False
        await self._add(held)
        return True

    async def _replies(
        self, reader: LineCutter, after: LinePosition, *, follow: bool, previous: bool = False
    ) -> AsyncGenerator[list[TimedLine], None]:
        path, query = log_request(self.instance, after, follow=follow, previous=previous)
        async with self._streams.requests.stream(path, query, job_id=self.job.job_id) as pieces:
            self.failure = None
            async for piece in pieces:
                yield reader.feed(piece)
        yield reader.close()
        self.notes = reader.notes

    async def _add(self, entries: list[TimedLine]) -> None:
        if not entries:
            return
        self._first = self._first or entries[0]
        self._entries.extend(entries)
        self._count(sum(len(entry.text) for entry in entries) + _ENTRY_BYTES * len(entries))
        self.newest = entries[-1].position
        self._streams.on_lines(self)
        while self._bytes > _MAX_BYTES or (self._streams.held_bytes > _MAX_BYTES_OF_ALL and self._entries):
            # The socket is not read meanwhile, so the API server and the kubelet wait, too.
            self._room.clear()
            self._streams.room.clear()
            await self._streams.wait_for_room(self._room)

    def _is_final(self, error: TailspanError, missing_s: float) -> bool:
        """Return whether no later request will bring more of this log."""
        pod = self.instance.pod
        if isinstance(error, JobNotFoundError):
            # A kubelet that has just started does not know its pods yet.
            return pod.gone_at is not None or missing_s > _MISSING_S
        if isinstance(error, RequestRejectedError) and error.status_code == _NOT_YET:
            # The container waits to start: the status was ahead of the kubelet. Or its log is not kept any more.
            return pod.is_over or self._number_now() != self.instance.number
        return False

    async def _has_ended(self) -> bool:
        """Return whether the container has ended, as far as the status says so in time."""
        deadline_s = time.monotonic() + _STATUS_LAG_S
        while not self._status_has_ended():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            await self._wait(left_s)
        return True

    def _status_has_ended(self) -> bool:
        pod = self.instance.pod
        return pod.is_over or (self.instance.container, self.instance.number) in pod.ended

    def _number_now(self) -> int:
        status = self.instance.pod.pod.status_of(self.instance.container)
        return status.restart_count if status is not None else self.instance.number

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return


class FollowedLogs:
    """All streams of one service.

    Attributes:
        requests: Sends the requests.
        most: How many are open at a time.
        held_bytes: What all buffers hold.
        room: Set when a buffer has become smaller.
    """

    def __init__(self, requests: KubernetesRequests, most: int, on_lines: Callable[[JobRecord], object]) -> None:
        """Open nothing yet.

        Args:
            requests: As the attribute.
            most: As the attribute.
            on_lines: Called with the job when lines of it have arrived, or a log has ended.
        """
        self.requests = requests
        self.most = most
        self.held_bytes = 0
        self.room = asyncio.Event()
        self._on_lines = on_lines
        self._by_key: dict[tuple[str, str, int], FollowedLog] = {}
        self._open = 0

    def __iter__(self) -> Iterator[FollowedLog]:
        return iter(self._by_key.values())

    def get(self, instance: Instance) -> FollowedLog | None:
        """Return the stream of a run of a container, also one that is over."""
        return self._by_key.get(instance.key)

    @property
    def has_room(self) -> bool:
        """Whether another one may be opened."""
        return self._open < self.most

    def open(self, job: JobRecord, instance: Instance, after: LinePosition = START) -> FollowedLog:
        """Follow the log of a run of a container, or read it if it has ended.

        Args:
            job: The job.
            instance: The run of the container.
            after: Begin after this position.
        """
        before = self._by_key.get((*instance.key[:2], instance.number - 1))
        if before is not None and after == START and before.newest.time_ns >= instance.begins_ns:
            # The stream of the run before has had lines of this one.
            after = before.newest
        stream = FollowedLog(self, job, instance, after)
        self._by_key[instance.key] = stream
        self._open += 1
        return stream

    def on_lines(self, stream: FollowedLog) -> None:
        """Report lines."""
        self._on_lines(stream.job)

    def on_end(self, stream: FollowedLog) -> None:
        """Report the end of a log."""
        self._open -= 1
        self._on_lines(stream.job)

    def close(self, stream: FollowedLog) -> None:
        """Stop following a log, and forget it."""
        if not stream.is_over:
            self._open -= 1
        stream.close()
        self._by_key.pop(stream.instance.key, None)

    async def wait_for_room(self, own: asyncio.Event) -> None:
        """Wait until a buffer has become smaller."""
        waits = [asyncio.ensure_future(event.wait()) for event in (own, self.room)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()

    async def aclose(self) -> None:
        """Close all of them."""
        streams = list(self)
        for stream in streams:
            self.close(stream)
        await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
