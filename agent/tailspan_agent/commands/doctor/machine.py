"""The machine in a bug report: versions, clock, limits, disks, and the agent's state directory."""

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
from tailspan._plural import plural
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
    """Return versions of Tailspan, Python, the platform and packages, and whether compiled code is used."""
    found = {
        "tailspan": _version("tailspan"),
        "python": f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}",
        "platform": f"{platform.platform()} {' '.join(platform.libc_ver())}".strip(),
        "sqlite": sqlite3.sqlite_version,
        "framing": "in C" if COMPILED else "in Python (slower): the compiled part is not installed",
    }
    named = (re.match(r"[\w.-]+", text) for text in metadata.requires("tailspan") or () if "extra == 'dev'" not in text)
    return found | {name: _version(name) for name in sorted({match[0] for match in named if match} - {"tailspan"})}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def clock() -> dict[str, str]:
    """Return the time that lines of local jobs get, and whether the kernel considers it synchronised."""
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
    """Return the limits that apply to an agent."""
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
    return f"{soft} (hard limit {hard})"


def variables(environ: Mapping[str, str] = os.environ) -> str:
    """Return the names, not the values, of the variables that Tailspan or its libraries read."""
    return " ".join(sorted(name for name in environ if name.startswith(_PREFIXES) or name.upper() in _NAMES)) or "none"


def disk(directory: Path) -> str:
    """Return free space and file system of a directory, which need not exist yet."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.exists(path))
    space = os.statvfs(existing)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    facts = [
        f"{directory}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        f"{space.f_favail} of {space.f_files} inodes free",
        _file_system(existing),
        "writable" if os.access(existing, os.W_OK) else "not writable by this user",
    ]
    facts.append("" if existing == directory.absolute() else "not created yet")
    return ", ".join(fact for fact in facts if fact)


def _file_system(path: Path) -> str:
    """Return the type of a file system: SQLite's write-ahead log does not work on network file systems."""
    longest, fs_type = -1, ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(point) and len(point) >= longest:
            longest, fs_type = len(point), right.split()[0]
    return fs_type


def store(state_dir: Path) -> Iterator[tuple[str, str]]:
    """Yield facts about the checkpoint store, without changing it; its agent may be running.

    Raises:
        OSError: A file cannot be read.
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
    yield "checkpoints", f"{size} {plural(size, 'byte')}"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        yield "version", f"{db.execute('PRAGMA user_version').fetchone()[0]} (this Tailspan: {SCHEMA_VERSION})"
        yield "integrity", str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
        counts = db.execute("SELECT count(*), total(ended), total(logs_complete), max(updated_s) FROM jobs").fetchone()
        yield "jobs", f"{counts[0]}: {counts[1]:.0f} ended, {counts[2]:.0f} relayed completely"
        if counts[3] is not None:
            yield "last change", datetime.fromtimestamp(counts[3], UTC).isoformat(timespec="seconds")
        yield "spans to send", str(db.execute("SELECT count(*) FROM spans WHERE acked = 0").fetchone()[0])
