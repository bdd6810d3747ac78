"""The directory of local jobs: making, finding, reading and pruning them.

``<state_dir>/identity`` names the store; ``<state_dir>/jobs/<job_id>/`` has, for each job, ``job.json`` (what was
submitted, never changed), ``state.json`` (what became of it, replaced as a whole), ``log``, ``log.idx`` and ``lock``.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tailspan._times import time_of
from tailspan.errors import ConfigError, JobNotFoundError, ProtocolError, ServiceUnavailableError
from tailspan.local.index_file import open_directory, open_file, open_sized, read_at
from tailspan.local.state_dir import WRITE_LOCKED, StateDir, is_write_locked, new_job_id
from tailspan.models import JobState

__all__ = ["JobStore", "StoredJob", "new_job_id", "submitted_at_of"]

_JOB_ID = re.compile(r"[0-9]{8}-[0-9]{9}-[a-z0-9]{6}", re.ASCII)
_ABANDONED_S = 3600.0
_FUTURE_S = 86400.0
# A command has at most 2 MiB with 10 bytes for each argument (Linux), and JSON escapes take six bytes.
_MAX_JSON_BYTES = 16 << 20
_MAX_STATE_BYTES = 1 << 20
_MAX_JSON_ITEMS = 250_000
_MARK = struct.Struct("=6Q")
_UINT64_MAX = (1 << 64) - 1
_raw_decode = json.JSONDecoder().raw_decode
# What has another type than it was written with is as good as missing.
_TYPES = {
    **dict.fromkeys(("state", "name", "started_at", "finished_at", "error", "end"), str),
    **dict.fromkeys(("cwd", "host", "user", "submitted_at", "identity", "trace_id", "parent", "retry_of"), str),
    **dict.fromkeys(("exit_code", "supervisor_pid", "lines", "attempt"), int),
    "command": list,
    "attributes": dict,
}


class StoredJob(NamedTuple):
    """What the files say about a job.

    Attributes:
        job_id: The job.
        place: Where its files are.
        spec: ``job.json``; empty when it is damaged.
        recorded: ``state.json``; empty until its supervisor has started the command.
        supervised: Whether its supervisor lives.
    """

    job_id: str
    place: str
    spec: Mapping[str, Any]
    recorded: Mapping[str, Any]
    supervised: bool

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return Path(self.place)

    @property
    def state(self) -> JobState:
        """The job's state; LOST when its supervisor is gone without having written an end."""
        written = self.recorded.get("state", "PENDING")
        state = JobState(written) if written in JobState.__members__ else JobState.UNKNOWN
        return state if self.supervised or state.is_terminal else JobState.LOST

    @property
    def name(self) -> str:
        """The job's name."""
        return str(self.recorded.get("name") or self.spec.get("name") or "unknown")

    @property
    def logs_complete(self) -> bool:
        """Whether no further line will come."""
        return not self.supervised

    @property
    def last_sign_of_life(self) -> datetime | None:
        """When the supervisor last said that it lives."""
        try:
            return datetime.fromtimestamp(os.lstat(f"{self.place}/lock").st_mtime, UTC)
        except (FileNotFoundError, ValueError, OverflowError):
            return None


def submitted_at_of(job_id: str) -> datetime | None:
    """Return when a job with this id was submitted, to the millisecond; None when the id has no valid date."""
    day, moment = job_id[:8], job_id[9:18]
    try:
        return datetime(
            int(day[:4]), int(day[4:6]), int(day[6:]),
            int(moment[:2]), int(moment[2:4]), int(moment[4:6]), int(moment[6:]) * 1000, UTC,
        )  # fmt: skip
    except ValueError:
        return None


class JobStore:
    """All jobs below one directory. Holds nothing open.

    Attributes:
        place: Where new jobs are made.
        state_dir: Its directory.
        jobs: The directory that has a directory for each job.
    """

    def __init__(self, state_dir: Path, *, group: str | None = None) -> None:
        """Name a store; nothing is touched.

        Args:
            state_dir: Its directory; made when the first job is.
            group: Name of a group that may read the jobs.

        Raises:
            ConfigError: There is no such group.
        """
        self.place = StateDir(os.fspath(state_dir), gid=None if group is None else _gid(group))
        self.state_dir = Path(self.place.path)
        self.jobs = self.state_dir / "jobs"
        self._jobs_place = str(self.jobs)
        self._used = False

    @functools.cached_property
    def identity(self) -> str:
        """The UUID of this store, made once.

        Raises:
            ProtocolError: The file has something else.
        """
        import uuid

        text = self.place.identity()
        try:
            return str(uuid.UUID(text))
        except ValueError:
            raise ProtocolError(
                f"{self.state_dir / 'identity'} does not have a UUID; restore it, or remove it to give this store a "
                "new identity"
            ) from None

    def directory(self, job_id: str) -> Path:
        """Return where a job's files are, whether or not they exist.

        Raises:
            JobNotFoundError: No local job can have this id. Ids come from the network too: none may leave the store.
        """
        return Path(self._place(job_id))

    def _place(self, job_id: str) -> str:
        # Text rather than a Path: an agent polls thousands of jobs.
        if not _JOB_ID.fullmatch(job_id):
            raise JobNotFoundError(f"there is no local job {job_id[:80]!r}", job_id=job_id)
        return f"{self._jobs_place}/{job_id}"

    def opened(self, job_id: str, jobs_fd: int | None = None) -> AbstractContextManager[int]:
        """Return a context that holds a job's directory open; see `open_job`."""
        return _OpenJob(self, job_id, jobs_fd)

    def open_job(self, job_id: str, jobs_fd: int | None = None) -> int:
        """Return a descriptor of a job's directory.

        Args:
            job_id: The job.
            jobs_fd: The directory of all jobs, from `opened_jobs`, if that is open.

        Raises:
            JobNotFoundError: There is no such job; or it is a link, or the directory of all jobs is one: another user
                may have made it, to lead a reader elsewhere.
        """
        place = self._place(job_id)
        try:
            return open_directory(place, jobs_fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            self._check_there()
            if os.path.islink(self.jobs) or os.path.islink(place):
                link = self.jobs if os.path.islink(self.jobs) else place
                raise JobNotFoundError(f"{link} is a link, not a job of this store", job_id=job_id) from None
            raise JobNotFoundError(f"there is no local job {job_id} in {self.state_dir}", job_id=job_id) from None

    @contextmanager
    def opened_jobs(self) -> Iterator[int]:
        """Open the directory of all jobs, for listing and for changes of its names.

        Raises:
            ServiceUnavailableError: It is a link.
            FileNotFoundError: It does not exist.
        """
        try:
            fd = os.open(self.jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if os.path.islink(self.jobs):
                raise ServiceUnavailableError(
                    f"{self.jobs} is a link, which may lead out of the store: name its target's directory as state_dir"
                ) from error
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def job_ids(self) -> list[str]:
        """Return the ids of all jobs, newest first.

        Raises:
            ServiceUnavailableError: The store was moved away or unmounted.
        """
        try:
            with self.opened_jobs() as jobs_fd:
                names = filter(_JOB_ID.fullmatch, os.listdir(jobs_fd))
        except FileNotFoundError:
            self._check_there()
            return []
        self._used = True
        return sorted(names, reverse=True)

    def load(self, job_id: str) -> StoredJob:
        """Return what the files say about a job.

        Raises:
            JobNotFoundError: There is no such job.
            ServiceUnavailableError: The store was moved away or unmounted.
        """
        with self.opened(job_id) as fd:
            self._used = True
            spec = _read_json("job.json", fd) or {}
            recorded, supervised = _read_state(fd)
        return StoredJob(job_id, f"{self._jobs_place}/{job_id}", spec, recorded, supervised)

    def glance(self, job_id: str) -> StoredJob:
        """Return what the files say about a job, without its ``job.json`` where ``state.json`` will do.

        Raises:
            JobNotFoundError: There is no such job.
        """
        with self.opened(job_id) as fd:
            return self.glance_at(job_id, fd)

    def glance_at(self, job_id: str, fd: int) -> StoredJob:
        """Return what `glance` does, from the job's open directory."""
        recorded, supervised = _read_state(fd)
        spec = {} if "name" in recorded else _read_json("job.json", fd) or {}
        self._used = True
        return StoredJob(job_id, f"{self._jobs_place}/{job_id}", spec, recorded, supervised)

    def state(self, job_id: str) -> tuple[Mapping[str, Any], bool]:
        """Return a job's ``state.json``, and whether its supervisor lives."""
        with self.opened(job_id) as fd:
            return _read_state(fd)

    def running_mark_at(self, fd: int) -> bytes | None:
        """Return what changes with each line and each state of a running job; None when it does not run.

        Costs a tenth of `glance`, for callers that poll thousands of silent jobs.

        Args:
            fd: The job's open directory.
        """
        try:
            state = os.stat("state.json", dir_fd=fd, follow_symlinks=False)
            index = os.stat("log.idx", dir_fd=fd, follow_symlinks=False)
            if not _is_supervised(fd):
                return None
        except OSError:
            return None  # the caller's next read raises the detailed error
        # A file's owner can set any time: nanoseconds since the epoch that 64 bits do not hold, too.
        state_ns, index_ns = state.st_mtime_ns & _UINT64_MAX, index.st_mtime_ns & _UINT64_MAX
        # Packed: a tuple of numbers takes three times the memory.
        return _MARK.pack(state.st_ino, state_ns, state.st_size, index.st_ino, index_ns, index.st_size)

    def _check_there(self) -> None:
        """Raise if the store was moved or unmounted while in use; a missing job then proves nothing."""
        if self._used and not self.jobs.is_dir():
            raise ServiceUnavailableError(f"{self.jobs} was moved away or unmounted")

    def create(self, job_id: str, spec: Mapping[str, Any]) -> int:
        """Make a job's directory; see `tailspan.local.state_dir.StateDir.create`."""
        return self.place.create(job_id, spec)

    def mark_canceled(self, job_id: str) -> None:
        """Leave a mark for a supervisor that cannot be signalled yet; on a disk that is full or fails, do without."""
        try:
            with self.opened(job_id) as fd:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                os.close(os.open("cancel", flags, 0o600, dir_fd=fd))
        except (PermissionError, FileNotFoundError):
            raise
        except OSError:
            pass

    def prune(self, older_than_s: float, now_s: float) -> Iterator[str]:
        """Delete the jobs that ended longer ago, and yield their ids, oldest first.

        Args:
            older_than_s: Age of their end in seconds.
            now_s: The present in seconds since the epoch.
        """
        import shutil

        limit = now_s - older_than_s
        for job_id in reversed(self.job_ids()):
            submitted = submitted_at_of(job_id)
            if submitted and submitted.timestamp() > limit:
                break
            try:
                job = self.load(job_id)
                ends = time_of(job.recorded.get("finished_at")), job.last_sign_of_life, submitted
                # An end in the future (the year 9999) cannot be the end.
                ended = next((end for end in ends if end and end.timestamp() <= now_s + _FUTURE_S), None)
                if job.logs_complete and ended and ended.timestamp() <= limit:
                    gone = f".gone-{job_id}"
                    with self.opened_jobs() as jobs_fd:
                        os.rename(job_id, gone, src_dir_fd=jobs_fd, dst_dir_fd=jobs_fd)
                        shutil.rmtree(gone, dir_fd=jobs_fd)
                    yield job_id
            except (FileNotFoundError, JobNotFoundError, PermissionError):
                # Another process prunes too, or the job is another user's.
                continue
        self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        """Delete what a process left that was killed while it made or deleted a job."""
        import shutil

        try:
            with self.opened_jobs() as jobs_fd:
                for name in os.listdir(jobs_fd):
                    if not name.startswith((".new-", ".gone-")):
                        continue
                    made = os.stat(name, dir_fd=jobs_fd, follow_symlinks=False)
                    if now_s - made.st_mtime > _ABANDONED_S:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=jobs_fd)
        except FileNotFoundError:
            return


class _OpenJob(AbstractContextManager[int]):
    """A job's directory, held open; a class, because each poll of each job opens one."""

    __slots__ = ("_fd", "_job_id", "_jobs_fd", "_store")

    def __init__(self, store: JobStore, job_id: str, jobs_fd: int | None) -> None:
        self._store = store
        self._job_id = job_id
        self._jobs_fd = jobs_fd

    def __enter__(self) -> int:
        self._fd = self._store.open_job(self._job_id, self._jobs_fd)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _gid(group: str) -> int:
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {group!r} on this machine", key="services.local.group") from None


def _read_state(dir_fd: int) -> tuple[Mapping[str, Any], bool]:
    recorded = _read_json("state.json", dir_fd, _MAX_STATE_BYTES) or {}
    if recorded.get("end"):
        return recorded, False
    if _is_supervised(dir_fd):
        return recorded, True
    # Its last words may have been written between our two looks.
    return _read_json("state.json", dir_fd, _MAX_STATE_BYTES) or {}, False


def _read_json(name: str, dir_fd: int, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Return what is usable of a file's object; None when it is missing, damaged by a power failure, or too large."""
    fd, size = open_sized(name, dir_fd)
    if fd is None:
        return None
    try:
        if size > max_bytes:
            return None
        text = read_at(fd, 0, size)
        # An item may need a hundred bytes of memory.
        if len(text) > _MAX_JSON_ITEMS and sum(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_ITEMS:
            return None
        value = _decoded(text)
    except (ValueError, RecursionError):
        return None
    finally:
        os.close(fd)
    if not isinstance(value, dict):
        return None
    usable = map(isinstance, value.values(), map(_TYPES.get, value, itertools.repeat(object)))
    return dict(itertools.compress(value.items(), usable))


def _decoded(text: bytes) -> Any:
    """Return what ``json.loads`` does, in less time for an object in UTF-8, as we write it.

    Raises:
        ValueError: The text is not JSON.
    """
    if text.startswith(b"{"):
        line = text.decode("utf-8", "surrogatepass")
        value, end = _raw_decode(line)
        if line[end:] in ("", "\n"):
            return value
    return json.loads(text)


def _is_supervised(dir_fd: int) -> bool:
    """Return whether a supervisor holds a job's lock.

    Who may only read the lock file can take a lock of ``flock`` as well. Newer supervisors therefore hold a lock that
    needs the right to write, and say so in the file.
    """
    import fcntl

    fd = open_file("lock", dir_fd)
    if fd is None:
        return False
    try:
        if read_at(fd, 0, len(WRITE_LOCKED)) == WRITE_LOCKED:
            return is_write_locked(fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
