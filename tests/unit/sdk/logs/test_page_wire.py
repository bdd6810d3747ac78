"""Log pages as frames: they survive the wire however the reply is cut, and no other bytes are taken for them."""

import json
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.errors import ConfigError
from tailspan.logs.page import CLEAN, NANOS_PER_MS, Line, LineRun, LogPage, Stream, TaskRef
from tailspan.logs.page_wire import (
    CURSOR_MARK,
    MAX_FRAME_BYTES,
    Frame,
    FrameError,
    FrameSplitter,
    cursor_text,
    encode_frame,
    read_cursor,
)

TIMES = st.integers(-(2**62), 2**62)
PREFIXES = st.text(min_size=1, max_size=9)
LINES = st.binary(max_size=20)


@st.composite
def offset_pages(draw):
    """Pages as services with offsets make them, with their text or without."""
    runs = draw(
        st.lists(
            st.builds(
                LineRun,
                st.integers(1, 5),
                TIMES,
                st.sampled_from(range(3)),
                st.sampled_from([0, CLEAN]),
                PREFIXES,
                st.just(0),
                st.integers(0, 24),
            ),
            min_size=1,
            max_size=4,
        )
    )
    count = sum(run.lines for run in runs)
    lines = draw(st.lists(LINES, min_size=count, max_size=count))
    text = b"".join(line + b"\n" for line in lines) if not any(b"\n" in line for line in lines) else b""
    return LogPage(lines, runs, draw(st.binary(max_size=9)), text=text if draw(st.booleans()) else b"")


@st.composite
def simple_pages(draw):
    """Pages as simple services make them, with digests."""
    tasks = st.none() | st.builds(TaskRef, st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 3))
    line = st.builds(Line, st.integers(0, 2**62), LINES, st.sampled_from(Stream.NAMES), tasks, st.integers(0, 24))
    lines = draw(st.lists(line, min_size=1, max_size=9))
    return LogPage.from_lines(lines, cursor=draw(st.binary(max_size=9)), identity="here", job_id="j")


@given(
    st.lists(LINES.filter(lambda line: b"\n" not in line) | st.sampled_from([b"\xe2\x82", b"\xf0\x9f\x98", b"\xff"])),
    st.booleans(),
    st.data(),
)
def test_messages_are_lines_with_their_times_in_ms(lines, as_text, data):
    """Each line is decoded for itself, whether the page has one text or single lines."""
    runs, left = [], len(lines)
    while left:
        near_ms = data.draw(st.integers(-3, 3)) * NANOS_PER_MS + data.draw(st.integers(-3, 3))
        runs.append(LineRun(data.draw(st.integers(1, left)), near_ms, data.draw(st.integers(0, 2)), uid_prefix="u"))
        left -= runs[-1].lines
    text = b"".join(line + b"\n" for line in lines)
    page = LogPage(None, runs, b"", text=text) if as_text else LogPage(lines, runs, b"")
    streams = [run.stream for run in runs for _ in range(run.lines)]
    expected = [
        {"message": line.decode("utf-8", "replace"), "timestamp": nano // NANOS_PER_MS}
        | ({"stream": Stream.NAMES[stream]} if stream else {})
        for line, nano, stream in zip(lines, page.times_unix_nano(), streams, strict=True)
    ]
    assert list(page.messages()) == expected


def test_a_message_is_small_and_its_owner_s():
    """Messages share their table of keys, which takes half of a dict's memory, and nothing else."""
    page = LogPage(None, [LineRun(1, 5), LineRun(2, 7, Stream.STDERR)], b"", text=b"one\ntwo\nthree\n")
    first, second, third = page.messages()
    assert max(map(sys.getsizeof, (first, second, third))) < 0.6 * sys.getsizeof(dict.fromkeys(third))
    second["seen"] = second.pop("stream")
    assert [first, second, third] == [
        {"message": "one", "timestamp": 0},
        {"message": "two", "timestamp": 0, "seen": "stderr"},
        {"message": "three", "timestamp": 0, "stream": "stderr"},
    ]
    assert list(page.messages())[1:2] == [{"message": "two", "timestamp": 0, "stream": "stderr"}]
    assert json.dumps(third) == '{"message": "three", "timestamp": 0, "stream": "stderr"}'


def as_read(page):
    """What a client has of a page: it does not believe in flags, and marks the cursor."""
    if page is None:
        return None
    runs = [run._replace(flags=0) for run in page.runs]
    return LogPage(page.lines, runs, CURSOR_MARK + page.cursor, page.digests, tasks=page.tasks)


@given(
    st.lists(
        st.builds(Frame, st.integers(0, 300), st.booleans(), st.none() | offset_pages() | simple_pages()), max_size=5
    ),
    st.data(),
)
def test_frames_come_out_as_they_went_in(frames, data):
    """However the reply is cut into pieces: lines, times, streams, uids, cursors."""
    reply = b"".join(encode_frame(page, job=job, more=more) for job, more, page in frames)
    splitter = FrameSplitter()
    found = []
    while reply:
        size = data.draw(st.integers(1, len(reply)))
        found += splitter.feed(reply[:size])
        reply = reply[size:]
    found += splitter.close()
    assert found == [Frame(job, more, as_read(page)) for job, more, page in frames]
    for frame, (_, _, page) in zip(found, frames, strict=True):
        if page is not None:
            assert (frame.page.uids(), frame.page.times_unix_nano()) == (page.uids(), page.times_unix_nano())


def test_reply_that_ends_within_a_frame_is_refused():
    """A reply that is cut off is an error, not a shorter page."""
    frame = encode_frame(LogPage([b"x"], [LineRun(1, 1, uid_prefix="u")], b"1"))
    for cut in range(1, len(frame)):
        splitter = FrameSplitter()
        assert splitter.feed(frame[:cut]) == []
        with pytest.raises(FrameError, match="ends early"):
            splitter.close()


def frame_of(*values):
    """A frame of any values."""
    data = msgspec.msgpack.encode(values)
    return len(data).to_bytes(4, "big") + data


RUN = [1, 5, Stream.STDOUT, 0, "u-"]


@pytest.mark.parametrize(
    "reply",
    [
        b"[{}]".ljust(9),
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        frame_of(),
        frame_of("0", False, None),
        frame_of(-1, False, None),
        frame_of(0, False, ["cursor", [RUN], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [RUN], b"", [], b""]),
        frame_of(0, False, [b"c", [], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [RUN], b"x\ny", [], b""]),
        frame_of(0, False, [b"c", [RUN], b"x\ny\n", [], b""]),
        frame_of(0, False, [b"c", [RUN], b"", [b"x", b"y"], b""]),
        frame_of(0, False, [b"c", [[2, *RUN[1:]], [-1, *RUN[1:]]], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[0, *RUN[1:]], RUN], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[1, 5, 3, 0, "u"]], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[1, 5, -1, 0, "u"]], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[1, 5, 0, 0, ""]], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[1, 5, 0, 0, "u" * 257]], b"x\n", [], b""]),
        frame_of(0, False, [b"c", [[1, 5, 0, 0, ""]], b"x\n", [], b"7 bytes"]),
        frame_of(0, False, [b"c", [[5001, *RUN[1:]]], b"\n" * 5001, [], b""]),
    ],
)
def test_what_a_server_cannot_mean_is_refused(reply):
    """Nothing that encoding counts on is taken from a server unseen."""
    with pytest.raises(FrameError):
        FrameSplitter().feed(reply)


@given(st.binary(max_size=60))
def test_cursor_survives_a_query(cursor):
    """Whatever bytes a service makes its cursors of."""
    assert read_cursor(cursor_text(cursor)) == cursor


@pytest.mark.parametrize("text", ["a", "ä===", "a b=", "%20=="])
def test_what_is_no_cursor_is_refused(text):
    """The caller learns that it is the cursor."""
    with pytest.raises(ConfigError, match="is not a cursor"):
        read_cursor(text)


def test_a_frame_that_is_nested_too_deeply_is_none():
    """A fourth element is skipped, but not for ever."""
    body = b"\x94\x00\xc2\xc0" + b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(FrameError, match="nested"):
        FrameSplitter().feed(len(body).to_bytes(4, "big") + body)
