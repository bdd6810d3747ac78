"""Whether what a regular expression matches can contain a literal."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tailspan.config import RedactPattern
from tailspan.config.regex_literal import can_contain


@pytest.mark.parametrize(
    ("regex", "literal", "possible"),
    [
        (r"AKIA[0-9A-Z]{16}", "AKIA", True),
        (r"ASIA[0-9A-Z]{16}", "AKIA", True),  # by chance: ASIAKIA
        (r"ASIA[0-9]{16}", "AKIA", False),
        (r"(AKIA|ASIA)[0-9A-Z]{16}", "AKIA", True),
        (r"(?i)password=\S+", "password=", True),
        (r"(?i)password=\S+", "PassWord=", True),
        (r"password=\S+", "PASSWORD", True),
        (r"password=\d+", "PASSWORD", False),
        (r"passw(or)?d", "passwd", True),
        (r"passw(or)d", "passwd", False),
        (r"\d{4}-\d{4}", "card", False),
        (r"\d{4}-\d{4}", "-", True),
        (r"\d{4}-\d{4}", "12345", False),
        (r"\d{4}\d?-", "12345", True),
        (r"(ab)+", "babab", True),
        (r"(ab){2}", "ababa", False),
        (r"[^=]+", "a=b", False),
        (r"[^=]+=.*", "a=b", True),
        (r"(?<=token: )\S+", "token", True),
        (r"(\w)\1", "==", True),
        (r".*", "a\nb", False),
        (r"(?s).*", "a\nb", True),
        (r"^Bearer \S+$", "Bearer ", True),
        (r"^Bearer \S+$", "bearer ", False),
    ],
)
def test_whether_a_match_can_contain_a_literal(regex: str, literal: str, possible: bool) -> None:
    """Repeats, branches, classes, flags; True wherever it is not certain."""
    assert can_contain(regex, literal) is possible


@given(st.from_regex(r"[ab](a|b|[^b]|a{0,2}|(ab)+|\w?){0,4}", fullmatch=True), st.data())
def test_what_a_match_contains_is_possible(regex: str, data: st.DataObject) -> None:
    """Never False for a part of a real match."""
    try:
        re.compile(regex)
    except re.error:
        assume(False)
    text = data.draw(st.from_regex(regex, fullmatch=True))
    start = data.draw(st.integers(0, len(text)))
    part = text[start : data.draw(st.integers(start, len(text)))]
    assert not part or can_contain(regex, part)


def test_a_pattern_that_redacts_nothing_is_refused() -> None:
    """The mistake is reported at configuration, not by a secret in a store."""
    with pytest.raises(ValidationError, match="no match of regex can contain literal"):
        RedactPattern(literal="AKIA", regex="ASIA[0-9]{16}")
