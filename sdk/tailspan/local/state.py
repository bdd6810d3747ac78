"""``state.json``: what a supervisor says about its job, replaced as a whole each time.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

__all__ = ["iso_time", "state_line", "write_state"]

_NANOS_PER_S = 1_000_000_000


def iso_time(unix_nano: int) -> str:
    """Return a time as it stands in a job's files: ISO 8601, UTC, to the microsecond."""
    seconds, nanos = divmod(unix_nano, _NANOS_PER_S)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos // 1000:06d}Z"


def state_line(state: dict[str, Any]) -> bytes:
    """Return an object as it stands in a job's files and on the status pipe."""
    return json.dumps(state).encode() + b"\n"


def write_state(job_fd: int, state: dict[str, Any], file_mode: int) -> None:
    """Replace ``state.json``.

    Args:
        job_fd: The job's directory.
        state: What it shall say.
        file_mode: Who may read it.

    Raises:
        OSError: It could not be written; the old one still stands.
    """
    fd = os.open("state.json.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, file_mode, dir_fd=job_fd)
    try:
        os.fchmod(fd, file_mode)
        data = state_line(state)
        if os.write(fd, data) != len(data):
            raise OSError("there is no room for state.json")
        if state["finished_at"]:
            # An end that was told must outlive a power failure: terminal states do not change.
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename("state.json.new", "state.json", src_dir_fd=job_fd, dst_dir_fd=job_fd)
