"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agents import Bench
from tests.fakes.collector import Collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that runs for the test."""
    with Collector() as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, collector: Collector) -> Bench:
    """A state directory, a collector and a fake service."""
    return Bench(tmp_path, collector)
