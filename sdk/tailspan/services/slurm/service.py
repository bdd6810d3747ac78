"""`SlurmService`: batch jobs of a Slurm cluster, their steps as tasks, their output files as lines."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shlex
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tailspan._direct import beside_loop
from tailspan._identity import trace_id
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.logs.page import NANOS_PER_MS, LogPage, OpenLine, Stream
from tailspan.models import JobState, JobStatus, ListedJob, TaskRun
from tailspan.services import LATE_WINDOW_S, Problem, SubmitService, TaskService
from tailspan.services._http_service import drop_oldest, pack_cursor, unpack_cursor
from tailspan.services._log_file import FileAccess, LogFile, LogGapError, LogPart, LogPosition, SeenTimes
from tailspan.services.slurm.book import JobBook
from tailspan.services.slurm.jobs import SlurmJob, attributes_of, expand_pattern, steps_of
from tailspan.services.slurm.options import SlurmOptions
from tailspan.services.slurm.programs import SlurmPrograms

__all__ = ["SlurmService"]

_LIST_PAGE = 500
_MAX_SEEN = 2_000
_USUAL_OUTPUT = ("slurm-%j.out", "slurm-%A_%a.out")
_MAX_COMMENT = 1024
_COMPARED_BYTES = 256
# A requeued job that prints the same again reaches the old offset at once only if that is small.
_SHORT_BYTES = 64 << 10
_PURPOSES = {
    "squeue": "the jobs are not found",
    "scontrol": "the logs are not found",
    "sacct": "steps, and jobs that ended some minutes ago, are not found",
    "scancel": "jobs cannot be canceled",
    "sbatch": "jobs cannot be submitted",
}


class SlurmService(TaskService, SubmitService):
    """Jobs of a Slurm cluster. See ``docs/services/slurm.md``."""

    Options = SlurmOptions

    def __init__(self, name: str, options: SlurmOptions) -> None:
        """Run nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
        """
        self.name = name
        self.options = options
        self._programs = SlurmPrograms(name, options)
        self._book = JobBook(self._programs, options)
        self._seen: dict[tuple[str, str], SeenTimes] = {}
        self._truncated: dict[tuple[str, str], int] = {}

    @functools.cached_property
    def identity(self) -> str:  # type: ignore[override]  # read from Slurm's configuration at first use
        """The name of the cluster."""
        cluster = self.options.cluster or self._programs.cluster_in_conf()
        if cluster is None:
            key = f"services.{self.name}.cluster"
            text = f"{key}: is missing, and there is no slurm.conf with a ClusterName; see `scontrol show config`"
            raise ConfigError(text, key=key, service=self.name)
        return f"slurm:{cluster}"

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            return self._status(await self._book.find(job_id))

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs, newest first; see `tailspan.services.JobService`."""
        with self._translated():
            await self._book.refresh()
            if self._book.failure is not None:
                raise ServiceUnavailableError(str(self._book.failure)) from self._book.failure
            rows = [self._row(job) for job in self._book.newest_first()]
        for start in range(0, len(rows), _LIST_PAGE):
            yield rows[start : start + _LIST_PAGE]

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return the steps of the job's last attempt; see `tailspan.services.TaskService`. None without accounting."""
        with self._translated(job_id):
            job = await self._book.find(job_id)
            return list(steps_of(self._book.tasks.get(job.job_id, ())))

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines after a cursor; see `tailspan.services.JobService`.

        The cursor has the paths of the files: Slurm forgets them some minutes after the end of a job.
        """
        with self._translated(job_id):
            reading = _Reading.read(cursor, service=self.name, job_id=job_id)
            job = await self._book.find(job_id)
            since_ns = (since_ms or 0) * NANOS_PER_MS
            with contextlib.closing(self._parts(job, reading)) as parts:
                while (part := await beside_loop(next, parts, None)) is not None:
                    if (page := part.since(since_ns)) is not None:
                        yield page

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the line of the output whose newline has not come; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            job = await self._book.find(job_id)
            paths = self._paths(job)
            if job.state.is_terminal or not paths:
                return None
            return await beside_loop(self._open_line, job, paths[0])

    async def cancel(self, job_id: str) -> JobStatus:
        """Cancel the job; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            job = await self._book.find(job_id)
            if not job.state.is_terminal:
                refusal: TailspanError | None = None
                try:
                    # An element of an array may still have the id of the array's other elements.
                    await self._programs.run("scancel", job.shown_id)
                except (JobNotFoundError, RequestRejectedError) as error:
                    refusal = error
                await self._book.refresh(now=True)
                job = await self._book.find(job.job_id)
                if refusal is not None and not job.state.is_terminal:
                    raise refusal  # it has not just ended
            return self._status(job)

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Submit a command as a batch job; see `tailspan.job_submit`.

        Attributes become the comment of the job. Slurm's time limits are whole minutes: a timeout is rounded up.

        Raises:
            ConfigError: The command is empty, or attributes cannot be a comment.
            RequestRejectedError: Slurm refuses the job.
        """
        if not command:
            raise ConfigError("a job needs a command", service=self.name)
        job_name = name or os.path.basename(command[0]) or command[0]
        arguments = ["--parsable", "--job-name", job_name]
        if attributes:
            comment = ",".join(f"{key}={value}" for key, value in attributes.items())
            if attributes_of(comment) != dict(attributes) or len(comment) > _MAX_COMMENT:
                raise ConfigError("attributes of a Slurm job are words without commas", service=self.name)
            arguments += ["--comment", comment]
        if timeout_s is not None:
            arguments += ["--time", str(math.ceil(timeout_s / 60))]
        if cwd is not None:
            arguments += ["--chdir", cwd]
        with self._translated():
            try:
                script = os.fsencode(f"#!/bin/sh\nexec {shlex.join(command)}\n")
                if b"\0" in script:
                    raise ValueError("embedded null byte")
                said = await self._programs.run("sbatch", *arguments, text=script, env=dict(env or {}))
            except ValueError as error:
                # A script would end at a NUL, and no program can be started with it.
                raise ConfigError(f"the job cannot be passed to sbatch: {error}", service=self.name) from None
            found = re.match(r"\s*(\d+)", said)
            if found is None:
                raise ServiceUnavailableError(f"sbatch printed no job id: {said[:200]!r}", service=self.name)
        with contextlib.suppress(ServiceError):
            await self._book.refresh(now=True)
        return await self.status_after_submit(found[1], job_name=job_name, attributes=dict(attributes or {}))

    async def find_problems(self) -> Sequence[Problem]:
        """Return programs, rights and accounting that are missing; see `tailspan.services.JobService`."""
        found = [
            Problem(f"{program} is not installed: {purpose}", is_fatal=False)
            for program, purpose in _PURPOSES.items()
            if self._programs.find(program) is None
        ]
        with self._translated():
            await self._book.refresh(now=True)
            problem = self._book.accounting_problem
            if problem:
                text = f"without accounting there are no steps, and a job whose end is missed is lost ({problem})"
                found.append(Problem(text, is_fatal=False))
            running = [job for job in self._book.jobs.values() if job.state is JobState.RUNNING]
            unreadable = await beside_loop(self._unreadable, running)
        if unreadable:
            shown = f"the logs of {len(unreadable)} of {len(running)} running jobs, for example {unreadable[0]}"
            found.append(Problem(f"{shown}: mount their file system here, and let this user read them"))
        return found

    def _unreadable(self, jobs: Sequence[SlurmJob]) -> list[str]:
        found = []
        for job in jobs:
            for path in self._paths(job)[:1]:
                try:
                    with LogFile(path, self._access(job)) as log:
                        problem = "" if log.exists else f"{path} is missing, or is not the job's own"
                except (AuthError, OSError) as error:
                    problem = str(error)
                if problem:
                    found.append(problem)
        return found

    def _status(self, job: SlurmJob) -> JobStatus:
        details = {
            "slurm.job.array_id": "" if job.array is None else job.shown_id,
            "slurm.job.reason": "" if job.state in (JobState.RUNNING, JobState.SUCCEEDED) else job.reason,
            "slurm.partition": job.partition,
            "slurm.user": job.user,
            "slurm.account": job.account,
            "process.working_directory": job.directory,
            "file.path": str(next(iter(self._paths(job)), "")),
        }
        attributes = attributes_of(job.comment)
        if job.array is not None:
            attributes = {**attributes, "slurm.array.job_id": job.array[0], "slurm.array.task_id": job.array[1]}
        tasks = list(steps_of(self._book.tasks.get(job.job_id, ())))
        ended_s = None if job.ended_s is None else max(job.ended_s, job.started_s or 0)
        return self.make_status(
            job.job_id,
            job.state,
            job_name=job.name,
            submitted_at=_utc(job.submitted_s),
            started_at=_utc(job.started_s),
            finished_at=_utc(ended_s),
            job_status=job.word,
            exit_code=job.shown_code,
            error=job.error,
            attributes=attributes,
            details={key: value for key, value in details.items() if value},
            instance_id=job.node or None,
            attempt=job.attempt,
            trace_id=trace_id(self.identity, job.job_id, job.attempt),
            stale=self._book.is_stale,
            total_tasks=len(tasks),
            finished_tasks=sum(task.ended for task in tasks),
        )

    def _row(self, job: SlurmJob) -> ListedJob:
        since_s = job.ended_s or job.started_s or job.submitted_s
        return ListedJob(
            job_id=job.job_id,
            job_name=job.name,
            state=job.state,
            created_at=_utc(job.submitted_s),
            state_since=_utc(since_s),
            instance_id=job.node or None,
            service=self.name,
        )

    def _paths(self, job: SlurmJob) -> list[Path]:
        """Return the files of the job's output and errors, as far as they are known."""
        details = self._book.details.get(job.job_id)
        if details is not None:
            return [Path(path) for path in (details.stdout, details.stderr) if path]
        if not job.directory.startswith("/"):
            return []
        # The controller has forgotten the job: what sbatch does without --output.
        return [Path(expand_pattern(_USUAL_OUTPUT[job.array is not None], job))]

    def _access(self, job: SlurmJob) -> FileAccess:
        # Users choose the paths: a file of another user, whom the agent may read, must not be relayed.
        return FileAccess(owner=job.uid if job.uid >= 0 else None)

    def _parts(self, job: SlurmJob, reading: _Reading) -> Generator[LogPart, None, None]:
        """Yield the lines of a job's files. It runs off the event loop: a network file system may take long."""
        paths = (
            self._paths(job)
            if job.job_id in self._book.details or not reading.files
            else [one.path for one in reading.files]
        )
        reading = reading.of(paths)
        for number, path in enumerate(paths):
            stream = Stream.NONE if len(paths) == 1 else (Stream.STDOUT, Stream.STDERR)[number]
            seen = self._seen.setdefault((job.job_id, str(path)), SeenTimes())
            drop_oldest(self._seen, _MAX_SEEN)
            try:
                with LogFile(path, self._access(job)) as log:
                    file = self._start(log, reading.files[number], job)
                    if file is None:
                        continue
                    floor_ns = max(one.position.next_unix_nano for one in reading.files)
                    parts = log.parts(
                        file.position._replace(next_unix_nano=floor_ns),
                        identity=self.identity,
                        log=f"{job.job_id}\0{number}",
                        ended=job.state.is_terminal,
                        stream=stream,
                        seen=seen,
                    )
                    for part in parts:
                        reading = reading.moved(number, part.position, file.attempt)
                        part.page.cursor = reading.pack()
                        yield part
            except AuthError:
                continue  # its state is relayed all the same; the check reports it
            except LogGapError as gap:
                gap.resume_cursor = reading.moved(number, gap.position, job.attempt).pack()
                raise

    def _start(self, log: LogFile, known: _ReadFile, job: SlurmJob) -> _ReadFile | None:
        """Return where reading a file goes on, with the attempt of its next lines; None while that is not known.

        A requeued job truncates its file, or appends to it after ``--open-mode=append``; Slurm does not say which.
        """
        position, attempt = known.position, max(known.attempt, job.attempt)
        key = job.job_id, str(known.path)
        if not log.has(position):
            if known.attempt >= job.attempt:
                if (
                    not self._book.is_stale
                    and self._truncated.setdefault(key, self._book.answers) == self._book.answers
                ):
                    # The next attempt may have started since Slurm was asked: its lines must not count for this one.
                    self._book.expire()
                    return None
                attempt += 1
            self._truncated.pop(key, None)
            return _ReadFile(known.path, attempt, position.restart())
        if known.attempt in (0, attempt) or not position.offset:
            return _ReadFile(known.path, attempt, position)
        if log.size == position.offset and not job.state.is_terminal:
            return None
        size = min(_COMPARED_BYTES, position.offset, log.size - position.offset)
        is_appended = size > 0 and log.tail(size, position.offset + size)[1] == log.head(size)
        if not is_appended and position.offset <= _SHORT_BYTES:
            position = position.restart()
        return _ReadFile(known.path, attempt, position)

    def _open_line(self, job: SlurmJob, path: Path) -> OpenLine | None:
        try:
            with LogFile(path, self._access(job)) as log:
                return log.open_line(self.identity, job.job_id)
        except AuthError:
            return None

    @contextlib.contextmanager
    def _translated(self, job_id: str | None = None) -> Iterator[None]:
        """Translate errors of the file system, and say which service and job an error is about."""
        try:
            yield
        except TailspanError as error:
            error.service, error.job_id = error.service or self.name, error.job_id or job_id
            raise
        except OSError as error:
            text = f"{error.filename}: {error.strerror}"
            raise ServiceUnavailableError(text, service=self.name, job_id=job_id) from error


class _ReadFile(NamedTuple):
    """A file of a job, and how far it was read.

    Attributes:
        path: The file.
        attempt: The attempt of the job that the last line was read of.
        position: Where reading goes on.
    """

    path: Path
    attempt: int
    position: LogPosition


class _Reading(NamedTuple):
    """How far the files of a job were read: the cursor.

    Attributes:
        files: The output, and the errors if they have a file of their own.
    """

    files: tuple[_ReadFile, ...] = ()

    @classmethod
    def read(cls, cursor: bytes | None, *, service: str, job_id: str) -> _Reading:
        """Return the reading of a cursor; its start for None.

        Raises:
            ConfigError: It is not a cursor of this service.
        """
        if cursor is None:
            return cls()
        parts = unpack_cursor(cursor, service=service, job_id=job_id)
        try:
            files = parts["f"]
            found = [_ReadFile(Path(path), int(attempt), LogPosition.unpack(place)) for path, attempt, place in files]
        except (KeyError, TypeError, ValueError):
            text = f"{cursor[:40]!r} is not a cursor of this service"
            raise ConfigError(text, service=service, job_id=job_id) from None
        return cls(tuple(found))

    def of(self, paths: Sequence[Path]) -> _Reading:
        """Return the reading of these files; a file with another name than before is read from its start."""
        files = []
        for number, path in enumerate(paths):
            known = self.files[number] if number < len(self.files) else _ReadFile(path, 0, LogPosition())
            files.append(known if known.path == path else _ReadFile(path, 0, known.position.restart()))
        return _Reading(tuple(files))

    def moved(self, number: int, position: LogPosition, attempt: int) -> _Reading:
        """Return the reading after lines of a file."""
        files = list(self.files)
        files[number] = _ReadFile(files[number].path, attempt, position)
        return _Reading(tuple(files))

    def pack(self) -> bytes:
        """Return the cursor."""
        return pack_cursor({"f": [[str(one.path), one.attempt, list(one.position)] for one in self.files]})


def _utc(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
