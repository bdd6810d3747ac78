"""Reads the logs of the containers of a job as far as they are readable now, and merges their lines by time."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack

from tailspan.errors import ConfigError, JobNotFoundError, RequestRejectedError, ServiceError
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, NANOS_PER_MS, LineRun, LogPage, TaskRef, line_digest
from tailspan.services._http_service import pack_cursor, unpack_cursor
from tailspan.services.kubernetes.log import START, LineCutter, LinePosition, TimedLine
from tailspan.services.kubernetes.record import Instance
from tailspan.services.kubernetes.requests import KubernetesRequests
from tailspan.services.kubernetes.streams import FollowedLog, log_request

__all__ = ["Cursor", "InstanceReader", "PageBuilder", "merged"]

_KEY_BYTES = 8
# Each log that is open holds some 100 KiB.
_MAX_OPEN = 32


class Cursor:
    """How far each run of each container was taken.

    Attributes:
        positions: By key of the run.
        whole: Keys of the runs that have no line left.
    """

    def __init__(self, positions: dict[bytes, LinePosition], whole: set[bytes]) -> None:
        self.positions = positions
        self.whole = whole

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> Cursor:
        """Return what a cursor has; nothing for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        try:
            positions = {bytes(key): LinePosition(int(time), int(lines)) for key, time, lines in parts.get("p", ())}
            keys = parts.get("w", b"")
            whole = {keys[start : start + _KEY_BYTES] for start in range(0, len(keys), _KEY_BYTES)}
        except (TypeError, ValueError):
            text = f"{(cursor or b'')[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None
        return cls(positions, whole)

    def close(self, key: bytes) -> None:
        """Note that no line of a run is left."""
        self.whole.add(key)
        self.positions.pop(key, None)

    def pack(self, readers: Sequence[InstanceReader]) -> bytes:
        """Return the cursor after what some readers have passed."""
        for reader in readers:
            if reader.is_whole:
                self.close(reader.key)
            elif reader.position.lines:
                self.positions[reader.key] = reader.position
        return pack_cursor(
            {
                "p": [(key, *one) for key, one in self.positions.items()],
                "w": b"".join(sorted(self.whole)),
            }
        )


class InstanceReader:
    """Reads what is readable now of the log of one run of a container.

    Attributes:
        key: The key of the run in cursors.
        instance: The run.
        position: How far it was taken.
        failure: Why it could not be read.
        is_in_memory: Whether it costs no request.
        begins_ns: When the run began, in ns since the epoch.
        chunk: Lines that were read and not taken.
    """

    def __init__(
        self,
        instance: Instance,
        position: LinePosition,
        stream: FollowedLog | None,
        requests: KubernetesRequests,
        *,
        job_id: str,
        trims: bool,
        is_final: bool,
    ) -> None:
        """Request nothing yet.

        Args:
            instance: As the attribute.
            position: As the attribute.
            stream: Where its lines arrive; None: they are requested.
            requests: Sends requests.
            job_id: The job.
            trims: Whether the stream may drop what is before the position.
            is_final: Whether it ended so long ago that a request brings all of it.
        """
        self.key = key_of(instance)
        self.instance = instance
        self.position = position
        self.failure: ServiceError | None = None
        self.is_in_memory = stream is not None and stream.covers(position)
        self.begins_ns = instance.begins_ns
        self.chunk: deque[TimedLine] = deque()
        self._stream = stream
        self._requests = requests
        self._job_id = job_id
        self._trims = trims
        self._is_final = is_final
        self._pieces: AsyncGenerator[bytes, None] | None = None
        self._reader = LineCutter(position)
        self._stack = AsyncExitStack()
        self._is_read = self._is_whole = self._is_taking = False

    @property
    def is_whole(self) -> bool:
        """Whether no line is left, now and later."""
        return self._is_whole and not self.chunk and not self._is_taking

    async def fill(self) -> bool:
        """Read further lines if none are left; return whether there are some."""
        while not self.chunk and not self._is_read:
            stream = self._stream
            if self.is_in_memory and stream is not None:
                if self._trims:
                    stream.trim(self.position)
                self.chunk.extend(stream.after(self.position))
                self.failure = stream.failure
                self._is_read, self._is_whole = True, stream.is_over
                break
            try:
                await self._request()
            except (JobNotFoundError, RequestRejectedError):
                # The pod is gone, or its container has not begun: there is no log, or what the stream has kept of it.
                self._is_read = True
                self._is_whole = self._is_final
                if stream is not None:
                    kept = stream.entries() if self.position != START else [*stream.tail, *stream.entries()]
                    self.chunk.extend(kept)
            except ServiceError as error:
                self._is_read, self.failure = True, error
        return bool(self.chunk)

    async def _request(self) -> None:
        if self._pieces is None:
            status = self.instance.pod.pod.status_of(self.instance.container)
            ahead = (status.restart_count if status is not None else 0) - self.instance.number
            if ahead > 1:
                # Only the log of the run before the present one is kept.
                self._is_read = self._is_whole = True
                return
            if ahead == 0:
                self._reader = LineCutter(self.position, until_ns=self.instance.until_ns)
            path, query = log_request(self.instance, self.position, follow=False, previous=ahead == 1)
            reply = self._requests.stream(path, query, job_id=self._job_id)
            self._pieces = await self._stack.enter_async_context(reply)
        piece = await anext(self._pieces, None)
        if piece is None:
            self.chunk.extend(self._reader.close())
            self._is_read, self._is_whole = True, self._is_final
        else:
            self.chunk.extend(self._reader.feed(piece))

    def take(self) -> TimedLine:
        """Take the next line; the position stays before it until `passed`."""
        self._is_taking = True
        return self.chunk.popleft()

    def passed(self, entry: TimedLine) -> None:
        """Note that a page has the line."""
        self._is_taking = False
        self.position = entry.position

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stack.aclose()


def key_of(instance: Instance) -> bytes:
    """Return the key of a run of a container in cursors."""
    uid, container, number = instance.key
    return hashlib.blake2b(f"{uid}\0{container}\0{number}".encode(), digest_size=_KEY_BYTES).digest()


async def merged(readers: Sequence[InstanceReader]) -> AsyncGenerator[tuple[InstanceReader, TimedLine], None]:
    """Yield the lines of many logs by time.

    Of more than 32 logs that are requested, some come after the others; the order within each log holds.

    Args:
        readers: The logs.
    """
    waiting = deque(sorted(readers, key=lambda reader: reader.begins_ns))
    opened: list[tuple[int, int, InstanceReader]] = []
    number = requested = 0
    while waiting or opened:
        while waiting and (
            not opened or waiting[0].is_in_memory or (requested < _MAX_OPEN and waiting[0].begins_ns <= opened[0][0])
        ):
            reader = waiting.popleft()
            requested += not reader.is_in_memory
            if await reader.fill():
                number += 1
                heapq.heappush(opened, (reader.chunk[0].time_ns, number, reader))
            else:
                requested -= not reader.is_in_memory
        if not opened:
            continue
        newest_ns, place, reader = opened[0]
        yield reader, reader.take()
        if reader.chunk or await reader.fill():
            heapq.heapreplace(opened, (max(newest_ns, reader.chunk[0].time_ns), place, reader))
        else:
            heapq.heappop(opened)
            requested -= not reader.is_in_memory


class PageBuilder:
    """Makes pages of lines with the times and uids that they have for every reader."""

    def __init__(self, identity: str, job_id: str) -> None:
        """Begin the first page.

        Args:
            identity: The service's identity.
            job_id: The job.
        """
        self._identity = identity
        self._job_id = job_id
        self._start()

    def _start(self) -> None:
        self._bodies: list[bytes] = []
        self._runs: list[LineRun] = []
        self._digests: list[bytes] = []
        self._tasks: dict[TaskRef, int] = {}
        self._bytes = 0

    @property
    def has_lines(self) -> bool:
        """Whether the page has lines."""
        return bool(self._bodies)

    def is_full(self, following: TimedLine) -> bool:
        """Return whether a line belongs on the next page."""
        size = self._bytes + len(following.text)
        return bool(self._bodies) and (len(self._bodies) == MAX_PAGE_LINES or size > MAX_PAGE_BYTES)

    def add(self, entry: TimedLine, task: TaskRef) -> None:
        """Add a line."""
        place = self._tasks.setdefault(task, len(self._tasks) + 1)
        nano = entry.time_ns + min(entry.number, NANOS_PER_MS - 1)
        last = self._runs[-1] if self._runs else None
        if last is not None and last.task == place and last.time_unix_nano + last.lines == nano:
            self._runs[-1] = last._replace(lines=last.lines + 1)
        else:
            self._runs.append(LineRun(1, nano, task=place))
        self._digests.append(line_digest(self._identity, self._job_id, entry.time_ns, entry.text, entry.number, task))
        self._bodies.append(entry.text)
        self._bytes += len(entry.text) + 1

    def page(self, cursor: bytes) -> LogPage:
        """Return the page, and begin the next one."""
        page = LogPage(self._bodies, self._runs, cursor, b"".join(self._digests), tasks=tuple(self._tasks))
        self._start()
        return page
