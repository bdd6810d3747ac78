"""Kills a process in the middle of its writing to its SQLite store, which takes it some 30 us.

    python -m tests.prove.slow_motion PID DATABASE       then a line on standard input

From that line on the process is let go on for some microseconds and stopped, again and again; when it stands still with
a transaction begun and not finished, it is killed. It gives up after some seconds and lets the process go on. This is a
process of its own, for in the one of the receiver other threads would take its turn.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tests.prove.evidence import WriteAhead

_GIVE_UP_S = 3.0
_SLICE_S = 12e-6
_STOPPED_AFTER_S = 40e-6


def main() -> None:
    """Wait for the line, then go through the writing step by step."""
    pid, database = int(sys.argv[1]), Path(sys.argv[2])
    if not sys.stdin.readline():
        return
    before = WriteAhead.read(database)
    deadline = time.perf_counter() + _GIVE_UP_S
    seen = None
    try:
        while time.perf_counter() < deadline:
            os.kill(pid, signal.SIGSTOP)
            spin(_STOPPED_AFTER_S)
            now = _changes(Path(f"{database}-wal"))
            if now != seen is not None and WriteAhead.read(database).torn_since(before):
                os.kill(pid, signal.SIGKILL)
                return
            seen = now
            os.kill(pid, signal.SIGCONT)
            spin(_SLICE_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def _changes(file: Path) -> tuple[int, int] | None:
    """Return what is different once the file was written to."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def spin(pause_s: float) -> None:
    """Wait for some microseconds: sleeping is never so short."""
    until_s = time.perf_counter() + pause_s
    while time.perf_counter() < until_s:
        pass


if __name__ == "__main__":
    main()
