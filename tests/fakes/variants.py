"""One command three times: plain, under ``timeout --foreground``, and under ``tailspan run``, also at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TAILSPAN", "VARIANTS", "Terminal", "Variants", "process_state"]

TAILSPAN = [sys.executable, "-c", "from tailspan.cli.start import main; main()"]
VARIANTS = ("plain", "timeout", "tailspan")
_PATIENCE_S = 60.0


class Variants:
    """Runs commands as the three variants, in a directory and with a state directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_"))}
        self.env = {**kept, "TAILSPAN_STATE_DIR": str(self.state_dir), "PYTHONUNBUFFERED": "1"}

    def command(self, variant: str, command: Sequence[str], *options: str) -> list[str]:
        """Return a variant's command line."""
        if variant == "plain":
            return list(command)
        if variant == "timeout":
            return [shutil.which("timeout") or "timeout", "--foreground", "600", *command]
        return [*TAILSPAN, "run", *options, "--", *command]

    def run(
        self, variant: str, command: Sequence[str], *options: str, **given: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a variant to its end, with pipes."""
        settings = {"capture_output": True, "env": self.env, "cwd": self.directory, "timeout": _PATIENCE_S, **given}
        return subprocess.run(self.command(variant, command, *options), **settings)

    def shell(self, script: str, **given: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a script of bash, in which ``$RUN`` is ``tailspan run --``."""
        settings = {"capture_output": True, "env": self.env, "cwd": self.directory, "timeout": _PATIENCE_S, **given}
        run = " ".join(f"'{word}'" for word in [*TAILSPAN, "run"])
        return subprocess.run(["bash", "-c", f'tailspan_run() {{ {run} "$@"; }}\n{script}'], **settings)

    def jobs(self) -> list[Path]:
        """Return the directories of all jobs, oldest first."""
        return sorted(self.state_dir.glob("jobs/2*"))


def process_state(pid: int) -> str:
    """Return the letter with which the kernel shows a process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Terminal:
    """A command on a terminal of its own, in the foreground of its own session. A context manager."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str], cwd: Path, rows: int = 24, columns: int = 80):
        self.ours, theirs = os.openpty()
        self.resize(rows, columns)
        self.shown = b""
        self._seen = 0
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
                for fd in (0, 1, 2):
                    os.dup2(theirs, fd)
                os.closerange(3, 256)
                os.chdir(cwd)
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP, signal.SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                os.execvpe(command[0], list(command), {**env, "TERM": "xterm"})
            finally:
                os._exit(127)
        os.close(theirs)
        self._status: int | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.ours)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.ours, keys)

    def until(self, text: bytes) -> bytes:
        """Read until a text is shown after the text of the call before; return all that was shown."""
        self._read(lambda: self.shown.find(text, self._seen) >= 0)
        start = self.shown.find(text, self._seen)
        assert start >= 0, (text, self.shown[self._seen :], self.shown)
        self._seen = start + len(text)
        return self.shown

    def end(self) -> int:
        """Read to the end; return the exit code as a shell has it."""
        self._read(lambda: self._ended())
        self._read(lambda: True)
        assert self._status is not None, self.shown
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    def _ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def _read(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            finished = done()
            ready = select.select([self.ours], [], [], 0 if finished else 0.02)[0]
            try:
                data = os.read(self.ours, 65536) if ready else b""
            except OSError:
                data = b""  # Linux says EIO when the last writer has closed
                if not finished:
                    time.sleep(0.02)
            self.shown += data
            if (finished and not data) or time.monotonic() > deadline:
                return
