"""`LiveContainers`: follow streams of running containers, opened when they start, and the change feed of the engine.

A container that is removed at its end takes its log with it. So its log is followed from its start on, and what a
reader has not read yet is kept here, within limits: the stream of a container waits for its reader if it has too much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from tailspan._backoff import backoff_s
from tailspan.errors import JobNotFoundError, ServiceError, ServiceUnavailableError
from tailspan.services import ChangeFeed
from tailspan.services._http_service import drop_oldest
from tailspan.services._noticed_changes import NoticedChanges
from tailspan.services.docker.wire import ContainerLine, ContainerPosition, EngineContainer, container_of_event

__all__ = ["ContainerStream", "Engine", "LiveContainers"]

_MAX_STREAM_BYTES = 4 << 20
_MAX_BYTES = 64 << 20
_LINE_BYTES = 150
_KEPT_S = 600.0
_MAX_KEPT = 1000
_UNFOLLOWED_S = 60.0
_AGAIN_S = 0.05
_EVENTS_S = 30.0
_FAILURES = 3
_CLOCK_NS = 5_000_000_000
_ENDING_SIGNALS = ("2", "9", "15", "SIGINT", "SIGKILL", "SIGTERM", "")

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """The requests that following needs."""

    def follow_events(self, since_ns: int) -> AsyncGenerator[list[Mapping[str, Any]], None]:
        """Yield events of containers after a time, in ns since the epoch, and those that come."""
        ...

    def follow_log(self, container_id: str, position: ContainerPosition) -> AsyncGenerator[list[ContainerLine], None]:
        """Yield the lines after a position, and those that come, until the container ends."""
        ...

    async def inspect(self, container_id: str) -> EngineContainer:
        """Return a container."""
        ...

    async def find_running(self) -> Collection[str]:
        """Return the ids of the chosen containers that run."""
        ...

    def chooses(self, name: str, labels: Mapping[str, str]) -> bool:
        """Return whether a container is a job."""
        ...


class ContainerStream:
    """The lines of one container that were not read yet.

    Attributes:
        base: All lines after this position are here, or will come.
        has_ended: Whether the engine has sent the last line.
        size: Memory that the lines take, in bytes.
        opened_at_s: When it was opened, in seconds of the monotonic clock.
        task: What reads it.
    """

    def __init__(self, base: ContainerPosition) -> None:
        self.base = base
        self.has_ended = False
        self.size = 0
        self.opened_at_s = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self._lines: deque[ContainerLine] = deque()
        self._end = base
        self._room = asyncio.Event()
        self._room.set()

    @property
    def lines(self) -> int | None:
        """Number of lines up to the last one; None if it is not known."""
        return None if self.base.lines is None else self.base.lines + len(self._lines)

    @property
    def end(self) -> ContainerPosition:
        """The position after the last line."""
        return self._end

    async def add(self, line: ContainerLine, notify: Callable[[], object]) -> None:
        """Add a line; wait for the reader if there are too many.

        Args:
            line: The line.
            notify: Called before each wait: what the reader takes leaves with its next read only.
        """
        if line.place <= self._end.place:
            return
        while self.size > _MAX_STREAM_BYTES:
            self._room.clear()
            notify()
            await self._room.wait()
        self._lines.append(line)
        self._end = self._end.after(line)
        self.size += _LINE_BYTES + len(line.text)

    def take(self, position: ContainerPosition) -> list[ContainerLine] | None:
        """Return the lines after a position, and drop those before it; None if some of them are not here."""
        if position.place < self.base.place:
            return None
        while self._lines and self._lines[0].place <= position.place:
            line = self._lines.popleft()
            self.base = self.base.after(line)
            self.size -= _LINE_BYTES + len(line.text)
        self._room.set()
        return list(self._lines)


class LiveContainers(ChangeFeed):
    """Follows the containers of an engine and reports changed ones.

    Attributes:
        streams: By container, what was not read.
        gone: Removed containers, as they were at their end.
        stopped: Containers that were stopped or killed by a request.
        exits: Exit code and time of the last end, by container; the time in ns since the epoch.
    """

    def __init__(self, service: str, engine: Engine, *, max_streams: int) -> None:
        self.streams: dict[str, ContainerStream] = {}
        self.gone: dict[str, EngineContainer] = {}
        self.stopped: dict[str, None] = {}
        self.exits: dict[str, tuple[int, int]] = {}
        self._service = service
        self._engine = engine
        self._max_streams = max_streams
        self._containers: dict[str, EngineContainer] = {}
        self._missing_at_s: dict[str, float] = {}
        self._inspections: set[asyncio.Task[None]] = set()
        self._followed: set[str] = set()
        self._gone_at_s: dict[str, float] = {}
        self._changes = NoticedChanges()
        # The engine's clock may be another one, and an event that comes twice does no harm.
        self._since_ns = time.time_ns() - _CLOCK_NS
        self._task = asyncio.get_running_loop().create_task(self._run())

    def follow(self, job_id: str) -> bool:
        """Begin to report changes of a container; False for one that has no stream, so that it must be polled."""
        self._followed.add(job_id)
        return self._changes.failure is None and len(self.streams) < self._max_streams

    def leave(self, job_id: str) -> None:
        """Stop reporting changes of a container, and forget what was not read of it."""
        self._followed.discard(job_id)
        self._forget(job_id)

    async def wait(self) -> Collection[str] | None:
        """Wait for changed and new containers.

        Raises:
            ServiceError: The engine cannot be followed.
        """
        return await self._changes.take()

    def close(self) -> None:
        """End all streams; what they have is read by requests from now on."""
        for task in self._tasks():
            task.cancel()
        self.streams.clear()

    async def aclose(self) -> None:
        """End all streams, and wait for their ends."""
        tasks = self._tasks()
        self.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stream(self, job_id: str) -> ContainerStream | None:
        """Return the stream of a container; None without one that works."""
        stream = self.streams.get(job_id)
        if stream is not None and not stream.has_ended and (stream.task is None or stream.task.done()):
            del self.streams[job_id]
            return None
        return stream

    def open(self, container_id: str, position: ContainerPosition) -> ContainerStream | None:
        """Follow the log of a container after a position; None if there are too many streams."""
        known = self.streams.get(container_id)
        if known is None:
            if len(self.streams) >= self._max_streams or sum(one.size for one in self.streams.values()) > _MAX_BYTES:
                return None
            known = self.streams[container_id] = ContainerStream(position)
        if known.task is None or known.task.done():
            # Also for a container that the engine has started again: its log goes on.
            known.has_ended = False
            known.task = asyncio.get_running_loop().create_task(self._read(container_id, known))
        return known

    def removed(self, job_id: str) -> EngineContainer | None:
        """Return a container that the engine does not have any more, as it ended; None if it is not known.

        The events may be some time behind: until they report the end, it counts as running.
        """
        container = self.gone.get(job_id)
        if container is None:
            container = self._containers.get(job_id)
            missing_s = time.monotonic() - self._missing_at_s.setdefault(job_id, time.monotonic())
            return None if container is None or missing_s > _EVENTS_S else container._replace(status="running")
        code, time_ns = self.exits.get(job_id, (container.exit_code, 0))
        ended_at = datetime.fromtimestamp(time_ns / 1e9, UTC) if time_ns else container.finished_at
        return container._replace(status="exited", exit_code=code, finished_at=ended_at, may_restart=False)

    def _tasks(self) -> list[asyncio.Task[None]]:
        streams = (one.task for one in self.streams.values() if one.task is not None)
        return [self._task, *self._inspections, *streams]

    async def _read(self, container_id: str, stream: ContainerStream) -> None:
        """Read the log of a container to the end of its last run."""
        failures = 0
        is_over = False
        notify = partial(self._changes.add, {container_id})
        while True:
            try:
                async with aclosing(self._engine.follow_log(container_id, stream.end)) as found:
                    async for lines in found:
                        failures = 0
                        for line in lines:
                            await stream.add(line, notify)
                        notify()
                if is_over:
                    break
                # Podman reports a start before it counts the container as running, and ends the stream then. After
                # the end of the container, the last read finds what the stream has not had.
                is_over = (await self._engine.inspect(container_id)).has_ended
                await asyncio.sleep(0 if is_over else _AGAIN_S)
            except JobNotFoundError:
                if not stream.end.time_ns:
                    text = "service %s: container %s was removed before its log could be read: lines may be lost"
                    _log.warning(text, self._service, self._name_of(container_id))
                break
            except ServiceError as error:
                failures += 1
                if failures > _FAILURES:
                    name = self._name_of(container_id)
                    _log.warning("service %s: log of %s cannot be followed: %s", self._service, name, error)
                    self.streams.pop(container_id, None)
                    return
                await asyncio.sleep(backoff_s(failures - 1, 0.5))
        stream.has_ended = True
        notify()

    def _name_of(self, container_id: str) -> str:
        known = self._containers.get(container_id)
        return known.name if known is not None else container_id[:12]

    async def _run(self) -> None:
        failures = 0
        try:
            while True:
                begun_s = time.monotonic()
                try:
                    for container_id in await self._engine.find_running():
                        await self._inspect(container_id, follows_removed=True)
                    async with aclosing(self._engine.follow_events(self._since_ns)) as found:
                        async for events in found:
                            for event in events:
                                self._apply(event)
                    _log.info("service %s: the engine closed its events; following them again", self._service)
                except ServiceError as error:
                    failures = 1 if time.monotonic() - begun_s > _KEPT_S else failures + 1
                    if failures > _FAILURES:
                        raise
                    _log.warning("service %s: the engine cannot be followed (%s); trying again", self._service, error)
                self._changes.add_all()
                await asyncio.sleep(backoff_s(failures, 0.5))
        except ServiceError as error:
            self._changes.fail(error)
        except Exception as error:
            _log.exception("service %s: unexpected error while containers are followed", self._service)
            text = f"containers cannot be followed: {error!r}"
            self._changes.fail(ServiceUnavailableError(text, service=self._service))

    async def _inspect(self, container_id: str, *, follows_removed: bool = False) -> None:
        """Read what a container is.

        Args:
            container_id: The container.
            follows_removed: Whether to follow its log if it is removed at its end. For others, the reader knows from
                where on.
        """
        try:
            container = self._containers[container_id] = await self._engine.inspect(container_id)
        except ServiceError:
            # What its events have must do.
            return
        if follows_removed and container.auto_remove:
            # A reader that has a later position skips what it has.
            self.open(container_id, ContainerPosition())
        self._changes.add({container_id})

    def _start_inspection(self, container_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._inspect(container_id))
        self._inspections.add(task)
        task.add_done_callback(self._inspections.discard)

    def _apply(self, event: Mapping[str, Any]) -> None:
        actor = event.get("Actor") or {}
        container_id, attributes = actor.get("ID") or event.get("id"), actor.get("Attributes") or {}
        time_ns = event.get("timeNano") or 0
        if not isinstance(container_id, str) or not self._engine.chooses(attributes.get("name", ""), attributes):
            return
        if isinstance(time_ns, int):
            self._since_ns = max(self._since_ns, time_ns)
        match str(event.get("Action") or event.get("status")).partition(":")[0]:
            case "create" | "init":
                self._containers.setdefault(container_id, container_of_event(container_id, attributes, time_ns))
                self._start_inspection(container_id)
            case "start":
                # Nothing before the log: a container that is removed at its end may live for some ms.
                self.open(container_id, ContainerPosition())
                self.stopped.pop(container_id, None)
                self._containers.setdefault(container_id, container_of_event(container_id, attributes, time_ns))
                self._start_inspection(container_id)
            case "kill" | "stop":
                if str(attributes.get("signal", "")) in _ENDING_SIGNALS:
                    self.stopped[container_id] = None
            case "die" | "died":
                code = str(attributes.get("exitCode") or attributes.get("containerExitCode") or "0")
                self.exits[container_id] = int(code) if code.lstrip("-").isdigit() else 1, time_ns
            case "destroy" | "remove":
                self._remove(container_id)
        self._changes.add({container_id})
        self._limit()

    def _remove(self, container_id: str) -> None:
        container = self._containers.get(container_id)
        if container is not None:
            self.gone[container_id] = container
            self._gone_at_s[container_id] = time.monotonic()

    def _limit(self) -> None:
        """Forget removed containers, and streams, that nothing follows."""
        now_s = time.monotonic()
        old_s = now_s - _KEPT_S
        for container_id, stream in list(self.streams.items()):
            unfollowed = container_id not in self._followed and now_s - stream.opened_at_s > _UNFOLLOWED_S
            if unfollowed and container_id not in self.gone:
                self._forget(container_id)
        for container_id, at_s in list(self._gone_at_s.items()):
            if container_id not in self._followed and (at_s < old_s or len(self.gone) > _MAX_KEPT):
                self._forget(container_id)
        drop_oldest(self.stopped, _MAX_KEPT)
        drop_oldest(self.exits, _MAX_KEPT)

    def _forget(self, container_id: str) -> None:
        stream = self.streams.pop(container_id, None)
        if stream is not None and stream.task is not None:
            stream.task.cancel()
        self._containers.pop(container_id, None)
        self.gone.pop(container_id, None)
        self._gone_at_s.pop(container_id, None)
        self._missing_at_s.pop(container_id, None)
        self.exits.pop(container_id, None)
        self.stopped.pop(container_id, None)
