"""The part of a log that somebody looks at, read through the job's own service.

A log is never held whole: a request reads pages of lines from the nearest place that is known of it, for a bounded
time, and gives the event loop back between two of them. Where it has to stop early it says so, and the next request
goes on from there, for the places are remembered.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate

from tailspan.errors import CursorExpiredError
from tailspan.logs.clean import clean
from tailspan.logs.page import NANOS_PER_MS, LineRun, LogPage, Stream
from tailspan.services import JobService
from tailspan_agent.records.severity import SEVERITIES, find_severity
from tailspan_agent.web.formatting import visible

__all__ = ["WINDOW_LINES", "LogLine", "LogReader", "Window"]

WINDOW_LINES = 500
_SCAN_S = 2.0
_COUNTED_LINES = 200_000
_MARKED_JOBS = 32
_MARKS = 1024
_MOST_MATCHES = 500
_MAX_SHOWN_CHARS = 4000
_ERROR_NUMBER = 17
_TRACEBACK = "Traceback (most recent call last):"
_READERS = 4
_TAIL_MS = (5_000, 60_000, 3_600_000)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line as the page shows it.

    Attributes:
        number: Counted from 1; None where only the end of a long log was read.
        time_unix_nano: Its time, in ns since the epoch.
        stream: ``stdout``, ``stderr`` or empty.
        level: ``error``, ``warn``, ``info``, ``debug`` or empty.
        text: Cleaned, without secrets, cut off if it is very long.
    """

    number: int | None
    time_unix_nano: int
    stream: str
    level: str
    text: str


@dataclass(slots=True, kw_only=True)
class Window:
    """What was read.

    Attributes:
        lines: Oldest first.
        before: Whether there are lines before these.
        after: Whether there are, or may be, lines after these.
        reached: How many lines of the log were looked at, from its start, when the time for it was over; None when
            all that was asked for was.
        cursor: Where the last page of lines ended.
        counted: How many lines the log has up to there; None where they were not counted.
        left_out: How many lines stand before these and were not shown, where all up to these are wanted.
    """

    lines: list[LogLine] = field(default_factory=list)
    before: bool = False
    after: bool = False
    reached: int | None = None
    cursor: bytes | None = None
    counted: int | None = None
    left_out: int = 0


class LogReader:
    """Reads windows of logs.

    Args:
        redact: Takes secrets out of a text.
    """

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact
        # A service that hangs must not keep anybody from the logs of another.
        self._readers: dict[str, asyncio.Semaphore] = {}
        # Where pages begin: (lines before, cursor). A log that changed under us answers with an expired cursor.
        self._marks: OrderedDict[tuple[str, str], list[tuple[int, bytes | None]]] = OrderedDict()

    async def window(self, service: JobService, job_id: str, first: int, lines: int = WINDOW_LINES) -> Window:
        """Return lines from a number on.

        Args:
            service: The job's service.
            job_id: The job.
            first: The number of the first line, from 1.
            lines: How many.

        Raises:
            ServiceError: The log cannot be read.
        """
        found = Window(before=first > 1)
        async with aclosing(self._pages(service, job_id, first)) as pages:
            async for done, page, late in pages:
                shown = _Shown(page, self._redact)
                for position in range(max(0, first - 1 - done), page.line_count):
                    if len(found.lines) == lines:
                        found.after = True
                        return found
                    found.lines.append(shown.line(position, done + position + 1))
                if late:
                    if found.lines:
                        found.after = True
                    else:
                        found.reached = done + page.line_count
                    return found
        return found

    async def tail(
        self, service: JobService, job_id: str, *, known_lines: int, last_line_ns: int | None, lines: int = 200
    ) -> Window:
        """Return the last lines, and where to go on; of a long log only its end is read, and they have no numbers.

        A log that fits into a window is returned whole. `Window.after` says that its end was not reached in time.

        Args:
            service: The job's service.
            job_id: The job.
            known_lines: How many lines the log has, or more.
            last_line_ns: When its newest line was written, or earlier, in ns since the epoch; None: nobody knows.
            lines: How many.
        """
        if known_lines <= _COUNTED_LINES:
            found = await self._counted_tail(service, job_id, lines)
            if found is not None:
                return found
        found = await self._uncounted_tail(service, job_id, last_line_ns, lines)
        # The agent may be far behind the job: where it was, much is to be read.
        if found.after and (times_ms := await service.log_times_ms(job_id)):
            found = await self._uncounted_tail(service, job_id, times_ms[1] * NANOS_PER_MS, lines)
        return found

    async def _uncounted_tail(self, service: JobService, job_id: str, last_ns: int | None, lines: int) -> Window:
        """Return the lines since shortly before a time, or else since long before it, until there are enough."""
        best: Window | None = None
        for back_ms in (*_TAIL_MS, None) if last_ns is not None else (None,):
            since_ms = None if back_ms is None else (last_ns or 0) // NANOS_PER_MS - back_ms
            found, last = Window(), deque[LogLine](maxlen=lines)
            deadline_s = time.monotonic() + _SCAN_S
            async with self._turn(service), aclosing(_read(service, job_id, since_ms=since_ms)) as pages:
                async for page in pages:
                    last.extend(self._last_lines(page, None, lines))
                    found.cursor = page.cursor
                    await asyncio.sleep(0)
                    if time.monotonic() > deadline_s:
                        found.after = True
                        break
            found.lines, found.before = list(last), len(last) >= lines or found.after
            if best is not None and found.after:
                best.before = True
                return best
            best = found
            if found.before:
                break
        return best or Window()

    async def _counted_tail(self, service: JobService, job_id: str, lines: int) -> Window | None:
        """Return the last lines with their numbers; None when there was no time to count them."""
        last: deque[LogLine] = deque(maxlen=max(lines, WINDOW_LINES))
        found = Window(counted=0)
        async with aclosing(self._pages(service, job_id, 1)) as pages:
            async for done, page, late in pages:
                if late:
                    return None
                last.extend(self._last_lines(page, done, max(lines, WINDOW_LINES)))
                found.cursor, found.counted = page.cursor, done + page.line_count
        found.before = (found.counted or 0) > len(last)
        found.lines = list(last)[-lines:] if found.before else list(last)
        return found

    async def after(self, service: JobService, job_id: str, seen: Window, lines: int = 500) -> Window:
        """Return what came after a window that `tail` or this returned: of more than `lines` the last ones.

        It reads for a bounded time: a log that grows faster than it is read is shown as far as that went.

        Raises:
            CursorExpiredError: The log is not the one that was read.
            ServiceError: The log cannot be read.
        """
        found = Window(cursor=seen.cursor, counted=seen.counted)
        last, read = deque[LogLine](maxlen=lines), 0
        deadline_s = time.monotonic() + _SCAN_S
        async with self._turn(service), aclosing(_read(service, job_id, seen.cursor)) as pages:
            async for page in pages:
                last.extend(self._last_lines(page, found.counted, lines))
                read += page.line_count
                found.cursor = page.cursor
                if found.counted is not None:
                    found.counted += page.line_count
                await asyncio.sleep(0)
                if time.monotonic() > deadline_s:
                    break
        found.lines, found.left_out = list(last), read - len(last)
        return found

    def _turn(self, service: JobService) -> asyncio.Semaphore:
        return self._readers.setdefault(service.identity, asyncio.Semaphore(_READERS))

    def _last_lines(self, page: LogPage, done: int | None, most: int) -> Iterator[LogLine]:
        """Yield the last lines of a page; `done` is how many lines stand before it, if that is known."""
        shown = _Shown(page, self._redact)
        for position in range(max(0, page.line_count - most), page.line_count):
            yield shown.line(position, None if done is None else done + position + 1)

    async def search(self, service: JobService, job_id: str, text: str, first: int = 1) -> Window:
        """Return the lines that contain a text, in any case, also where a long line is not shown any more.

        It looks at lines without their secrets: one cannot be searched for.

        Args:
            service: The job's service.
            job_id: The job.
            text: What to look for.
            first: The number of the line to begin with, from 1.
        """
        wanted = text.lower()
        return await self._select(service, job_id, first, lambda line: wanted in line.lower(), _MOST_MATCHES)

    async def first_error(self, service: JobService, job_id: str, first: int = 1) -> Window:
        """Return the first line that is an error by its own level, or begins a traceback, from a number on."""
        return await self._select(service, job_id, first, lambda line: _severity(line) >= _ERROR_NUMBER, 1)

    async def _select(
        self, service: JobService, job_id: str, first: int, wanted: Callable[[str], bool], most: int
    ) -> Window:
        """Return lines whose text is wanted."""
        found = Window(before=first > 1)
        async with aclosing(self._pages(service, job_id, first)) as pages:
            async for done, page, late in pages:
                shown = _Shown(page, self._redact)
                for position in range(max(0, first - 1 - done), page.line_count):
                    if position % 500 == 499:
                        await asyncio.sleep(0)
                    if not wanted(shown.text(position)):
                        continue
                    if len(found.lines) == most:
                        found.after = True
                        return found
                    found.lines.append(shown.line(position, done + position + 1))
                if late:
                    found.reached = done + page.line_count
                    return found
        return found

    async def _pages(
        self, service: JobService, job_id: str, first: int
    ) -> AsyncGenerator[tuple[int, LogPage, bool], None]:
        """Yield pages from the one that has a line: lines before it, the page, and whether the time is over."""
        key = service.identity, job_id
        marks = self._marks.setdefault(key, [(0, None)])
        self._marks.move_to_end(key)
        while len(self._marks) > _MARKED_JOBS:
            self._marks.popitem(last=False)
        done, cursor = marks[bisect.bisect_right(marks, first - 1, key=lambda mark: mark[0]) - 1]
        async with self._turn(service):
            deadline_s = time.monotonic() + _SCAN_S
            try:
                async with aclosing(_read(service, job_id, cursor)) as pages:
                    async for page in pages:
                        late = time.monotonic() > deadline_s
                        # Before it is given away: who stops here goes on from there the next time.
                        self._mark(marks, done + page.line_count, page.cursor)
                        if done + page.line_count >= first or late:
                            yield done, page, late
                        done += page.line_count
                        await asyncio.sleep(0)
            except CursorExpiredError:
                # The log is not the one that was marked: what is known of it is worth nothing.
                self._marks.pop(key, None)
                raise

    @staticmethod
    def _mark(marks: list[tuple[int, bytes | None]], lines: int, cursor: bytes) -> None:
        if lines > marks[-1][0]:
            marks.append((lines, cursor))
        if len(marks) > _MARKS:
            del marks[1::2]


class _Shown:
    """The lines of a page as people see them; what takes the whole page is done once for it, or not at all."""

    def __init__(self, page: LogPage, redact: Callable[[str], str]) -> None:
        self._page = page
        self._redact = redact
        self._ends: Sequence[int] = ()

    def text(self, position: int) -> str:
        """Return the text of a line, cleaned and without secrets."""
        return self._redact(clean(self._page.lines[position]))

    def line(self, position: int, number: int | None) -> LogLine:
        """Return a line as it is shown."""
        text = self.text(position)
        level = _level(_severity(text))
        run, before = self._run(position)
        if len(text) > _MAX_SHOWN_CHARS:
            text = f"{text[:_MAX_SHOWN_CHARS]} … ({len(text) - _MAX_SHOWN_CHARS:,} more characters)"
        return LogLine(number, run.time_unix_nano + position - before, Stream.NAMES[run.stream], level, visible(text))

    def _run(self, position: int) -> tuple[LineRun, int]:
        """Return the run of a line, and how many lines stand before that run."""
        # A service that knows only times has a run for each line: going through them for each is quadratic.
        self._ends = self._ends or list(accumulate(run.lines for run in self._page.runs))
        index = bisect.bisect_right(self._ends, position)
        return self._page.runs[index], self._ends[index - 1] if index else 0


def _read(
    service: JobService, job_id: str, cursor: bytes | None = None, since_ms: int | None = None
) -> AsyncGenerator[LogPage, None]:
    return service.read_logs(job_id, cursor, since_ms=since_ms)


def _severity(text: str) -> int:
    if text.lstrip().startswith(_TRACEBACK):
        return _ERROR_NUMBER  # it has no level of its own, and is what people look for
    return SEVERITIES[find_severity(text.encode(errors="replace"))].number


def _level(severity_number: int) -> str:
    if severity_number >= _ERROR_NUMBER:
        return "error"
    if severity_number >= 13:
        return "warn"
    if severity_number >= 9:
        return "info"
    return "debug" if severity_number else ""
