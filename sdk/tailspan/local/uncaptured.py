"""Running a command without capturing it, when something is wrong with Tailspan: the job always runs.

Standard library only: `tailspan run` falls back to this whatever is missing.
"""

from __future__ import annotations

import os
import time

from tailspan.local.attached import TIMED_OUT, passed_on, stop_this_process
from tailspan.local.command_process import execute, restore_dispositions
from tailspan.local.process_tree import adopt_orphans, live_descendants, signal_descendants

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from typing import NoReturn

    from tailspan.local.launch import CallerState
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = ["run_detached", "run_uncaptured"]

_GRACE_S = 10.0
_CHECK_S = 0.05


def run_uncaptured(command: Sequence[str], *, caller: CallerState, timeout_s: float | None = None) -> int:
    """Become the command; with a timeout, run it and return its exit code.

    Args:
        command: The command and its arguments.
        caller: What the command inherits.
        timeout_s: After this many seconds it is ended, with all its descendants; None: never.

    Returns:
        The exit code, 124 after a timeout.
    """
    if timeout_s is None or not hasattr(signal, "sigtimedwait"):
        _become(command, caller)
    signals = passed_on(caller.ignored)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    adopt_orphans()
    pid = os.fork()
    if pid == 0:
        _become(command, caller)
    deadline = time.monotonic() + timeout_s
    timed_out = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if timed_out:
                _end_all(deadline)
                return TIMED_OUT
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        left = deadline - time.monotonic()
        if left <= 0:
            signal_descendants(os.getpid(), signal.SIGKILL if timed_out else signal.SIGTERM)
            signal_descendants(os.getpid(), signal.SIGCONT)
            deadline += _CHECK_S if timed_out else _GRACE_S
            timed_out = True
            continue
        got = signal.sigtimedwait(signals, left)
        if time.monotonic() >= deadline:
            # After a stop that outlasts the timeout, CPython returns a signal that never came.
            continue
        if got is not None and got.si_code <= 0 and got.si_signo != signal.SIGCHLD:
            os.kill(pid, got.si_signo)
        if got is not None and got.si_signo == signal.SIGTSTP:
            stop_this_process()


def run_detached(command: Sequence[str], *, caller: CallerState) -> None:
    """Start the command in the background, in a session of its own, without input and output.

    Args:
        command: The command and its arguments.
        caller: What the command inherits.
    """
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2) if not os.isatty(0) else (0, 1, 2):
        os.dup2(null_fd, fd)
    _become(command, caller)


def _become(command: Sequence[str], caller: CallerState) -> NoReturn:
    restore_dispositions(caller.ignored)
    signal.pthread_sigmask(signal.SIG_SETMASK, caller.mask)
    argv = [os.fsencode(argument) for argument in command]
    execute(argv, {os.fsencode(key): os.fsencode(value) for key, value in caller.environment.items()})


def _end_all(deadline: float) -> None:
    while live_descendants(os.getpid()):
        if time.monotonic() > deadline:
            signal_descendants(os.getpid(), signal.SIGKILL)
        time.sleep(_CHECK_S)
