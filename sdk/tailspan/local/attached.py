"""Running a job in the foreground: its output at this terminal, its input from it, Ctrl-C to cancel it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tailspan.local.launch import Launched, Request, standard_fds_taken
from tailspan.local.stdin import Stdin
from tailspan.models import JobState, JobStatus

if TYPE_CHECKING:
    from tailspan.services.local import LocalService

__all__ = ["OUR_ERROR", "TIMED_OUT", "exit_code_of", "run_attached"]

TIMED_OUT = 124
OUR_ERROR = 125
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_code_of(job: JobStatus) -> int:
    """Return what ``tailspan run`` exits with for a job that has ended.

    Returns:
        The command's own exit code (128 + n after signal n), 124 after a timeout, 125 when the job was lost.
    """
    if job.state is JobState.TIMED_OUT:
        return TIMED_OUT
    return job.exit_code if job.exit_code is not None else OUR_ERROR


def run_attached(
    service: LocalService,
    command: Sequence[str],
    *,
    name: str | None = None,
    attributes: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    on_start: Callable[[JobStatus], None] | None = None,
) -> JobStatus:
    """Run a command as a job in the foreground and return its last status.

    Its output appears on this process's standard output and standard error as it is printed; its standard input is
    this process's. SIGINT, SIGTERM and SIGHUP cancel it; a second one kills it; a third one leaves it alone.

    Args:
        service: Where to run it.
        command: The command and its arguments.
        name: The job's name; None: taken from the command.
        attributes: What to attach to the job.
        timeout_s: After so many seconds it is ended; None: never.
        on_start: Called with its first status.

    Returns:
        Its status: ended, or still running after the third signal.

    Raises:
        ConfigError: The command or an option is not usable.
        ServiceUnavailableError: It could not be started.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    show = _if_open(1), _if_open(2)
    with standard_fds_taken(), _signals() as signals_fd, Stdin() as stdin:
        launched = service.start(
            Request(
                command=command,
                name=name,
                attributes=attributes,
                timeout_s=timeout_s,
                stdin_fd=stdin.for_job,
                show=show,
            )
        )
        stdin.hand_over()
        try:
            if on_start:
                on_start(service.status(launched.job_id))
            _wait(launched, signals_fd, stdin)
        finally:
            launched.close()
    return service.status(launched.job_id)


def _wait(launched: Launched, signals_fd: int | None, stdin: Stdin) -> None:
    """Return when the job has ended, or its supervisor is gone, or the user insists."""
    interrupts = 0
    while True:
        poller = select.poll()
        poller.register(launched.status_fd, select.POLLIN)
        if signals_fd is not None:
            poller.register(signals_fd, select.POLLIN)
        for fd, _event in poller.poll(stdin.register(poller)):
            if fd == launched.status_fd:
                return
            if fd != signals_fd:
                stdin.pump(fd)
                continue
            for number in os.read(fd, 64):
                interrupts += number in _SIGNALS
                if interrupts > 2:
                    return
                if number in _SIGNALS:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(launched.supervisor_pid, signal.SIGTERM if interrupts == 1 else signal.SIGINT)


@contextlib.contextmanager
def _signals() -> Iterator[int | None]:
    """Turn the signals that end a program into bytes on a pipe; None outside of the main thread, which gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # What was ignored (nohup) stays ignored.
    ours = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    wakeup = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    try:
        for number in ours:
            signal.signal(number, lambda *_: None)
        yield read_fd
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        os.close(read_fd)
        os.close(write_fd)


def _if_open(fd: int) -> int | None:
    try:
        os.fstat(fd)
    except OSError:
        return None
    return fd
