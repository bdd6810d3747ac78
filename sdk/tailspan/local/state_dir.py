"""Making a new job's files in the state directory, and the identity of that directory.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

import errno
import os
import time

from tailspan.local.index import HEADER
from tailspan.local.json_text import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["WRITE_LOCKED", "StateDir", "is_write_locked", "new_job_id"]

WRITE_LOCKED = b"write-locked\n"
"""What a job's lock file contains if its supervisor holds a lock that only writers of the file can have."""

# Files take the directory's group; its members add jobs, and the sticky bit protects those of others.
_SHARED = 0o3770
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


def new_job_id(unix_nano: int) -> str:
    """Return a new id that sorts by time: UTC date, time to the millisecond, and six random characters."""
    seconds, nanos = divmod(unix_nano, 1_000_000_000)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seconds))
    return f"{stamp}{nanos // 1_000_000:03d}-" + "".join([_LETTERS[byte % len(_LETTERS)] for byte in os.urandom(6)])


class StateDir:
    """The state directory, as far as a new job needs it. Holds nothing open.

    Attributes:
        path: The directory.
        jobs: The directory that has a directory for each job.
        gid: The group that may read the jobs, and whose members may add some; None: only their owner.
        file_mode: Permissions of a job's files.
    """

    def __init__(self, path: str, *, gid: int | None = None) -> None:
        """Name the directory; nothing is touched."""
        # A supervisor works in another directory than we do.
        self.path = os.path.abspath(path)
        self.jobs = f"{self.path}/jobs"
        self.gid = gid
        self.file_mode = 0o600 if gid is None else 0o640

    @property
    def prune_mark(self) -> str:
        """The file whose time says when old jobs were last deleted: one for each user of a shared directory."""
        return f"{self.path}/pruned" if self.gid is None else f"{self.path}/pruned-{os.geteuid()}"

    def identity(self) -> str:
        """Return the UUID of this directory, made with it; text that is not a UUID is returned as it is.

        Raises:
            OSError: It can be neither read nor made.
        """
        path = f"{self.path}/identity"
        text = _read_text(path)
        if text is None:
            self.make_directories()
            digits = bytearray(os.urandom(16))
            # Version 4 and the variant of RFC 9562.
            digits[6], digits[8] = digits[6] & 0x0F | 0x40, digits[8] & 0x3F | 0x80
            made = bytes(digits).hex()
            made = f"{made[:8]}-{made[8:12]}-{made[12:16]}-{made[16:20]}-{made[20:]}"
            new = f"{path}.{made}"
            self._write_new(new, f"{made}\n".encode())
            try:
                # Fails where a second process was quicker: the first identity is the one.
                os.link(new, path)
            except FileExistsError:
                pass
            finally:
                os.unlink(new)
            text = _read_text(path) or ""
        return text

    def create(self, job_id: str, spec: Mapping[str, Any]) -> int:
        """Make a job's directory, which appears as a whole and locked.

        Args:
            job_id: A new id.
            spec: ``job.json``.

        Returns:
            The file descriptor of its lock: as long as it, or a copy of it, is open, the job has a supervisor.

        Raises:
            OSError: It cannot be made, or the file system has no locks.
        """
        import fcntl

        if os.path.islink(self.jobs):
            raise OSError(errno.ELOOP, "a link instead of a directory", self.jobs)
        if self.gid is not None:
            self.make_directories()
        new = f"{self.jobs}/.new-{job_id}"
        try:
            self._make_directory(new)
        except FileNotFoundError:
            self.make_directories()
            self._make_directory(new)
        lock_fd = -1
        try:
            lock_fd = self._write_new(f"{new}/lock", b"", close=False)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _write_lock(lock_fd):
                os.write(lock_fd, WRITE_LOCKED)
            self._write_new(f"{new}/job.json", json_text(dict(spec)).encode() + b"\n")
            self._write_new(f"{new}/log", b"")
            self._write_new(f"{new}/log.idx", HEADER)
            os.rename(new, f"{self.jobs}/{job_id}")
        except BaseException:
            if lock_fd >= 0:
                os.close(lock_fd)
            _remove(new)
            raise
        return lock_fd

    def discard(self, job_id: str) -> None:
        """Remove a job that did not start and whose command runs without being captured, as far as possible."""
        hidden = f"{self.jobs}/.new-{job_id}"
        try:
            # Readers must not find half of it.
            os.rename(f"{self.jobs}/{job_id}", hidden)
            for name in os.listdir(hidden):
                os.unlink(f"{hidden}/{name}")
            os.rmdir(hidden)
        except OSError:
            # It never appeared, or what is left is removed as an unfinished job.
            pass

    def make_directories(self) -> None:
        """Make the directories that are missing, for their owner alone or for the group, whatever the umask.

        Raises:
            OSError: One cannot be made.
        """
        self._make_missing(self.path)
        self._make_missing(self.jobs)

    def _make_missing(self, path: str) -> None:
        if os.path.isdir(path):
            if self.gid is not None and path in (self.path, self.jobs):
                self._share(path)
            return
        self._make_missing(os.path.dirname(path))
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return
        if self.gid is not None:
            os.chown(path, -1, self.gid)
            os.chmod(path, _SHARED if path in (self.path, self.jobs) else 0o2750)

    def _share(self, path: str) -> None:
        """Let the group add jobs to a directory that was made for reading only."""
        found = os.stat(path)
        if found.st_uid == os.geteuid() and found.st_gid == self.gid and found.st_mode & 0o7777 != _SHARED:
            os.chmod(path, _SHARED)

    def _make_directory(self, path: str) -> None:
        os.mkdir(path, 0o700)
        if self.gid is not None:
            os.chown(path, -1, self.gid)
            os.chmod(path, 0o2750)  # noqa: S103 - the group reads

    def _write_new(self, path: str, data: bytes, *, close: bool = True) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if self.gid is not None:
                os.fchown(fd, -1, self.gid)
                os.fchmod(fd, self.file_mode)
            if os.write(fd, data) != len(data):
                raise OSError(28, os.strerror(28), path)
        except BaseException:
            os.close(fd)
            raise
        if close:
            os.close(fd)
        return fd


def _write_lock(fd: int) -> bool:
    """Take a lock that only a file open for writing can have; return False where the system has none."""
    import fcntl

    command = getattr(fcntl, "F_OFD_SETLK", None)
    if command is None:
        return False
    try:
        fcntl.fcntl(fd, command, _flock(fcntl.F_WRLCK))
    except OSError:
        # Network file systems map it and flock() to one lock.
        return False
    return True


def is_write_locked(fd: int) -> bool:
    """Return whether a process holds the lock of `WRITE_LOCKED` on a file.

    Raises:
        OSError: The system has no such locks: the file is from another one.
    """
    import fcntl
    import struct

    # "Would a lock for reading be possible?": only a lock for writing prevents it.
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_RDLCK))
    return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)


def _flock(kind: int) -> bytes:
    """Return C's ``struct flock`` for a whole file."""
    import struct

    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def _read_text(path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096).decode("ascii", "replace").strip()
    finally:
        os.close(fd)


def _remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
