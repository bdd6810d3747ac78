"""Replies of a Fused job API, its login file and stored cursors, of any content: an answer, or an error of ours."""

from __future__ import annotations

import asyncio
import json
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.cli.show import jobs_table, json_of, status_fields
from tailspan.config import LinksSettings
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError
from tailspan.logs.page import LineRun, LogPage
from tailspan.logs.page_wire import FrameError, FrameSplitter, encode_frame
from tailspan.logs.printing import end_text
from tailspan.services._json_stream import STEP_BYTES, ArraySplitter, ReplyError
from tailspan.services._requests import error_text
from tailspan.services.fused.auth import Credentials
from tailspan.services.fused.stream import lines, messages, pages
from tailspan.services.fused.window import LateWindow
from tailspan.services.fused.wire import decode_row, decode_status, line_times
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.job.mapping import failure_record, resource_attributes, spans_of
from tailspan_agent.otlp.messages import parse_request
from tailspan_agent.otlp.requests import logs_request
from tailspan_agent.records.encode import LogContext, encode_lines
from tests.property.effort import assert_linear, fuzz

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
MOMENTS = st.sampled_from(
    [
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59.999999-23:59",
        "2026-01-01T00:00:00",
        "2026-01-01",
        0,
        -1e18,
        1e300,
    ]
)
FIELDS = {
    "job_id": st.text(max_size=20),
    "job_name": st.text(max_size=20),
    "status": st.text(max_size=9) | st.sampled_from(["running", "terminated"]),
    "terminal_status": st.booleans(),
    "total_tasks": st.integers(),
    "finished_tasks": st.integers(),
}
OURS = {
    **dict.fromkeys(("last_heartbeat", "job_status_date", "submitted_at", "started_at", "finished_at"), MOMENTS | JSON),
    **dict.fromkeys(("instance_id", "identity", "trace_id", "error", "url", "parent", "details", "attributes"), JSON),
    **dict.fromkeys(("exit_code", "attempt", "logs_complete", "first_line_ms", "last_line_ms"), JSON),
    "job_status": st.sampled_from(["Done", "Failed", "Canceled", "Running", "?"]) | JSON,
    "state": st.sampled_from(["FAILED", "LOST", "PENDING", "nonsense"]) | JSON,
    "finished_job_status": st.booleans() | st.none(),
}


@fuzz(200)
@given(reply=st.fixed_dictionaries(FIELDS, optional=OURS))
def test_a_status_of_any_content(reply: dict[str, Any]) -> None:
    """What is taken as a status can be shown, printed as JSON and relayed."""
    with suppress(msgspec.ValidationError):
        reply = msgspec.json.decode(json.dumps(reply, allow_nan=False).encode()) if _is_json(reply) else reply
        job = decode_status(reply, service="s", identity="http://x")
        line_times(reply)
        ledger = JobLedger(first_seen_ns=1, logs_complete=True)
        spans_of(job, ledger)
        failure_record(job, ledger)
        resource_attributes(job, service_name="s", watch_attributes={}, otlp_resource={}, stream=0)
        LogContext.for_job(job)
        end_text(job)
        json.dumps(json_of(job))
        status_fields(job, LinksSettings(trace="http://x/{trace_id}?job={job_name}&to={end_ms}").of(job))
        assert job.duration is None or job.duration.total_seconds() >= 0


def _is_json(reply: Any) -> bool:
    try:
        json.dumps(reply, allow_nan=False).encode()
    except ValueError:
        return False
    return True


@fuzz(200)
@given(
    row=JSON
    | st.fixed_dictionaries(
        {"id": st.text()}, optional={**OURS, "creation_date": MOMENTS | JSON, "lines": JSON, "job_name": JSON}
    )
)
def test_a_row_of_any_content(row: Any) -> None:
    """What is taken as a row of the list can be shown."""
    job = decode_row(row, service="s")
    if job is not None:
        jobs_table([(job, None)])
        json.dumps(json_of(job))


@fuzz(200)
@given(body=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
@example(body=b"[" * 100_000)
@example(body=b'{"message":' * 100_000)
def test_an_error_of_any_content(body: bytes) -> None:
    """Its text is short and in one line, whatever it was."""
    text = error_text(body)
    assert len(text) <= 503
    assert "\n" not in text


PIECES = st.lists(
    st.binary(max_size=40)
    | st.sampled_from(
        [
            b"[",
            b"]",
            b"{",
            b"}",
            b'"',
            b",",
            b"},{",
            b'{"message":"',
            b'","timestamp":1}',
            b"\\ud8",
            b"\\",
            b"null",
            b"\xef\xbb\xbf",
        ]
    ),
    max_size=30,
)


@fuzz(200)
@given(pieces=PIECES, step=st.integers(1, 64), decoder=st.sampled_from([lines, messages]))
@example(pieces=[b"[" * 5000], step=8, decoder=lines)
@example(pieces=[b'[{"message":"x","timestamp":1,"a":' + b"[" * 5000], step=8, decoder=messages)
def test_a_log_of_any_bytes(pieces: list[bytes], step: int, decoder: Any) -> None:
    """Lines that can be encoded, or the one error."""
    splitter = ArraySplitter(decoder, step)
    window = LateWindow("me", "job", late_window_s=10)
    try:
        found = [element for piece in pieces for element in splitter.feed(piece)] + splitter.close()
    except ReplyError:
        return
    if decoder is lines:
        for page in [page for part in found for page in pages(window, part)]:
            assert isinstance(page, LogPage)
            encode_lines(page, context=LogContext(trace_id=b"t" * 16, span_id=b"s" * 8))


@pytest.mark.parametrize(
    "unit",
    [
        b'},{"' * 3,
        b'{"message":"},{\\"},{","timestamp":1},',
        b'{"message":"a","timestamp":1},',
        b'"},{"',
        b"},{",
        b"\\ud800",
        b"\xff",
    ],
)
def test_a_hostile_log_takes_linear_time(unit: bytes) -> None:
    """Text that looks like boundaries everywhere does not make the splitter search again and again."""

    def work(text: bytes) -> None:
        # An eighth of the usual step and pieces, so that little text makes many steps.
        splitter = ArraySplitter(lines, STEP_BYTES // 8)
        with suppress(ReplyError):
            splitter.feed(b"[")
            for start in range(0, len(text), 8192):
                splitter.feed(text[start : start + 8192])
            splitter.close()

    assert_linear(work, lambda size: b'{"message":"' * (unit[:1] != b"{") + unit * (size // len(unit)), 1 << 18)


def test_an_endless_log_is_held_in_little_memory() -> None:
    """A reply of 200 MB passes through a few MB."""
    element = b'{"message":"' + b"x" * 200 + b'","timestamp":1},'
    block = element * 5_000
    splitter = ArraySplitter(lines)
    splitter.feed(b"[")
    tracemalloc.start()
    for _ in range(40):
        splitter.feed(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20


LOGINS = (
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {"access_token": JSON | st.text()},
        optional={"auth_scheme": JSON, "expires_at": MOMENTS | JSON, "refresh_token": JSON},
    ).map(lambda value: json.dumps(value).encode())
)


@fuzz(150)
@given(content=LOGINS)
@example(content=b"[" * 100_000)
@example(content=b'{"access_token": "t", "expires_at": "0001-01-01T00:00:00+23:59", "refresh_token": "r"}')
@example(content=b'{"access_token": "t", "auth_scheme": "a\\nb"}')
@example(content=b'{"access_token": "t", "auth_scheme": "\\u00e9"}')
def test_a_login_file_of_any_content(content: bytes) -> None:
    """A header that can be sent, or an error that says what to do."""
    with tempfile.TemporaryDirectory() as path:
        file = Path(path) / "credentials"
        file.write_bytes(content)
        credentials = Credentials(
            "f", "https://x.example", environ={}, login_file=file, oauth_url="http://127.0.0.1:9/token"
        )
        with suppress(AuthError, ServiceUnavailableError):
            value = asyncio.run(credentials.authorization()).value
            httpx.Request("GET", "http://x", headers={"Authorization": value})
            assert value.isascii()
            assert value.isprintable()


@fuzz(200)
@given(data=st.data())
def test_a_cursor_of_any_content(data: st.DataObject) -> None:
    """A stored cursor that is damaged is refused or used; it never breaks the read."""
    window = LateWindow("me", "job", late_window_s=10)
    count = data.draw(st.integers(0, 5))
    window.take([1000 + number // 2 for number in range(count)], [b"%d" % number for number in range(count)])
    cursor = bytearray(window.cursor())
    for _ in range(data.draw(st.integers(0, 3))):
        cursor[data.draw(st.integers(0, len(cursor) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del cursor[data.draw(st.integers(0, len(cursor))) :]
    if data.draw(st.integers(0, 5)) == 0:
        cursor = bytearray(data.draw(st.binary()))
    try:
        again = LateWindow("me", "job", bytes(cursor), late_window_s=10)
    except ConfigError:
        return
    again.take([1000, 1001, 1002, 10**12], [b"0", b"b", b"c", b"d"])
    LateWindow("me", "job", again.cursor(), late_window_s=10)


def test_a_cursor_whose_times_do_not_ascend_is_refused() -> None:
    """It would be used, and what it becomes would not."""
    for steps in ([1000, 0], [1000, -1]):
        damaged = msgspec.msgpack.encode(["tailspan.window/1", 0, steps, [1, 1], bytes(16)])
        with pytest.raises(ConfigError):
            LateWindow("me", "job", damaged, late_window_s=10)


def test_a_cursor_cannot_ask_for_memory() -> None:
    """A forged count of lines is not believed."""
    forged = msgspec.msgpack.encode(["tailspan.window/1", 0, [1] * 3, [20_000, 2**62, 5], b""])
    with pytest.raises(ConfigError):
        LateWindow("me", "job", forged, late_window_s=10)


FRAMES = b"".join(
    encode_frame(LogPage(lines_, [LineRun(2, 5, uid_prefix="u-")], b"7", text=text), job=number)
    for number, (lines_, text) in enumerate([([b"a", b"b"], b"a\nb\n"), ([b"a\n", b""], b"")])
)


@fuzz(300)
@given(
    reply=st.binary(max_size=80)
    | st.tuples(st.integers(0, len(FRAMES) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda change: FRAMES[: change[0]] + change[1] + FRAMES[change[0] + len(change[1]) :]
    )
)
def test_log_pages_of_any_content(reply: bytes) -> None:
    """What is taken as a page can be encoded, line by line; anything else is an error of ours."""
    splitter = FrameSplitter()
    with suppress(FrameError):
        for frame in splitter.feed(reply) + splitter.close():
            if frame.page is not None:
                context = LogContext(trace_id=b"t" * 16, span_id=b"s" * 8)
                encoded = encode_lines(frame.page, context=context)
                assert encoded.count == len(frame.page.lines) == len(frame.page.uids())
                parse_request("logs", logs_request([(b"", [records for records, _ in encoded.pieces])]))
