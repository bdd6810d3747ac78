"""Starting a job: its directory, its supervisor, and the report from it that the command runs.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import marshal
import os
import select
import sys
import time

from tailspan._identity import span_id, trace_id
from tailspan.errors import ConfigError, ServiceUnavailableError
from tailspan.local.command_line import default_name, redact_attributes, redact_command, redact_name
from tailspan.local.environment import job_environment, parent_of
from tailspan.local.process_tree import DETACHED
from tailspan.local.state import iso_time, sync_file, write_state
from tailspan.local.state_dir import StateDir, new_job_id
from tailspan.local.terminal import is_terminal, open_like

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = [
    "CallerState",
    "Launched",
    "MaybeStartedError",
    "Request",
    "check_encoding",
    "launch",
    "take_standard_fds",
]

_START_TIMEOUT_S = 60.0
_MAX_NAME_CHARS = 200
_BOOT = (
    "import gc, sys; gc.disable(); sys.path.append(sys.argv[1]); "
    "from tailspan.local.supervisor import main; main(*map(int, sys.argv[2:5]))"
)
# glibc would give the memory of each 256 KiB that the supervisor reads back to the system: each read then cost up to 95
# page faults, a third of the supervisor's time. Source: mallopt(3). The job gets an environment of its own.
_SUPERVISOR_ENVIRON = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 21)}
# Characters that `str.isprintable` refuses although people's names and words have them.
_ALLOWED = (
    "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200c\u200d\u202f\u205f\u3000"
)


# A fork in another thread must not copy a lock or a pipe that is on its way to a supervisor: the lock would outlive the
# supervisor, and the pipe would never end.
_no_fork = _thread.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


class MaybeStartedError(ServiceUnavailableError):
    """The supervisor ended while it started the command, which must not be started a second time."""


class CallerState:
    """What a command inherits besides files, as the process that starts the job found it.

    Attributes:
        ignored: The signals that are ignored.
        mask: The signals that are blocked.
        environment: The environment.
    """

    def __init__(self) -> None:
        """Read the state of this process."""
        self.ignored = [number for number in range(1, signal.NSIG) if _is_ignored(number)]
        self.mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        self.environment = _caller_environment()


class Request:
    """What to run, and how. Immutable.

    Attributes:
        command: The command and its arguments.
        name: The job's name; None: taken from the command.
        attributes: What the user attaches to the job.
        timeout_s: After this many seconds it is ended; None: never.
        cwd: Its directory; None: the present one.
        env: Its environment, on top of the present one.
        stdin_fd: Its standard input; None: nothing to read.
        show: Where to relay its standard output and its standard error as they come.
        attached: Whether it stays in the session and process group of this process, and inherits its open files.
        inherit: Whether it inherits the open files of this process; always where it is attached.
        terminal: Whether an output that is relayed to a terminal becomes a pseudo-terminal.
        encoding: The codec of its output, which is captured as UTF-8; None: captured as it is.
        attempt: 1, or the number of this attempt.
        retry_of: The id of the job that was the attempt before.
    """

    __slots__ = (
        "attached",
        "attempt",
        "attributes",
        "command",
        "cwd",
        "encoding",
        "env",
        "inherit",
        "name",
        "retry_of",
        "show",
        "stdin_fd",
        "terminal",
        "timeout_s",
    )

    def __init__(
        self,
        *,
        command: Sequence[str],
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin_fd: int | None = None,
        show: tuple[int | None, int | None] = (None, None),
        attached: bool = False,
        inherit: bool = False,
        terminal: bool = True,
        encoding: str | None = None,
        attempt: int = 1,
        retry_of: str | None = None,
    ) -> None:
        """Check what can be checked before anything is made.

        Raises:
            ConfigError: Something is not usable.
        """
        self.command = command
        self.name = name
        self.attributes = attributes
        self.timeout_s = timeout_s
        self.cwd = cwd
        self.env = env
        self.stdin_fd = stdin_fd
        self.show = show
        self.attached = attached
        self.inherit = inherit or attached
        self.terminal = terminal
        self.encoding = encoding
        self.attempt = attempt
        self.retry_of = retry_of
        self._check_command()
        self._check_options()

    def _check_command(self) -> None:
        if isinstance(self.command, str) or not self.command or not all(isinstance(a, str) for a in self.command):
            raise ConfigError("the command must be a list of texts: the program, then its arguments", key="command")
        # `tailspan run -- "$UNSET"` is a command that is not found, as in a shell.
        if not (self.command[0] or self.inherit) or any("\0" in argument for argument in self.command):
            raise ConfigError("the command has no program, or an argument has a NUL character", key="command")

    def _check_options(self) -> None:
        if self.name is not None:
            _check_name(self.name)
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
        if self.encoding is not None:
            check_encoding(self.encoding)


def check_encoding(encoding: str) -> None:
    """Check that a name is a codec of text.

    Raises:
        ConfigError: It is not.
    """
    import codecs

    try:
        codecs.getincrementaldecoder(encoding)("replace").decode(b"")
        "".encode(encoding)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError):
        raise ConfigError(
            f"{encoding!r} is not a known encoding: use a name such as latin-1, cp1252, shift_jis, gbk or utf-16",
            key="encoding",
        ) from None


def _check_name(name: str) -> None:
    refused = next((char for char in name if not char.isprintable() and char not in _ALLOWED), None)
    if refused is not None:
        raise ConfigError(f"a job's name must not have the character U+{ord(refused):04X}", key="name")
    if not name.strip() or len(name) > _MAX_NAME_CHARS:
        raise ConfigError(f"a job's name has 1 to {_MAX_NAME_CHARS} characters, and not only spaces", key="name")


class Launched:
    """A job whose supervisor has answered. Close it, or use it as the place to wait for the job's end.

    Attributes:
        job_id: The job.
        supervisor_pid: Its supervisor, to be sent SIGTERM (cancel) or SIGINT (kill now).
        status_fd: A socket: readable when the job has ended or its supervisor is gone; takes signals for the job.
        terminals: The caller's terminals, each with the job's pseudo-terminal that follows its size.
    """

    def __init__(
        self, job_id: str, supervisor_pid: int, status_fd: int, terminals: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.job_id = job_id
        self.supervisor_pid = supervisor_pid
        self.status_fd = status_fd
        self.terminals = terminals

    def close(self) -> None:
        """Stop listening; the supervisor then also stops relaying output."""
        os.close(self.status_fd)
        _close_pairs(self.terminals)


def launch(
    place: StateDir,
    request: Request,
    *,
    otlp: Mapping[str, str],
    grace_s: float,
    caller: CallerState | None = None,
    on_id: Callable[[str], None] | None = None,
    discard: bool = False,
) -> Launched:
    """Start a job and return once its command runs, or cannot be executed (then the job fails).

    Args:
        place: Where its files are made.
        request: What to run.
        otlp: ``OTEL_EXPORTER_OTLP_*`` variables for a program that was given no endpoint.
        grace_s: Between SIGTERM and SIGKILL, in seconds.
        caller: What the command inherits; None: the state of this process.
        on_id: Called with the job's id before the command runs.
        discard: Whether nothing must remain of a job that did not start: its command then runs without us.

    Raises:
        ServiceUnavailableError: The supervisor did not start.
        MaybeStartedError: The supervisor ended while it started the command.
        OSError: The files could not be made.
    """
    now = time.time_ns()
    job_id = new_job_id(now)
    inherited = {**(os.environ if caller is None else caller.environment), **(request.env or {})}
    job = _job_of(place, request, job_id, now, inherited)
    name: str = job["name"]
    taken = take_standard_fds()
    fds = list(taken)
    terminals: list[tuple[int, int]] = []
    try:
        outputs = _outputs(request, fds, terminals)
        environment = job_environment(
            inherited,
            job_id=job_id,
            name=name,
            trace_id=job["trace_id"],
            span_id=span_id(job["identity"], job_id, "executing", request.attempt),
            otlp=otlp,
            attributes=job["attributes"],
            python_context=_can_nest(request.command[0], inherited),
            unbuffered=any(output[2] is None for output in outputs),
        )
        caller = caller or CallerState()
        spec = {
            "argv": [os.fsencode(argument) for argument in request.command],
            "env": {os.fsencode(key): os.fsencode(value) for key, value in environment.items()},
            "name": name,
            "timeout_s": request.timeout_s,
            "grace_s": grace_s,
            "file_mode": place.file_mode,
            "attached": request.attached,
            "inherit": request.inherit,
            "encoding": request.encoding,
            "cwd": None if request.cwd is None else os.fsencode(job["cwd"]),
            "outputs": outputs,
            "closed": _closed(request),
            "ignored": caller.ignored,
            "mask": caller.mask,
        }
        status_fd = _start_supervisor(place, job, request, spec, on_id)
    except BaseException:
        _close_pairs(terminals)
        if discard:
            place.discard(job_id)
        raise
    finally:
        for fd in fds:
            os.close(fd)
    try:
        return Launched(job_id, _wait_started(status_fd, job_id), status_fd, terminals)
    except BaseException as error:
        os.close(status_fd)
        _close_pairs(terminals)
        if discard and not isinstance(error, MaybeStartedError):
            place.discard(job_id)
        raise


def _close_pairs(pairs: Sequence[tuple[int, int]]) -> None:
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def _job_of(place: StateDir, request: Request, job_id: str, now: int, inherited: Mapping[str, str]) -> dict[str, Any]:
    """Return ``job.json``."""
    identity = place.identity()
    return {
        "version": 1,
        "id": job_id,
        "name": redact_name(request.name or default_name(request.command))[:_MAX_NAME_CHARS],
        "command": redact_command(request.command),
        "cwd": os.path.abspath(request.cwd) if request.cwd is not None else _present_directory(),
        "host": os.uname().nodename,
        "user": _user(),
        "attributes": redact_attributes(request.attributes or {}),
        "timeout_s": request.timeout_s,
        "submitted_at": iso_time(now),
        "identity": identity,
        "trace_id": trace_id(identity, job_id, request.attempt),
        "parent": parent_of(inherited),
        # Older readers know neither.
        **({"attempt": request.attempt, "retry_of": request.retry_of} if request.retry_of is not None else {}),
    }


def _outputs(
    request: Request, fds: list[int], terminals: list[tuple[int, int]]
) -> list[tuple[int, tuple[int, ...], int | None, int | None, int | None]]:
    """Return the output streams, as `tailspan.local.command_process.Output` describes them.

    Args:
        request: What to run.
        fds: Takes what is to be closed in this process.
        terminals: Takes the caller's terminals, each with the pseudo-terminal that follows its size.
    """
    out, err = request.show
    if out is not None and err is not None and _is_same(out, err):
        # One pipe keeps the order of all lines, and nothing is lost: its reader could not distinguish the streams.
        streams: list[tuple[int, tuple[int, ...], int | None]] = [(0, (1, 2), out)]
    else:
        streams = [(1, (1,), out), (2, (2,), err)]
    closed = _closed(request)
    streams = [stream for stream in streams if stream[1][0] not in closed]
    outputs = []
    for number, targets, relay in streams:
        pair = open_like(relay) if relay is not None and request.terminal and is_terminal(relay) else None
        master = slave = None
        if pair is not None and relay is not None:
            master, slave = pair
            fds += (slave,)
            terminals.append((os.dup(relay), master))
        copy = None
        if relay is not None and _takes_nothing(relay):
            # The job gets the error itself, and there is nothing to capture.
            master, write_fd = os.pipe()
            os.close(write_fd)
            slave = os.dup(relay)
            fds += (master, slave)
        elif relay is not None:
            copy = os.dup(relay)
            fds.append(copy)
        outputs.append((number, targets, master, slave, copy))
    return outputs


def _takes_nothing(fd: int) -> bool:
    """Return whether each write fails, as to ``/dev/full``."""
    try:
        os.write(fd, b"")
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


def _closed(request: Request) -> list[int]:
    """Return which of 0, 1 and 2 the caller has closed: they are closed for its job, too."""
    if not request.attached:
        return []
    return [target for target, fd in enumerate((request.stdin_fd, *request.show)) if fd is None]


def _is_same(out: int, err: int) -> bool:
    """Return whether two file descriptors lead to the same pipe, file or terminal."""
    one, other = os.fstat(out), os.fstat(err)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino) and (
        one.st_rdev == 0 or is_terminal(out)  # not /dev/null
    )


def _start_supervisor(
    place: StateDir,
    job: Mapping[str, Any],
    request: Request,
    spec: dict[str, Any],
    on_id: Callable[[str], None] | None,
) -> int:
    """Make the job's files, start its supervisor and give it what to run; return the status socket."""
    with _no_fork:
        pid, spec_fd, status_fd = _spawn(place, job, request, spec)
    if on_id is not None:
        on_id(job["id"])
    try:
        # More than a pipe holds; the supervisor's death ends it.
        with open(spec_fd, "wb") as pipe:
            pipe.write(marshal.dumps(spec))
    except BrokenPipeError:
        # What it wrote before it died stands in the status socket.
        pass
    if request.attached:
        # While the supervisor's interpreter starts: neither the job's first line nor its end waits for the disk.
        sync_file(f"{place.jobs}/{job['id']}/job.json")
    else:
        os.waitpid(pid, 0)
    return status_fd


def _spawn(place: StateDir, job: Mapping[str, Any], request: Request, spec: dict[str, Any]) -> tuple[int, int, int]:
    """Return the supervisor's process, the pipe for what to run, and the status socket."""
    job_id = job["id"]
    fds: list[int] = []
    status_fd = spec_fd = -1
    try:
        fds.append(place.create(job_id, job))
        job_fd = os.open(f"{place.jobs}/{job_id}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fds.append(job_fd)
        spec_child, spec_fd = os.pipe()
        fds.append(spec_child)
        status_fd, status_child = _socket_pair()
        fds.append(status_child)
        stdin_fd, null_fd = request.stdin_fd, os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        fds.append(null_fd)
        handed = (job_fd, spec_child, fds[0])
        kept = (*handed, *(fd for output in spec["outputs"] for fd in output[2:] if fd is not None))
        pid = _spawn_interpreter(
            [*map(str, handed), "attached" if request.attached else DETACHED, job_id, job["name"]],
            [(null_fd if stdin_fd is None else stdin_fd, 0), (null_fd, 1), (status_child, 2)],
            kept,
            request,
        )
    except BaseException as error:
        for fd in (spec_fd, status_fd):
            if fd >= 0:
                os.close(fd)
        if len(fds) > 1:
            # A run that was asked for must not vanish: its status says that it failed.
            end = {"finished_at": job["submitted_at"], "end": job["submitted_at"], "lines": 0, "bytes": 0}
            reason = f"it could not be started: {error}"
            write_state(job_fd, {"state": "FAILED", "name": job["name"], "error": reason, **end}, place.file_mode)
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return pid, spec_fd, status_fd


def _spawn_interpreter(
    arguments: list[str], standard: list[tuple[int, int]], kept: Sequence[int], request: Request
) -> int:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in standard]
    # Onto itself: it stays open in the new process.
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept]
    return os.posix_spawn(
        sys.executable,
        # Id and name are for readers of the process list.
        [sys.executable, "-I", "-S", "-c", _BOOT, root, *arguments],
        os.environ | _SUPERVISOR_ENVIRON,
        file_actions=actions,
        setsid=not request.attached,
        setsigmask=signal.valid_signals(),
    )


def _socket_pair() -> tuple[int, int]:
    # Not by `socket`, whose import costs 5 ms.
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    return ours.detach(), theirs.detach()


def take_standard_fds() -> list[int]:
    """Where 0, 1 or 2 are closed, take these numbers, so that no file of ours gets them: a child has others there.

    Returns:
        The file descriptors to be closed afterwards.
    """
    taken: list[int] = []
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        taken.append(fd)
    os.close(fd)
    return taken


def _wait_started(status_fd: int, job_id: str) -> int:
    """Return the supervisor's process id, once it reports that the command runs or cannot be executed."""
    said = b""
    forking = False
    poller = select.poll()
    poller.register(status_fd, select.POLLIN)
    while b'"started"' not in said or not said.endswith(b"\n"):
        ready = poller.poll(_START_TIMEOUT_S * 1000)
        part = _receive(status_fd, 1) if ready else b""
        if not part:
            break
        said += part
        if said in (b'{"forking": true}\n', b'{"forking": false}\n'):
            forking, said = b"true" in said, b""
    _, key, number = said.partition(b'"supervisor_pid": ')
    if key and said.endswith(b"}\n") and number[:-2].isdigit():
        return int(number[:-2])
    while part := _receive(status_fd, 4096):
        said += part
    reason = said.decode("utf-8", "replace").strip() or "it said nothing"
    if reason.startswith("Traceback"):
        # All of it is in the job's `supervisor.err`.
        reason = reason.splitlines()[-1]
    kind = MaybeStartedError if forking else ServiceUnavailableError
    raise kind(f"the supervisor of job {job_id} did not start: {reason}", job_id=job_id)


def _receive(fd: int, size: int) -> bytes:
    try:
        return os.read(fd, size)
    except ConnectionResetError:
        return b""


def _caller_environment() -> dict[str, str]:
    """Return the environment without the LC_CTYPE that the interpreter sets in the C locale (PEP 538)."""
    environment = dict(os.environ)
    if environment.get("LC_CTYPE") not in ("C.UTF-8", "C.utf8", "UTF-8"):
        return environment
    try:
        with open("/proc/self/environ", "rb") as file:
            first = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    except OSError:
        return environment
    given = first.get(b"LC_CTYPE")
    if given is None:
        del environment["LC_CTYPE"]
    else:
        environment["LC_CTYPE"] = os.fsdecode(given)
    return environment


def _is_ignored(number: int) -> bool:
    if number in (signal.SIGPIPE, getattr(signal, "SIGXFSZ", signal.SIGPIPE)):
        # The interpreter ignores these itself.
        return _ignored_by_parent(number)
    try:
        return signal.getsignal(number) is signal.SIG_IGN
    except ValueError:
        return False


def _ignored_by_parent(number: int) -> bool:
    """Return whether the parent ignores a signal, as a shell after ``trap '' PIPE``; False for an interpreter."""
    parent = os.getppid()
    try:
        if os.path.basename(os.readlink(f"/proc/{parent}/exe")).startswith(("python", "pypy", "uv")):
            return False
        with open(f"/proc/{parent}/status", "rb") as file:
            _, found, rest = file.read().partition(b"\nSigIgn:")
        return bool(found) and bool(int(rest.split(None, 1)[0], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):
        return False


def _can_nest(program: str, environment: Mapping[str, str]) -> bool:
    """Return whether the Python of a command, its own or that of ``PATH``, has Tailspan and OpenTelemetry."""
    names = ("python", "python3")
    directories = environment.get("PATH", "").split(":")
    if "/" in program:
        directories = [os.path.dirname(program), *directories]
    for directory in directories:
        if any(os.path.exists(f"{directory}/{name}") for name in names):
            return _has_both(f"{directory}/../lib")
    return False


def _has_both(library: str) -> bool:
    try:
        versions = [name for name in os.listdir(library) if name.startswith(("python", "pypy"))]
        for version in versions:
            found = os.listdir(f"{library}/{version}/site-packages")
            wanted = {"tailspan-", "opentelemetry_api-"}
            if all(any(name.startswith(start) and name.endswith(".dist-info") for name in found) for start in wanted):
                return True
    except OSError:
        pass
    return False


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
