"""`FilesService`: log files as jobs; a run ends by a line, by an exit file, or by its silence."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import stat
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from tailspan._direct import beside_loop
from tailspan._times import moment_of
from tailspan.config import Settings, validate_options
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceUnavailableError, TailspanError
from tailspan.logs.page import NANOS_PER_MS, LogPage, OpenLine
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, JobService, Problem
from tailspan.services._http_service import drop_oldest, pack_cursor, unpack_cursor
from tailspan.services._log_file import (
    FileAccess,
    LogFile,
    LogGapError,
    LogPart,
    LogPosition,
    SeenTimes,
    follow_log,
)
from tailspan.services.files.ends import RunEnd, end_of_exit_file, end_of_markers, end_of_silence
from tailspan.services.files.finder import FileFinder
from tailspan.services.files.options import FilesOptions
from tailspan.services.files.runs import Content, FileRun, RunBook

__all__ = ["FilesService"]

_LIST_PAGE = 500
_FRESH_S = 0.5
_MAX_SEEN = 2_000
_SHARE_OF_A_CORE = 0.02
_FINAL_S = 3600.0
_FINAL_FOR_S = 600.0
_HEAD_BYTES = 16 << 10
_TAIL_BYTES = 64 << 10
_EXIT_BYTES = 64
_NUMBERS = re.compile(r"[-_.]?\d[-\d_.:T+Z]*$")


class _FileJob(NamedTuple):
    """A run and its log.

    Attributes:
        job_id: Its id.
        path: Its log, relative to the root.
        found: What the file system says of the log.
        content: Which content of the file it is in, if files are used again.
        run: Which part of that.
        rotated: The file that has this content now, if rotation or the next run took it from the log.
    """

    job_id: str
    path: str
    found: os.stat_result
    content: Content | None = None
    run: FileRun | None = None
    rotated: Path | None = None


class FilesService(JobService):
    """Log files below a directory as jobs. See ``docs/services/files.md``."""

    def __init__(self, name: str, options: FilesOptions, *, state_dir: Path) -> None:
        """Read nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
            state_dir: Where it is stored which runs wrote a file that is used again.
        """
        self.name = name
        self.options = options
        self._host = options.host or socket.gethostname()
        self._root = Path(os.path.abspath(options.root))
        # Two sections may have one root: for each kind of log its globs.
        self.identity = f"files://{self._host}{self._root}?{','.join(sorted(options.glob))}"
        self._access = FileAccess(self._root)
        self._finder = FileFinder(self._root, options.glob)
        self._marker = re.compile((options.end_marker or "").encode(), re.MULTILINE) if options.end_marker else None
        self._name = re.compile(options.name, re.MULTILINE) if options.name else None
        marker = self._marker if options.runs == "append" else None
        self._book = RunBook((options.state_dir or state_dir) / f"files-{name}.json", self._access, marker)
        self._lock = threading.Lock()
        self._ends: dict[str, tuple[tuple[Any, ...], RunEnd | None]] = {}
        self._names: dict[str, tuple[str, datetime | None, Mapping[str, str]]] = {}
        self._jobs: dict[str, _FileJob] = {}
        self._jobs_at_s = float("-inf")
        self._seen: dict[str, SeenTimes] = {}
        # Files of runs that ended long ago, with their rows: thousands of them need not be asked for each few seconds.
        self._final: dict[str, tuple[_FileJob, float, ListedJob]] = {}
        self._final_since_s = 0.0
        self._known_rows: list[ListedJob] = []
        self._rows_until_s = float("-inf")
        self._unnamed: list[str] = []

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: Settings) -> Self:
        """Make the service of a section ``services.NAME``.

        Raises:
            ConfigError: An option is unknown or not valid; names the key.
        """
        return cls(
            name, validate_options(FilesOptions, f"services.{name}", options), state_dir=settings.agent.state_dir
        )

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            return await beside_loop(self._status, job_id)

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines after a cursor; see `tailspan.services.JobService`."""
        position = self._position(cursor, job_id)
        since_ns = (since_ms or 0) * NANOS_PER_MS
        with self._translated(job_id), contextlib.closing(self._parts(job_id, position)) as parts:
            while (part := await beside_loop(next, parts, None)) is not None:
                page = part.since(since_ns)
                if page is not None:
                    page.cursor = pack_cursor({"p": list(part.position)})
                    yield page

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs, newest first; see `tailspan.services.JobService`."""
        with self._translated():
            rows = await beside_loop(self._rows)
        for start in range(0, len(rows), _LIST_PAGE):
            yield rows[start : start + _LIST_PAGE]

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the line whose newline has not come; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            return await beside_loop(self._open_line, job_id)

    async def find_problems(self) -> Sequence[Problem]:
        """Return which directories and files this user may not read; see `tailspan.services.JobService`."""
        with self._translated():
            return await beside_loop(self._problems)

    def _status(self, job_id: str) -> JobStatus:
        job = self._job(job_id)
        name, started_at, attributes = self._name_of(job.path)
        end = self._end_of(job)
        # A file has no beginning, and its last write may be older than the marked start.
        finished_at = None if end is None else moment_of(end.unix_nano)
        if started_at is not None and finished_at is not None:
            finished_at = max(started_at, finished_at)
        return self.make_status(
            job_id,
            JobState.RUNNING if end is None else end.state,
            job_name=name,
            started_at=started_at,
            finished_at=finished_at,
            exit_code=None if end is None else end.exit_code,
            error=None if end is None else end.error,
            job_status=None if end is None else end.by,
            attributes=attributes,
            details={"file.path": str(self._root / job.path), "host.name": self._host},
            instance_id=self._host,
        )

    def _rows(self) -> list[ListedJob]:
        """Return the rows of all jobs, newest first; of very many, those of some seconds ago."""
        if time.monotonic() >= self._rows_until_s:
            begun_s = time.thread_time()
            self._known_rows = self._new_rows()
            self._rows_until_s = time.monotonic() + (time.thread_time() - begun_s) / _SHARE_OF_A_CORE
        return self._known_rows

    def _new_rows(self) -> list[ListedJob]:
        rows: list[tuple[float, ListedJob]] = []
        jobs = self._find()
        for job in jobs.values():
            final = self._final.get(job.path)
            if final is not None and final[0] is job:
                rows.append(final[1:])
                continue
            name, started_at, _ = self._name_of(job.path)
            end = self._end_of(job)
            row = ListedJob(
                job_id=job.job_id,
                job_name=name,
                state=JobState.RUNNING if end is None else end.state,
                created_at=started_at,
                state_since=None if end is None else moment_of(end.unix_nano),
                instance_id=self._host,
                service=self.name,
            )
            newest = started_at.timestamp() if started_at is not None else job.found.st_mtime
            rows.append((newest, row))
            if end is not None and self.options.runs == "file" and time.time() - end.unix_nano / 1e9 > _FINAL_S:
                self._final[job.path] = job, newest, row
        paths = {job.path for job in jobs.values()}
        self._final = {path: known for path, known in self._final.items() if path in paths}
        self._ends = {path: known for path, known in self._ends.items() if path in paths}
        self._names = {path: known for path, known in self._names.items() if path in paths}
        rows.sort(key=lambda one: one[0], reverse=True)
        return [row for _, row in rows]

    def _find(self) -> dict[str, _FileJob]:
        """Return the jobs that there are, by id."""
        with self._lock:
            if time.monotonic() - self._jobs_at_s < _FRESH_S:
                return self._jobs
            found: dict[str, os.stat_result] = {}
            if time.monotonic() - self._final_since_s > _FINAL_FOR_S:
                self._final, self._final_since_s = {}, time.monotonic()
            root = f"{self._root}/"
            self._unnamed = []
            for path in self._finder.find():
                if not path.isprintable():
                    # Neither an id nor a name could be made of it.
                    self._unnamed.append(path)
                    continue
                final = self._final.get(path)
                if final is not None:
                    found[path] = final[0].found
                    continue
                with contextlib.suppress(OSError):
                    found[path] = os.lstat(root + path)
            if self.options.runs == "file":
                jobs = [
                    self._final[path][0] if path in self._final else _FileJob(path, path, known)
                    for path, known in found.items()
                ]
            else:
                contents = self._book.update(self._root, found)
                jobs = [job for path, known in found.items() for job in self._jobs_in(path, known, contents[path])]
            self._jobs, self._jobs_at_s = {job.job_id: job for job in jobs}, time.monotonic()
            return self._jobs

    def _jobs_in(self, path: str, found: os.stat_result, contents: Sequence[Content]) -> Iterator[_FileJob]:
        """Yield the runs that wrote a file, also those of a content that a rotated file has."""
        for content in contents:
            rotated = None if content is contents[-1] else self._rotated(path, content)
            if content is not contents[-1] and rotated is None:
                continue
            for run in content.runs:
                job_id = path
                if self._marker is not None and self.options.runs == "append":
                    job_id = f"{path}@{content.mark}{'+' if content.mark else ''}{run.start}"
                elif content.mark:
                    job_id = f"{path}@{content.mark}"
                yield _FileJob(job_id, path, found, content, run, rotated)

    def _job(self, job_id: str) -> _FileJob:
        if self.options.runs != "file":
            job = self._find().get(job_id)
            if job is not None:
                return job
        elif self._finder.matches(job_id) and job_id.isprintable():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                file = self._root / job_id
                found = os.lstat(file)
                parent = os.path.join(os.path.realpath(self._root), PurePosixPath(job_id).parent)
                # The search enters no links, either.
                if stat.S_ISREG(found.st_mode) and os.path.realpath(file.parent) == os.path.normpath(parent):
                    return _FileJob(job_id, job_id, found)
        raise JobNotFoundError(f"there is no log {job_id} below {self._root}", service=self.name, job_id=job_id)

    def _rotated(self, path: str, content: Content) -> Path | None:
        """Return the file that rotation made of a log with this content; None if that is gone."""
        with LogFile(self._root / path, self._access) as log:
            files = log.rotated() if content.size else []
        found = None
        for old in files:
            with old:
                found = old.path if old.has(content.position) else found
        return found

    def _end_of(self, job: _FileJob) -> RunEnd | None:
        """Return how the run ended; None while it runs."""
        found, options = job.found, self.options
        if job.run is not None and job.run.ended is not None:
            return job.run.ended
        if job.rotated is not None and job.content is not None:
            end = self._end_by_marker(job.rotated) if options.runs == "truncate" else None
            text = "the file was truncated or rotated before the end of the run was marked"
            return end or RunEnd(JobState.LOST, "rotation", job.content.written_ns, error=text)
        end = self._marked_end(job)
        if end is None and options.silence_s:
            written_ns = max(found.st_mtime_ns, self._written_elsewhere_ns(job))
            if time.time() - written_ns / 1e9 >= options.silence_s:
                state = None if options.silence_state is None else JobState(options.silence_state)
                seconds = options.silence_s
                return end_of_silence(state, marks_end=options.marks_end, silence_s=seconds, unix_nano=written_ns)
        return end

    def _written_elsewhere_ns(self, job: _FileJob) -> int:
        newest = self._newest_rotated(job)
        return 0 if newest is None else newest.stat().st_mtime_ns

    def _newest_rotated(self, job: _FileJob) -> Path | None:
        """Return the rotated file that a program may still write to, because the log itself is empty."""
        if job.found.st_size or self.options.runs != "file":
            return None
        with LogFile(self._root / job.path, self._access) as log:
            files = log.rotated()
        for old in files:
            old.close()
        return files[-1].path if files else None

    def _marked_end(self, job: _FileJob) -> RunEnd | None:
        """Return the end that a marker or an exit file says; what did not change is not read again."""
        found, exit_file = job.found, self._beside(job.path, self.options.exit_file)
        key: tuple[Any, ...] = (found.st_ino, found.st_size, found.st_mtime_ns)
        if exit_file is not None:
            with contextlib.suppress(OSError):
                marked = os.lstat(exit_file)
                key += marked.st_ino, marked.st_size, marked.st_mtime_ns
        known = self._ends.get(job.path)
        if known is not None and known[0] == key:
            return known[1]
        end = None
        if exit_file is not None:
            end = self._end_by_file(Path(exit_file))
            if end is not None and self.options.runs != "file" and end.unix_nano < found.st_mtime_ns:
                end = None  # of the run before this one
        if end is None and self.options.runs != "append":
            newest = self._newest_rotated(job)
            end = self._end_by_marker(newest or self._root / job.path)
            if newest is not None:
                return end
        self._ends[job.path] = key, end
        return end

    def _end_by_file(self, path: Path) -> RunEnd | None:
        with LogFile(path, self._access) as file:
            return end_of_exit_file(file.head(_EXIT_BYTES), file.modified_unix_nano) if file.exists else None

    def _end_by_marker(self, path: Path) -> RunEnd | None:
        if self._marker is None:
            return None
        try:
            with LogFile(path, self._access) as log:
                start, text = log.tail(_TAIL_BYTES)
                if start:
                    text = log.head(min(start, _HEAD_BYTES)) + b"\n" + text[text.find(b"\n") + 1 :]
                return end_of_markers(self._marker.finditer(text), log.modified_unix_nano)
        except AuthError:
            return None  # reading the lines reports it

    def _beside(self, path: str, name: str | None) -> str | None:
        """Return a file in the directory of a log; its name may contain ``{name}`` and ``{stem}`` of the log."""
        if name is None:
            return None
        directory, _, log = path.rpartition("/")
        dot = log.rfind(".")
        name = name.replace("{name}", log).replace("{stem}", log[:dot] if dot > 0 else log)
        return f"{self._root}/{directory}/{name}" if directory else f"{self._root}/{name}"

    def _name_of(self, path: str) -> tuple[str, datetime | None, Mapping[str, str]]:
        """Return a job's name, when it started, if that is known, and its attributes."""
        known = self._names.get(path)
        if known is None:
            known = self._names[path] = self._read_name(path)
        start_file = self._beside(path, self.options.start_file)
        if start_file is not None:
            with contextlib.suppress(OSError):
                return known[0], moment_of(os.lstat(start_file).st_mtime_ns), known[2]
        return known

    def _read_name(self, path: str) -> tuple[str, datetime | None, Mapping[str, str]]:
        log = PurePosixPath(path)
        stem = log.stem.lstrip(".") if log.suffix else log.name.lstrip(".")
        usual = _NUMBERS.sub("", stem) or stem or path
        text = path
        if (name_file := self._beside(path, self.options.name_file)) is not None:
            try:
                with LogFile(Path(name_file), self._access) as file:
                    text = file.head(_HEAD_BYTES).decode("utf-8", "replace")
            except AuthError:
                text = ""
        match = self._name.search(text) if self._name is not None else None
        if match is None:
            return usual, None, {}
        groups = {key: value for key, value in match.groupdict().items() if value}
        started_at = _time_in(groups.pop("started", ""))
        return groups.pop("name", "") or usual, started_at, groups

    def _parts(self, job_id: str, position: LogPosition) -> Generator[LogPart, None, None]:
        """Yield the lines of a job. It runs off the event loop: a network file system may take long."""
        job = self._job(job_id)
        ended = self._end_of(job) is not None
        seen = self._seen.setdefault(job_id, SeenTimes())
        drop_oldest(self._seen, _MAX_SEEN)
        options: dict[str, Any] = {"identity": self.identity, "log": job_id, "seen": seen}
        if job.run is None or job.content is None:
            yield from follow_log(self._root / job.path, position, access=self._access, ended=ended, **options)
            return
        with LogFile(job.rotated or self._root / job.path, self._access) as log:
            if not log.has(job.content.position):
                return  # truncated just now
            if job.run.ended is not None:
                log.modified_unix_nano = min(log.modified_unix_nano, job.run.ended.unix_nano)
            position = position._replace(offset=max(position.offset, job.run.start))
            yield from log.parts(position, ended=ended, end=job.run.end, **options)

    def _open_line(self, job_id: str) -> OpenLine | None:
        job = self._job(job_id)
        if self._end_of(job) is not None:
            return None
        with LogFile(self._root / job.path, self._access) as log:
            return log.open_line(self.identity, job_id)

    def _problems(self) -> list[Problem]:
        self._jobs_at_s = float("-inf")
        jobs = self._find()
        problems = [
            Problem(f"{self._root / path} is not readable for this user: its logs are not found")
            for path in self._finder.unreadable[:3]
        ]
        closed = [job for job in jobs.values() if not os.access(self._root / job.path, os.R_OK)]
        if closed:
            shown = f"{len(closed)} of {len(jobs)} logs, for example {self._root / closed[0].path}"
            problems.append(Problem(f"{shown}, are not readable for this user: grant it, or run the agent as another"))
        if self._unnamed:
            shown = f"{len(self._unnamed)} of the files that match, for example {self._unnamed[0]!r}"
            problems.append(Problem(f"{shown}, are no jobs: their paths are not printable UTF-8 text"))
        if not jobs and not problems:
            text = f"no file below {self._root} matches glob ({', '.join(self.options.glob)})"
            problems.append(Problem(text, is_fatal=False))
        return problems

    def _position(self, cursor: bytes | None, job_id: str) -> LogPosition:
        if cursor is None:
            return LogPosition()
        try:
            return LogPosition.unpack(unpack_cursor(cursor, service=self.name, job_id=job_id).get("p"))
        except ValueError:
            text = f"{cursor[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=self.name, job_id=job_id) from None

    @contextlib.contextmanager
    def _translated(self, job_id: str | None = None) -> Iterator[None]:
        """Translate errors of the file system, and say which service and job an error is about."""
        try:
            yield
        except TailspanError as error:
            error.service, error.job_id = error.service or self.name, error.job_id or job_id
            if isinstance(error, LogGapError):
                error.resume_cursor = pack_cursor({"p": list(error.position)})
            raise
        except PermissionError as error:
            text = f"{error.filename or self._root} is not readable for this user"
            raise AuthError(text, service=self.name, job_id=job_id) from error
        except OSError as error:
            text = f"services.{self.name}.root: {error.filename or self._root}: {error.strerror}"
            raise ServiceUnavailableError(text, service=self.name, job_id=job_id) from error


@functools.lru_cache(1000)
def _time_in(text: str) -> datetime | None:
    """Return the time that a path has, of this machine's time zone if it has none; None without one."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
