"""`LogPage`: one reply of lines and the next cursor, in columns rather than an object per line.

Two facts about a line are needed to make a record that is the same after any restart: its exact time and its uid.
Both are stored per *run* of lines (one read of a pipe, one millisecond of a log) and counted up within it:

    time_unix_nano of line i of a run = run.time_unix_nano + i      (order and repeats survive stores that sort by time)
    log.record.uid of line i          = run.uid_prefix + "%04x" % i (services with offsets)
                                      = hex of digests[8 * i]       (services with times only)
"""

from __future__ import annotations

import codecs

# What `hashlib` has, which would load OpenSSL first.
from _blake2 import blake2b
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, NotRequired, Required, TypedDict

from tailspan.errors import ConfigError
from tailspan.logs.text import split_text

__all__ = [
    "CLEAN",
    "DIGEST_BYTES",
    "MAX_PAGE_BYTES",
    "MAX_PAGE_LINES",
    "NANOS_PER_MS",
    "Line",
    "LineRun",
    "LogPage",
    "Message",
    "OpenLine",
    "Stream",
    "TaskRef",
    "level_name",
    "line_digest",
    "numbered_pages",
]

DIGEST_BYTES = 8
MAX_PAGE_BYTES = 1 << 20
MAX_PAGE_LINES = 5000
NANOS_PER_MS = 1_000_000


class Stream:
    """Which stream a line came from, as stored and sent; 0 is unknown."""

    NONE = 0
    STDOUT = 1
    STDERR = 2
    NAMES = ("", "stdout", "stderr")


class TaskRef(NamedTuple):
    """The attempt of a task that a line came from.

    Attributes:
        task_id: The task's id, unique within the job.
        name: The task's name, which its runs have in common.
        attempt: 1 for the first attempt.
    """

    task_id: str
    name: str
    attempt: int = 1

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the attempt within its job: the task's id, and the attempt."""
        return self.task_id, self.attempt


_LEVELS = ("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL")


def level_name(severity: int) -> str:
    """Return the name of a severity number of 1 to 24.

    Source: opentelemetry-specification, logs data model, SeverityNumber: four numbers for each name.
    """
    return _LEVELS[(severity - 1) // 4]


CLEAN = 1
"""Run flag: plain ASCII without CR, ESC or NUL, so `tailspan.logs.clean.clean` would change nothing in any line."""


class Message(TypedDict):
    """A line as `tailspan.job_get_logs` returns it; a service may add keys.

    Attributes:
        message: The text, without its line ending.
        timestamp: In ms since the epoch.
        stream: ``stdout`` or ``stderr``, where the service reports it.
        task: The name of the task that wrote it, in a job with tasks.
        task_id: The id of that task.
        attempt: The attempt of that task, from 1.
        level: ``INFO``, ``ERROR`` and so on, where the service reports it.
    """

    message: Required[str]
    timestamp: Required[int]
    stream: NotRequired[str]
    task: NotRequired[str]
    task_id: NotRequired[str]
    attempt: NotRequired[int]
    level: NotRequired[str]


def _sharing_keys(**fields: Any) -> Any:
    """Return a dict whose copies share one table of keys, as those of a class's instances do (PEP 412).

    A message costs 104 ns and 197 bytes with it, and 131 ns and 276 bytes as a plain dict; msgspec has no dicts that
    share keys (``to_builtins`` of a Struct: 174 ns and 274 bytes).
    """
    kind = type("_Fields", (), {})
    # CPython gives the first instances of a class room for 30 keys, and each later one for one key less.
    for _ in range(30):
        instance = kind()
        for name, value in fields.items():
            setattr(instance, name, value)
    return vars(instance)


# By stream; a line of none has no key for it.
_EMPTY_MESSAGES: list[Message] = [
    _sharing_keys(message="", timestamp=0, **({"stream": name} if name else {})) for name in Stream.NAMES
]


class Line(NamedTuple):
    """One line of a simple service.

    Attributes:
        time_unix_nano: The time that the source gives the line, in ns since the epoch.
        message: The line as read, without its line ending.
        stream: ``stdout``, ``stderr`` or empty.
        task: The task that wrote the line; None in a job without tasks, and for lines of the job itself.
        severity: Its OTLP severity number, 1 to 24, where the source has one; 0: found in the text.
        uid: The source's own id of the line, unique within the job; empty: task, time, text and number of repeats
            identify it.
    """

    time_unix_nano: int
    message: str | bytes
    stream: str = ""
    task: TaskRef | None = None
    severity: int = 0
    uid: str = ""


class OpenLine(NamedTuple):
    """The beginning of a line whose newline has not come: a question, dots, a progress bar.

    Attributes:
        text: What the job has written of it.
        time_unix_nano: When the newest of it was written, in ns since the epoch.
        uid: Identifies this text of this line; differs from the uid that the line gets.
    """

    text: bytes
    time_unix_nano: int
    uid: str

    @property
    def message(self) -> str:
        """The text, without the bytes of a character that is not complete."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self.text)


class LineRun(NamedTuple):
    """Consecutive lines of one instant, stream, task and severity.

    Attributes:
        lines: How many.
        time_unix_nano: The time of the first; each further line is 1 ns later.
        stream: One of `Stream`.
        flags: `CLEAN` or 0.
        uid_prefix: Start of each line's uid for services with offsets; empty where the page has digests.
        task: The place of the lines' task in `LogPage.tasks`, from 1; 0 without a task.
        severity: Their OTLP severity number; 0: found in the text.
    """

    lines: int
    time_unix_nano: int
    stream: int = Stream.NONE
    flags: int = 0
    uid_prefix: str = ""
    task: int = 0
    severity: int = 0


def line_digest(
    identity: str, job_id: str, time_unix_nano: int, message: bytes, occurrence: int, task: TaskRef | None = None
) -> bytes:
    """Return the 8 bytes that identify a line of a service that has times and no offsets.

    Args:
        identity: The service's identity.
        job_id: The job's id there.
        time_unix_nano: The time as the source gave it (not counted up within the instant).
        message: The line as read, before cleaning and redaction.
        occurrence: 0 for the first line with this time and text (in its task), 1 for its repeat, and so on.
        task: The task that wrote it.
    """
    origin = job_id if task is None else f"{job_id}\0task\0{task.task_id}\0{task.attempt}"
    key = f"{identity}\0{origin}\0{time_unix_nano}\0{occurrence}\0".encode()
    return blake2b(key + message, digest_size=DIGEST_BYTES).digest()


class LogPage:
    """At most 5,000 lines or 1 MiB (one longer line makes a page of its own), and the cursor after them.

    Attributes:
        runs: Times, streams and flags of its lines; their numbers of lines add up to as many as it has.
        cursor: Where to resume once all these lines are acked; opaque, the service's own.
        digests: 8 bytes a line for services without offsets; empty where runs have a uid prefix.
        text: The lines with a newline after each, where the service has them so; empty otherwise. See `joined`.
        tasks: The tasks that its lines came from; empty in a job without tasks.
    """

    __slots__ = ("_lines", "cursor", "digests", "runs", "tasks", "text")

    def __init__(
        self,
        lines: list[bytes] | None,
        runs: list[LineRun],
        cursor: bytes,
        digests: bytes = b"",
        text: bytes = b"",
        tasks: tuple[TaskRef, ...] = (),
    ) -> None:
        """Make a page.

        Args:
            lines: Each line as read, without its line ending, in the order in which the service returned them; None to
                split them from the text at first use.
            runs: As the attribute.
            cursor: As the attribute.
            digests: As the attribute.
            text: As the attribute; only for a page without lines of its own.
            tasks: As the attribute.
        """
        self._lines = lines
        self.runs = runs
        self.cursor = cursor
        self.digests = digests
        self.text = text if lines is None else b""
        self.tasks = tasks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LogPage):
            return NotImplemented
        mine = self.lines, self.runs, self.cursor, self.digests, self.tasks
        return mine == (other.lines, other.runs, other.cursor, other.digests, other.tasks)

    __hash__ = None  # type: ignore[assignment]  # it holds lists

    def __repr__(self) -> str:
        tasks = f", tasks={self.tasks!r}" if self.tasks else ""
        columns = f"lines={self.lines!r}, runs={self.runs!r}, cursor={self.cursor!r}, digests={self.digests!r}"
        return f"LogPage({columns}{tasks})"

    @property
    def lines(self) -> list[bytes]:
        """Each line as read, without its line ending, in the order in which the service returned them."""
        if self._lines is None:
            self._lines = split_text(self.text)
        return self._lines

    @property
    def line_count(self) -> int:
        """How many lines there are."""
        return sum(run.lines for run in self.runs) if self._lines is None else len(self._lines)

    def last_lines(self, count: int) -> list[bytes]:
        """Return the last lines as `lines` has them, without splitting the others.

        Args:
            count: How many, at least one; fewer where the page has fewer.
        """
        if self._lines is not None:
            return self._lines[-count:]
        start = len(self.text) - 1
        while count and start >= 0:
            start, count = self.text.rfind(b"\n", 0, start), count - 1
        return split_text(self.text[start + 1 :])

    @classmethod
    def from_lines(cls, lines: Iterable[Line], *, cursor: bytes, identity: str, job_id: str) -> LogPage:
        """Make a page of single lines, for services that are simple rather than fast.

        Args:
            lines: Oldest first; equal times are normal.
            cursor: Where to resume after them.
            identity: The service's identity; with the job id it makes the uids.
            job_id: The job that they belong to.

        Returns:
            The page. Uids count equal lines of one task and time within the page: end a page between two times.
        """
        bodies: list[bytes] = []
        runs: list[LineRun] = []
        digests: list[bytes] = []
        tasks: dict[TaskRef, int] = {}
        # By task: what other tasks write in the same instant changes neither time nor uid of a line.
        instants: dict[tuple[TaskRef | None, int], int] = {}
        repeats: dict[tuple[TaskRef | None, int, bytes], int] = {}
        for line in lines:
            body = line.message if isinstance(line.message, bytes) else line.message.encode("utf-8", "replace")
            instant = line.task, line.time_unix_nano
            ordinal = instants.get(instant, 0)
            instants[instant] = ordinal + 1
            if line.uid:
                key = f"{identity}\0{job_id}\0uid\0{line.uid}".encode()
                digests.append(blake2b(key, digest_size=DIGEST_BYTES).digest())
            else:
                occurrence = repeats.get((*instant, body), 0)
                repeats[*instant, body] = occurrence + 1
                digests.append(line_digest(identity, job_id, line.time_unix_nano, body, occurrence, line.task))
            bodies.append(body)
            _extend(runs, line, ordinal, tasks)
        return cls(bodies, runs, cursor, b"".join(digests), tasks=tuple(tasks))

    def part(self, first_run: int, end_run: int, first_line: int) -> LogPage:
        """Return some runs of the page with their lines.

        Args:
            first_run: The first run.
            end_run: The first run that is left out.
            first_line: The position of the first line of the first run.
        """
        runs = self.runs[first_run:end_run]
        end = first_line + sum(run.lines for run in runs)
        digests = self.digests[first_line * DIGEST_BYTES : end * DIGEST_BYTES]
        return LogPage(self.lines[first_line:end], runs, self.cursor, digests, tasks=self.tasks)

    def joined(self) -> bytes:
        """Return all lines as one text, with a newline after each."""
        return self.text or b"\n".join((*self.lines, b""))

    def times_unix_nano(self) -> list[int]:
        """Return the time of each line, in ns since the epoch."""
        times: list[int] = []
        for run in self.runs:
            times.extend(range(run.time_unix_nano, run.time_unix_nano + run.lines))
        return times

    def uids(self) -> list[str]:
        """Return the ``log.record.uid`` of each line."""
        if self.digests:
            return self.digests.hex(" ", DIGEST_BYTES).split(" ")
        return [f"{run.uid_prefix}{index:04x}" for run in self.runs for index in range(run.lines)]

    def messages(self) -> Iterator[Message]:
        """Yield each line as `tailspan.job_get_logs` returns it."""
        if self.text:
            texts = iter(self.text.decode("utf-8", "replace").split("\n"))
        else:
            texts = iter([line.decode("utf-8", "replace") for line in self.lines])
        for run in self.runs:
            nano, end = run.time_unix_nano, run.time_unix_nano + run.lines
            empty = _EMPTY_MESSAGES[run.stream].copy()
            if run.task:
                empty["task_id"], empty["task"], empty["attempt"] = self.tasks[run.task - 1]
            if run.severity:
                empty["level"] = level_name(run.severity)
            while nano < end:
                empty["timestamp"] = ms = nano // NANOS_PER_MS
                past_nano = min(end, (ms + 1) * NANOS_PER_MS)
                for text in islice(texts, past_nano - nano):
                    message = empty.copy()
                    message["message"] = text
                    yield message
                nano = past_nano


def numbered_pages(
    lines: Iterable[Line], cursor: bytes | None, *, identity: str, job_id: str, since_ms: int | None = None
) -> Iterator[LogPage]:
    """Yield the lines after a cursor as pages, for services whose lines have an order that never changes.

    A line's uid and exact time follow from its number, so they are the same from whatever cursor a read starts.

    Args:
        lines: All lines of the job from the first one on, whatever the cursor.
        cursor: The number of lines up to the end of a page, as ASCII digits. None: from the first line.
        identity: The service's identity.
        job_id: The job's id there.
        since_ms: Only lines whose time is at or after this, in ms since the epoch.

    Raises:
        ConfigError: The cursor is not a number of lines.
    """
    if cursor is not None and not cursor.isdigit():
        raise ConfigError(f"{cursor[:40]!r} is not a cursor of this service", job_id=job_id)
    start, first_nano = int(cursor or 0), (since_ms or 0) * NANOS_PER_MS
    key = f"{identity}\0{job_id}\0line\0".encode()
    bodies: list[bytes] = []
    runs: list[LineRun] = []
    digests: list[bytes] = []
    tasks: dict[TaskRef, int] = {}
    size = number = ordinal = 0
    last_nano: int | None = None

    def page() -> LogPage:
        return LogPage(bodies, runs, b"%d" % number, b"".join(digests), tasks=tuple(tasks))

    for number, line in enumerate(lines):
        ordinal = ordinal + 1 if line.time_unix_nano == last_nano else 0
        last_nano = line.time_unix_nano
        if number < start or last_nano < first_nano:
            continue
        body = line.message if isinstance(line.message, bytes) else line.message.encode("utf-8", "replace")
        if bodies and (len(bodies) == MAX_PAGE_LINES or size + len(body) > MAX_PAGE_BYTES):
            yield page()
            bodies, runs, digests, tasks, size = [], [], [], {}, 0
        bodies.append(body)
        size += len(body) + 1
        digests.append(blake2b(key + b"%d" % number, digest_size=DIGEST_BYTES).digest())
        _extend(runs, line, ordinal, tasks)
    if bodies:
        number += 1
        yield page()


def _extend(runs: list[LineRun], line: Line, ordinal: int, tasks: dict[TaskRef, int]) -> None:
    """Add a line to the last run if it continues it, else begin a run.

    Args:
        runs: The runs so far.
        line: The line.
        ordinal: Its place among the lines of its instant, from 0.
        tasks: The place of each task, from 1; a new one is added.
    """
    nano = line.time_unix_nano + min(ordinal, NANOS_PER_MS - 1)
    stream = Stream.NAMES.index(line.stream)
    task = 0 if line.task is None else tasks.setdefault(line.task, len(tasks) + 1)
    last = runs[-1] if runs else None
    if (
        last
        and last.time_unix_nano + last.lines == nano
        and (last.stream, last.task, last.severity) == (stream, task, line.severity)
    ):
        runs[-1] = last._replace(lines=last.lines + 1)
    else:
        runs.append(LineRun(1, nano, stream, task=task, severity=line.severity))
