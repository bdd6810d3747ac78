"""Starting a job's command, with its output in pipes or in a pseudo-terminal.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import errno
import os
from collections import namedtuple

from tailspan.local.process_tree import die_with_parent, reset_internal_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Collection, Iterable
    from typing import NoReturn
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = [
    "NOT_EXECUTABLE",
    "NOT_FOUND",
    "Output",
    "Started",
    "execute",
    "failure_text",
    "restore_dispositions",
    "start",
]

NOT_FOUND = 127
NOT_EXECUTABLE = 126
_SHELL = b"/bin/sh"
_SPARE_FDS = 4
_SAMPLE_BYTES = 128
_DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"


class Output(namedtuple("Output", ("number", "targets", "master_fd", "slave_fd", "relay_fd"))):
    """Where one output stream of a job goes.

    Attributes:
        number: 1 stdout, 2 stderr, 0 both.
        targets: The file descriptors that it has in the job: 1, 2 or both.
        master_fd: The end of its pseudo-terminal to read from; None: it gets a pipe.
        slave_fd: The job's end of it.
        relay_fd: The caller's own output; None: it is captured only.
    """

    __slots__ = ()
    number: int
    targets: tuple[int, ...]
    master_fd: int | None
    slave_fd: int | None
    relay_fd: int | None


class Started(namedtuple("Started", ("pid", "read_fds", "failure"))):
    """A command that was started.

    Attributes:
        pid: Its process.
        read_fds: Where to read each of its outputs.
        failure: The errno with which it could not be executed; 0: it runs.
    """

    __slots__ = ()
    pid: int
    read_fds: list[int]
    failure: int


def start(
    argv: list[bytes],
    env: dict[bytes, bytes],
    outputs: list[Output],
    *,
    closed: Collection[int] = (),
    new_session: bool,
    on_pipes: Callable[[list[int]], None],
    on_fork: Callable[[bool], None],
    ignored: Collection[int] = (),
    mask: Iterable[int] = (),
) -> Started:
    """Execute a command in the present directory, with the present standard input.

    A command that cannot be executed says so on its standard error, as a shell would, and exits with 127 or 126.

    Args:
        argv: The command and its arguments.
        env: Its whole environment; its ``PATH`` finds the command.
        outputs: Where its output goes.
        closed: Which of 0, 1 and 2 are closed.
        new_session: Whether it gets a session of its own instead of the caller's.
        on_pipes: Called with where to read each of its outputs, before anything is written there.
        on_fork: Called with True when the command may start from now on, and with False when it did not.
        ignored: The signals that it ignores from its start.
        mask: The signals that are blocked at its start.

    Raises:
        OSError: The system has no room for its pipes or its process; it has not run.
    """
    pipes = [
        os.pipe() if output.master_fd is None or output.slave_fd is None else (output.master_fd, output.slave_fd)
        for output in outputs
    ]
    on_pipes([read_fd for read_fd, _ in pipes])
    failed_fd, failed_child = os.pipe()
    # What comes after the fork needs file descriptors, too, and must not fail then.
    for fd in [os.dup(failed_fd) for _ in range(_SPARE_FDS)]:
        os.close(fd)
    supervisor_pid = os.getpid()
    on_fork(True)
    try:
        pid = os.fork()
    except OSError:
        on_fork(False)
        raise
    if pid == 0:
        try:
            if new_session:
                os.setsid()
            signal.set_wakeup_fd(-1)
            restore_dispositions(ignored)
            for output, (_, write_fd) in zip(outputs, pipes, strict=True):
                for target in output.targets:
                    os.dup2(write_fd, target)
            for fd in closed:
                os.close(fd)
            die_with_parent(supervisor_pid)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            execute(argv, env, failed_child)
        finally:
            os._exit(NOT_FOUND)
    for _, write_fd in pipes:
        os.close(write_fd)
    os.close(failed_child)
    # Executing closes the pipe; what arrives is why it failed.
    with open(failed_fd, "rb") as pipe:
        failure = pipe.read()
    return Started(pid, [read_fd for read_fd, _ in pipes], int(failure or 0))


def execute(argv: list[bytes], env: dict[bytes, bytes], failed_fd: int | None = None) -> NoReturn:
    """Replace this process by a command, or say on standard error why that is not possible, and exit.

    Args:
        argv: The command and its arguments; a script without ``#!`` is run by the shell.
        env: Its whole environment; its ``PATH`` finds the command.
        failed_fd: Where to write the errno of a failure.
    """
    number = errno.ENOENT
    for path in _candidates(argv[0], env):
        try:
            os.execve(path, argv, env)  # noqa: S606 - running commands is what a job runner is for
        except OSError as error:
            found = error.errno or errno.EINVAL
            if found == errno.ENOEXEC and _is_text(path):
                found = _execute_by_shell(path, argv, env)
            if found not in (errno.ENOENT, errno.ENOTDIR) or (b"/" in argv[0]):
                # As in execvp(3): a match without permission counts only where no other directory has one.
                number = found
            if found not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                break
    if failed_fd is not None:
        os.write(failed_fd, str(number).encode())
    try:
        os.write(2, b"tailspan: " + _sentence(argv[0], number) + b"\n")
    except OSError:
        pass
    os._exit(NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE)


def failure_text(command: str, number: int) -> str:
    """Return why a command could not be executed, as a job's status says it.

    Args:
        command: Its program.
        number: The errno.
    """
    reason = {
        errno.ENOENT: "command not found (or the interpreter that its first line names)",
        errno.ENOEXEC: "not a program of this machine",
    }.get(number, f"cannot be executed: {os.strerror(number)}")
    return f"{command}: {reason}"


def _sentence(command: bytes, number: int) -> bytes:
    if number == errno.ENOENT and b"/" not in command:
        return command + b": command not found"
    if number == errno.ENOENT and os.path.exists(command):
        return command + b": cannot execute: required file not found"
    if os.path.isdir(command):
        return command + b": Is a directory"
    if number == errno.ENOEXEC:
        return command + b": cannot execute binary file: Exec format error"
    return command + b": " + os.strerror(number).encode()


def _candidates(program: bytes, env: dict[bytes, bytes]) -> list[bytes]:
    if b"/" in program:
        return [program]
    if not program:
        return []
    return [os.path.join(directory or b".", program) for directory in env.get(b"PATH", _DEFAULT_PATH).split(b":")]


def _is_text(path: bytes) -> bool:
    """Return whether a shell would run a file as a script: as in bash, by its first line."""
    try:
        with open(path, "rb") as file:
            start = file.read(_SAMPLE_BYTES)
    except OSError:
        return False
    return not start.startswith(b"\x7fELF") and b"\0" not in start.partition(b"\n")[0]


def _execute_by_shell(path: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> int:
    try:
        os.execve(_SHELL, [_SHELL, path, *argv[1:]], env)  # noqa: S606
    except OSError as error:
        return error.errno or errno.EINVAL


def restore_dispositions(ignored: Collection[int]) -> None:
    """Take back what interpreter and supervisor have set: a command expects to die of a closed pipe."""
    for number in range(1, signal.NSIG):
        wanted = signal.SIG_IGN if number in ignored else signal.SIG_DFL
        try:
            if signal.getsignal(number) is not wanted:
                signal.signal(number, wanted)
        except (OSError, ValueError):
            # SIGKILL, SIGSTOP and the C library's own signals.
            pass
    reset_internal_signals()
