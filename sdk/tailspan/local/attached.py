"""Running a job in the foreground: its output here, its input from here, and every signal passed on to it.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import os
import select
import sys

from tailspan.local.supervisor_events import Ended, read_events
from tailspan.local.terminal import copy_size, foreground_group

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from tailspan.local.launch import CallerState, Launched
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = [
    "OUR_ERROR",
    "TIMED_OUT",
    "block_signals",
    "exit_code_of",
    "follow",
    "open_or_none",
    "passed_on",
    "stop_this_process",
]

TIMED_OUT = 124
OUR_ERROR = 125
NOTED = 0x80
_PASSED_ON = (
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGWINCH", "SIGVTALRM", "SIGPROF",
    "SIGPWR", "SIGIO", "SIGURG", "SIGCHLD", "SIGINFO", "SIGTSTP", "SIGCONT",
)  # fmt: skip
_NOT_SENT = ("SIGIO", "SIGCHLD")
_CHECK_S = 1.0
_LAST_LINES_S = 10.0
_F_SETOWN_EX, _F_OWNER_TID = 15, 0  # fcntl(2) of Linux; not in the module fcntl


def passed_on(ignored: list[int]) -> set[int]:
    """Return the signals that a runner waits for: those that it passes on, and those that wake it.

    Args:
        ignored: Signals that are ignored, and stay so: ``nohup``.
    """
    names = [name for name in _PASSED_ON if hasattr(signal, name)]
    numbers = {int(getattr(signal, name)) for name in names}
    if hasattr(signal, "SIGRTMIN"):
        numbers |= set(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    return numbers - set(ignored)


def block_signals(caller: CallerState) -> set[int]:
    """Block the signals that `follow` waits for, so that none of them ends the runner while the job starts.

    Args:
        caller: What the command inherits.

    Returns:
        The signals that were blocked.
    """
    signals = passed_on(caller.ignored)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals


def follow(
    launched: Launched,
    signals: set[int],
    *,
    own_process: bool = False,
    on_end: Callable[[Ended], None] | None = None,
) -> int:
    r"""Stay in the foreground until a job has ended, and return what ``tailspan run`` exits with.

    The job is in the session and process group of this process, so a terminal sends Ctrl-C, Ctrl-\ and Ctrl-Z to it
    directly. Signals that other processes send to this one are passed on.

    Args:
        launched: The job.
        signals: What `block_signals` returned before the job was started.
        own_process: Whether this process does nothing else: it then lets go of its input and output, so that a pipe
            ends when the job closes it.
        on_end: Called with the end of the job, if its supervisor reported it.

    Returns:
        The exit code of `exit_code_of`.
    """
    try:
        if own_process:
            _let_go({launched.status_fd, *(fd for pair in launched.terminals for fd in pair)})
        ended = _wait(launched, signals)
        if os.getpid() == 1:
            _wait_for_last_lines(launched)
    finally:
        launched.close()
    if ended is not None and on_end is not None:
        on_end(ended)
    return exit_code_of(ended, launched.job_id)


def exit_code_of(ended: Ended | None, job_id: str) -> int:
    """Return what ``tailspan run`` exits with, and say on standard error what a caller has to know besides.

    Args:
        ended: What the supervisor reported; None: it is gone.
        job_id: The job.

    Returns:
        The command's own exit code (128 + n after signal n), 124 after a timeout, 125 when the job was lost. When its
        output could not be passed on, the code is not 0.
    """
    if ended is None:
        _say(f"the supervisor of job {job_id} was killed: how the command ended is not known")
        return OUR_ERROR
    if ended.not_captured:
        _say(f"the output of job {job_id} is incomplete, {ended.lost_bytes} B are not captured: {ended.not_captured}")
    failures = [number for number in ended.relay_failures if number != errno.EPIPE]
    if failures:
        _say(f"the command's output could not be written: {os.strerror(failures[0])}")
    if ended.state == "TIMED_OUT":
        return TIMED_OUT
    if failures and (ended.exit_code == 0 or ended.signal == signal.SIGPIPE):
        # It has met the closed pipe instead of the full disk, with which it would have failed in its own way.
        return 1
    if ended.exit_code == 0 and ended.relay_failures:
        return 128 + signal.SIGPIPE
    if ended.signal == signal.SIGINT:
        _die_of_interrupt()
    return ended.exit_code


def open_or_none(fd: int) -> int | None:
    """Return a file descriptor, or None where it is closed."""
    try:
        os.fstat(fd)
    except OSError:
        return None
    return fd


def _die_of_interrupt() -> None:
    """End by SIGINT like the command: a shell then ends its script or loop, which an exit code would not do."""
    if "pytest" in sys.modules:
        return
    sys.stdout = None
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)


def _say(text: str) -> None:
    try:
        os.write(2, f"tailspan: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass


def _wait(launched: Launched, signals: set[int]) -> Ended | None:
    """Return how the job ended, or None when its supervisor is gone; pass signals on meanwhile."""
    if not hasattr(signal, "sigtimedwait"):
        return _wait_by_polling(launched, signals)
    if sys.platform == "linux":
        # To this thread: in another one, which does not block it, the signal would end the process.
        owner = (_F_OWNER_TID, _thread.get_native_id())
        fcntl.fcntl(launched.status_fd, _F_SETOWN_EX, b"".join(one.to_bytes(4, sys.byteorder) for one in owner))
    else:
        fcntl.fcntl(launched.status_fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(launched.status_fd, fcntl.F_GETFL)
    # Each report of the supervisor sends SIGIO, so that one call waits for reports and signals.
    fcntl.fcntl(launched.status_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    buffer = bytearray()
    ended: list[Ended] = []
    while read_events(launched.status_fd, buffer, ended) and not ended:
        # Not `sigtimedwait`: after a stop that outlasts its timeout, CPython returns a signal that never came.
        got = signal.sigwaitinfo(signals)
        # Signals of a terminal come from the kernel, and the job has had them itself. Only a hangup goes to the
        # leader of the session alone.
        leads = got.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
        _pass_on(launched, got.si_signo, from_terminal=got.si_code > 0 and not leads)
    fcntl.fcntl(launched.status_fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    while signal.sigtimedwait([signal.SIGIO], 0) is not None:
        # It would end this process as soon as it is not blocked any more.
        pass
    return ended[0] if ended else None


def _wait_by_polling(launched: Launched, signals: set[int]) -> Ended | None:
    """Do the same where the system does not say who sent a signal (macOS)."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    os.set_blocking(launched.status_fd, False)
    wakeup = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    poller = select.poll()
    poller.register(launched.status_fd, select.POLLIN)
    poller.register(read_fd, select.POLLIN)
    buffer = bytearray()
    ended: list[Ended] = []
    try:
        while read_events(launched.status_fd, buffer, ended) and not ended:
            for fd, _ in poller.poll(_CHECK_S * 1000):
                for number in os.read(fd, 64) if fd == read_fd else b"":
                    keyed = number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
                    _pass_on(launched, number, from_terminal=keyed and foreground_group() == os.getpgrp())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        os.close(read_fd)
        os.close(write_fd)
    return ended[0] if ended else None


def _pass_on(launched: Launched, number: int, *, from_terminal: bool) -> None:
    if number == signal.SIGCHLD:
        _reap_strangers()
        return
    if number in {getattr(signal, name) for name in _NOT_SENT}:
        return
    if number == signal.SIGWINCH and sum(copy_size(*pair) for pair in launched.terminals):
        # The terminal has sent it before the pseudo-terminal had the new size. Others in the group just look again.
        os.killpg(0, signal.SIGWINCH)
    # The shell's `fg` continues the whole group: the job needs it only where it is still stopped.
    _send(launched, number | (NOTED if from_terminal or number == signal.SIGCONT else 0))
    if number == signal.SIGTSTP:
        stop_this_process()


def _send(launched: Launched, command: int) -> None:
    try:
        os.write(launched.status_fd, bytes([command]))
    except OSError:
        # The supervisor is gone, which the next read finds.
        pass


def stop_this_process() -> None:
    """Stop like the job that got SIGTSTP, so that a shell sees a stopped job; return once SIGCONT has come."""
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTSTP, handler or signal.SIG_DFL)


def _reap_strangers() -> None:
    """As the first process of a container, reap the orphans that no other process waits for."""
    while os.getpid() == 1:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _wait_for_last_lines(launched: Launched) -> None:
    """Let the supervisor finish the log: with the first process of a container, all others end."""
    try:
        os.kill(launched.supervisor_pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(launched.status_fd, select.POLLIN)
    buffer = bytearray()
    while poller.poll(_LAST_LINES_S * 1000) and read_events(launched.status_fd, buffer, []):
        pass


def _let_go(ours: set[int]) -> None:
    """Close what only the command needs: the reader of a pipe waits until every process has closed it."""
    for fd in _open_fds():
        if fd > 2 and fd not in ours and open_or_none(fd) is not None and os.get_inheritable(fd):
            os.close(fd)
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1):
        if fd != null_fd:
            os.dup2(null_fd, fd)
    if null_fd > 2:
        os.close(null_fd)


def _open_fds() -> list[int]:
    for path in ("/proc/self/fd", "/dev/fd"):
        try:
            return [int(name) for name in os.listdir(path)]
        except OSError:
            continue
    return []
