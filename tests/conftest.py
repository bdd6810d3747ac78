"""Rules for all tests: a clean environment, a time limit, and no process left behind.

Tests do not see the developer's settings and do not touch the developer's jobs. A test that hangs is ended and named
(`tests.leftovers`), and so is every process that a test started and did not end.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import leftovers
from tests.fakes.agents import Bench
from tests.fakes.collector import Collector

# Workers and processes that tests start use compiled sources: to compile them each time is slow.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A loaded machine fails deadlines and `too_slow`, and neither says anything about the code.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
settings.register_profile("ci", settings.get_profile("local"), max_examples=100)
settings.register_profile("long", settings.get_profile("local"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "local"))

# pytest-timeout fails a test in its own thread. Where that does not help (a loop in C, or hypothesis repeating the
# example that hangs), the process ends this much later with a stack dump, and xdist names the test.
_HARD_LIMIT_AFTER_S = 60.0
_FOREIGN = ("TAILSPAN_", "OTEL_", "FUSED_", "TRACEPARENT", "TRACESTATE", "NOTIFY_SOCKET", "WATCHDOG_")
_STATE_HOME = pytest.StashKey[str]()
_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Empty the environment of our variables, and give this process and its children a state directory."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            del os.environ[name]
    leftovers.mark_session(config)
    config.stash[_STATE_HOME] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="tailspan-tests-")
    config.stash[_STDERR] = os.dup(2)  # before pytest captures it
    leftovers.handle_ignored_signals()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the state directory."""
    if _STATE_HOME in config.stash:
        shutil.rmtree(config.stash[_STATE_HOME], ignore_errors=True)
        os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, object, object]:
    """Put the longest tests first, after the random order was made, so that no worker ends with one of them."""
    result = yield
    long = [item for item in items if item.get_closest_marker("timeout")]
    rest = [item for item in items if not item.get_closest_marker("timeout")]
    # `--dist worksteal` gives each worker a block of equal size first.
    workers, count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items)
    items.clear()
    for worker in range(workers):
        first = long[worker::workers]
        more = max(0, count * (worker + 1) // workers - len(items) - len(first))
        items += [*first, *rest[:more]]
        del rest[:more]
    items += rest
    return result


def pytest_collection_finish() -> None:
    """Take what was collected, which is much and stays, out of the search for garbage."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process if the time limit of pytest-timeout did not end the test."""
    limit_s = leftovers.time_limit_s(item)
    if not limit_s:
        return (yield)
    faulthandler.dump_traceback_later(limit_s + _HARD_LIMIT_AFTER_S, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the processes of a test that ran out of time."""
    report = yield
    if report.failed and leftovers.is_time_out(report):
        ended = leftovers.end([process for process in leftovers.of_this_run() if process.test == item.nodeid])
        report.sections.append(("processes ended with the test", "\n".join(map(str, ended)) or "none"))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what a crashed worker left; the workers themselves check their own processes."""
    if not hasattr(session.config, "workerinput"):
        leftovers.end(leftovers.of_this_run())


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Fail, with names, if a test of this worker left a process behind."""
    yield
    left = leftovers.wait_for_end(leftovers.of_this_run)
    leftovers.end(left)
    assert not left, "processes outlived their tests:\n" + "\n".join(map(str, left))


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that runs for the test."""
    with Collector() as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, collector: Collector) -> Bench:
    """A state directory, a collector and a fake service."""
    return Bench(tmp_path, collector)
