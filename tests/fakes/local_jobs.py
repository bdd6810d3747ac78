"""Real local jobs for tests: run a command to its end, read its files, leave no process behind."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from tailspan.local.launch import Launched, Request
from tailspan.logs.page import LogPage
from tailspan.models import JobState, JobStatus
from tailspan.services.local import LocalService
from tests.patience import Patience

__all__ = ["LocalJobs", "until"]

PATIENCE_S = 60.0


def until(holds: Callable[[], Any]) -> Any:
    """Return the first true value; other processes give no event to wait for."""
    patience, pause_s = Patience(PATIENCE_S, lambda: [os.getpid()]), 0.002
    while not (value := holds()):
        assert not patience.is_over(), "what was waited for did not come"
        time.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.3)
    return value


class LocalJobs:
    """A local service in a directory of its own. A context manager: ends all jobs that are left."""

    def __init__(self, state_dir: Path, **options: Any) -> None:
        self.service = LocalService(state_dir=state_dir, **options)
        self.state_dir = state_dir
        self._launched: list[Launched] = []

    def __enter__(self) -> LocalJobs:
        return self

    def __exit__(self, *_: object) -> None:
        for launched in self._launched:
            launched.close()
        for path in self.state_dir.glob("jobs/*/state.json"):
            # Some tests damage their files.
            state = json.loads(path.read_text() or '{"end": "unknown"}')
            if not state.get("end"):
                self.kill(state)

    def kill(self, state: dict[str, Any]) -> None:
        """End a job and its supervisor by force."""
        with suppress(ProcessLookupError):
            os.kill(state["supervisor_pid"], signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(state["pid"], signal.SIGKILL)

    def start(self, *command: str, **options: Any) -> str:
        """Start a job and return its id."""
        launched = self.service.start(Request(command=command, **options))
        self._launched.append(launched)
        return launched.job_id

    def ended(self, job_id: str) -> JobStatus:
        """Return a job's status once its main process has ended."""
        launched = next(launched for launched in self._launched if launched.job_id == job_id)
        assert select.select([launched.status_fd], [], [], PATIENCE_S)[0]
        return self.service.status(job_id)

    def complete(self, job_id: str) -> JobStatus:
        """Return a job's status once its log is complete."""
        return until(lambda: (job := self.service.status(job_id)).logs_complete and job)

    def run(self, *command: str, **options: Any) -> JobStatus:
        """Run a command as a job, to the end of its log."""
        return self.complete(self.start(*command, **options))

    def state(self, job_id: str) -> dict[str, Any]:
        """Return ``state.json``."""
        return json.loads((self.directory(job_id) / "state.json").read_text())

    def directory(self, job_id: str) -> Path:
        """Return where a job's files are."""
        return self.state_dir / "jobs" / job_id

    def pages(self, job_id: str, cursor: bytes | None = None, since_ms: int | None = None) -> list[LogPage]:
        """Return the pages that are readable now."""

        async def read() -> list[LogPage]:
            return [page async for page in self.service.read_logs(job_id, cursor, since_ms=since_ms)]

        return anyio.run(read)

    def lines(self, job_id: str, cursor: bytes | None = None) -> list[bytes]:
        """Return the lines that are readable now."""
        return [line for page in self.pages(job_id, cursor) for line in page.lines]

    def cancel(self, job_id: str) -> JobStatus:
        """Cancel a job."""
        return anyio.run(self.service.cancel, job_id)

    def lose(self, job_id: str) -> JobStatus:
        """Kill a job's supervisor and return the status that is left."""
        os.kill(self.state(job_id)["supervisor_pid"], signal.SIGKILL)
        return until(lambda: (job := self.service.status(job_id)).state is JobState.LOST and job)
