"""Starting a job: its directory, its supervisor, and word from it that the command runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import marshal
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailspan._identity import span_id, trace_id
from tailspan.errors import ConfigError, ServiceUnavailableError
from tailspan.local.command_line import default_name, redact_command
from tailspan.local.environment import job_environment, parent_of
from tailspan.local.state import iso_time, write_state
from tailspan.local.store import JobStore, new_job_id

__all__ = ["Launched", "Request", "launch", "standard_fds_taken"]

_START_TIMEOUT_S = 60.0
_MAX_NAME_CHARS = 200
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from tailspan.local.supervisor import main; main(*map(int, sys.argv[2:5]))"
)
# glibc would give the memory of each 256 KiB that the supervisor reads back to the system: each read then cost up to 95
# page faults, a third of the supervisor's time. Source: mallopt(3). The job gets an environment of its own.
_SUPERVISOR_ENVIRON = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 21)}

# A fork in another thread must not copy a lock or a pipe that is on its way to a supervisor: the lock would outlive the
# supervisor, and the pipe would never end.
_no_fork = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run, and how.

    Attributes:
        command: The command and its arguments.
        name: The job's name; None: taken from the command.
        attributes: What the user attaches to the job.
        timeout_s: After so many seconds it is ended; None: never.
        cwd: Its directory; None: the present one.
        env: Its environment, on top of the present one.
        stdin_fd: Its standard input; None: nothing to read.
        show: Where to show its standard output and its standard error as they come.
    """

    command: Sequence[str]
    name: str | None = None
    attributes: Mapping[str, str] | None = None
    timeout_s: float | None = None
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    stdin_fd: int | None = None
    show: tuple[int | None, int | None] = (None, None)

    def __post_init__(self) -> None:
        """Check what can be checked before anything is made.

        Raises:
            ConfigError: Something is not usable.
        """
        if isinstance(self.command, str) or not self.command or not all(isinstance(a, str) for a in self.command):
            raise ConfigError("the command must be a list of texts: the program, then its arguments", key="command")
        if not self.command[0] or any("\0" in argument for argument in self.command):
            raise ConfigError("the command has no program, or an argument has a NUL character", key="command")
        if self.name is not None and (
            not self.name.strip() or len(self.name) > _MAX_NAME_CHARS or not self.name.isprintable()
        ):
            raise ConfigError(f"a job's name is 1 to {_MAX_NAME_CHARS} printable characters", key="name")
        for key, value in (self.attributes or {}).items():
            if not key or not isinstance(key, str) or not isinstance(value, str):
                raise ConfigError(f"attribute {key!r}: key and value must be text", key="attributes")
        if self.timeout_s is not None and not 0 < self.timeout_s < float("inf"):
            raise ConfigError("the timeout must be more than 0 seconds", key="timeout")
        for key, value in (self.env or {}).items():
            if not key or "=" in key or "\0" in key + value:
                raise ConfigError(f"{key!r} cannot be an environment variable", key="env")
        if self.cwd is not None and not os.path.isdir(self.cwd):
            raise ConfigError(f"{self.cwd} is not a directory", key="cwd")


class Launched:
    """A job whose supervisor has answered. Close it, or use it as the place to wait for the job's end.

    Attributes:
        job_id: The job.
        supervisor_pid: Its supervisor, to be sent SIGTERM (cancel) or SIGINT (kill now).
        status_fd: Readable when the job has ended or its supervisor is gone.
    """

    def __init__(self, job_id: str, supervisor_pid: int, status_fd: int) -> None:
        self.job_id = job_id
        self.supervisor_pid = supervisor_pid
        self.status_fd = status_fd

    def close(self) -> None:
        """Stop listening; the supervisor then also stops showing output."""
        os.close(self.status_fd)


def launch(store: JobStore, request: Request, *, otlp: Mapping[str, str], grace_s: float) -> Launched:
    """Start a job and return once its command runs, or cannot be executed (then the job has failed).

    Args:
        store: Where its files shall be.
        request: What to run.
        otlp: ``OTEL_EXPORTER_OTLP_*`` variables for a program that was given no endpoint.
        grace_s: Between SIGTERM and SIGKILL, in seconds.

    Raises:
        ServiceUnavailableError: The supervisor did not start.
        OSError: The files could not be made.
    """
    now = time.time_ns()
    job_id = new_job_id(now)
    name = request.name or default_name(request.command)[:_MAX_NAME_CHARS]
    inherited = {**os.environ, **(request.env or {})}
    cwd = os.path.abspath(request.cwd) if request.cwd is not None else _present_directory()
    trace = trace_id(store.identity, job_id)
    job = {
        "version": 1,
        "id": job_id,
        "name": name,
        "command": redact_command(request.command),
        "cwd": cwd,
        "host": os.uname().nodename,
        "user": _user(),
        "attributes": dict(request.attributes or {}),
        "timeout_s": request.timeout_s,
        "submitted_at": iso_time(now),
        "identity": store.identity,
        "trace_id": trace,
        "parent": parent_of(inherited),
    }
    environment = job_environment(
        inherited,
        job_id=job_id,
        name=name,
        trace_id=trace,
        span_id=span_id(store.identity, job_id, "executing"),
        otlp=otlp,
    )
    spec = {
        "argv": [os.fsencode(argument) for argument in request.command],
        "env": {os.fsencode(key): os.fsencode(value) for key, value in environment.items()},
        "name": name,
        "timeout_s": request.timeout_s,
        "grace_s": grace_s,
        "file_mode": store.file_mode,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(standard_fds_taken())
        show = [None if fd is None else _closing(stack, os.dup(fd)) for fd in request.show]
        with _no_fork:
            process, spec_fd, status_fd = _spawn(store, job, request, show)
        try:
            # More than a pipe holds; the supervisor's death ends it.
            with open(spec_fd, "wb") as pipe:
                pipe.write(marshal.dumps({**spec, "show": show}))
        except BrokenPipeError:
            # What it said before it died stands in the status pipe.
            pass
        process.wait()
    try:
        return Launched(job_id, _wait_started(status_fd, job_id), status_fd)
    except BaseException:
        os.close(status_fd)
        raise


def _spawn(
    store: JobStore, job: Mapping[str, Any], request: Request, show: Sequence[int | None]
) -> tuple[subprocess.Popen[bytes], int, int]:
    """Make the job's files and start its supervisor; return where to send what to run, and where it answers."""
    job_id = job["id"]
    with contextlib.ExitStack() as stack:
        lock_fd = _closing(stack, store.create(job_id, job))
        job_fd = _closing(stack, os.open(store.directory(job_id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        spec_child, spec_fd = os.pipe()
        stack.callback(os.close, spec_child)
        status_fd, status_child = os.pipe()
        stack.callback(os.close, status_child)
        handed = (job_fd, spec_child, lock_fd)
        arguments = [str(Path(__file__).parents[2]), *map(str, handed)]
        try:
            process = subprocess.Popen(
                # Id and name are for whoever reads the process list.
                [sys.executable, "-I", "-S", "-c", _BOOT, *arguments, job_id, job["name"]],
                stdin=subprocess.DEVNULL if request.stdin_fd is None else request.stdin_fd,
                stdout=subprocess.DEVNULL,
                stderr=status_child,
                cwd=job["cwd"] or None,
                env=os.environ | _SUPERVISOR_ENVIRON,
                pass_fds=(*handed, *(fd for fd in show if fd is not None)),
                start_new_session=True,
            )
        except BaseException as error:
            os.close(spec_fd)
            os.close(status_fd)
            # A run that was asked for must not vanish: whoever watches shall see that it failed.
            end = {"finished_at": job["submitted_at"], "end": job["submitted_at"], "lines": 0, "bytes": 0}
            reason = f"it could not be started: {error}"
            write_state(job_fd, {"state": "FAILED", "name": job["name"], "error": reason, **end}, store.file_mode)
            raise
    return process, spec_fd, status_fd


@contextlib.contextmanager
def standard_fds_taken() -> Iterator[None]:
    """Where 0, 1 or 2 are closed, keep files of ours from getting these numbers: a child has others under them."""
    taken: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            taken.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in taken:
            os.close(fd)


def _closing(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _wait_started(status_fd: int, job_id: str) -> int:
    """Return the supervisor's process id, once it says that the command runs or cannot be executed."""
    said = b""
    poller = select.poll()
    poller.register(status_fd, select.POLLIN)
    while not said.endswith(b"\n"):
        ready = poller.poll(_START_TIMEOUT_S * 1000)
        part = os.read(status_fd, 1) if ready else b""
        if not part:
            break
        said += part
    try:
        return int(json.loads(said)["supervisor_pid"])
    except (ValueError, KeyError, TypeError):
        while part := os.read(status_fd, 4096):
            said += part
        words = said.decode("utf-8", "replace").strip()
        raise ServiceUnavailableError(
            f"the supervisor of job {job_id} did not start: {words or 'it said nothing'}", job_id=job_id
        ) from None


def _present_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        # It was removed; a command may run there all the same.
        return ""


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        # Containers run under numbers that have no name.
        return str(os.geteuid())
