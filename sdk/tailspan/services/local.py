"""Jobs on this machine: any command, run under a supervisor of its own, its output in plain files.

Needs no set-up and no daemon. See `tailspan.local` for the parts.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tailspan._clock import settled_clock
from tailspan._direct import beside_loop, checkpoint
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.local.reader import LogReader
from tailspan.local.run_settings import CANCEL_GRACE_S, otlp_variables
from tailspan.local.status import quick_totals, row_of, status_of, totals_of
from tailspan.local.store import JobStore, StoredJob, submitted_at_of
from tailspan.logs.page import NANOS_PER_MS, LogPage, OpenLine
from tailspan.models import JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, ChangeFeedService, SubmitService

if TYPE_CHECKING:
    from tailspan.config import Settings
    from tailspan.local.inotify import InotifyChanges
    from tailspan.local.launch import Launched, Request
    from tailspan.local.run_settings import RunSettings

__all__ = ["LocalService"]

KEEP_FINISHED_S = 30 * 86400.0
_LIST_PAGE = 200
_MOST_IDENTITIES = 4096
_PRUNE_EVERY_S = 3600.0
_LEAST_KEPT_S = 3600.0
_MARK_BYTES = 64
_CANCEL_WAIT_S = 1.0


class LocalService(SubmitService, ChangeFeedService):
    """Runs commands as jobs on this machine, and reads them.

    It holds nothing open between two calls, so it may be used in any thread and after a fork. Files are read on the
    event loop: that takes microseconds, and a page a millisecond.
    """

    poll_min_s = 0.2
    poll_max_s = 2.0
    polls_are_free = True
    has_offsets = True

    def __init__(
        self,
        name: str = "local",
        *,
        state_dir: Path,
        group: str | None = None,
        keep_finished_s: float = KEEP_FINISHED_S,
        otlp: Mapping[str, str] | None = None,
        cancel_grace_s: float = CANCEL_GRACE_S,
        encoding: str | None = None,
    ) -> None:
        """Name the place; nothing is touched until it is used.

        Args:
            name: The configured name.
            state_dir: Where the jobs' files are.
            group: Group that may read them; None: only this user.
            keep_finished_s: How long a job is kept after its end, in seconds.
            otlp: ``OTEL_EXPORTER_OTLP_*`` variables for jobs whose environment names no endpoint.
            cancel_grace_s: Between SIGTERM and SIGKILL, in seconds.
            encoding: The codec of the jobs' output, which is captured as UTF-8; None: captured as it is.

        Raises:
            ConfigError: No such group, or this is Windows.
        """
        if sys.platform == "win32":
            raise ConfigError(
                "local jobs need Linux or macOS; on Windows use `tailspan` with a remote service",
                key=f"services.{name}",
            )
        self.name = name
        self._store = JobStore(state_dir, group=group)
        self._keep_finished_s = keep_finished_s
        self._otlp = dict(otlp or {})
        self._cancel_grace_s = cancel_grace_s
        self._encoding = encoding
        self._identities: dict[str, str] = {}
        self._final_rows: dict[str, ListedJob] = {}
        self._running_rows: dict[str, tuple[bytes, ListedJob]] = {}

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: Settings) -> Self:
        """Make the service of a configured section; see `tailspan.services.open_service`.

        Raises:
            ConfigError: An option is unknown or does not fit; the message names its key.
        """
        from tailspan.config import Duration, Options, UserPath, platform_state_dir, validate_options
        from tailspan.config.signals import SIGNALS

        class LocalOptions(Options):
            state_dir: UserPath | None = None
            group: str | None = None
            keep_finished: Duration = KEEP_FINISHED_S
            encoding: str | None = None

        given = validate_options(LocalOptions, f"services.{name}", options)
        if not given.keep_finished >= _LEAST_KEPT_S:
            # A job that is deleted at its end has not been relayed.
            raise ConfigError(
                f"services.{name}.keep_finished: {given.keep_finished:g} s is too short: use at least 1h",
                key=f"services.{name}.keep_finished",
            )
        if given.encoding is not None:
            from tailspan.local.launch import check_encoding

            check_encoding(given.encoding)
        # pydantic's `model_dump` would first make a validator of this table alone: a fiftieth of the agent's start.
        otlp: dict[str, object] = {
            **dict(settings.otlp),
            **{signal: dict(getattr(settings.otlp, signal)) for signal in SIGNALS},
        }
        return cls(
            name,
            state_dir=given.state_dir or platform_state_dir(),
            group=given.group,
            keep_finished_s=given.keep_finished,
            otlp=otlp_variables(otlp, name),
            encoding=given.encoding,
        )

    @classmethod
    def from_run_settings(cls, name: str, found: RunSettings) -> Self:
        """Make the service of the tables that `tailspan run` reads, without the configuration's classes.

        Raises:
            ConfigError: The group is not known, or ``keep_finished`` is not a duration.
        """
        keep_finished_s = KEEP_FINISHED_S
        if found.keep_finished is not None:
            from tailspan.config import parse_duration_s

            keep_finished_s = max(parse_duration_s(found.keep_finished), _LEAST_KEPT_S)
        return cls(
            name,
            state_dir=Path(found.state_dir),
            group=found.group,
            keep_finished_s=keep_finished_s,
            otlp=found.otlp,
            encoding=found.encoding,
        )

    @functools.cached_property
    def identity(self) -> str:  # type: ignore[override]  # read from disk at first use
        """The UUID of the state directory, made with it."""
        with self._translated():
            return self._store.identity

    @property
    def state_dir(self) -> Path:
        """Where the jobs' files are."""
        return self._store.state_dir

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status; see `tailspan.services.JobService`."""
        return self.status(job_id)

    def status(self, job_id: str) -> JobStatus:
        """Return the job's status, for callers without an event loop.

        Raises:
            JobNotFoundError: There is no such job.
        """
        with self._translated(job_id):
            job = self._store.load(job_id)
            self._identity_in(job)
            return status_of(job, self)

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines after a cursor; see `tailspan.services.JobService`.

        The cursor is the byte of `log` where to go on. Lines never become visible late.
        """
        with self._translated(job_id):
            identity = self._identities.get(job_id) or self._identity_in(self._store.load(job_id))
            with self._opened_log(job_id) as reader:
                pages = reader.pages(identity, cursor, since_ms)
                # Any program can write these files, and the search for the next page may be long.
                off_loop = not reader.is_plain
                page = await beside_loop(next, pages, None) if off_loop else next(pages, None)
                while page:
                    yield page
                    page = await beside_loop(next, pages, None) if off_loop else next(pages, None)
                    if page:
                        await checkpoint()

    def _opened_log(self, job_id: str) -> LogReader:
        """Open a job's log; text without an entry counts only if the job has ended.

        Raises:
            JobNotFoundError: There is no such job.
        """
        with self._store.opened(job_id) as fd:
            place, ended = f"{self._store.jobs}/{job_id}", job_id in self._final_rows
            reader = LogReader(place, job_id, ended=ended, dir_fd=fd)
            try:
                # Most polls of a running job find no such text, and need not ask for its state.
                if ended or not reader.has_more_text or not self._store.glance_at(job_id, fd).logs_complete:
                    return reader
            except BaseException:
                reader.close()
                raise
            reader.close()
            # Opened again: its supervisor may have written the last entries since.
            return LogReader(place, job_id, ended=True, dir_fd=fd)

    async def open_line(self, job_id: str) -> OpenLine | None:
        """Return the line whose newline has not come; see `tailspan.services.JobService`."""
        with self._translated(job_id), self._store.opened(job_id) as fd:
            place = f"{self._store.jobs}/{job_id}"
            with LogReader(place, job_id, ended=False, dir_fd=fd) as reader:
                if not reader.has_more_text or self._store.glance_at(job_id, fd).logs_complete:
                    return None
                identity = self._identities.get(job_id) or self._identity_in(self._store.load(job_id))
                return reader.open_line(identity)

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the first and the last line; see `tailspan.services.JobService`."""
        with self._translated(job_id):
            job = self._store.glance(job_id)
            totals = quick_totals(job)
            if totals is None:
                totals = await beside_loop(totals_of, job)
        return (totals.first_unix_nano // NANOS_PER_MS, totals.last_unix_nano // NANOS_PER_MS) if totals.lines else None

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the jobs, newest first; see `tailspan.services.JobService`."""
        with self._translated():
            # A directory may have a million entries.
            ids = await beside_loop(self._store.job_ids)
        # An agent lists every few seconds: what has ended for good is not read again.
        final, running = self._final_rows, self._running_rows
        if len(final) + len(running) > len(ids):  # some were pruned
            # The keys are the strings that the rows have: a list makes others.
            self._final_rows = {row.job_id: row for job_id in ids if (row := final.get(job_id)) is not None}
            self._running_rows = {
                known[1].job_id: known for job_id in ids if (known := running.get(job_id)) is not None
            }
        for start in range(0, len(ids), _LIST_PAGE):
            with self._translated(), self._store.opened_jobs() as jobs_fd:
                rows = [self._row(job_id, jobs_fd) for job_id in ids[start : start + _LIST_PAGE]]
            yield [row for row in rows if row]
            await checkpoint()

    async def rows(self, job_ids: Collection[str]) -> Sequence[ListedJob]:
        """Return the rows of some jobs; see `tailspan.services.ChangeFeedService`."""
        with self._translated():
            return [row for job_id in sorted(job_ids, reverse=True) if (row := self._row(job_id)) is not None]

    def open_changes(self) -> InotifyChanges | None:
        """Open the change feed of this machine's jobs; see `tailspan.services.ChangeFeedService`."""
        from tailspan.local.inotify import open_local_changes  # ctypes: only the agent needs it

        return open_local_changes(self._store.jobs)

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
        """Start a command as a job in the background; see `tailspan.job_submit`.

        Standard input is this process's, unless that is a terminal. A command that cannot be executed is a job that
        has FAILED with exit code 127 or 126, not an error, so that dashboards and alerts show it.

        Args:
            command: The command and its arguments; no shell in between.
            name: The job's name; None: its program or script.
            attributes: What to attach to the job's telemetry.
            timeout_s: End the command after this many seconds; None: never.
            cwd: Its directory; None: the present one.
            env: Variables on top of the present environment.

        Raises:
            ConfigError: The command or an option is not usable.
            ServiceUnavailableError: The supervisor could not be started.
        """
        import anyio.to_thread

        from tailspan.local.launch import Request
        from tailspan.local.stdin import inherited_stdin

        request = Request(
            command=command,
            name=name,
            attributes=attributes,
            timeout_s=timeout_s,
            cwd=cwd,
            env=env,
            stdin_fd=inherited_stdin(),
            encoding=self._encoding,
        )
        launched = await anyio.to_thread.run_sync(self.start, request)
        launched.close()
        return self.status(launched.job_id)

    async def retry(self, job_id: str) -> JobStatus:
        """Start a job again in the background, as its next attempt: same command, directory, name and attributes.

        Its environment is the present one: that of a job is not recorded.

        Args:
            job_id: The job; one that runs is left alone, and runs twice then.

        Raises:
            JobNotFoundError: There is no such job.
            ConfigError: Its command or an attribute has a secret, which is not recorded; or its directory is gone.
            ServiceUnavailableError: The supervisor could not be started.
        """
        import anyio.to_thread

        from tailspan._secrets import MASK
        from tailspan.local.launch import Request
        from tailspan.local.stdin import inherited_stdin

        with self._translated(job_id):
            spec = self._store.load(job_id).spec
            before = self.status(job_id)
        command = [str(argument) for argument in spec.get("command", ())]
        if not command:
            raise ConfigError(f"the command of job {job_id} is not recorded: its job.json is damaged", job_id=job_id)
        if any(MASK in text for text in (*command, *before.attributes.values())):
            raise ConfigError(
                f"the command or an attribute of job {job_id} has a secret, which is not recorded:"
                " run it again by hand",
                job_id=job_id,
            )
        timeout_s = spec.get("timeout_s")
        request = Request(
            command=command,
            name=before.job_name,
            attributes=before.attributes,
            timeout_s=timeout_s if isinstance(timeout_s, int | float) else None,
            cwd=spec.get("cwd") or None,
            stdin_fd=inherited_stdin(),
            encoding=self._encoding,
            attempt=before.attempt + 1,
            retry_of=job_id,
        )
        launched = await anyio.to_thread.run_sync(self.start, request)
        launched.close()
        return self.status(launched.job_id)

    def start(self, request: Request) -> Launched:
        """Start a job and stay attached to it, for callers without an event loop.

        Returns:
            The job, and the pipe that reports its end; the caller closes it.

        Raises:
            ServiceUnavailableError: The supervisor could not be started.
        """
        from tailspan.local.launch import launch

        with self._translated():
            launched = launch(self._store.place, request, otlp=self._otlp, grace_s=self._cancel_grace_s)
        self.prune_sometimes()
        return launched

    async def cancel(self, job_id: str) -> JobStatus:
        """End the job: SIGTERM to all its processes, SIGKILL after a grace time; an ended job stays as it is.

        Returns:
            Its status: ended already, where it ends within a second.
        """
        import signal

        import anyio

        from tailspan.local.signalling import signal_supervisor

        with self._translated(job_id):
            job = self._store.load(job_id)
            if not job.state.is_terminal:
                self._store.mark_canceled(job_id)
                recorded, supervised = self._store.state(job_id)
                pid = recorded.get("supervisor_pid")
                # Without a process id yet, the supervisor finds the mark.
                if supervised and pid and not signal_supervisor(pid, job_id, signal.SIGTERM) and self._runs(job_id):
                    raise RequestRejectedError(
                        f"job {job_id} runs on {job.spec.get('host')}, in another machine or container: cancel it there"
                    )
                with anyio.move_on_after(_CANCEL_WAIT_S):
                    while self._runs(job_id):  # noqa: ASYNC110 - another process ends it
                        await anyio.sleep(0.01)
        return self.status(job_id)

    def prune(self, older_than_s: float) -> list[str]:
        """Delete jobs that ended longer ago, with their logs.

        Args:
            older_than_s: Age of a job's end in seconds.

        Returns:
            The ids of the deleted jobs, oldest first.
        """
        with self._translated():
            return list(self._store.prune(older_than_s, time.time()))

    def _identity_in(self, job: StoredJob) -> str:
        """Return the identity of the store that the job was submitted to, and remember it: it makes uids."""
        if len(self._identities) >= _MOST_IDENTITIES:
            self._identities.clear()
        self._identities[job.job_id] = identity = job.spec.get("identity") or self.identity
        return identity

    def _runs(self, job_id: str) -> bool:
        return not self._store.load(job_id).state.is_terminal

    def prune_sometimes(self) -> None:
        """Delete what need not be kept, at most once an hour; a job does not fail because that fails.

        The mark has the time of the last call, and since when the clock has gone right; see `settled_clock`.
        """
        with contextlib.suppress(OSError, TailspanError):
            mark, now_s = Path(self._store.place.prune_mark), time.time()
            last_s = since_s = None
            with contextlib.suppress(FileNotFoundError):
                last_s = mark.stat().st_mtime
                if 0 <= now_s - last_s < _PRUNE_EVERY_S:
                    return
                with contextlib.suppress(ValueError):
                    since_s = float(mark.read_bytes()[:_MARK_BYTES])
            may_prune, since_s = settled_clock(last_s, since_s, now_s, usual_s=self._keep_finished_s)
            mark.touch(mode=0o600)
            # Written even if nothing changes: its time is the time of this call.
            mark.write_text("\n" if since_s is None else f"{since_s:.0f}\n")
            if may_prune:
                self.prune(self._keep_finished_s)

    def _row(self, job_id: str, jobs_fd: int | None = None) -> ListedJob | None:
        """Return a job's row; None when it was pruned meanwhile."""
        # Another thread may list, too.
        if (final := self._final_rows.get(job_id)) is not None:
            return final
        known, mark = self._running_rows.get(job_id), None
        try:
            with self._store.opened(job_id, jobs_fd) as fd:
                job = self._store.glance_at(job_id, fd) if known is None else None
                if job is None or not job.logs_complete:
                    # Taken before the row is: what changes in between is seen the next time.
                    mark = self._store.running_mark_at(fd)
                    if known is not None and known[0] == mark:
                        return known[1]
                    job = self._store.glance_at(job_id, fd)
        except JobNotFoundError:
            return None
        except PermissionError:
            # Of another user, say of root by sudo: it must not hide the jobs of this one. Asked for, it says so itself.
            return ListedJob(job_id=job_id, job_name="unknown", created_at=submitted_at_of(job_id), service=self.name)
        row = row_of(job, self)
        self._running_rows.pop(job_id, None)
        if job.logs_complete:
            self._final_rows[job_id] = row
        elif mark is not None:
            self._running_rows[job_id] = mark, row
        return row

    def _translated(self, job_id: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context that translates errors of the file system, and names the service and the job in errors."""
        return _Translated(self, job_id)


class _Translated(contextlib.AbstractContextManager[None]):
    """See `LocalService._translated`; a class, because each call for each job has one."""

    __slots__ = ("_job_id", "_service")

    def __init__(self, service: LocalService, job_id: str | None) -> None:
        self._service = service
        self._job_id = job_id

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        name = self._service.name
        if isinstance(error, TailspanError):
            error.service, error.job_id = error.service or name, error.job_id or self._job_id
        elif isinstance(error, PermissionError):
            raise AuthError(
                f"{error.filename or self._service.state_dir} is not open to this user; set services.{name}.group, or"
                " run as the user who started the job",
                service=name,
                job_id=self._job_id,
            ) from error
        elif isinstance(error, OSError):
            raise ServiceUnavailableError(
                f"the jobs in {self._service.state_dir} cannot be used now: {error}", service=name, job_id=self._job_id
            ) from error
