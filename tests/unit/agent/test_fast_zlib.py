"""`tailspan_agent.fast_zlib`, with ISA-L and without."""

from __future__ import annotations

import gzip
import importlib
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent import fast_zlib as deflate


@pytest.fixture(params=["as installed", "without ISA-L"], scope="module")
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module, and the module where its package is missing."""
    if request.param == "as installed":
        yield deflate
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "isal", None)
        patch.setitem(sys.modules, "isal.isal_zlib", None)
        patch.delitem(sys.modules, deflate.__name__)
        yield importlib.import_module(deflate.__name__)


def test_isal_is_used_if_installed(module: ModuleType) -> None:
    """Otherwise zlib does."""
    installed = module is deflate and find_spec("isal") is not None
    assert module._library().__name__ == ("isal.isal_zlib" if installed else "zlib")


@given(payload=st.binary(max_size=3000), times=st.integers(1, 50))
def test_gzip_is_standard_and_deterministic(module: ModuleType, payload: bytes, times: int) -> None:
    """Any gzip reads it, and a batch that is sent again has the same bytes."""
    packed = module.gzip(payload * times)
    assert gzip.decompress(packed) == payload * times
    assert module.gzip(payload * times) == packed


@given(parts=st.lists(st.binary(max_size=300)))
def test_checksums_are_zlibs(module: ModuleType, parts: list[bytes]) -> None:
    """A receipt of one host is verified on another."""
    found = 0
    for part in parts:
        found = module.crc32(part, found)
    assert found == zlib.crc32(b"".join(parts))


def test_batches_shrink(module: ModuleType) -> None:
    """Log records are repetitive."""
    payload = b"".join(b"INFO line %d of a job that says the same again and again\n" % n for n in range(10_000))
    assert len(module.gzip(payload)) < len(payload) / 8
