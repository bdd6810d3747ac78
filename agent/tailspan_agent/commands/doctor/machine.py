"""What a bug report says of the machine: versions, clock, limits, disks, and the state that the agent left there."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tailspan._native import COMPILED
from tailspan_agent.checkpoint.database import SCHEMA_VERSION, lock_holder

__all__ = ["clock", "disk", "limits", "store", "variables", "versions"]

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # larger than struct timex of any platform
_KERNEL = {
    "inotify watches": "/proc/sys/fs/inotify/max_user_watches",
    "inotify instances": "/proc/sys/fs/inotify/max_user_instances",
    "memory limit (cgroup)": "/sys/fs/cgroup/memory.max",
    "cpu limit (cgroup)": "/sys/fs/cgroup/cpu.max",
}
_PREFIXES = ("TAILSPAN_", "OTEL_", "FUSED_", "SSL_CERT_", "PYTHON")
_NAMES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "TRACEPARENT", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY"}


def versions() -> dict[str, str]:
    """Return versions of Tailspan, Python, the platform, all packages that Tailspan can use, and what frames lines."""
    found = {
        "tailspan": _version("tailspan"),
        "python": f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}",
        "platform": f"{platform.platform()} {' '.join(platform.libc_ver())}".strip(),
        "sqlite": sqlite3.sqlite_version,
        "framing": "in C" if COMPILED else "in Python, which costs more: the C part is not installed",
    }
    named = (re.match(r"[\w.-]+", text) for text in metadata.requires("tailspan") or () if "extra == 'dev'" not in text)
    return found | {name: _version(name) for name in sorted({match[0] for match in named if match} - {"tailspan"})}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def clock() -> dict[str, str]:
    """Return the time, and whether the kernel holds it for right: all lines of local jobs carry it."""
    return {
        "utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "zone": "/".join(time.tzname),
        "synchronised": _synchronised(),
    }


def _synchronised() -> str:
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return "unknown"
    return "unknown" if state < 0 else "no" if state == _TIME_ERROR else "yes"


def limits() -> dict[str, str]:
    """Return the limits that an agent meets."""
    files, memory = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_AS)
    found = {"cpus": str(os.cpu_count()), "open files": _limit(files), "address space": _limit(memory)}
    for name, path in _KERNEL.items():
        try:
            found[name] = Path(path).read_text().strip()
        except OSError:
            continue
    return {**found, "user": f"uid {os.getuid()}, groups {' '.join(map(str, os.getgroups()))}"}


def _limit(pair: tuple[int, int]) -> str:
    soft, hard = ("none" if value == resource.RLIM_INFINITY else str(value) for value in pair)
    return f"{soft} (at most {hard})"


def variables(environ: Mapping[str, str] = os.environ) -> str:
    """Return the names, not the values, of the variables that Tailspan or its libraries read."""
    return " ".join(sorted(name for name in environ if name.startswith(_PREFIXES) or name.upper() in _NAMES)) or "none"


def disk(directory: Path) -> str:
    """Return how much room there is where a directory is or would be made, on what kind of file system."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.exists(path))
    room = os.statvfs(there)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    ledger = [
        f"{directory}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        f"{room.f_favail} of {room.f_files} inodes free",
        _file_system(there),
        "writable" if os.access(there, os.W_OK) else "not writable by this user",
    ]
    return ", ".join(fact for fact in [*ledger, "" if there == directory.absolute() else "not made yet"] if fact)


def _file_system(path: Path) -> str:
    """Return the type: SQLite's write-ahead log does not work on network file systems."""
    best, kind = -1, ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(point) and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


def store(state_dir: Path) -> Iterator[tuple[str, str]]:
    """Yield what is known of the agent's state, read without changing it; an agent may be running on it.

    Raises:
        OSError: It cannot be read.
        sqlite3.Error: The store is damaged.
    """
    pid = lock_holder(state_dir)
    yield "agent", f"runs as pid {pid}" if pid else "does not run on this state_dir"
    for aside in sorted(state_dir.glob("checkpoints.corrupt-*.db")):
        yield "set aside as damaged", aside.name
    path = state_dir / "checkpoints.db"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        yield "checkpoints", "none yet"
        return
    yield "checkpoints", f"{size} bytes"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        yield "version", f"{db.execute('PRAGMA user_version').fetchone()[0]} (this Tailspan: {SCHEMA_VERSION})"
        yield "integrity", str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
        counts = db.execute("SELECT count(*), total(ended), total(logs_complete), max(updated_s) FROM jobs").fetchone()
        yield "jobs", f"{counts[0]}, of these {counts[1]:.0f} ended and {counts[2]:.0f} relayed completely"
        if counts[3] is not None:
            yield "last change", datetime.fromtimestamp(counts[3], UTC).isoformat(timespec="seconds")
        yield "spans to send", str(db.execute("SELECT count(*) FROM spans WHERE acked = 0").fetchone()[0])
