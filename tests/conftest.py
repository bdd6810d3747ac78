"""What holds for all tests: they do not see the developer's settings, and do not touch the developer's jobs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes.agents import Bench
from tests.fakes.collector import Collector

# On a busy machine each of these has failed for being slow, and a timing is no test.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

_FOREIGN = ("TAILSPAN_", "OTEL_", "FUSED_", "TRACEPARENT", "TRACESTATE", "NOTIFY_SOCKET", "WATCHDOG_")
_STATE_HOME = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Give this process, and all that it starts, an empty environment of ours and a state directory of its own."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            del os.environ[name]
    config.stash[_STATE_HOME] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="tailspan-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the state directory."""
    if _STATE_HOME in config.stash:
        shutil.rmtree(config.stash[_STATE_HOME], ignore_errors=True)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that runs for the test."""
    with Collector() as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, collector: Collector) -> Bench:
    """A state directory, a collector and a fake service."""
    return Bench(tmp_path, collector)
