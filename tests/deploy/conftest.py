"""What tests of the service suite need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tools() -> Path:
    """Where `make test-services` installs linters and schemas, apart from what Tailspan itself needs."""
    return Path(sys.executable).parent.parent / "tools" / "bin"
