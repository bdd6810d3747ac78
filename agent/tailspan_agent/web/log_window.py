"""Reads the part of a log that a browser shows, from the job's own service.

A log is never held completely: a request reads pages of lines from the nearest known position, for a bounded time, and
yields to the event loop between two pages. If the time is up, the result says so, and the next request resumes there,
because positions are remembered as marks.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate, islice

from tailspan._plural import plural
from tailspan.errors import CursorExpiredError, ServiceError
from tailspan.logs.clean import clean
from tailspan.logs.page import NANOS_PER_MS, LineRun, LogPage, Stream
from tailspan.services import JobService
from tailspan_agent.records.severity import SEVERITIES, find_severity
from tailspan_agent.web.formatting import visible

__all__ = ["WINDOW_LINES", "LogLine", "LogWindow", "LogWindowReader"]

WINDOW_LINES = 500
_SCAN_S = 2.0
_COUNTED_LINES = 200_000
_MARKED_JOBS = 32
_MARKS = 1024
_MAX_MATCHES = 500
_MAX_LINE_CHARS = 4000
_ERROR_NUMBER = 17
_TRACEBACK = "Traceback (most recent call last):"
_MAX_READS = 4
_TAIL_MS = (5_000, 60_000, 3_600_000)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line to display.

    Attributes:
        number: The line number from 1; None if only the end of a long log was read.
        time_unix_nano: Its time, in ns since the epoch.
        stream: ``stdout``, ``stderr`` or empty.
        level: ``error``, ``warn``, ``info``, ``debug``, empty, or ``open`` for a line that is not complete.
        text: Cleaned, without secrets, truncated if it is very long.
        task: The name of the task that wrote it, without secrets; empty among the lines of one task.
    """

    number: int | None
    time_unix_nano: int
    stream: str
    level: str
    text: str
    task: str = ""


@dataclass(slots=True, kw_only=True)
class LogWindow:
    """A range of lines, or the matching lines of a search.

    Attributes:
        lines: Oldest first.
        before: Whether there are lines before these.
        after: Whether there are, or may be, lines after these.
        reached: Number of lines from the start of the log that were read when the time was up; None if the request was
            completed.
        cursor: The end of the last page that was read.
        counted: The line count up to the cursor; None if lines were not counted.
        left_out: Number of skipped lines before these, in an update.
    """

    lines: list[LogLine] = field(default_factory=list)
    before: bool = False
    after: bool = False
    reached: int | None = None
    cursor: bytes | None = None
    counted: int | None = None
    left_out: int = 0


class LogWindowReader:
    """Reads windows of logs.

    Its methods take the id or the name of a task, to return only its lines; empty: all lines. A line keeps the number
    that it has in the whole log.

    Args:
        redact: Removes secrets from text.
        redact_open: The same for the beginning of a line; None: `redact`.
    """

    def __init__(self, redact: Callable[[str], str], redact_open: Callable[[str], str] | None = None) -> None:
        self._redact = redact
        self._redact_open = redact_open or redact
        # One limit per service: a service that hangs must not block reads from the others.
        self._read_limits: dict[str, asyncio.Semaphore] = {}
        # Starts of pages as (lines before, cursor). If the log has changed since, the service rejects the cursor.
        self._marks: OrderedDict[tuple[str, str], list[tuple[int, bytes | None]]] = OrderedDict()

    async def window(
        self, service: JobService, job_id: str, first: int, lines: int = WINDOW_LINES, *, task: str = ""
    ) -> LogWindow:
        """Return lines from a line number on.

        Args:
            service: The job's service.
            job_id: The job.
            first: The number of the first line, from 1.
            lines: Maximum number of lines.
            task: Only lines of this task.

        Raises:
            ServiceError: The log cannot be read.
        """
        found = LogWindow(before=first > 1)
        async with aclosing(self._pages(service, job_id, first)) as pages:
            async for lines_before, page, late in pages:
                page_lines = _PageLines(page, self._redact, task)
                for position in page_lines.positions(first - 1 - lines_before):
                    if len(found.lines) == lines:
                        found.after = True
                        return found
                    found.lines.append(page_lines.line(position, lines_before + position + 1))
                if late:
                    if found.lines:
                        found.after = True
                    else:
                        found.reached = lines_before + page.line_count
                    return found
        return found

    async def until(
        self, service: JobService, job_id: str, last: int, lines: int = WINDOW_LINES, *, task: str
    ) -> LogWindow:
        """Return the last lines of a task up to a line number.

        Without a filter, the number of the first line would follow from that of the last one.

        Args:
            service: The job's service.
            job_id: The job.
            last: The number of the last line.
            lines: Maximum number of lines.
            task: Only lines of this task.

        Raises:
            ServiceError: The log cannot be read.
        """
        found, matching = LogWindow(after=True), 0
        kept: deque[LogLine] = deque(maxlen=lines)
        async with aclosing(self._pages(service, job_id, 1)) as pages:
            async for lines_before, page, late in pages:
                page_lines = _PageLines(page, self._redact, task, stop=last - lines_before)
                kept.extend(page_lines.last(lines_before, lines))
                matching += page_lines.count
                if lines_before + page.line_count >= last:
                    break
                if late:
                    found.reached = lines_before + page.line_count
                    return found
        found.lines, found.before = list(kept), matching > len(kept)
        return found

    async def tail(
        self,
        service: JobService,
        job_id: str,
        *,
        known_lines: int,
        last_line_ns: int | None,
        lines: int = 200,
        task: str = "",
    ) -> LogWindow:
        """Return the last lines and the cursor behind them.

        A log that fits into a window is returned completely. Of a long log only the end is read, and its lines have no
        numbers. `LogWindow.after` is True if the end was not reached in time.

        Args:
            service: The job's service.
            job_id: The job.
            known_lines: The expected number of lines of the log.
            last_line_ns: A time at or before the newest line, in ns since the epoch; None if unknown.
            lines: Maximum number of lines of a longer log.
            task: Only lines of this task.
        """
        if known_lines <= _COUNTED_LINES:
            found = await self._counted_tail(service, job_id, lines, task)
            if found is not None:
                return found
        found = await self._uncounted_tail(service, job_id, last_line_ns, lines, task)
        # The agent may be far behind the job, so that there is much to read after its last known line.
        if found.after and (times_ms := await service.log_times_ms(job_id)):
            found = await self._uncounted_tail(service, job_id, times_ms[1] * NANOS_PER_MS, lines, task)
        return found

    async def _uncounted_tail(
        self, service: JobService, job_id: str, last_ns: int | None, lines: int, task: str
    ) -> LogWindow:
        """Return the lines since shortly before a time; if there are too few, since earlier times."""
        best: LogWindow | None = None
        for back_ms in (*_TAIL_MS, None) if last_ns is not None else (None,):
            since_ms = None if back_ms is None else (last_ns or 0) // NANOS_PER_MS - back_ms
            found, last = LogWindow(), deque[LogLine](maxlen=lines)
            deadline_s = time.monotonic() + _SCAN_S
            async with self._read_limit(service), aclosing(_read(service, job_id, since_ms=since_ms)) as pages:
                async for page in pages:
                    last.extend(_PageLines(page, self._redact, task).last(None, lines))
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
        return best or LogWindow()

    async def _counted_tail(self, service: JobService, job_id: str, lines: int, task: str) -> LogWindow | None:
        """Return the last lines with their numbers; None if there was no time to count them."""
        last: deque[LogLine] = deque(maxlen=max(lines, WINDOW_LINES))
        found, matching = LogWindow(counted=0), 0
        async with aclosing(self._pages(service, job_id, 1)) as pages:
            async for lines_before, page, late in pages:
                if late:
                    return None
                page_lines = _PageLines(page, self._redact, task)
                last.extend(page_lines.last(lines_before, max(lines, WINDOW_LINES)))
                matching += page_lines.count
                found.cursor, found.counted = page.cursor, lines_before + page.line_count
        found.before = matching > len(last)
        found.lines = list(last)[-lines:] if found.before else list(last)
        return found

    async def after(
        self, service: JobService, job_id: str, seen: LogWindow, lines: int = 500, *, task: str = ""
    ) -> LogWindow:
        """Return the new lines after a window; if there are more than `lines`, the last ones.

        It reads for a bounded time. If the log grows faster than that, the rest comes with the next call.

        Args:
            service: The job's service.
            job_id: The job.
            seen: A window from `tail` or from this method.
            lines: Maximum number of lines.
            task: Only lines of this task.

        Raises:
            CursorExpiredError: The log was replaced since.
            ServiceError: The log cannot be read.
        """
        found = LogWindow(cursor=seen.cursor, counted=seen.counted)
        last, read = deque[LogLine](maxlen=lines), 0
        deadline_s = time.monotonic() + _SCAN_S
        async with self._read_limit(service), aclosing(_read(service, job_id, seen.cursor)) as pages:
            async for page in pages:
                page_lines = _PageLines(page, self._redact, task)
                last.extend(page_lines.last(found.counted, lines))
                read += page_lines.count
                found.cursor = page.cursor
                if found.counted is not None:
                    found.counted += page.line_count
                await asyncio.sleep(0)
                if time.monotonic() > deadline_s:
                    break
        found.lines, found.left_out = list(last), read - len(last)
        return found

    async def open_line(self, service: JobService, job_id: str) -> list[LogLine]:
        """Return the line whose newline has not come, if there is one.

        Raises:
            ServiceError: The log cannot be read.
        """
        async with self._read_limit(service):
            line = await service.open_line(job_id)
        text = self._redact_open(clean(line.text))[:_MAX_LINE_CHARS] if line is not None else ""
        return [LogLine(None, line.time_unix_nano, "", "open", visible(text))] if line is not None and text else []

    async def text(self, service: JobService, job_id: str, *, task: str = "") -> AsyncGenerator[bytes, None]:
        """Yield a whole log as text, page by page, cleaned and without secrets.

        If it cannot be read further, the last line says so: a response that has begun cannot become an error.

        Args:
            service: The job's service.
            job_id: The job.
            task: Only lines of this task.
        """
        try:
            async with aclosing(_read(service, job_id)) as pages:
                async for page in pages:
                    page_lines = _PageLines(page, self._redact, task)
                    lines = [page_lines.text(position) for position in page_lines.positions(0)]
                    yield "".join(f"{line}\n" for line in lines).encode(errors="replace")
                    await asyncio.sleep(0)
        except (ServiceError, CursorExpiredError) as error:
            yield f"(tailspan: the log cannot be read further: {self._redact(str(error))})\n".encode(errors="replace")

    def _read_limit(self, service: JobService) -> asyncio.Semaphore:
        return self._read_limits.setdefault(service.identity, asyncio.Semaphore(_MAX_READS))

    async def search(self, service: JobService, job_id: str, text: str, first: int = 1, *, task: str = "") -> LogWindow:
        """Return the lines that contain a text, case-insensitive, also in the truncated part of a long line.

        Lines are redacted before the search, so that it cannot find secrets.

        Args:
            service: The job's service.
            job_id: The job.
            text: The text to find.
            first: The number of the first line to search, from 1.
            task: Only lines of this task.
        """
        lower = text.lower()

        def matches(page: _PageLines, position: int) -> bool:
            return lower in page.text(position).lower()

        return await self._matching_lines(service, job_id, first, matches, _MAX_MATCHES, task)

    async def first_error(self, service: JobService, job_id: str, first: int = 1, *, task: str = "") -> LogWindow:
        """Return the first line from a number on that has an error level or starts a traceback."""

        def matches(page: _PageLines, position: int) -> bool:
            return page.severity(position, page.text(position)) >= _ERROR_NUMBER

        return await self._matching_lines(service, job_id, first, matches, 1, task)

    async def _matching_lines(
        self,
        service: JobService,
        job_id: str,
        first: int,
        matches: Callable[[_PageLines, int], bool],
        limit: int,
        task: str,
    ) -> LogWindow:
        """Return the lines that match."""
        found = LogWindow(before=first > 1)
        async with aclosing(self._pages(service, job_id, first)) as pages:
            async for lines_before, page, late in pages:
                page_lines = _PageLines(page, self._redact, task)
                for position in page_lines.positions(first - 1 - lines_before):
                    if position % 500 == 499:
                        await asyncio.sleep(0)
                    if not matches(page_lines, position):
                        continue
                    if len(found.lines) == limit:
                        found.after = True
                        return found
                    found.lines.append(page_lines.line(position, lines_before + position + 1))
                if late:
                    found.reached = lines_before + page.line_count
                    return found
        return found

    async def _pages(
        self, service: JobService, job_id: str, first: int
    ) -> AsyncGenerator[tuple[int, LogPage, bool], None]:
        """Yield pages from the one with a line number on: line count before it, page, whether the time is up."""
        key = service.identity, job_id
        marks = self._marks.setdefault(key, [(0, None)])
        self._marks.move_to_end(key)
        while len(self._marks) > _MARKED_JOBS:
            self._marks.popitem(last=False)
        lines_before, cursor = marks[bisect.bisect_right(marks, first - 1, key=lambda mark: mark[0]) - 1]
        async with self._read_limit(service):
            deadline_s = time.monotonic() + _SCAN_S
            try:
                async with aclosing(_read(service, job_id, cursor)) as pages:
                    async for page in pages:
                        late = time.monotonic() > deadline_s
                        # Before the yield: a caller that stops here resumes behind this page next time.
                        self._add_mark(marks, lines_before + page.line_count, page.cursor)
                        if lines_before + page.line_count >= first or late:
                            yield lines_before, page, late
                        lines_before += page.line_count
                        await asyncio.sleep(0)
            except CursorExpiredError:
                # The log was replaced: its marks are invalid.
                self._marks.pop(key, None)
                raise

    @staticmethod
    def _add_mark(marks: list[tuple[int, bytes | None]], lines: int, cursor: bytes) -> None:
        if lines > marks[-1][0]:
            marks.append((lines, cursor))
        if len(marks) > _MARKS:
            del marks[1::2]


class _PageLines:
    """The lines of a page for display, of one task or all; work that needs the whole page is done once, on demand."""

    def __init__(self, page: LogPage, redact: Callable[[str], str], task: str = "", stop: int | None = None) -> None:
        self._page = page
        self._redact = redact
        self._is_filtered = bool(task)
        self._ends: Sequence[int] = ()
        self._ranges: Sequence[range] = [range(page.line_count)] if not task else self._ranges_of(task)
        if stop is not None:
            self._ranges = [range(lines.start, min(lines.stop, stop)) for lines in self._ranges]
        self._names: dict[int, str] = {}

    def _ranges_of(self, task: str) -> Sequence[range]:
        numbers = {number for number, ref in enumerate(self._page.tasks, 1) if task in (ref.task_id, ref.name)}
        if not numbers:
            return ()
        ends = accumulate(run.lines for run in self._page.runs)
        return [
            range(end - run.lines, end) for run, end in zip(self._page.runs, ends, strict=True) if run.task in numbers
        ]

    @property
    def count(self) -> int:
        """How many lines there are."""
        return sum(map(len, self._ranges))

    def positions(self, first: int) -> Iterator[int]:
        """Yield the places of the lines in the page, from one on."""
        for lines in self._ranges:
            yield from range(max(first, lines.start), lines.stop)

    def last(self, lines_before: int | None, limit: int) -> Iterator[LogLine]:
        """Yield the last lines; `lines_before` is the line count before the page, if known."""
        for position in islice(self.positions(0), max(0, self.count - limit), None):
            yield self.line(position, None if lines_before is None else lines_before + position + 1)

    def text(self, position: int) -> str:
        """Return the text of a line, cleaned and without secrets."""
        return self._redact(clean(self._page.lines[position]))

    def line(self, position: int, number: int | None) -> LogLine:
        """Return a line for display."""
        text = self.text(position)
        level = _level(self.severity(position, text))
        run, before = self._run(position)
        if len(text) > _MAX_LINE_CHARS:
            more = len(text) - _MAX_LINE_CHARS
            text = f"{text[:_MAX_LINE_CHARS]} … ({more:,} more {plural(more, 'character')})"
        time_ns, stream = run.time_unix_nano + position - before, Stream.NAMES[run.stream]
        return LogLine(number, time_ns, stream, level, visible(text), self._task_name(run))

    def severity(self, position: int, text: str) -> int:
        """Return the severity number of a line: its service's, unless it starts a traceback, or else its text's."""
        if text.lstrip().startswith(_TRACEBACK):
            return _ERROR_NUMBER  # a traceback has no level, and is what users search for
        return self._run(position)[0].severity or SEVERITIES[find_severity(text.encode(errors="replace"))].number

    def _task_name(self, run: LineRun) -> str:
        if self._is_filtered or not 0 < run.task <= len(self._page.tasks):
            return ""
        name = self._names.get(run.task)
        if name is None:
            task = self._page.tasks[run.task - 1]
            name = self._names[run.task] = self._redact(task.name or task.task_id)
        return name

    def _run(self, position: int) -> tuple[LineRun, int]:
        """Return the run of a line, and the line count before that run."""
        # A service with times only has one run per line: a linear search for each line would be quadratic.
        self._ends = self._ends or list(accumulate(run.lines for run in self._page.runs))
        index = bisect.bisect_right(self._ends, position)
        return self._page.runs[index], self._ends[index - 1] if index else 0


def _read(
    service: JobService, job_id: str, cursor: bytes | None = None, since_ms: int | None = None
) -> AsyncGenerator[LogPage, None]:
    return service.read_logs(job_id, cursor, since_ms=since_ms)


def _level(severity_number: int) -> str:
    if severity_number >= _ERROR_NUMBER:
        return "error"
    if severity_number >= 13:
        return "warn"
    if severity_number >= 9:
        return "info"
    return "debug" if severity_number else ""
