"""The three variants of a command, in a directory of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.variants import Variants


@pytest.fixture
def variants(tmp_path: Path) -> Variants:
    """Return what runs commands as the three variants."""
    return Variants(tmp_path)
