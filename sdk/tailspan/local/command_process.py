"""Starting a job's command as a process group of its own, between two pipes.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import NamedTuple, NoReturn

__all__ = ["NotStartedError", "Started", "start"]

_PR_SET_PDEATHSIG = 1


class Started(NamedTuple):
    """A command that runs.

    Attributes:
        pid: Its process, and the group of all that it starts.
        stdout_fd: Read end of its standard output.
        stderr_fd: Read end of its standard error.
    """

    pid: int
    stdout_fd: int
    stderr_fd: int


class NotStartedError(Exception):
    """The command cannot be executed.

    Attributes:
        exit_code: What a shell would return: 127 when it was not found, else 126.
    """

    def __init__(self, command: str, number: int) -> None:
        reason = {
            errno.ENOENT: "command not found (or the interpreter that its first line names)",
            errno.ENOEXEC: "not a program; a script needs a first line such as #!/bin/sh",
        }.get(number, f"cannot be executed: {os.strerror(number)}")
        super().__init__(f"{command}: {reason}")
        self.exit_code = 127 if number == errno.ENOENT else 126


def start(argv: list[bytes], env: dict[bytes, bytes]) -> Started:
    """Execute a command in the present directory, with the present standard input.

    Args:
        argv: The command and its arguments.
        env: Its whole environment; its ``PATH`` finds the command.

    Raises:
        NotStartedError: It cannot be executed.
    """
    stdout_fd, stdout_child = os.pipe()
    stderr_fd, stderr_child = os.pipe()
    failed_fd, failed_child = os.pipe()
    supervisor_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(argv, env, stdout_child, stderr_child, failed_child, supervisor_pid)
    for fd in (stdout_child, stderr_child, failed_child):
        os.close(fd)
    # Executing closes the pipe; what arrives is why it did not come to that.
    with open(failed_fd, "rb") as pipe:
        failure = pipe.read()
    if not failure:
        return Started(pid, stdout_fd, stderr_fd)
    os.waitpid(pid, 0)
    raise NotStartedError(os.fsdecode(argv[0]), int(failure))


def _become(
    argv: list[bytes], env: dict[bytes, bytes], stdout_fd: int, stderr_fd: int, failed_fd: int, supervisor_pid: int
) -> NoReturn:
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in range(1, signal.NSIG):
            _restore(number)
        os.dup2(stdout_fd, 1)
        os.dup2(stderr_fd, 2)
        _die_with(supervisor_pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvpe(argv[0], argv, env)  # noqa: S606 - running commands is what a job runner is for
    except OSError as error:
        os.write(failed_fd, str(error.errno or errno.EINVAL).encode())
    finally:
        os._exit(127)


def _restore(number: int) -> None:
    """Take back what the interpreter and the supervisor have set: a command expects to die of a closed pipe."""
    try:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    except (OSError, ValueError):
        # SIGKILL, SIGSTOP and the C library's own signals.
        pass


def _die_with(supervisor_pid: int) -> None:
    """Have the kernel kill the command when its supervisor is killed: nobody would read its output any more."""
    if sys.platform != "linux":
        return
    try:
        # Here only, in the child: the supervisor stays small without it.
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (ImportError, OSError, AttributeError):
        return
    if os.getppid() != supervisor_pid:
        # It died before we could ask.
        os._exit(128 + signal.SIGKILL)
