"""The engine's API on the wire: logs in frames or plain, positions in a log, states of containers. Pure.

Source: the API of Docker 1.41 ("Attach to a container", "Get container logs"), and what was measured of Podman 4.3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from tailspan._times import time_of
from tailspan.errors import ConfigError
from tailspan.logs.page import MAX_PAGE_BYTES, Line
from tailspan.models import JobState
from tailspan.services._http_service import pack_cursor, unpack_cursor
from tailspan.services._json_stream import ReplyError

__all__ = [
    "ContainerLine",
    "ContainerPosition",
    "EngineContainer",
    "EngineLogSplitter",
    "EventSplitter",
    "api_time",
    "container_of",
    "container_of_event",
]

_HEADER_BYTES = 8
_MAX_FRAME_BYTES = 64 << 20
_MAX_EVENT_BYTES = 1 << 20
_STREAMS = {0: "stdout", 1: "stdout", 2: "stderr"}
_NANOS = 1_000_000_000
_SHORT_BYTES = 64
_RUNNING = ("running", "paused", "restarting", "stopping")
_EVENT_KEYS = ("name", "image", "podId", "containerExitCode", "exitCode", "signal", "execDuration")
_ZERO_YEAR = "0001-"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ContainerLine(NamedTuple):
    """A line of a container.

    Attributes:
        time_ns: What the engine gives, in ns since the epoch: Podman has whole seconds.
        ordinal: The number of lines before it that have the same time.
        stream: ``stdout``, ``stderr``, or empty for a terminal.
        text: The line.
        repeats: The number of lines before it that have the same time, stream and text.
        open_ns: The time of the oldest part of a line of the other stream that had begun and not ended; None without.
    """

    time_ns: int
    ordinal: int
    stream: str
    text: bytes
    repeats: int = 0
    open_ns: int | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Its place in the log."""
        return self.time_ns, self.ordinal

    def line(self) -> Line:
        """Return it as a line with an exact time and a uid.

        The uid has the text instead of the number, which is another one after lines that a followed Podman lost.
        """
        at = self.time_ns + min(self.ordinal, _NANOS // 1000 - 1)
        text = blake2b(self.text, digest_size=8).hexdigest()
        return Line(at, self.text, self.stream, uid=f"{self.time_ns}.{self.stream}.{text}.{self.repeats}")


class ContainerPosition(NamedTuple):
    """A place in the log of a container: after a line.

    Attributes:
        time_ns: The time of that line; 0: the start.
        ordinal: Its number among the lines of that time.
        lines: Number of lines up to it; None if it is not known.
        is_gone: Whether the reader was informed that the engine does not have that line any more.
        open_ns: The `open_ns` of that line.
    """

    time_ns: int = 0
    ordinal: int = -1
    lines: int | None = 0
    is_gone: bool = False
    open_ns: int | None = None

    @classmethod
    def unpack(cls, cursor: bytes | None, *, service: str, job_id: str) -> ContainerPosition:
        """Return the position of a page's cursor; the start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        found = cls(parts.get("t", 0), parts.get("o", -1), parts.get("n", 0), bool(parts.get("g")), parts.get("b"))
        numbers = found.time_ns, found.ordinal, found.lines or 0, found.open_ns or 0
        if not all(isinstance(one, int) for one in numbers):
            shown = (cursor or b"")[:40]
            raise ConfigError(f"{shown!r} is not a cursor of this service", service=service, job_id=job_id)
        return found

    @property
    def place(self) -> tuple[int, int]:
        """The place of its line."""
        return self.time_ns, self.ordinal

    def after(self, line: ContainerLine) -> ContainerPosition:
        """Return the position after the next line."""
        lines = None if self.lines is None else self.lines + 1
        return ContainerPosition(line.time_ns, line.ordinal, lines, open_ns=line.open_ns)

    @property
    def since_ns(self) -> int:
        """From when on the engine has to return entries: the next line may have begun before the last one."""
        return self.time_ns if self.open_ns is None else min(self.time_ns, self.open_ns)

    def pack(self) -> bytes:
        """Return the cursor of a page that ends here."""
        parts = {"t": self.time_ns, "o": self.ordinal, "n": self.lines}
        parts |= {"b": self.open_ns} if self.open_ns is not None else {}
        return pack_cursor(parts | ({"g": 1} if self.is_gone else {}))


class EngineLogSplitter:
    """Cuts the reply of ``/logs`` with timestamps into lines.

    Without a terminal, the reply consists of frames: stream, three bytes of 0, length (big-endian), text. A frame has
    one line, or a part of a long line, each part with the time before it. With a terminal it is plain text, whose first
    byte is a digit of a time.

    Lines of one time are numbered, so the reply must begin with the first line of a second.
    """

    def __init__(self) -> None:
        self._tty: bool | None = None
        self._buffer = bytearray()
        self._last_ns = 0
        self._ordinal = 0
        self._parts: dict[str, list[bytes]] = {}
        self._times: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._repeats: dict[tuple[str, bytes], int] = {}

    def feed(self, piece: bytes) -> list[ContainerLine]:
        """Add a piece and return the lines that are complete.

        Raises:
            ReplyError: It is not in frames.
        """
        self._buffer += piece
        if self._tty is None and self._buffer:
            self._tty = self._buffer[0] not in _STREAMS
        return self._plain() if self._tty else self._framed()

    def close(self) -> list[ContainerLine]:
        """Return the lines without a newline at the end of the log."""
        lines: list[ContainerLine] = []
        if self._tty and self._buffer:
            lines += self._entry("", bytes(self._buffer), whole=True)
            self._buffer.clear()
        for stream in list(self._parts):
            lines.append(self._finish(stream))
        return lines

    def _framed(self) -> list[ContainerLine]:
        lines: list[ContainerLine] = []
        start, end = 0, len(self._buffer)
        while end - start >= _HEADER_BYTES:
            kind = self._buffer[start]
            size = int.from_bytes(self._buffer[start + 4 : start + 8], "big")
            if kind not in _STREAMS or self._buffer[start + 1 : start + 4] != b"\0\0\0" or size > _MAX_FRAME_BYTES:
                raise ReplyError("it is not in frames")
            if end - start < _HEADER_BYTES + size:
                break
            text = bytes(self._buffer[start + _HEADER_BYTES : start + _HEADER_BYTES + size])
            lines += self._entry(_STREAMS[kind], text.removesuffix(b"\n"), whole=text.endswith(b"\n"))
            start += _HEADER_BYTES + size
        del self._buffer[:start]
        return lines

    def _plain(self) -> list[ContainerLine]:
        *whole, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        return [line for text in whole for line in self._entry("", text.removesuffix(b"\r"), whole=True)]

    def _entry(self, stream: str, text: bytes, *, whole: bool) -> list[ContainerLine]:
        stamp, _, rest = text.partition(b" ")
        time_ns = _nanos(stamp)
        if time_ns is None:
            if not self._last_ns and stream not in self._times:
                # Such as the page of a proxy.
                raise ReplyError("it has no times")
            # A terminal's line may have a newline without a time after it.
            time_ns, rest = self._times.get(stream) or self._last_ns, text
        if stream not in self._parts:
            self._parts[stream], self._times[stream], self._sizes[stream] = [], time_ns, 0
        self._parts[stream].append(rest)
        self._sizes[stream] += len(rest)
        return [self._finish(stream)] if whole or self._sizes[stream] >= MAX_PAGE_BYTES else []

    def _finish(self, stream: str) -> ContainerLine:
        text = b"".join(self._parts.pop(stream))
        # The parts of a line have times of their own; lines stay in the order of their ends.
        time_ns = max(self._times.pop(stream), self._last_ns)
        if time_ns == self._last_ns:
            self._ordinal += 1
        else:
            self._ordinal = 0
            self._repeats.clear()
        self._last_ns = time_ns
        key = stream, text if len(text) <= _SHORT_BYTES else blake2b(text).digest()
        repeats = self._repeats.get(key, 0)
        self._repeats[key] = repeats + 1
        return ContainerLine(time_ns, self._ordinal, stream, text, repeats, min(self._times.values(), default=None))


class EventSplitter:
    """Cuts the reply of ``/events`` into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[Mapping[str, Any]]:
        """Add a piece and return the events that are complete.

        Raises:
            ReplyError: It is not JSON.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ReplyError("an event is larger than 1 MiB")
        try:
            found = [msgspec.json.decode(line) for line in lines if line.strip()]
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ReplyError("it is not JSON") from None
        return [one for one in found if isinstance(one, dict)]

    def close(self) -> list[Mapping[str, Any]]:
        """Return nothing: an event without a newline is not complete."""
        return []


class EngineContainer(NamedTuple):
    """What ``/containers/ID/json`` says of a container.

    Attributes:
        container_id: Its id.
        name: Its name, without the slash.
        image: The image's name.
        labels: Its labels.
        status: The engine's word: ``created``, ``running``, ``exited`` ...
        exit_code: Exit code of the last run.
        oom_killed: Whether the kernel killed it for its memory limit.
        error: The engine's error, if it could not run.
        created_at: When it was made.
        started_at: When its last run began.
        finished_at: When its last run ended.
        restarts: How often the engine has restarted it.
        may_restart: Whether the engine restarts it after the last end.
        auto_remove: Whether it is removed at its end (``--rm``).
        command: Its command.
    """

    container_id: str
    name: str
    image: str
    labels: Mapping[str, str]
    status: str
    exit_code: int
    oom_killed: bool
    error: str
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    restarts: int
    may_restart: bool
    auto_remove: bool
    command: str

    @property
    def has_ended(self) -> bool:
        """Whether its last run is over."""
        return self.status in ("exited", "dead", "stopped", "removing")

    @property
    def state(self) -> JobState:
        """The state as a job, if it is not known whether it was stopped."""
        if self.status in ("created", "configured", "initialized"):
            return JobState.FAILED if self.error or self.exit_code else JobState.PENDING
        if not self.has_ended:
            return (
                JobState.RUNNING if self.status in ("running", "paused", "restarting", "stopping") else JobState.UNKNOWN
            )
        return JobState.SUCCEEDED if not self.exit_code and not self.oom_killed else JobState.FAILED


def container_of(reply: Mapping[str, Any]) -> EngineContainer:
    """Return the container of a reply of ``/containers/ID/json``.

    Raises:
        KeyError: The reply has no id or no state.
    """
    state, config, host = reply["State"], reply.get("Config") or {}, reply.get("HostConfig") or {}
    policy = host.get("RestartPolicy") or {}
    restarts = int(reply.get("RestartCount") or 0)
    exit_code = int(state.get("ExitCode") or 0)
    started_at, finished_at = _moment(state.get("StartedAt")), _moment(state.get("FinishedAt"))
    if started_at is not None and finished_at is not None and finished_at < started_at:
        # Podman keeps the end of the run before.
        finished_at = started_at
    return EngineContainer(
        container_id=str(reply["Id"]),
        name=str(reply.get("Name") or "").lstrip("/"),
        image=str(config.get("Image") or reply.get("Image") or ""),
        labels={str(key): str(value) for key, value in (config.get("Labels") or {}).items()},
        status=str(state.get("Status") or ""),
        exit_code=exit_code,
        oom_killed=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        created_at=_moment(reply.get("Created")),
        started_at=started_at,
        finished_at=finished_at,
        restarts=restarts,
        may_restart=_may_restart(policy, restarts, exit_code),
        auto_remove=bool(host.get("AutoRemove")),
        command=" ".join([str(reply.get("Path") or ""), *map(str, reply.get("Args") or ())]).strip(),
    )


def container_of_event(container_id: str, attributes: Mapping[str, Any], time_ns: int) -> EngineContainer:
    """Return what an event says of a container, until the engine was asked for more.

    Args:
        container_id: The container.
        attributes: Those of the event: name and image, and all labels.
        time_ns: The time of the event, in ns since the epoch.
    """
    labels = {key: str(value) for key, value in attributes.items() if key not in _EVENT_KEYS}
    at = datetime.fromtimestamp(time_ns / 1e9, UTC) if time_ns else None
    name, image = str(attributes.get("name", "")), str(attributes.get("image", ""))
    return EngineContainer(
        container_id, name, image, labels, "running", 0, False, "", at, at, None, 0, False, False, ""
    )


def _may_restart(policy: Mapping[str, Any], restarts: int, exit_code: int) -> bool:
    most = int(policy.get("MaximumRetryCount") or 0)
    match policy.get("Name"):
        case "always" | "unless-stopped":
            return True
        case "on-failure":
            return exit_code != 0 and (not most or restarts < most)
    return False


def api_time(time_ns: int) -> str:
    """Return a time as ``since`` takes it: a whole second, because Podman knows no other.

    It is a second earlier, so that the first parts of long lines are there.
    """
    return str(max(0, time_ns // _NANOS - 1))


def _moment(text: Any) -> datetime | None:
    """Return a time; None for the year 1, which stands for none."""
    return None if not isinstance(text, str) or text.startswith(_ZERO_YEAR) else time_of(text)


_seconds: dict[bytes, int] = {}


def _nanos(stamp: bytes) -> int | None:
    """Return the time of an RFC 3339 text, in ns since the epoch; None for another text."""
    zone = b"Z" if stamp.endswith(b"Z") else stamp[-6:]
    if zone[:1] not in (b"Z", b"+", b"-"):
        return None
    head, _, fraction = stamp.removesuffix(zone).partition(b".")
    seconds = _seconds.get(head + zone)
    if seconds is None:
        moment = time_of((head + zone).decode("ascii", "replace"))
        if moment is None:
            return None
        if len(_seconds) > 1000:
            _seconds.clear()
        seconds = _seconds[head + zone] = int((moment - _EPOCH).total_seconds())
    return seconds * _NANOS + (int(fraction.ljust(9, b"0")[:9]) if fraction.isdigit() else 0)
