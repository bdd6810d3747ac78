"""Local jobs that a test steers: a program that reads its commands, one line of Python each, from a pipe.

Commands run one after the other, so a scenario always knows which lines the job has written.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tailspan.models import JobStatus
from tests.fakes.local_jobs import LocalJobs, until
from tests.prove.jobs import LocalNumberedJob
from tests.prove.tally import LATEST_NS, LINE, JobTally
from tests.prove.world import World

# A write to a pipe of at most 4096 bytes is whole or not there: a killed program leaves no half line.
PROGRAM = """
import os, sys, time
name, said = sys.argv[1], open(sys.argv[2], "a")
number = 0
def write(count, out=1):
    global number
    while count:
        few = min(count, 50)
        text = "".join(f"{name} #{at:07d} {time.time_ns()}\\n" for at in range(number, number + few))
        os.write(out, text.encode())
        number, count = number + few, count - few
for command in sys.stdin:
    exec(command)
    print(number, file=said, flush=True)
os._exit(0)
"""
_TICK_NS = 20_000_000
_SLOWEST_CAPTURE_NS = 60_000_000_000


class SteeredJob(LocalNumberedJob):
    """A job of this machine that runs the commands it is sent.

    Attributes:
        gone: Numbers of lines that were destroyed before they were read.
    """

    def __init__(self, jobs: LocalJobs, name: str, **options: Any) -> None:
        self.name = name
        self.ended = False
        self._jobs = jobs
        self._commands = 0
        self._said = Path(jobs.state_dir.parent, f"{name}.said")
        self._said.touch()
        read_fd, self._write_fd = os.pipe()
        command = [sys.executable, "-S", "-E", "-c", PROGRAM, name, str(self._said)]
        self.job_id = jobs.start(*command, name=name, stdin_fd=read_fd, **options)
        os.close(read_fd)
        self.directory = jobs.directory(self.job_id)
        self.identity = jobs.service.identity
        self._lines: list[str] | None = None
        self._copies: dict[int, int] = {}
        self.gone = range(0)
        self.tally = JobTally(name, self._find, copies=self._copies)

    @property
    def status(self) -> JobStatus:
        """What the service says of it."""
        return self._jobs.service.status(self.job_id)

    @property
    def captured(self) -> list[str]:
        """The lines that are in its log now."""
        return (self.directory / "log").read_bytes().replace(b"\0", b"").decode().splitlines()

    @property
    def written(self) -> int:
        """How many lines it wrote; once it has ended, how many of them its supervisor got to see."""
        if self._lines is not None:
            return len(self._lines)
        said = self._said.read_text().split()
        return int(said[-1]) if said else 0

    @property
    def relayable(self) -> int:
        """How many of its lines can be read."""
        return self.written - len(self.gone)

    def send(self, command: str) -> None:
        """Send a command without waiting for its end."""
        self._commands += 1
        os.write(self._write_fd, command.encode() + b"\n")

    def do(self, command: str) -> None:
        """Send a command and wait for its end."""
        self.send(command)
        until(lambda: len(self._said.read_text().split()) >= self._commands)

    def put(self, count: int, out: int = 1) -> None:
        """Let it write lines, and wait until its supervisor has stored them."""
        size = self._log_size()
        self.do(f"write({count}, {out})")
        until(lambda: self._log_size() >= size + count * len(f"{self.name} #0000000 1700000000000000000\n"))

    def kill(self, *, command_too: bool = False) -> None:
        """Kill its supervisor; the kernel, or `command_too` kills the command. What was captured is what counts."""
        state = self._jobs.state(self.job_id)
        os.kill(state["supervisor_pid"], signal.SIGKILL)
        if command_too:
            with suppress(ProcessLookupError):
                os.killpg(state["pid"], signal.SIGKILL)
        until(lambda: self.status.logs_complete)
        self._close()

    def end(self) -> None:
        """Let it end, and wait until its log is complete."""
        if not self.ended:
            os.close(self._write_fd)
            until(lambda: self.status.logs_complete)
            self._close()

    def cancel(self) -> None:
        """Cancel it as a user does, whatever it is doing, and wait until its log is complete."""
        self._jobs.cancel(self.job_id)
        until(lambda: self.status.logs_complete)
        self._close()

    def destroyed(self, first: int, end: int) -> None:
        """Note that these lines can no longer be read: they must not come, and are not missing."""
        self.gone = range(first, end)
        self._copies.update(dict.fromkeys(self.gone, 0))

    def _close(self) -> None:
        self.ended = True
        if not self.gone:
            self._lines = self.captured
            if self._lines and LINE.fullmatch(self._lines[-1]) is None:
                self.tally.cut = self._lines[-1], len(self._lines) - 1

    def _log_size(self) -> int:
        return (self.directory / "log").stat().st_size

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        if self._lines is not None and (number >= len(self._lines) or text != self._lines[number]):
            return None
        match = LINE.fullmatch(text)
        stamp = match and text.rpartition(" ")[2]
        if not stamp or len(stamp) != 19:
            # The last line of a log whose supervisor was killed while it wrote.
            return (0, LATEST_NS) if self._lines is not None else None
        # A line that is missing in the index has the time of its file, which is as coarse as the kernel's tick.
        return int(stamp) - _TICK_NS, int(stamp) + _SLOWEST_CAPTURE_NS


def steered_job(world: World, name: str, **options: Any) -> SteeredJob:
    """Start a steered job in a world."""
    job = SteeredJob(world.local, name, **options)
    world.jobs.append(job)
    return job
