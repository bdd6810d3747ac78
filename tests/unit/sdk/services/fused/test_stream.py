"""A log reply as a stream: the same lines however it is cut, in bounded memory."""

import json
import tracemalloc
from itertools import chain
from operator import itemgetter

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.logs.page import LineRun, Stream
from tailspan.services import _json_stream
from tailspan.services._json_stream import MAX_ELEMENT_BYTES, ArraySplitter, ReplyError, decode_json
from tailspan.services.fused.stream import Entries, entries_in_python, lines, messages, pages, usual_entries
from tailspan.services.fused.window import LateWindow

# Text that looks like the boundaries that are searched for, and escapes of all kinds.
HOSTILE = st.lists(
    st.sampled_from(
        ['},{"', "}, {", '"', "\\", "]", "[", "{", "}", ",", "ü", "😀", "\n", "\x00", "a", '{"a":[1]},{"b":{}}']
    )
).map("".join)
MESSAGE = st.fixed_dictionaries(
    {"message": HOSTILE, "timestamp": st.integers(0, 2**42)},
    optional={
        "stream": st.sampled_from(["stdout", "stderr", "", None, 7]),
        "more": st.just([{"a": 1}, {"b": {"c": 2}}]),
    },
)


def split_parts(body, sizes, *, decoder=lines, step_bytes=1):
    """Feed a body in pieces of these sizes, over and over, and return the lists of elements."""
    splitter = ArraySplitter(decoder, step_bytes)
    out = []
    position = 0
    turn = 0
    while position < len(body):
        size = sizes[turn % len(sizes)]
        out.append(splitter.feed(body[position : position + size]))
        position += size
        turn += 1
    return [*out, splitter.close()]


def split(body, sizes, *, decoder=lines, step_bytes=1):
    """Feed a body in pieces of these sizes, over and over, and return the elements."""
    return list(chain.from_iterable(split_parts(body, sizes, decoder=decoder, step_bytes=step_bytes)))


def rows(found):
    """Return text and time of each entry in columns."""
    return [row for part in found for row in zip(map(bytes.decode, part.bodies), part.times_ms, strict=True)]


def row_of(element):
    """Return text and time of an element of a reply, as `rows` does."""
    return element["message"].removesuffix("\n"), element["timestamp"]


@given(
    st.lists(MESSAGE, max_size=12),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 200),
    st.sampled_from([1, 2, 5, 1024]),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", ":\r\n ")]),
)
def test_the_same_elements_however_the_reply_is_cut(elements, sizes, step_bytes, most_pieces, ascii_only, separators):
    """Pieces may end anywhere, in a string or in a character, and messages may look like the format itself."""
    body = json.dumps(elements, ensure_ascii=ascii_only, separators=separators).encode()
    when = itemgetter("timestamp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_json_stream, "_MOST_PIECES", most_pieces)
        found = split(body, sizes, step_bytes=step_bytes)
        parts = split_parts(body, sizes, decoder=messages, step_bytes=step_bytes)
    assert rows(found) == list(map(row_of, elements))
    assert sorted(chain.from_iterable(parts), key=when) == sorted(elements, key=when)
    assert parts == [sorted(part, key=when) for part in parts]


@given(st.lists(MESSAGE, min_size=1, max_size=6), st.data())
def test_a_reply_that_breaks_off_is_an_error(elements, data):
    """The elements before the break are returned; the break itself is an error, not the end."""
    body = json.dumps(elements).encode()
    body = body[: data.draw(st.integers(0, len(body) - 1))]
    splitter = ArraySplitter(lines, 1)
    before = [] if not body else splitter.feed(body)
    with pytest.raises(ReplyError):
        splitter.close()
    assert rows(before) == list(map(row_of, elements))[: len(rows(before))]


def test_a_reply_in_pieces_of_two_bytes_takes_no_more_room():
    """Each is an object of 35 bytes."""
    body = json.dumps([{"message": "x" * 200_000, "timestamp": 1}]).encode()
    splitter = ArraySplitter(lines)
    tracemalloc.start()
    try:
        for start in range(0, len(body), 2):
            splitter.feed(body[start : start + 2])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(text) for text, _ in rows(splitter.close())] == [200_000]
    assert peak < 8 * len(body)


def given_of(element: bytes, times: int, *, step_bytes: int, buffer_below: int) -> int:
    """Feed an element again and again; return how many came out before the end, with the buffer always that small."""
    splitter = ArraySplitter(lines, step_bytes)
    splitter.feed(b"[")
    count = 0
    for _ in range(times):
        count += len(rows(splitter.feed(element)))
        assert len(splitter._buffer) + splitter._came_bytes < buffer_below
    return count


def test_elements_come_before_the_end():
    """A long reply is given in parts, and the buffer stays small."""
    element = b'{"message":"%s","timestamp":1},' % (b"x" * 100)
    assert given_of(element, 1_000, step_bytes=1_000, buffer_below=3_000) > 950


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "HTML"),
        (b"\n <!doctype html>", "HTML"),
        (b'{"message": "x"}', "starts with"),
        (b"null", "starts with"),
        (b"", "empty"),
        (b"  ", "empty"),
        (b"[1]", "object"),
        (b'["x"]', "object"),
        (b'[{"message": "x"}]', "timestamp"),
        (b'[{"message": 1, "timestamp": 1}]', "message"),
        (b'[{"message": "x", "timestamp": "1"}]', "timestamp"),
        (b'[{"message": "x", "timestamp": -1}]', "timestamp"),
        (b'[{"message": "x", "timestamp": 1700000000000000000}]', "timestamp"),
        (b'[{"message": "x", "timestamp": 1}] x', "JSON"),
        (b'[{"message": "x", "timestamp": 1},]', "JSON"),
    ],
)
@pytest.mark.parametrize("decoder", [lines, messages])
def test_other_replies_are_refused(body, why, decoder):
    """Anything but an array of lines is an error that says what it is, without showing its content."""
    with pytest.raises(ReplyError) as caught:
        split(body, [4], decoder=decoder)
    if decoder is lines:
        assert why in str(caught.value)


@pytest.mark.parametrize("before", [b"", b"\n", b"\xef\xbb\xbf"])
def test_what_is_no_log_is_told_with_its_first_piece(before):
    """The rest may never come."""
    splitter = ArraySplitter(lines)
    splitter.feed(before)
    with pytest.raises(ReplyError, match="HTML"):
        splitter.feed(b"<html>login")


def test_a_long_element_is_not_held_twice():
    """It may have 8 MiB."""
    splitter = ArraySplitter(lines)
    size, times = 64 << 10, 100
    splitter.feed(b'[{"message": "')
    tracemalloc.start()
    try:
        for _ in range(times):
            splitter.feed(b"x" * size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * times * size


def test_an_empty_log():
    """No lines are no error."""
    assert split(b" [ ] ", [1]) == []


def test_a_byte_order_mark_is_no_content():
    """Some gateways put one before the JSON."""
    assert split(b"\xef\xbb\xbf[]", [1]) == []


def test_an_element_without_end_is_bounded():
    """A reply that never closes its first string is given up, not gathered for ever."""
    splitter = ArraySplitter(lines)
    piece = b"x" * (1 << 20)
    splitter.feed(b'[{"message":"')
    for _ in range(MAX_ELEMENT_BYTES // len(piece) - 1):
        splitter.feed(piece)
    with pytest.raises(ReplyError, match="8 MiB"):
        splitter.feed(piece)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'["\xff\xfea\xe2\x82"]', "\ufffd\ufffda\ufffd"),
        (rb'["\ud800"]', "\ufffd"),
        (rb'["\udcff\uDC80x"]', "\ufffd\ufffdx"),
        (rb'["\ud83d\ude00 \ud83d"]', "😀 \ufffd"),
        (rb'["\\ud800 \ud800"]', "\\ud800 \ufffd"),
    ],
)
def test_text_that_cannot_be_is_replaced(body, text):
    """Invalid UTF-8 and lone surrogates become U+FFFD, and everything beside them stays."""
    assert decode_json(msgspec.json.Decoder(list[str]), body) == [text]


def read(entries, **window):
    """Return the pages of these (timestamp, message, stream) triples, read by a fresh window."""
    body = json.dumps([{"timestamp": t, "message": m, "stream": s} for t, m, s in entries]).encode()
    found = LateWindow("id", "job", late_window_s=10, **window)
    return [page for part in lines.decode(body) for page in pages(found, part)]


def test_one_line_ending_is_no_part_of_a_line():
    """One newline at the end goes, with its carriage return; newlines within a message and indentation stay."""
    found = read([(1, m, None) for m in ["  a\n", "b\r\n", "c\n\n", "d\r", "e\nf", "", "\n"]])
    assert found[0].lines == [b"  a", b"b", b"c\n", b"d\r", b"e\nf", b"", b""]


@given(
    st.lists(
        st.tuples(st.text("a\n\r\0\x1bü", max_size=3), st.sampled_from(["\n", "\n", "\r\n", ""])).map("".join),
        min_size=1,
    )
)
@example(["a\n", "\n", "b\n"])
@example(["a\n\0b\n", "c"])
@example(["a\n\0b\n", "c\n"])
def test_many_lines_are_read_as_each_alone(messages):
    """The steps that take all lines at once find the endings of each."""
    [page] = read([(number, message, None) for number, message in enumerate(messages)])
    alone = [read([(1, message, None)])[0] for message in messages]
    assert page.lines == [line for each in alone for line in each.lines]


def test_runs_are_of_one_instant_and_stream():
    """Lines of one millisecond are one run until the stream changes."""
    [page] = read([(1, "a", "stdout"), (1, "b", "stdout"), (1, "c", "stderr"), (2, "d", "stderr"), (2, "e", {})])
    assert page.runs == [
        LineRun(2, 1_000_000, Stream.STDOUT),
        LineRun(1, 1_000_002, Stream.STDERR),
        LineRun(1, 2_000_000, Stream.STDERR),
        LineRun(1, 2_000_001, Stream.NONE),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.text(max_size=3), st.sampled_from(["stdout", "stderr", None])), min_size=1)
)
def test_runs_and_lines_fit_together(entries):
    """Times, streams, digests and lines are columns of one table, in the order of the reply."""
    [page] = read(entries)
    assert [m["timestamp"] for m in page.messages()] == [t for t, _, _ in entries]
    assert [m.get("stream") for m in page.messages()] == [s for _, _, s in entries]
    assert len(set(page.uids())) == len(page.lines) == len(entries)


def test_pages_are_bounded():
    """At most 5,000 lines or 1 MiB a page; a longer line has a page of its own, whole."""
    assert [len(page.lines) for page in read([(t, "x", None) for t in range(12_000)])] == [5_000, 5_000, 2_000]
    big = "y" * (3 << 20)
    assert [len(page.lines) for page in read([(1, "a", None), (1, big, None), (1, "b", None)])] == [1, 1, 1]
    half = "z" * (600 << 10)
    assert [len(page.lines) for page in read([(1, half, None), (1, half, None)])] == [1, 1]


def test_each_page_has_its_own_cursor():
    """Reading on after any page gives the rest."""
    entries = [(t // 3, "x", None) for t in range(12_000)]
    for page_number, page in enumerate(read(entries), 1):
        rest = read(entries, cursor=page.cursor)
        assert sum(len(p.lines) for p in rest) == max(0, 12_000 - 5_000 * page_number)


def test_a_byte_order_mark_is_no_part_of_a_reply():
    """Some servers begin each reply with one."""
    assert decode_json(msgspec.json.Decoder(dict[str, int]), b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_lists_of_objects_within_an_element_cost_no_buffer():
    """What looks like the end of an element within one is not tried for it, as long as elements begin alike."""
    tags = b",".join([b'{"k":"v"}'] * 100)
    element = b'{"message":"x","timestamp":1,"tags":[%s]},' % tags
    assert given_of(element, 200, step_bytes=10_000, buffer_below=15_000) > 180


IMPOSSIBLE_TIMES = [
    "-1", str(1 << 63), str(-(1 << 63)), '"5"', '"\\ud800"', "1.5", "null", "true", "[]", "1e3", "1e400", "-1E+999",
    "NaN", "-Infinity", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("decoder", [lines, messages])
@pytest.mark.parametrize("time", IMPOSSIBLE_TIMES)
def test_a_line_with_an_impossible_time_hides_no_other(time, decoder):
    """It has the time 0, so that the next read still asks for the lines after the others."""
    first = f'{{"message":"NaN \\"1e999","timestamp":{time}}}'
    reply = f'[{first},{{"message":"good","timestamp":5}},{{"message":7,"timestamp":6}}]'
    found = decode_json(decoder, reply.encode())
    found_rows = [(one["message"], one["timestamp"]) for one in found] if decoder is messages else rows(found)
    assert found_rows == [('NaN "1e999', 0), ("good", 5), ("7", 6)]


@pytest.mark.parametrize("decoder", [lines, messages])
@pytest.mark.parametrize("reply", ['[{"message":"a","timestamp":-1}]', '[{"id":"a"}]', '[{"timestamp":1}]'])
def test_a_reply_without_any_line_is_refused(reply, decoder):
    """An address that is not a job API must not look like a log."""
    with pytest.raises(msgspec.ValidationError):
        decode_json(decoder, reply.encode())


def test_a_number_that_cannot_be_hides_no_other_job():
    """Python servers write NaN, which is not JSON; the rows around it are read."""
    rows = b'[{"id":"a","cost":NaN},{"id":"b","n":1e999,"text":"Infinity"},{"id":"c"}]'
    decoder = msgspec.json.Decoder(list[dict])
    assert [row["id"] for row in decode_json(decoder, rows)] == ["a", "b", "c"]
    assert decode_json(decoder, rows)[1] == {"id": "b", "n": None, "text": "Infinity"}


def in_c(json):
    """Return what C reads of an array; None for what it leaves to Python."""
    found = usual_entries(json)
    return None if found is None else [Entries(*columns) for columns in found]


ELEMENT = st.fixed_dictionaries(
    {"message": HOSTILE | st.text(max_size=80), "timestamp": st.integers(0, 3) | st.integers(0, 2**63 // 10**6)},
    optional={
        "stream": st.sampled_from(["stdout", "stderr", "", "stdin", None, 7]),
        "level": st.text(max_size=4) | st.none() | st.booleans() | st.integers(-(10**17), 10**17),
    },
)


@given(
    st.lists(ELEMENT, max_size=12),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n ")]),
    st.randoms(use_true_random=False),
)
def test_usual_entries_are_read_in_c_as_in_python(elements, ascii_only, separators, random):
    """Keys in any order, any text, in any form of JSON."""
    shuffled = [dict(random.sample(sorted(element.items()), len(element))) for element in elements]
    body = json.dumps(shuffled, ensure_ascii=ascii_only, separators=separators).encode()
    found = in_c(body)
    assert found == entries_in_python(body) or usual_entries(b"[]") is None


# Whole replies, which are changed in one place: most are then no JSON, or not of a log.
USUAL = rb'[{"message":"a\u00e9\ud83d\ude00 xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n","timestamp":1700000000000,'
USUAL += '"stream":"stdout"},\n {"timestamp":5 , "line":-12,"ok":true, "message":"ü😀'.encode()
USUAL += rb' \"\\\/\b\f\n\r\t","more":null}]'
TOKENS = [
    b"", b'"', b"\\", b"\\u12", b"\\ud800", b"\\udc00", b"\\x", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5", b"\xa0",
    b"\xe2\x80\xa8", b"\x00", b"\x0b", b"\x1f", b"\x7f", b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"00", b".5",
    b"e9", b"9" * 20, b"null", b"nul", b"tru", b'"message":"b",', b'"timestamp":7,', b'"stream":"stderr",',
    b'"stream":[],',
]  # fmt: skip


@given(st.integers(0, len(USUAL)), st.integers(0, 6), st.sampled_from(TOKENS))
@example(0, 0, b"\xef\xbb\xbf")
@example(len(USUAL), 0, b"\x00")
def test_what_c_reads_python_reads_alike(start, length, token):
    """C leaves to Python what it does not know, and never reads more or anything else."""
    body = USUAL[:start] + token + USUAL[start + length :]
    found = in_c(memoryview(body))
    if found is not None:
        assert found == entries_in_python(body)


@pytest.mark.parametrize("end", range(len(USUAL)))
def test_c_never_reads_behind_the_end(end):
    """The memory behind a buffer is not its own; here it holds the rest of the reply."""
    with memoryview(USUAL) as whole:
        assert in_c(whole[:end]) is None


def test_c_bounds_pages_as_python_does():
    """By lines and by bytes; a long line has a page of its own, and one with a newline within makes a list."""
    sizes = [1] * 12_000 + [600 << 10, 600 << 10, 3 << 20, 1, (1 << 20) - 1, 1, 1]
    body = json.dumps([{"message": "x" * size, "timestamp": at // 3} for at, size in enumerate(sizes)]).encode()
    assert in_c(body) in (None, entries_in_python(body))
    body = body.replace(b"xxx", b"x\\nx", 1)
    assert in_c(body) in (None, entries_in_python(body))
    assert any(isinstance(part.lines, list) for part in entries_in_python(body))
