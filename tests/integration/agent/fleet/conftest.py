"""One PostgreSQL for the tests of the fleet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.fakes.postgres import Postgres

_names = itertools.count()


@pytest.fixture(scope="package")
def postgres() -> Iterator[Postgres]:
    """A running server."""
    with Postgres() as server:
        yield server


@pytest.fixture
def fleet_name() -> str:
    """A fleet that no other test uses."""
    return f"t{next(_names)}"
