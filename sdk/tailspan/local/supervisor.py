"""The process that runs one job: starts its command, captures its output, records its state, and ends it on request.

It is a process of its own so that a job outlives the process that started it. `tailspan.local.launch` starts it with a
lock on the job's directory that it holds to its own end: a reader that gets the lock knows that the supervisor is gone.

What has a deadline (timeout, grace, heartbeat) is done by signal handlers, because the main loop may be blocked by a
terminal that its user has paused.

Standard library only, and little of that: a supervisor lives as long as its job, and there may be hundreds.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import marshal
import os
import select
import sys
import time

from tailspan.local.capture import LogWriter
from tailspan.local.command_process import Output, failure_text, start
from tailspan.local.output_stream import READ_BYTES, OutputStream
from tailspan.local.process_tree import DETACHED, adopt_orphans, is_stopped, live_descendants, signal_descendants
from tailspan.local.state import iso_time, state_line, sync_file, write_state
from tailspan.local.write_order import WriteOrder, in_order

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any

    from tailspan.local.capture import Piece
    from tailspan.local.terminal import ModeMirror
    from tailspan.local.terminal_keys import TerminalKeys
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = ["NOTED", "main"]

NOTED = 0x80
"""Added, in a command of the runner, to the number of a signal that the terminal has already sent to the job."""

_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.0001, 0.001
_PROGRESS_S = 5.0
_PREVIEW_S = 0.5
_HEARTBEAT_S = 30.0
_DISK_RETRY_S = 1.0
_TREE_CHECK_S = 0.05
_REPORT_S = 0.00005
_TERMINAL_DRAIN_MS = 20
_FIRST_MODES_S, _LAST_MODES_S = 0.005, 1.0
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD, signal.SIGIO)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ARGUMENTS = 6
_CLOCK_READINGS = 5
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def main(job_fd: int, spec_fd: int, lock_fd: int) -> None:
    """Run a job to its end. Called in a new interpreter by `tailspan.local.launch`.

    Args:
        job_fd: The job's directory.
        spec_fd: Pipe with what to run, as a marshalled dict.
        lock_fd: The job's lock, held.
    """
    # A submitter that lives on waits for its child only: what goes on is an orphan, adopted by init.
    if DETACHED in sys.argv[:_ARGUMENTS] and os.fork():
        os._exit(0)
    # What was imported lives until the end: a collection need not visit it.
    gc.freeze()
    gc.enable()
    with open(spec_fd, "rb") as pipe:
        spec = marshal.load(pipe)  # noqa: S302 - written by our own launcher, in the same interpreter
    # Until here standard error is the status socket, so that the submitter learns why an interpreter did not start.
    status_fd = os.dup(2)
    outputs = [Output(*output) for output in spec["outputs"]]
    ours = {job_fd, lock_fd, status_fd, *(fd for output in outputs for fd in output[2:] if fd is not None)}
    for fd in ours:
        os.set_inheritable(fd, False)
    inherited = _open_fds() - ours - {0, 1, 2}
    if not spec["inherit"]:
        inherited = _close(inherited)
    file_mode: int = spec["file_mode"]
    try:
        _Supervisor(job_fd, lock_fd, status_fd, spec, outputs, inherited).run()
    except BaseException:
        try:
            _write_failure(job_fd, file_mode)
        except OSError:
            # The submitter must learn the first problem, not this one.
            pass
        raise
    os._exit(0)


def _read_offset() -> tuple[int, int]:
    """Return how long the reading took, and how far the wall clock was ahead at most, both in ns."""
    before = time.clock_gettime_ns(_CLOCK)
    wall = time.time_ns()
    return time.clock_gettime_ns(_CLOCK) - before, wall - before


class _Clock:
    """Wall-clock time at the start of a job, and from there on elapsed time: a clock step does not change durations."""

    def __init__(self, read_offset: Callable[[], tuple[int, int]] = _read_offset) -> None:
        # A reading may be interrupted: the quickest of some is the most exact.
        self._offset_ns = min(read_offset() for _ in range(_CLOCK_READINGS))[1]

    def now(self) -> int:
        """Return the time in ns since the epoch."""
        return self._offset_ns + time.clock_gettime_ns(_CLOCK)


class _Supervisor:
    """One job, from its start to the last byte of its output."""

    def __init__(
        self,
        job_fd: int,
        lock_fd: int,
        status_fd: int,
        spec: dict[str, Any],
        outputs: list[Output],
        inherited: set[int],
    ) -> None:
        self._job_fd = job_fd
        self._lock_fd = lock_fd
        self._status_fd = status_fd
        self._file_mode: int = spec["file_mode"]
        self._timeout_s: float | None = spec["timeout_s"]
        self._grace_s: float = spec["grace_s"]
        self._attached: bool = spec["attached"]
        self._spec = spec
        self._outputs = outputs
        self._inherited = inherited
        self._clock = _Clock()
        self._writer = LogWriter(
            os.open("log", os.O_WRONLY, dir_fd=job_fd), os.open("log.idx", os.O_WRONLY, dir_fd=job_fd)
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
        self._state_is_written = False
        self._pid = 0
        self._exited = False
        self._failure: str | None = None
        self._reason: str | None = None
        self._noted: tuple[int, float] | None = None
        self._give_up = False
        self._deadlines: dict[str, float] = {}
        self._streams: dict[int, OutputStream] = {}
        self._relay_failures: list[int] = []
        self._mirrors: list[ModeMirror] = []
        self._keys: dict[int, TerminalKeys] = {}
        self._poller = select.poll()
        self._modes_s: float | None = None
        self._modes_nap_s = _FIRST_MODES_S
        self._order: WriteOrder | None = None
        self._held: dict[int, list[Piece]] | None = None
        self._held_at_ns = 0
        self._last_read_s = 0.0
        self._nap_s = _LONGEST_NAP_S
        # Kept: what is read into new memory each time costs a page fault for each 4 KiB.
        self._buffer = bytearray(READ_BYTES)
        self._progress_s = 0.0
        self._preview_s: float | None = None
        self._open: OutputStream | None = None
        self._state_retry_s = 0.0
        self._wake_fd, waker_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(waker_fd, False)
        signal.set_wakeup_fd(waker_fd, warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_cancel)
        signal.signal(signal.SIGINT, self._on_kill)
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.signal(signal.SIGIO, self._on_command)

    def run(self) -> None:
        """Start the command, capture its output until its pipes close, and record how it ended."""
        # A handler must not run between the fork and our knowing the child's process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        adopt_orphans()
        spec = self._spec
        if spec["cwd"] is not None:
            os.chdir(spec["cwd"])
        for output in self._outputs:
            if self._attached and output.master_fd is not None and output.relay_fd is not None:
                # Before the job can change its modes.
                self._follow_terminal(output.master_fd, output.relay_fd)
        now = self._clock.now()
        started = start(
            spec["argv"],
            spec["env"],
            self._outputs,
            closed=spec["closed"],
            new_session=not self._attached,
            on_pipes=self._watch_order,
            on_fork=lambda may_start: self._report({"forking": may_start}),
            ignored=spec["ignored"],
            mask=spec["mask"],
        )
        self._pid = started.pid
        if started.failure:
            self._failure = _failure_text(os.fsdecode(spec["argv"][0]), started.failure)
        self._inherited = _close(self._inherited)
        for output, fd in zip(self._outputs, started.read_fds, strict=True):
            self._streams[fd] = OutputStream(
                output.number,
                fd,
                output.relay_fd,
                is_terminal=output.master_fd is not None,
                encoding=spec["encoding"],
            )
        # The environment is not needed any more, and it may hold secrets.
        spec.clear()
        if self._attached:
            os.setsid()
        _raise_file_limit()
        if self._timeout_s is not None:
            self._deadlines["timeout"] = time.monotonic() + self._timeout_s
        self._deadlines["heartbeat"] = time.monotonic() + _HEARTBEAT_S
        self._arm()
        self._listen()
        _let_go_of_caller()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._state.update(state="RUNNING", started_at=iso_time(now), pid=self._pid)
        self._write_state()
        if _exists("cancel", self._job_fd):
            # A cancel before `state.json` had our process id could only leave this mark.
            self._stop("CANCELED")
        self._report({"started": True, "supervisor_pid": os.getpid()})
        if not self._attached:
            # Here, because the start of a job need not wait for the disk. For an attached job, its runner does it.
            sync_file("job.json", self._job_fd)
        self._capture()
        self._write_end()

    def _watch_order(self, read_fds: list[int]) -> None:
        """Begin to watch in which order the command writes into its pipes, if it has two."""
        if len(read_fds) > 1 and all(output.master_fd is None for output in self._outputs):
            numbers = [output.number for output in self._outputs]
            self._order = WriteOrder.open(dict(zip(read_fds, numbers, strict=True)))

    def _listen(self) -> None:
        """Have the kernel send SIGIO for each command of the runner, and when it is gone."""
        fcntl.fcntl(self._status_fd, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._status_fd, fcntl.F_GETFL)
        fcntl.fcntl(self._status_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)

    def _capture(self) -> None:
        """Read until the command has exited and all its pipes are closed."""
        poller = self._poller
        poller.register(self._wake_fd, select.POLLIN)
        for fd in self._streams:
            poller.register(fd, select.POLLIN)
        # What came before the kernel was asked to report it.
        self._on_command()
        self._reap()
        while not self._done():
            ready = {fd for fd, _event in poller.poll(self._timeout_ms())}
            if self._wake_fd in ready:
                os.read(self._wake_fd, 4096)
            if ready & self._streams.keys() or self._has_held():
                for fd in self._read_all(ready):
                    poller.unregister(fd)
                    self._close_stream(fd)
            for fd in ready & self._keys.keys():
                self._pass_key_on(self._keys[fd])
            self._show_progress()
            self._show_partial()
            self._follow_modes()
            if not self._state_is_written and time.monotonic() > self._state_retry_s:
                self._write_state()
            self._reap()
        self._release(self._hold(), at_end=True)
        for stream in self._streams.values():
            self._append(stream, stream.lines.finish())

    def _has_held(self) -> bool:
        return self._order is not None and any(self._order.later.values())

    def _read_all(self, ready: set[int]) -> list[int]:
        """Read the outputs that are ready, or all where the order of their writes is known; return those that end."""
        self._nap()
        writes = self._hold()
        fds = [fd for fd in self._streams if fd in ready or writes is not None]
        ended = [fd for fd in fds if self._read(self._streams[fd]) == 0 or self._streams[fd].failure]
        self._release(writes, at_end=bool(ended))
        return ended

    def _hold(self) -> list[int] | None:
        """Hold what is read from now on until its order is known; return the writes so far."""
        if self._order is None:
            return None
        held = self._order.later
        self._held = {stream.number: held.get(stream.number, []) for stream in self._streams.values()}
        return self._order.pending + self._order.take()

    def _release(self, writes: list[int] | None, *, at_end: bool) -> None:
        """Append what was held, in the order in which it was written."""
        held, self._held = self._held, None
        if self._order is None or writes is None or held is None:
            return
        known = len(writes)
        if not at_end and sum(map(bool, held.values())) > 1:
            # The report of a write comes a moment after its text.
            time.sleep(_REPORT_S)
        writes += self._order.take()
        for number, piece in in_order(held, writes, len(writes) if at_end else known):
            self._writer.append(piece, number, self._held_at_ns or self._clock.now())
        self._order.pending, self._order.later = writes, held

    def _nap(self) -> None:
        """Let a chatty job fill its pipe: a thousand reads a second are enough, and cheaper for both."""
        if not self._nap_s or (self._order is None and len(self._streams) > 1):
            # Without reports of writes, a nap would mix up the order of two pipes.
            return
        if time.monotonic() - self._last_read_s < 2 * _LONGEST_NAP_S:
            time.sleep(self._nap_s)

    def _close_stream(self, fd: int) -> None:
        """Close an output that has ended, or whose reader is gone: then the job sees that, too."""
        stream = self._streams.pop(fd)
        self._append(stream, stream.lines.finish())
        if stream.failure:
            self._relay_failures.append(stream.failure)
        stream.stop_relaying()
        os.close(fd)
        if self._order is not None:
            self._order.close()
            self._order = None

    def _done(self) -> bool:
        if not self._exited:
            return False
        if "grace" in self._deadlines and not live_descendants(os.getpid()):
            # There is nothing left to be killed.
            del self._deadlines["grace"]
        return self._give_up or not (self._streams or "grace" in self._deadlines)

    def _timeout_ms(self) -> float | None:
        if self._has_held():
            return 0
        now = time.monotonic()
        until = [self._state_retry_s] if not self._state_is_written else []
        if self._exited and "grace" in self._deadlines:
            until.append(now + _TREE_CHECK_S)
        if any(stream.lines.progress_is_waiting for stream in self._streams.values()):
            until.append(self._progress_s)
        until += [due for due in (self._preview_s, self._modes_s) if due is not None]
        return max(0.0, min(until) - now) * 1000 + 1 if until else None

    def _read(self, stream: OutputStream, at_unix_nano: int | None = None) -> int | None:
        """Read what a pipe holds; return how many bytes: 0 at its end, None when there is nothing now."""
        try:
            size = os.readv(stream.fd, [self._buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            size = 0  # the job's end of a pseudo-terminal is closed
        self._last_read_s = now_s = time.monotonic()
        # A job that is about to fill its pipe must not have to wait for us.
        if size * 2 > stream.capacity:
            self._nap_s = 0.0
        elif size * 8 < stream.capacity:
            self._nap_s = min(2 * self._nap_s or _SHORTEST_NAP_S, _LONGEST_NAP_S)
        if size:
            if self._mirrors:
                # Before the text that asks for a key appears.
                self._copy_modes()
                self._modes_nap_s = _FIRST_MODES_S
                self._modes_s = now_s + self._modes_nap_s
            stream.relay(self._buffer, size)
        if not stream.lines.progress_is_waiting:
            self._progress_s = now_s + _PROGRESS_S
        text, length = stream.text_of(self._buffer, size)
        self._append(stream, stream.lines.feed(text, length), at_unix_nano)
        if stream.lines.has_partial:
            self._open = stream
        if self._preview_s is None and self._open is not None:
            self._preview_s = now_s + _PREVIEW_S
        return size

    def _show_progress(self) -> None:
        """Enter what progress bars have drawn so far: their line may not end for hours."""
        if time.monotonic() < self._progress_s or self._has_held():
            return
        for stream in self._streams.values():
            if stream.lines.progress_is_waiting:
                self._progress_s = time.monotonic() + _PROGRESS_S
                self._append(stream, stream.lines.progress())

    def _show_partial(self) -> None:
        """Let readers see the open line, a question or dots; of two outputs with one, the newest."""
        if self._preview_s is None or time.monotonic() < self._preview_s:
            return
        self._preview_s = None
        if self._open is not None and not self._open.lines.has_partial:
            self._open = next((stream for stream in self._streams.values() if stream.lines.has_partial), None)
        if self._open is not None:
            self._writer.preview(self._open.lines.partial())

    def _follow_terminal(self, pty_fd: int, terminal_fd: int) -> None:
        # Only here: most jobs have no terminal.
        from tailspan.local.terminal import ModeMirror
        from tailspan.local.terminal_keys import TerminalKeys

        self._mirrors.append(ModeMirror(pty_fd, terminal_fd, os.getppid()))
        self._keys[terminal_fd] = TerminalKeys(pty_fd, terminal_fd)

    def _await_keys(self) -> None:
        for fd, keys in self._keys.items():
            if keys.are_awaited():
                self._poller.register(fd, select.POLLIN)

    def _pass_key_on(self, keys: TerminalKeys) -> None:
        """Pass one key on, if a process still waits for it; then find out again whether one waits for the next."""
        self._poller.unregister(keys.terminal_fd)
        if keys.are_awaited() and not keys.pass_on():
            return
        self._modes_nap_s = _FIRST_MODES_S
        self._modes_s = time.monotonic() + self._modes_nap_s

    def _copy_modes(self) -> None:
        for mirror in self._mirrors:
            mirror.copy()

    def _follow_modes(self) -> None:
        """Copy the modes of the job's terminal for a while after each output: programs change them about then."""
        if self._modes_s is None or time.monotonic() < self._modes_s:
            return
        self._copy_modes()
        self._await_keys()
        self._modes_nap_s *= 2
        self._modes_s = time.monotonic() + self._modes_nap_s if self._modes_nap_s < _LAST_MODES_S else None

    def _append(self, stream: OutputStream, pieces: list[Piece], at_unix_nano: int | None = None) -> None:
        if self._held is not None:
            self._held[stream.number] += pieces
            return
        for piece in pieces:
            self._writer.append(piece, stream.number, at_unix_nano or self._clock.now())

    def _reap(self) -> None:
        """Collect processes that have ended: the main process, and orphans that were adopted."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._pid and not self._exited:
                self._on_exit(os.waitstatus_to_exitcode(status))

    def _on_exit(self, exit_code: int) -> None:
        """Record the end of the main process once what it printed has been read."""
        now = self._clock.now()
        self._exited = True
        self._deadlines.pop("timeout", None)
        self._held_at_ns = now
        writes = self._hold()
        for fd in list(self._streams):
            stream = self._streams[fd]
            # No more than the pipe could hold at the exit: a background process may print for ever.
            drained = 0
            while drained < stream.capacity and (size := self._drain(stream, now)):
                drained += size
            self._append(stream, stream.lines.finish(), now)
            if stream.failure:
                # The main loop closes it; until then a background process does not get the error either.
                self._relay_failures.append(stream.failure)
                stream.failure = 0
        self._release(writes, at_end=True)
        self._held_at_ns = 0
        self._copy_modes()
        self._finish(now, exit_code)

    def _drain(self, stream: OutputStream, now: int) -> int | None:
        size = self._read(stream, now)
        if size is None and stream.is_terminal:
            # What was written to a pseudo-terminal arrives a little later.
            poller = select.poll()
            poller.register(stream.fd, select.POLLIN)
            poller.poll(_TERMINAL_DRAIN_MS)
            size = self._read(stream, now)
        return size

    def _finish(self, now_unix_nano: int, exit_code: int) -> None:
        signal_name = None
        error: str | None = None
        if exit_code < 0:
            signal_name = _signal_name(-exit_code)
            error = f"killed by {signal_name}"
            if signal_name == "SIGKILL":
                error += ", perhaps because memory ran out"
        elif exit_code:
            error = self._failure or f"exited with code {exit_code}"
        self._on_command()
        if error and not self._reason and self._was_interrupted(exit_code):
            self._reason = "CANCELED"
        if self._reason == "TIMED_OUT":
            from tailspan._durations import duration_text

            error = f"ran longer than its timeout of {duration_text(self._timeout_s or 0.0)}"
        elif self._reason:
            error = "canceled"
        self._state.update(
            state=self._reason or ("FAILED" if error else "SUCCEEDED"),
            finished_at=iso_time(now_unix_nano),
            exit_code=exit_code if exit_code >= 0 else 128 - exit_code,
            signal=signal_name,
            error=error,
        )
        # Before the disk is asked: the runner does not wait for room on it.
        if self._writer.problem:
            self._report({"not_captured": self._writer.problem, "lost_bytes": self._writer.lost_bytes})
        self._write_state()
        self._report(
            {
                "ended": True,
                "state": self._state["state"],
                "exit_code": self._state["exit_code"],
                "signal": max(0, -exit_code),
                "relay_failures": self._relay_failures,
            }
        )

    def _was_interrupted(self, exit_code: int) -> bool:
        """Return whether the job ended because of a signal that its runner passed on or that Ctrl-C sent."""
        if not self._attached:
            return False
        if exit_code in (-signal.SIGINT, 128 + signal.SIGINT):
            return True
        return self._noted is not None and time.monotonic() - self._noted[1] < self._grace_s

    def _write_end(self) -> None:
        self._state["end"] = iso_time(self._clock.now())
        while not (self._writer.finish() and self._write_state()):
            if self._give_up or self._writer.problem == os.strerror(errno.EFBIG):
                # It will not get better: readers find what is missing by themselves.
                self._write_state()
                return
            time.sleep(_DISK_RETRY_S)

    def _write_state(self) -> bool:
        """Write `state.json`; return whether that worked. The main loop tries again."""
        self._state.update(lines=self._writer.lines, bytes=self._writer.bytes)
        if self._writer.lost_bytes:
            self._state.update(lost_lines=self._writer.lost_lines, lost_bytes=self._writer.lost_bytes)
        try:
            write_state(self._job_fd, self._state, self._file_mode)
        except FileNotFoundError:
            # The directory of a running job was removed: nothing can ask for its state any more.
            pass
        except OSError:
            self._state_is_written = False
            self._state_retry_s = time.monotonic() + _DISK_RETRY_S
            return False
        self._state_is_written = True
        return True

    def _report(self, event: dict[str, Any]) -> None:
        try:
            os.write(self._status_fd, state_line(event))
        except OSError:
            # The job was detached, or its runner is gone.
            pass

    def _stop(self, reason: str) -> None:
        """Ask the job's processes to end, and see to it that they do."""
        if self._exited or self._reason:
            return
        self._reason = reason
        self._deadlines["grace"] = time.monotonic() + self._grace_s
        self._arm()
        signal_descendants(os.getpid(), signal.SIGTERM)
        # A stopped process acts on nothing else.
        signal_descendants(os.getpid(), signal.SIGCONT)

    def _arm(self) -> None:
        due = min(self._deadlines.values()) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(due, 0.001))

    def _on_command(self, *_: object) -> None:
        """Act on what the runner sends: signals for the job. Its end stops the relaying."""
        while self._status_fd >= 0:
            try:
                numbers = os.read(self._status_fd, 256)
            except BlockingIOError:
                return
            except OSError:
                numbers = b""
            if not numbers:
                # As a handler of SIGIO this may run within itself: only one of the two finds the descriptor.
                fd, self._status_fd = self._status_fd, -1
                if fd >= 0:
                    # What background processes print later must not appear at the runner's terminal.
                    for stream in self._streams.values():
                        stream.stop_relaying()
                    os.close(fd)
            for number in numbers:
                if number & ~NOTED in _ENDING:
                    self._noted = number & ~NOTED, time.monotonic()
                if not self._exited and (not number & NOTED or self._is_still_stopped(number)):
                    self._signal_job(number & ~NOTED)

    def _signal_job(self, number: int) -> None:
        try:
            os.kill(self._pid, number)
        except OSError:
            # It has become another user's by sudo: without us, the sender could not signal it either.
            pass

    def _is_still_stopped(self, command: int) -> bool:
        """Return whether the runner goes on while the job stays stopped: only the runner was sent SIGCONT."""
        return command & ~NOTED == signal.SIGCONT and is_stopped(self._pid)

    def _on_cancel(self, *_: object) -> None:
        if self._exited:
            self._give_up = True
        self._stop("CANCELED")

    def _on_kill(self, *_: object) -> None:
        """End the job at once, without the grace time."""
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
                # Again until none is left: one of them may just have started another.
                if signal_descendants(os.getpid(), signal.SIGKILL):
                    self._deadlines["grace"] = now + _TREE_CHECK_S
            else:
                self._deadlines["heartbeat"] = now + _HEARTBEAT_S
                _touch(self._lock_fd)
        self._arm()


def _write_failure(job_fd: int, file_mode: int) -> None:
    import traceback

    fd = os.open("supervisor.err", os.O_WRONLY | os.O_CREAT, file_mode, dir_fd=job_fd)
    os.write(fd, traceback.format_exc().encode("utf-8", "replace"))


def _failure_text(program: str, number: int) -> str:
    # Only here: most jobs start. `PW=x load` is not found, and its status must not show the secret.
    from tailspan.local.command_line import redact_name

    return failure_text(redact_name(program), number)


def _open_fds() -> set[int]:
    for path in ("/proc/self/fd", "/dev/fd"):
        try:
            found = {int(name) for name in os.listdir(path)}
        except OSError:
            continue
        # Without the one that the listing itself had open.
        return {fd for fd in found if _is_open(fd)}
    return {fd for fd in range(256) if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _close(fds: set[int]) -> set[int]:
    for fd in fds:
        os.close(fd)
    return set()


def _raise_file_limit() -> None:
    """A limit on the size of the job's files is not meant for its log."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    except (ImportError, OSError, ValueError):
        pass


def _let_go_of_caller() -> None:
    """Keep nothing open that the caller may wait for: its directory, its input, its terminal."""
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null_fd, fd, inheritable=False)
    os.close(null_fd)
    os.chdir("/")


def _signal_name(number: int) -> str:
    from signal import Signals

    try:
        return Signals(number).name
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
