"""`InotifyChanges`: the kernel reports changes in the directories of jobs, so that no job is polled (Linux).

One inotify watch for each followed job and one for the directory of all jobs. The events of a job's directory cover
every change: an entry in `log.idx`, a replaced `state.json`, and the closing of the lock file when the supervisor dies.

By ctypes rather than by a library: asyncinotify 4.4.4 returns one event at a time, with four times the CPU for each
event and the memory for each watch, and would replace only the decoding below (docs/architecture.md, "Decisions").
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import logging
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from tailspan.errors import ServiceUnavailableError

__all__ = ["InotifyChanges", "open_local_changes"]

# Source: inotify(7), sys/inotify.h.
_MODIFY, _CLOSE_WRITE, _MOVED_TO = 0x2, 0x8, 0x80
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLY_DIRECTORY, _NO_LINK, _NOT_UNLINKED = 0x1000000, 0x2000000, 0x4000000
_JOB = _MODIFY | _CLOSE_WRITE | _MOVED_TO | _DELETE_SELF | _MOVE_SELF | _ONLY_DIRECTORY | _NO_LINK | _NOT_UNLINKED
_ALL = _MOVED_TO | _DELETE_SELF | _MOVE_SELF | _ONLY_DIRECTORY | _NO_LINK
_EVENT = struct.Struct("iIII")
_READ_BYTES = 256 << 10
_LIMITS = Path("/proc/sys/fs/inotify")
_MOUNTS = Path("/proc/self/mountinfo")
# This kernel reports no changes that other machines make on these.
_REMOTE = ("nfs", "cifs", "smb", "9p", "virtiofs", "ceph", "lustre", "beegfs", "gpfs", "afs", "glusterfs", "fuse")

_log = logging.getLogger(__name__)


def open_local_changes(jobs: Path) -> InotifyChanges | None:
    """Return the change feed of the jobs in a directory; None if it is unavailable and the jobs must be polled.

    Args:
        jobs: The directory of all jobs.
    """
    try:
        if not sys.platform.startswith("linux") or not jobs.is_dir() or _is_remote(jobs):
            return None
        return InotifyChanges(jobs)
    except OSError as error:
        # Any other error of the directory is reported by the next poll of its jobs.
        if error.errno in (errno.EMFILE, errno.ENOSPC):
            _warn(error.errno)
        return None


class InotifyChanges:
    """See `tailspan.services.ChangeFeed`."""

    def __init__(self, jobs: Path) -> None:
        """Begin to report new jobs.

        Args:
            jobs: The directory of all jobs.

        Raises:
            OSError: A limit of the kernel is reached, or the directory is not open to this user.
        """
        self._jobs = jobs
        libc = ctypes.CDLL(None, use_errno=True)
        self._add: Callable[[int, bytes, int], int] = libc.inotify_add_watch
        self._remove: Callable[[int, int], int] = libc.inotify_rm_watch
        self._fd: int = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._job_ids: dict[int, str] = {}
        self._watches: dict[str, int] = {}
        try:
            self._root = _checked(self._add(self._fd, os.fsencode(jobs), _ALL))
        except BaseException:
            self.close()
            raise

    def follow(self, job_id: str) -> bool:
        """Begin to report a job; see `tailspan.services.ChangeFeed`."""
        try:
            watch = _checked(self._add(self._fd, os.fsencode(self._jobs / job_id), _JOB))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                _warn(error.errno)
            return False
        self._watches[job_id] = watch
        self._job_ids[watch] = job_id
        return True

    def leave(self, job_id: str) -> None:
        """Stop reporting a job; see `tailspan.services.ChangeFeed`."""
        watch = self._watches.pop(job_id, None)
        if watch is not None:
            del self._job_ids[watch]
            # Fails if the directory is gone, and its watch with it.
            self._remove(self._fd, watch)

    async def wait(self) -> set[str] | None:
        """Return the changed jobs; see `tailspan.services.ChangeFeed`."""
        while True:
            await _readable(self._fd)
            found = self._take()
            if found is None or found:
                return found

    def close(self) -> None:
        """Close the file, and all watches with it."""
        os.close(self._fd)

    def _take(self) -> set[str] | None:
        try:
            events = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return set()
        found: set[str] = set()
        missed = False
        position = 0
        while position < len(events):
            watch, mask, _, size = _EVENT.unpack_from(events, position)
            position += _EVENT.size + size
            if mask & _OVERFLOW:
                missed = True
            elif watch == self._root:
                if mask & (_IGNORED | _UNMOUNT | _DELETE_SELF | _MOVE_SELF):
                    raise ServiceUnavailableError(f"{self._jobs} was removed or moved away while it was watched")
                name = events[position - size : position].rstrip(b"\0")
                if not name.startswith(b"."):  # jobs that are being made or deleted have such names
                    found.add(os.fsdecode(name))
            elif events[position - size : position].rstrip(b"\0") != b"log":
                # A line counts once the index has its entry. An event may arrive after its watch was removed.
                found.add(self._job_ids.get(watch, ""))
        found.discard("")
        return None if missed else found


async def _readable(fd: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _is_remote(directory: Path) -> bool:
    """Return whether other machines may write there, which this kernel does not report."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in _MOUNTS.read_text("utf-8", "replace").splitlines()]
    except OSError:
        return False
    # Source: proc_pid_mountinfo(5): the type of the file system follows a single hyphen.
    kinds = [fields[fields.index("-", 6) + 1] for fields in mounts if fields[2] == number and "-" in fields[6:]]
    return any(kind.startswith(_REMOTE) for kind in kinds)


@functools.cache
def _warn(number: int) -> None:
    """Log, once, that a limit is reached."""
    key = "max_user_instances" if number == errno.EMFILE else "max_user_watches"
    try:
        limit = (_LIMITS / key).read_text().strip()
    except OSError:
        limit = "unknown"
    _log.warning(
        "inotify limit reached (%s): falling back to polling some local jobs, which is slower and costs more: raise "
        "fs.inotify.%s (now %s) with `sysctl -w fs.inotify.%s=...`",
        os.strerror(number), key, limit, key,
    )  # fmt: skip
