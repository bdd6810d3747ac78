"""A Ray dashboard as far as `RayService` uses it, with what was measured of the real one (2.60.0).

A WebSocket sends the log from its start, ten lines a message, in text mode: CR LF and CR become LF, and bytes that are
not UTF-8 end it. It is closed once the job has ended and nothing more has come for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.fakes.json_api import FakeJsonApi, FakeSocket

__all__ = ["FakeRay"]

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_WAIT_S = 0.02


class FakeRay(FakeJsonApi):
    """The server. A context manager.

    Attributes:
        start_ms: When it began; jobs are submitted then.
        jobs: What the API returns of each job.
        logs: The log of each job.
        session: The name of the session; its log files are below ``temp_dir``.
        break_after: The next WebSockets break after so many messages; 0: not at all. Used up one by one.
    """

    def __init__(self, temp_dir: Path | None = None) -> None:
        super().__init__()
        self.start_ms = int(time.time() * 1000)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, bytearray] = {}
        self.session = "session_2026-11-29_10-00-00_1_1"
        self.break_after: list[int] = []
        self.temp_dir = temp_dir
        self._is_over = False
        self._folder = temp_dir / self.session / "logs" if temp_dir is not None else None
        if self._folder is not None:
            self._folder.mkdir(parents=True)

    def __exit__(self, *error: Any) -> None:
        self._is_over = True
        super().__exit__(*error)

    def add_job(self, job_id: str, status: str = "RUNNING", **more: Any) -> str:
        """Add a job."""
        self.jobs[job_id] = {
            "type": "SUBMISSION",
            "job_id": None,
            "submission_id": job_id,
            "status": status,
            "entrypoint": "python -u train.py --epochs 3",
            "message": "Job is currently running.",
            "error_type": None,
            "start_time": self.start_ms,
            "end_time": None,
            "metadata": None,
            "runtime_env": None,
            "driver_node_id": "0a1b",
            "driver_exit_code": None,
            **more,
        }
        self.logs[job_id] = bytearray()
        return job_id

    def write(self, job_id: str, text: str | bytes) -> None:
        """Append to the log of a job, and to its file if there is one."""
        data = text.encode() if isinstance(text, str) else text
        with self.lock:
            self.logs[job_id] += data
        if self._folder is not None:
            with (self._folder / f"job-driver-{job_id}.log").open("ab") as file:
                file.write(data)

    def end(self, job_id: str, status: str = "SUCCEEDED", code: int | None = 0, **more: Any) -> None:
        """End a job."""
        with self.lock:
            self.jobs[job_id] |= {
                "status": status,
                "end_time": int(time.time() * 1000),
                "driver_exit_code": code,
                **more,
            }

    def reply(self, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, object]:
        """Return the reply to a request; see the module."""
        match path.strip("/").split("/")[1:]:
            case ["version"]:
                return 200, {"ray_version": "2.60.0", "session_name": self.session}
            case ["jobs"] if method == "POST":
                job_id = body["submission_id"]
                if job_id in self.jobs:
                    return 500, f"Traceback ...\nValueError: Job with submission_id {job_id} already exists."
                more = {key: body.get(key) for key in ("entrypoint", "metadata", "runtime_env")}
                return 200, {"submission_id": self.add_job(job_id, "PENDING", **more)}
            case ["jobs"]:
                return 200, list(self.jobs.values())
            case ["jobs", job_id] if job_id in self.jobs:
                return 200, self.jobs[job_id]
            case ["jobs", job_id, "stop"] if job_id in self.jobs:
                if self.jobs[job_id]["status"] in _ENDED:
                    return 200, {"stopped": False}
                self.end(job_id, "STOPPED", None)
                return 200, {"stopped": True}
        return 404, f"Job {path.split('/')[3]} does not exist"

    def upgrade(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request for a WebSocket, which has the token in its header."""
        refused = self.refuse(request.path, request.headers.get("authorization", ""))
        if refused is not None:
            with self.lock:
                self.socket_refusals.append(refused[0])
        super().upgrade(request)

    def serve_socket(self, path: str, socket: FakeSocket) -> None:
        """Send the log of a job; see the module."""
        job_id = path.split("/")[3]
        with self.lock:
            breaks = self.break_after.pop(0) if self.break_after else 0
        try:
            for number, message in enumerate(self._messages(job_id), 1):
                socket.send_text(message)
                if number == breaks or self.away:
                    socket.close(1011)
                    return
            socket.close(1011 if self.away else 1000)
        except UnicodeDecodeError:
            socket.close(1011)

    def _messages(self, job_id: str) -> Iterator[bytes]:
        sent, idle = 0, 0
        while idle < 3 and not self._is_over and not self.away:
            with self.lock:
                text = bytes(self.logs[job_id]).decode().replace("\r\n", "\n").replace("\r", "\n").encode()
                ended = self.jobs[job_id]["status"] in _ENDED
            lines = text[sent:].splitlines(keepends=True)[:10]
            if lines:
                message = b"".join(lines)
                sent, idle = sent + len(message), 0
                yield message
            else:
                idle += ended
                time.sleep(_WAIT_S)
