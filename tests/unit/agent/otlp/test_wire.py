"""`tailspan_agent.otlp.wire`: attributes encoded in C are exactly those encoded in Python."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan._native import COMPILED
from tailspan_agent.otlp import wire
from tailspan_agent.otlp.wire import AttributeValue, attributes_fields, attributes_fields_in_python

TEXTS = st.text(st.characters(), max_size=200) | st.sampled_from(["", "x" * 127, "x" * 128, "é" * 8192, "\ud800"])
NUMBERS = (
    st.sampled_from([0, 127, 128, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, 1 << 64, -(1 << 63) - 1]) | st.integers()
)
VALUES = TEXTS | st.booleans() | NUMBERS | st.floats() | st.lists(TEXTS, max_size=3)


@given(st.integers(1, 31), st.dictionaries(TEXTS, VALUES, max_size=6))
@example(15, {})
@example(16, {"key": "\ud800 first", "second": 1})
def test_attributes_are_the_same_in_c(number: int, attributes: Mapping[str, AttributeValue]) -> None:
    """Byte for byte, also for what the function in C leaves to the one in Python, and for other mappings."""
    expected = attributes_fields_in_python(number, attributes)
    assert attributes_fields(number, attributes) == expected
    assert attributes_fields(number, MappingProxyType(attributes)) == expected


@pytest.mark.skipif(not COMPILED, reason="Tailspan was installed without its C part")
def test_usual_attributes_are_encoded_in_c() -> None:
    """Texts, numbers and flags of a job need no Python; sequences and numbers beyond 64 bits do."""
    usual: dict[str, AttributeValue] = {"name": "é", "count": -1, "complete": True, "share": 0.5}
    assert wire._usual_attributes(9, usual) == attributes_fields_in_python(9, usual)
    for unusual in (["a"], 1 << 63, "\ud800"):
        assert wire._usual_attributes(9, {**usual, "unusual": unusual}) is None
    with pytest.raises(TypeError):
        wire._usual_attributes("9", usual)  # type: ignore[arg-type]
