"""Many running jobs without their processes: one process holds the locks of all and writes the lines of a few.

    python -m tests.bench.holder STATE_DIR JOBS SPEAKERS

The folders are those of real jobs; what is missing is a supervisor and a command for each, which are not measured.
Each speaker gets a line a second. Prints ``HOLDING`` when all jobs are there. SIGUSR1: one silent job ends, and the
time of that is printed.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

from tailspan._identity import trace_id
from tailspan.local.index import Entry, pack_entry
from tailspan.local.state import iso_time, write_state
from tailspan.local.store import JobStore, new_job_id

HOLDING = "HOLDING"
ENDED = "ENDED "
_EVERY_S = 1.0
_STDOUT = 1


class HeldJob:
    """A job that runs as far as its files and its lock say."""

    def __init__(self, store: JobStore, number: int) -> None:
        now = time.time_ns()
        self.job_id = new_job_id(now)
        self.name = f"bench-{number % 10}"
        spec = {
            "version": 1, "id": self.job_id, "name": self.name, "command": ["wait"], "cwd": "", "host": "bench",
            "user": "bench", "attributes": {}, "timeout_s": None, "submitted_at": iso_time(now),
            "identity": store.identity, "trace_id": trace_id(store.identity, self.job_id), "parent": None,
        }  # fmt: skip
        self._lock_fd = store.create(self.job_id, spec)
        self._directory = store.directory(self.job_id)
        self._state = {
            "state": "RUNNING", "name": self.name, "started_at": iso_time(now), "finished_at": None, "end": None
        }  # fmt: skip
        self._end = self._lines = 0
        self._write_state()

    def say(self) -> None:
        """Write one line as a supervisor does: the text, then its entry."""
        now = time.time_ns()
        line = f"a line of a running job rec={self._lines} at={now}\n".encode()
        self._end += len(line)
        self._lines += 1
        _append(self._directory / "log", line)
        _append(self._directory / "log.idx", pack_entry(Entry(self._end, now, self._lines, _STDOUT, 0)))

    def end(self) -> None:
        """End as a supervisor does."""
        moment = iso_time(time.time_ns())
        self._state.update(
            state="SUCCEEDED", finished_at=moment, end=moment, exit_code=0, lines=self._lines, bytes=self._end
        )
        self._write_state()
        os.close(self._lock_fd)

    def _write_state(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY)
        try:
            write_state(fd, self._state, 0o600)
        finally:
            os.close(fd)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


def main() -> None:
    """Hold jobs until SIGTERM."""
    directory, count, speakers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    store = JobStore(directory)
    jobs = [HeldJob(store, number) for number in range(count)]
    silent = jobs[speakers:]

    def end_one(*_: object) -> None:
        silent.pop().end()
        print(f"{ENDED}{time.time()}", flush=True)

    signal.signal(signal.SIGUSR1, end_one)
    print(HOLDING, flush=True)
    next_s = time.monotonic()
    while True:
        for job in jobs[:speakers]:
            job.say()
        next_s = max(next_s + _EVERY_S, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))


if __name__ == "__main__":
    main()
