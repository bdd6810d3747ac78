"""Send signals to a job's supervisor, and to no other process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["signal_supervisor"]


def signal_supervisor(pid: int, job_id: str, number: int) -> bool:
    """Send a signal to a supervisor, if that is what the process is.

    On a directory that machines or containers share, a process id may mean another process here.

    Args:
        pid: What ``state.json`` says.
        job_id: The job, which its supervisor's command line names.
        number: The signal.

    Returns:
        Whether it was sent.
    """
    if job_id.encode() not in _command_line(pid):
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return b""
    # macOS has no /proc.
    return subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False).stdout
