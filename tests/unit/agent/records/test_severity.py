"""The severity in the text of a line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.errors import ConfigError
from tailspan_agent.records import severity
from tailspan_agent.records.severity import (
    SEVERITIES,
    UNSPECIFIED,
    find_severities,
    find_severities_in_python,
    find_severity,
    severity_number,
)

LINES = [
    ("INFO:root:basicConfig", 9, "INFO"),
    ("2024-05-12 12:00:00,123 - geo.tiles - WARNING - slow", 13, "WARNING"),
    ("2024-05-12 12:00:00,123 INFO geo.tiles: done", 9, "INFO"),
    ("2024-05-12 12:00:00,123 geo.tiles ERROR failed", 17, "ERROR"),
    ("2024-05-12T12:00:00.123456Z  INFO rust_app: started", 9, "INFO"),
    ("24/05/12 12:00:00 WARN SparkContext: slow", 13, "WARN"),
    ("12:00:00.000 [pool-1 thread-2] DEBUG c.f.Tiles - hit", 5, "DEBUG"),
    ("2024-05-12 12:00:00.000 | SUCCESS  | app:main:3 - done", 10, "SUCCESS"),
    ("2024-05-12 12:00:00 [info     ] structlog event", 9, "info"),
    ("[2024-05-12 12:00:00,000: INFO/MainProcess] celery", 9, "INFO"),
    ("[2024-05-12T12:00:00.000+0000] {taskinstance.py:1} ERROR - airflow", 17, "ERROR"),
    ("[CRITICAL] out of disk", 21, "CRITICAL"),
    ("2024/05/12 12:00:00 [error] 7#7: nginx", 17, "error"),
    ("ERROR: no such table", 17, "ERROR"),
    ("  error: expected ';'", 17, "error"),
    ("Warning: deprecated", 13, "Warning"),
    ("FATAL cannot go on", 21, "FATAL"),
    ("ERROR", 17, "ERROR"),
    ("time=2024-05-12T12:00:00Z level=warn msg=slow", 13, "warn"),
    ('ts=1 level="error" msg="no"', 17, "error"),
    ('{"level": "info", "msg": "ERROR: in the text"}', 9, "info"),
    ('{"message": "x [ERROR] y", "severity":"NOTICE"}', 10, "NOTICE"),
    ('{"levelname": "DEBUG"}', 5, "DEBUG"),
    ("I0512 12:00:00.123456    7 main.cc:12] glog", 9, "INFO"),
    ("W0512 12:00:00.123456    7 main.cc:12] glog", 13, "WARNING"),
    ('E0512 12:00:00.123456    7 klog.go:12] "klog" err="x"', 17, "ERROR"),
    ("F0512 12:00:00.123456    7 main.cc:12] glog", 21, "FATAL"),
]

UNSPECIFIED_LINES = [
    "",
    "plain text",
    "there was no ERROR in it",
    "an error occurred",
    "Information about the run",
    "INFORMATION desk",
    "the info: see below",
    "errors: 0",
    "MYERROR: x",
    "processed 12 ERROR rows",
    "log_level=DEBUG is set",
    '{"msg": "ERROR: only in the text"}',
    '{"level": 30}',
    '{"level": "beginner"}',
    "<error>xml</error>",
    "code: type[Warning] = None",
    "I0512 is a part number",
    "x" * 500 + " [ERROR] too far right to be a prefix",
]


@pytest.mark.parametrize(("line", "number", "text"), LINES)
def test_known_formats(line: str, number: int, text: str) -> None:
    """The formats of loggers are read; the text is the word of the line."""
    assert SEVERITIES[find_severity(line.encode())] == (number, text)


@pytest.mark.parametrize("line", UNSPECIFIED_LINES)
def test_a_word_in_prose_is_no_level(line: str) -> None:
    """A line without a level is unspecified, so that it is never dropped."""
    assert find_severity(line.encode()) == UNSPECIFIED


# Pieces of lines that levels stand between, so that random lines come near to real ones, and near misses to hits.
PIECES = st.sampled_from(
    [b"INFO", b"ERROR", b"WARNING", b"ERR", b"info", b"Error", b"12:00:00", b"2024-05-12 ", b" ", b"  ", b":", b": ",
     b" - ", b"[", b"]", b"|", b"/", b"level=", b'"', b'{"', b'"level": "', b"=", b"'", b"\t", b"I0512 12:00:00", b"x",
     b"S", b"7", b"root", b"(", b")", b"{", b"}", b"-", b"+", b",", b"a.b.c",
     b"\0", b"\xff", b"\x0b", b"FATAL", b"Emergency", b"lvl=", b"log.level", b"_"]
)  # fmt: skip
RANDOM_LINES = st.lists(PIECES, max_size=9).map(b"".join)
# Around the length up to which a level is searched, and the longest indent.
HEADS = st.tuples(st.sampled_from([b"x", b" ", b"12:00 ", b'{"a": ', b"abc-"]), st.integers(30, 130), RANDOM_LINES).map(
    lambda parts: (parts[0] * parts[1])[: parts[1]] + parts[2]
)
REAL_LINES = st.sampled_from([line.encode() for line, *_ in LINES] + [line.encode() for line in UNSPECIFIED_LINES])


@given(st.lists(RANDOM_LINES | REAL_LINES | HEADS, max_size=40), st.booleans())
def test_all_lines_at_once_equal_the_reference(lines: list[bytes], repeat: bool) -> None:
    """For any page, as a list or a text, in C and in Python, whose cache changes the cost and never the result."""
    lines = lines * 20 if repeat else lines
    expected = bytes(map(find_severity, lines))
    for find in (find_severities, find_severities_in_python):
        assert find(lines) == expected
        assert find(b"".join(line + b"\n" for line in lines)) == expected


@given(RANDOM_LINES, RANDOM_LINES, st.text("0123456789", min_size=2, max_size=2))
def test_cached_starts_hold_for_other_lines(start: bytes, end: bytes, digits: str) -> None:
    """A line that starts like an earlier one, but for digits, gets the severity of the reference."""
    other = start.replace(b"12", digits.encode()) + end
    lines = [start, start + b" the rest of it", other, end, start[:-1], other[:-1]]
    for find in (find_severities, find_severities_in_python):
        assert find(lines) == bytes(map(find_severity, lines))


@pytest.mark.parametrize(
    "lines",
    [
        [b"ERR: x", b"ERROR", b"ERRORS happened"],
        [b"12:00 INFO x", b"12:00 INFORM", b"12:00 INFO2"],
        [b"x INFO - a", b"x INFO b", b"x INFO -b"],
        [b"[info  ] a", b"[info b"],
        [b'{"level": "info"}', b'{"level": "info": 1}', b'{"level": "information"}'],
        [b"I0512 12:00:00.1 glog", b"I0512 12:00:0x"],
        [b"level=info msg", b"level=information"],
    ],
)
def test_near_misses_of_cached_starts(lines: list[bytes]) -> None:
    """A cached start has all bytes that determine the severity: a line that lacks one does not match."""
    for find in (find_severities, find_severities_in_python):
        assert find(2 * lines) == bytes(map(find_severity, 2 * lines))


def test_every_level_is_found_in_each_of_its_forms() -> None:
    """C and Python have the same table, in the same order."""
    lines = [level.text.encode() + b": x" for level in SEVERITIES[1:]]
    for find in (find_severities, find_severities_in_python):
        assert list(find(lines)) == list(range(1, len(SEVERITIES)))


def test_the_cache_is_bounded() -> None:
    """A page whose level never has the same position twice does not grow the cache without limit."""
    learner = severity._Learner()
    lines = [
        b"12:00 " + b"n" * (index % 80) + bytes([97 + index % 26, 97 + index // 26 % 26]) + b" INFO x"
        for index in range(3000)
    ]
    assert set(map(learner.find, lines)) == {find_severity(b"INFO x")}
    assert len(learner._shapes) <= 512
    assert len(learner._widths) <= 8


@pytest.mark.parametrize("lines", [(b"a",), "a\n", ["a"], None])
def test_what_is_no_list_of_bytes_is_an_error(lines: object) -> None:
    """C reads no memory but that of the lines."""
    if find_severities is find_severities_in_python:
        pytest.skip("Tailspan was installed without its C part")
    with pytest.raises(TypeError):
        find_severities(lines)


def test_names_of_severities() -> None:
    """A configured severity may have any case; an unknown one is an error that lists the known ones."""
    assert severity_number("warn") == severity_number("WARNING") == 13
    with pytest.raises(ConfigError, match="'loud' is not a severity: use one of TRACE"):
        severity_number("loud")
