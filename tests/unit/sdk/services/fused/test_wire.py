"""The Fused wire format as values: base URLs, path segments, statuses, rows, error texts."""

from datetime import UTC, datetime
from urllib.parse import unquote

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan._identity import trace_id
from tailspan.errors import ConfigError
from tailspan.models import JobState
from tailspan.services._requests import error_text, is_local, normalise_base_url, path_segment
from tailspan.services.fused.wire import (
    decode_row,
    decode_status,
    line_times,
)

IDENTITY = "https://www.fused.io/server/v1"
MINIMAL = {
    "job_id": "j",
    "job_name": "etl",
    "status": "running",
    "terminal_status": False,
    "total_tasks": 0,
    "finished_tasks": 0,
}

OUR_KEYS = [
    *("state", "identity", "trace_id", "attempt", "submitted_at", "finished_at", "exit_code", "error", "attributes"),
    *("details", "url", "logs_complete", "first_line_ms", "last_line_ms", "parent"),
]


def status(**fields):
    """Decode a status reply of the required fields and these."""
    return decode_status({**MINIMAL, **fields}, service="fused", identity=IDENTITY)


@pytest.mark.parametrize(
    ("given_url", "normal"),
    [
        ("https://www.fused.io/server/v1", IDENTITY),
        ("HTTPS://WWW.Fused.IO/server/v1/", IDENTITY),
        (" https://www.fused.io:443/server/v1// ", IDENTITY),
        ("https://user:secret@www.fused.io/server/v1", IDENTITY),
        ("http://[::1]:8798/server/v1", "http://[::1]:8798/server/v1"),
        ("http://localhost:80", "http://localhost"),
        ("https://h:80/Server/V1", "https://h:80/Server/V1"),
    ],
)
def test_one_spelling_of_a_base_url(given_url, normal):
    """All spellings of one URL are one identity, credentials are no part of it, and the path keeps its case."""
    assert normalise_base_url(given_url) == normal


@pytest.mark.parametrize(
    "url", ["", "www.fused.io", "ftp://h/x", "https://", "https://h:x/", "https://h/?a=1", "http://[/"]
)
def test_a_wrong_base_url_names_the_key(url):
    """What is no http URL is refused at once."""
    with pytest.raises(ConfigError) as caught:
        normalise_base_url(url)
    assert caught.value.key == "base_url"


@given(st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()))
def test_a_job_id_is_one_segment(job_id):
    """Whatever is in a job id, the server finds it in one segment of the path that httpx sends."""
    url = httpx.URL(f"http://h/server/v1/run/by-id/{path_segment(job_id)}/cancel")
    segments = url.raw_path.decode().split("/")
    assert segments[:5] == ["", "server", "v1", "run", "by-id"]
    assert (unquote(segments[5]), segments[6:]) == (job_id, ["cancel"])


@pytest.mark.parametrize("job_id", [".", "..", "a/b?c=../x", "../..", "%2e%2e", "#", "ü"])
def test_hostile_job_ids_are_one_segment(job_id):
    """Ids that mean something in a URL stay ids."""
    path = httpx.URL(f"http://h/logs/{path_segment(job_id)}").raw_path.decode()
    assert unquote(path.removeprefix("/logs/")) == job_id
    assert path.count("/") == 2


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:1/x", True),
        ("http://127.9.9.9", True),
        ("http://[::1]/x", True),
        ("http://localhost:1", True),
        ("http://localhost.evil.test", False),
        ("https://www.fused.io", False),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback(url, expected):
    """Only this machine's own addresses go without credentials."""
    assert is_local(url) is expected


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"status": "pending", "job_status": "Pending"}, JobState.PENDING),
        ({"job_status": "Running", "finished_job_status": False}, JobState.RUNNING),
        ({"job_status": "Done", "finished_job_status": True, "terminal_status": False}, JobState.SUCCEEDED),
        ({"job_status": "Failed", "finished_job_status": True, "status": "pending"}, JobState.FAILED),
        ({"job_status": "Canceled", "finished_job_status": True}, JobState.CANCELED),
        ({"status": "stopping", "job_status": None}, JobState.UNKNOWN),
        ({"status": "stopping", "job_status": "Weird", "finished_job_status": True}, JobState.FAILED),
        ({"job_status": "Failed", "finished_job_status": True, "state": "TIMED_OUT"}, JobState.TIMED_OUT),
        ({"job_status": "Running", "state": "no such state"}, JobState.RUNNING),
        ({"job_status": "Running", "state": 7}, JobState.RUNNING),
    ],
)
def test_states(fields, state):
    """The job's own status wins over its instance's; a reported state wins over both if it is one."""
    assert status(**fields).state is state


def test_our_own_keys_are_taken():
    """What our server adds comes through, so that a job has one trace however it is reached."""
    own = {
        "state": "FAILED",
        "identity": "local-uuid",
        "trace_id": "ab" * 16,
        "attempt": 2,
        "submitted_at": "2026-01-01T00:00:00+00:00",
        "started_at": "2026-01-01 00:00:01",
        "finished_at": "2026-01-01T01:00:02+01:00",
        "exit_code": -9,
        "error": "killed",
        "attributes": {"team": "geo"},
        "details": {"process.command": "x"},
        "parent": "00-x",
        "url": "http://x",
        "logs_complete": True,
    }
    job = status(**own)
    assert (job.state, job.identity, job.trace_id, job.attempt) == (JobState.FAILED, "local-uuid", "ab" * 16, 2)
    assert job.submitted_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert job.started_at == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert job.finished_at == datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC)
    assert (job.exit_code, job.error, job.parent, job.url) == (-9, "killed", "00-x", "http://x")
    assert (job.attributes, job.details, job.logs_complete) == ({"team": "geo"}, {"process.command": "x"}, True)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "state",
                "identity",
                "trace_id",
                "attempt",
                "submitted_at",
                "finished_at",
                "exit_code",
                "error",
                "attributes",
                "details",
                "url",
                "logs_complete",
                "first_line_ms",
                "last_line_ms",
                "parent",
            ]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()) | st.just({"a": 1}),
    )
)
def test_keys_of_others_do_no_harm(extra):
    """Another server may use our names for other things: the twelve fields still count."""
    job = status(job_status="Running", **extra)
    assert job.job_id == "j"
    assert len(job.trace_id) == 32
    line_times(extra)


def test_ids_are_hashed_where_none_are_told():
    """A hosted job's ids follow from base URL and job id alone."""
    job = status()
    assert (job.identity, job.trace_id, job.attempt) == (IDENTITY, trace_id(IDENTITY, "j"), 1)


def test_the_end_is_the_date_of_the_last_status():
    """The hosted API has no end time: of an ended job it is when its status last changed; naive dates are UTC."""
    job = status(job_status="Done", finished_job_status=True, job_status_date="2026-01-01T00:00:00")
    assert job.finished_at == job.job_status_date == datetime(2026, 1, 1, tzinfo=UTC)
    assert status(job_status="Running", job_status_date="2026-01-01T00:00:00").finished_at is None


@pytest.mark.parametrize(
    "fields",
    [
        {"job_id": None},
        {"job_name": 1},
        {"terminal_status": "false"},
    ],
)
def test_wrong_types_are_refused(fields):
    """The fields that say what the job is and whether it has ended are held to their types."""
    with pytest.raises(msgspec.ValidationError):
        status(**fields)


@pytest.mark.parametrize(
    "value", ["soon", "9999-99-99T00:00:00Z", "0001-01-01T00:00:00+23:00", -1, 1 << 63, 1e300, True, [], {}, ""]
)
@pytest.mark.parametrize("key", ["job_status_date", "last_heartbeat", "submitted_at", "started_at", "finished_at"])
def test_an_impossible_time_is_not_known(key, value):
    """A job with an impossible time is relayed all the same."""
    assert getattr(status(**{key: value}), key) is None


@pytest.mark.parametrize("value", ["3", -1, 1.5, None, True, [], -(1 << 63)])
@pytest.mark.parametrize("key", ["total_tasks", "finished_tasks"])
def test_an_impossible_count_is_not_known(key, value):
    """So is a job with an impossible count."""
    assert getattr(status(**{key: value}), key) == 0


@pytest.mark.parametrize("missing", list(MINIMAL))
def test_missing_fields_are_refused(missing):
    """So are those that every client requires."""
    with pytest.raises(msgspec.ValidationError, match=missing):
        decode_status({key: MINIMAL[key] for key in MINIMAL if key != missing}, service="f", identity=IDENTITY)


def test_line_times_only_where_both_are_told():
    """Null means that the server does not know cheaply, so the log itself is asked."""
    assert line_times({}) == (False, None)
    assert line_times({"first_line_ms": None, "last_line_ms": None}) == (False, None)
    assert line_times({"first_line_ms": 5, "last_line_ms": 9}) == (True, (5, 9))
    assert line_times({"first_line_ms": 9, "last_line_ms": 5}) == (True, (9, 9))


def test_rows():
    """A hosted row has no name; our server's rows have more."""
    row = decode_row({"id": "j", "job_status": "Done", "creation_date": "2026-01-01T00:00:00"}, service="f")
    assert row is not None
    assert (row.job_name, row.state, row.created_at) == (None, JobState.SUCCEEDED, datetime(2026, 1, 1, tzinfo=UTC))
    row = decode_row({"id": "j", "name": "etl", "state": "LOST", "lines": 3}, service="f")
    assert row is not None
    assert (row.job_name, row.state, row.lines) == ("etl", JobState.LOST, 3)
    assert [decode_row(wrong, service="f") for wrong in ({}, {"id": 3}, {"id": ""}, None, "x")] == [None] * 5


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"message": "no luck"}', "no luck"),
        (b'{"detail": "Not\\n Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["query", "limit"], "msg": "too large"}, "x"]}', "query.limit: too large; x"),
        (b'[{"loc": ["a", 0], "msg": "m"}]', "a.0: m"),
        (b"<html>", ""),
        (b"\xff", ""),
        (b"{}", ""),
        (b"7", ""),
    ],
)
def test_error_texts(body, text):
    """A server's own words are found in every form it uses."""
    assert error_text(body) == text


def test_a_long_error_text_is_cut():
    """A page of text does not become an error message."""
    assert len(error_text(b'"%b"' % (b"x" * 9_000))) < 600
