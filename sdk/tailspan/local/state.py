"""``state.json``: what a supervisor records about its job, replaced as a whole each time.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import os
import time

from tailspan.local.json_text import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["iso_time", "state_line", "sync_file", "write_state"]

_NANOS_PER_S = 1_000_000_000
_NEW = "state.json.new"
_RESERVED_BYTES = 4096


def iso_time(unix_nano: int) -> str:
    """Return a time as it stands in a job's files: ISO 8601, UTC, to the microsecond."""
    seconds, nanos = divmod(unix_nano, _NANOS_PER_S)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos // 1000:06d}Z"


def state_line(state: dict[str, Any]) -> bytes:
    """Return an object as it stands in a job's files and on the status socket."""
    return json_text(state).encode() + b"\n"


def write_state(job_fd: int, state: dict[str, Any], file_mode: int) -> None:
    """Replace ``state.json``, and reserve room for the next one, so that a full disk cannot hide a job's end.

    Args:
        job_fd: The job's directory.
        state: The new content.
        file_mode: The permissions of the file.

    Raises:
        OSError: It could not be written; the old one still stands.
    """
    data = state_line(state)
    fd = os.open(_NEW, os.O_WRONLY | os.O_CREAT, file_mode, dir_fd=job_fd)
    try:
        os.fchmod(fd, file_mode)
        if os.pwrite(fd, data, 0) != len(data):
            raise OSError("there is no room for state.json")
        os.ftruncate(fd, len(data))
        if state["finished_at"]:
            # An end that was reported must survive a power failure: terminal states do not change.
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(_NEW, "state.json", src_dir_fd=job_fd, dst_dir_fd=job_fd)
    if not state["end"]:
        _reserve(job_fd, file_mode)


def sync_file(path: str, directory_fd: int | None = None) -> None:
    """Make a file survive a power failure, if its disk can do that.

    Args:
        path: The file.
        directory_fd: The directory that a relative path is in; None: the present one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def _reserve(job_fd: int, file_mode: int) -> None:
    try:
        fd = os.open(_NEW, os.O_WRONLY | os.O_CREAT, file_mode, dir_fd=job_fd)
    except OSError:
        return
    try:
        os.posix_fallocate(fd, 0, _RESERVED_BYTES)
    except (OSError, AttributeError):
        # No room, or a system without it: then the next state waits for room.
        pass
    finally:
        os.close(fd)
