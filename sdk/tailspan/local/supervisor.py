"""The process that runs one job: starts its command, captures its output, writes its state, ends it when told to.

It is a process of its own so that a job outlives whoever started it. `tailspan.local.launch` starts it with a lock on
the job's directory that it holds to its own end: a reader that gets the lock knows that the supervisor is gone.

What has a deadline (timeout, grace, heartbeat) is done by signal handlers, because the main loop may be blocked by a
full disk or by a terminal that somebody has paused.

Standard library only, and little of that: a supervisor lives as long as its job, and there may be hundreds.
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import signal
import time
import traceback
from typing import Any

from tailspan.local.capture import LogWriter, Piece
from tailspan.local.command_process import NotStartedError, start
from tailspan.local.output_stream import READ_BYTES, OutputStream
from tailspan.local.state import iso_time, state_line, write_state

__all__ = ["main"]

_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.0001, 0.001
_PROGRESS_S = 5.0
_HEARTBEAT_S = 30.0
_DISK_RETRY_S = 1.0
_GROUP_CHECK_MS = 50
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)


def main(job_fd: int, spec_fd: int, lock_fd: int) -> None:
    """Run a job to its end. Called in a new interpreter by `tailspan.local.launch`.

    Args:
        job_fd: The job's directory.
        spec_fd: Pipe with what to run, as a marshalled dict.
        lock_fd: The job's lock, held.
    """
    # The submitter waits for its child only: what goes on is an orphan, adopted by init.
    if os.fork():
        os._exit(0)
    with open(spec_fd, "rb") as pipe:
        spec = marshal.load(pipe)  # noqa: S302 - written by our own launcher, in the same interpreter
    # Until here standard error is the status pipe, so that the submitter learns why an interpreter did not start.
    status_fd = os.dup(2)
    for fd in (job_fd, lock_fd, *spec["show"]):
        if fd is not None:
            os.set_inheritable(fd, False)
    file_mode: int = spec["file_mode"]
    try:
        _Supervisor(job_fd, lock_fd, status_fd, spec).run()
    except BaseException:
        fd = os.open("supervisor.err", os.O_WRONLY | os.O_CREAT, file_mode, dir_fd=job_fd)
        os.write(fd, traceback.format_exc().encode("utf-8", "replace"))
        raise


def _wait_for_disk(error: OSError) -> None:
    """Let the job block on its pipe until there is room again: output is never dropped."""
    if error.errno == errno.EBADF:
        raise error
    time.sleep(_DISK_RETRY_S)


class _Supervisor:
    """One job, from its start to the last byte of its output."""

    def __init__(self, job_fd: int, lock_fd: int, status_fd: int, spec: dict[str, Any]) -> None:
        self._job_fd = job_fd
        self._lock_fd = lock_fd
        self._status_fd = status_fd
        self._file_mode: int = spec["file_mode"]
        self._timeout_s: float | None = spec["timeout_s"]
        self._grace_s: float = spec["grace_s"]
        self._spec = spec
        self._writer = LogWriter(
            os.open("log", os.O_WRONLY, dir_fd=job_fd), os.open("log.idx", os.O_WRONLY, dir_fd=job_fd), _wait_for_disk
        )
        self._state: dict[str, Any] = {
            "state": "PENDING",
            "name": spec["name"],
            "started_at": None,
            "finished_at": None,
            "exit_code": None,
            "signal": None,
            "error": None,
            "pid": None,
            "supervisor_pid": os.getpid(),
            "lines": 0,
            "bytes": 0,
            "end": None,
        }
        self._pid = 0
        self._exited = False
        self._reason: str | None = None
        self._give_up = False
        self._deadlines: dict[str, float] = {}
        self._streams: dict[int, OutputStream] = {}
        self._last_read_s = 0.0
        self._nap_s = _LONGEST_NAP_S
        # Kept: what is read into new memory each time costs a page fault for each 4 KiB.
        self._buffer = bytearray(READ_BYTES)
        self._progress_s = 0.0
        self._wake_fd, waker_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(waker_fd, False)
        signal.set_wakeup_fd(waker_fd, warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_cancel)
        signal.signal(signal.SIGINT, self._on_kill)
        signal.signal(signal.SIGALRM, self._on_alarm)

    def run(self) -> None:
        """Start the command, capture its output until its pipes close, and write down how it ended."""
        # A handler must not run between the fork and our knowing the child's process group.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        now = time.time_ns()
        try:
            started = start(self._spec["argv"], self._spec["env"])
        except NotStartedError as error:
            moment = iso_time(now)
            self._state.update(state="FAILED", started_at=moment, finished_at=moment, end=moment)
            self._state.update(exit_code=error.exit_code, error=str(error))
            self._write_state()
            self._tell({"started": True, "supervisor_pid": os.getpid()})
            self._tell({"ended": True})
            return
        self._pid = started.pid
        show = self._spec["show"]
        self._streams = {
            stream.fd: stream
            for stream in (OutputStream(1, started.stdout_fd, show[0]), OutputStream(2, started.stderr_fd, show[1]))
        }
        # The environment is not needed any more, and it may hold secrets.
        self._spec.clear()
        if self._timeout_s is not None:
            self._deadlines["timeout"] = time.monotonic() + self._timeout_s
        self._deadlines["heartbeat"] = time.monotonic() + _HEARTBEAT_S
        self._arm()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        _let_go_of_caller()
        self._state.update(state="RUNNING", started_at=iso_time(now), pid=self._pid)
        self._write_state()
        if _exists("cancel", self._job_fd):
            # Whoever canceled before `state.json` told our process id could only leave this mark.
            self._stop("CANCELED")
        self._tell({"started": True, "supervisor_pid": os.getpid()})
        self._capture()
        self._write_end()

    def _capture(self) -> None:
        """Read until the command has exited and all its pipes are closed."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.register(self._status_fd, 0)
        for fd in self._streams:
            poller.register(fd, select.POLLIN)
        while not self._done():
            for fd, _event in poller.poll(self._timeout_ms()):
                if fd == self._wake_fd:
                    os.read(self._wake_fd, 4096)
                elif fd == self._status_fd:
                    # The runner is gone: what background processes print later must not appear at its terminal.
                    poller.unregister(fd)
                    for stream in self._streams.values():
                        stream.stop_showing()
                elif self._read(self._streams[fd]) == 0:
                    poller.unregister(fd)
                    os.close(fd)
                    del self._streams[fd]
            self._show_progress()
            if not self._exited:
                self._reap()
        for stream in self._streams.values():
            self._append(stream, stream.lines.finish())

    def _done(self) -> bool:
        if not self._exited:
            return False
        if "grace" in self._deadlines and not _group_exists(self._pid):
            # Nobody is left to be killed, and the number may be given to somebody else.
            del self._deadlines["grace"]
        return self._give_up or not (self._streams or "grace" in self._deadlines)

    def _timeout_ms(self) -> float | None:
        if self._exited and "grace" in self._deadlines:
            return _GROUP_CHECK_MS
        if any(stream.lines.progress_is_waiting for stream in self._streams.values()):
            return max(0.0, self._progress_s - time.monotonic()) * 1000
        return None

    def _read(self, stream: OutputStream, at_unix_nano: int | None = None) -> int | None:
        """Read what a pipe holds; return how many bytes: 0 at its end, None when there is nothing now."""
        if self._nap_s and time.monotonic() - self._last_read_s < 2 * _LONGEST_NAP_S:
            # Let a chatty job fill its pipe: a thousand reads a second are enough, and cheaper for both.
            time.sleep(self._nap_s)
        try:
            size = os.readv(stream.fd, [self._buffer])
        except BlockingIOError:
            return None
        self._last_read_s = now_s = time.monotonic()
        # A job that is about to fill its pipe must not have to wait for us.
        if size * 2 > stream.capacity:
            self._nap_s = 0.0
        elif size * 8 < stream.capacity:
            self._nap_s = min(2 * self._nap_s or _SHORTEST_NAP_S, _LONGEST_NAP_S)
        if not size:
            self._append(stream, stream.lines.finish(), at_unix_nano)
            stream.stop_showing()
            return 0
        stream.show(self._buffer, size)
        if not stream.lines.progress_is_waiting:
            self._progress_s = now_s + _PROGRESS_S
        self._append(stream, stream.lines.feed(self._buffer, size), at_unix_nano)
        return size

    def _show_progress(self) -> None:
        """Enter what progress bars have drawn so far: their line may not end for hours."""
        if time.monotonic() < self._progress_s:
            return
        for stream in self._streams.values():
            if stream.lines.progress_is_waiting:
                self._progress_s = time.monotonic() + _PROGRESS_S
                self._append(stream, stream.lines.progress())

    def _append(self, stream: OutputStream, pieces: list[Piece], at_unix_nano: int | None = None) -> None:
        for piece in pieces:
            self._writer.append(piece, stream.number, at_unix_nano or time.time_ns())

    def _reap(self) -> None:
        """Notice the end of the main process, and write it down once what it printed has been read."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return
        now = time.time_ns()
        self._exited = True
        self._deadlines.pop("timeout", None)
        for stream in self._streams.values():
            # No more than the pipe could hold at the exit: a background process may print for ever.
            drained = 0
            while drained < stream.capacity and (size := self._read(stream, now)):
                drained += size
            self._append(stream, stream.lines.finish(), now)
        self._finish(now, os.waitstatus_to_exitcode(status))

    def _finish(self, now_unix_nano: int, exit_code: int) -> None:
        signal_name = None
        error: str | None = None
        if exit_code < 0:
            signal_name = _signal_name(-exit_code)
            error = f"killed by {signal_name}"
            if signal_name == "SIGKILL":
                error += ", perhaps because memory ran out"
        elif exit_code:
            error = f"exited with code {exit_code}"
        if self._reason == "TIMED_OUT":
            error = f"ran longer than its timeout of {self._timeout_s:g} s"
        elif self._reason:
            error = "canceled"
        self._state.update(
            state=self._reason or ("FAILED" if error else "SUCCEEDED"),
            finished_at=iso_time(now_unix_nano),
            exit_code=exit_code if exit_code >= 0 else 128 - exit_code,
            signal=signal_name,
            error=error,
        )
        self._write_state()
        self._tell({"ended": True})

    def _write_end(self) -> None:
        self._state["end"] = iso_time(time.time_ns())
        self._write_state()

    def _write_state(self) -> None:
        self._state.update(lines=self._writer.lines, bytes=self._writer.bytes)
        while True:
            try:
                write_state(self._job_fd, self._state, self._file_mode)
            except FileNotFoundError:
                # Somebody removed the directory of a running job: nobody can ask for its state any more.
                return
            except OSError as error:
                _wait_for_disk(error)
            else:
                return

    def _tell(self, event: dict[str, Any]) -> None:
        try:
            os.write(self._status_fd, state_line(event))
        except OSError:
            # Nobody listens: the job was detached, or its runner is gone.
            pass

    def _stop(self, reason: str) -> None:
        """Ask the job's processes to end, and see to it that they do."""
        if self._exited or self._reason:
            return
        self._reason = reason
        self._deadlines["grace"] = time.monotonic() + self._grace_s
        self._arm()
        self._signal_group(signal.SIGTERM)
        # A stopped process acts on nothing else.
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def _arm(self) -> None:
        due = min(self._deadlines.values()) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(due, 0.001))

    def _on_cancel(self, *_: object) -> None:
        if self._exited:
            self._give_up = True
        self._stop("CANCELED")

    def _on_kill(self, *_: object) -> None:
        """The person at the terminal does not want to wait for the grace time."""
        self._on_cancel()
        if self._reason:
            self._deadlines["grace"] = 0.0
            self._on_alarm()

    def _on_alarm(self, *_: object) -> None:
        now = time.monotonic()
        for name in [name for name, due in self._deadlines.items() if due <= now]:
            del self._deadlines[name]
            if name == "timeout":
                self._stop("TIMED_OUT")
            elif name == "grace":
                self._signal_group(signal.SIGKILL)
            else:
                self._deadlines["heartbeat"] = now + _HEARTBEAT_S
                _touch(self._lock_fd)
        self._arm()


def _let_go_of_caller() -> None:
    """Keep nothing open that the caller may wait for: its directory, its input, its terminal."""
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null_fd, fd, inheritable=False)
    os.close(null_fd)
    os.chdir("/")


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _touch(fd: int) -> None:
    try:
        os.utime(fd)
    except OSError:
        pass


def _exists(name: str, directory_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=directory_fd)
    except FileNotFoundError:
        return False
    return True
