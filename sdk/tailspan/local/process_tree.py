"""All processes of a job: found and signalled wherever they went, and adopted when their parents end.

On Linux the supervisor is a child subreaper: a process of the job stays its descendant, also in a process group or
session of its own. Elsewhere descendants are found through ``ps``, which misses those whose parents have ended.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import os
import sys

from tailspan._native import compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = [
    "DETACHED",
    "adopt_orphans",
    "die_with_parent",
    "is_stopped",
    "live_descendants",
    "reset_internal_signals",
    "signal_descendants",
    "system_call",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PRCTL = {"x86_64": 157, "aarch64": 167, "riscv64": 167}
_RT_SIGACTION = {"x86_64": 13, "aarch64": 134, "riscv64": 134}
_SIGACTION_BYTES = 32
DETACHED = "detached"
"""Marks, on its command line, the supervisor of a job that outlives the job which started it."""


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parents end (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is killed (Linux)."""
    if not _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        return
    if os.getppid() != parent_pid:
        # It ended before the kernel was asked.
        os._exit(128 + signal.SIGKILL)


def reset_internal_signals() -> None:
    """Take back that glibc's posix_spawn(3) ignores its own signals, 32 and 33, in the processes that it starts."""
    number = _RT_SIGACTION.get(os.uname().machine)
    if sys.platform != "linux" or number is None:
        return
    for internal in (32, 33):
        # An action of zeros is the default one.
        system_call(number, internal, bytes(_SIGACTION_BYTES))


def _prctl(option: int, value: int) -> bool:
    number = _PRCTL.get(os.uname().machine)
    return sys.platform == "linux" and number is not None and system_call(number, option, value) == 0


def _system_call_in_python(number: int, first: int, second: int | bytes, third: int = 0) -> int:
    """Make a system call of Linux; return its result, or -1."""
    try:
        import ctypes

        return int(ctypes.CDLL(None).syscall(number, first, second, third, 8))
    except (ImportError, OSError, AttributeError):
        return -1


system_call = compiled("system_call", _system_call_in_python)


def live_descendants(root_pid: int) -> list[int]:
    """Return the process ids of all descendants that have not ended, parents first.

    A job that a job of ours started with ``--detach`` is not one of them: it outlives the job that started it.

    Args:
        root_pid: The process whose descendants are meant.
    """
    children = _children_of_all() if sys.platform != "linux" else None
    found: list[int] = []
    todo = [root_pid]
    while todo:
        pid = todo.pop(0)
        for child in _children(pid) if children is None else children.get(pid, []):
            if children is None and (not _is_alive(child) or _is_detached_supervisor(child)):
                continue
            found.append(child)
            todo.append(child)
    return found


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, as by Ctrl-Z; True where the system does not report it."""
    fields = _stat_fields(pid)
    return fields[0] == b"T" if fields else sys.platform != "linux"


def signal_descendants(root_pid: int, number: int) -> bool:
    """Send a signal to all live descendants; return whether there was one."""
    pids = live_descendants(root_pid)
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            # It has just ended, or it has become another user's by sudo.
            pass
    return bool(pids)


def _children(pid: int) -> Iterator[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for task in tasks:
        text = _read(f"/proc/{pid}/task/{task}/children")
        if text is None:
            # A kernel without CONFIG_PROC_CHILDREN, or a thread that has just ended.
            if os.path.exists("/proc/self/task") and not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
                yield from _children_by_scan(pid)
                return
            continue
        yield from map(int, text.split())


def _children_by_scan(pid: int) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat_fields(int(name))) and int(fields[1]) == pid:
            yield int(name)


def _children_of_all() -> dict[int, list[int]]:
    """Return the children of each process, as ``ps`` lists them."""
    import subprocess

    children: dict[int, list[int]] = {}
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, check=False).stdout
    for line in listed.splitlines():
        pid, parent, state = line.split(None, 2)
        if not state.startswith(b"Z"):
            children.setdefault(int(parent), []).append(int(pid))
    return children


def _is_alive(pid: int) -> bool:
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def _stat_fields(pid: int) -> list[bytes]:
    """Return what follows the name in ``/proc/PID/stat``: state, parent and more; nothing for a process that ended."""
    return (_read(f"/proc/{pid}/stat") or b"").rpartition(b")")[2].split()


def _is_detached_supervisor(pid: int) -> bool:
    arguments = (_read(f"/proc/{pid}/cmdline") or b"").split(b"\0")
    return DETACHED.encode() in arguments and any(b"tailspan.local.supervisor" in one for one in arguments[:6])


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return None
    finally:
        os.close(fd)
