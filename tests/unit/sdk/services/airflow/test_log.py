"""The log of an attempt: the same lines from whatever position it is read, and each of them once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.page import Line, TaskRef
from tailspan.services._json_stream import ReplyError
from tailspan.services.airflow.log import AirflowEntry as Entry
from tailspan.services.airflow.log import AttemptLog, LogSplitter, unix_nano

REF = TaskRef("extract", "extract", 1)
HEADER = [
    Entry(event="::group::Log message source details"),
    Entry(event="http://vm/log"),
    Entry(event="::endgroup::"),
]
TEXTS = st.sampled_from(["a", "a", "b", "two\nlines", "two\ntwo\ntwo", "", "\n", "::endgroup::"])


def entry(text: str, ms: int | None) -> Entry:
    """An entry of a time, or without one."""
    time = None if ms is None else f"2024-11-29T10:00:{ms // 1000:02}.{ms % 1000:03}000Z"
    return Entry(event=text, timestamp=time, level="info", logger="etl")


@st.composite
def growing_logs(draw: st.DrawFn) -> list[tuple[int, Entry]]:
    """Entries in the order of their time, each with the number of the poll from which it is visible."""
    found, ms, poll = [], 0, 0
    for text in draw(st.lists(TEXTS, max_size=12)):
        has_time = draw(st.integers(0, 3)) > 0
        step = draw(st.integers(0, 2)) if has_time else 0
        ms += step
        if has_time and not step:
            # Of equal entries of one time, Airflow returns one.
            text = "\n".join(f"{len(found)} {line}" for line in text.split("\n"))
        poll += draw(st.integers(0, 1))
        found.append((poll, entry(text, ms if has_time else None)))
    return found


def read(log: AttemptLog, entries: Sequence[Entry], token: str | None, most: int) -> list[Line]:
    """Read the log as a server has it, whose tokens are numbers of entries, but take at most some lines."""
    log.add(entries[int(log.token) :] if log.token else [*HEADER, *entries])
    log.end(token)
    taken: list[Line] = []
    while log.head is not None and len(taken) < most:
        taken.append(log.take())
    return taken


@given(growing_logs(), st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), max_size=14))
def test_every_line_comes_once_from_any_position(entries: list[tuple[int, Entry]], polls: list[tuple[int, bool, bool]]):
    """Readers that stop at any line, new processes, refused tokens, replies without one: nothing changes."""
    whole = read(AttemptLog(REF, 7), [one for _, one in entries], None, 10_000)
    found: list[Line] = []
    packed: object = None
    for number, (most, has_token, is_refused) in enumerate([*polls, (10_000, False, False)]):
        log = AttemptLog(REF, 7, packed)
        if is_refused:
            log.restart()
        last = number == len(polls)
        visible = [one for poll, one in entries if poll <= number or last]
        found += read(log, visible, str(len(visible)) if has_token and visible else None, most)
        packed = log.pack()
    assert found == whole
    assert len({line.uid for line in whole}) == len(whole)


@given(st.data(), st.integers(1, 200))
def test_late_lines_repeat_none(data: st.DataObject, count: int):
    """Many entries are written late and sort before the token: no line comes twice, and none that is not in the log."""
    order = data.draw(st.permutations(range(count)))
    whole = read(AttemptLog(REF, 0), [entry(str(ms), ms) for ms in range(count)], None, 10_000)
    found: list[Line] = []
    packed: object = None
    visible: set[int] = set()
    while order:
        batch = data.draw(st.integers(1, 100))
        visible |= set(order[:batch])
        order = order[batch:]
        log = AttemptLog(REF, 0, packed)
        entries = [entry(str(ms), ms) for ms in sorted(visible)]
        found += read(
            log, entries, data.draw(st.sampled_from([str(len(entries)), None])), data.draw(st.integers(0, 200))
        )
        packed = log.pack()
    uids = [line.uid for line in found]
    assert len(set(uids)) == len(uids)
    assert set(found) <= set(whole)


def test_a_line_that_is_a_little_late_comes_with_the_next_read():
    """It sorts before the token of the last reply, but after that of the reply before."""
    ms = list(range(0, 3000, 2))
    packed: object = None

    def texts() -> list[str]:
        nonlocal packed
        log = AttemptLog(REF, 0, packed)
        found = read(log, [entry(str(one), one) for one in sorted(ms)], str(len(ms)), 10_000)
        packed = log.pack()
        assert len(ms) - int(log.token or 0) < 200
        return [line.message for line in found]

    assert len(texts()) == 1500
    for number in range(5):
        ms += range(max(ms) + 2, max(ms) + 80, 2)
        assert len(texts()) == 39
        late = [3001 + 78 * number, 3051 + 78 * number, 11 + 2 * number]
        ms += late
        assert texts() == [str(one) for one in late[:2]]


def test_many_lines_without_a_time():
    """A log of plain text: each poll brings what is new."""
    entries: list[Entry] = [entry("begin", 1), *(entry("tick", None) for _ in range(2000))]
    packed: object = None
    found: list[Line] = []
    for count in (1, 600, 601, 640, 1900, 2001):
        log = AttemptLog(REF, 0, packed)
        found += read(log, entries[:count], str(count), 10_000)
        packed = log.pack()
    assert len(found) == len({line.uid for line in found}) == 2001
    assert [line.time_unix_nano for line in found] == sorted({line.time_unix_nano for line in found})


def test_lines_of_an_entry():
    """Stream, severity, a text of several lines, a traceback with its cause; the header of the server is no line."""
    detail = [
        {
            "exc_type": "RuntimeError",
            "exc_value": "no\nway",
            "exc_notes": ["a note"],
            "is_cause": False,
            "frames": [{"filename": "/dags/etl.py", "lineno": 7, "name": "load"}],
        },
        {"exc_type": "KeyError", "exc_value": "'x'", "is_cause": True, "frames": []},
    ]
    time = "2024-11-29T10:00:00.000001Z"
    entries: list[Entry | str] = [
        *HEADER,
        Entry(event="out", timestamp=time, level="info", logger="task.stdout"),
        Entry(event="err", timestamp=time, level="error", logger="task.stderr"),
        Entry(event="Task failed", timestamp=time, level="critical", logger="task", error_detail=detail),
        Entry(event=7, timestamp="not a time", level=None, logger=None, error_detail={"exc_type": "X"}),
        "a plain line",
    ]
    log = AttemptLog(REF, 0)
    log.add(entries)
    log.end(None)
    lines = [log.take() for _ in range(13)]
    assert [(line.message, line.stream, line.severity) for line in lines] == [
        ("out", "stdout", 9),
        ("err", "stderr", 17),
        ("Task failed", "", 21),
        ("KeyError: 'x'", "", 21),
        ("", "", 21),
        ("The above exception was the direct cause of the following exception:", "", 21),
        ("", "", 21),
        ("Traceback (most recent call last):", "", 21),
        ('  File "/dags/etl.py", line 7, in load', "", 21),
        ("RuntimeError: no", "", 21),
        ("way", "", 21),
        ("a note", "", 21),
        ("7", "", 0),
    ]
    assert not log.is_whole
    assert log.take().message == "a plain line"
    assert log.is_whole
    assert [line.time_unix_nano for line in lines[2:12]] == [(unix_nano(time) or 0) + place for place in range(2, 12)]


@pytest.mark.parametrize(
    "packed",
    [
        7,
        [],
        ["", 0, 0, "", 0, 0, 0, 0, 0, 0],
        ["", -1, 0, "", 0, 0, 0, 0, 0, 0, b""],
        [1, 0, 0, "", 0, 0, 0, 0, 0, 0, b""],
        ["", 0, 0, "", 0, 0, 0, 0, "", 0, b""],
        ["", 0, 0, "", 0, 0, 0, 0, 0, -2, b""],
        ["", 0, 0, "", 0, 0, 0, 0, 0, 0, ""],
    ],
)
def test_a_position_that_is_none(packed: object):
    """It raises what the service turns into its error."""
    with pytest.raises((TypeError, ValueError)):
        AttemptLog(REF, 0, packed)


@pytest.mark.parametrize("token", [None, "abc.def"])
@pytest.mark.parametrize("token_first", [False, True])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_reply_in_pieces(token: str | None, token_first: bool, step: int):
    """The entries and the token are the same however the reply is cut, and in whatever order its keys are."""
    content = [{"event": f'line {n} }},{{"', "error_detail": [{"frames": [{"a": 1}, {"a": 2}]}]} for n in range(50)]
    reply = (
        {"continuation_token": token, "content": content}
        if token_first
        else {"content": content, "continuation_token": token}
    )
    data = json.dumps(reply, separators=(",", ":") if step == 7 else None).encode()
    splitter = LogSplitter()
    found = [one for start in range(0, len(data), step) for one in splitter.feed(data[start : start + step])]
    found += splitter.close()
    assert [one.event for one in found if isinstance(one, Entry)] == [one["event"] for one in content]
    assert splitter.token == token


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b'{"content":[{"event":"a"}', b'{"detail":"x"}', b'{"content":7}']
)
def test_a_reply_that_is_no_log(data: bytes):
    """It is an error of the reply."""
    splitter = LogSplitter()

    def read_all() -> None:
        splitter.feed(data)
        splitter.close()

    with pytest.raises(ReplyError):
        read_all()
