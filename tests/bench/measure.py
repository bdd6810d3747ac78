"""What a process cost: CPU of its whole tree, wall time, and memory at its peak.

CPU rather than wall wherever it will do: other work on the machine spoils wall time much more.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "alternate", "cpu_of", "median_usage", "peak_rss", "run", "started", "tailspan"]

_NANOS_PER_S = 1e9
_LOOK_S = 0.01
_UNTIL_S = 0.05


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used up.

    Attributes:
        cpu_s: User and system time in seconds, of the process and its children.
        wall_s: Time from start to end in seconds.
        rss: Resident memory at its peak in bytes.
    """

    cpu_s: float
    wall_s: float
    rss: int


def tailspan(*arguments: str) -> list[str]:
    """Return the command line of ``tailspan``."""
    return [str(Path(sys.executable).with_name("tailspan")), *arguments]


def run(
    command: Sequence[str],
    *,
    output: Path | None = None,
    env: Mapping[str, str] | None = None,
    until: Callable[[], bool] | None = None,
) -> Usage:
    """Run a command to its end; see `Usage`.

    Args:
        command: What to run.
        output: Where its standard output goes; None: nowhere.
        env: Variables on top of the present environment.
        until: Ends a command that does not end by itself: polled every 50 ms, and once it returns true, the command
            gets SIGTERM.

    Raises:
        RuntimeError: It failed; the message has what it said.
    """
    with open(output or os.devnull, "wb") as out:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
        )
        assert process.stderr is not None
        with _peak_of(process.pid) as peak:
            if until is not None:
                try:
                    while not until() and not _has_ended(process.pid):
                        time.sleep(_UNTIL_S)
                finally:
                    process.terminate()
            said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}: {said.decode()[-2000:]}")
    return Usage(used.ru_utime + used.ru_stime, wall_s, peak[0])


def _has_ended(pid: int) -> bool:
    """Return whether a child has ended; it can be waited for afterwards."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextlib.contextmanager
def started(
    command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, says: str = ""
) -> Iterator[tuple[int, str]]:
    """Run a process while the block runs; yield its id and its first line that has certain words, once it said it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **(env or {})}
        )
    try:
        yield process.pid, _first_line(process, log, says) if says else ""
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_line(process: subprocess.Popen[bytes], log: Path, says: str) -> str:
    while process.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if says in line and line.endswith("\n"):
                return line.strip()
        time.sleep(0.01)
    raise RuntimeError(f"{process.args!r} ended: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def _peak_of(pid: int) -> Iterator[list[int]]:
    """Note a process's peak of memory until the block ends.

    It is sampled repeatedly: what wait4 returns afterwards is at least the memory of the process that started it.
    """
    peak, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_S):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                peak[0] = max(peak[0], peak_rss(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        over.set()
        looking.join()


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a running process, all its threads.

    Source: proc(5), schedstat: the first number is the time on a CPU in ns. Counted finer than the ticks of stat.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / _NANOS_PER_S


def peak_rss(pid: int) -> int:
    """Return the peak of a running process's resident memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def alternate(cases: Mapping[str, Callable[[], Usage]], times: int) -> dict[str, Usage]:
    """Run cases in turns, so that what disturbs the machine disturbs all of them; return the medians."""
    found: dict[str, list[Usage]] = {name: [] for name in cases}
    for _ in range(times):
        for name, case in cases.items():
            found[name].append(case())
    return {name: median_usage(usages) for name, usages in found.items()}


def median_usage(usages: Sequence[Usage]) -> Usage:
    """Return the median of each value."""
    return Usage(
        statistics.median(usage.cpu_s for usage in usages),
        statistics.median(usage.wall_s for usage in usages),
        int(statistics.median(usage.rss for usage in usages)),
    )
