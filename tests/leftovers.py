"""Processes that tests started and that still run, found by the environment that they inherited.

Parents do not help: a detached job's parent is init. pytest puts the running test into ``PYTEST_CURRENT_TEST``, and
children inherit it, so a process names the test that started it. Only Linux shows the environment of processes
(``/proc``); elsewhere nothing is found.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# Supervisors and agents that were asked to end take a moment, more on a loaded machine.
_GRACE_S = 30.0
_SESSION = "PYTEST_TESTS_SESSION"


@dataclass(frozen=True)
class Process:
    """A process that a test of this worker started.

    Attributes:
        pid: Its process id.
        command: Its command line.
        test: Node id of the test that started it, or of the test for which a shared fixture did.
    """

    pid: int
    command: str
    test: str

    def __str__(self) -> str:
        return f"pid {self.pid} of {self.test}: {self.command}"


def time_limit_s(item: pytest.Item) -> float:
    """Return the time limit of a test as pytest-timeout reads it: marker, then command line, then configuration."""
    marker = item.get_closest_marker("timeout")
    if marker is not None and (marker.args or "timeout" in marker.kwargs):
        return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    option = item.config.getvalue("timeout")
    return float(option if option is not None else item.config.getini("timeout") or 0)


def is_time_out(report: pytest.TestReport) -> bool:
    """Return whether pytest-timeout failed the test."""
    return "from pytest-timeout" in str(report.longrepr)


def mark_session(config: pytest.Config) -> None:
    """Put this run's name into the environment, for its workers and for all processes that tests start."""
    if not hasattr(config, "workerinput"):
        os.environ[_SESSION] = uuid.uuid4().hex


def of_this_run() -> list[Process]:
    """Return the processes that tests of this worker started; in the controller those of all workers."""
    marks = {name: os.environ[name] for name in (_SESSION, "PYTEST_XDIST_WORKER") if name in os.environ}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            variables = os.fsdecode((entry / "environ").read_bytes()).split("\0")
            environment = dict(pair.partition("=")[::2] for pair in variables)
            test = environment.get("PYTEST_CURRENT_TEST")
            if test is None or int(entry.name) == os.getpid() or not marks.items() <= environment.items():
                continue
            command = os.fsdecode((entry / "cmdline").read_bytes()).replace("\0", " ").strip()
            found.append(Process(int(entry.name), command, test.rpartition(" (")[0]))
    return found


def wait_for_end(find: Callable[[], list[Process]]) -> list[Process]:
    """Wait until nothing is found, for a limited time, and return what is left then."""
    deadline = time.monotonic() + _GRACE_S
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def end(processes: list[Process]) -> list[Process]:
    """Kill the processes and return them."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return processes


def handle_ignored_signals() -> None:
    """Let children start with the default action of every signal that was ignored when pytest started.

    `make test &` of a script ignores SIGINT and SIGQUIT, `nohup` SIGHUP, and what is ignored stays ignored in every
    child: `tailspan run` would not pass it on. A handler is not inherited, and pytest itself goes on ignoring.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python itself ignores these two
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)
